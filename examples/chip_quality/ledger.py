"""The demo's own account of what must be in Kafka and in the consumer's tables, and the comparison with what is there.

The account is kept by the database: whoever adds an event writes an Entry in the same transaction, so that the entries
are exactly the events that were committed. Nothing here is code of the outbox, the relay or the consumer.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from examples.chip_quality.events import InspectionEvent, ManufacturingEvent, QualityEvent
from examples.chip_quality.inspection import Adds
from outbox.catalogue import TypedEvent


class Base(MappedAsDataclass, DeclarativeBase):
    """The ledger's table."""


class Entry(Base, kw_only=True):
    """One committed event."""

    __tablename__ = "ledger"

    event_id: Mapped[UUID] = mapped_column(primary_key=True)
    topic: Mapped[str]
    key: Mapped[str]
    number: Mapped[int] = mapped_column(BigInteger)
    """Of the event among those of its key: the aggregate's version, counted under the aggregate's lock."""
    type: Mapped[str]
    facts: Mapped[dict[str, Any]] = mapped_column(JSONB, default_factory=dict)
    """What a consumer can make of it, as it was when it was said."""


def entry_of(event: TypedEvent) -> Entry:
    """The entry of an event, from the event itself and not from its bytes."""
    match event:
        case InspectionEvent():
            topic, key = "chip-quality.inspection.events", event.inspection_id
            facts = {
                "inspection_type": event.inspection_type,
                "score": event.quality_score,
                "defects": [[defect.defect_type, defect.severity] for defect in event.defects],
            }
        case QualityEvent():
            topic, key = "chip-quality.quality.events", event.inspection_id
            facts = {"batch_id": event.batch_id, "passed": event.pass_fail, "level": event.alert_level}
        case ManufacturingEvent():
            topic, key, facts = "chip-quality.manufacturing.events", event.batch_id, {}
        case _:
            raise TypeError(f"the demo has no {type(event).__name__}")
    return Entry(
        event_id=event.event_id,
        topic=topic,
        key=key,
        number=int(event.metadata["version"]),
        type=f"{event.AVRO_RECORD.rpartition('.')[0]}.{event.event_type}",
        facts=facts,
    )


class KeptOutbox:
    """An outbox whose every event is also entered in the ledger, in the same transaction.

    `said` are the ids of all events that were ever added, committed or not: what is not committed later is known by it.
    """

    def __init__(self, outbox: Adds) -> None:
        self._outbox = outbox
        self.said: list[UUID] = []

    def add(self, session: AsyncSession, /, *events: TypedEvent) -> list[UUID]:
        """What Outbox.add does, and the entries."""
        ids = self._outbox.add(session, *events)
        self.said += ids
        session.add_all(entry_of(event) for event in events)
        return ids


# ---- events against the ledger ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record as a reader found it in Kafka. Within a key of a topic, records are given in the order of reading."""

    event_id: UUID
    """Of the header, which the inbox goes by."""
    value_id: UUID | None
    """Of the event in the bytes."""
    topic: str
    key: str
    type: str
    partition: int = 0


@dataclass(slots=True, kw_only=True)
class Findings:
    """What is wrong, by id (by text for the effects). All empty: nothing is."""

    lost: list[UUID] = field(default_factory=list)
    """Committed, and not in Kafka."""
    doubled: list[UUID] = field(default_factory=list)
    """In Kafka more than once; an id stands here once for each time too many."""
    out_of_order: list[UUID] = field(default_factory=list)
    """Read behind a later event of the same key, or in another partition than the key's first one."""
    never_committed: list[UUID] = field(default_factory=list)
    """In Kafka, and not committed: rolled back, or from nowhere."""
    altered: list[UUID] = field(default_factory=list)
    """Another topic, key, type or id in the bytes than was written."""
    effects: list[str] = field(default_factory=list)
    """Figures of the consumers that are not what the committed events add up to."""

    def __bool__(self) -> bool:
        return any((self.lost, self.doubled, self.out_of_order, self.never_committed, self.altered, self.effects))


