"""Analytics: what the platform's events add up to, in tables of its own.

For each inspection type the completed inspections, their scores (running, and by hour) and how capable the process is;
defects by type and severity; the yield of each batch, with a p-chart; threshold violations. Each event counts once: its
claim in the inbox and its figures are one transaction (docs/consuming.md). Events come in batches, and a batch adds to
each row once.

    export ANALYTICS_DATABASE_URL=postgresql://postgres@localhost/analytics KAFKA_BOOTSTRAP_SERVERS=localhost:9092
    outbox migrate $ANALYTICS_DATABASE_URL && python -m examples.chip_quality.analytics
    python -m examples.chip_quality.analytics report
"""

import asyncio
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC
from decimal import Decimal
from math import sqrt
from typing import Any

from rich.console import Console
from rich.table import Table
from sqlalchemy import Numeric, inspect, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.chip_quality import process
from examples.chip_quality.events import InspectionEvent, InspectionEventType, QualityEvent, QualityEventType
from outbox.consumer import Consumer, Meta

NAME = "analytics"
"""The consumer group in Kafka, and the consumer in the inbox."""

TOPICS = ["chip-quality.inspection.events", "chip-quality.quality.events"]

BATCH = 500

LOWER, UPPER = 80.0, 100.0
"""Specification limits of a score."""


class Base(DeclarativeBase):
    """Analytics' own tables."""


class Completed(Base):
    """Completed inspections of a type, the sum of their scores, and of the scores' squares."""

    __tablename__ = "completed"

    inspection_type: Mapped[str] = mapped_column(primary_key=True)
    inspections: Mapped[int]
    score_sum: Mapped[Decimal] = mapped_column(Numeric)
    """Decimal: sums of floats depend on their order."""
    score_squares: Mapped[Decimal] = mapped_column(Numeric)


class Window(Base):
    """The same of one hour, by the events' own time: an event that comes late counts where it belongs."""

    __tablename__ = "score_windows"

    inspection_type: Mapped[str] = mapped_column(primary_key=True)
    hour: Mapped[str] = mapped_column(primary_key=True)
    """UTC, such as 2026-11-24T09."""
    inspections: Mapped[int]
    score_sum: Mapped[Decimal] = mapped_column(Numeric)


class DefectCount(Base):
    """Defects found, by type and severity."""

    __tablename__ = "defect_counts"

    defect_type: Mapped[str] = mapped_column(primary_key=True)
    severity: Mapped[str] = mapped_column(primary_key=True)
    found: Mapped[int]


class Yield(Base):
    """Chips of a batch that passed, and that did not."""

    __tablename__ = "yields"

    batch_id: Mapped[str] = mapped_column(primary_key=True)
    passed: Mapped[int]
    failed: Mapped[int]


class Violation(Base):
    """Threshold violations of a batch, by alert level."""

    __tablename__ = "violations"

    batch_id: Mapped[str] = mapped_column(primary_key=True)
    level: Mapped[str] = mapped_column(primary_key=True)
    found: Mapped[int]


# ---- counting: values in, values out ---------------------------------------------------------------------------------

Key = tuple[str, ...]
"""Of a row."""


def _add(figures: list[int | Decimal], score: Decimal) -> None:
    figures[0] += 1
    figures[1] += score
    figures[2] += score * score


def _figures() -> defaultdict[Key, list[int | Decimal]]:
    return defaultdict(lambda: [0, Decimal(0), Decimal(0)])


