"""The client of a judge against a real HTTP server, and the rating in a judge's answer."""

from __future__ import annotations

import asyncio
import re
import shutil
import ssl
import subprocess
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
from endpoint import CLOSE, HANG, Endpoint, Response, completion, fault

from rlhf import configuration
from rlhf.config import Judge
from rlhf.errors import UserError
from rlhf.judge.client import BusyError, Client, EndpointError, JudgeError, RefusedError, Reply, probe
from rlhf.judge.rating import rating

KEY = "sk-known-0815"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Good. Rating: [[7]]", 7.0),
        ("[[7.5]]", 7.5),
        ("[[8.]] of 10", 8.0),
        ("[3] and then [[9]]", 9.0),  # the doubled brackets come first
        ("[[2]], no: [[9]]", 2.0),  # the first of two
        ("my rating is [6]", 6.0),
        ("see [1], [2]", 1.0),
        ("[[-3]]", None),
        ("[[7/10]]", None),
        ("[[7,5]]", None),
        ("[[ten]]", None),
        ("[[" + "9" * 5000 + "]]", None),
        ("[[\u0667]]", None),  # an Arabic digit
        ("7", None),
        ("", None),
        ("[" * 100_000, None),
    ],
)
def test_rating(text: str, found: float | None):
    assert rating(text) == found


def ask(client: Client, count: int = 1) -> list[Reply | JudgeError]:
    """Return the replies to `count` requests at the same time, or their errors."""

    async def every() -> list[Any]:
        asked = [client.ask([{"role": "user", "content": f"number {i}"}]) for i in range(count)]
        try:
            return await asyncio.gather(*asked, return_exceptions=True)
        finally:
            await client.close()

    return asyncio.run(every())


def failed(config: Judge, kind: type[JudgeError] = JudgeError) -> str:
    """Return the message of a request that fails, of which no trace has the key."""
    [error] = ask(Client(config))
    assert type(error) is kind, error
    assert KEY not in "".join(traceback.format_exception(error))
    assert error.__context__ is None, "its requests have the key"
    assert "\n" not in str(error)
    return str(error)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use no proxy, a known key, and short pauses."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    monkeypatch.setattr("rlhf.judge.client.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("rlhf.judge.client.LAST_PAUSE", 0.01)


def test_many_requests():
    def answer(body: dict[str, Any]) -> str:
        time.sleep(0.05)
        return body["messages"][0]["content"]

    with Endpoint(answer, key=KEY) as endpoint:
        replies = ask(Client(Judge(url=f"{endpoint.url}/", concurrency=4, max_tokens=9)), 12)
    assert replies == [Reply(f"number {i}", False) for i in range(12)]
    assert endpoint.most == 4
    assert [request.path for request in endpoint.requests].count("/v1/models") == 1, "asked for the model once"
    assert all(body["model"] == "judge" and body["temperature"] == 0 for body in endpoint.asked)
    assert all(body["max_tokens"] == 9 for body in endpoint.asked)


@pytest.mark.parametrize(
    "fault_of",
    [
        fault(500, "broken"),
        fault(503, "busy"),
        fault(429, "slow down", "rate_limit_exceeded"),
        fault(429, "slow down", Retry_After="0.3"),
        fault(429, "slow down", Retry_After="Fri, 01 Jan 2038 00:00:00 GMT"),
        (CLOSE,),
        (HANG,),
    ],
)
def test_faults_that_pass(fault_of: Any):
    """A request is repeated, after the time that the endpoint asks for."""
    answers = iter([fault_of, fault_of, "[[3]]"])
    with Endpoint(lambda body: next(answers)) as endpoint:
        start = time.monotonic()
        assert ask(Client(Judge(url=endpoint.url, model="judge", retries=2, timeout=0.5))) == [Reply("[[3]]", False)]
    least = 1.0 if fault_of == (HANG,) else 0.6 if "0.3" in str(fault_of) else 0
    assert least <= time.monotonic() - start < least + 2
    assert len(endpoint.asked) == 3


