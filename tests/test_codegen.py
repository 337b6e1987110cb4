"""The generated module: current, clean, typed, and refusing at construction what must be."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, assert_type
from uuid import UUID

import pytest
from click.testing import CliRunner

from examples.chip_quality import events as chip
from examples.chip_quality.events import Defect, InspectionEvent, InspectionEventType, QualityEvent, QualityEventType
from outbox.__main__ import main
from outbox.catalogue import Catalogue, TypedEvent
from outbox.codegen import generate
from outbox.errors import InvalidEvent, SchemaError, UnknownEventType
from outbox.message import Event

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "schemas"
CHECKED_IN = ROOT / "examples/chip_quality/events.py"
CATALOGUE = Catalogue.from_folder(FOLDER, events=chip)


def inspection(**changes: Any) -> InspectionEvent:
    given: dict[str, Any] = {
        "event_type": InspectionEventType.DEFECT_DETECTED,
        "inspection_id": "i-1",
        "batch_id": "b-1",
        "chip_id": "c-1",
        "inspection_type": "visual",
        "status": "done",
        "defects": [Defect(defect_type="scratch", severity="minor", confidence=0.5, location="edge")],
    }
    return InspectionEvent(**{**given, **changes})


def order(*fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    head = {"type": "record", "name": "Order", "namespace": "shop", "topic": "orders"}
    return {**head, "fields": list(fields), **changes}


def write(folder: Path, *found: dict[str, Any]) -> Path:
    for number, schema in enumerate(found):
        (folder / f"{number}.avsc").write_text(json.dumps(schema))
    return folder


def module(text: str, folder: Path) -> ModuleType:
    (folder / "made.py").write_text(text)
    spec = importlib.util.spec_from_file_location("made", folder / "made.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["made"] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


LEAF = {"type": "record", "name": "Leaf", "fields": [{"name": "kind", "type": "Kind"}]}
ODD = [
    order(
        {"name": "event_id", "type": {"type": "string", "logicalType": "uuid"}},
        {"name": "class", "type": "string"},
        {"name": "datetime", "type": ["null", {"type": "long", "logicalType": "timestamp-micros"}], "default": None},
        {"name": "day", "type": {"type": "int", "logicalType": "date"}},
        {"name": "hour", "type": {"type": "int", "logicalType": "time-millis"}},
        {"name": "price", "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}},
        {"name": "kind", "type": {"type": "enum", "name": "Kind", "symbols": ["None", "title", "A"]}, "default": "A"},
        {"name": "kinds", "type": {"type": "array", "items": ["null", "Kind"]}, "default": []},
        {"name": "codes", "type": {"type": "fixed", "name": "Code", "size": 2}},
        {"name": "more", "type": ["null", "Code"], "default": None},
        {"name": "either", "type": ["int", "string"], "default": 5},
        {"name": "text", "type": "string", "default": 'say "so"'},
        {"name": "ratio", "type": "double", "default": 2, "doc": 'a "quoted"'},
        {
            "name": "tree",
            "type": {
                "type": "record",
                "name": "Node",
                "doc": "A very long text. " * 20,
                "fields": [
                    {"name": "leaf", "type": ["null", {**LEAF, "doc": "One of them."}], "default": None},
                    {"name": "by_name", "type": {"type": "map", "values": "Leaf"}},
                ],
            },
        },
    )
]


@pytest.mark.parametrize("found", [None, ODD])
def test_the_module_is_clean_for_ruff_and_mypy_strict(tmp_path: Path, found: list[dict[str, Any]] | None) -> None:
    made = tmp_path / "made.py"
    made.write_text(generate(write(tmp_path, *found) if found else FOLDER))
    for command in (["ruff", "format", "--diff"], ["ruff", "check"]):
        done = run([*command, "--config", str(ROOT / "pyproject.toml"), str(made)])
        assert done[0] == 0, done[1]
    done = run(["mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(made)])
    assert done[0] == 0, done[1]


def run(command: list[str]) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_checked_in_module_is_what_the_schemas_give() -> None:
    assert CHECKED_IN.read_text() == generate(FOLDER)
    assert generate(FOLDER) == generate(FOLDER)


def test_check_shows_what_is_stale_and_exits_1(tmp_path: Path) -> None:
    out = tmp_path / "events.py"
    runner = CliRunner()
    missing = runner.invoke(main, ["codegen", str(FOLDER), str(out), "--check"])
    assert missing.exit_code == 1
    assert not out.exists()
    assert runner.invoke(main, ["codegen", str(FOLDER), str(out)]).exit_code == 0
    assert runner.invoke(main, ["codegen", str(FOLDER), str(out), "--check"]).exit_code == 0
    out.write_text(out.read_text().replace("chip_id: str", "chip_id: int"))
    stale = runner.invoke(main, ["codegen", str(FOLDER), str(out), "--check"])
    assert stale.exit_code == 1
    assert "-    chip_id: int\n+    chip_id: str\n" in stale.output
    assert f"is stale; run: outbox codegen {FOLDER} {out}" in stale.output


def test_a_bad_folder_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["codegen", str(tmp_path), str(tmp_path / "out.py")])
    assert done.exit_code == 1
    assert "no .avsc file here" in done.output
    assert not (tmp_path / "out.py").exists()


def test_a_typed_event_makes_its_own_id_and_time() -> None:
    one, two = inspection(), inspection()
    assert one.event_id != two.event_id
    assert one.event_id.version == 7
    assert one.timestamp.tzinfo is UTC
    assert CATALOGUE.encode(one).id == one.event_id


def test_a_typed_event_comes_back_equal() -> None:
    event = inspection(metadata={"a": "b"}, quality_score=0.5)
    message = CATALOGUE.encode(event)
    assert message.value is not None
    assert message.fingerprint == InspectionEvent.AVRO_FINGERPRINT
    assert message.type == "com.chipquality.events.inspection.DEFECT_DETECTED"
    assert message.key == "i-1"
    framed = b"\xc3\x01" + message.fingerprint.to_bytes(8, "little", signed=True) + message.value
    assert CATALOGUE.decode(framed) == event


def test_all_32_types_of_the_platform_have_a_class() -> None:
    assert len(chip.EVENTS) == 5
    assert len(CATALOGUE.types) == 32
    kinds = [chip.InspectionEventType, chip.ManufacturingEventType, QualityEventType, chip.UserEventType]
    assert sum(len(kind) for kind in [*kinds, chip.SystemEventType]) == 32


def test_a_naive_datetime_is_refused_at_construction() -> None:
    with pytest.raises(
        InvalidEvent, match="InspectionEvent: field timestamp is 2026-01-02T00:00:00 without a time zone"
    ):
        inspection(timestamp=datetime(2026, 1, 2))  # noqa: DTZ001 - the mistake under test


def test_events_are_frozen_slotted_and_keyword_only() -> None:
    event = inspection()
    with pytest.raises(FrozenInstanceError):
        event.chip_id = "other"  # type: ignore[misc] # the mistake under test
    assert not hasattr(event, "__dict__")
    with pytest.raises(TypeError):
        Defect("scratch")  # type: ignore[call-arg] # the mistake under test


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chip_id": 5}, "DEFECT_DETECTED: field chip_id is int 5; give text"),
        ({"event_id": "x"}, "field event_id is str 'x'; give a UUID"),
        ({"event_type": "NOPE"}, "InspectionEvent: field event_type is str 'NOPE'; give one of: INSPECTION_CREATED"),
        ({"event_type": 5}, "field event_type is int 5; give one of"),
        ({"timestamp": "today"}, "field timestamp is str 'today'; give an aware datetime"),
        ({"defects": None}, "a nested field has the wrong type"),
        ({"defects": ["scratch"]}, "a nested field has the wrong type"),
    ],
)
def test_what_a_type_checker_would_have_said_is_found_at_encode(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidEvent) as error:
        CATALOGUE.encode(inspection(**changes))
    assert said in str(error.value)


class Stale(InspectionEvent):
    """Generated from a schema that has changed since."""

    AVRO_FINGERPRINT = 5


def test_a_class_of_another_schema_is_refused_with_the_command() -> None:
    event = Stale.from_avro(inspection().to_avro() | {"defects": []})
    with pytest.raises(UnknownEventType, match=r"Stale was generated from .*; run outbox codegen again"):
        CATALOGUE.encode(event)
    with pytest.raises(SchemaError, match="run outbox codegen again"):
        Catalogue.from_folder(FOLDER, events=[Stale])


def test_odd_names_and_types_come_back_equal(tmp_path: Path) -> None:
    folder = write(tmp_path, *ODD)
    made = module(generate(folder), tmp_path)
    catalogue = Catalogue.from_folder(folder, events=made)
    leaf = made.Leaf(kind=made.Kind.A)
    event = made.Order(
        class_="c",
        datetime_=datetime(2026, 1, 2, tzinfo=UTC),
        day=datetime(2026, 1, 2, tzinfo=UTC).date(),
        hour=datetime(2026, 1, 2, 3, tzinfo=UTC).time(),
        price=made.Decimal("1.50"),
        kinds=[made.Kind.None_, None, made.Kind.title_],
        codes=b"ab",
        tree=made.Node(leaf=leaf, by_name={"x": leaf}),
    )
    assert (event.kind, event.either, event.text, event.ratio) == (made.Kind.A, 5, 'say "so"', 2.0)
    message = catalogue.encode(event)
    assert message.value is not None
    assert message.fingerprint is not None
    framed = b"\xc3\x01" + message.fingerprint.to_bytes(8, "little", signed=True) + message.value
    assert catalogue.decode(framed) == event


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([order(name="Event"), order(name="Event", namespace="other", topic="x")], "rename one of the types"),
        ([order(name="Mapping")], "the module needs the name Mapping itself"),
        ([order({"name": "list", "type": "int"}, {"name": "list_", "type": "int"})], "rename one"),
    ],
)
def test_what_python_cannot_name_is_a_schema_error(tmp_path: Path, found: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(SchemaError, match=said):
        generate(write(tmp_path, *found))


def test_the_type_checker_sees_real_types() -> None:
    """Checked by mypy, which reads this file; at run time assert_type does nothing."""
    event = inspection()
    assert_type(event.event_id, UUID)
    assert_type(event.timestamp, datetime)
    assert_type(event.event_type, InspectionEventType)
    assert_type(event.quality_score, float | None)
    assert_type(event.defects[0].confidence, float)
    assert_type(InspectionEvent.from_avro(event.to_avro()), InspectionEvent)
    typed: TypedEvent = event
    decoded: Event | TypedEvent = typed
    if isinstance(decoded, QualityEvent):
        assert_type(decoded.pass_fail, bool)
