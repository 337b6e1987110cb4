"""What an operator sees of a running relay: is it alive, is it ready, and its numbers. Read-only; decides nothing.

Its fields are written by the relay's event loop and read by the HTTP server's thread. `/metrics` measures the backlog
when it is asked for, at most every MEASURE_SECONDS; what could not be measured is left out, never said to be 0.
"""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Any, TypeVar

from relay.config import RelayConfig
from relay.errors import DatabaseTrouble
from relay.history import History
from relay.http import Answer, Route
from relay.metrics import Metrics
from relay.queries import TROUBLE
from relay.views import LOOK_SECONDS, Backlog, Views

T = TypeVar("T")

LOOP_SECONDS = 10.0
"""An event loop that has not turned for so long hangs. It turns once a millisecond while it publishes."""

BEAT_SECONDS = 1.0
"""Between two signs of life of the event loop."""

STEPS = 6
"""Waits for a server, each ended by its timeout, that a worker or the supervisor may make between two signs of life."""

MEASURE_SECONDS = 3.0
"""A measurement of the backlog is believed for so long."""


@dataclass(frozen=True, slots=True)
class LaneState:
    """A lane that this relay holds, takes, or fails to take."""

    lane: int
    taken: bool
    """Its events are published by this relay."""
    batch: int | None = None
    floor: int = 0
    floor_lag: int = 0
    """Seqs that the safe floor is behind the highest one seen."""
    turned_at: float = float("inf")
    """When its worker last showed that it goes on, by the monotonic clock; infinite while it may wait for ever."""
    error: str | None = None
    """The trouble that it is in, or was in last."""


