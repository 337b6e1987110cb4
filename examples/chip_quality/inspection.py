"""The inspection service: its tables, its transactions, and a small HTTP API over them.

Every transaction does the same three things: it locks the inspection (or the batch), changes it, and says what happened
with `outbox.add`. Change and events are committed together or not at all; Kafka plays no part here.

The lock comes first. A change is then made by one transaction at a time, and the events of a key have the order of the
changes (docs/design.md, The safe floor).

    export OUTBOX_DATABASE_URL=postgresql://postgres@localhost/chip_quality
    outbox migrate && uvicorn examples.chip_quality.inspection:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Annotated, Protocol, TypedDict, TypeVar
from uuid import UUID

from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, Field
from sqlalchemy import ForeignKey, Identity, Select, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.chip_quality import events
from examples.chip_quality.events import InspectionEvent, ManufacturingEvent
from examples.chip_quality.process import SCHEMAS, engine_for
from outbox.catalogue import Catalogue, TypedEvent
from outbox.message import uuid7
from outbox.writer import Outbox


class Conflict(Exception):  # noqa: N818 -- named for what happened
    """The inspection or the batch is not in a state that allows this."""


class NotFound(Exception):  # noqa: N818 -- named for what happened
    """There is no such inspection or batch."""


# ---- tables ----------------------------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    """The service's own tables; those of the outbox are made by `outbox migrate`."""


class Status(StrEnum):
    """The life of an inspection."""

    CREATED = "CREATED"
    STARTED = "STARTED"
    COMPLETED = "COMPLETED"
    ASSESSED = "ASSESSED"
    FAILED = "FAILED"


class Batch(Base):
    """Chips made together."""

    __tablename__ = "batches"

    id: Mapped[str] = mapped_column(primary_key=True)
    part_number: Mapped[str]
    quantity: Mapped[int]
    inspected: Mapped[int] = mapped_column(default=0)
    version: Mapped[int] = mapped_column(default=0)
    """Counts the batch's events."""


class Inspection(Base):
    """One inspection of one chip."""

    __tablename__ = "inspections"

    id: Mapped[str] = mapped_column(primary_key=True)
    batch_id: Mapped[str] = mapped_column(ForeignKey(Batch.id))
    chip_id: Mapped[str]
    inspection_type: Mapped[str]
    status: Mapped[str] = mapped_column(default=Status.CREATED.value)
    quality_score: Mapped[float | None]
    defect_count: Mapped[int] = mapped_column(default=0)
    version: Mapped[int] = mapped_column(default=0)
    """Counts the inspection's events."""


class Defect(Base):
    """A defect found by an inspection."""

    __tablename__ = "defects"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    inspection_id: Mapped[str] = mapped_column(ForeignKey(Inspection.id), index=True)
    defect_type: Mapped[str]
    severity: Mapped[str]
    confidence: Mapped[float]
    location: Mapped[str]


# ---- transactions ----------------------------------------------------------------------------------------------------


class Adds(Protocol):
    """What the service needs of an Outbox."""

    def add(self, session: AsyncSession, /, *events: TypedEvent) -> list[UUID]: ...


