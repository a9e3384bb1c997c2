"""A closed API for tests: OpenAI's chat completions, on an address that pods reach, counted."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.gateway.fake_upstream import DONE, FINISH, chunk, usage_chunk


class _Server(ThreadingHTTPServer):
    request_queue_size = 1024  # of connections in a burst; with the default of 5 the rest are refused
    daemon_threads = True


@dataclass
class Mock:
    """Where it is, and how often it was asked."""

    url: str
    asked: list[str] = field(default_factory=list)


@contextmanager
def mock_running(host: str) -> Iterator[Mock]:
    """The API on a free port of `host`, for the block."""
    mock = Mock("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            mock.asked.append(body["model"])
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream" if body.get("stream") else "application/json")
            self.end_headers()
            if body.get("stream"):
                self.wfile.write(chunk() + chunk("from elsewhere") + FINISH + usage_chunk(10, 2) + DONE)
            else:
                self.wfile.write(json.dumps(_WHOLE).encode())

        def log_message(self, *_: object) -> None:
            pass

    with _Server((host, 0), Handler) as server:
        mock.url = f"http://{host}:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield mock
        server.shutdown()
        thread.join()


_WHOLE = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "elsewhere",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "from elsewhere"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
}
