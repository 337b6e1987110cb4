"""`sweep`: how fast a backlog goes to Kafka when one thing is different: its length, the payload, keys, topics,
compression, lanes and relays. Every point beside the naive relay's on the same backlog, where that one can do it."""

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.drain import Round, fresh, told, warm, while_running
from benchmarks.figures import added
from benchmarks.stage import Backlog, Contender, Stage, say

EVENTS = 100_000

BYTES = 200_000_000
"""Of values in a backlog at most: with large ones there are fewer events."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement: what is different, and how."""

    what: str
    value: str
    backlog: Backlog
    settings: Mapping[str, str]
    naive: bool = True
    """The naive relay can do it, too."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    events: int = EVENTS
    longest: int = 5_000_000
    rounds: int = 3
    warming: int = 6


FULL = Sizes()
QUICK = Sizes(events=5_000, longest=20_000, rounds=1, warming=1)


def sweep(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    """One dimension at a time, from a backlog of 100,000 events as `relay` has it."""
    ours, naive = stage.relay("sweep_relay"), stage.naive("sweep_naive")
    base = Backlog((stage.topic("sweep"),), sizes.events)
    warm(stage, (ours, naive), base, sizes.warming)
    points = [_point(stage, point, ours, naive, sizes) for point in _points(stage, base, sizes)]
    points += [_lanes(stage, base, sizes, lanes, relays) for lanes, relays in ((1, 1), (2, 1), (2, 2), (4, 4))]
    return {"events": sizes.events, "points": points}


def _points(stage: Stage, base: Backlog, sizes: Sizes) -> Iterator[Point]:
    for events in (10_000, 100_000, 1_000_000, 5_000_000):
        if events <= sizes.longest:
            yield Point("backlog", f"{events:,} events", replace(base, events=events), {}, events <= EVENTS)
    for size in (100, 1_000, 10_000, 100_000):
        events = min(sizes.events, BYTES // size)
        yield Point("payload", f"{size:,} bytes", replace(base, size=size, events=events), {})
    yield Point("headers", "5 of its own", replace(base, headers=5), {}, naive=False)
    for keys in (1, 10, 100_000):
        yield Point("keys", f"{keys:,}", replace(base, keys=keys), {})
    for topics, partitions in ((1, 1), (1, 12), (10, 4)):
        names = tuple(stage.topic(f"sweep-{topics}-{partitions}-{number}", partitions) for number in range(topics))
        backlog = replace(base, topics=names, partitions=partitions)
        yield Point("topics × partitions", f"{topics} × {partitions}", backlog, {})
    for codec in ("lz4", "snappy", "zstd"):
        yield Point("compression", codec, base, {"OUTBOX_KAFKA_COMPRESSION_TYPE": codec}, naive=False)


def _point(stage: Stage, point: Point, ours: Contender, naive: Contender, sizes: Sizes) -> dict[str, Any]:
    """Rounds in turns; the ratio is the median of those of neighbours."""
    rounds, others = [], []
    for _ in range(sizes.rounds if point.backlog.events <= EVENTS else 1):
        rounds.append(fresh(stage, ours, point.backlog, point.settings))
        say(f"sweep: {point.what} {point.value}: {told(ours, rounds[-1])}")
        if point.naive:
            others.append(fresh(stage, naive, point.backlog))
            say(f"sweep: {point.what} {point.value}: {told(naive, others[-1])}")
    return _found(point.what, point.value, point.backlog, rounds, others)


def _lanes(stage: Stage, base: Backlog, sizes: Sizes, lanes: int, relays: int) -> dict[str, Any]:
    """The backlog comes all at once to relays that are at work, each with its share of the lanes."""
    contender = stage.relay(f"sweep_{lanes}_{relays}", lanes)
    with ExitStack() as stack:
        running = [stack.enter_context(stage.running(contender, ready="relay started")) for _ in range(relays)]
        _shared(stage, contender, relays)
        rounds = []
        for number in range(sizes.rounds + 1):
            rounds.append(while_running(stage, contender, base, running[0]))
            say(f"sweep: {lanes} lane(s), {relays} relay(s), round {number}: {told(contender, rounds[-1])}")
            stage.vacuum(contender)
    return _found("lanes, relays", f"{lanes}, {relays}", base, rounds[1:], [])


def _shared(stage: Stage, contender: Contender, relays: int) -> None:
    """Until every lane has an owner and every relay a lane."""
    deadline = time.monotonic() + 60
    query = "SELECT count(owner) = count(*) AND count(DISTINCT owner) = {} FROM outbox.lane"
    while not stage.postgres.execute(query.format(relays), contender.database)[0][0]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{relays} relays do not share the lanes of {contender.database}")
        time.sleep(0.2)


def _found(what: str, value: str, backlog: Backlog, rounds: list[Round], others: list[Round]) -> dict[str, Any]:
    ratios = [one.rate / other.rate for one, other in zip(rounds, others, strict=bool(others))]
    alone = what != "lanes, relays"  # else the first one's CPU and memory say nothing
    cpu = [one.cpu["relay"] for one in rounds if alone and one.cpu["relay"] is not None]
    return {
        "what": what,
        "value": value,
        "events": backlog.events,
        "bytes": backlog.size,
        "events_per_s": round(statistics.median(one.rate for one in rounds)),
        "mb_per_s": round(statistics.median(one.rate for one in rounds) * backlog.size / 1e6, 1),
        "relay_cpu_us_per_event": round(statistics.median(cpu) / backlog.events * 1e6, 2) if cpu else None,
        "wal_bytes_per_event": round(statistics.median(one.wal for one in rounds) / backlog.events) if alone else None,
        "peak_mb": max((one.peak_mb for one in rounds if one.peak_mb is not None), default=None) if alone else None,
        "naive_events_per_s": round(statistics.median(one.rate for one in others)) if others else None,
        "ratio_to_naive": round(statistics.median(ratios), 2) if others else None,
        **asdict(added(one.tally for one in rounds)),
    }


def flat(points: list[dict[str, Any]]) -> float:
    """The slowest length of a backlog to the fastest one."""
    rates: list[int] = [one["events_per_s"] for one in points if one["what"] == "backlog"]
    slowest: float = min(rates) / max(rates)
    return round(slowest, 2)
