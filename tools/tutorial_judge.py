"""The tutorial's judge: a server with the chat API of OpenAI whose ratings are the gold reward of the task.

It replaces a language model as judge, so that the tutorial needs none. Equal answers always get equal ratings.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Formatter
from typing import Any

import tutorial_task

sys.path.insert(0, str(Path(__file__).parents[1]))

from rlhf.mtbench.prompts import OWN, Prompts

MODEL = "gold"  # name of the judge


def grade(text: str) -> str:
    """Return the judge's answer to a prompt of rlhf.mtbench: the gold reward of the last answer, and a rating."""
    for pattern in patterns():
        if found := pattern.fullmatch(text.strip()):
            told = found.groupdict()
            asked, said = ([told[name] for name in told if name.startswith(kind)] for kind in ("question", "answer"))
            gold = tutorial_task.worth("\n".join(asked), said[-1])
            return f"The gold reward of the answer is {gold:g}.\nRating: [[{rating(gold):g}]]"
    return "There is no answer to grade."


def rating(gold: float) -> float:
    """Return a rating from 1 to 10: 10 for the best gold reward, which is 2, and 1 for -1 and less."""
    return min(10.0, max(1.0, 4 + 3 * gold))


@cache
def patterns() -> list[re.Pattern[str]]:
    """Return a pattern for the texts of each of the judge's prompts, with a group per field."""
    return [_pattern(prompt.template.strip()) for prompt in Prompts.read(OWN, "single").named.values()]


def _pattern(template: str) -> re.Pattern[str]:
    pattern, known = "", set()
    for text, name, _, _ in Formatter().parse(template):
        pattern += re.escape(text)
        if name:
            pattern += f"(?P={name})" if name in known else f"(?P<{name}>.*?)"
            known.add(name)
    return re.compile(pattern, re.DOTALL)


class Handler(BaseHTTPRequestHandler):
    """Answers GET /v1/models and POST /v1/chat/completions."""

    protocol_version = "HTTP/1.1"  # keeps connections

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "rlhf"}]})
        else:
            self._refuse(404, f"unknown path {self.path}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/v1/chat/completions":
            self._refuse(404, f"unknown path {self.path}")
            return
        try:
            text = json.loads(body)["messages"][-1]["content"]
        except (ValueError, LookupError, TypeError):
            self._refuse(400, "the request has no messages")
            return
        message = {"role": "assistant", "content": grade(str(text))}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self._send({"id": "0", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice]})

    def _refuse(self, status: int, what: str) -> None:
        self._send({"error": {"message": what, "type": "invalid_request_error"}}, status)

    def _send(self, value: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def serve() -> Iterator[str]:
    """Serve the judge on a thread, on a free port of this machine. Yield its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