class InspectionService:
    """What the service does, each time inside a transaction that the caller begins and commits.

    Raises NotFound or Conflict, after which the caller rolls back.
    """

    def __init__(self, outbox: Adds) -> None:
        self._outbox = outbox

    async def open_batch(self, session: AsyncSession, part_number: str, quantity: int) -> Batch:
        """A new batch of `quantity` chips."""
        batch = Batch(id=str(uuid7()), part_number=part_number, quantity=quantity, inspected=0, version=0)
        session.add(batch)
        self._outbox.add(session, ManufacturingEvent.batch_created(**_batch(batch, "CREATED")))
        return batch

    async def create(self, session: AsyncSession, batch_id: str, chip_id: str, inspection_type: str) -> Inspection:
        """A new inspection of a chip of the batch. The batch's first chip starts it, its last one completes it."""
        batch = await _locked(session, select(Batch).where(Batch.id == batch_id))
        if batch.inspected == batch.quantity:
            raise Conflict(f"all {batch.quantity} chips of batch {batch_id} have their inspection")
        batch.inspected += 1
        if batch.inspected == 1:
            self._outbox.add(session, ManufacturingEvent.batch_started(**_batch(batch, "STARTED")))
        inspection = Inspection(
            id=str(uuid7()),
            batch_id=batch_id,
            chip_id=chip_id,
            inspection_type=inspection_type,
            status=Status.CREATED.value,
            defect_count=0,
            version=0,
        )
        session.add(inspection)
        self._outbox.add(session, InspectionEvent.inspection_created(**_chip(inspection)))
        if batch.inspected == batch.quantity:
            self._outbox.add(session, ManufacturingEvent.batch_completed(**_batch(batch, "COMPLETED")))
        return inspection

    async def start(self, session: AsyncSession, inspection_id: str) -> Inspection:
        """The chip is on the bench."""
        inspection = await _inspection_in(session, inspection_id, Status.CREATED)
        inspection.status = Status.STARTED
        self._outbox.add(session, InspectionEvent.inspection_started(**_chip(inspection)))
        return inspection

    async def detect(self, session: AsyncSession, inspection_id: str, *found: events.Defect) -> Inspection:
        """Defects were seen: one event each."""
        inspection = await _inspection_in(session, inspection_id, Status.STARTED)
        for defect in found:
            inspection.defect_count += 1
            session.add(Defect(inspection_id=inspection_id, **defect.to_avro()))
            self._outbox.add(session, InspectionEvent.defect_detected(**_chip(inspection), defects=[defect]))
        return inspection

    async def complete(self, session: AsyncSession, inspection_id: str, score: float) -> Inspection:
        """The inspection is over, with a score from 0 to 100."""
        inspection = await _inspection_in(session, inspection_id, Status.STARTED)
        inspection.status, inspection.quality_score = Status.COMPLETED, score
        self._outbox.add(session, InspectionEvent.inspection_completed(**_chip(inspection), quality_score=score))
        return inspection

    async def fail(self, session: AsyncSession, inspection_id: str) -> Inspection:
        """The inspection could not be done."""
        inspection = await _inspection_in(session, inspection_id, Status.CREATED, Status.STARTED)
        inspection.status = Status.FAILED
        self._outbox.add(session, InspectionEvent.inspection_failed(**_chip(inspection)))
        return inspection

    async def assess(self, session: AsyncSession, inspection_id: str) -> Inspection:
        """The score of a completed inspection was looked at. What it means is for the quality service to say."""
        inspection = await _inspection_in(session, inspection_id, Status.COMPLETED)
        inspection.status = Status.ASSESSED
        score = _score(inspection)
        self._outbox.add(session, InspectionEvent.quality_assessed(**_chip(inspection), quality_score=score))
        return inspection


async def _inspection_in(session: AsyncSession, inspection_id: str, *allowed: Status) -> Inspection:
    inspection = await _locked(session, select(Inspection).where(Inspection.id == inspection_id))
    if inspection.status not in allowed:
        raise Conflict(f"inspection {inspection_id} is {inspection.status}, not {' or '.join(allowed)}")
    return inspection


Row = TypeVar("Row", Batch, Inspection)


async def _locked(session: AsyncSession, which: Select[Row]) -> Row:
    """The row, locked until the end of the transaction and as it is now, whatever the session remembers of it.

    Not `session.get(…, populate_existing=True)`: that one forgets changes that were not flushed yet. FOR NO KEY UPDATE
    (`key_share`): rows that refer to this one may be inserted meanwhile.
    """
    statement = which.with_for_update(key_share=True).execution_options(populate_existing=True)
    row = (await session.scalars(statement)).one_or_none()
    if row is None:
        raise NotFound("there is no such inspection or batch")
    return row


# ---- events ----------------------------------------------------------------------------------------------------------


class _Chip(TypedDict):
    """What every event of an inspection says; a type checker sees what each asks for besides."""

    inspection_id: str
    batch_id: str
    chip_id: str
    inspection_type: str
    status: str
    metadata: dict[str, str]


def _chip(inspection: Inspection) -> _Chip:
    return {
        "inspection_id": inspection.id,
        "batch_id": inspection.batch_id,
        "chip_id": inspection.chip_id,
        "inspection_type": inspection.inspection_type,
        "status": inspection.status,
        "metadata": _next_version(inspection),
    }


class _Batch(TypedDict):
    batch_id: str
    part_number: str
    quantity: int
    status: str
    metadata: dict[str, str]


