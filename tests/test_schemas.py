"""What the linter refuses, and the fingerprint of Avro's specification."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from outbox import schemas
from outbox.__main__ import main
from outbox.errors import SchemaError

FOLDER = Path(__file__).parents[1] / "schemas"
UUID = {"type": "string", "logicalType": "uuid"}


def order(**changes: Any) -> dict[str, Any]:
    """A schema without a problem, but for the changes."""
    fields = [{"name": "event_id", "type": UUID}, {"name": "order_id", "type": "string"}]
    good = {
        "type": "record",
        "name": "Order",
        "namespace": "shop",
        "topic": "orders",
        "key": "order_id",
        "fields": fields,
    }
    return {**good, **changes}


def field(name: str, kind: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, **more}


def problems(tmp_path: Path, *found: dict[str, Any]) -> str:
    for number, schema in enumerate(found):
        (tmp_path / f"{number}.avsc").write_text(json.dumps(schema))
    return "\n".join(map(str, schemas.lint(tmp_path)))


@pytest.mark.parametrize(
    ("schema", "crc"),
    [
        ("null", 0x63DD24E7CC258F8A),
        ("int", 0x7275D51A3F395C8F),
        ("string", 0x8F014872634503C7),
        ("boolean", 0x9F42FC78A4D4F764),
    ],
)
def test_the_fingerprint_is_avros_crc_64(schema: Any, crc: int) -> None:
    """The values of Avro's own share/test/data/schema-tests.txt, here signed."""
    signed = schemas.fingerprint(schema)
    assert -(2**63) <= signed < 2**63
    assert signed & (2**64 - 1) == crc


def test_the_fingerprint_leaves_out_topic_key_and_docs() -> None:
    bare = {key: value for key, value in order().items() if key not in ("topic", "key")}
    assert schemas.fingerprint(order(doc="changed", topic="other")) == schemas.fingerprint(bare)


