"""`write`: what an event adds to the transaction that writes it, by every way in which one can be written.

A transaction is: open a session or take a connection, one INSERT of the service's own, its events, commit (fsync on).
All variants take turns transaction by transaction in a random order, so that the disk's moods meet all of them.
"""

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import fastavro
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from benchmarks.figures import percentile
from benchmarks.stage import Stage, say
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
        self._engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
        Base.metadata.create_all(self._engine)
        self._async_engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"))
        self._connection: asyncpg.Connection[asyncpg.Record] = runner.run(asyncpg.connect(url))

    def all(self) -> dict[str, Transaction]:
        """By name."""
        return {
            "session_psycopg": self._session,
            "async_session_asyncpg": lambda count: self._runner.run(self._async_session(count)),
            "core_psycopg": self._core,
            "asyncpg": lambda count: self._runner.run(self._asyncpg(count)),
        }

    def _session(self, count: int) -> float:
        start = time.perf_counter()
        with Session(self._engine) as session:
            row = inspection()
            session.add(Inspection(**row))
            if count:
                self._outbox.add(session, *events(row["id"], count))
            session.commit()
        return time.perf_counter() - start

    async def _async_session(self, count: int) -> float:
        start = time.perf_counter()
        async with AsyncSession(self._async_engine) as session:
            row = inspection()
            session.add(Inspection(**row))
            if count:
                self._outbox.add(session, *events(row["id"], count))
            await session.commit()
        return time.perf_counter() - start

    def _core(self, count: int) -> float:
        start = time.perf_counter()
        with self._engine.begin() as connection:
            row = inspection()
            connection.execute(sa.insert(Inspection), row)
            if count:
                connection.execute(self._outbox.insert(*events(row["id"], count)))
        return time.perf_counter() - start

    async def _asyncpg(self, count: int) -> float:
        start = time.perf_counter()
        async with self._connection.transaction():
            row = inspection()
            await self._connection.execute("INSERT INTO inspection VALUES ($1, $2, $3, $4)", *row.values())
            if count:
                await self._outbox.add_asyncpg(self._connection, *events(row["id"], count))
        return time.perf_counter() - start

    def close(self) -> None:
        """Gives all connections back."""
        self._engine.dispose()
        self._runner.run(self._async_engine.dispose())
        self._runner.run(self._connection.close())


def write(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    """Medians of each way with no event, with one, and with a hundred."""
    url = stage.database("write")
    with asyncio.Runner() as runner:
        ways = _Ways(url, runner)
        say(f"write: {sizes.transactions} transactions of each of {len(ways.all()) * len(EVENTS)} variants")
        took = _measured(ways.all(), sizes)
        ways.close()
    found = {way: _summary({count: took[way, count] for count in EVENTS}) for way in ways.all()}
    for way, figures in found.items():
        say(f"write: {way}: {figures}")
    return {
        "transactions": sizes.transactions,
        "added_percent": max(one["added_percent"] for one in found.values()),
        "us_per_event_of_100": max(one["us_per_event_of_100"] for one in found.values()),
        "cpu_us_per_event": _profile(),
        "ways": found,
    }


def _profile() -> dict[str, float]:
    """What the caller's CPU does for one event of a hundred, by step, without SQLAlchemy and the database: medians of
    the thread's CPU time. `fastavro alone` is part of `encode`."""
    catalogue = Catalogue.from_folder(SCHEMAS)
    made = events("i-1", MANY)
    schema = fastavro.schema.load_schema(str(SCHEMAS / "inspection.avsc"))
    plain = [event.to_avro() for event in made]
    steps: dict[str, Callable[[], object]] = {
        "make the typed event": lambda: events("i-1", MANY),
        "encode": lambda: [catalogue.encode(event) for event in made],
        "fastavro alone": lambda: [fastavro.schemaless_writer(BytesIO(), schema, event) for event in plain],
    }
    return {
        step: round(statistics.median(_cpu(run) for _ in range(100)) / MANY * 1e6, 2) for step, run in steps.items()
    }


def _cpu(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


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
        "without_p95_ms": round(percentile(took[0], 0.95) * 1e3, 3),
        "with_one_p95_ms": round(percentile(took[1], 0.95) * 1e3, 3),
    }
