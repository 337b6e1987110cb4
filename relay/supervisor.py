"""One relay process: leases, one LaneWorker per lane, retries after trouble, drain at the end."""

import asyncio
import os
import random
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import structlog

from relay import topics
from relay.config import RelayConfig
from relay.destinations import Destinations
from relay.errors import (
    ConfigError,
    DatabaseTrouble,
    KafkaTrouble,
    LaneHalted,
    LaneLost,
    LaneTrouble,
    NotLetIn,
    RelayError,
)
from relay.failpoint import Failpoint
from relay.http import Server
from relay.leases import plan
from relay.monitor import LaneState, Monitor
from relay.pace import Backoff
from relay.queries import REFUSED, TROUBLE, LaneRow, Meta, Queries, connect, is_final, words_of
from relay.transaction import check_settings
from relay.views import Views
from relay.worker import LaneWorker, Shared

if TYPE_CHECKING:
    from relay.registry import Registry
    from relay.tracing import Tracing

log = structlog.get_logger("relay")

KNOWN_VERSIONS = ("0001",)
"""Revisions of the outbox's tables that this relay works with."""

TICK = 0.5
"""Seconds between two looks at the lanes."""

WATCH = 0.15
"""The same for a relay that stands by, alone. Where there are more of them they look in turns: one after each such
time, be they two or fifty, and none more seldom than each TICK. So long a released lane waits at most."""

FAREWELL = 0.2
"""Seconds that the end waits for the database to note that this relay counts no more when lanes are shared out."""

PATIENCE = 2.5 * TICK
"""Seconds for which a free lane above this relay's share is left to the others: each of them has looked twice by then.
It comes on top of the lease where a relay crashed and all others have their share."""

HEARTBEAT = 10.0
"""Seconds between two signs of life of a relay."""

FORGET = HEARTBEAT * 3
"""Seconds of silence after which a relay counts no more when lanes are shared out."""

CONNECTIONS = 200
"""Most connections to the database. They are opened when needed: two for each lane held, and one."""

THREADS = 200
"""Most calls to Kafka at a time. Made when needed; a call that never returns keeps its own."""

STEADY = 10.0
"""Seconds that a lane must be held for its last trouble to be over; a new one is said in the log again."""

SILENCE = 60.0
"""Seconds until a lane's trouble that goes on is said once more; doubled each time."""

SILENCE_LONGEST = 3_600.0
"""More than that it is not doubled to."""

_TRACES = ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Who sets one of these variables wants traces, as OpenTelemetry has them; the rest is read by relay/tracing.py."""

T = TypeVar("T")


async def opened(queries: Queries, schema: str) -> Meta:
    """The outbox's own account of itself, once its tables are of a version that this relay knows; else ConfigError."""
    found = await queries.version()
    if found is None:
        raise ConfigError(
            f"the database has no outbox in schema {schema!r}: run `outbox migrate`, or set OUTBOX_SCHEMA"
        )
    if found not in KNOWN_VERSIONS:
        known = ", ".join(KNOWN_VERSIONS)
        raise ConfigError(
            f"the outbox's tables are at revision {found}, this relay ({version('kafka-outbox')}) knows {known}: "
            "upgrade the relay, or run `outbox migrate`"
        )
    return await queries.meta()


@dataclass(slots=True)
class _Held:
    """A lane that this relay holds or is taking."""

    worker: LaneWorker
    task: asyncio.Task[None]
    since: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class _Trouble:
    """A lane that cannot be held; retried with backoff, and said at once and then ever less often: its cause may
    change."""

    backoff: Backoff = field(default_factory=Backoff)
    not_before: float = 0.0
    say_at: float = 0.0
    silence: float = SILENCE
    error: str = ""

    def due(self, now: float) -> bool:
        """Whether it is to be said again."""
        if now < self.say_at:
            return False
        self.say_at, self.silence = now + self.silence, min(2 * self.silence, SILENCE_LONGEST)
        return True