def compare(entries: Iterable[Entry], records: Sequence[Record], rolled_back: Collection[UUID]) -> Findings:
    """The records in Kafka against the events that were committed. `rolled_back`: ids that must be in neither.

    Raises ValueError when an id is both committed and rolled back: then the account itself is wrong.
    """
    committed = {entry.event_id: entry for entry in entries}
    if both := committed.keys() & set(rolled_back):
        raise ValueError(f"the ledger holds {len(both)} events that were rolled back, such as {next(iter(both))}")
    seen = Counter(record.event_id for record in records)
    known = [(record, committed[record.event_id]) for record in records if record.event_id in committed]
    return Findings(
        lost=[event_id for event_id in committed if event_id not in seen],
        doubled=[event_id for event_id, times in seen.items() for _ in range(times - 1)],
        out_of_order=_out_of_order(known),
        never_committed=[event_id for event_id in seen if event_id not in committed],
        altered=[record.event_id for record, entry in known if not _same(record, entry)],
    )


def _same(record: Record, entry: Entry) -> bool:
    found = record.topic, record.key, record.type, record.value_id
    return found == (entry.topic, entry.key, entry.type, entry.event_id)


def _out_of_order(known: Iterable[tuple[Record, Entry]]) -> list[UUID]:
    """A second copy of an event is doubled, not out of order."""
    highest: dict[tuple[str, str], int] = {}
    home: dict[tuple[str, str], int] = {}
    seen: set[UUID] = set()
    found = []
    for record, entry in known:
        key = record.topic, record.key
        strayed = home.setdefault(key, record.partition) != record.partition
        behind = entry.number <= highest.get(key, 0) and entry.event_id not in seen
        if strayed or behind:
            found.append(entry.event_id)
        highest[key] = max(highest.get(key, 0), entry.number)
        seen.add(entry.event_id)
    return found


# ---- effects against the ledger --------------------------------------------------------------------------------------

Figures = Mapping[tuple[str, ...], tuple[int | Decimal, ...]]
"""Rows of the consumers' tables: (table, primary key …) → figures."""


def effects(entries: Iterable[Entry]) -> Figures:
    """What the consumers must have in their tables once each of these events has had its effect exactly once."""
    sums: dict[tuple[str, ...], tuple[int | Decimal, ...]] = {}
    for entry in entries:
        for row, added in _effect(entry):
            before = sums.get(row, (0,) * len(added))
            sums[row] = tuple(one + more for one, more in zip(before, added, strict=True))
    return sums


def _effect(entry: Entry) -> Iterable[tuple[tuple[str, ...], tuple[int | Decimal, ...]]]:
    facts = entry.facts
    match entry.type.rpartition(".")[2]:
        case "INSPECTION_COMPLETED":
            score = Decimal(str(facts["score"]))
            yield ("completed", facts["inspection_type"]), (1, score)
            yield ("assessments", entry.key), (0, score)
        case "DEFECT_DETECTED":
            for defect_type, severity in facts["defects"]:
                yield ("defect_counts", defect_type, severity), (1,)
            yield ("assessments", entry.key), (len(facts["defects"]), Decimal(0))
        case "QUALITY_APPROVED":
            yield ("yields", facts["batch_id"]), (1, 0)
        case "QUALITY_REJECTED":
            yield ("yields", facts["batch_id"]), (0, 1)
        case "THRESHOLD_VIOLATED":
            yield ("violations", facts["batch_id"], facts["level"]), (1,)
            yield ("alerts", str(entry.event_id)), (1,)
        case "ALERT_TRIGGERED":
            yield ("alerts", str(entry.event_id)), (1,)


def compare_effects(expected: Figures, found: Figures) -> list[str]:
    """One line for each row that is missing, too much, or has other figures."""
    return [
        f"{' '.join(row)}: {_text(found.get(row))} instead of {_text(expected.get(row))}"
        for row in sorted({*expected, *found})
        if expected.get(row) != found.get(row)
    ]


def _text(figures: tuple[int | Decimal, ...] | None) -> str:
    return "no row" if figures is None else "/".join(map(str, figures))