def _batch(batch: Batch, status: str) -> _Batch:
    return {
        "batch_id": batch.id,
        "part_number": batch.part_number,
        "quantity": batch.quantity,
        "status": status,
        "metadata": _next_version(batch),
    }


def _next_version(row: Batch | Inspection) -> dict[str, str]:
    """Counts the event that is about to be said; the row is locked, so its events are numbered without a gap."""
    row.version += 1
    return {"version": str(row.version)}


def _score(inspection: Inspection) -> float:
    if inspection.quality_score is None:
        raise Conflict(f"inspection {inspection.id} has no score")
    return inspection.quality_score


# ---- HTTP ------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    engine = engine_for(os.environ["OUTBOX_DATABASE_URL"])
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)  # an example's shortcut; a service has migrations
    app.state.service = InspectionService(Outbox(Catalogue.from_folder(SCHEMAS, events=events)))
    app.state.sessions = async_sessionmaker(engine, expire_on_commit=False)
    yield
    await engine.dispose()


app = FastAPI(title="Chip quality: inspections", lifespan=_lifespan)


async def _transaction(request: Request) -> AsyncIterator[AsyncSession]:
    """One request, one transaction, committed before the answer is sent; NotFound and Conflict become 404 and 409."""
    try:
        async with request.app.state.sessions.begin() as session:
            yield session
    except NotFound as error:
        raise HTTPException(404, str(error)) from error
    except Conflict as error:
        raise HTTPException(409, str(error)) from error


def _service(request: Request) -> InspectionService:
    service: InspectionService = request.app.state.service
    return service


# scope="function": the default commits after the answer was sent, so that a client would be told of what may fail yet.
Transaction = Annotated[AsyncSession, Depends(_transaction, scope="function")]
Service = Annotated[InspectionService, Depends(_service)]


class NewBatch(BaseModel):
    part_number: str
    quantity: int = Field(gt=0)


class NewInspection(BaseModel):
    batch_id: str
    chip_id: str
    inspection_type: str = "visual"


class NewDefect(BaseModel):
    defect_type: str
    severity: str
    confidence: float = Field(ge=0, le=1)
    location: str


class Score(BaseModel):
    score: float = Field(ge=0, le=100)


class InspectionView(BaseModel, from_attributes=True):
    """What the API says of an inspection."""

    id: str
    batch_id: str
    chip_id: str
    inspection_type: str
    status: str
    quality_score: float | None
    defect_count: int


@app.post("/batches", status_code=201)
async def open_batch(new: NewBatch, session: Transaction, service: Service) -> dict[str, str]:
    batch = await service.open_batch(session, new.part_number, new.quantity)
    return {"id": batch.id}


@app.post("/inspections", status_code=201, response_model=InspectionView)
async def create(new: NewInspection, session: Transaction, service: Service) -> Inspection:
    return await service.create(session, new.batch_id, new.chip_id, new.inspection_type)


@app.get("/inspections/{inspection_id}", response_model=InspectionView)
async def show(inspection_id: str, session: Transaction) -> Inspection:
    inspection = await session.get(Inspection, inspection_id)
    if inspection is None:
        raise NotFound(f"there is no inspection {inspection_id}")
    return inspection


@app.post("/inspections/{inspection_id}/start", response_model=InspectionView)
async def start(inspection_id: str, session: Transaction, service: Service) -> Inspection:
    return await service.start(session, inspection_id)


@app.post("/inspections/{inspection_id}/defects", response_model=InspectionView)
async def detect(inspection_id: str, found: list[NewDefect], session: Transaction, service: Service) -> Inspection:
    return await service.detect(session, inspection_id, *(events.Defect(**one.model_dump()) for one in found))


@app.post("/inspections/{inspection_id}/complete", response_model=InspectionView)
async def complete(inspection_id: str, result: Score, session: Transaction, service: Service) -> Inspection:
    """Completes and assesses it in one transaction."""
    await service.complete(session, inspection_id, result.score)
    return await service.assess(session, inspection_id)


@app.post("/inspections/{inspection_id}/fail", response_model=InspectionView)
async def fail(inspection_id: str, session: Transaction, service: Service) -> Inspection:
    return await service.fail(session, inspection_id)
