"""The demo's checker finds every kind of fault in tampered data, names it, and finds none where there is none."""

from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from examples.chip_quality.events import (
    AlertLevel,
    Defect,
    InspectionEvent,
    InspectionEventType,
    ManufacturingEvent,
    ManufacturingEventType,
    QualityEvent,
    QualityEventType,
)
from examples.chip_quality.ledger import (
    Entry,
    Figures,
    Findings,
    Record,
    compare,
    compare_effects,
    effects,
    entry_of,
)
from outbox.message import uuid7

SCRATCH = Defect(defect_type="scratch", severity="minor", confidence=0.5, location="die 1")
VOID = Defect(defect_type="void", severity="major", confidence=0.5, location="die 2")


def inspected(
    key: str, version: int, kind: InspectionEventType, *defects: Defect, score: float | None = None
) -> InspectionEvent:
    return InspectionEvent(
        event_type=kind,
        inspection_id=key,
        batch_id="b-1",
        chip_id="chip",
        inspection_type="visual",
        status="STARTED",
        quality_score=score,
        defects=defects,
        metadata={"version": str(version)},
    )


def judged(key: str, version: int, kind: QualityEventType, passed: bool) -> QualityEvent:
    return QualityEvent(
        event_type=kind,
        inspection_id=key,
        batch_id="b-1",
        quality_score=90.0,
        pass_fail=passed,
        metadata={"version": str(version)},
    )


def life(key: str, score: float, passed: bool) -> list[Entry]:
    """The entries of one inspection."""
    kinds = InspectionEventType
    verdict = QualityEventType.QUALITY_APPROVED if passed else QualityEventType.QUALITY_REJECTED
    return [
        entry_of(inspected(key, 1, kinds.INSPECTION_CREATED)),
        entry_of(inspected(key, 2, kinds.DEFECT_DETECTED, SCRATCH, VOID)),
        entry_of(inspected(key, 3, kinds.DEFECT_DETECTED, SCRATCH)),
        entry_of(inspected(key, 4, kinds.INSPECTION_COMPLETED, score=score)),
        entry_of(judged(key, 5, QualityEventType.QUALITY_ASSESSED, passed)),
        entry_of(judged(key, 6, verdict, passed)),
    ]


def published(entry: Entry) -> Record:
    return Record(
        event_id=entry.event_id, value_id=entry.event_id, topic=entry.topic, key=entry.key, type=entry.type, partition=1
    )


ENTRIES = [*life("i-1", 0.1, True), *life("i-2", 0.2, False), *life("i-3", 0.7, True)]
RECORDS = [published(entry) for entry in ENTRIES]
FIRST, SECOND, THIRD, *_ = (record.event_id for record in RECORDS)
ROLLED_BACK = uuid7()


def test_an_entry_holds_topic_key_number_and_type_of_its_event() -> None:
    event = ManufacturingEvent(
        event_type=ManufacturingEventType.BATCH_CREATED,
        batch_id="b-7",
        part_number="CQ-7",
        quantity=3,
        status="CREATED",
        metadata={"version": "5"},
    )
    entry = entry_of(event)
    assert (entry.event_id, entry.topic, entry.key, entry.number, entry.type) == (
        event.event_id,
        "chip-quality.manufacturing.events",
        "b-7",
        5,
        "com.chipquality.events.manufacturing.BATCH_CREATED",
    )


def test_nothing_is_found_where_every_event_was_read_once_and_in_order() -> None:
    assert not compare(ENTRIES, RECORDS, {ROLLED_BACK})


def test_keys_and_topics_may_be_read_in_any_order() -> None:
    by_topic = sorted(RECORDS, key=lambda record: record.topic)
    by_key = sorted(RECORDS, key=lambda record: record.key, reverse=True)
    assert not compare(ENTRIES, by_topic, set())
    assert not compare(ENTRIES, by_key, set())


Tamper = Callable[[list[Record]], list[Record]]


