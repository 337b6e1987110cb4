"""`relay` and `held-snapshot`: how fast a backlog goes to Kafka."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import psycopg

from benchmarks import machine
from benchmarks.figures import Tally, added, difference
from benchmarks.reader import Reader
from benchmarks.stage import Backlog, Contender, Stage, say
from tests.servers.process import Process


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    events: int = 200_000
    rounds: int = 7
    warming: int = 8
    """Unmeasured rounds before, of each contender: the broker's JIT makes cold figures half as good."""


RELAY = Sizes()
RELAY_QUICK = Sizes(events=20_000, rounds=2, warming=1)
HELD = Sizes(events=100_000, rounds=8, warming=3)
HELD_QUICK = Sizes(events=10_000, rounds=3, warming=1)


@dataclass(frozen=True, slots=True)
class Round:
    """One backlog, from its first to its last event at the reader."""

    rate: float
    """Events a second."""
    tally: Tally
    cpu: dict[str, float | None]
    """CPU seconds by process, from when the relay took up its work until the last event had come."""
    peak_mb: float | None
    """The most memory that the relay ever had."""
    wal: int
    """Bytes of WAL that PostgreSQL wrote meanwhile."""


def relay(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    """Ours and the naive one take turns, each round a fresh process on a backlog that is there before it starts.

    A ratio is that of two neighbours: a machine that others use as well is not as fast a minute later.
    """
    backlog = Backlog((stage.topic("drain"),), sizes.events)
    contenders = [stage.relay("drain_relay"), stage.naive("drain_naive")]
    warm(stage, contenders, backlog, sizes.warming)
    rounds: dict[str, list[Round]] = {contender.name: [] for contender in contenders}
    for number in range(sizes.rounds):
        for contender in contenders:
            rounds[contender.name].append(fresh(stage, contender, backlog))
            say(f"relay: round {number + 1} of {sizes.rounds}: {told(contender, rounds[contender.name][-1])}")
    ours, naive = _summary(rounds["relay"], sizes), _summary(rounds["naive"], sizes)
    ratios = [round(one.rate / other.rate, 2) for one, other in zip(*rounds.values(), strict=True)]
    return {
        "events": sizes.events,
        **ours,
        "ratio_to_naive": round(statistics.median(ratios), 2),
        "ratios": ratios,
        "naive": naive,
    }


KINDS: Mapping[str, tuple[str, ...]] = {
    "snapshot": ("snapshot",),
    "long writer": ("writer",),
    "both": ("snapshot", "writer"),
}
"""What sits in an open transaction, by the name of the kind."""


def held_snapshot(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    """A backlog a round while sessions sit in their transactions: no deleted row can be vacuumed. Each kind begins with
    a database of its own."""
    backlog = Backlog((stage.topic("held"),), sizes.events)
    return {"events": sizes.events, "kinds": {kind: _held(stage, kind, backlog, sizes) for kind in KINDS}}


def _held(stage: Stage, kind: str, backlog: Backlog, sizes: Sizes) -> dict[str, Any]:
    """Rounds of one relay process."""
    contender = stage.relay(f"held_{kind.replace(' ', '_')}")
    rounds: list[Round] = []
    with stage.running(contender) as process:
        for _ in range(sizes.warming):
            one = while_running(stage, contender, backlog, process)
            say(f"held-snapshot: {kind}: warming {told(contender, one)}")
            stage.vacuum(contender)
        with _open_transactions(stage, kind, contender, backlog):
            for number in range(sizes.rounds):
                rounds.append(while_running(stage, contender, backlog, process))
                say(f"held-snapshot: {kind}: round {number + 1} of {sizes.rounds}: {told(contender, rounds[-1])}")
            size = stage.postgres.execute("SELECT pg_total_relation_size('outbox.outbox')", contender.database)
    stage.vacuum(contender)  # else autovacuum would do it, in the rounds of the next kind
    stage.settle(contender)
    rates = [one.rate for one in rounds]
    return {
        **_summary(rounds, sizes),
        "last_to_first": round(rates[-1] / rates[0], 2) if rates[0] else None,
        "table_mb": round(size[0][0] / 1e6, 1),
    }


@contextmanager
def _open_transactions(stage: Stage, kind: str, contender: Contender, backlog: Backlog) -> Iterator[None]:
    """`snapshot`: a session that read something in REPEATABLE READ, as a report or pg_dump does.

    `writer`: one that wrote an event, so that the safe floor stays where it is and each fetch passes the dead rows
    above it. It is rolled back: that event never comes.
    """
    statements = {
        "snapshot": (psycopg.IsolationLevel.REPEATABLE_READ, "SELECT count(*) FROM outbox.meta"),
        "writer": (psycopg.IsolationLevel.READ_COMMITTED, replace(backlog, events=1).insert(contender)),
    }
    with ExitStack() as stack:
        for name in KINDS[kind]:
            level, statement = statements[name]
            session = stack.enter_context(psycopg.connect(stage.postgres.url(contender.database)))
            session.isolation_level = level
            session.execute(statement)
            stack.callback(session.rollback)
        yield


def warm(stage: Stage, contenders: Sequence[Contender], backlog: Backlog, rounds: int) -> None:
    """Rounds that count for nothing: broker, page cache and tables get into the state of a server that is at work."""
    for _ in range(rounds):
        for contender in contenders:
            say(f"warming: {told(contender, fresh(stage, contender, backlog))}")


def fresh(stage: Stage, contender: Contender, backlog: Backlog, settings: Mapping[str, str] | None = None) -> Round:
    """A round whose relay starts, with these `settings`, when the backlog is there."""
    stage.vacuum(contender)
    stage.seed(contender, backlog)
    stage.settle(contender)
    with Reader(stage, backlog) as reader:
        with stage.running(contender, settings=settings) as process:
            pids = stage.pids(relay=process.pid)
            before, wal = machine.readings(pids), stage.wal()
            reader.done()
            cpu, peak = difference(before, machine.readings(pids)), machine.peak_mb(process.pid)
            wal = stage.wal() - wal
        reading = reader.reading()
    return Round(reading.rate, reading.tally, {**cpu, "reader": round(reading.cpu, 3)}, peak, wal)


def while_running(stage: Stage, contender: Contender, backlog: Backlog, process: Process) -> Round:
    """A round of a relay that is at work already: the backlog comes all at once, with the commit of its INSERT."""
    with Reader(stage, backlog) as reader:
        pids = stage.pids(relay=process.pid)
        before, wal = machine.readings(pids), stage.wal()
        stage.seed(contender, backlog)
        reader.done()
        cpu, peak = difference(before, machine.readings(pids)), machine.peak_mb(process.pid)
        wal = stage.wal() - wal
        reading = reader.reading()
    return Round(reading.rate, reading.tally, {**cpu, "reader": round(reading.cpu, 3)}, peak, wal)


def _summary(rounds: Sequence[Round], sizes: Sizes) -> dict[str, Any]:
    """Medians over the rounds (of memory the most, of the tally the sum) and every round's rate."""
    cpu = {name: _median([one.cpu[name] for one in rounds]) for name in rounds[0].cpu}
    relay_cpu = cpu["relay"]
    return {
        "events_per_s": round(statistics.median(one.rate for one in rounds)),
        "rounds": [round(one.rate) for one in rounds],
        "relay_cpu_us_per_event": None if relay_cpu is None else round(relay_cpu / sizes.events * 1e6, 2),
        "cpu_s": cpu,
        "relay_peak_mb": max((one.peak_mb for one in rounds if one.peak_mb is not None), default=None),
        **asdict(added(one.tally for one in rounds)),
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 3) if known else None


def told(contender: Contender, one: Round) -> str:
    flaws = "" if one.tally.flawless else f"  {one.tally}"
    return f"{contender.name:5} {one.rate:9,.0f} events/s  CPU s {one.cpu}{flaws}"
