"""A client of an OpenAI-compatible chat endpoint: many requests at a time, with retries and time limits."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

from rlhf.config import Judge
from rlhf.errors import UserError


class JudgeError(Exception):
    """A request has failed after all its tries. The message is one line and has no key."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a request."""

    text: str
    cut: bool  # the answer reached the limit of tokens


class Client:
    """Sends requests to an endpoint, at most config.concurrency at a time. Use it in one event loop."""

    def __init__(self, config: Judge):
        """Raises UserError if config.url is missing or is no address."""
        import openai

        if not config.url.startswith(("http://", "https://")):
            raise UserError(f"judge.url={config.url!r}: give the address of an endpoint, as http://host:8000/v1")
        self.config, self.model = config, config.model
        self._slots = asyncio.Semaphore(config.concurrency)
        # max_retries: with exponential backoff, or after the time that the server's Retry-After header asks for
        self._api = openai.AsyncOpenAI(
            api_key=os.environ.get(config.key) or "none",
            base_url=config.url,
            max_retries=config.retries,
            timeout=config.timeout,
        )

    async def ask(self, messages: list[dict[str, str]], temperature: float = 0.0) -> Reply:
        """Return the answer to a conversation. Raises JudgeError."""
        import openai

        async with self._slots:
            try:
                answer = await self._api.chat.completions.create(
                    model=self.model,
                    messages=messages,  # type: ignore[arg-type]
                    temperature=temperature,
                    max_tokens=self.config.max_tokens,
                )
            except openai.OpenAIError as error:
                raise JudgeError(str(error)) from None
        choice = answer.choices[0]
        return Reply(choice.message.content or "", choice.finish_reason == "length")