@pytest.mark.parametrize(
    ("answer", "kind", "tries", "says"),
    [
        (fault(500, "broken"), JudgeError, 3, "status 500: broken (3 tries)"),
        (fault(429, "slow down"), BusyError, 3, "status 429: slow down (3 tries)"),
        ((HANG,), JudgeError, 3, "no answer within judge.timeout=0.2 s (3 tries)"),
        ((CLOSE,), JudgeError, 3, "the connection was lost"),
        (fault(400, "maximum context length is 8 tokens", param="max_tokens"), RefusedError, 1, "status 400: maximum"),
        (fault(400, f"bad header {KEY}"), RefusedError, 1, "status 400: bad header ***"),
        (fault(429, "no quota", "insufficient_quota", Retry_After="50"), EndpointError, 1, "refuses this account"),
        (
            fault(402, "Insufficient Balance"),
            EndpointError,
            1,
            "status 402): Insufficient Balance",
        ),
        (fault(403, "not in this country"), EndpointError, 1, "(status 403): not in this country"),
        (Response(200, b"<html>", {"Content-Type": "text/html"}), JudgeError, 1, "no chat completion, but '<html>'"),
        (Response(200, b"<html>"), JudgeError, 1, "no chat completion ("),
        (Response(200, {"id": "1"}), JudgeError, 1, "no chat completion"),
        (Response(200, {"choices": None}), JudgeError, 1, "no chat completion"),
        (Response(200, {"error": {"message": "busy", "code": 429}}), JudgeError, 3, "'busy', 'code': 429} (3 tries)"),
        (Response(200, f"Authorization: Bearer {KEY}"), JudgeError, 1, "v1: no chat completion, but 'Authorization: B"),
        (Response(200, {"choices": []}), RefusedError, 1, "has no choices"),
        (Response(200, {"choices": [None]}), JudgeError, 1, "no chat completion"),
        (Response(200, {"choices": ["x"]}), JudgeError, 1, "no chat completion"),
        (Response(200, {"choices": [{"message": None}]}), JudgeError, 1, "no chat completion"),
        (Response(200, ["x"]), JudgeError, 1, "no chat completion"),
        (Response(200, b"[" * 100_000), JudgeError, 1, "no chat completion ("),
    ],
)
def test_faults_that_stay(answer: Any, kind: type[JudgeError], tries: int, says: str):
    with Endpoint(lambda body: answer) as endpoint:
        start = time.monotonic()
        said = failed(Judge(url=endpoint.url, model="judge", retries=2, timeout=0.2), kind)
    assert says in said
    assert len(endpoint.asked) == tries
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model": "other"}, "has no judge.model='other': The model `other` does not exist.; correct judge.model"),
        ({}, "has 12 models: set judge.model to one of m00, m01, m02, m03, m04, m05, m06, m07, m08, m09, ..."),
        ({"key": "OTHER_KEY"}, "refuses the API key in $OTHER_KEY (status 401): correct it"),
        ({"key": "UNSET"}, "needs an API key: set $UNSET, or judge.key to another variable with it"),
        ({"key": ""}, "needs an API key: set judge.key to the name of a variable with it"),
        ({"url": "/.."}, "try judge.url={root}/v1"),
        ({"url": "/..", "model": "m00"}, "try judge.url={root}/v1"),
        ({"url": "/v2/v1", "model": "m00"}, "correct judge.url"),
    ],
)
def test_what_holds_for_all_requests(keys: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch):
    """It is an EndpointError at once, so that the other requests need not be sent."""
    monkeypatch.setenv("OTHER_KEY", "sk-wrong-4711")
    with Endpoint(models=tuple(f"m{i:02}" for i in range(12)), key=KEY) as endpoint:
        root = endpoint.url.removesuffix("/v1")
        url = root if keys.get("url") == "/.." else endpoint.url + keys.get("url", "")
        config = Judge(**{**keys, "url": url})
        said = failed(config, EndpointError)
        assert says.format(root=root) in said
        assert "4711" not in said
        endpoint.requests.clear()
        assert all(isinstance(error, EndpointError) for error in ask(Client(config), 40))
        assert len(endpoint.requests) <= config.concurrency, "the rest is not sent"
        with pytest.raises(UserError, match=re.escape(says.format(root=root))):
            probe(config)


@pytest.mark.parametrize("body", [{"data": [None]}, {"data": ["x"]}, {"data": [{}]}, {"data": 1}, [], None])
def test_lists_of_models_of_another_form(body: Any, monkeypatch: pytest.MonkeyPatch):
    with Endpoint() as endpoint:
        monkeypatch.setattr(endpoint, "respond", lambda request: Response(200, body))
        assert "has no list of models: set judge.model" in failed(Judge(url=endpoint.url), EndpointError)


def test_a_busy_endpoint_passes_the_probe():
    """There may be many ranks and runs at the same time. Other faults are found early."""
    with Endpoint(lambda body: fault(429, "slow down")) as endpoint:
        assert probe(Judge(url=endpoint.url)) == "judge"
        assert len(endpoint.asked) == 2
        endpoint.answer = lambda body: fault(500, "broken")
        with pytest.raises(UserError, match="status 500"):
            probe(Judge(url=endpoint.url))


def test_an_endpoint_without_models():
    with Endpoint(models=()) as endpoint:
        assert "has no models: start the endpoint with one, or correct" in failed(
            Judge(url=endpoint.url), EndpointError
        )


def test_a_reply_that_repeats_the_key():
    with Endpoint(lambda body: f"[[7]] for {KEY}") as endpoint:
        assert ask(Client(Judge(url=endpoint.url))) == [Reply("[[7]] for ***", False)]


