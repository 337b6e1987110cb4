"""A gate before a schema registry: TLS and credentials as a real one may ask for, and outages at will.

with Gate(registry.url, user="relay", password="secret") as gate:
    relay → gate.url, gate.ca  ─►  the real registry
    gate.shut = True            # connections are closed without an answer
    gate.answers.append((409, {"error_code": 409, "message": "…"}))    # instead of the registry's next one
"""

import base64
import json
import ssl
import tempfile
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import trustme


class Gate:
    """An HTTP server that hands every request on to the registry and says what it says."""

    def __init__(self, url: str, *, user: str = "", password: str = "", tls: bool = False) -> None:
        """`user`: who is let in, by basic authentication; "": everybody."""
        self.shut = False
        self.answers: deque[tuple[int, dict[str, Any]]] = deque()
        self.seen: list[tuple[str, str]] = []
        """Method and path of each request that was not turned away."""
        self._turned_away = threading.Semaphore(0)
        self._wanted = f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}" if user else None
        self._behind = httpx.Client(base_url=url, timeout=30, trust_env=False)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._folder = tempfile.TemporaryDirectory()
        self.ca = Path(self._folder.name) / "ca.pem"
        """The authority that vouches for the gate, with `tls`."""
        if tls:
            self._secure()
        port = self._server.server_address[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}{urlsplit(url).path}"
        self._root = urlsplit(url).path

    def _secure(self) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.ca)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                gate._serve(self)

            def do_POST(self) -> None:
                gate._serve(self)

            def log_message(self, *_: Any) -> None:
                """Not on stderr."""

        return Handler

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        if self.shut:
            request.close_connection = True
            self._turned_away.release()
            return
        if self._wanted and request.headers.get("Authorization") != self._wanted:
            self._answer(request, 401, b'{"error_code": 401, "message": "Unauthorized"}')
            return
        method, path = request.command, request.path.removeprefix(self._root)
        self.seen.append((method, path))
        if self.answers:
            status, document = self.answers.popleft()
            self._answer(request, status, json.dumps(document).encode())
            return
        given = {"Content-Type": request.headers.get("Content-Type", "application/json")}
        answer = self._behind.request(method, path, content=body, headers=given)
        self._answer(request, answer.status_code, answer.content)

    def _answer(self, request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def wait_until_turned_away(self, count: int) -> None:
        """So many requests more found it shut."""
        for _ in range(count):
            assert self._turned_away.acquire(timeout=60), "nobody asks any more"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._behind.close()
        self._folder.cleanup()
