r"""Where the final answer stands in a response.

1. A box (`\boxed{}`, `\fbox{}`), GSM8K's `####` or `<answer>...</answer>`: whichever comes last.
2. Boxes with nothing but commas, "and", "or", names and signs of maths between them are one answer together.
3. `####` counts where an answer can follow: a number or maths, or a few words at the end of the text. Otherwise it is a heading.
4. Else what stands behind the last "answer is", "answer:" or heading "Final Answer", to the end of its sentence, and in
   a sentence "The volume is 12" what stands behind the verb.
5. An answer that begins on a line of its own is read there: display maths as a whole, anything else to the end of the line.
A number that merely stands somewhere is no answer.
"""

import re

READ = 10**5  # characters at the end of a text, where its answer stands
MOST_BOXES = 30  # that are joined
MOST_HEADINGS = 20  # with four #, of which one may be an answer
MOST_MENTIONS = 50  # of the word "answer", of which the last one that announces something counts
LONGEST = 2000  # characters of an answer behind `####` or "answer:"

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
# What may stand between the boxes of one answer: a comma, "and" or "or", names and signs of maths.
JOINT = re.compile(r"(?:[\s$,;&]|\\[()\[\],;: ]|\\q?quad|\\text\s?\{|\}|\b(?:and|or)\b|[A-Za-z](?:_\{?\w{1,3}\}?)?\s?=)*", re.IGNORECASE)
JOINS = re.compile(r"[,;]|\b(?:and|or)\b", re.IGNORECASE)
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
STATED = re.compile(
    r"\banswer(?:\sto\s[^.:\n]{1,40}?)?[\s*_]{0,9}(?:is\b|should\sbe\b|[:=])"
    r"|^[ \t]{0,9}[#*_]{1,9}[ \t#*_]{0,9}(?:the[ ])?(?:final[ ])?answer[ \t*_:.]{0,9}$"
    r"|^[ \t]{0,9}(?:the[ ])?final[ ]answer[ \t*_:.]{0,9}$",
    re.IGNORECASE | re.MULTILINE,
)
HASHES = re.compile(r"#{4,}")
NUMBERED = re.compile(r"[0-9]{1,2}[.)]\s+[A-Za-z*]|[A-Za-z ]{1,20}[0-9]{1,2}\s?:")  # the headings "1. Add", "Step 2: add"
ANSWER_WORDS = re.compile(r"[*_]{0,3}(?:the\s)?(?:final\s)?answer(?:\sis)?[*_\s]{0,9}:?[*_\s]{0,9}", re.IGNORECASE)
# An answer in a sentence: "There are 12", "The volume of the box is 12".
SENTENCE = re.compile(r"(?:the|there|so|thus|hence|therefore)\b[^=]*\b(?:is|are|equals)\s+(\S.*)", re.IGNORECASE)
MOST_WORDS = 4  # of an answer in words behind `####`


def extract(text: str) -> str | None:
    """The final answer that a text states, or None."""
    text = text[-READ:]
    boxes = list(BOX.finditer(text))
    box, tag = boxes[-1].start() if boxes else -1, text.lower().rfind("<answer>")
    for match in reversed(list(HASHES.finditer(text, max(box, tag, 0)))[-MOST_HEADINGS:]):
        answer = _behind_hashes(text[match.end() : match.end() + LONGEST])
        if answer is not None:
            return answer
    if box > tag:
        return _boxes(text, boxes[-MOST_BOXES:])
    if tag >= 0:
        content = re.split(r"</answer>", text[tag + len("<answer>") :], maxsplit=1, flags=re.IGNORECASE)[0].strip()
        return _stated(content) or content or None
    return _stated(text)


def _boxes(text: str, boxes: list[re.Match[str]]) -> str | None:
    """The content of the last box and of those joined to it, in the order of the text."""
    found: list[str] = []
    following = len(text)
    for match in reversed(boxes):
        content, end = _content(text, match.end(), following)
        if content is None:
            break
        between = text[end:following]
        if found and not (JOINS.search(between[:100]) and len(between) < 100 and JOINT.fullmatch(between)):
            break
        if content not in found:
            found.insert(0, content)
        following = match.start()
    return ", ".join(found) or None


def _content(text: str, start: int, limit: int) -> tuple[str | None, int]:
    r"""What stands between the first brace and the one that closes it (None if nothing does), or the first word: \boxed 5; and its end."""
    while start < limit and text[start].isspace():
        start += 1
    if not text.startswith("{", start):
        word = re.split(r"[\s$]", text[start : start + LONGEST], maxsplit=1)[0]
        return word or None, start + len(word)
    depth = 0
    for brace in BRACE.finditer(text, start, limit):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return text[start + 1 : brace.start()].strip() or None, brace.end()
    return None, limit


def _behind_hashes(text: str) -> str | None:
    """The answer behind `####`; None if that was a heading."""
    announced = ANSWER_WORDS.match(text.lstrip())
    if announced:
        return _first(text.lstrip()[announced.end() :])
    answer = _first(text)
    if answer is None or NUMBERED.match(answer):
        return None
    words = re.match(r"[*_]{0,3}[A-Za-z]{2}", answer)
    last = len(text.strip().splitlines()) == 1
    return None if words and "=" not in answer and not (last and len(answer.split()) <= MOST_WORDS and answer[-1] not in ":") else answer


def _stated(text: str) -> str | None:
    """What stands behind the last words that announce an answer, to the end of its sentence."""
    start, lower = len(text), text.lower()
    for _ in range(MOST_MENTIONS):
        at = lower.rfind("answer", 0, start)
        if at < 0:
            break
        start = at
    stated = list(STATED.finditer(text, max(text.rfind("\n", 0, start) + 1, start - 50)))
    if not stated:
        return None
    answer = _first(text[stated[-1].end() : stated[-1].end() + LONGEST].lstrip(" :=*_\n"))
    answer = answer and re.split(r"\.(?:\s|$)", answer, maxsplit=1)[0]
    sentence = SENTENCE.fullmatch(answer) if answer else None
    return sentence[1] if sentence else answer


def _first(text: str) -> str | None:
    """Display maths on lines of its own, or else the first line that is not empty."""
    text = text.strip()
    for opening, closing in (("$$", "$$"), ("\\[", "\\]")):
        if text.startswith(opening):
            return text[len(opening) :].partition(closing)[0].strip() or None
    return text.splitlines()[0].strip() if text else None
