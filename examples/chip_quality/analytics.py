"""The analytics consumer: counts and scores of inspections, defects, and the yield of each batch, exactly once.

    1  read a batch of committed events from Kafka
    2  in one transaction of its own database: claim them in the inbox, count those seen for the first time, store
    3  after that commit: commit the offsets to Kafka, once a second at most

A crash anywhere repeats at most what came after the last commit of offsets; the inbox knows those events and they count
no second time. Whatever goes wrong ends the process, and what restarts it (systemd, Kubernetes) makes it go on.

    export ANALYTICS_DATABASE_URL=postgresql://postgres@localhost/analytics KAFKA_BOOTSTRAP_SERVERS=localhost:9092
    outbox migrate $ANALYTICS_DATABASE_URL && python -m examples.chip_quality.analytics
"""

import asyncio
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import structlog
from confluent_kafka import Consumer, KafkaException, Message
from sqlalchemy import Numeric, inspect, make_url
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.chip_quality import events
from examples.chip_quality.events import InspectionEvent, InspectionEventType, QualityEvent, QualityEventType
from outbox.catalogue import Catalogue, TypedEvent
from outbox.inbox import Inbox
from outbox.message import Event

log = structlog.get_logger("analytics")

NAME = "analytics"
"""The consumer group in Kafka, and the consumer in the inbox."""

TOPICS = ["chip-quality.inspection.events", "chip-quality.quality.events"]
BATCH = 500
COMMIT_SECONDS = 1.0
SCHEMAS = Path(__file__).parents[2] / "schemas"


class Base(DeclarativeBase):
    """Analytics' own tables."""


class Completed(Base):
    """Completed inspections of a type, and the sum of their scores."""

    __tablename__ = "completed"

    inspection_type: Mapped[str] = mapped_column(primary_key=True)
    inspections: Mapped[int]
    score_sum: Mapped[Decimal] = mapped_column(Numeric)
    """Decimal: sums of floats depend on their order."""


class DefectCount(Base):
    """Defects found, by type and severity."""

    __tablename__ = "defect_counts"

    defect_type: Mapped[str] = mapped_column(primary_key=True)
    severity: Mapped[str] = mapped_column(primary_key=True)
    found: Mapped[int]


class Yield(Base):
    """Chips of a batch that passed, and that did not."""

    __tablename__ = "yields"

    batch_id: Mapped[str] = mapped_column(primary_key=True)
    passed: Mapped[int]
    failed: Mapped[int]


# ---- counting: values in, values out ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Counts:
    """What a batch of events adds to the tables."""

    completed: Counter[str] = field(default_factory=Counter)
    scores: defaultdict[str, Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    defects: Counter[tuple[str, str]] = field(default_factory=Counter)
    passed: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, event: Event | TypedEvent) -> None:
        """Count one event. Those that analytics has no interest in change nothing."""
        match event:
            case InspectionEvent(event_type=InspectionEventType.INSPECTION_COMPLETED):
                self.completed[event.inspection_type] += 1
                self.scores[event.inspection_type] += Decimal(str(event.quality_score or 0))
            case InspectionEvent(event_type=InspectionEventType.DEFECT_DETECTED):
                self.defects.update((defect.defect_type, defect.severity) for defect in event.defects)
            case QualityEvent(event_type=QualityEventType.QUALITY_APPROVED):
                self.passed[event.batch_id] += 1
            case QualityEvent(event_type=QualityEventType.QUALITY_REJECTED):
                self.failed[event.batch_id] += 1


# ---- the transaction -------------------------------------------------------------------------------------------------


class Analytics:
    """Takes effect of events in a database, once each."""

    def __init__(self, engine: AsyncEngine, catalogue: Catalogue) -> None:
        self._sessions = async_sessionmaker(engine)
        self._catalogue = catalogue
        self._inbox = Inbox(NAME)

    async def apply(self, messages: Sequence[Message]) -> int:
        """Commits the effect of those messages that were never seen before; their number."""
        async with self._sessions.begin() as session:
            fresh = await self._inbox.claim_async(session, messages)
            counts = Counts()
            for message in fresh:
                counts.add(self._catalogue.decode(message.value() or b""))
            await store(session, counts)
        return len(fresh)


async def store(session: AsyncSession, counts: Counts) -> None:
    """Adds the counts to the tables, in the caller's transaction."""
    types = sorted(counts.completed)
    batches = sorted({*counts.passed, *counts.failed})
    await _increase(
        session,
        Completed,
        [{"inspection_type": t, "inspections": counts.completed[t], "score_sum": counts.scores[t]} for t in types],
    )
    await _increase(
        session,
        DefectCount,
        [{"defect_type": t, "severity": s, "found": counts.defects[t, s]} for t, s in sorted(counts.defects)],
    )
    await _increase(
        session,
        Yield,
        [{"batch_id": b, "passed": counts.passed[b], "failed": counts.failed[b]} for b in batches],
    )


async def _increase(session: AsyncSession, table: type[Base], rows: list[dict[str, Any]]) -> None:
    """Adds each row's figures to the row of the same primary key. Rows come sorted: two consumers cannot deadlock."""
    if not rows:
        return
    new = insert(table).values(rows)
    mapper = inspect(table)
    keys = [column.name for column in mapper.primary_key]
    figures = {column.name: column + new.excluded[column.name] for column in mapper.columns if column.name not in keys}
    await session.execute(new.on_conflict_do_update(index_elements=keys, set_=figures))


# ---- the process -----------------------------------------------------------------------------------------------------


def make_consumer(bootstrap: str) -> Consumer:
    """A consumer that sees committed events only and leaves the offsets to us."""
    return Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": NAME,
            # A restarted instance gets its partitions back at once; without it they wait for the dead one's session.
            "group.instance.id": os.environ.get("ANALYTICS_INSTANCE", f"{NAME}-1"),
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )


async def consume(consumer: Consumer, analytics: Analytics, stopping: asyncio.Event) -> None:
    """Work until `stopping`; every batch that was read is finished, its offsets committed."""
    committed_at, behind = time.monotonic(), False
    while not stopping.is_set():
        messages = await asyncio.to_thread(consumer.consume, BATCH, 0.1)  # step 1
        if messages:
            _raise_first(message.error() for message in messages)
            new = await analytics.apply(messages)  # step 2
            log.info("batch applied", received=len(messages), new=new)
            behind = True
        if behind and time.monotonic() - committed_at > COMMIT_SECONDS:
            await asyncio.to_thread(consumer.commit, asynchronous=False)  # step 3
            committed_at, behind = time.monotonic(), False
    if behind:
        await asyncio.to_thread(consumer.commit, asynchronous=False)


def _raise_first(errors: Iterable[Any]) -> None:
    for error in errors:
        if error is not None:
            raise KafkaException(error)


async def run(database_url: str, bootstrap: str) -> None:
    """Consume until SIGTERM or SIGINT."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    engine = create_async_engine(make_url(database_url).set(drivername="postgresql+asyncpg"))
    consumer = make_consumer(bootstrap)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)  # an example's shortcut; a service has migrations
        consumer.subscribe(TOPICS)
        log.info("analytics started", topics=TOPICS)
        await consume(consumer, Analytics(engine, Catalogue.from_folder(SCHEMAS, events=events)), stopping)
        log.info("analytics stopped")
    finally:
        await asyncio.to_thread(consumer.close)
        await engine.dispose()


def main() -> None:
    """The process. Logs are JSON lines on stderr."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    asyncio.run(run(os.environ["ANALYTICS_DATABASE_URL"], os.environ["KAFKA_BOOTSTRAP_SERVERS"]))


if __name__ == "__main__":
    main()
