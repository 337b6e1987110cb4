"""The generated module: current, clean, typed, and refusing at construction what must be."""

import importlib.util
import inspect
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
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
from outbox.message import Event, Message

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


def typed(*symbols: str) -> dict[str, Any]:
    """A record with these event types, which need nothing but `order_id`."""
    kind = {"type": "enum", "name": "Kind", "symbols": list(symbols)}
    fields: list[dict[str, Any]] = [{"name": "event_type", "type": kind}, {"name": "order_id", "type": "string"}]
    return order(*fields, events={symbol: {} for symbol in symbols})


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


ODD_TYPE = {"type": "enum", "name": "What", "symbols": ["IMPORT", "List", "MADE"]}
NUMBER = {"name": "number", "type": "int", "default": 1}
LONG = "a_name_that_is_longer_than_it_has_to_be"
ODD_EVENTS = order(
    {"name": "event_type", "type": ODD_TYPE},
    {"name": "event_id", "type": {"type": "string", "logicalType": "uuid"}},
    {"name": "colour", "type": ["null", {"type": "enum", "name": "Colour", "symbols": ["RED"]}], "default": None},
    {"name": "part", "type": ["null", {"type": "record", "name": "Part", "fields": [NUMBER]}], "default": None},
    {"name": "cls", "type": "string"},
    {"name": LONG, "type": {"type": "map", "values": "int"}, "default": {}},
    {"name": "parts", "type": [{"type": "array", "items": "Part"}, "null"], "default": []},
    {"name": "ratio", "type": ["null", "int", "double"], "default": None},
    {"name": "text", "type": "string", "default": ""},
    {"name": "metadata", "type": "string", "default": "no envelope: it is no map"},
    topic="odd",
    name="OddEvent",
    events={
        "IMPORT": {"needs": ["part", "colour"], "takes": [LONG, "parts"], "sets": {"ratio": 2, "text": 'a "b"'}},
        "List": {"doc": "What " * 40, "needs": ["metadata"], "sets": {"colour": "RED", "cls": "c", "ratio": 0.5}},
        "MADE": {"takes": ["metadata", "part", "colour", "text"], "sets": {"ratio": None}},
    },
)


@pytest.fixture(scope="module")
def mypy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], tuple[int, str]]:
    """mypy --strict of a file: its exit code and what it said. What the runs have in common is looked at once."""
    cache = tmp_path_factory.mktemp("mypy")
    return lambda file: run(["mypy", "--strict", "--cache-dir", str(cache), str(file)])


@pytest.mark.parametrize("found", [None, [*ODD, ODD_EVENTS]])
def test_the_module_is_clean_for_ruff_and_mypy_strict(
    tmp_path: Path, found: list[dict[str, Any]] | None, mypy: Callable[[Path], tuple[int, str]]
) -> None:
    made = tmp_path / "made.py"
    made.write_text(generate(write(tmp_path, *found) if found else FOLDER))
    for command in (["ruff", "format", "--diff"], ["ruff", "check"]):
        done = run([*command, "--config", str(ROOT / "pyproject.toml"), str(made)])
        assert done[0] == 0, done[1]
    done = mypy(made)
    assert done[0] == 0, done[1]


ABOUT = """from typing import TypedDict, assert_type
from examples.chip_quality.events import *
from outbox.message import now, uuid7

class About(TypedDict):
    inspection_id: str
    batch_id: str

class AboutChip(About):
    chip_id: str
    inspection_type: str
    status: str

about: About = {"inspection_id": "i", "batch_id": "b"}
chip: AboutChip = {**about, "chip_id": "c", "inspection_type": "visual", "status": "done"}
defect = Defect(defect_type="scratch", severity="minor", confidence=0.5, location="edge")

assert_type(InspectionEvent.inspection_completed(**chip, quality_score=0.5), InspectionEvent)
InspectionEvent.inspection_created(**chip, metadata={"a": "b"}, event_id=uuid7(), timestamp=now())
InspectionEvent.defect_detected(**chip, defects=[defect])
QualityEvent.quality_approved(**about, quality_score=1, threshold=None, defect_count=2)
QualityEvent.alert_triggered(**about, quality_score=0.1, pass_fail=False, alert_level=AlertLevel.ERROR)
SystemEvent.performance_metric(service_name="s", status="up", metrics={"p99": "5 ms"})
"""

REFUSED = {
    "InspectionEvent.inspection_completed(**chip)": 'Missing named argument "quality_score"',
    "InspectionEvent.inspection_completed(**chip, quality_score=None)": 'incompatible type "None"; expected "float"',
    "InspectionEvent.inspection_created(**chip, quality_score=0.5)": 'Unexpected keyword argument "quality_score"',
    "InspectionEvent.inspection_created(**about)": 'Missing named argument "chip_id"',
    "InspectionEvent.inspection_created(**chip, event_type='x')": 'Unexpected keyword argument "event_type"',
    "InspectionEvent.defect_detected(**chip)": 'Missing named argument "defects"',
    "InspectionEvent.defect_detected('i')": "Too many positional arguments",
    "QualityEvent.quality_approved(**about, quality_score=1, pass_fail=False)": 'keyword argument "pass_fail"',
    "QualityEvent.alert_triggered(**about, quality_score=1, pass_fail=False)": 'Missing named argument "alert_level"',
    "QualityEvent.threshold_violated(**about, quality_score=1, pass_fail=False)": 'named argument "threshold"',
    "ManufacturingEvent.lot_created(batch_id='b', part_number='p', quantity=1, status='s')": 'argument "lot_id"',
    "UserEvent.permission_granted(user_id='u', action='read')": 'Missing named argument "resource"',
    "SystemEvent.error_occurred(service_name='s', status='down')": 'Missing named argument "error_details"',
}


