"""The quality service: it listens to inspections, judges each completed one, and says what it found.

    InspectionEvent ─► claim · the inspection's row · QualityEvents into its own outbox: one transaction ─► its relay

So an inspection that is completed once is judged once, whatever dies in between; and each of the verdict's events is
published once. Events of an inspection come in order (they have its key), so the defects are counted before the score.

    export OUTBOX_DATABASE_URL=postgresql://postgres@localhost/quality KAFKA_BOOTSTRAP_SERVERS=localhost:9092
    outbox migrate && python -m examples.chip_quality.quality
"""

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.chip_quality import process
from examples.chip_quality.events import AlertLevel, InspectionEvent, InspectionEventType, QualityEvent
from outbox.consumer import Consumer, Meta

NAME = "quality"
"""The consumer group in Kafka, and the consumer in the inbox."""

BATCH = 200
"""Inspection events in one transaction."""

CONCERNED = (InspectionEventType.DEFECT_DETECTED, InspectionEventType.INSPECTION_COMPLETED)

THRESHOLD = 80.0
"""Quality scores go from 0 to 100; a chip passes from here on."""

ALARMING = 60.0
"""Below this score the alert is CRITICAL, not WARNING."""


class Base(DeclarativeBase):
    """The service's own tables."""


class Assessment(Base):
    """What is known of an inspection, and its verdict once there is one."""

    __tablename__ = "assessments"

    inspection_id: Mapped[str] = mapped_column(primary_key=True)
    batch_id: Mapped[str]
    defects: Mapped[int] = mapped_column(default=0)
    score: Mapped[float | None]
    passed: Mapped[bool | None]
    version: Mapped[int] = mapped_column(default=0)
    """Counts the events said of the inspection."""


Said = Callable[[AsyncSession, Iterable[QualityEvent]], None]
"""Told of each verdict's events in their transaction; the demo keeps its account so."""


def make_consumer(engine: AsyncEngine, bootstrap: str, said: Said | None = None) -> Consumer:
    """The service's consumer."""
    catalogue = process.catalogue()
    consumer = Consumer(NAME, engine, catalogue=catalogue, kafka=process.kafka(NAME, bootstrap))

    @consumer.on_batch(InspectionEvent, size=BATCH)
    async def judge(events: list[InspectionEvent], session: AsyncSession, _: list[Meta]) -> list[QualityEvent]:
        concerned = [event for event in events if event.event_type in CONCERNED]
        assessments = await _assessments(session, {event.inspection_id: event.batch_id for event in concerned})
        found: list[QualityEvent] = []
        for event in concerned:
            assessment = assessments[event.inspection_id]
            if event.event_type == InspectionEventType.DEFECT_DETECTED:
                assessment.defects += len(event.defects)
            else:
                found += verdict(assessment, event.quality_score or 0.0)
        if said is not None:
            said(session, found)
        return found

    return consumer


async def _assessments(session: AsyncSession, inspections: Mapping[str, str]) -> Mapping[str, Assessment]:
    """The rows of inspections (id → batch), made where there are none, and locked: a replay may run beside.

    In the order of their ids, so that two batches cannot deadlock.
    """
    if not inspections:
        return {}
    new = [
        {"inspection_id": inspection, "batch_id": batch, "defects": 0, "version": 0}
        for inspection, batch in sorted(inspections.items())
    ]
    await session.execute(insert(Assessment).values(new).on_conflict_do_nothing())
    rows = select(Assessment).where(Assessment.inspection_id.in_(inspections)).order_by(Assessment.inspection_id)
    return {row.inspection_id: row for row in await session.scalars(rows.with_for_update())}


def verdict(assessment: Assessment, score: float) -> Iterator[QualityEvent]:
    """Keeps the verdict in the row, and gives what is to be said: two events for a chip that passed, else four."""
    assessment.score, assessment.passed = score, score >= THRESHOLD
    yield QualityEvent.quality_assessed(
        inspection_id=assessment.inspection_id,
        batch_id=assessment.batch_id,
        quality_score=score,
        threshold=THRESHOLD,
        pass_fail=assessment.passed,
        defect_count=assessment.defects,
        metadata=_next_version(assessment),
    )
    if assessment.passed:
        yield QualityEvent.quality_approved(
            inspection_id=assessment.inspection_id,
            batch_id=assessment.batch_id,
            quality_score=score,
            threshold=THRESHOLD,
            defect_count=assessment.defects,
            metadata=_next_version(assessment),
        )
        return
    level = AlertLevel.CRITICAL if score < ALARMING else AlertLevel.WARNING
    for say in (QualityEvent.threshold_violated, QualityEvent.alert_triggered):
        yield say(
            inspection_id=assessment.inspection_id,
            batch_id=assessment.batch_id,
            quality_score=score,
            threshold=THRESHOLD,
            pass_fail=False,
            alert_level=level,
            defect_count=assessment.defects,
            metadata=_next_version(assessment),
        )
    yield QualityEvent.quality_rejected(
        inspection_id=assessment.inspection_id,
        batch_id=assessment.batch_id,
        quality_score=score,
        threshold=THRESHOLD,
        defect_count=assessment.defects,
        metadata=_next_version(assessment),
    )


def _next_version(assessment: Assessment) -> dict[str, str]:
    assessment.version += 1
    return {"version": str(assessment.version)}


def main() -> None:
    """The process. Logs are JSON lines on stderr."""
    process.configure_log()
    engine = process.engine_for(os.environ["OUTBOX_DATABASE_URL"])
    asyncio.run(process.run(make_consumer(engine, os.environ["KAFKA_BOOTSTRAP_SERVERS"]), Base))


if __name__ == "__main__":
    main()
