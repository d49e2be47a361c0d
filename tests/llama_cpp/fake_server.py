"""A well-behaved llama-server of few lines, whose answers a test may change before they are sent.

Its tokens are bytes, its model knows nothing: every token is as likely as any other.
"""

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mode_gguf.llama_cpp.http_model import ServerUrl

VOCABULARY = 256
END = 3
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
MARKER = "<__media__>"


@dataclass
class FakeServer:
    """Its address, what it was asked, and what changes its answers.

    Attributes:
        changed: is given path and answer, and returns what is sent instead.
        raw: is given the handler in place of any answer, where a path is in it.
        seen: path and Authorization of each request.
    """

    changed: Callable[[str, Any], Any] = lambda path, answer: answer
    raw: dict[str, Callable[["Handler"], None]] = field(default_factory=dict)
    seen: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""

    @property
    def address(self) -> ServerUrl:
        return ServerUrl(self.url)

    def answer(self, path: str, asked: dict[str, Any]) -> Any:
        match path:
            case "/props":
                names = {"model_alias": "fake", "build_info": "b1-fake", "model_path": "fake.gguf"}
                special = {"eos_token": chr(END), "media_marker": MARKER}
                return {**names, **special, "chat_template": TEMPLATE, "modalities": {"vision": True}}
            case "/v1/models":
                return {"data": [{"meta": {"n_vocab": VOCABULARY, "size": 1000, "n_params": 1000}}]}
            case "/tokenize":
                return {"tokens": list(asked["content"].encode())}
            case "/detokenize":
                return {"content": bytes(asked["tokens"]).decode("utf-8", "replace")}
            case "/completion" if "grammar" in asked:
                fed = [int(one.strip("<[]>")) for one in asked["grammar"].removeprefix("root ::= ").split()]
                return {"completion_probabilities": [self._row(fed, at) for at in range(asked["n_predict"])]}
            case "/completion":
                return {"tokens": [*b"red", END], "stop_type": "eos"}
        raise AssertionError(path)

    @staticmethod
    def _row(fed: list[int], at: int) -> dict[str, Any]:
        entries = [{"id": token, "logprob": -math.log(VOCABULARY)} for token in range(VOCABULARY)]
        return {**entries[fed[at] if at < len(fed) else 65], "top_logprobs": entries}


class Handler(BaseHTTPRequestHandler):
    """A request to `fake`."""

    fake: FakeServer

    def do_GET(self) -> None:
        self.fake.seen.append((self.path, self.headers["Authorization"]))
        if self.path in self.fake.raw:
            self.fake.raw[self.path](self)
            return
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        self.reply(self.fake.changed(self.path, self.fake.answer(self.path, asked)))

    do_POST = do_GET  # noqa: N815

    def reply(self, answer: Any, status: int = 200, **headers: str) -> None:
        """Send bytes as they are, and anything else as JSON."""
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.begin(status, Content_Length=str(len(data)), **headers)
        self.wfile.write(data)

    def begin(self, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client has had enough
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


@contextmanager
def fake_server(
    changed: Callable[[str, Any], Any] = lambda path, answer: answer, host: str = "127.0.0.1"
) -> Iterator[FakeServer]:
    """A server while the context lasts."""
    fake = FakeServer(changed)
    with _Server((host, 0), type("Bound", (Handler,), {"fake": fake})) as server:
        fake.url = f"http://{host}:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()
