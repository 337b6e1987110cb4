"""The manufacturing service: lots and their batches, from the plan to the station that is done with them.

Each transaction locks the lot first, so the events of a batch, and those of a lot behind the last of its batches, have
the order of the changes. Events have the batch's key; a lot's own ones go with its first batch.
"""

from sqlalchemy import ForeignKey, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.chip_quality.events import ManufacturingEvent
from outbox.message import uuid7
from outbox.writer import Outbox

STATION = "S-1"


class Conflict(Exception):  # noqa: N818 -- named for what happened
    """The batch is done already."""


class Base(DeclarativeBase):
    """The service's own tables."""


class Lot(Base):
    """Batches that are made together."""

    __tablename__ = "lots"

    id: Mapped[str] = mapped_column(primary_key=True)
    part_number: Mapped[str]
    left: Mapped[int]
    """Batches that are not done."""


class LotBatch(Base):
    """A batch of a lot."""

    __tablename__ = "lot_batches"

    id: Mapped[str] = mapped_column(primary_key=True)
    lot_id: Mapped[str] = mapped_column(ForeignKey(Lot.id), index=True)
    quantity: Mapped[int]
    status: Mapped[str]


class ManufacturingService:
    """What the service does, each time inside a transaction that the caller begins and commits."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    async def create_lot(self, session: AsyncSession, part_number: str, *, batches: int, quantity: int) -> str:
        """A lot of that many batches of `quantity` chips; its id."""
        lot = Lot(id=str(uuid7()), part_number=part_number, left=batches)
        made = [LotBatch(id=str(uuid7()), lot_id=lot.id, quantity=quantity, status="PLANNED") for _ in range(batches)]
        session.add(lot)
        await session.flush()
        session.add_all(made)
        self._outbox.add(
            session,
            ManufacturingEvent.lot_created(
                batch_id=made[0].id,
                lot_id=lot.id,
                part_number=part_number,
                quantity=quantity * batches,
                status="CREATED",
            ),
            *(
                ManufacturingEvent.batch_created(
                    batch_id=batch.id, part_number=part_number, quantity=quantity, status=batch.status
                )
                for batch in made
            ),
        )
        return lot.id

    async def batches(self, session: AsyncSession, lot_id: str) -> list[str]:
        """The ids of a lot's batches, in the order of their making."""
        return list(await session.scalars(select(LotBatch.id).where(LotBatch.lot_id == lot_id).order_by(LotBatch.id)))

    async def finish_batch(self, session: AsyncSession, batch_id: str, *, good: bool) -> None:
        """A batch is done, or given up. The lot's last one ends the lot. Raises Conflict where it was done before."""
        batch = await session.get_one(LotBatch, batch_id)
        lot = await session.get_one(Lot, batch.lot_id, with_for_update=True)
        await session.refresh(batch)  # as it is under the lock
        if batch.status != "PLANNED":
            raise Conflict(f"batch {batch_id} is {batch.status}")
        batch.status = "COMPLETED" if good else "FAILED"
        lot.left -= 1
        say = ManufacturingEvent.batch_completed if good else ManufacturingEvent.batch_failed
        self._outbox.add(
            session,
            say(batch_id=batch.id, part_number=lot.part_number, quantity=batch.quantity, status=batch.status),
        )
        if lot.left == 0:
            await self._finish_lot(session, lot)

    async def _finish_lot(self, session: AsyncSession, lot: Lot) -> None:
        batches = list(await session.scalars(select(LotBatch).where(LotBatch.lot_id == lot.id).order_by(LotBatch.id)))
        good = sum(batch.quantity for batch in batches if batch.status == "COMPLETED")
        for say in (ManufacturingEvent.lot_processed, ManufacturingEvent.production_milestone):
            self._outbox.add(
                session,
                say(
                    batch_id=batches[0].id,
                    lot_id=lot.id,
                    part_number=lot.part_number,
                    quantity=good,
                    status="PROCESSED",
                    station_id=STATION,
                ),
            )
