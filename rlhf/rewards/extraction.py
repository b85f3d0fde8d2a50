r"""Finds the final answer in a response.

1. The answer is in the last of: a box (`\boxed{}`, `\fbox{}`), GSM8K's `####`, `<answer>...</answer>`.
2. Boxes that are separated only by commas, "and", "or", names and mathematical signs form one answer.
3. `####` must be followed by a number, by maths, or by a few words at the end of the text. Otherwise it is a heading.
4. Without any of these, the answer follows the last "answer is", "answer:" or heading "Final Answer". It ends with its
   sentence. In a sentence such as "The volume is 12", it is the text after the verb.
5. If the answer begins on a new line, it is the whole display maths, or the text up to the end of the line.
A number elsewhere in the text is not an answer.
"""

import re

READ = 10**5  # number of characters that are searched, at the end of the text
MOST_BOXES = 30  # largest number of boxes that are joined
MOST_HEADINGS = 20  # largest number of `####` that are checked
MOST_MENTIONS = 50  # largest number of mentions of the word "answer" that are checked, from the end of the text
LONGEST = 2000  # largest number of characters of an answer after `####` or "answer:"

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
# Text that may be between the boxes of one answer: a comma, "and" or "or", names and mathematical signs.
JOINT = re.compile(
    r"(?:[\s$,;&]|\\[()\[\],;: ]|\\q?quad|\\text\s?\{|\}|\b(?:and|or)\b|[A-Za-z](?:_\{?\w{1,3}\}?)?\s?=)*",
    re.IGNORECASE,
)
JOINS = re.compile(r"[,;]|\b(?:and|or)\b", re.IGNORECASE)
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
STATED = re.compile(
    r"\banswer(?:\sto\s[^.:\n]{1,40}?)?[\s*_]{0,9}(?:is\b|should\sbe\b|[:=])"
    r"|^[ \t]{0,9}[#*_]{1,9}[ \t#*_]{0,9}(?:the[ ])?(?:final[ ])?answer[ \t*_:.]{0,9}$"
    r"|^[ \t]{0,9}(?:the[ ])?final[ ]answer[ \t*_:.]{0,9}$",
    re.IGNORECASE | re.MULTILINE,
)
HASHES = re.compile(r"#{4,}")
NUMBERED = re.compile(
    r"[0-9]{1,2}[.)]\s+[A-Za-z*]|[A-Za-z ]{1,20}[0-9]{1,2}\s?:"
)  # the headings "1. Add", "Step 2: add"
ANSWER_WORDS = re.compile(r"[*_]{0,3}(?:the\s)?(?:final\s)?answer(?:\sis)?[*_\s]{0,9}:?[*_\s]{0,9}", re.IGNORECASE)
# An answer in a sentence: "There are 12", "The volume of the box is 12".
SENTENCE = re.compile(r"(?:the|there|so|thus|hence|therefore)\b[^=]*\b(?:is|are|equals)\s+(\S.*)", re.IGNORECASE)
MOST_WORDS = 4  # largest number of words of an answer in words after `####`


def extract(text: str) -> str | None:
    """Return the final answer that a text states, or None."""
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
    """Return the content of the last box and of the boxes joined to it, in the order of the text."""
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
    r"""Return the content of a box that begins at start, and the index of its end.

    The content is the text between the braces, or the first word, as in \boxed 5. It is None if the box is empty or not
    closed.
    """
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
    """Return the answer after `####`; None if it is a heading."""
    announced = ANSWER_WORDS.match(text.lstrip())
    if announced:
        return _first(text.lstrip()[announced.end() :])
    answer = _first(text)
    if answer is None or NUMBERED.match(answer):
        return None
    words = re.match(r"[*_]{0,3}[A-Za-z]{2}", answer)
    last = len(text.strip().splitlines()) == 1
    return (
        None
        if words and "=" not in answer and not (last and len(answer.split()) <= MOST_WORDS and answer[-1] not in ":")
        else answer
    )


def _stated(text: str) -> str | None:
    """Return the text after the last words that announce an answer, up to the end of its sentence."""
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
    """Return the display maths at the start of the text, or else the first line that is not empty."""
    text = text.strip()
    for opening, closing in (("$$", "$$"), ("\\[", "\\]")):
        if text.startswith(opening):
            return text[len(opening) :].partition(closing)[0].strip() or None
    return text.splitlines()[0].strip() if text else None
