"""Stop strings: their stop ids, the check whether tokens contain one, and where to cut a response after one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from rlhf.data.tokenizer import Tokenizer

BROKEN = "\ufffd"  # tokenizers decode bytes that are not a complete character to this


class Stops:
    """The strings that end a response. A response is cut after a token. Its text is never tokenized again."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]):
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        spelled = [tokenizer.encode(text, continues=True, control=True) for text in self.strings]
        self.ids = tuple(ids[0] for ids in spelled if len(ids) == 1)  # stop ids: the engine ends a response at these
        # ends() is needed for stop strings of several tokens, and for those that may be part of a longer token, such as
        # "\n" in ".\n". Special tokens decode to nothing and are never part of another token, so they do not need it.
        self.watched = any(len(ids) > 1 or tokenizer.decode(ids) for ids in spelled)
        # number of tokens that ends() decodes; each token has at least one byte
        self.reach = max((len(text.encode()) for text in self.strings), default=0) + 1
        self._enders: dict[int, bool] = {}  # cache of _may_end()

    def ends(self, tokens: list[int]) -> bool:
        """Return whether the last token completes a stop string.

        It may miss a stop string that appears only when all tokens are decoded together. end() finds that one too.
        """
        if not self._may_end(tokens[-1]):
            return False
        text = self._text(tokens[-self.reach :])
        return any(stop in text for stop in self.strings)

    def after(self, tokens: list[int]) -> Callable[[list[int]], bool] | None:
        """Return Request.ends for a request that continues these tokens; None if stop ids are enough."""
        before = tokens[-self.reach :]
        return (lambda drawn: self.ends(before + drawn[-self.reach :])) if self.watched else None

    def end(self, tokens: list[int]) -> int | None:
        """Return the length of the shortest prefix of tokens whose text contains a stop string; None if there is none.

        More tokens do not normally change the text of earlier ones, so bisection finds the prefix. The exception is a
        token whose bytes are not a complete character. Some tokenizers then decode the whole run of bytes to BROKEN,
        including a stop string in it. So if the text of the prefix contains BROKEN, prefixes that end before such
        tokens are tried first.
        """

        def stopped(n: int) -> bool:
            said = self._text(tokens[:n])
            return any(stop in said for stop in self.strings)

        def first(end: int) -> int:  # length of the shortest such prefix; the prefix of `end` tokens must be one
            return bisect_left(range(end), True, lo=1, key=stopped)

        if not self.strings or not stopped(len(tokens)):
            return None
        end = first(len(tokens))
        if BROKEN not in self._text(tokens[:end]):
            return end
        breaks = (n for n in range(1, end) if BROKEN in self._text([tokens[n]]))
        return first(next(filter(stopped, breaks), end))

    def _may_end(self, token: int) -> bool:
        """Return whether a token's text contains the last character of a stop string, or an incomplete character."""
        known = self._enders.get(token)
        if known is None:
            text = self._text([token])
            known = self._enders[token] = BROKEN in text or any(stop[-1] in text for stop in self.strings)
        return known

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special=False)  # a stop string may be a special token