def test_the_platforms_schemas_have_no_problem_and_32_event_types() -> None:
    assert schemas.lint(FOLDER) == []
    loaded = schemas.load(FOLDER)
    assert len(loaded) == 5
    assert sum(len(schemas.event_types(schema)) for schema in loaded.values()) == 32
    assert {schema["topic"] for schema in loaded.values()} == {
        f"chip-quality.{file.stem}.events" for file in FOLDER.glob("*.avsc")
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"fields": [field("tree", {"type": "record", "name": "T", "fields": [field("up", ["null", "T"])]})]},
            "shop.Order.tree.up: shop.T holds itself, to any depth",
        ),
        (
            {"fields": [field("x", {"type": "array", "items": "null"})]},
            "shop.Order.x[]: the items take no bytes",
        ),
        (
            {
                "fields": [
                    field("f", {"type": "record", "name": "E", "fields": [field("n", "null")]}),
                    field("m", {"type": "map", "values": ["null", {"type": "array", "items": "E"}]}),
                ]
            },
            "shop.Order.m[][]: the items take no bytes",
        ),
        ({"fields": [field("x", {"type": "error", "name": "E", "fields": []})]}, "error is for the messages of"),
        (
            {"fields": [field("at", "long", logicalType="timestamp-millis")]},
            "Order.at: logicalType stands beside the type",
        ),
        ({"fields": [field("at", ["null", "long"], logicalType="timestamp-millis")]}, "readers ignore it; write"),
        (
            {"fields": [field("at", {"type": "int", "logicalType": "timestamp-millis"})]},
            "on 'int' is ignored by readers",
        ),
        (
            {"fields": [field("at", {"type": "long", "logicalType": "timestamp-milis"})]},
            "did you mean timestamp-millis",
        ),
        ({"fields": [field("at", {"type": {"type": "long"}, "logicalType": "timestamp-millis"})]}, "belongs on long"),
        (
            {"fields": [field("list", {"type": "array", "items": {"type": "int", "logicalType": "uuid"}})]},
            r"Order.list[]",
        ),
        ({"topic": None}, "topic: missing; name the Kafka topic"),
        ({"topic": "a/b"}, "topic: 'a/b' is no Kafka topic name"),
        ({"topic": ".."}, "topic: '..' is no Kafka topic name"),
        ({"namespace": ""}, "namespace: missing"),
        ({"key": "nothing"}, "key: 'nothing' is no field"),
        ({"key": 5}, "key: 5 is no field"),
        ({"fields": [field("order_id", "int")]}, "key: field order_id is no string"),
        ({"fields": [field("order_id", ["null", "string"])]}, "key: field order_id is no string"),
        ({"fields": [field("event_id", "string"), field("order_id", "string")]}, "event_id: is the id of the row"),
        ({"name": "Or-der"}, "'Or-der' is no Avro name"),
        ({"namespace": "shop.2nd"}, "'2nd' is no Avro name"),
        ({"fields": [field("order id", "string")]}, "'order id' is no Avro name"),
        ({"fields": [field("x", {"type": "enum", "name": "E", "symbols": ["a-b"]})]}, "'a-b' is no Avro name"),
        ({"fields": [field("x", "int"), field("x", "int")]}, "Order.x: second field of this name"),
        ({"fields": [field("x", "strnig"), field("order_id", "string")]}, "shop.Order: UnknownType: shop.strnig"),
        ({"fields": [field("x", "int", default="a"), field("order_id", "string")]}, "Default value <a> must match"),
        ({"fields": ["order_id"]}, "each field is an object with a name and a type"),
        ({"fields": None}, "a record has a list of fields"),
        ({"fields": [field("x", {"type": "enum", "name": "E"})]}, "Order.x: an enum has a list of symbols"),
        ({"type": "enum"}, "one record at the top level"),
    ],
)
def test_a_misleading_schema_is_refused_with_place_and_remedy(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    found = problems(tmp_path, order(**changes))
    assert said in found
    assert "0.avsc" in found
    with pytest.raises(SchemaError) as error:
        schemas.load(tmp_path)
    assert said in str(error.value)


KIND = {"type": "enum", "name": "Kind", "symbols": ["ORDERED", "CANCELLED"]}
LEVEL = {"type": "enum", "name": "Level", "symbols": ["LOW"]}
FIELDS = [
    field("event_id", UUID),
    field("event_type", KIND),
    field("order_id", "string"),
    field("at", ["null", {"type": "long", "logicalType": "timestamp-millis"}], default=None),
    field("total", ["null", "double"], default=None),
    field("open", "boolean", default=True),
    field("level", ["null", LEVEL], default=None),
]
GOOD = {
    "ORDERED": {"doc": "d", "needs": ["total"], "takes": ["level"], "sets": {"open": True}},
    "CANCELLED": {"sets": {"open": False, "total": None, "level": "LOW", "order_id": "none"}, "takes": ["at"]},
}


def test_what_is_said_of_event_types_is_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    said = order(fields=FIELDS, events=GOOD)
    assert problems(tmp_path, said) == ""
    assert schemas.fingerprint(said) == schemas.fingerprint(order(fields=FIELDS))


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([], "events: an object from each symbol"),
        ({"ORDERED": {}}, 'events: nothing is said of CANCELLED; add "CANCELLED": {}'),
        ({**GOOD, "CANCELED": {}}, "events.CANCELED: no symbol of event_type; did you mean CANCELLED?"),
        ({**GOOD, "ORDERED": []}, 'events.ORDERED: an object of "doc"'),
        ({**GOOD, "ORDERED": {"need": []}}, 'events.ORDERED: an object of "doc"'),
        ({**GOOD, "ORDERED": {"needs": "total"}}, 'events.ORDERED: an object of "doc"'),
        ({**GOOD, "ORDERED": {"takes": [5]}}, 'events.ORDERED: an object of "doc"'),
        ({**GOOD, "ORDERED": {"sets": ["open"]}}, 'events.ORDERED: an object of "doc"'),
        ({**GOOD, "ORDERED": {"doc": 5}}, 'events.ORDERED: an object of "doc"'),
        ({**GOOD, "ORDERED": {"needs": ["totl"]}}, "events.ORDERED: totl is no field; did you mean total?"),
        ({**GOOD, "ORDERED": {"takes": ["order_id"]}}, "order_id has no default, so every event needs it"),
        ({**GOOD, "ORDERED": {"takes": ["event_id"]}}, "event_id is filled in for every event"),
        ({**GOOD, "ORDERED": {"sets": {"event_type": "ORDERED"}}}, "event_type is filled in for every event"),
        ({**GOOD, "ORDERED": {"needs": ["total"], "takes": ["total"]}}, "total is named twice"),
        ({**GOOD, "ORDERED": {"sets": {"open": 1}}}, "open cannot be set to 1"),
        ({**GOOD, "ORDERED": {"sets": {"open": None}}}, "open cannot be set to null"),
        ({**GOOD, "ORDERED": {"sets": {"total": True}}}, "total cannot be set to true"),
        ({**GOOD, "ORDERED": {"sets": {"level": "HIGH"}}}, 'level cannot be set to "HIGH"'),
        ({**GOOD, "ORDERED": {"sets": {"at": 5}}}, "at cannot be set to 5"),
    ],
)
def test_what_is_said_of_event_types_must_fit_the_fields(tmp_path: Path, events: Any, said: str) -> None:
    assert said in problems(tmp_path, order(fields=FIELDS, events=events))