class Monitor:
    """One relay process, as it looks from outside."""

    def __init__(self, config: RelayConfig, version: str, lanes: Callable[[], list[LaneState]]) -> None:
        self.metrics = Metrics()
        self.history = History(self.metrics)
        self.outbox: str | None = None
        """The outbox's name, once its tables were found right."""
        self.kafka_reached = False
        self.away: str | None = "starting"
        """What the relay as a whole waits for."""
        self.stopping = False
        self.supervisor_at = self._loop_at = time.monotonic()
        self.views: Views | None = None
        self._config = config
        self._version = version
        self._lanes = lanes
        self._loop = asyncio.get_running_loop()
        self._patience = STEPS * max(config.database_timeout, config.kafka_timeout) + LOOP_SECONDS
        self._backlog: Backlog | None = None
        self._measured_at = float("-inf")
        self._beat()

    def _beat(self) -> None:
        self._loop_at = time.monotonic()
        self.history.take()
        self._loop.call_later(BEAT_SECONDS, self._beat)

    def opened(self, outbox: str, views: Views) -> None:
        """The outbox's tables were found right."""
        self.outbox, self.views = outbox, views
        self._first = self._loop.create_task(self.measure())  # the clock's difference, for the delays

    # ---- is it alive, is it ready ------------------------------------------------------------------------------------

    def hangs(self) -> list[str]:
        """Why the relay should be restarted; empty: no reason. Servers that are away, and halted lanes, are none."""
        now = time.monotonic()
        if now - self._loop_at > LOOP_SECONDS:
            return [f"the event loop has not turned for {now - self._loop_at:.0f} s"]
        if self.stopping:  # bounded by OUTBOX_DRAIN_TIMEOUT
            return []
        silent = {"the supervisor": self.supervisor_at}
        silent |= {f"the worker of lane {state.lane}": state.turned_at for state in self._lanes()}
        return [
            f"{who} has not gone on for {now - at:.0f} s" for who, at in silent.items() if now - at > self._patience
        ]

    def lacks(self) -> list[str]:
        """Why the relay is not ready; empty: it is. Servers that went away since do not count, but for Kafka where
        `ready_needs_kafka` is set."""
        if self.stopping:
            return ["stopping"]
        if self.outbox is None:
            return [f"the outbox's tables were not seen yet: {self.away}"]
        if not self._config.ready_needs_kafka:
            return []
        if not self.kafka_reached:
            return [f"Kafka was not reached yet: {self.away}"]
        return [
            f"lane {state.lane} is in trouble: {state.error}"
            for state in self._lanes()
            if state.error is not None and not state.taken
        ]

    # ---- what is served ----------------------------------------------------------------------------------------------

    def routes(self) -> Mapping[str, Route]:
        """By path."""
        return {
            "/livez": Route(lambda _: self._livez(), by_any_name=True),
            "/readyz": Route(lambda _: self._readyz(), by_any_name=True),
            "/metrics": Route(lambda _: self._metrics(), by_any_name=True),
            "/status": Route(lambda _: self._status()),
        }

    async def _livez(self) -> Answer:
        return _probe(self.hangs())

    async def _readyz(self) -> Answer:
        return _probe(self.lacks())

    async def _status(self) -> Answer:
        return Answer(HTTPStatus.OK, json.dumps(self.account()).encode(), "application/json")

    def account(self) -> dict[str, Any]:
        """What this relay knows that the database does not; `relay status` asks for it."""
        return {
            "outbox": self.outbox,
            "version": self._version,
            "away": self.away,
            "live": self.hangs(),
            "ready": self.lacks(),
            "lanes": [
                {name: value for name, value in asdict(state).items() if name != "turned_at"} for state in self._lanes()
            ],
        }

    async def _metrics(self) -> Answer:
        try:  # late: a relay without HTTP needs none of it
            from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
        except ImportError:
            text = "metrics need the extra: pip install 'kafka-outbox[metrics]'\n"
            return Answer(HTTPStatus.NOT_IMPLEMENTED, text.encode())
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Collector(list(self._families(await self._measured()))))
        return Answer(HTTPStatus.OK, generate_latest(registry), CONTENT_TYPE_LATEST)

    async def _measured(self) -> Backlog | None:
        return await self.asked(self.measure())

    async def asked(self, look: Coroutine[Any, Any, T]) -> T | None:
        """What `look` gives, run by the relay's loop, which the database's connections belong to. None: not within
        LOOK_SECONDS."""
        asked = asyncio.run_coroutine_threadsafe(look, self._loop)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(asked), LOOK_SECONDS)
        except TimeoutError:
            return None

    async def measure(self) -> Backlog | None:
        """The backlog as it is, or was MEASURE_SECONDS ago at most; None: not known."""
        if time.monotonic() - self._measured_at >= MEASURE_SECONDS:
            self._measured_at = time.monotonic()  # whoever else asks meanwhile gets the last one
            floors = {state.lane: state.floor for state in self._lanes() if state.taken}
            try:
                self._backlog = await self.views.backlog(floors) if self.views else None
            except (*TROUBLE, DatabaseTrouble):
                self._backlog = None
            if self._backlog:
                self.metrics.clock_offset = self._backlog.clock_offset
        return self._backlog

    # ---- numbers -----------------------------------------------------------------------------------------------------

    def _families(self, backlog: Backlog | None) -> Iterator[Any]:
        if self.outbox is None:
            return
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        outbox, own, states = self.outbox, self.metrics, self._lanes()

        def family(kind: type[Any], name: str, text: str, values: Iterable[tuple[Any, float]], *labels: str) -> Any:
            made = kind(f"outbox_relay_{name}", text, labels=["outbox", *labels])
            for value in values:
                made.add_metric([outbox, *(() if value[0] is None else (str(value[0]),))], value[1])
            return made

        yield family(GaugeMetricFamily, "info", "1 for each relay", [(self._version, 1)], "version")
        counters: list[tuple[str, str, list[tuple[Any, float]], tuple[str, ...]]] = [
            ("published_events", "Events whose commit Kafka acknowledged", _items(own.published), ("topic",)),
            ("holds_ended", "Holds on a lane, by why they ended", _items(own.ends), ("reason",)),
            ("reconciled_batches", "Batches in doubt that a take finished", [(None, own.reconciled_batches)], ()),
            ("reconciled_events", "Events of those batches", [(None, own.reconciled_events)], ()),
        ]
        for name, text, values, labels in counters:
            yield family(CounterMetricFamily, name, text, values, *labels)
        for name, text, histogram in (
            ("batch_events", "Events in a batch", own.sizes),
            (
                "transaction_seconds",
                "From a Kafka transaction's begin to its acknowledged commit",
                own.transactions,
            ),
            ("publish_delay_seconds", "From an event's created_at to its acknowledged commit", own.delays),
        ):
            made = HistogramMetricFamily(f"outbox_relay_{name}", text, labels=["outbox"])
            made.add_metric([outbox], histogram.cumulated(), histogram.total)
            yield made
        lags = [(state.lane, float(state.floor_lag)) for state in states if state.taken]
        yield family(GaugeMetricFamily, "lanes_owned", "Lanes that this relay publishes", [(None, len(lags))])
        yield family(GaugeMetricFamily, "floor_lag", "Seqs from the safe floor to the highest seen", lags, "lane")
        if backlog is None:
            return
        lanes = backlog.lanes
        halted = [(lane.lane, float(lane.halted is not None)) for lane in lanes]
        ages = [(lane.lane, lane.oldest) for lane in lanes if lane.oldest is not None]
        gauges: list[tuple[str, str, list[tuple[Any, float]], tuple[str, ...]]] = [
            ("pending_events", "Events that wait", [(lane.lane, lane.events) for lane in lanes], ("lane",)),
            ("oldest_pending_age_seconds", "Age of the oldest event that waits, 0: none does", ages, ("lane",)),
            (
                "lane_halted",
                "1: a person must look",
                halted,
                ("lane",),
            ),
            ("parked_events", "Events in dead_event", [(None, backlog.parked)], ()),
            ("clock_offset_seconds", "The database's clock less this one's", [(None, backlog.clock_offset)], ()),
        ]
        for name, text, values, labels in gauges:
            yield family(GaugeMetricFamily, name, text, values, *labels)


class _Collector:
    """Families that were made already, for prometheus_client's registry."""

    def __init__(self, families: list[Any]) -> None:
        self.collect = lambda: families


def _items(counter: Mapping[str, int]) -> list[tuple[Any, float]]:
    return list(counter.items())  # at once: the loop may add to it meanwhile


def _probe(reasons: list[str]) -> Answer:
    text = "".join(f"{reason}\n" for reason in reasons) or "ok\n"
    return Answer(HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK, text.encode())