def test_a_type_checker_without_a_plugin_sees_what_each_event_needs(
    tmp_path: Path, mypy: Callable[[Path], tuple[int, str]]
) -> None:
    file = tmp_path / "snippet.py"
    file.write_text(ABOUT + "".join(f"{line}\n" for line in REFUSED))
    code, said = mypy(file)
    found: dict[int, str] = defaultdict(str)
    for line in said.splitlines():
        if ": error: " in line:
            found[int(line.split(":")[1])] += line
    assert code == 1
    first = ABOUT.count("\n") + 1
    assert sorted(found) == list(range(first, first + len(REFUSED))), said
    for number, (call, expected) in enumerate(REFUSED.items(), first):
        assert expected in found[number], call


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
    assert message.fingerprint == InspectionEvent.AVRO_FINGERPRINT
    assert message.type == "com.chipquality.events.inspection.DEFECT_DETECTED"
    assert message.key == "i-1"
    assert CATALOGUE.decode(framed(message)) == event


def test_all_32_types_of_the_platform_have_a_class() -> None:
    assert len(chip.EVENTS) == 5
    assert len(CATALOGUE.types) == 32
    kinds = [chip.InspectionEventType, chip.ManufacturingEventType, QualityEventType, chip.UserEventType]
    assert sum(len(kind) for kind in [*kinds, chip.SystemEventType]) == 32


def constructors() -> dict[str, Callable[..., TypedEvent]]:
    """By event type."""
    return {
        name: getattr(cls, name.rpartition(".")[2].lower())
        for cls in chip.EVENTS
        for name in CATALOGUE.types
        if name.startswith(cls.AVRO_RECORD.rpartition(".")[0])
    }


VALUES: dict[str, Any] = {
    "quantity": 5,
    "quality_score": 0.5,
    "threshold": 0.8,
    "pass_fail": False,
    "alert_level": chip.AlertLevel.ERROR,
    "defect_count": 2,
    "success": False,
    "defects": [Defect(defect_type="scratch", severity="minor", confidence=0.5, location="edge")],
    "metrics": {"p99": "5 ms"},
    "metadata": {"a": "b"},
    "event_id": UUID("01890a5d-ac96-774b-bcce-b302099a8057"),
    "timestamp": datetime(2026, 1, 2, tzinfo=UTC),
}


@pytest.mark.parametrize("name", CATALOGUE.types)
def test_each_of_the_32_types_has_a_constructor_that_asks_for_what_it_needs(name: str) -> None:
    make = constructors()[name]
    parameters = inspect.signature(make).parameters
    needed = {one: VALUES.get(one, one) for one, what in parameters.items() if what.default is inspect.Parameter.empty}
    for given in (needed, {one: VALUES.get(one, one) for one in parameters}):
        event = make(**given)
        message = CATALOGUE.encode(event)
        assert (message.type, message.id) == (name, event.to_avro()["event_id"])
        assert CATALOGUE.decode(framed(message)) == event
    for left_out in needed:
        with pytest.raises(TypeError, match=left_out):
            make(**{one: value for one, value in needed.items() if one != left_out})


def test_what_a_type_sets_is_set_and_what_it_takes_has_the_schema_s_default() -> None:
    approved = QualityEvent.quality_approved(inspection_id="i", batch_id="b", quality_score=1)
    rejected = QualityEvent.quality_rejected(inspection_id="i", batch_id="b", quality_score=0)
    assert (approved.pass_fail, rejected.pass_fail) == (True, False)
    assert (approved.threshold, approved.alert_level, approved.defect_count, approved.metadata) == (None, None, 0, {})


def test_constructors_of_odd_names_make_what_the_schema_says(tmp_path: Path) -> None:
    folder = write(tmp_path, ODD_EVENTS)
    made = module(generate(folder), tmp_path)
    catalogue = Catalogue.from_folder(folder, events=made)
    event = made.OddEvent.import_(cls_="c", part=made.Part(), colour=made.Colour.RED, parts=None)
    assert (event.ratio, event.text, getattr(event, LONG), event.parts) == (2, 'a "b"', {}, [])
    other = made.OddEvent.list_(metadata="m")
    assert (other.ratio, other.cls_, other.colour) == (0.5, "c", made.Colour.RED)
    for one in (event, other, made.OddEvent.made(cls_="c")):
        assert catalogue.decode(framed(catalogue.encode(one))) == one


def framed(message: Message) -> bytes:
    assert message.fingerprint is not None
    assert message.value is not None
    return b"\xc3\x01" + message.fingerprint.to_bytes(8, "little", signed=True) + message.value


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
    assert catalogue.decode(framed(catalogue.encode(event))) == event


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([order(name="Event"), order(name="Event", namespace="other", topic="x")], "rename one of the types"),
        ([order(name="Mapping")], "the module needs the name Mapping itself"),
        ([order({"name": "list", "type": "int"}, {"name": "list_", "type": "int"})], "rename one"),
        ([typed("A", "a")], "a's constructor a would hide a field or another one"),
        ([typed("ORDER_ID")], "ORDER_ID's constructor order_id would hide"),
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
