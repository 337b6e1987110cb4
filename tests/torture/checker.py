"""What is in Kafka and in the consumer's tables, against what was committed. Knows nothing of our code: values in,
findings out.

The ledger is the account of what must be there: writers enter each event in the transaction that adds it, so its rows
are exactly the events that were committed, and `number` is the order in which their key's lock was held.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

Key = tuple[str, str | None]
"""Topic and key. Without a key no order is promised."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One committed event, as its record must be."""

    event_id: UUID
    topic: str
    key: str | None
    number: int
    type: str
    value: bytes | None


@dataclass(frozen=True, slots=True)
class Record:
    """One record as a reader of committed records found it. Within a partition they are given in its order."""

    topic: str
    partition: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]

    def is_of(self, entry: Entry) -> bool:
        """Whether it is this event's record, to the byte."""
        headers = dict(self.headers)
        return (
            len(headers) == len(self.headers)
            and self.topic == entry.topic
            and self.key == _bytes(entry.key)
            and self.value == entry.value
            and headers.get("ce_id") == str(entry.event_id).encode()
            and headers.get("ce_type") == entry.type.encode()
        )

    @property
    def event_id(self) -> UUID | None:
        """Out of the header ce_id; None when it has none that can be read."""
        try:
            return UUID((dict(self.headers).get("ce_id") or b"").decode())
        except ValueError:
            return None


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode()


@dataclass(frozen=True, slots=True)
class Effects:
    """The consumer's tables."""

    rows: Mapping[Key, Sequence[UUID]]
    """Events by topic and key, in the order of taking effect."""
    counters: Mapping[Key, int]


@dataclass(slots=True)
class Findings:
    """What is wrong. All empty: nothing is."""

    lost: list[UUID] = field(default_factory=list)
    """Committed, and no record is the event's."""
    doubled: list[UUID] = field(default_factory=list)
    """An id stands here once for each record too many."""
    reordered: list[UUID] = field(default_factory=list)
    """Read behind a later event of the key, or in another partition than the key's first."""
    phantom: list[str] = field(default_factory=list)
    """Records of no committed event: rolled back, from nowhere, or altered (then the event is lost as well)."""
    effects: list[str] = field(default_factory=list)
    """Rows and counters that are missing, too much, or out of order."""

    def __bool__(self) -> bool:
        return any((self.lost, self.doubled, self.reordered, self.phantom, self.effects))

    def __str__(self) -> str:
        """The middle of a run's last line."""
        return (
            f"lost {len(self.lost)} · doubled {len(self.doubled)} · reordered {len(self.reordered)} · "
            f"phantom {len(self.phantom)} · effects wrong {len(self.effects)}"
        )


def check(entries: Sequence[Entry], records: Iterable[Record], effects: Effects) -> Findings:
    """Everything at once."""
    committed = {entry.event_id: entry for entry in entries}
    findings = Findings(effects=wrong_effects(entries, effects))
    seen: Counter[UUID] = Counter()
    order = _Order()
    for record in records:
        entry = committed.get(record.event_id) if record.event_id else None
        if entry is None or not record.is_of(entry):
            findings.phantom.append(_described(record, entry))
            continue
        seen[entry.event_id] += 1
        if seen[entry.event_id] > 1:
            findings.doubled.append(entry.event_id)
        elif not order.holds(entry, record.partition):
            findings.reordered.append(entry.event_id)
    findings.lost = [event_id for event_id in committed if not seen[event_id]]
    return findings


class _Order:
    """Of the first records of events."""

    def __init__(self) -> None:
        self._highest: dict[Key, int] = {}
        self._home: dict[Key, int] = {}

    def holds(self, entry: Entry, partition: int) -> bool:
        if entry.key is None:
            return True
        key = entry.topic, entry.key
        before = self._highest.get(key, 0)
        self._highest[key] = max(before, entry.number)
        return entry.number > before and self._home.setdefault(key, partition) == partition


def _described(record: Record, entry: Entry | None) -> str:
    why = "altered" if entry else "of no committed event"
    return f"{record.event_id} in {record.topic}[{record.partition}] with key {record.key!r}: {why}"


def wrong_effects(entries: Sequence[Entry], effects: Effects) -> list[str]:
    """One line for each key whose rows or counter are not what the ledger adds up to."""
    expected: dict[Key, list[UUID]] = defaultdict(list)
    for entry in sorted(entries, key=lambda entry: entry.number):
        expected[entry.topic, entry.key].append(entry.event_id)
    wrong = []
    for key in sorted({*expected, *effects.rows, *effects.counters}, key=str):
        wanted, found = expected.get(key, []), list(effects.rows.get(key, []))
        if key[1] is None:
            wanted, found = sorted(wanted), sorted(found)
        if wanted != found:
            wrong.append(f"{key}: {_difference(wanted, found)}")
        if effects.counters.get(key, 0) != len(wanted):
            wrong.append(f"{key}: its counter says {effects.counters.get(key, 0)} instead of {len(wanted)}")
    return wrong


def _difference(wanted: list[UUID], found: list[UUID]) -> str:
    missing, extra = Counter(wanted) - Counter(found), Counter(found) - Counter(wanted)
    if not missing and not extra:
        place = next(place for place, pair in enumerate(zip(wanted, found, strict=True)) if pair[0] != pair[1])
        return f"out of order from row {place + 1} on, where {found[place]} stands instead of {wanted[place]}"
    some, other = next(iter(missing), None), next(iter(extra), None)
    return f"{missing.total()} missing (such as {some}), {extra.total()} too many (such as {other})"
