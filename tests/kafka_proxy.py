"""A TCP proxy before a broker that reads Kafka's requests, and holds back the one that a test asks for.

The broker must advertise the proxy's port (tests/servers/kafka.py, `doors`). What is read of a request is its header,
and the transactional id that is the first field of all that a transaction sends. Two things can be done to a request,
once those before it on its connection are answered:

- `lose`: the broker does not get it, the client's connection is closed, and the client tries again on another. The
  lost one is in nobody's hands but the test's, which delivers it when it likes, as a network or a frozen thread of the
  broker would (https://issues.apache.org/jira/browse/KAFKA-17754).
- `stall`: the client waits for it while the test does something else, until the test lets it pass.
"""

import asyncio
import struct
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Any, Self, TypeVar

from tests.servers.broker import Door

PATIENCE = 30.0
"""Seconds that a request may take to come, or the broker to answer."""

CLIENT = "outbox-relay"
"""The relay's client.id. Other clients pass, and are left alone."""

T = TypeVar("T")


class Api(IntEnum):
    """The requests of a transaction (https://kafka.apache.org/protocol#protocol_api_keys)."""

    PRODUCE = 0
    INIT_PRODUCER_ID = 22
    ADD_PARTITIONS_TO_TXN = 24
    ADD_OFFSETS_TO_TXN = 25
    END_TXN = 26
    TXN_OFFSET_COMMIT = 28


FLEXIBLE = {
    Api.PRODUCE: 9,
    Api.INIT_PRODUCER_ID: 2,
    Api.ADD_PARTITIONS_TO_TXN: 3,
    Api.ADD_OFFSETS_TO_TXN: 3,
    Api.END_TXN: 3,
    Api.TXN_OFFSET_COMMIT: 3,
}
"""The first version of each that has compact strings and tagged fields (KIP-482)."""


class Bytes:
    """Reads Kafka's primitive types one after the other."""

    def __init__(self, data: bytes, flexible: bool) -> None:
        self._data = data
        self._at = 0
        self._flexible = flexible

    def number(self, form: str) -> int:
        [value] = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return int(value)

    def uvarint(self) -> int:
        value = shift = 0
        while (byte := self.number(">B")) > 127:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    def string(self, *, compact: bool | None = None) -> str | None:
        compact = self._flexible if compact is None else compact
        length = self.uvarint() - 1 if compact else self.number(">h")
        if length < 0:
            return None
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def array(self) -> int:
        return self.uvarint() - 1 if self._flexible else self.number(">i")

    def tags(self) -> None:
        for _ in range(self.uvarint() if self._flexible else 0):
            self.uvarint()
            self._at += self.uvarint()


@dataclass(frozen=True, slots=True)
class Request:
    """A request's header, its transactional id where it has one, and its bytes with their length before them."""

    api: int
    version: int
    correlation: int
    client: str
    transactional_id: str | None
    frame: bytes


def parse_request(frame: bytes) -> Request:
    """What `frame` (with its length) says."""
    api, version, correlation = struct.unpack_from(">hhi", frame, 4)
    flexible = version >= FLEXIBLE.get(api, 1 << 15)
    rest = Bytes(frame[12:], flexible)
    client = rest.string(compact=False) or ""  # the header's own string is never compact
    id_ = None
    if api in FLEXIBLE and not (api == Api.ADD_PARTITIONS_TO_TXN and version > 3):  # only brokers send those
        rest.tags()
        id_ = rest.string()
    return Request(api, version, correlation, client, id_, frame)


def error_of(request: Request, response: bytes) -> int:
    """The (first) error code in the response, 0 when there is none. `response`: with its length."""
    rest = Bytes(response[8:], request.version >= FLEXIBLE[Api(request.api)])
    rest.tags()
    if request.api != Api.PRODUCE:
        rest.number(">i")  # throttle time
    if request.api in (Api.PRODUCE, Api.ADD_PARTITIONS_TO_TXN, Api.TXN_OFFSET_COMMIT):
        rest.array()
        rest.string()
        rest.array()
        rest.number(">i")  # partition
    return rest.number(">h")


class Trap:
    """Waits for one request; see `KafkaProxy.lose` and `stall`."""

    def __init__(self, proxy: "KafkaProxy", matches: Callable[[Request], bool], skip: int, lose: bool) -> None:
        self.loses = lose
        self._proxy = proxy
        self._matches = matches
        self._skip = skip
        self._caught = threading.Event()
        self._broker: asyncio.StreamWriter | None = None
        self.request: Request | None = None
        self.released = asyncio.Event()
        self.answer: asyncio.Future[bytes] = proxy.loop.create_future()

    def takes(self, request: Request) -> bool:
        """Whether this is the one. In the proxy's thread."""
        if self.request is not None or not self._matches(request):
            return False
        self._skip -= 1
        return self._skip < 0

    def take(self, request: Request, broker: asyncio.StreamWriter) -> None:
        self.request, self._broker = request, broker
        self._caught.set()

    def wait(self, timeout: float = PATIENCE) -> Request:
        """The request, once it has come; the client is cut off, or waits."""
        assert self._caught.wait(timeout), f"the request did not come within {timeout:g} s"
        assert self.request is not None
        return self.request

    @property
    def caught(self) -> bool:
        return self._caught.is_set()

    def release(self) -> None:
        """Let a stalled request pass."""
        self._proxy.loop.call_soon_threadsafe(self.released.set)

    def deliver(self, timeout: float = PATIENCE) -> int:
        """Give a lost request to the broker after all. Returned: the error code of its answer, which no client sees."""
        request = self.wait(0)
        return error_of(request, self._proxy.run(self._deliver(request), timeout))

    async def _deliver(self, request: Request) -> bytes:
        assert self._broker is not None
        self._broker.write(request.frame)
        await self._broker.drain()
        return await self.answer


