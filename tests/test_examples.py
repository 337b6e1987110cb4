"""The example's inspection service on a real database: what it commits, and what it refuses."""

from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from examples.chip_quality import events
from examples.chip_quality.inspection import Base, InspectionService, app
from examples.chip_quality.process import catalogue, engine_for
from outbox.testing import assert_emitted_async, pending_async, refute_emitted_async
from outbox.writer import Outbox


@pytest.fixture
async def api(database: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[httpx.AsyncClient]:
    """The inspection service's HTTP API over a database of this test."""
    monkeypatch.setenv("OUTBOX_DATABASE_URL", database)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as api:
        yield api


@pytest.fixture
async def session(database: str) -> AsyncIterator[AsyncSession]:
    """What is committed, as a session sees it that has no part in the service."""
    engine = engine_for(database)
    async with AsyncSession(engine) as session:
        yield session
    await engine.dispose()


async def said(session: AsyncSession) -> list[str]:
    """The symbols of the events in the outbox, in order."""
    return [str(cast("Any", event).event_type) for event in await pending_async(session)]


async def post(api: httpx.AsyncClient, path: str, body: object = None) -> Any:
    """The answer's JSON; an error status raises."""
    return (await api.post(path, json=body)).raise_for_status().json()


async def test_an_inspection_says_each_point_of_its_life_in_order(
    api: httpx.AsyncClient, session: AsyncSession
) -> None:
    batch = await post(api, "/batches", {"part_number": "CQ-7", "quantity": 1})
    inspection = await post(api, "/inspections", {"batch_id": batch["id"], "chip_id": "c-1"})
    path = f"/inspections/{inspection['id']}"
    await post(api, f"{path}/start")
    defect = {"defect_type": "scratch", "severity": "minor", "confidence": 0.9, "location": "die 1"}
    await post(api, f"{path}/defects", [defect, defect])
    await post(api, f"{path}/complete", {"score": 79.5})
    assert await said(session) == [
        "BATCH_CREATED",
        "BATCH_STARTED",
        "INSPECTION_CREATED",
        "BATCH_COMPLETED",
        "INSPECTION_STARTED",
        "DEFECT_DETECTED",
        "DEFECT_DETECTED",
        "INSPECTION_COMPLETED",
        "QUALITY_ASSESSED",
    ]
    shown = (await api.get(path)).json()
    assert (shown["status"], shown["quality_score"], shown["defect_count"]) == ("ASSESSED", 79.5, 2)


async def test_what_is_refused_leaves_neither_rows_nor_events(api: httpx.AsyncClient, session: AsyncSession) -> None:
    batch = await post(api, "/batches", {"part_number": "CQ-7", "quantity": 1})
    inspection = await post(api, "/inspections", {"batch_id": batch["id"], "chip_id": "c-1"})
    before = await said(session)
    path = f"/inspections/{inspection['id']}"
    assert (await api.post(f"{path}/complete", json={"score": 90})).status_code == 409
    assert (await api.post("/inspections", json={"batch_id": batch["id"], "chip_id": "c-2"})).status_code == 409
    assert (await api.post("/inspections/none/start")).status_code == 404
    assert (await api.get("/inspections/none")).status_code == 404
    assert (await api.post(f"{path}/complete", json={"score": 101})).status_code == 422
    assert await said(session) == before
    assert (await api.get(path)).json()["status"] == "CREATED"


async def test_the_service_alone_in_a_transaction_that_is_rolled_back(database: str) -> None:
    """How a service's own tests are written: no HTTP, and nothing is left behind."""
    engine = engine_for(database)
    service = InspectionService(Outbox(catalogue()))
    async with engine.connect() as connection, connection.begin() as outer:
        await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(
            connection, join_transaction_mode="create_savepoint", expire_on_commit=False
        ) as session:
            batch = await service.open_batch(session, "CQ-7", quantity=2)
            inspection = await service.create(session, batch.id, "c-1", "visual")
            await service.start(session, inspection.id)
            await refute_emitted_async(session, events.InspectionEvent, status="COMPLETED")
            await service.complete(session, inspection.id, 79.5)
            await session.commit()
            completed = await assert_emitted_async(
                session,
                events.InspectionEvent,
                event_type=events.InspectionEventType.INSPECTION_COMPLETED,
                inspection_id=inspection.id,
            )
            assert completed.quality_score == 79.5
            await refute_emitted_async(
                session, events.ManufacturingEvent, event_type=events.ManufacturingEventType.BATCH_COMPLETED
            )
        await outer.rollback()
    await engine.dispose()
