"""`consumer`: events a second from Kafka into a table of the handler's own, exactly once; batches, and one by one."""

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import uvloop
from confluent_kafka import Producer
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from benchmarks import machine
from benchmarks.figures import difference
from benchmarks.stage import ROOT, Stage, say
from examples.chip_quality import events
from examples.chip_quality.events import QualityEvent, QualityEventType
from outbox.catalogue import Catalogue
from outbox.consumer import Consumer, Limits, Meta
from outbox.consumer.commands import GC_THRESHOLD

BATCH = 500
KEYS = 1_000

TABLE = "CREATE TABLE score (event_id uuid PRIMARY KEY, inspection_id text, score float8)"

INSERT_MANY = sa.text(
    "INSERT INTO score SELECT * FROM"
    " unnest(CAST(:ids AS uuid[]), CAST(:inspections AS text[]), CAST(:scores AS float8[]))"
)
INSERT_ONE = sa.text("INSERT INTO score VALUES (:id, :inspection, :score)")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is consumed: in batches, and one by one; and before each round, unmeasured."""

    rounds: int = 3
    batched: int = 150_000
    single: int = 10_000
    warming: int = 20_000


FULL = Sizes()
QUICK = Sizes(rounds=1, batched=10_000, single=1_000, warming=1_000)

Register = Callable[[Consumer, str], None]
"""Gives the consumer its handler of a topic."""


def batches(consumer: Consumer, topic: str) -> None:
    """One row an event, 500 events a transaction."""

    @consumer.on_batch(QualityEvent, topic=topic, size=BATCH)
    async def write(found: Sequence[QualityEvent], session: AsyncSession, _: Sequence[Meta]) -> None:
        rows = {
            "ids": [event.event_id for event in found],
            "inspections": [event.inspection_id for event in found],
            "scores": [event.quality_score for event in found],
        }
        await session.execute(INSERT_MANY, rows)


def singles(consumer: Consumer, topic: str) -> None:
    """One row and one transaction an event."""

    @consumer.on(QualityEvent, topic=topic)
    async def write(event: QualityEvent, session: AsyncSession, _: Meta) -> None:
        row = {"id": event.event_id, "inspection": event.inspection_id, "score": event.quality_score}
        await session.execute(INSERT_ONE, row)


def consumer(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    """Medians of rounds; each round is a fresh topic of four partitions, filled before, and a fresh group."""
    url = stage.database("consumer")
    stage.postgres.execute(TABLE, "consumer")
    ways: dict[str, tuple[Register, int, Limits]] = {
        "batches": (batches, sizes.batched, Limits()),
        "one by one, 8 at once": (singles, sizes.single, Limits()),
        "one by one": (singles, sizes.single, Limits(concurrency=1)),
    }
    found: dict[str, Any] = {}
    for way, (register, count, limits) in ways.items():
        rounds = [_round(stage, url, register, count, sizes.warming, limits) for _ in range(sizes.rounds)]
        rounds.sort(key=lambda one: one["events_per_s"])
        found[way] = {**rounds[len(rounds) // 2], "rounds": [one["events_per_s"] for one in rounds]}
        say(f"consumer: {way}: {found[way]}")
    return {"batch": BATCH, "ways": found}


def _round(stage: Stage, url: str, register: Register, count: int, warming: int, limits: Limits) -> dict[str, Any]:
    topic = stage.topic(f"consumer-{time.monotonic_ns()}")
    warming = min(warming, count)
    _fill(stage, topic, count + warming)
    stage.postgres.execute("TRUNCATE score, outbox.inbox; CHECKPOINT", "consumer")
    gc.set_threshold(GC_THRESHOLD)  # as `outbox consume` does
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_consume(stage, url, topic, register, count, warming, limits))


async def _consume(
    stage: Stage, url: str, topic: str, register: Register, count: int, warming: int, limits: Limits
) -> dict[str, Any]:
    engine = create_async_engine(
        url.replace("postgresql://", "postgresql+asyncpg://"), pool_size=limits.concurrency + 2
    )
    catalogue = Catalogue.from_folder(ROOT / "schemas", events=events)
    kafka = {"bootstrap.servers": stage.kafka.bootstrap}
    measured = Consumer(topic, engine, catalogue=catalogue, kafka=kafka, limits=limits)
    register(measured, topic)
    running = asyncio.create_task(measured.run())
    await _processed(measured, topic, warming, running)
    pids, own, start, first = stage.pids(), time.process_time(), time.perf_counter(), measured.metrics.processed[topic]
    before = machine.readings(pids)
    await _processed(measured, topic, warming + count, running)
    took = time.perf_counter() - start
    cpu = {"consumer": round(time.process_time() - own, 3), **difference(before, machine.readings(pids))}
    measured.stop()
    await running
    await engine.dispose()
    return {
        "events": count,
        "events_per_s": round((warming + count - first) / took),
        "cpu_s": cpu,
        **_flaws(stage, count + warming),
    }


async def _processed(measured: Consumer, topic: str, count: int, running: "asyncio.Task[None]") -> None:
    while measured.metrics.processed[topic] < count:
        if running.done():
            running.result()
        await asyncio.sleep(0.002)


def _flaws(stage: Stage, count: int) -> dict[str, int]:
    """Rows are unique by their event: a second effect would have failed."""
    rows = int(stage.postgres.execute("SELECT count(*) FROM score", "consumer")[0][0])
    return {"lost": count - rows}


def _fill(stage: Stage, topic: str, count: int) -> None:
    """Typed events, as a relay writes them."""
    catalogue = Catalogue.from_folder(ROOT / "schemas", events=events)
    producer = Producer(
        {"bootstrap.servers": stage.kafka.bootstrap, "linger.ms": 20, "queue.buffering.max.messages": 2_000_000}
    )
    for number in range(count):
        event = QualityEvent(
            event_type=QualityEventType.QUALITY_ASSESSED,
            inspection_id=f"inspection-{number % KEYS}",
            batch_id="batch-1",
            quality_score=0.9,
            pass_fail=True,
        )
        message = catalogue.encode(event)
        frame = b"\xc3\x01" + (message.fingerprint or 0).to_bytes(8, "little", signed=True)
        headers: list[tuple[str, str | bytes | None]] = [
            ("ce_specversion", b"1.0"),
            ("ce_id", str(message.id).encode()),
            ("ce_type", message.type.encode()),
            ("ce_source", b"outbox://bench"),
            ("content-type", b"application/avro"),
        ]
        producer.produce(topic, frame + (message.value or b""), (message.key or "").encode(), headers=headers)
        if number % 10_000 == 0:
            producer.poll(0)
    producer.flush(60)
