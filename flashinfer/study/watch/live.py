"""The page while a model runs: a server on this machine alone, which is asked for what is new."""

import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlparse

HOST = "127.0.0.1"


class LiveServer:
    """Serves a page and the runs that ``add`` was given.

    with LiveServer(page) as server: print(server.address) ... server.add(run)
    """

    def __init__(self, page: str) -> None:
        self.page, self.done = page.encode(), False
        self.runs: list[dict[str, Any]] = []
        self.lock, self.told_all = threading.Lock(), threading.Event()
        self.server = ThreadingHTTPServer((HOST, 0), self._handler())
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server.server_address[1]}/"

    def add(self, run: dict[str, Any]) -> None:
        """One more run, as ``page.told`` gives it."""
        with self.lock:
            self.runs.append(run)

    def finish(self, seconds: float) -> None:
        """There will be no more; returns when a page was told so, or after so many seconds."""
        with self.lock:
            self.done = True
        self.told_all.wait(seconds)

    def since(self, first: int) -> bytes:
        """The runs from the ``first`` on, and whether there will be more, as JSON."""
        with self.lock:
            told = {"runs": self.runs[first:], "done": self.done}
            if self.done:
                self.told_all.set()
            return json.dumps(told, separators=(",", ":")).encode()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        live = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = urlparse(self.path)
                # Another site's page must not read this one by a name that leads here.
                if self.headers.get("Host", "") != live.address[7:-1]:
                    self.send_error(HTTPStatus.FORBIDDEN)
                elif asked.path == "/":
                    self._answer(live.page, "text/html; charset=utf-8")
                elif asked.path == "/runs":
                    first = parse_qs(asked.query).get("from", ["0"])[0]
                    at = int(first) if first.isdecimal() and len(first) < 10 else 0
                    self._answer(live.since(at), "application/json")
                else:
                    self.send_error(HTTPStatus.NOT_FOUND)

            def _answer(self, body: bytes, kind: str) -> None:
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing."""

        return Handler

    def __enter__(self) -> "LiveServer":
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
