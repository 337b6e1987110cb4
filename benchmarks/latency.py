"""`latency`: from the moment when a commit returned to its writer until a `read_committed` consumer holds the event.

Both clocks are the same: CLOCK_MONOTONIC of this machine. The event's number joins the two times.
"""

import asyncio
import time
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

import asyncpg

from benchmarks import machine
from benchmarks.figures import Tally, added, difference, key_of, summary
from benchmarks.reader import Reader
from benchmarks.stage import FINGERPRINT, TYPE, VALUE_BYTES, Contender, Stage, say

CONNECTIONS = 4
"""Of the writer: a commit that waits for the disk does not delay the next transaction."""

FILLER = bytes([0xAB]) * (VALUE_BYTES - 8)


@dataclass(frozen=True, slots=True)
class Load:
    """So many transactions a second, at even distances, of so many events each."""

    transactions: int
    events: int

    @property
    def rate(self) -> int:
        """Events a second."""
        return self.transactions * self.events


LOADS = (Load(100, 1), Load(200, 10))


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long is measured."""

    seconds: float = 10.0
    """Of each round; its first `settling` seconds come on top and do not count."""
    rounds: int = 3
    settling: float = 3.0
    warming: int = 4
    """Unmeasured rounds of the heavier load before all, of each contender. Thousands of small transactions: the
    broker's JIT has to meet their code, of which a drain runs little."""


FULL = Sizes()
QUICK = Sizes(seconds=2.0, rounds=1, settling=1.0, warming=1)


@dataclass(frozen=True, slots=True)
class Round:
    """One load on one contender."""

    latencies: list[float]
    """Seconds, of each event after the settling. Negative: the consumer had it before the writer knew."""
    tally: Tally
    cpu: dict[str, float | None]
    """Cores: CPU seconds a second, by process, the settling included."""
    achieved: float
    """Events a second that the writer really wrote."""


def latency(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    """Every load on ours and on the naive one in turn; the rounds of a load are pooled."""
    topic = stage.topic("latency")
    contenders = [stage.relay("latency_relay"), stage.naive("latency_naive")]
    for _ in range(sizes.warming):
        for contender in contenders:
            one = _round(stage, contender, topic, LOADS[-1], sizes)
            say(f"latency: warming: {_told(contender, LOADS[-1], one)}")
    return {
        "seconds": sizes.seconds * sizes.rounds,
        "loads": [_load(stage, contenders, topic, load, sizes) for load in LOADS],
    }


def _load(stage: Stage, contenders: list[Contender], topic: str, load: Load, sizes: Sizes) -> dict[str, Any]:
    rounds: dict[str, list[Round]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        stage.vacuum(contender)
    for _ in range(sizes.rounds):
        for contender in contenders:
            one = _round(stage, contender, topic, load, sizes)
            rounds[contender.name].append(one)
            say(f"latency: {_told(contender, load, one)}")
    ours, naive = _summary(rounds["relay"]), _summary(rounds["naive"])
    ratios = {name: round(ours[name] / naive[name], 2) for name in ("p50_ms", "p99_ms") if naive[name]}
    return {
        "events_per_s": load.rate,
        "events_per_transaction": load.events,
        "relay": ours,
        "naive": naive,
        "ratio_to_naive": ratios,
    }


def _told(contender: Contender, load: Load, one: Round) -> str:
    flaws = "" if one.tally.flawless else f"  {one.tally}"
    return f"{load.rate:,}/s {contender.name:5} {summary(one.latencies)}  cores {one.cpu}{flaws}"


def _summary(rounds: list[Round]) -> dict[str, Any]:
    return {
        **summary([value for one in rounds for value in one.latencies]),
        "achieved_events_per_s": round(min(one.achieved for one in rounds), 1),
        "cores": rounds[-1].cpu,
        **asdict(added(one.tally for one in rounds)),
    }


def _round(stage: Stage, contender: Contender, topic: str, load: Load, sizes: Sizes) -> Round:
    transactions = round((sizes.settling + sizes.seconds) * load.transactions)
    writer = _Writer(contender, topic, load, transactions)
    with Reader(stage, topic, transactions * load.events, each=True) as reader, stage.running(contender) as process:
        pids = stage.pids(relay=process.pid)
        before, own, start = machine.readings(pids), time.process_time(), time.monotonic()
        asyncio.run(writer.run(stage.postgres.url(contender.database)))
        reader.done()
        spent = difference(before, machine.readings(pids))
        wall, spent["writer"] = time.monotonic() - start, time.process_time() - own
        reading = reader.reading()
    spent["reader"] = reading.cpu
    first = round(sizes.settling * load.transactions) * load.events
    return Round(
        [
            (came - writer.commits[(number - 1) // load.events]) / 1e9
            for number, came in reading.times.items()
            if number > first
        ],
        reading.tally,
        {name: None if seconds is None else round(seconds / wall, 3) for name, seconds in spent.items()},
        transactions * load.events / writer.took,
    )


class _Writer:
    """Writes a load over a few connections, a prepared statement a transaction: cheap, so that it does not dominate."""

    def __init__(self, contender: Contender, topic: str, load: Load, transactions: int) -> None:
        self._insert = (
            f"INSERT INTO {contender.rows()} SELECT id, '{TYPE}', '{topic}', key, value, {FINGERPRINT}"
            " FROM unnest($1::uuid[], $2::text[], $3::bytea[]) AS event (id, key, value)"
        )
        self._load = load
        self._transactions = transactions
        self.commits = [0] * transactions
        """When the commit of each transaction returned, ns."""
        self.took = 0.0
        """Seconds from the first to the last."""

    async def run(self, url: str) -> None:
        connections = [await asyncpg.connect(url) for _ in range(CONNECTIONS)]
        inserts = [await connection.prepare(self._insert) for connection in connections]
        start = time.monotonic()
        await asyncio.gather(*(self._write(insert, number, start) for number, insert in enumerate(inserts)))
        self.took = time.monotonic() - start
        for connection in connections:
            await connection.close()

    async def _write(self, insert: Any, first: int, start: float) -> None:
        """Every `CONNECTIONS`-th transaction, each at its time, or at once when the one before was late."""
        for number in range(first, self._transactions, CONNECTIONS):
            await asyncio.sleep(start + number / self._load.transactions - time.monotonic())
            await insert.fetch(*self._events(number))
            self.commits[number] = time.monotonic_ns()

    def _events(self, transaction: int) -> tuple[list[Any], list[str], list[bytes]]:
        first = transaction * self._load.events + 1
        numbers = range(first, first + self._load.events)
        return (
            [uuid4() for _ in numbers],
            [key_of(number).decode() for number in numbers],
            [number.to_bytes(8) + FILLER for number in numbers],
        )
