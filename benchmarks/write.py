"""`write`: what an event adds to the transaction that writes it, by every way in which one can be written.

A transaction is: open a session or take a connection, one INSERT of the service's own, its events, commit (fsync on).
All variants take turns transaction by transaction in a random order, so that the disk's moods meet all of them.
"""

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import psycopg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from benchmarks.figures import percentile
from benchmarks.stage import Stage, say
from benchmarks.write_steps import steps
from examples.chip_quality.events import Defect, InspectionEvent, InspectionEventType
from outbox.catalogue import Catalogue
from outbox.writer import Outbox

SCHEMAS = Path(__file__).parent.parent / "schemas"

MANY = 100

EVENTS = (0, 1, MANY)
"""Events a transaction."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How often each variant runs."""

    transactions: int = 400
    warming: int = 40


FULL = Sizes()
QUICK = Sizes(transactions=30, warming=5)


INSERT = "INSERT INTO inspection VALUES (%(id)s, %(chip_id)s, %(status)s, %(quality_score)s)"
"""Of the service's own, for psycopg."""


class Base(DeclarativeBase):
    """The service's own tables."""


class Inspection(Base):
    """A row as a service has it."""

    __tablename__ = "inspection"
    id: Mapped[str] = mapped_column(primary_key=True)
    chip_id: Mapped[str]
    status: Mapped[str]
    quality_score: Mapped[float]


def inspection() -> dict[str, Any]:
    """A new row."""
    return {"id": str(uuid4()), "chip_id": "chip-0017-42", "status": "completed", "quality_score": 0.973}


def events(inspection_id: str, count: int) -> list[InspectionEvent]:
    """Typed events of one inspection with a defect each. Making them is part of what is measured."""
    return [
        InspectionEvent(
            event_type=InspectionEventType.INSPECTION_COMPLETED,
            inspection_id=inspection_id,
            batch_id="batch-2024-0031",
            chip_id="chip-0017-42",
            inspection_type="optical",
            status="completed",
            quality_score=0.973,
            defects=[Defect(defect_type="scratch", severity="minor", confidence=0.87, location="edge")],
        )
        for _ in range(count)
    ]


Transaction = Callable[[int], float]
"""One transaction with so many events; returns the seconds it took."""


class _Ways:
    """The ways to write, each a Transaction. Warm pools: no connection is opened in a measured one."""

    def __init__(self, url: str, runner: asyncio.Runner) -> None:
        self._outbox = Outbox(Catalogue.from_folder(SCHEMAS))
        self._runner = runner
        by_psycopg, by_asyncpg = (
            url.replace("postgresql://", f"postgresql+{one}://") for one in ("psycopg", "asyncpg")
        )
        self._engine = sa.create_engine(by_psycopg)
        Base.metadata.create_all(self._engine)
        self._scoped = scoped_session(sessionmaker(self._engine))
        self._asyncpg_engine, self._psycopg_engine = create_async_engine(by_asyncpg), create_async_engine(by_psycopg)
        self.psycopg = psycopg.connect(url)
        self._async_psycopg = runner.run(psycopg.AsyncConnection.connect(url))
        self.asyncpg: asyncpg.Connection[asyncpg.Record] = runner.run(asyncpg.connect(url))

    def all(self) -> dict[str, Transaction]:
        """By name."""
        awaited = {
            "async_session_asyncpg": lambda count: self._async_session(self._asyncpg_engine, count),
            "async_session_psycopg": lambda count: self._async_session(self._psycopg_engine, count),
            "async_core_asyncpg": lambda count: self._async_core(self._asyncpg_engine, count),
            "async_core_psycopg": lambda count: self._async_core(self._psycopg_engine, count),
            "asyncpg": self._bare_asyncpg,
            "async_psycopg": self._bare_async_psycopg,
        }
        timed = {
            "session_psycopg": self._session,
            "scoped_session_psycopg": self._scoped_session,
            "core_psycopg": self._core,
            "psycopg": self._bare_psycopg,
        }
        return {
            **{way: partial(_timed, run) for way, run in timed.items()},
            **{way: partial(self._timed_async, run) for way, run in awaited.items()},
        }

    def _timed_async(self, run: Callable[[int], Awaitable[None]], count: int) -> float:
        async def timed() -> float:
            start = time.perf_counter()
            await run(count)
            return time.perf_counter() - start

        return self._runner.run(timed())

    def _session(self, count: int) -> None:
        with Session(self._engine) as session, session.begin():
            self._fill(session, count)

    def _scoped_session(self, count: int) -> None:
        self._fill(self._scoped, count)
        self._scoped.commit()
        self._scoped.remove()

    async def _async_session(self, engine: AsyncEngine, count: int) -> None:
        async with AsyncSession(engine) as session, session.begin():
            self._fill(session, count)

    def _fill(self, session: Session | AsyncSession | scoped_session[Session], count: int) -> None:
        row = inspection()
        session.add(Inspection(**row))
        if count:
            self._outbox.add(session, *events(row["id"], count))

    def _core(self, count: int) -> None:
        with self._engine.begin() as connection:
            row = inspection()
            connection.execute(sa.insert(Inspection), row)
            if count:
                connection.execute(self._outbox.insert(*events(row["id"], count)))

    async def _async_core(self, engine: AsyncEngine, count: int) -> None:
        async with engine.begin() as connection:
            row = inspection()
            await connection.execute(sa.insert(Inspection), row)
            if count:
                await connection.execute(self._outbox.insert(*events(row["id"], count)))

    async def _bare_asyncpg(self, count: int) -> None:
        async with self.asyncpg.transaction():
            row = inspection()
            await self.asyncpg.execute("INSERT INTO inspection VALUES ($1, $2, $3, $4)", *row.values())
            if count:
                await self._outbox.add_asyncpg(self.asyncpg, *events(row["id"], count))

    def _bare_psycopg(self, count: int) -> None:
        with self.psycopg.transaction():
            row = inspection()
            self.psycopg.execute(INSERT, row)
            if count:
                self._outbox.add_psycopg(self.psycopg, *events(row["id"], count))

    async def _bare_async_psycopg(self, count: int) -> None:
        async with self._async_psycopg.transaction():
            row = inspection()
            await self._async_psycopg.execute(INSERT, row)
            if count:
                await self._outbox.add_psycopg_async(self._async_psycopg, *events(row["id"], count))

    def close(self) -> None:
        """Gives all connections back."""
        self._engine.dispose()
        self.psycopg.close()
        for ending in (
            self._asyncpg_engine.dispose(),
            self._psycopg_engine.dispose(),
            self._async_psycopg.close(),
            self.asyncpg.close(),
        ):
            self._runner.run(ending)


