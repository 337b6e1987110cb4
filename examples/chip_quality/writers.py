"""One of the demo's writers: a process of the inspection service under load, with all that makes an outbox difficult.

Transactions that are rolled back after their events were added, savepoints rolled back and released, several events in
a transaction, inspections that several writers change at the same time, and (`--slow`) transactions that have written
their event and commit seconds later, behind hundreds of others.

Works until SIGTERM, then finishes its transaction. The ids of events that were added and not committed go to a file
outside the database, one a line: the database forgets them.
"""

import argparse
import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TextIO

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from examples.chip_quality import events
from examples.chip_quality.events import InspectionEvent
from examples.chip_quality.inspection import (
    Batch,
    Conflict,
    Inspection,
    InspectionService,
    Status,
)
from examples.chip_quality.ledger import KeptOutbox, entry_of
from examples.chip_quality.process import catalogue, engine_for
from outbox.writer import Outbox

TYPES = ("visual", "x-ray", "electrical", "thermal")
DEFECTS = ("scratch", "crack", "void", "contamination", "misalignment")
SEVERITIES = ("minor", "major", "critical")

SLOW_TYPE = "burn-in"
"""Inspections of the slow transaction; the other work leaves them alone, or it would wait for the lock."""

OPEN_INSPECTIONS = 30
"""So few at a time that the writers meet on them."""


class ChangedMind(Exception):  # noqa: N818 -- named for what happened
    """Why a transaction or a savepoint is rolled back here."""


