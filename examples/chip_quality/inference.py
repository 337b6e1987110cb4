"""The inference service: it looks at each new inspection's image, and says which defects it found, and a score.

It listens to the topic that it publishes to, which is no loop: it answers INSPECTION_CREATED only. Looking at an image
has no effect outside, so it may be done again after a crash; the answer is said once.

    export OUTBOX_DATABASE_URL=postgresql://postgres@localhost/inference KAFKA_BOOTSTRAP_SERVERS=localhost:9092
    outbox migrate && python -m examples.chip_quality.inference
"""

import asyncio
import os
import random
from collections.abc import Callable, Sequence

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.chip_quality import process
from examples.chip_quality.events import Defect, InspectionEvent, InspectionEventType
from outbox.consumer import Consumer, Meta

NAME = "inference"
"""The consumer group in Kafka, and the consumer in the inbox."""

Look = Callable[[InspectionEvent], tuple[Sequence[Defect], float]]
"""The model: defects, and a score from 0 to 100."""


class Base(DeclarativeBase):
    """The service's own tables."""


class Inference(Base):
    """What the model said of an inspection."""

    __tablename__ = "inferences"

    inspection_id: Mapped[str] = mapped_column(primary_key=True)
    score: Mapped[float]
    defects: Mapped[int]


def make_consumer(engine: AsyncEngine, bootstrap: str, look: Look) -> Consumer:
    """The service's consumer."""
    consumer = Consumer(NAME, engine, catalogue=process.catalogue(), kafka=process.kafka(NAME, bootstrap))

    @consumer.on(InspectionEvent)
    async def infer(event: InspectionEvent, session: AsyncSession, _: Meta) -> list[InspectionEvent]:
        if event.event_type != InspectionEventType.INSPECTION_CREATED:
            return []
        defects, score = await asyncio.to_thread(look, event)
        session.add(Inference(inspection_id=event.inspection_id, score=score, defects=len(defects)))
        return list(_said(event, defects, score))

    return consumer


def _said(event: InspectionEvent, defects: Sequence[Defect], score: float) -> Sequence[InspectionEvent]:
    assessed = InspectionEvent.quality_assessed(
        inspection_id=event.inspection_id,
        batch_id=event.batch_id,
        chip_id=event.chip_id,
        inspection_type=event.inspection_type,
        status="INFERRED",
        quality_score=score,
        defects=defects,
    )
    if not defects:
        return [assessed]
    detected = InspectionEvent.defect_detected(
        inspection_id=event.inspection_id,
        batch_id=event.batch_id,
        chip_id=event.chip_id,
        inspection_type=event.inspection_type,
        status="INFERRED",
        defects=defects,
    )
    return [detected, assessed]


def guess(event: InspectionEvent) -> tuple[Sequence[Defect], float]:
    """In place of a model: the same answer for the same chip."""
    chance = random.Random(event.chip_id)
    kinds = [kind for kind in ("scratch", "void", "crack") if chance.random() < 0.1]
    defects = [Defect(defect_type=kind, severity="minor", confidence=0.9, location="die 1") for kind in kinds]
    return defects, round(100.0 - 15.0 * len(defects) - 10.0 * chance.random(), 2)


def main() -> None:
    """The process. Logs are JSON lines on stderr."""
    process.configure_log()
    engine = process.engine_for(os.environ["OUTBOX_DATABASE_URL"])
    asyncio.run(process.run(make_consumer(engine, os.environ["KAFKA_BOOTSTRAP_SERVERS"], guess), Base))


if __name__ == "__main__":
    main()
