"""A client of an OpenAI-compatible chat endpoint: many requests at a time, with retries and time limits."""

from __future__ import annotations

import asyncio
import os
import random
import re
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from rlhf.config import Judge
from rlhf.errors import UserError

if TYPE_CHECKING:
    import openai

CONNECTING = 10.0  # most seconds for the connection to the endpoint
FIRST_PAUSE, LAST_PAUSE = 0.5, 8.0  # seconds before the first further try; they double up to the last
LONGEST_PAUSE = 60.0  # most seconds before a further try if the endpoint asks for a pause (Retry-After)
HOLDS = 60.0  # seconds in which an EndpointError holds for further requests, without a try
BUSY = (429, 503, 529)  # too many requests, service unavailable, overloaded
LONGEST = 300  # characters of an endpoint's error message
SHOWN = 10  # largest number of models in a message
VARIABLE = re.compile(r"([A-Z_][A-Z0-9_]*|[A-Za-z_]+)?")  # names of variables; API keys have small letters and digits
# Parameters that some models refuse, such as OpenAI's since o1 -> the parameter to send instead; "": none
REPLACED = {"max_tokens": "max_completion_tokens", "temperature": ""}

Answer = TypeVar("Answer")


class JudgeError(Exception):
    """A request has failed after all its tries. The message is one line without the API key."""


class EndpointError(JudgeError):
    """No request can succeed: nobody answers at judge.url, or the key, the model, the account or the url is wrong."""


class RefusedError(JudgeError):
    """The endpoint does not answer this request, such as one that is too long. It may answer others."""


class BusyError(JudgeError):
    """The endpoint answers, but limits the requests or has too many of them."""