class KafkaProxy:
    """Listens at the door's advertised port of 127.0.0.1, and passes on to the port behind it."""

    def __init__(self, door: Door) -> None:
        self.bootstrap = f"127.0.0.1:{door.advertised}"
        self.seen: list[Request] = []
        """The relay's requests of the kinds in Api, in the order in which they came."""
        self.loop = asyncio.new_event_loop()
        self._traps: list[Trap] = []
        self._connections: set[_Connection] = set()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._behind = door.behind
        self._server = self.run(asyncio.start_server(self._serve, "127.0.0.1", door.advertised))

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float = PATIENCE) -> T:
        """The coroutine's result, from the proxy's own thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def lose(self, api: Api, id_: str, skip: int = 0) -> Trap:
        """Lose the next such request of this transactional id, but for the first `skip` ones, and the connection."""
        return self._trap(api, id_, skip, lose=True)

    def stall(self, api: Api, id_: str, skip: int = 0) -> Trap:
        """Let the client wait with the next such request of this transactional id, but for the first `skip` ones."""
        return self._trap(api, id_, skip, lose=False)

    def _trap(self, api: Api, id_: str, skip: int, lose: bool) -> Trap:
        def matches(request: Request) -> bool:
            return request.api == api and request.transactional_id == id_ and request.client == CLIENT

        async def set_trap() -> Trap:
            trap = Trap(self, matches, skip, lose)
            self._traps.append(trap)
            return trap

        return self.run(set_trap())

    def cut(self, api: Api | None = None) -> None:
        """Close every connection of the relay, or those over which such a request came."""

        async def close() -> None:
            for connection in list(self._connections):
                if connection.client == CLIENT and (api is None or api in connection.apis):
                    connection.close()

        self.run(close())

    def clear(self) -> None:
        """Forget traps that caught nothing, let pass what is stalled, and forget what was seen."""

        async def clear() -> None:
            for trap in self._traps:
                trap.released.set()
            self._traps.clear()
            self.seen.clear()

        self.run(clear())

    def trap_for(self, request: Request) -> Trap | None:
        """In the proxy's thread: the trap that this request goes into."""
        if request.client == CLIENT and request.api in FLEXIBLE:
            self.seen.append(request)
        return next((trap for trap in self._traps if trap.takes(request)), None)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, reader, writer)
        self._connections.add(connection)
        try:
            await connection.serve(self._behind)
        finally:
            self._connections.discard(connection)

    def close(self) -> None:
        self.clear()

        async def close() -> None:
            self._server.close()
            while self._connections:
                for connection in list(self._connections):
                    connection.close()
                await asyncio.sleep(0.01)

        self.run(close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE)
        self.loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Connection:
    """A client's connection and the one to the broker that belongs to it."""

    def __init__(self, proxy: KafkaProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._broker: asyncio.StreamWriter | None = None
        self._lost: Trap | None = None
        self.client = ""
        self.apis: set[int] = set()
        self._unanswered: set[int] = set()
        self._answered = asyncio.Event()

    async def serve(self, behind: int) -> None:
        """Until one side closes. A lost request keeps the broker's side open."""
        try:
            reader, self._broker = await asyncio.open_connection("127.0.0.1", behind)
            await asyncio.gather(self._up(self._broker), self._down(reader))
        except OSError:  # the broker is away
            pass
        finally:
            self.close()

    def close(self) -> None:
        self._writer.close()
        if self._broker is not None:
            self._broker.close()

    async def _up(self, broker: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                request = parse_request(await _frame(self._reader))
                self.client = request.client
                self.apis.add(request.api)
                trap = self._proxy.trap_for(request)
                if trap is not None:
                    while self._unanswered:
                        self._answered.clear()
                        await self._answered.wait()
                    trap.take(request, broker)
                    if trap.loses:
                        self._lost = trap
                        self._writer.close()
                        return
                    await trap.released.wait()
                self._unanswered.add(request.correlation)
                broker.write(request.frame)
                await broker.drain()
        if self._lost is None:
            broker.close()

    async def _down(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                frame = await _frame(reader)
                [correlation] = struct.unpack_from(">i", frame, 4)
                lost = self._lost
                if lost is None:
                    self._unanswered.discard(correlation)
                    self._answered.set()
                    self._writer.write(frame)
                    await self._writer.drain()
                elif lost.request is not None and lost.request.correlation == correlation:
                    lost.answer.set_result(frame)
        self._writer.close()
        self._unanswered.clear()
        self._answered.set()


async def _frame(reader: asyncio.StreamReader) -> bytes:
    """A message of Kafka's protocol, with its length."""
    head = await reader.readexactly(4)
    return head + await reader.readexactly(struct.unpack(">i", head)[0])
