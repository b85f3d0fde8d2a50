"""An OpenAI-compatible endpoint for tests: a real HTTP server, which answers or fails as told."""

import json
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Response:
    """An HTTP response."""

    status: int
    body: Any  # bytes, or a value that is sent as JSON
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """An HTTP request that came."""

    path: str
    key: str  # of the header Authorization
    body: dict[str, Any]  # of GET: {}


HANG, CLOSE = "hang", "close"  # no answer until the endpoint is closed; a connection that closes without an answer
Answer = str | Response | tuple[str]


def fault(status: int, message: str, code: str = "", param: str = "", **headers: str) -> Response:
    """Return an error in OpenAI's form. headers: Retry_After is sent as Retry-After."""
    body = {"error": {"message": message, "code": code or None, "param": param or None, "type": "error"}}
    return Response(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


def completion(text: str | None, finish: str = "stop") -> Response:
    """Return a chat completion in OpenAI's form."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return Response(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})


class Endpoint:
    """A server for one test, used as a context manager.

    answer    gets the JSON body of a chat request, and returns the text of the answer, a Response, (HANG,) or (CLOSE,)
    models    names of its models
    key       API key that requests must have; "": any
    tls       context with a certificate; the url is then https://
    url       address of the API
    requests  all requests so far, in order of their arrival
    most      largest number of chat requests that were open at a time
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], Answer] = lambda body: "[[7]]",
        models: tuple[str, ...] = ("judge",),
        key: str = "",
        tls: ssl.SSLContext | None = None,
    ):
        self.answer, self.models, self.key, self.requests, self.most = answer, models, key, list[Request](), 0
        self._open, self._lock, self._closed = 0, threading.Lock(), threading.Event()
        self._server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"endpoint": self}))
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "Endpoint":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The bodies of all chat requests so far."""
        return [request.body for request in self.requests if request.body]

    def respond(self, request: Request) -> Response | None:
        """Return the response to a request. None: the connection is closed without one."""
        with self._lock:
            self.requests.append(request)
            self._open += bool(request.body)
            self.most = max(self.most, self._open)
        try:
            answer = self._answer(request)
            if answer == (HANG,):
                self._closed.wait()
        finally:
            with self._lock:
                self._open -= bool(request.body)
        if isinstance(answer, tuple):
            return None
        return completion(answer) if isinstance(answer, str) else answer

    def _answer(self, request: Request) -> Answer:
        if self.key and request.key != f"Bearer {self.key}":
            return fault(401, f"Incorrect API key provided: {request.key}", "invalid_api_key")
        if request.path == "/v1/models":
            return Response(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})
        if request.path != "/v1/chat/completions":
            return Response(404, {"detail": "Not Found"})
        if request.body["model"] not in self.models:
            return fault(404, f"The model `{request.body['model']}` does not exist.", "model_not_found", "model")
        return self.answer(request.body)


class Server(ThreadingHTTPServer):
    """A server with a thread per connection."""

    daemon_threads, request_queue_size = True, 256

    def handle_error(self, *_: object) -> None:
        """Print nothing: clients that give up close their connections."""


class Handler(BaseHTTPRequestHandler):
    """Gives the requests of a connection to the endpoint."""

    endpoint: Endpoint
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._reply({})

    def do_POST(self) -> None:
        self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _reply(self, body: dict[str, Any]) -> None:
        response = self.endpoint.respond(Request(self.path, self.headers.get("Authorization", ""), body))
        if response is None:
            self.close_connection = True
            return
        content = response.body if isinstance(response.body, bytes) else json.dumps(response.body).encode()
        self.send_response(response.status)
        for name, value in {"Content-Type": "application/json", **response.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing."""
