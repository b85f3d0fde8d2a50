"""The length limits of conversations, and the truncation of longer ones."""

from rlhf.config import Data
from rlhf.data import templates
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import UserError

Encoded = tuple[list[int], list[bool]]  # token ids, and which of them are learned


class Limits:
    """Length limits: data.max_tokens for conversations, max_prompt for prompts without a response.

    data.overlong decides what happens to longer ones.
    """

    def __init__(self, tokenizer: Tokenizer, config: Data, max_prompt: int | None) -> None:
        self.max_tokens = config.max_tokens
        self.max_prompt = config.max_tokens if max_prompt is None else min(max_prompt, config.max_tokens)
        self.overlong, self.tokenizer = config.overlong, tokenizer

    def over(self, siblings: list[Encoded]) -> bool:
        """Return whether one of the siblings, the conversations of a group, is too long.

        Raises UserError if one is and data.overlong=error.
        """
        length, limit = max(len(ids) for ids, _ in siblings), self._limit(siblings)
        if length > limit and self.overlong == "error":
            what = "conversation" if any(siblings[0][1]) else "prompt"
            remedy = "shorten it, raise data.max_tokens, or set data.overlong to truncate or drop"
            raise UserError(f"{what} of {length} tokens is longer than {limit}; {remedy}")
        return length > limit

    def cut(self, siblings: list[Encoded], template: str) -> list[tuple[list[int], list[bool], bool]]:
        """Return the conversations cut to their limit, and for each whether its response was cut.

        template: the key of templates.TEMPLATES that they are written with.
        First, tokens before the last response are cut from the left, after the bos and up to the cue. A message may
        lose its beginning. All siblings lose the same tokens, so they still have the same prompt. A response that is
        still too long is cut from the right and loses its eos.
        """
        limit, longest = self._limit(siblings), max(len(ids) for ids, _ in siblings)
        if longest <= limit:
            return [(ids, learn, False) for ids, learn in siblings]
        ids, learn = siblings[0]
        bos = int(ids[0] == self.tokenizer.bos)
        behind = _last_response(learn)
        least = bos + self._num_cue(ids[:behind], template)
        if limit <= least:
            raise UserError(f"data.max_tokens leaves {limit} tokens here, but bos and cue alone have {least}; raise it")
        lost = max(0, min(longest - limit, behind - least))  # number of tokens to cut after the bos

        def part(whole: list) -> list:
            return (whole[:bos] + whole[bos + lost :])[:limit]

        return [(part(ids), part(learn), len(ids) - lost > limit) for ids, learn in siblings]

    def _num_cue(self, prompt: list[int], template: str) -> int:
        """Return the number of tokens of the cue at the end of a prompt, which starts the assistant's turn.

        With template plain, the text of the prompt may end with the cue of the Human/Assistant format.
        """
        if template != "plain":
            return templates.num_cue(self.tokenizer, template)
        cue = templates.CUES["human"]
        ends = (n for n in range(1, len(cue) + 1) if self.tokenizer.decode(prompt[-n:]).endswith(cue))
        return next(ends, 0)

    def _limit(self, siblings: list[Encoded]) -> int:
        return self.max_tokens if any(siblings[0][1]) else self.max_prompt


def trimmed(encoded: Encoded) -> Encoded:
    """Drop the tokens after the last learned one. Templates like ChatML write such tokens, engines never do."""
    ids, learn = encoded
    end = len(ids) - learn[::-1].index(True) if any(learn) else len(ids)
    return ids[:end], learn[:end]


def _last_response(learn: list[bool]) -> int:
    """Return the index at which the last learned run starts; the length if nothing is learned."""
    starts = [t for t in range(len(learn)) if learn[t] and not (t > 0 and learn[t - 1])]
    return starts[-1] if starts else len(learn)
