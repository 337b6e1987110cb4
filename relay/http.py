"""A small HTTP server for probes and metrics, in a thread with an event loop of its own: so it answers, in words, when
the relay's own loop hangs.

It reads one request of at most 8 KiB within 5 s and closes the connection: GET and HEAD, no bodies, no files. Anything
else is refused by RFC 9110's status codes.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus

import structlog

log = structlog.get_logger("relay")

REQUEST_BYTES = 8_192
"""Request line and headers together."""

REQUEST_SECONDS = 5.0
"""From the connection to the last byte of the answer."""

CONNECTIONS = 32
"""At a time; one more is closed at once."""

AGAIN = 5.0
"""Seconds between two tries to listen where the address is in use."""

LINGER = 64 * 1024
"""So much of what a client sends behind its request is read and dropped: closing with bytes unread would reset the
connection, and the answer with it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a page answers."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()

    def encoded(self, head: bool) -> bytes:
        """As bytes for the wire; `head`: without the body."""
        lines = [
            f"HTTP/1.1 {self.status} {self.status.phrase}",
            f"Content-Type: {self.content_type}",
            f"Content-Length: {len(self.body)}",
            "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff",
            *(f"{name}: {value}" for name, value in self.headers),
            "Connection: close",
            "\r\n",
        ]
        return "\r\n".join(lines).encode("latin-1") + (b"" if head else self.body)


Page = Callable[[], Awaitable[Answer]]


def refusal(status: HTTPStatus, *headers: tuple[str, str]) -> Answer:
    """An answer that says its status only."""
    return Answer(status, f"{status.phrase}\n".encode(), headers=headers)


class Server:
    """Serves `pages`, by path. Never in the way of the relay: it does not raise, and where the address is in use it
    says so once and tries again."""

    def __init__(self, host: str, port: int, pages: Mapping[str, Page]) -> None:
        self._host = host
        self._port = port
        self._pages = pages
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
            async with asyncio.timeout(REQUEST_SECONDS):
                await self._exchange(reader, writer)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            request, answer = b"", refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        else:
            answer = await self._answer(request.partition(b"\r\n")[0])
        writer.write(answer.encoded(head=request.startswith(b"HEAD ")))
        await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
        for _ in range(LINGER // REQUEST_BYTES):
            if not await reader.read(REQUEST_BYTES):
                return

    async def _answer(self, line: bytes) -> Answer:
        parts = line.split(b" ")
        if len(parts) != 3 or not parts[2].startswith(b"HTTP/1.") or not parts[1].startswith(b"/"):
            return refusal(HTTPStatus.BAD_REQUEST)
        if parts[0] not in (b"GET", b"HEAD"):
            return refusal(HTTPStatus.METHOD_NOT_ALLOWED, ("Allow", "GET, HEAD"))
        page = self._pages.get(parts[1].partition(b"?")[0].decode("latin-1"))
        if page is None:
            return refusal(HTTPStatus.NOT_FOUND)
        try:
            return await page()
        except Exception:  # a page that fails must not end the server
            log.exception("http page failed", path=parts[1].decode("latin-1"))
            return refusal(HTTPStatus.INTERNAL_SERVER_ERROR)
