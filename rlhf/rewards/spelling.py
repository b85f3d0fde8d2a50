r"""Converts the LaTeX and typography of an answer to one plain spelling, with one sign for each meaning.

Of LaTeX, only `\frac`, `\binom`, `\overline`, functions and Greek letters remain. Braces group, and ⦃ ⦄ are the braces
of a set. "and", "or" and wide spaces between values become commas.
"""

import re

REALS = "\N{DOUBLE-STRUCK CAPITAL R}"


def _each(names: str, spelling: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), spelling)


# LaTeX command -> plain spelling. Commands that are not listed stay.
COMMANDS = {
    **_each("left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits nolimits", ""),
    **_each("boldsymbol mathbf mathit mathsf mathcal bm boxed fbox phantom ensuremath rm bf it", ""),
    **_each("text textbf textit textrm textnormal textsf texttt emph mathrm mbox operatorname hbox", " "),
    **_each("dfrac tfrac cfrac nicefrac sfrac", "\\frac"),
    **_each("dbinom tbinom", "\\binom"),
    **_each("cdot times ast", "*"),
    **_each("leq le leqslant", "≤"),
    **_each("geq ge geqslant", "≥"),
    **_each("neq ne", "≠"),
    **_each("approx simeq", "≈"),
    **_each("vert lvert rvert mid", "|"),
    **_each("emptyset varnothing", "∅"),
    **_each("circ degree", "°"),
    **_each("quad qquad", " ⎵ "),
    **_each("land lor wedge vee", " , "),
    **{
        "lbrace": "⦃",
        "rbrace": "⦄",
        "langle": "(",
        "rangle": ")",
        "lt": "<",
        "gt": ">",
        "in": "∈",
        "equiv": "≡",
        "colon": ":",
    },
    **{
        "div": "/",
        "sqrt": "√",
        "infty": "∞",
        "cup": "∪",
        "pi": "π",
        "pm": "±",
        "mp": "∓",
        "therefore": "",
        "implies": "⇒",
    },
    **{
        "Rightarrow": "⇒",
        "prime": "'",
        "bar": "\\overline",
        "dot": "\\overline",
        "pmod": " mod ",
        "bmod": " mod ",
        "mod": " mod ",
        "R": REALS,
    },
}
ESCAPED = {  # a backslash before another character
    **dict.fromkeys("!()[]", ""),
    **dict.fromkeys(",;: ", " "),
    **{"{": "⦃", "}": "⦄", "%": "%", "$": "¤", "#": "#", "&": "&", "_": "_", "|": "|", "\\": "¦"},
}
GREEK_NAMES = "alpha beta gamma delta epsilon theta lambda mu sigma tau phi omega Delta Omega"
GREEK = dict(zip("αβγδεθλμστφωΔΩ", GREEK_NAMES.split(), strict=True))
CHARACTERS = str.maketrans(
    {
        **{ord(letter): f"\\{name} " for letter, name in GREEK.items()},
        **{wide: chr(wide - 0xFEE0) for wide in range(0xFF01, 0xFF5F)},  # full-width forms
        **{
            ord(a): b
            for a, b in zip("×·∙÷⁄−–—≤≥≠~", ("*", "*", "*", "/", "/", "-", "-", "-", "≤", "≥", "≠", " "), strict=True)
        },
        **{
            ord(a): b
            for a, b in {"½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "²": "^2", "³": "^3"}.items()
        },
        **{ord(a): " " for a in "\u00a0\u2009\u202f"},
        **{ord(a): b for a, b in {"⟨": "(", "⟩": ")", "∣": "|", "、": ",", "，": ",", "º": "°"}.items()},  # noqa: RUF001
    }
)
DOUBLED = re.compile(r"\\\\(?=[A-Za-z]{2})")  # a command that was escaped twice, such as \\frac
COMMAND = re.compile(r"\\(?:([A-Za-z]+)|(.))")
BEFORE = [  # replacements before commands are replaced
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\s+", " "),
        (r"\\(?:left|right)\s?\.", ""),
        (r"(?<=[0-9]),\\!\s?(?=[0-9]{3})", ","),  # 10,\! 080
        (r"(?<=[0-9])\\[,;: ]\s?(?=[0-9]{3}(?![0-9]))", ""),  # 10\,000
        (r"(?<=[0-9])\s?\{\s?,\s?\}\s?(?=[0-9])", ","),
        (r"\\mathbb\s?\{?\s?R\s?\}?", REALS),
        (r"\{([^{}]*)\\over\b([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mbox|operatorname|hbox)\s?\{([^{}]*)\}", r" \1 "),
        (r"\\[dtcs]?frac\s?([0-9])\s?([0-9])", r"\\frac{\1}{\2}"),
        (r"\$\$", ""),
    )
]
AFTER = [  # replacements after commands are replaced, in this order
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\s+", " "),
        (r"\^\s?(?:\{\s?°\s?\}|°)", "°"),
        (r"<=|=<", "≤"),
        (r">=|=>", "≥"),
        (r"!=|<>", "≠"),
        (r"(?<=\w)\*\*(?=\w)", "^"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", "π"),
        (r"(?<![A-Za-z\\])sqrt\s?(?=[({0-9])", "√"),
        (r"\(\s?([0-9]+)\s?\)\s?_", r"\1_"),  # (1011)_2
        (r"(?<![A-Za-z])(?:infinity|inf)(?![A-Za-z])", "∞"),
        (r"(?<=[\])])\s?U\s?(?=[\[(])", "∪"),
        (r"(?<=[0-9.])\s?\*\s?10\s?\^\s?(?:\{\s?)?([+-]?[0-9]{1,3})(?![0-9])(?:\s?\})?", r"e\1"),  # 3 * 10^{8}
        (r"\{\s?\}|⦃\s?⦄", "∅"),
        (r"(?<=[0-9)}\]])(?:\s?⎵)+\s?(?=[-(\[{\\0-9√π+±]|[A-Za-z]\w?\s?=)", ", "),  # 1 \quad 2
        (r"(?:\s|^)*⎵\s?", " "),
        (r"(?:\s?[,;]\s?)*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])\s?(?:[,;]\s?)*", ", "),
        (r"(?<![A-Za-z])([ap])\.?\s?m\.?(?![A-Za-z])", r"\1m"),
        (r"^\s?(?:the\s)?(?:final\s)?answer\s?(?:is|:|=)\s?:?", ""),
        (r"\s+", " "),
    )
]
# A reason or sentence after the answer: "42, since ...", "42. We ...".
REASON = re.compile(
    r"(?<=\S)(?:\s?[,;(]\s?(?:since|because|as|which|where|so|hence|thus|therefore|for|when|i\.e\.)|\s(?:since|because|where|which))\b.*"
    r"|(?<=[0-9)}\]%])\.\s(?=[A-Z][a-z]).*",
    re.DOTALL,
)
THOUSANDS = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")


