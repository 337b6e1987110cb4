"""The quality service: it listens to inspections, judges each completed one, and says what it found.

    InspectionEvent ─► claim · the inspection's row · QualityEvents into its own outbox: one transaction ─► its relay

So an inspection that is completed once is judged once, whatever dies in between; and each of the verdict's events is
published once. Events of an inspection come in order (they have its key), so the defects are counted before the score.

    export OUTBOX_DATABASE_URL=postgresql://postgres@localhost/quality KAFKA_BOOTSTRAP_SERVERS=localhost:9092
    outbox migrate && python -m examples.chip_quality.quality
"""

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator

from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.chip_quality import process
from examples.chip_quality.events import AlertLevel, InspectionEvent, InspectionEventType, QualityEvent
from outbox.consumer import Consumer, Meta

NAME = "quality"
"""The consumer group in Kafka, and the consumer in the inbox."""

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

    @consumer.on(InspectionEvent)
    async def judge(event: InspectionEvent, session: AsyncSession, _: Meta) -> list[QualityEvent]:
        match event.event_type:
            case InspectionEventType.DEFECT_DETECTED:
                (await _assessment(session, event)).defects += len(event.defects)
            case InspectionEventType.INSPECTION_COMPLETED:
                found = list(verdict(await _assessment(session, event), event.quality_score or 0.0))
                if said is not None:
                    said(session, found)
                return found
        return []

    return consumer


async def _assessment(session: AsyncSession, event: InspectionEvent) -> Assessment:
    """The inspection's row, locked. One inspection's events come one after the other, but a replay may run beside."""
    new = insert(Assessment).values(inspection_id=event.inspection_id, batch_id=event.batch_id, defects=0, version=0)
    await session.execute(new.on_conflict_do_nothing())
    return await session.get_one(Assessment, event.inspection_id, with_for_update=True)


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
