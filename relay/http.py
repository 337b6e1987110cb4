"""A small HTTP server for probes, metrics and the page, in a thread with an event loop of its own: so it answers, in
words, when the relay's own loop hangs.

It reads one request of at most 8 KiB within 5 s, never a body, and closes the connection after the answer. Anything
else is refused by RFC 9110's status codes.

A browser can be made to ask us in the name of a site that it shows (DNS rebinding: the site's name begins to point to
our address, so what we answer is the site's to read). Such a request bears that name, hence what a browser may find
here is answered only to who asks for an address, for `localhost` or for a name that is known to be ours.
"""

import asyncio
import re
import socket
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus
from http.client import HTTPException, parse_headers
from io import BytesIO
from ipaddress import ip_address
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import structlog

log = structlog.get_logger("relay")

REQUEST_BYTES = 8_192
"""Request line and headers together."""

REQUEST_SECONDS = 5.0
"""From the connection to the last byte of the request; for the answer, where its route says nothing else; and for each
piece of a stream."""

CONNECTIONS = 32
"""At a time; one more is closed at once."""

AGAIN = 5.0
"""Seconds between two tries to listen where the address is in use."""

LINGER = 64 * 1024
"""So much of what a client sends behind its request is read and dropped: closing with bytes unread would reset the
connection, and the answer with it."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
"""What a browser may do with anything that is served here: use the page's own files, and no frame around it."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for."""

    headers: Message
    query: Mapping[str, list[str]]
    event: UUID | None
    """The id in the path, where there is one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a route answers."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()

    def encoded(self, head: bool) -> bytes:
        """As bytes for the wire; `head`: without the body."""
        start = _start(self.status, self.content_type, ("Content-Length", str(len(self.body))), *self.headers)
        return start + (b"" if head else self.body)


@dataclass(frozen=True, slots=True)
class Stream:
    """An answer without an end: server-sent events, as they come."""

    events: AsyncGenerator[bytes, None]

    def encoded(self, head: bool) -> bytes:  # noqa: ARG002 -- as Answer's; what follows is sent piece by piece
        """What stands before the events."""
        return _start(HTTPStatus.OK, "text/event-stream", ("X-Accel-Buffering", "no"))


def _start(status: HTTPStatus, content_type: str, *headers: tuple[str, str]) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {status.phrase}",
        f"Content-Type: {content_type}",
        "Cache-Control: no-store",
        f"Content-Security-Policy: {POLICY}",
        "Cross-Origin-Resource-Policy: same-origin",
        "Referrer-Policy: no-referrer",
        "X-Content-Type-Options: nosniff",
        *(f"{name}: {value}" for name, value in headers),
        "Connection: close",
        "\r\n",
    ]
    return "\r\n".join(lines).encode("latin-1")


@dataclass(frozen=True, slots=True)
class Route:
    """What one path answers. GET brings HEAD with it."""

    answer: Callable[[Request], Awaitable[Answer | Stream]]
    method: str = "GET"
    seconds: float = REQUEST_SECONDS
    """That the answer may take."""
    by_any_name: bool = False
    """True: whoever reaches a server that others may reach may ask under any name, such as that of a Kubernetes
    service. For probes and metrics, which hold nothing that a browser's site would want."""

    @property
    def methods(self) -> tuple[str, ...]:
        """Those that are answered."""
        return ("GET", "HEAD") if self.method == "GET" else (self.method,)


_EVENT = re.compile(r"/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?=/|$)")
"""An event's id in a path; it stands as `/*` in the paths of routes."""


def refusal(status: HTTPStatus, *headers: tuple[str, str], words: str | None = None) -> Answer:
    """An answer that says its status, or `words`."""
    return Answer(status, f"{words or status.phrase}\n".encode(), headers=headers)