class Writer:
    """Transactions one after the other. A chance is a share of the transactions."""

    def __init__(self, url: str, rolled_back: TextIO, *, pause: float, seed: int) -> None:
        self._random = random.Random(seed)
        self._engine = engine_for(url)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)
        self._outbox = Outbox(catalogue())
        self._kept = KeptOutbox(self._outbox)
        self._service = InspectionService(self._kept)
        self._rolled_back = rolled_back
        self._pause = pause

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until `stopping`."""
        steps: dict[Callable[[AsyncSession], Awaitable[None]], int] = {
            self._inspect_a_chip: 2,
            self._start_and_look: 3,
            self._look: 4,
            self._look_twice: 2,
            self._finish: 3,
            self._give_up: 1,
        }
        while not stopping.is_set():
            step = self._random.choices(list(steps), list(steps.values()))[0]
            await self._transaction(step)
            await asyncio.sleep(self._random.uniform(0, 2 * self._pause))
        await self._engine.dispose()

    async def _transaction(self, step: Callable[[AsyncSession], Awaitable[None]]) -> None:
        """One transaction; one in eight is rolled back when everything is written but the commit."""
        try:
            async with self._forgetting(), self._sessions.begin() as session:
                await step(session)
                self._change_mind(0.125)
        except (ChangedMind, Conflict):
            pass

    @asynccontextmanager
    async def _forgetting(self) -> AsyncIterator[None]:
        """Notes the ids that were added in the block when the block fails: those were rolled back."""
        before = len(self._kept.said)
        try:
            yield
        except BaseException:
            gone = self._kept.said[before:]
            del self._kept.said[before:]  # so that the transaction around a savepoint does not note them again
            self._rolled_back.writelines(f"{event_id}\n" for event_id in gone)
            raise

    # ---- what happens in a transaction -------------------------------------------------------------------------------

    async def _inspect_a_chip(self, session: AsyncSession) -> None:
        opened = await session.scalar(
            select(func.count()).where(Inspection.status.in_([Status.CREATED, Status.STARTED]))
        )
        if (opened or 0) >= OPEN_INSPECTIONS:
            return await self._finish(session)
        batch_id = await session.scalar(
            select(Batch.id).where(Batch.inspected < Batch.quantity).order_by(func.random()).limit(1)
        )
        if batch_id is None:
            batch_id = (await self._service.open_batch(session, "CQ-7", self._random.randint(10, 40))).id
        await self._service.create(session, batch_id, f"chip-{self._random.randrange(10**6)}", self._a(TYPES))
        return None

    async def _start_and_look(self, session: AsyncSession) -> None:
        if inspection_id := await self._some(session, Status.CREATED):
            await self._service.start(session, inspection_id)
            await self._service.detect(session, inspection_id, self._defect())

    async def _look(self, session: AsyncSession) -> None:
        if inspection_id := await self._some(session, Status.STARTED):
            found = [self._defect() for _ in range(self._random.randint(1, 3))]
            await self._service.detect(session, inspection_id, *found)

    async def _look_twice(self, session: AsyncSession) -> None:
        """One savepoint released, one rolled back, one event behind both."""
        if not (inspection_id := await self._some(session, Status.STARTED)):
            return
        async with session.begin_nested():
            await self._service.detect(session, inspection_id, self._defect())
        try:
            async with self._forgetting(), session.begin_nested():
                await self._service.detect(session, inspection_id, self._defect(), self._defect())
                await session.flush()
                self._change_mind(1)
        except ChangedMind:
            pass
        await self._service.detect(session, inspection_id, self._defect())

    async def _finish(self, session: AsyncSession) -> None:
        if inspection_id := await self._some(session, Status.STARTED):
            await self._service.complete(session, inspection_id, round(self._random.uniform(40, 100), 2))
            await self._service.assess(session, inspection_id)

    async def _give_up(self, session: AsyncSession) -> None:
        if inspection_id := await self._some(session, Status.CREATED):
            await self._service.fail(session, inspection_id)

    def _change_mind(self, chance: float) -> None:
        if self._random.random() < chance:
            raise ChangedMind

    async def _some(self, session: AsyncSession, status: Status) -> str | None:
        """Some inspection in this state a moment ago: another writer may be at it."""
        candidates = select(Inspection.id).where(Inspection.status == status, Inspection.inspection_type != SLOW_TYPE)
        return await session.scalar(candidates.order_by(func.random()).limit(1))

    def _defect(self) -> events.Defect:
        return events.Defect(
            defect_type=self._a(DEFECTS),
            severity=self._a(SEVERITIES),
            confidence=round(self._random.random(), 3),
            location=f"die {self._random.randrange(400)}",
        )

    def _a(self, choices: tuple[str, ...]) -> str:
        return self._random.choice(choices)

    # ---- the slow transaction ----------------------------------------------------------------------------------------

    async def run_slow(self, seconds: float, stopping: asyncio.Event) -> None:
        """Slow transactions until `stopping`."""
        while not stopping.is_set():
            await self._slow(seconds)
        await self._engine.dispose()

    async def _slow(self, seconds: float) -> None:
        """An event is written, and so has its place in the order; its transaction commits `seconds` later.

        By `Outbox.insert`, which writes at once; `add` writes at the commit.
        """
        async with self._sessions.begin() as session:
            batch = await self._service.open_batch(session, "CQ-7", 1)
            inspection_id = (await self._service.create(session, batch.id, "chip-slow", SLOW_TYPE)).id
            await self._service.start(session, inspection_id)
        async with self._sessions.begin() as session:
            inspection = await session.get_one(Inspection, inspection_id, with_for_update={"key_share": True})
            inspection.version += 1
            early = InspectionEvent.defect_detected(
                inspection_id=inspection.id,
                batch_id=inspection.batch_id,
                chip_id=inspection.chip_id,
                inspection_type=inspection.inspection_type,
                status=inspection.status,
                defects=[self._defect()],
                metadata={"version": str(inspection.version)},
            )
            connection = await session.connection()
            await connection.execute(self._outbox.insert(early))
            session.add(entry_of(early))
            await asyncio.sleep(seconds)
        async with self._sessions.begin() as session:
            await self._service.complete(session, inspection_id, 90.0)
            await self._service.assess(session, inspection_id)


async def main(arguments: argparse.Namespace) -> None:
    """The process."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    url = os.environ["OUTBOX_DATABASE_URL"]
    with arguments.rolled_back.open("w", buffering=1) as rolled_back:
        writer = Writer(url, rolled_back, pause=arguments.pause, seed=arguments.seed)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(writer.run(stopping))
            if arguments.slow:
                slow = Writer(url, rolled_back, pause=0, seed=-arguments.seed)
                tasks.create_task(slow.run_slow(arguments.slow, stopping))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rolled_back", type=Path, help="file for the ids of events that were not committed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.005, help="seconds between two transactions, on average")
    parser.add_argument("--slow", type=float, default=0.0, help="seconds that each slow transaction takes; 0: none")
    asyncio.run(main(parser.parse_args()))