class Relay:
    """A relay process. `run` returns after `stop`, or raises ConfigError when it cannot start as it is set up."""

    def __init__(self, config: RelayConfig, failpoint: Failpoint) -> None:
        self._config = config
        self._failpoint = failpoint
        self._id = uuid4()
        self._stopping = asyncio.Event()
        self._wake = asyncio.Event()
        self._held: dict[int, _Held] = {}
        self._troubles: dict[int, _Trouble] = {}
        self._relays = 1
        self._next_heartbeat = self._next_renewal = 0.0
        self._monitor: Monitor | None = None
        self._waiting_since: float | None = None
        self._keep_until = 0.0  # lanes that nobody came for are not handed back to a relay that is dead, but counts yet

    def stop(self) -> None:
        """Finish the batches under way, release the lanes, return from `run`."""
        self._stopping.set()
        self._wake.set()
        if self._monitor:
            self._monitor.stopping = True

    def handle_signals(self) -> None:
        """SIGTERM and SIGINT stop the relay; a second one leaves at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)

    def _signalled(self, number: int) -> None:
        if self._stopping.is_set():
            os._exit(128 + number)
        log.info("relay stopping", signal=signal.Signals(number).name)
        self.stop()

    async def run(self) -> None:
        """Work until `stop`.

        Raises:
            ConfigError: the database or Kafka refuses the relay, the outbox's tables are missing or of another version,
            or the database is a copy of the outbox's.
        """
        check_settings(self._config)
        server = self._serve()
        try:
            await self._work()
        finally:
            if server is not None:
                server.stop()

    def _serve(self) -> Server | None:
        """Start the HTTP server, if one is asked for."""
        if not self._config.http:
            return None
        from relay.page import Page  # late: a relay that serves nothing needs none of it

        self._monitor = Monitor(self._config, version("kafka-outbox"), self._lane_states)
        routes = {**self._monitor.routes(), **Page(self._config, self._monitor).routes()}
        server = Server(*self._config.http_address, routes)
        server.start()
        return server

    async def _work(self) -> None:
        pool = await self._patiently("database", lambda: connect(self._config, CONNECTIONS))
        if pool is None:
            return
        queries = Queries(pool, self._config.schema)
        threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kafka")
        registry = tracing = None
        try:
            registry = _registry(self._config, queries, threads)
            meta = await self._patiently("database", lambda: self._opened(queries))
            if meta is not None and self._monitor:
                self._monitor.opened(meta.name, Views(pool, self._config.schema))
            if meta is None or not await self._patiently("kafka", lambda: self._topic(meta, threads)):
                return
            log.info(
                "relay started",
                relay=str(self._id),
                outbox=meta.name,
                lanes=meta.lanes,
                version=version("kafka-outbox"),
            )
            metrics = self._monitor.metrics if self._monitor else None
            tracing, destinations = _tracing(meta.name, str(self._id)), Destinations(self._config)
            shared = Shared(
                self._config,
                self._id,
                meta,
                queries,
                threads,
                self._failpoint,
                registry,
                metrics,
                tracing,
                destinations,
            )
            while not self._stopping.is_set():
                await self._patiently("database", lambda: self._tick(shared))
                await self._sleep(self._pause() * random.uniform(0.8, 1.2))  # noqa: S311 -- jitter, no secret
            await self._drain(queries)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            if registry is not None:
                registry.close()
            pool.terminate()
            if tracing is not None:
                tracing.close()
            log.info("relay stopped", relay=str(self._id))

    # ---- start -------------------------------------------------------------------------------------------------------

    async def _opened(self, queries: Queries) -> Meta:
        meta = await opened(queries, self._config.schema)
        meta.refuse_copy()
        return meta

    async def _topic(self, meta: Meta, threads: ThreadPoolExecutor) -> bool:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(threads, topics.ensure_control_topic, self._config, meta.name, meta.lanes)
        if self._monitor:
            self._monitor.kafka_reached = True
        return True

    async def _patiently(self, what: str, call: Callable[[], Awaitable[T]]) -> T | None:
        """Call until it works; trouble is said once, once more when we are not let in, and its end. None: stopped
        meanwhile."""
        backoff = Backoff()
        said: set[bool] = set()
        while not self._stopping.is_set():
            if self._monitor:
                self._monitor.supervisor_at = time.monotonic()
            try:
                result = await self._unless_stopped(call())
            except (*TROUBLE, LaneTrouble) as error:
                words = words_of(error)
                if is_final(error, self._config):
                    raise ConfigError(f"the database refuses the relay: {words}") from error
                refused = isinstance(error, (NotLetIn, *REFUSED))
                if refused not in said:
                    log.warning(f"{what} away", error=words)
                said.add(refused)
                if self._monitor:
                    self._monitor.away = f"{what} away: {words}"
                await self._sleep(backoff.wait())
            else:
                if said and not self._stopping.is_set():
                    log.info(f"{what} back")
                if self._monitor:
                    self._monitor.away = None
                return result
        return None

    async def _unless_stopped(self, call: Awaitable[T]) -> T | None:
        """What `call` gives, or None at `stop`: a server that does not answer may not hold up the end."""
        task, stopped = asyncio.ensure_future(call), asyncio.ensure_future(self._stopping.wait())
        either: set[asyncio.Future[Any]] = {task, stopped}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for future in either:
                future.cancel()

    async def _sleep(self, seconds: float) -> None:
        """Wait, but not past `stop` nor past the end of a worker."""
        self._wake.clear()
        if self._stopping.is_set():
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)

    # ---- lanes -------------------------------------------------------------------------------------------------------

    def _pause(self) -> float:
        """Seconds until the next look. Who holds a lane need not look for one: the others do."""
        return TICK if self._held else min(TICK, WATCH * max(1, self._relays - 1))

    async def _tick(self, shared: Shared) -> None:
        """Keep what is ours, take our share, hand over what is above it."""
        self._reap()
        now = time.monotonic()
        if self._held and now >= self._next_renewal:
            await self._renew(shared.queries)
            self._next_renewal = now + self._config.lease / 3
        if now >= self._next_heartbeat:
            self._relays = await shared.queries.heartbeat(
                self._id, socket.gethostname(), os.getpid(), version("kafka-outbox"), FORGET
            )
            self._next_heartbeat = now + HEARTBEAT
        before = {lane: held.worker.batch for lane, held in self._held.items()}
        lanes = await shared.queries.lanes()
        self._compare(before, lanes)
        waited = self._waited(lanes, now)
        decided = plan(lanes, self._held, self._relays, waited, PATIENCE)
        if self._waiting_since is not None and not decided.take:  # for a relay that may have stopped meanwhile
            self._relays = await shared.queries.relays(self._id, FORGET)
            decided = plan(lanes, self._held, self._relays, waited, PATIENCE)
        if decided.take and waited > PATIENCE:
            self._keep_until = now + FORGET
        if now >= self._keep_until:
            for lane in decided.give:
                self._held[lane].worker.stop()
        for lane in decided.take:
            if now >= self._troubles.get(lane, _NO_TROUBLE).not_before:
                self._start(shared, lane)

    def _compare(self, before: dict[int, int | None], lanes: list[LaneRow]) -> None:
        """Notice a lane that is not where its worker left it: a database restored behind a pooler that hides it."""
        for row in lanes:
            held, least = self._held.get(row.lane), before.get(row.lane)
            if held is None or least is None or (most := held.worker.batch) is None:
                continue
            if not least <= row.batch <= most + 1:
                held.worker.doubt()

    def _waited(self, lanes: list[LaneRow], now: float) -> float:
        """Seconds since which some lane is free that this relay leaves to others."""
        if not any(lane.free and lane.halted is None and lane.lane not in self._held for lane in lanes):
            self._waiting_since = None
            return 0.0
        self._waiting_since = self._waiting_since or now
        return now - self._waiting_since

    async def _renew(self, queries: Queries) -> None:
        """Prolong our leases. A worker whose lane is not ours any more stops: its next commit would be fenced
        anyway."""
        ours = await queries.renew(list(self._held), self._id, self._config.lease)
        for lane, held in self._held.items():
            if lane not in ours and time.monotonic() - held.since > self._config.lease:
                log.info("lane lost", lane=lane)
                held.worker.stop()

    def _start(self, shared: Shared, lane: int) -> None:
        worker = LaneWorker(shared, lane)
        task = asyncio.create_task(worker.run(), name=f"lane {lane}")
        task.add_done_callback(lambda _: self._wake.set())
        self._held[lane] = _Held(worker, task)

    def _reap(self) -> None:
        """Note how workers ended."""
        for lane, held in list(self._held.items()):
            if held.task.done():
                del self._held[lane]
                self._note(lane, held, held.task.exception())

    def _note(self, lane: int, held: _Held, error: BaseException | None) -> None:
        if held.worker.taken_at is not None and time.monotonic() - held.worker.taken_at > STEADY:
            self._troubles.pop(lane, None)
        if self._monitor and not (isinstance(error, LaneLost) and held.worker.taken_at is None):
            self._monitor.metrics.ends[_END.get(type(error), "other")] += 1
        if error is None:
            return
        if isinstance(error, LaneHalted):
            log.error("lane halted", lane=lane, reason=str(error), remedy="relay resolve")
            return
        trouble = self._troubles.setdefault(lane, _Trouble())
        trouble.error = f"{type(error).__name__}: {words_of(error)}"
        if isinstance(error, LaneLost):
            log.info("lane lost", lane=lane, reason=str(error))
        else:
            said = "lane still in trouble" if trouble.say_at else "lane in trouble"
            level = log.warning if isinstance(error, RelayError) else log.error
            level = level if trouble.due(time.monotonic()) else log.debug
            level(said, lane=lane, error=trouble.error)
        wait = trouble.backoff.wait()
        trouble.not_before = time.monotonic() + wait
        asyncio.get_running_loop().call_later(wait, self._wake.set)

    def _lane_states(self) -> list[LaneState]:
        """For the monitor, whose thread may ask at any moment."""
        held, troubles = dict(self._held), dict(self._troubles)
        return [_state(lane, held.get(lane), troubles.get(lane)) for lane in sorted({*held, *troubles})]

    async def _drain(self, queries: Queries) -> None:
        """Let the workers finish; what does not finish in time is abandoned, and settled by whoever takes the lane
        next."""
        farewell = asyncio.create_task(self._farewell(queries))
        await asyncio.wait([farewell], timeout=FAREWELL)  # so that the others know whose share its lanes are
        for held in self._held.values():
            held.worker.stop()
        tasks = [held.task for held in self._held.values()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self._config.drain_timeout)
            for task in late:
                log.warning("batch abandoned", task=task.get_name(), after=self._config.drain_timeout)
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await farewell

    async def _farewell(self, queries: Queries) -> None:
        try:
            await queries.farewell(self._id)
        except TROUBLE as error:
            log.debug("no farewell", error=words_of(error))


def _registry(config: RelayConfig, queries: Queries, threads: ThreadPoolExecutor) -> "Registry | None":
    """Late: without a registry the relay needs neither its client nor the package `outbox`, which brings SQLAlchemy."""
    if not config.registry:
        return None
    from relay.registry import Registry

    return Registry(config, queries, threads)


def _tracing(outbox: str, instance: str) -> "Tracing | None":
    """Late: without OpenTelemetry's variables the relay needs none of its packages."""
    if not {os.environ.get(name, "") for name in _TRACES} - {"", "none"}:
        return None
    try:
        from relay import tracing
    except ImportError as error:
        log.warning("tracing off", error=f"{error}: pip install 'kafka-outbox[otel]'")
        return None
    return tracing.opened(os.environ, outbox, instance)


def _state(lane: int, held: _Held | None, trouble: _Trouble | None) -> LaneState:
    error = trouble.error if trouble else None
    if held is None:
        return LaneState(lane, taken=False, error=error)
    worker = held.worker
    batch, floor, turned_at = worker.batch, worker.floor, worker.turned_at
    if batch is None or floor is None:
        return LaneState(lane, taken=False, turned_at=turned_at, error=error)
    return LaneState(lane, True, batch, floor.value, floor.lag, turned_at, error)


_END: Mapping[type[BaseException | None], str] = {
    type(None): "stopped",
    LaneLost: "lost",
    LaneHalted: "halted",
    KafkaTrouble: "kafka",
    DatabaseTrouble: "database",
}
"""How a worker's end is counted."""

_NO_TROUBLE = _Trouble()
