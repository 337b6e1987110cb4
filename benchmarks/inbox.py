"""`inbox`: how many events a second a consumer can claim, in batches, each in a transaction of its own."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from confluent_kafka import Message
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from benchmarks import machine
from benchmarks.figures import difference
from benchmarks.stage import TYPE, Stage, say
from outbox.inbox import Inbox
from outbox.message import uuid7

BATCH = 500


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is claimed."""

    events: int = 100_000
    warming: int = 10_000


FULL = Sizes()
QUICK = Sizes(events=10_000, warming=1_000)

Claim = Callable[[Sequence[Message]], int]
"""Claims a batch in a transaction; how many of its events were seen for the first time."""


def messages(count: int) -> list[Message]:
    """Messages as they come from Kafka: the event's id is the header `ce_id`."""
    return [_message(str(uuid7())) for _ in range(count)]


def _message(event_id: str) -> Message:
    headers: list[tuple[str, str | bytes | None]] = [
        ("ce_specversion", b"1.0"),
        ("ce_id", event_id.encode()),
        ("ce_type", TYPE.encode()),
    ]
    return Message(topic="events", partition=0, offset=0, key=b"key", value=b"value", headers=headers)


def inbox(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    """New events through a Session (psycopg) and an AsyncSession (asyncpg), then the same ones once more."""
    url = stage.database("inbox")
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    async_engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"))
    analytics, reports = Inbox("analytics"), Inbox("reports")

    def claim(batch: Sequence[Message]) -> int:
        with Session(engine) as session:
            claimed = analytics.claim(session, batch)
            session.commit()
        return len(claimed)

    async def claim_async(batch: Sequence[Message]) -> int:
        async with AsyncSession(async_engine) as session:
            claimed = await reports.claim_async(session, batch)
            await session.commit()
        return len(claimed)

    with asyncio.Runner() as runner:
        found = {
            "session_psycopg": _measure(stage, claim, sizes),
            "async_session_asyncpg": _measure(stage, lambda batch: runner.run(claim_async(batch)), sizes),
        }
        runner.run(async_engine.dispose())
    engine.dispose()
    slowest = min(one["events_per_s"] for one in found.values())
    return {"events": sizes.events, "batch": BATCH, "events_per_s": slowest, "ways": found}


def _measure(stage: Stage, claim: Claim, sizes: Sizes) -> dict[str, Any]:
    _claim_all(claim, messages(sizes.warming), new=True)
    fresh = messages(sizes.events)
    pids = stage.pids()
    before, own = machine.readings(pids), time.process_time()
    rate = _claim_all(claim, fresh, new=True)
    cpu = {"consumer": round(time.process_time() - own, 3), **difference(before, machine.readings(pids))}
    again = _claim_all(claim, fresh, new=False)
    say(f"inbox: {rate:,.0f} events/s, {again:,.0f} when all are known, CPU s {cpu}")
    return {"events_per_s": round(rate), "known_events_per_s": round(again), "cpu_s": cpu}


def _claim_all(claim: Claim, fresh: Sequence[Message], *, new: bool) -> float:
    """Events a second; RuntimeError where the inbox gave the wrong answer."""
    start = time.perf_counter()
    claimed = sum(claim(fresh[first : first + BATCH]) for first in range(0, len(fresh), BATCH))
    took = time.perf_counter() - start
    if claimed != (len(fresh) if new else 0):
        raise RuntimeError(f"{claimed} of {len(fresh)} events were claimed, {new=}")
    return len(fresh) / took