class Server:
    """Serves `routes`, by path. Never in the way of the relay: it does not raise, and where the address is in use it
    says so once and tries again."""

    def __init__(self, host: str, port: int, routes: Mapping[str, Route]) -> None:
        self._host = host
        self._port = port
        self._routes = routes
        self._names = {"localhost", host.lower(), socket.gethostname().lower()}
        self._loop = asyncio.new_event_loop()
        self._serving = self._loop.create_task(self._serve())
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._open: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Close the address. Answers under way are cut off."""
        self._loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join(1.0)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner, suppress(asyncio.CancelledError):
            runner.run(self._until_stopped())

    async def _until_stopped(self) -> None:
        await self._serving

    async def _serve(self) -> None:
        said = False
        while True:
            try:
                server = await asyncio.start_server(self._accepted, self._host, self._port, limit=REQUEST_BYTES)
                break
            except OSError as error:
                if not said:
                    log.warning("http not listening", host=self._host, port=self._port, error=error.strerror)
                said = True
                await asyncio.sleep(AGAIN)
        host, port, *_ = server.sockets[0].getsockname()
        log.info("http listening", host=host, port=port)
        try:
            await self._loop.create_future()  # until it is cancelled
        finally:
            server.close()

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= CONNECTIONS:
            writer.close()
            return
        task = self._loop.create_task(self._connected(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        task.add_done_callback(lambda _: writer.close())

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, TimeoutError, EOFError):  # the client's affair
            async with asyncio.timeout(REQUEST_SECONDS) as deadline:
                head = b""
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                except asyncio.LimitOverrunError:
                    answer: Answer | Stream = refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
                else:
                    answer = await self._answer(head, deadline)
                deadline.reschedule(self._loop.time() + REQUEST_SECONDS)
                is_head = head.startswith(b"HEAD ")
                writer.write(answer.encoded(is_head))
                await writer.drain()
                if isinstance(answer, Stream) and not is_head:
                    deadline.reschedule(None)
                    await _stream(answer, writer)
                else:
                    await _linger(reader, writer)

    async def _answer(self, head: bytes, deadline: asyncio.Timeout) -> Answer | Stream:
        line, _, rest = head.partition(b"\r\n")
        parts = line.split(b" ")
        if len(parts) != 3 or not parts[2].startswith(b"HTTP/1.") or not parts[1].startswith(b"/"):
            return refusal(HTTPStatus.BAD_REQUEST)
        try:
            headers = parse_headers(BytesIO(rest))
        except HTTPException:
            return refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        hosts = headers.get_all("Host", [])
        if headers.defects or len(hosts) > 1:
            return refusal(HTTPStatus.BAD_REQUEST)
        path, _, query = parts[1].decode("latin-1").partition("?")
        event = _EVENT.search(path)
        route = self._routes.get(f"{path[: event.start()]}/*{path[event.end() :]}" if event else path)
        if route is None or "*" in path:
            return refusal(HTTPStatus.NOT_FOUND)
        if hosts and not self._is_asked_for(hosts[0], route):
            return refusal(HTTPStatus.MISDIRECTED_REQUEST, words=_MISDIRECTED)
        if parts[0].decode("latin-1") not in route.methods:
            return refusal(HTTPStatus.METHOD_NOT_ALLOWED, ("Allow", ", ".join(route.methods)))
        deadline.reschedule(self._loop.time() + route.seconds)
        try:
            return await route.answer(Request(headers, parse_qs(query), UUID(event[1]) if event else None))
        except Exception:  # a page that fails must not end the server
            log.exception("http page failed", path=path)
            return refusal(HTTPStatus.INTERNAL_SERVER_ERROR)

    def _is_asked_for(self, host: str, route: Route) -> bool:
        """Whether a request to `host` may be meant for us. No browser leaves it out."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._names or _is_address(name) or (route.by_any_name and not _is_loopback(self._host))


_MISDIRECTED = "Ask for this relay by its address, as localhost, or by the name in OUTBOX_HTTP."


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ip_address(host).is_loopback)


async def _stream(stream: Stream, writer: asyncio.StreamWriter) -> None:
    """Until the client has gone, which the next write notices, or does not take what is sent."""
    try:
        async with aclosing(stream.events) as events:
            async for event in events:
                if writer.is_closing():
                    return
                writer.write(event)
                async with asyncio.timeout(REQUEST_SECONDS):
                    await writer.drain()
    except (OSError, TimeoutError):
        raise
    except Exception:
        log.exception("http page failed", path="a stream")


async def _linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if writer.can_write_eof():
        writer.write_eof()
    for _ in range(LINGER // REQUEST_BYTES):
        if not await reader.read(REQUEST_BYTES):
            return