class _AgainError(JudgeError):
    """A try has failed, but another one may succeed."""

    def __init__(self, message: str, last: type[JudgeError] = JudgeError, pause: float = 0.0):
        """last: the error after the last try. pause: least seconds before the next one."""
        super().__init__(message)
        self.last, self.pause = last, pause


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a request."""

    text: str
    cut: bool  # the answer reached the limit of tokens


def validate(config: Judge) -> None:
    """Raise UserError if the configuration has a secret, which files and messages would show."""
    if not VARIABLE.fullmatch(config.key):
        what = "judge.key is not the name of an environment variable (its value is not shown here)"
        raise UserError(f"{what}: export OPENAI_API_KEY=..., and leave judge.key out")
    if re.search(r"[@?#]", config.url):
        what = "judge.url has a user, a password or parameters (it is not shown here)"
        raise UserError(f"{what}: give only the address, and the API key in the variable that judge.key names")


def longest(config: Judge) -> float:
    """Return the largest number of seconds of a request with all its tries."""
    return (config.retries + 1) * config.timeout + config.retries * LONGEST_PAUSE


def probe(config: Judge) -> str:
    """Send a short request, with one further try at most, and return the name of the judge. Raises UserError.

    An endpoint that is busy is no mistake: the name may then be "".
    """

    async def answer() -> str:
        client = Client(replace(config, retries=min(1, config.retries)))
        try:
            await client.ask([{"role": "user", "content": "Answer with the word yes."}])
        except BusyError:
            pass
        finally:
            await client.close()
        return client.model

    try:
        return asyncio.run(answer())
    except JudgeError as error:
        failed = str(error)
    raise UserError(failed)


class Client:
    """Sends requests to an endpoint, at most config.concurrency at a time. Use it in one event loop.

    The API key comes from the environment variable config.key. Proxies and certificates come from the usual variables
    (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE).
    """

    def __init__(self, config: Judge):
        """Raises UserError if config.url is missing or is no address, or if the API key or a proxy is malformed."""
        import openai

        validate(config)
        self.config, self.model = config, config.model
        self._key = os.environ.get(config.key, "").strip()
        self._names = {name: name for name in REPLACED}  # parameter -> the parameter that is sent instead
        self._slots, self._choice = asyncio.Semaphore(config.concurrency), asyncio.Lock()
        self._broken, self._until = "", 0.0  # the last EndpointError, and the time until which it holds
        if not _is_address(config.url):
            raise UserError(f"judge.url={config.url!r:.200}: give the address of an endpoint, as http://host:8000/v1")
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"${config.key} is no API key, because it has spaces or signs outside ASCII: set it again")
        try:
            self._api = openai.AsyncOpenAI(
                api_key=self._key or "none",
                base_url=config.url,
                max_retries=0,  # _try() repeats a request, because this package would repeat it without quota, too
                timeout=openai.Timeout(config.timeout, connect=min(CONNECTING, config.timeout)),
            )
        except (ValueError, _http().InvalidURL):  # its text may have the password of a proxy
            raise UserError(
                "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY is no address of a proxy: correct or unset it"
            ) from None

    async def ask(self, messages: list[dict[str, str]], temperature: float = 0.0) -> Reply:
        """Return the answer to a conversation. Raises JudgeError."""
        async with self._slots:
            await self.choose()
            return await self._repeat(lambda: self._complete(messages, temperature))

    async def choose(self) -> str:
        """Return the name of the model. If config.model is empty, it is the only one of the endpoint.

        Raises JudgeError.
        """
        async with self._choice:
            self.model = self.model or await self._repeat(self._only_model)
        return self.model

    async def close(self) -> None:
        """Close all connections."""
        await self._api.close()

    async def _only_model(self) -> str:
        page: Any = await self._api.get("/models", cast_to=object)
        models = page.get("data") if isinstance(page, dict) else None
        if not isinstance(models, list) or not all(isinstance(model, dict) and "id" in model for model in models):
            raise EndpointError(f"{self._place} has no list of models: set judge.model, or {self._address}")
        if not models:
            raise EndpointError(f"{self._place} has no models: start the endpoint with one, or {self._address}")
        names = sorted(str(model["id"]) for model in models)
        if len(names) != 1:
            shown = ", ".join([*names[:SHOWN], *(["..."] if len(names) > SHOWN else [])])
            raise EndpointError(f"{self._place} has {len(names)} models: set judge.model to one of {shown}")
        return names[0]

    async def _complete(self, messages: list[dict[str, str]], temperature: float) -> Reply:
        """Return the answer. A model may refuse a parameter of REPLACED; it is then replaced for all requests."""
        import openai

        values = {"max_tokens": self.config.max_tokens, "temperature": temperature}
        while True:
            sent = {self._names[name]: value for name, value in values.items() if self._names[name]}
            try:
                answer: Any = await self._api.chat.completions.create(model=self.model, messages=messages, **sent)  # type: ignore[call-overload]
            except openai.BadRequestError as error:
                refused = [name for name in REPLACED if name in sent and _refuses(error, name)]
                if not refused:
                    raise
                self._names |= {name: REPLACED[name] for name in refused}
            else:
                return self._reply(answer)

    def _reply(self, answer: Any) -> Reply:
        """Return the reply in a chat completion. Raises JudgeError."""
        if said := getattr(answer, "error", None):  # some providers send an error with status 200
            raise _AgainError(f"{self._place}: {self._clean(said)}")
        choices: Any = getattr(answer, "choices", None)
        if choices == []:
            raise RefusedError(f"{self._place}: the answer has no choices")
        message = getattr(choices[0], "message", None) if isinstance(choices, list) else None
        if message is None:
            raise JudgeError(f"{self._place}: no chat completion, but {self._clean(repr(answer))[:80]}")
        text = getattr(message, "content", None)
        cut = choices[0].finish_reason == "length"
        return Reply(self._hide(text) if isinstance(text, str) else "", cut)

    async def _repeat(self, request: Callable[[], Awaitable[Answer]]) -> Answer:
        """Return the answer to a request, which is tried config.retries times more. Raises JudgeError."""
        failed: JudgeError = EndpointError(self._broken)
        for number in range(self.config.retries + 1):
            if time.monotonic() < self._until:
                raise EndpointError(self._broken)
            answer = await self._try(request)
            if not isinstance(answer, JudgeError):
                return answer
            failed = answer
            if not isinstance(failed, _AgainError):
                break
            if number < self.config.retries:
                pause = min(FIRST_PAUSE * 2**number, LAST_PAUSE) * random.uniform(0.75, 1)
                await asyncio.sleep(min(max(pause, failed.pause), LONGEST_PAUSE))
        if isinstance(failed, _AgainError):
            failed = failed.last(f"{failed} ({self.config.retries + 1} tries)")
        if isinstance(failed, EndpointError):
            self._broken, self._until = str(failed), time.monotonic() + HOLDS
        raise failed

    async def _try(self, request: Callable[[], Awaitable[Answer]]) -> Answer | JudgeError:
        """Return the answer to a request, or the error.

        The error is returned, because an exception would have the exception of `openai` as its context, which has the
        API key.
        """
        import openai

        try:
            async with asyncio.timeout(self.config.timeout):
                return await request()
        except JudgeError as error:
            return error
        except openai.APIStatusError as error:
            return self._refused(error)
        except openai.APITimeoutError as error:
            return self._late(connecting=type(error.__cause__).__name__.startswith("Connect"))
        except TimeoutError:
            return self._late(connecting=False)
        except openai.APIConnectionError as error:
            return self._unconnected(error)
        except (openai.OpenAIError, ValueError, RecursionError) as error:  # no JSON, or deeply nested
            return JudgeError(f"{self._place}: no chat completion ({self._clean(error)})")

    def _late(self, connecting: bool) -> JudgeError:
        if connecting:
            return _AgainError(
                f"nobody answers at {self._place}: start the endpoint, or {self._address}", EndpointError
            )
        return _AgainError(f"{self._place}: no answer within judge.timeout={self.config.timeout:g} s")

    def _unconnected(self, error: openai.APIConnectionError) -> JudgeError:
        reason = self._clean(error.__cause__ or error)
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            remedy = "set SSL_CERT_FILE to a file with the certificate of its authority"
            return EndpointError(f"{self._place} has a certificate that is not trusted ({reason}): {remedy}")
        if "[SSL" in reason:
            return EndpointError(f"{self._place} does not speak TLS ({reason}): give judge.url with http://")
        if type(error.__cause__).__name__ in ("ConnectError", "ProxyError"):
            what = f"nobody answers at {self._place} ({reason})"
            return _AgainError(f"{what}: start the endpoint, or {self._address}", EndpointError)
        return _AgainError(f"{self._place}: the connection was lost ({reason})")

    def _refused(self, error: openai.APIStatusError) -> JudgeError:
        """Return the error for an HTTP status."""
        body = error.body if isinstance(error.body, dict) else {}
        said, code = self._clean(body.get("message") or error.message), f"{error.code} {error.type}"
        status = error.status_code
        variable = f"${self.config.key}"
        if status == 401 and not self._key:
            remedy = f"set {variable}, or judge.key to another" if self.config.key else "set judge.key to the name of a"
            return EndpointError(f"{self._place} needs an API key: {remedy} variable with it")
        if status == 401:  # its text may have a part of the key
            return EndpointError(f"{self._place} refuses the API key in {variable} (status 401): correct it")
        if status in (402, 403) or (status == 429 and "insufficient_quota" in code):
            return EndpointError(
                f"{self._place} refuses this account (status {status}): {said}; use another {variable}"
            )
        if status == 404 and self.model and "model" in f"{said} {code}".lower():
            remedy = "correct judge.model, or leave it out if there is one model"
            return EndpointError(f"{self._place} has no judge.model={self.model!r}: {said}; {remedy}")
        if status in (404, 405):
            return EndpointError(f"{self._place} has no chat endpoint (status {status}): {self._address}")
        if status in (408, 409, 429) or status >= 500:
            last = BusyError if status in BUSY else JudgeError
            return _AgainError(f"{self._place}: status {status}: {said}", last, _asked(error))
        return RefusedError(f"{self._place}: status {status}: {said}")

    @property
    def _place(self) -> str:
        return f"judge.url={self.config.url}"

    @property
    def _address(self) -> str:
        """The remedy for a wrong address."""
        url = self.config.url.rstrip("/")
        return "correct judge.url" if url.endswith("/v1") else f"try judge.url={url}/v1"

    def _clean(self, error: object) -> str:
        """Return the text of an error, on one line without the API key. It may be cut."""
        return self._hide(" ".join(str(error).split()) or type(error).__name__)[:LONGEST]

    def _hide(self, text: str) -> str:
        """Return a text without the API key, which an endpoint may repeat."""
        return text.replace(self._key, "***") if self._key else text


def _is_address(url: str) -> bool:
    try:
        parts, host = urlsplit(url), _http().URL(url).host
        return parts.scheme in ("http", "https") and bool(host) and parts.port != 0 and url.isprintable()
    except (ValueError, _http().InvalidURL):
        return False


def _http() -> Any:
    """Return the package of HTTP that `openai` uses, which depends on its version."""
    import openai  # noqa: F401

    return sys.modules.get("httpx2") or sys.modules["httpx"]


def _asked(error: openai.APIStatusError) -> float:
    """Return the seconds that the header Retry-After asks for. A date, which is rare, counts as 0."""
    value = error.response.headers.get("retry-after", "")
    return float(value) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value) else 0.0


def _refuses(error: openai.APIStatusError, parameter: str) -> bool:
    """Return whether a model does not support a parameter. Its value may also be too large, which is another error."""
    said = f"{error.code} {error.message}".lower()
    return "support" in said and (error.param == parameter or parameter in said)