def test_nobody_answers():
    with Endpoint() as endpoint:
        pass
    said = failed(Judge(url=endpoint.url, model="judge", retries=1), EndpointError)
    assert said.startswith(f"nobody answers at judge.url={endpoint.url} (")
    assert said.endswith("start the endpoint, or correct judge.url (2 tries)")
    said = failed(Judge(url="http://judge.invalid", model="judge", retries=0), EndpointError)
    assert "try judge.url=http://judge.invalid/v1" in said


@pytest.mark.parametrize(("text", "found"), [("", ""), (None, ""), ("long " * 500_000, "long " * 500_000)])
def test_texts(text: str | None, found: str):
    with Endpoint(lambda body: completion(text, "length")) as endpoint:
        assert ask(Client(Judge(url=endpoint.url))) == [Reply(found, True)]


def test_parameters_that_a_model_refuses():
    """OpenAI's models since o1 want max_completion_tokens, and no temperature."""

    def answer(body: dict[str, Any]) -> Any:
        if "max_tokens" in body:
            said = "Unsupported parameter: 'max_tokens' is not supported with this model."
            return fault(400, said, "unsupported_parameter", "max_tokens")
        if "temperature" in body:
            said = "Unsupported value: 'temperature' does not support 0.0 with this model."
            return fault(400, said, "unsupported_value", "temperature")
        return f"{body['max_completion_tokens']}"

    with Endpoint(answer) as endpoint:
        client = Client(Judge(url=endpoint.url, max_tokens=5, concurrency=1))
        assert ask(client, 3) == [Reply("5", False)] * 3
    assert len(endpoint.asked) == 5, "refused once each"


def test_secrets_are_refused_and_not_shown():
    for keys in ("judge.key=sk-4711", "judge.key=gsk_4711abc", "judge.url=http://me:4711@host/v1"):
        with pytest.raises(UserError) as error:
            configuration.load("grpo", [keys])
        assert "4711" not in str(error.value)
    with pytest.raises(UserError, match="parameters"):
        configuration.load("grpo", ["judge.url=http://host/v1?api-key=4711"])
    assert configuration.load("grpo", ["judge.key=MY_KEY_2"]).judge.key == "MY_KEY_2"


@pytest.mark.parametrize(
    "url",
    [
        *("", "host:8000", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1/v1", "http://host:99999/v1"),
        *("http://999.1.1.1/v1", "http://\u2603.\u200d/v1", "http://host" + "/v1" * 30_000),
    ],
    ids=lambda url: ascii(url)[:30],
)
def test_urls(url: str):
    with pytest.raises(UserError, match=r"^judge.url=.*: give the address"):
        Client(Judge(url=url))


def test_a_key_that_no_header_can_have(monkeypatch: pytest.MonkeyPatch):
    for key in ("sk-\u20ac4711", "sk-4711\nsk-4711"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match="OPENAI_API_KEY is no API key") as error:
            Client(Judge(url="http://host/v1"))
        assert "4711" not in str(error.value)


def test_proxies(monkeypatch: pytest.MonkeyPatch):
    """The variables of other programs hold: the request goes to the proxy."""
    with Endpoint(lambda body: "by proxy") as endpoint:
        monkeypatch.setenv("HTTP_PROXY", endpoint.url.removesuffix("/v1"))
        [reply] = ask(Client(Judge(url="http://judge.invalid/v1", model="judge", retries=0)))
        assert endpoint.requests[0].path == "http://judge.invalid/v1/chat/completions"
        assert isinstance(reply, EndpointError), "this server is no proxy"
    for proxy in ("socks9://me:4711@x", "http://me:4711@999.1.1.1"):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        with pytest.raises(UserError, match="HTTP_PROXY") as error:
            Client(Judge(url="http://judge.invalid/v1"))
        assert "4711" not in str(error.value)


def test_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An unknown authority ends a request at once. SSL_CERT_FILE makes it known."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -addext subjectAltName=IP:127.0.0.1"
    files = {"-keyout": tmp_path / "key.pem", "-out": tmp_path / "cert.pem"}
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    subprocess.run([*command.split(), *(str(each) for pair in files.items() for each in pair)], check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["-out"], files["-keyout"])
    with Endpoint(tls=context) as endpoint:
        said = failed(Judge(url=endpoint.url), EndpointError)
        assert "has a certificate that is not trusted" in said
        assert "set SSL_CERT_FILE" in said
        monkeypatch.setenv("SSL_CERT_FILE", str(files["-out"]))
        assert ask(Client(Judge(url=endpoint.url))) == [Reply("[[7]]", False)]
    with Endpoint() as endpoint:
        said = failed(Judge(url=endpoint.url.replace("http", "https")), EndpointError)
        assert "does not speak TLS" in said
