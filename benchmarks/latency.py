"""`latency`, `load` and `sustained`: from the moment when a commit returned to its writer until a `read_committed`
consumer holds the event.

Both clocks are the same: CLOCK_MONOTONIC of this machine. The event's number joins the two times.
"""

import asyncio
import time
from dataclasses import asdict, dataclass, replace
from typing import Any
from uuid import uuid4

import asyncpg

from benchmarks import machine
from benchmarks.figures import Tally, added, difference, key_of, summary
from benchmarks.reader import Reader
from benchmarks.stage import FINGERPRINT, TYPE, VALUE_BYTES, Backlog, Contender, Stage, say

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


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long is measured, and what."""

    name: str = "latency"
    seconds: float = 10.0
    """Of each round; its first `settling` seconds come on top and do not count."""
    rounds: int = 3
    settling: float = 3.0
    warming: int = 4
    """Unmeasured rounds of `WARMING` before all, of each contender. Thousands of small transactions: the
    broker's JIT has to meet their code, of which a drain runs little."""
    loads: tuple[Load, ...] = (Load(100, 1), Load(200, 10))
    connections: int = 4
    """Of the writer: a commit that waits for the disk does not delay the next transaction."""
    every: int = 1
    """Every so many-th event is timed."""
    naive: bool = True
    """The naive relay is measured, too."""


WARMING, WARMING_SECONDS = Load(200, 10), 10.0

FULL = Sizes()
QUICK = Sizes(seconds=2.0, rounds=1, settling=1.0, warming=1)

_RISING = tuple(Load(transactions, 10) for transactions in (50, 100, 200, 500, 1_000, 2_000))
LOAD = Sizes("load", seconds=6.0, rounds=1, warming=3, loads=_RISING)
LOAD_QUICK = Sizes("load", seconds=2.0, rounds=1, settling=1.0, warming=0, loads=_RISING[:2])

SUSTAINED = Sizes(
    "sustained", seconds=600.0, rounds=1, warming=3, loads=(Load(1_000, 10),), connections=20, every=7, naive=False
)
SUSTAINED_QUICK = Sizes(
    "sustained", seconds=5.0, rounds=1, warming=0, loads=(Load(100, 10),), connections=20, every=7, naive=False
)


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
    peak_mb: float | None
    """The most memory that the relay ever had."""


def latency(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    """Every load on ours and on the naive one in turn; the rounds of a load are pooled."""
    topic = stage.topic(sizes.name)
    contenders = [stage.relay(f"{sizes.name}_relay")]
    contenders += [stage.naive(f"{sizes.name}_naive")] if sizes.naive else []
    warming = replace(sizes, seconds=min(sizes.seconds, WARMING_SECONDS))
    for _ in range(sizes.warming):
        for contender in contenders:
            one = one_round(stage, contender, topic, WARMING, warming)
            say(f"{sizes.name}: warming: {_told(contender, WARMING, one)}")
    return {
        "seconds": sizes.seconds * sizes.rounds,
        "loads": [_load(stage, contenders, topic, load, sizes) for load in sizes.loads],
    }


def _load(stage: Stage, contenders: list[Contender], topic: str, load: Load, sizes: Sizes) -> dict[str, Any]:
    rounds: dict[str, list[Round]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        stage.vacuum(contender)
    for _ in range(sizes.rounds):
        for contender in contenders:
            one = one_round(stage, contender, topic, load, sizes)
            rounds[contender.name].append(one)
            say(f"{sizes.name}: {_told(contender, load, one)}")
    found = {name: _summary(own) for name, own in rounds.items()}
    return {"events_per_s": load.rate, "events_per_transaction": load.events, **found}


def _told(contender: Contender, load: Load, one: Round) -> str:
    flaws = "" if one.tally.flawless else f"  {one.tally}"
    return f"{load.rate:,}/s {contender.name:5} {summary(one.latencies)}  cores {one.cpu}{flaws}"


def _summary(rounds: list[Round]) -> dict[str, Any]:
    return {
        **summary([value for one in rounds for value in one.latencies]),
        "peak_mb": max((one.peak_mb for one in rounds if one.peak_mb is not None), default=None),
        "achieved_events_per_s": round(min(one.achieved for one in rounds), 1),
        "cores": rounds[-1].cpu,
        **asdict(added(one.tally for one in rounds)),
    }


def one_round(stage: Stage, contender: Contender, topic: str, load: Load, sizes: Sizes) -> Round:
    transactions = round((sizes.settling + sizes.seconds) * load.transactions)
    writer = _Writer(contender, topic, load, transactions, sizes.connections)
    backlog = Backlog((topic,), transactions * load.events)
    with Reader(stage, backlog, every=sizes.every) as reader, stage.running(contender) as process:
        pids = stage.pids(relay=process.pid)
        before, own, start = machine.readings(pids), time.process_time(), time.monotonic()
        asyncio.run(writer.run(stage.postgres.url(contender.database)))
        reader.done()
        spent = difference(before, machine.readings(pids))
        wall, spent["writer"] = time.monotonic() - start, time.process_time() - own
        peak = machine.peak_mb(process.pid)
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
        peak,
    )


class _Writer:
    """Writes a load over a few connections, a prepared statement a transaction: cheap, so that it does not dominate."""

    def __init__(self, contender: Contender, topic: str, load: Load, transactions: int, connections: int) -> None:
        self._insert = (
            f"INSERT INTO {contender.rows()} SELECT id, '{TYPE}', '{topic}', key, value, {FINGERPRINT}"
            " FROM unnest($1::uuid[], $2::text[], $3::bytea[]) AS event (id, key, value)"
        )
        self._load = load
        self._transactions = transactions
        self._connections = connections
        self.commits = [0] * transactions
        """When the commit of each transaction returned, ns."""
        self.took = 0.0
        """Seconds from the first to the last."""

    async def run(self, url: str) -> None:
        connections = [await asyncpg.connect(url) for _ in range(self._connections)]
        inserts = [await connection.prepare(self._insert) for connection in connections]
        start = time.monotonic()
        await asyncio.gather(*(self._write(insert, number, start) for number, insert in enumerate(inserts)))
        self.took = time.monotonic() - start
        for connection in connections:
            await connection.close()

    async def _write(self, insert: Any, first: int, start: float) -> None:
        """Every so many-th transaction, each at its time, or at once when the one before was late."""
        for number in range(first, self._transactions, self._connections):
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