@dataclass(slots=True)
class Counts:
    """What a batch of events adds to the tables."""

    completed: defaultdict[Key, list[int | Decimal]] = field(default_factory=_figures)
    windows: defaultdict[Key, list[int | Decimal]] = field(default_factory=_figures)
    defects: Counter[Key] = field(default_factory=Counter)
    passed: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    violations: Counter[Key] = field(default_factory=Counter)

    def inspection(self, event: InspectionEvent) -> None:
        """Count one. Those that analytics has no interest in change nothing."""
        match event.event_type:
            case InspectionEventType.INSPECTION_COMPLETED:
                score = Decimal(str(event.quality_score or 0))
                hour = event.timestamp.astimezone(UTC).strftime("%Y-%m-%dT%H")
                _add(self.completed[event.inspection_type,], score)
                _add(self.windows[event.inspection_type, hour], score)
            case InspectionEventType.DEFECT_DETECTED:
                self.defects.update((defect.defect_type, defect.severity) for defect in event.defects)

    def quality(self, event: QualityEvent) -> None:
        """As `inspection`."""
        match event.event_type:
            case QualityEventType.QUALITY_APPROVED:
                self.passed[event.batch_id] += 1
            case QualityEventType.QUALITY_REJECTED:
                self.failed[event.batch_id] += 1
            case QualityEventType.THRESHOLD_VIOLATED:
                self.violations[event.batch_id, str(event.alert_level)] += 1


# ---- the consumer ----------------------------------------------------------------------------------------------------


def make_consumer(engine: AsyncEngine, bootstrap: str) -> Consumer:
    """What counts events into the tables."""
    consumer = Consumer(NAME, engine, catalogue=process.catalogue(), kafka=process.kafka(NAME, bootstrap))

    @consumer.on_batch(InspectionEvent, size=BATCH)
    async def inspections(events: list[InspectionEvent], session: AsyncSession, _: list[Meta]) -> None:
        counts = Counts()
        for event in events:
            counts.inspection(event)
        await store(session, counts)

    @consumer.on_batch(QualityEvent, size=BATCH)
    async def verdicts(events: list[QualityEvent], session: AsyncSession, _: list[Meta]) -> None:
        counts = Counts()
        for event in events:
            counts.quality(event)
        await store(session, counts)

    return consumer


async def store(session: AsyncSession, counts: Counts) -> None:
    """Adds the counts to the tables, in the caller's transaction."""
    await _increase(session, Completed, [(*key, *figures) for key, figures in counts.completed.items()])
    await _increase(session, Window, [(*key, *figures[:2]) for key, figures in counts.windows.items()])
    await _increase(session, DefectCount, [(*key, found) for key, found in counts.defects.items()])
    batches = {*counts.passed, *counts.failed}
    await _increase(session, Yield, [(batch, counts.passed[batch], counts.failed[batch]) for batch in batches])
    await _increase(session, Violation, [(*key, found) for key, found in counts.violations.items()])


async def _increase(session: AsyncSession, table: type[Base], rows: Sequence[tuple[Any, ...]]) -> None:
    """Adds each row's figures to the row of the same primary key. In the order of keys: two batches cannot deadlock."""
    if not rows:
        return
    columns = [column.name for column in inspect(table).columns]
    new = insert(table).values([dict(zip(columns, row, strict=True)) for row in sorted(rows)])
    keys = [column.name for column in inspect(table).primary_key]
    figures = {name: inspect(table).columns[name] + new.excluded[name] for name in columns if name not in keys}
    await session.execute(new.on_conflict_do_update(index_elements=keys, set_=figures))


# ---- what the figures say --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Capability:
    """How well the scores keep within their limits. Source: ISO 22514-2, indices Cp and Cpk."""

    inspections: int
    mean: float
    deviation: float
    """Of the population; 0 for a single inspection."""

    @property
    def cp(self) -> float | None:
        """The room between the limits in units of six deviations; None without a spread."""
        return (UPPER - LOWER) / (6 * self.deviation) if self.deviation else None

    @property
    def cpk(self) -> float | None:
        """The room between the mean and the nearer limit in units of three deviations; below 1 many are outside."""
        return min(UPPER - self.mean, self.mean - LOWER) / (3 * self.deviation) if self.deviation else None


def capability(inspections: int, score_sum: Decimal, score_squares: Decimal) -> Capability:
    """Of the scores with this sum, and this sum of squares."""
    mean = score_sum / inspections
    variance = max(Decimal(0), score_squares / inspections - mean * mean)
    return Capability(inspections, float(mean), float(variance.sqrt()))


