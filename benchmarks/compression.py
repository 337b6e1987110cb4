"""`compression`: what codecs make of the platform's own events, and what they cost.

The events are made by the constructors of examples/chip_quality with values as the services there have them; the relay
writes the same ones to a new topic by each codec.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from benchmarks import machine
from benchmarks.figures import difference
from benchmarks.stage import ROOT, Contender, Stage, say
from examples.chip_quality.events import Defect, InspectionEvent, QualityEvent
from outbox.catalogue import Catalogue, TypedEvent
from outbox.writer import Outbox

CODECS = ("none", "lz4", "snappy", "zstd", "gzip")

KEEP = "CREATE TABLE kept AS SELECT type, key, value, fingerprint, headers FROM outbox.outbox ORDER BY seq"
AGAIN = (
    "INSERT INTO outbox.outbox (id, type, topic, key, value, fingerprint, headers)"
    " SELECT gen_random_uuid(), type, '{}', key, value, fingerprint, headers FROM kept"
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    events: int = 100_000
    batch_rows: int = 100
    """Events in a Kafka transaction at most: under an ordinary load they are few, and codecs like many."""


FULL = Sizes()
QUICK = Sizes(events=2_000)


def compression(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    """Bytes of log an event, and CPU an event, by each codec: with large batches, and with small ones."""
    contender = stage.relay("compression")
    _write(stage, contender, sizes.events)
    found = []
    for rows in (8_000, sizes.batch_rows):
        for codec in CODECS:
            found.append(_round(stage, contender, codec, rows, sizes.events))
            say(f"compression: {found[-1]}")
    return {"events": sizes.events, "codecs": found}


def inspections(random: Random) -> Iterator[TypedEvent]:
    """Inspections of one wafer after another, each with its assessment."""
    number = 0
    while True:
        number += 1
        batch, chip = f"batch-2026-{number // 400:04}", f"chip-{number:07}"
        score = round(random.gauss(93, 4), 2)
        inspection = f"{random.getrandbits(64):016x}"
        defects = [
            Defect(
                defect_type=random.choice(("SCRATCH", "CRACK", "CONTAMINATION")),
                severity=random.choice(("LOW", "MEDIUM", "HIGH")),
                location=f"{random.uniform(0, 20):.3f},{random.uniform(0, 20):.3f}",
                confidence=round(random.uniform(0.6, 1), 3),
            )
            for _ in range(random.randrange(3))
        ]
        yield InspectionEvent.inspection_completed(
            inspection_id=inspection,
            batch_id=batch,
            chip_id=chip,
            inspection_type="VISUAL",
            status="COMPLETED",
            quality_score=score,
            defects=defects,
        )
        yield QualityEvent.quality_assessed(
            inspection_id=inspection, batch_id=batch, quality_score=score, pass_fail=score > 90
        )


def _write(stage: Stage, contender: Contender, count: int) -> None:
    outbox = Outbox(Catalogue.from_folder(ROOT / "schemas"))
    url = stage.postgres.url(contender.database).replace("postgresql://", "postgresql+psycopg://")
    events = inspections(Random(8))  # the same events in every run
    engine = sa.create_engine(url)
    for _ in range(0, count, 500):
        with Session(engine) as session:
            outbox.add(session, *islice(events, 500))
            session.commit()
    engine.dispose()
    stage.postgres.execute(KEEP, contender.database)
    stage.postgres.execute("TRUNCATE outbox.outbox", contender.database)


def _round(stage: Stage, contender: Contender, codec: str, rows: int, count: int) -> dict[str, Any]:
    topic = stage.topic(f"compression-{codec}-{rows}")
    stage.postgres.execute(AGAIN.format(topic), contender.database)
    stage.settle(contender)
    settings = {"OUTBOX_KAFKA_COMPRESSION_TYPE": codec, "OUTBOX_BATCH_ROWS": str(rows)}
    with stage.running(contender, settings=settings) as process:
        pids = stage.pids(relay=process.pid)
        before, start = machine.readings(pids), time.monotonic()
        while stage.postgres.execute("SELECT EXISTS (SELECT FROM outbox.outbox)", contender.database)[0][0]:
            time.sleep(0.02)
        took, spent = time.monotonic() - start, difference(before, machine.readings(pids))
    size = stage.kafka.log_bytes(topic)
    return {
        "codec": codec,
        "batch_rows": rows,
        "bytes_per_event": None if size is None else round(size / count, 1),
        "cpu_us_per_event": {name: None if one is None else round(one / count * 1e6, 2) for name, one in spent.items()},
        "seconds": round(took, 2),
    }