def _timed(run: Callable[[int], None], count: int) -> float:
    start = time.perf_counter()
    run(count)
    return time.perf_counter() - start


def write(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    """Medians of each way with no event, with one, and with a hundred."""
    url = stage.database("write")
    with asyncio.Runner() as runner:
        ways = _Ways(url, runner)
        say(f"write: {sizes.transactions} transactions of each of {len(ways.all()) * len(EVENTS)} variants")
        took = _measured(ways.all(), sizes)
        ways.close()
        profile = steps(url, runner, SCHEMAS, lambda count: events("i-1", count))
    found = {way: _summary({count: took[way, count] for count in EVENTS}) for way in ways.all()}
    for way, figures in found.items():
        say(f"write: {way}: {figures}")
    return {
        "transactions": sizes.transactions,
        "added_percent": max(one["added_percent"] for one in found.values()),
        "us_per_event_of_100": max(one["us_per_event_of_100"] for one in found.values()),
        "ways": found,
        "steps": profile,
    }


def _measured(ways: dict[str, Transaction], sizes: Sizes) -> dict[tuple[str, int], list[float]]:
    took: dict[tuple[str, int], list[float]] = {(way, count): [] for way in ways for count in EVENTS}
    for _ in range(sizes.warming + sizes.transactions):
        for way, count in random.sample(list(took), len(took)):
            took[way, count].append(ways[way](count))
    return {variant: times[sizes.warming :] for variant, times in took.items()}


def _summary(took: dict[int, Sequence[float]]) -> dict[str, float]:
    none, one, many = (statistics.median(took[count]) for count in EVENTS)
    return {
        "without_ms": round(none * 1e3, 3),
        "with_one_ms": round(one * 1e3, 3),
        "with_100_ms": round(many * 1e3, 3),
        "added_percent": round((one / none - 1) * 100, 1),
        "added_us": round((one - none) * 1e6, 1),
        "us_per_event_of_100": round((many - none) / MANY * 1e6, 1),
        "events_per_s": round(MANY / many),
        "without_p95_ms": round(percentile(took[0], 0.95) * 1e3, 3),
        "with_one_p95_ms": round(percentile(took[1], 0.95) * 1e3, 3),
        "with_one_p99_ms": round(percentile(took[1], 0.99) * 1e3, 3),
    }
