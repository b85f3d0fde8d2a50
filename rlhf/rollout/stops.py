"""Stop strings on tokens: which tokens they are, when they have appeared, and where a response is cut behind them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from rlhf.data.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what a tokenizer writes for bytes that are no character


class Stops:
    """The strings that end a response. Tokens are cut, never made again from text."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]):
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        spelled = [tokenizer.encode(text, continues=True, control=True) for text in self.strings]
        self.ids = tuple(ids[0] for ids in spelled if len(ids) == 1)  # an engine ends at these by itself
        # Whether ends() is to be asked of others: those of several tokens, and those that stand within a longer one (".\n" and "\n").
        self.watched = any(len(ids) > 1 or tokenizer.decode(ids) for ids in spelled)  # a special token is never a part of another
        self.reach = max((len(text.encode()) for text in self.strings), default=0) + 1  # tokens that ends() reads: each is a byte or more
        self._enders: dict[int, bool] = {}  # tokens that were asked: whether they may complete a stop string

    def ends(self, tokens: list[int]) -> bool:
        """Whether the last token has completed a stop string. It may miss one that only the whole text shows; end() finds that."""
        if not self._may_end(tokens[-1]):
            return False
        text = self._text(tokens[-self.reach :])
        return any(stop in text for stop in self.strings)

    def after(self, tokens: list[int]) -> Callable[[list[int]], bool] | None:
        """What an engine is to ask of what it draws behind these tokens; None where its stop ids are enough."""
        before = tokens[-self.reach :]
        return (lambda drawn: self.ends(before + drawn[-self.reach :])) if self.watched else None

    def end(self, tokens: list[int]) -> int | None:
        """How many tokens the shortest prefix has whose text has a stop string in it; None where the text of all has none.

        Text that tokens have spelled stays when more come, so whether a prefix has a stop string is bisected. Only bytes that are no
        character by themselves can change what is before them: some tokenizers then give up the whole run of bytes, with a stop string
        in it. So if a character is broken in the text, prefixes that end before such bytes are asked first.
        """

        def stopped(n: int) -> bool:
            said = self._text(tokens[:n])
            return any(stop in said for stop in self.strings)

        def first(end: int) -> int:  # in 1..end, of which end is stopped
            return bisect_left(range(end), True, lo=1, key=stopped)

        if not self.strings or not stopped(len(tokens)):
            return None
        end = first(len(tokens))
        if BROKEN not in self._text(tokens[:end]):
            return end
        breaks = (n for n in range(1, end) if BROKEN in self._text([tokens[n]]))
        return first(next(filter(stopped, breaks), end))

    def _may_end(self, token: int) -> bool:
        """Whether a token's text has the last character of a stop string in it, or part of one."""
        known = self._enders.get(token)
        if known is None:
            text = self._text([token])
            known = self._enders[token] = BROKEN in text or any(stop[-1] in text for stop in self.strings)
        return known

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special=False)  # a stop string may be a special token, as <|im_end|>