@dataclass(frozen=True, slots=True)
class Point:
    """A batch on the p-chart."""

    batch_id: str
    inspected: int
    rejected: float
    """Share of them, 0 to 1."""
    lower: float
    upper: float

    @property
    def in_control(self) -> bool:
        """Whether the share is within the limits; outside of them chance alone is no explanation."""
        return self.lower <= self.rejected <= self.upper


def p_chart(yields: Sequence[tuple[str, int, int]]) -> list[Point]:
    """The share of rejected chips of each batch (id, passed, failed), with limits of three deviations around the share
    of all. Source: ISO 7870-2, p-chart with varying sample size."""
    inspected = sum(passed + failed for _, passed, failed in yields)
    if not inspected:
        return []
    share = sum(failed for _, _, failed in yields) / inspected
    points = []
    for batch_id, passed, failed in yields:
        count = passed + failed
        reach = 3 * sqrt(share * (1 - share) / count)
        points.append(Point(batch_id, count, failed / count, max(0.0, share - reach), min(1.0, share + reach)))
    return points


async def report(session: AsyncSession, console: Console) -> None:
    """All of it, in tables."""
    by_type = await session.scalars(select(Completed).order_by(Completed.inspection_type))
    rows = [(one.inspection_type, capability(one.inspections, one.score_sum, one.score_squares)) for one in by_type]
    _print(
        console,
        "Completed inspections",
        ("type", "inspections", "mean score", "deviation", "Cp", "Cpk"),
        [
            (kind, f"{one.inspections:,}", f"{one.mean:.2f}", f"{one.deviation:.2f}", _index(one.cp), _index(one.cpk))
            for kind, one in rows
        ],
    )
    windows = await session.scalars(select(Window).order_by(Window.hour.desc(), Window.inspection_type).limit(24))
    _print(
        console,
        "Scores by hour (UTC)",
        ("hour", "type", "inspections", "mean score"),
        [(w.hour, w.inspection_type, f"{w.inspections:,}", f"{w.score_sum / w.inspections:.2f}") for w in windows],
    )
    defects = await session.scalars(select(DefectCount).order_by(DefectCount.found.desc()).limit(20))
    _print(
        console,
        "Defects",
        ("type", "severity", "found"),
        [(one.defect_type, one.severity, f"{one.found:,}") for one in defects],
    )
    yields = [(one.batch_id, one.passed, one.failed) for one in await session.scalars(select(Yield))]
    points = p_chart(yields)
    outside = [point for point in points if not point.in_control]
    passed, failed = sum(row[1] for row in yields), sum(row[2] for row in yields)
    share = f", yield {passed / (passed + failed):.1%}" if passed + failed else ""
    _print(
        console,
        f"Batches out of control: {len(outside):,} of {len(points):,}{share}",
        ("batch", "inspected", "rejected", "limits"),
        [
            (one.batch_id, f"{one.inspected:,}", f"{one.rejected:.1%}", f"{one.lower:.1%} – {one.upper:.1%}")
            for one in outside[:20]
        ],
    )
    violations: Counter[str] = Counter()
    for one in await session.scalars(select(Violation)):
        violations[one.level] += one.found
    _print(console, "Threshold violations", ("level", "found"), [(k, f"{v:,}") for k, v in sorted(violations.items())])


def _index(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _print(console: Console, title: str, heads: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    table = Table(*heads, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


async def _report(url: str) -> None:
    engine = process.engine_for(url)
    async with AsyncSession(engine) as session:
        await report(session, Console())
    await engine.dispose()


def main() -> None:
    """The process, or its report. Logs are JSON lines on stderr."""
    url = os.environ["ANALYTICS_DATABASE_URL"]
    if sys.argv[1:] == ["report"]:
        asyncio.run(_report(url))
        return
    process.configure_log()
    asyncio.run(process.run(make_consumer(process.engine_for(url), os.environ["KAFKA_BOOTSTRAP_SERVERS"]), Base))


if __name__ == "__main__":
    main()
