"""The example's services on a real database: what they commit, what they refuse, and that effects are taken once."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, cast

import httpx
import psycopg
import pytest
from confluent_kafka import Message

from examples.chip_quality import analytics, events
from examples.chip_quality.inspection import SCHEMAS, app, engine_for
from outbox.catalogue import Catalogue, TypedEvent


@pytest.fixture
async def api(database: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[httpx.AsyncClient]:
    """The inspection service's HTTP API over a database of this test."""
    monkeypatch.setenv("OUTBOX_DATABASE_URL", database)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as api:
        yield api


def said(database: str) -> list[str]:
    """The symbols of the events in the outbox, in order."""
    with psycopg.connect(database) as connection:
        rows = connection.execute("SELECT type FROM outbox.outbox ORDER BY seq").fetchall()
    return [row[0].rpartition(".")[2] for row in rows]


async def post(api: httpx.AsyncClient, path: str, body: object = None) -> Any:
    """The answer's JSON; an error status raises."""
    return (await api.post(path, json=body)).raise_for_status().json()


async def test_an_inspection_says_each_point_of_its_life_in_order(api: httpx.AsyncClient, database: str) -> None:
    batch = await post(api, "/batches", {"part_number": "CQ-7", "quantity": 1})
    inspection = await post(api, "/inspections", {"batch_id": batch["id"], "chip_id": "c-1"})
    path = f"/inspections/{inspection['id']}"
    await post(api, f"{path}/start")
    defect = {"defect_type": "scratch", "severity": "minor", "confidence": 0.9, "location": "die 1"}
    await post(api, f"{path}/defects", [defect, defect])
    await post(api, f"{path}/complete", {"score": 79.5})
    assert said(database) == [
        "BATCH_CREATED",
        "BATCH_STARTED",
        "INSPECTION_CREATED",
        "BATCH_COMPLETED",
        "INSPECTION_STARTED",
        "DEFECT_DETECTED",
        "DEFECT_DETECTED",
        "INSPECTION_COMPLETED",
        "QUALITY_ASSESSED",
        "QUALITY_ASSESSED",
        "THRESHOLD_VIOLATED",
        "ALERT_TRIGGERED",
        "QUALITY_REJECTED",
    ]
    shown = (await api.get(path)).json()
    assert (shown["status"], shown["quality_score"], shown["defect_count"]) == ("ASSESSED", 79.5, 2)


async def test_what_is_refused_leaves_neither_rows_nor_events(api: httpx.AsyncClient, database: str) -> None:
    batch = await post(api, "/batches", {"part_number": "CQ-7", "quantity": 1})
    inspection = await post(api, "/inspections", {"batch_id": batch["id"], "chip_id": "c-1"})
    before = said(database)
    path = f"/inspections/{inspection['id']}"
    assert (await api.post(f"{path}/complete", json={"score": 90})).status_code == 409
    assert (await api.post("/inspections", json={"batch_id": batch["id"], "chip_id": "c-2"})).status_code == 409
    assert (await api.post("/inspections/none/start")).status_code == 404
    assert (await api.get("/inspections/none")).status_code == 404
    assert (await api.post(f"{path}/complete", json={"score": 101})).status_code == 422
    assert said(database) == before
    assert (await api.get(path)).json()["status"] == "CREATED"


# ---- analytics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Delivered:
    """What analytics reads of a Kafka message."""

    event_id: str
    content: bytes

    def headers(self) -> list[tuple[str, bytes]]:
        return [("ce_id", self.event_id.encode())]

    def value(self) -> bytes:
        return self.content


def delivered(catalogue: Catalogue, happened: Sequence[TypedEvent]) -> list[Message]:
    """The events as the relay would have published them."""
    rows = [catalogue.encode(event) for event in happened]
    frames = [b"\xc3\x01" + (row.fingerprint or 0).to_bytes(8, "little", signed=True) for row in rows]
    found = [Delivered(str(row.id), frame + (row.value or b"")) for row, frame in zip(rows, frames, strict=True)]
    return cast("list[Message]", found)


def happenings() -> list[TypedEvent]:
    """Two inspections completed, one defect, one verdict each way."""
    inspection: dict[str, Any] = {
        "inspection_id": "i",
        "batch_id": "b",
        "chip_id": "c",
        "inspection_type": "visual",
        "status": "s",
    }
    defect = events.Defect(defect_type="void", severity="major", confidence=0.5, location="die 1")
    quality: dict[str, Any] = {"inspection_id": "i", "batch_id": "b"}
    kind, verdict = events.InspectionEventType, events.QualityEventType
    return [
        events.InspectionEvent(event_type=kind.INSPECTION_CREATED, **inspection),
        events.InspectionEvent(event_type=kind.DEFECT_DETECTED, defects=[defect], **inspection),
        events.InspectionEvent(event_type=kind.INSPECTION_COMPLETED, quality_score=0.1, **inspection),
        events.InspectionEvent(event_type=kind.INSPECTION_COMPLETED, quality_score=0.2, **inspection),
        events.QualityEvent(event_type=verdict.QUALITY_ASSESSED, quality_score=0.1, pass_fail=False, **quality),
        events.QualityEvent(event_type=verdict.QUALITY_REJECTED, quality_score=0.1, pass_fail=False, **quality),
        events.QualityEvent(event_type=verdict.QUALITY_APPROVED, quality_score=90.0, pass_fail=True, **quality),
    ]


async def test_analytics_takes_effect_of_an_event_once_however_often_it_comes(database: str) -> None:
    engine, catalogue = engine_for(database), Catalogue.from_folder(SCHEMAS, events=events)
    async with engine.begin() as connection:
        await connection.run_sync(analytics.Base.metadata.create_all)
    consumer = analytics.Analytics(engine, catalogue)
    messages = delivered(catalogue, happenings())

    assert await consumer.apply(messages[:3]) == 3
    assert await consumer.apply([*messages, *messages]) == len(messages) - 3
    assert await consumer.apply(messages) == 0

    with psycopg.connect(database) as db:
        assert db.execute("SELECT * FROM completed").fetchall() == [("visual", 2, Decimal("0.3"))]
        assert db.execute("SELECT * FROM defect_counts").fetchall() == [("void", "major", 1)]
        assert db.execute("SELECT * FROM yields").fetchall() == [("b", 1, 1)]
    await engine.dispose()