@pytest.mark.parametrize(
    ("tamper", "findings"),
    [
        pytest.param(lambda records: records[1:], {"lost": [FIRST]}, id="lost"),
        pytest.param(lambda records: records[:0], {"lost": [record.event_id for record in RECORDS]}, id="all lost"),
        pytest.param(lambda records: [records[0], *records], {"doubled": [FIRST]}, id="doubled at once"),
        pytest.param(lambda records: [*records, records[0]], {"doubled": [FIRST]}, id="doubled later"),
        pytest.param(lambda records: [*records, *records[:1] * 2], {"doubled": [FIRST, FIRST]}, id="tripled"),
        pytest.param(
            lambda records: [records[1], records[0], *records[2:]], {"out_of_order": [FIRST]}, id="two of a key swapped"
        ),
        pytest.param(
            lambda records: [*records[1:3], records[0], *records[3:]],
            {"out_of_order": [FIRST]},
            id="one of a key behind two later ones",
        ),
        pytest.param(
            lambda records: [records[0], replace(records[1], partition=2), *records[2:]],
            {"out_of_order": [SECOND]},
            id="a key in two partitions",
        ),
        pytest.param(
            lambda records: [*records, replace(records[0], event_id=ROLLED_BACK, value_id=ROLLED_BACK)],
            {"never_committed": [ROLLED_BACK]},
            id="rolled back, yet published",
        ),
        pytest.param(
            lambda records: [*records, replace(records[0], event_id=UUID(int=1), value_id=UUID(int=1))],
            {"never_committed": [UUID(int=1)]},
            id="from nowhere",
        ),
        pytest.param(
            lambda records: [replace(records[0], type="other"), *records[1:]], {"altered": [FIRST]}, id="another type"
        ),
        pytest.param(
            lambda records: [replace(records[0], topic="other"), *records[1:]], {"altered": [FIRST]}, id="another topic"
        ),
        pytest.param(
            lambda records: [*records[:2], replace(records[2], value_id=uuid7()), *records[3:]],
            {"altered": [THIRD]},
            id="another event in the bytes",
        ),
    ],
)
def test_every_fault_is_found_and_named_and_no_other(tamper: Tamper, findings: dict[str, list[UUID]]) -> None:
    found = compare(ENTRIES, tamper(RECORDS), {ROLLED_BACK})
    assert found
    assert found == Findings(**findings)  # type: ignore[arg-type] # the lists of ids only


def test_another_key_is_altered() -> None:
    found = compare(ENTRIES, [replace(RECORDS[0], key="i-9"), *RECORDS[1:]], set())
    assert found.altered == [FIRST]


def test_a_ledger_that_holds_what_was_rolled_back_is_refused() -> None:
    with pytest.raises(ValueError, match=str(FIRST)):
        compare(ENTRIES, RECORDS, {FIRST})


# ---- effects ---------------------------------------------------------------------------------------------------------

EFFECTS: Figures = {
    ("completed", "visual"): (3, Decimal("1.0")),
    ("defect_counts", "scratch", "minor"): (6,),
    ("defect_counts", "void", "major"): (3,),
    ("yields", "b-1"): (2, 1),
    ("assessments", "i-1"): (3, Decimal("0.1")),
    ("assessments", "i-2"): (3, Decimal("0.2")),
    ("assessments", "i-3"): (3, Decimal("0.7")),
}


def test_effects_are_the_sums_over_the_events() -> None:
    assert effects(ENTRIES) == EFFECTS


def test_a_violation_is_counted_and_alerts_once_and_an_alert_alerts() -> None:
    level = AlertLevel.CRITICAL
    said: dict[str, Any] = {
        "inspection_id": "i-1",
        "batch_id": "b-1",
        "quality_score": 9.0,
        "pass_fail": False,
        "alert_level": level,
    }
    events = [
        QualityEvent(event_type=kind, metadata={"version": "1"}, **said)
        for kind in (QualityEventType.THRESHOLD_VIOLATED, QualityEventType.ALERT_TRIGGERED)
    ]
    alerts: Figures = {("alerts", str(event.event_id)): (1,) for event in events}
    assert effects(map(entry_of, events)) == {("violations", "b-1", "CRITICAL"): (1,), **alerts}


def test_effects_do_not_depend_on_the_order_of_the_events() -> None:
    assert effects(reversed(ENTRIES)) == EFFECTS


def test_nothing_is_said_of_right_effects() -> None:
    assert compare_effects(EFFECTS, dict(EFFECTS)) == []


@pytest.mark.parametrize(
    ("row", "figures", "line"),
    [
        (("completed", "visual"), (4, Decimal("1.1")), "completed visual: 4/1.1 instead of 3/1.0"),
        (("completed", "visual"), (3, Decimal("0.9")), "completed visual: 3/0.9 instead of 3/1.0"),
        (("yields", "b-1"), (1, 1), "yields b-1: 1/1 instead of 2/1"),
        (("yields", "b-2"), (1, 0), "yields b-2: 1/0 instead of no row"),
        (("defect_counts", "void", "major"), None, "defect_counts void major: no row instead of 3"),
    ],
)
def test_a_wrong_effect_is_named(row: tuple[str, ...], figures: tuple[int | Decimal, ...] | None, line: str) -> None:
    found = {**EFFECTS, row: figures} if figures else {key: value for key, value in EFFECTS.items() if key != row}
    assert compare_effects(EFFECTS, found) == [line]


def test_a_wrong_effect_alone_is_a_finding() -> None:
    assert Findings(effects=["yields b-1: 1/1 instead of 2/1"])