def test_only_a_record_with_an_enum_of_event_types_says_something_of_them(tmp_path: Path) -> None:
    assert "the enum in the field event_type" in problems(tmp_path, order(events={}))


def test_two_files_cannot_claim_one_record_topic_or_event_type(tmp_path: Path) -> None:
    kind = {"type": "enum", "name": "Kind", "symbols": ["PAID"]}
    fields = [field("event_type", kind), field("order_id", "string")]
    found = problems(
        tmp_path, order(fields=fields), order(fields=fields), order(name="Other", fields=fields, topic="x")
    )
    assert "1.avsc: record: shop.Order is already in" in found
    assert "1.avsc: topic: orders is already in" in found
    assert "2.avsc: event type: shop.PAID is already in" in found


def test_what_is_no_json_is_said_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.avsc").write_text('{\n "type": "record",\n "name" "Order"}')
    (tmp_path / "b.avsc").write_bytes(b'{"a": "\xff"}')
    first, second = map(str, schemas.lint(tmp_path))
    assert "a.avsc:3: column 9: not JSON: Expecting ':' delimiter" in first
    assert "b.avsc: not UTF-8" in second


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["int", "enum", "record", "uuid", "", "a"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["type", "name", "fields", "items", "symbols", "logicalType", "key"]), inner)
    ),
    max_leaves=12,
)


@given(
    schema=st.fixed_dictionaries({"type": st.just("record"), "topic": st.just("t"), "namespace": st.just("n")}) | JSON,
    more=JSON,
)
def test_the_linter_answers_whatever_it_is_given(schema: Any, more: Any) -> None:
    if isinstance(schema, dict):
        schema = {**schema, "name": "R", "fields": [{"name": "x", "type": more}, field("event_type", KIND)]}
    list(schemas.check(schema))
    list(schemas.check(more))


def test_a_folder_without_schemas_is_a_problem(tmp_path: Path) -> None:
    assert "no .avsc file here" in problems(tmp_path)


def test_the_command_lists_the_problems_and_exits_1(tmp_path: Path) -> None:
    (tmp_path / "a.avsc").write_text(json.dumps(order(topic=None)))
    bad = CliRunner().invoke(main, ["schemas", "lint", str(tmp_path)])
    good = CliRunner().invoke(main, ["schemas", "lint", str(FOLDER)])
    assert (bad.exit_code, good.exit_code) == (1, 0)
    assert "topic: missing" in bad.output