def plain(text: str) -> str:
    """Return the answer in plain spelling."""
    text = text.translate(CHARACTERS)
    if "\\begin" not in text:
        text = DOUBLED.sub(r"\\", text)
    for pattern, replacement in BEFORE:
        text = pattern.sub(replacement, text)
    text = COMMAND.sub(_command, text)
    # an even number of $ encloses maths, an odd number has a currency
    text = text.replace("$", "" if text.count("$") % 2 == 0 else "¤").replace("¤", "$")
    text = REASON.sub("", text)
    for pattern, replacement in AFTER:
        text = pattern.sub(replacement, text)
    return _without_thousands(text.lstrip(" *`:;,=≈&").rstrip(" *`:;,.¦&"))


def _command(match: re.Match[str]) -> str:
    word, character = match.groups()
    if word is None:
        return ESCAPED.get(character, "")
    if word.startswith("quad") and word not in COMMANDS:  # \quadx_2
        return " ⎵ " + word.removeprefix("quad")
    return COMMANDS.get(word, match[0])


def _without_thousands(text: str) -> str:
    """Remove the commas of numbers such as 1,234, except inside brackets, where commas separate values."""
    depth, depths = 0, []
    for character in text:
        depths.append(depth)
        depth += (character in "([⦃") - (character in ")]⦄")
    is_set = text.startswith("{") and text.endswith("}")

    def joined(match: re.Match[str]) -> str:
        return match[0] if depths[match.start()] > 0 or is_set else match[0].replace(",", "")

    return THOUSANDS.sub(joined, text)
