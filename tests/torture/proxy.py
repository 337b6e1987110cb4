"""TCP proxies between the relays and their servers, which cut, delay and hold what passes.

All gates live on one event loop in a thread of its own. Every method may be called from any thread; what it asks for is
in effect when it returns.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

from tests.servers.process import free_port

CHUNK = 65_536
CALL_SECONDS = 10.0
AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends a reset, and what was not sent yet is gone."""

T = TypeVar("T")


class Gate:
    """One proxied port of 127.0.0.1 before the port `target`. Open at first."""

    def __init__(self, loop: asyncio.AbstractEventLoop, port: int, target: int) -> None:
        self.port = port
        self._loop = loop
        self._target = target
        self._server: asyncio.Server | None = None
        self._links: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._delay = 0.0
        self._requests, self._answers = asyncio.Event(), asyncio.Event()
        self._open()

    @property
    def links(self) -> int:
        """Connections that are open now."""
        return self._call(lambda: len(self._links))

    def cut(self) -> int:
        """Resets every connection at both ends; how many they were. New ones pass, unless a hold is on."""
        return self._call(self._cut)

    def delay(self, seconds: float) -> None:
        """From now on each chunk waits so long, in both directions."""
        self._call(lambda: setattr(self, "_delay", seconds))

    def hold(self, *, requests: bool = True, answers: bool = True) -> None:
        """A black hole: nothing passes in these directions, and nobody is told.

        New connections are accepted and hear nothing. Without `requests`, servers do what they are asked, and only
        their answers are missing.
        """

        def close() -> None:
            if requests:
                self._requests.clear()
            if answers:
                self._answers.clear()

        self._call(close)

    def heal(self) -> None:
        """No delay and no hold any more. What was held is delivered, late."""
        self._call(self._open)

    async def listen(self) -> None:
        """Serves the port; OSError when it is taken."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def close(self) -> None:
        """Serves it no longer."""
        if self._server:
            self._server.close()
        links = list(self._links)
        self._cut()
        await asyncio.gather(*links, return_exceptions=True)

    def _call(self, what: Callable[[], T]) -> T:
        async def call() -> T:
            return what()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(CALL_SECONDS)

    def _open(self) -> None:
        self._delay = 0.0
        self._requests.set()
        self._answers.set()

    def _cut(self) -> int:
        links = dict(self._links)
        for task, writers in links.items():
            for writer in writers:
                end = writer.get_extra_info("socket")
                if end.fileno() >= 0:  # else it was closed by the other side just now
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
                writer.transport.abort()
            task.cancel()
        return len(links)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            return
        self._links[task] = ends = [writer]
        try:
            await self._requests.wait()
            upstream, server = await asyncio.open_connection("127.0.0.1", self._target)
            ends.append(server)
            await self._join((reader, server, self._requests), (upstream, writer, self._answers))
        except (OSError, asyncio.CancelledError):  # cut, or nobody listens there: the client is told by the reset
            pass
        finally:
            for end in ends:
                end.close()
            del self._links[task]

    async def _join(self, *ways: tuple[asyncio.StreamReader, asyncio.StreamWriter, asyncio.Event]) -> None:
        """Until one end closes, or breaks."""
        pumps = [asyncio.create_task(self._pump(*way)) for way in ways]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                if self._delay:
                    await asyncio.sleep(self._delay)
                await way.wait()
                writer.write(data)
                await writer.drain()
            await way.wait()


class Proxies:
    """The gates and the thread that serves them, for the length of a `with` block."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        self._gates: list[Gate] = []

    def gate(self, port: int, target: int) -> Gate:
        """A new gate, which serves `port` from now on."""
        gate = Gate(self._loop, port, target)
        self._run(gate.listen())
        self._gates.append(gate)
        return gate

    def gate_before(self, target: int) -> Gate:
        """A new gate at some free port."""
        return self.gate(free_port(), target)

    def _run(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(CALL_SECONDS)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for gate in self._gates:
            self._run(gate.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
