"""Events to bytes and back: fastavro's very bytes, every mistake named, nothing but DecodeError out of decode."""

import contextlib
import json
import struct
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from datetime import time as clock
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from fastavro import schemaless_reader
from hypothesis import given
from hypothesis import strategies as st

from examples.chip_quality import events as chip
from outbox import schemas
from outbox.catalogue import Catalogue
from outbox.errors import DecodeError, EventTooLarge, InvalidEvent, SchemaError, UnknownEventType
from outbox.message import Event, Message

FOLDER = Path(__file__).parents[1] / "schemas"
UNTYPED = Catalogue.from_folder(FOLDER)
TYPED = Catalogue.from_folder(FOLDER, events=chip)
COMPLETED = "com.chipquality.events.inspection.INSPECTION_COMPLETED"
ID = UUID("01890a5d-ac96-774b-bcce-b302099a8057")
AT = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
DEFECT = {"defect_type": "scratch", "severity": "minor", "confidence": 0.5, "location": "edge"}
INSPECTION: dict[str, Any] = {
    "inspection_id": "i-1",
    "batch_id": "b-1",
    "chip_id": "c-1",
    "inspection_type": "visual",
    "status": "done",
    "quality_score": 0.97,
    "defects": [DEFECT],
}


def frame(message: Message) -> bytes:
    """What the relay makes of a row: C3 01, the fingerprint in little-endian, the bare bytes."""
    assert message.value is not None
    assert message.fingerprint is not None
    return b"\xc3\x01" + message.fingerprint.to_bytes(8, "little", signed=True) + message.value


def encode(data: Any, **more: Any) -> Message:
    return UNTYPED.encode(Event(COMPLETED, data, **more))


def order(*fields: dict[str, Any], key: str | None = "order_id", name: str = "Order") -> dict[str, Any]:
    schema = {"type": "record", "name": name, "namespace": "shop", "topic": "orders"}
    own = [{"name": "order_id", "type": "string"}, *fields]
    return {**schema, "fields": own, **({"key": key} if key else {})}


# --- what encode makes


def test_a_message_is_the_whole_row() -> None:
    message = encode({**INSPECTION, "event_id": str(ID).upper(), "timestamp": AT}, headers={"trace": "1"})
    assert message.id == ID
    assert message.type == COMPLETED
    assert (message.topic, message.key) == ("chip-quality.inspection.events", "i-1")
    assert message.headers == {"trace": "1"}
    assert message.fingerprint in UNTYPED.fingerprints


def test_what_the_envelope_needs_is_filled_in() -> None:
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    message = encode({key: INSPECTION[key] for key in INSPECTION if key not in ("quality_score", "defects")})
    event = UNTYPED.decode(frame(message))
    assert isinstance(event, Event)
    assert event.id == event.data["event_id"] == message.id
    assert message.id.version == 7
    assert event.data["event_type"] == "INSPECTION_COMPLETED"
    assert before <= event.data["timestamp"] <= datetime.now(UTC)
    assert (event.data["metadata"], event.data["quality_score"], event.data["defects"]) == ({}, None, [])


def test_the_id_key_and_topic_of_an_event_go_before_those_of_its_schema() -> None:
    message = encode(INSPECTION, id=ID, key="other", topic="elsewhere")
    assert (message.id, message.key, message.topic) == (ID, "other", "elsewhere")
    decoded = UNTYPED.decode(frame(message))
    assert isinstance(decoded, Event)
    assert decoded.id == ID


def test_an_event_is_not_changed_by_encoding_it() -> None:
    data = dict(INSPECTION)
    encode(data)
    assert data == INSPECTION


def test_quality_assessed_of_two_records_stays_two_types() -> None:
    common = {"inspection_id": "i", "batch_id": "b", "quality_score": 1}
    one = TYPED.encode(Event("com.chipquality.events.quality.QUALITY_ASSESSED", {**common, "pass_fail": True}))
    two = TYPED.encode(Event("com.chipquality.events.inspection.QUALITY_ASSESSED", INSPECTION))
    assert isinstance(TYPED.decode(frame(one)), chip.QualityEvent)
    assert isinstance(TYPED.decode(frame(two)), chip.InspectionEvent)


def test_a_record_without_envelope_or_key_has_its_own_name_as_type_and_a_fresh_id() -> None:
    catalogue = Catalogue([order(key=None)])
    message = catalogue.encode(Event("shop.Order", {"order_id": "1"}))
    assert (message.type, message.key, message.id.version) == ("shop.Order", None, 7)
    assert catalogue.encode(Event("shop.Order", {"order_id": "1"}, id=ID)).id == ID
    assert catalogue.types == ("shop.Order",)


def test_a_key_that_is_a_uuid_becomes_its_text() -> None:
    schema = order({"name": "cart", "type": {"type": "string", "logicalType": "uuid"}}, key="cart")
    assert Catalogue([schema]).encode(Event("shop.Order", {"order_id": "1", "cart": ID})).key == str(ID)


def test_schema_and_subject_are_those_of_the_fingerprint() -> None:
    for fingerprint in UNTYPED.fingerprints:
        schema = json.loads(UNTYPED.schema_json(fingerprint))
        assert schemas.fingerprint(schema) == fingerprint
        assert UNTYPED.subject(fingerprint) == f"{schema['topic']}-value"
    with pytest.raises(SchemaError, match="no schema with the fingerprint 0000000000000001"):
        UNTYPED.schema_json(1)


# --- bad input

BAD_FIELDS: list[tuple[str, Any, str]] = [
    (
        "timestamp",
        datetime(2026, 1, 2),  # noqa: DTZ001 - the mistake under test
        "timestamp is datetime datetime.datetime(2026, 1, 2, 0, 0); give an aware datetime",
    ),
    ("timestamp", 1_700_000_000, "timestamp is int 1700000000; give an aware datetime"),
    ("timestamp", "2026-01-02", "timestamp is str '2026-01-02'; give an aware datetime"),
    ("event_id", "not-a-uuid", "event_id is str 'not-a-uuid'; give a UUID"),
    ("event_id", ID.hex, "event_id is str '01890a5d"),
    ("event_id", f"{{{ID}}}", "event_id is str '{01890a5d"),
    ("event_id", None, "event_id is null; give a UUID"),
    ("event_type", "INSPECTION_FAILED", "event_type is str 'INSPECTION_FAILED'; leave it out"),
    ("chip_id", None, "chip_id is null; give text"),
    ("chip_id", 5, "chip_id is int 5; give text"),
    ("chip_id", b"c", "chip_id is bytes b'c'; give text"),
    ("chip_id", "a\ud800", "can't encode character '\\ud800' in position 1"),
    ("inspection_id", 5, "inspection_id is int 5; give text"),
    ("inspection_id", "a\0b", "the key 'a\\x00b' holds a NUL"),
    ("quality_score", "0.9", "quality_score is str '0.9'; give a number"),
    ("quality_score", True, "quality_score is bool True; give a number"),
    ("quality_score", 10**400, "give a number (float) (int too large"),
    ("metadata", {"a": 1}, "metadata['a'] is int 1; give text"),
    ("metadata", {1: "a"}, "metadata[key 1] is int 1; give text"),
    ("metadata", [("a", "b")], "metadata is list"),
    ("defects", None, "defects is null; give a list"),
    ("defects", "abc", "defects is str 'abc'; give a list"),
    ("defects", [DEFECT, {**DEFECT, "confidence": "high"}], "defects[1].confidence is str 'high'; give a number"),
    ("defects", [DEFECT, {"defect_type": "x"}], "defects[1].severity is missing"),
    ("defects", [{**DEFECT, "colour": "red"}], "defects[0].colour is not in the schema; remove it"),
    ("defects", ["scratch"], "defects[0] is str 'scratch'; give an object"),
    ("chip_ids", "c", "chip_ids is not in the schema; did you mean chip_id?"),
]


@pytest.mark.parametrize(("name", "value", "said"), BAD_FIELDS)
def test_a_wrong_field_is_named_with_type_and_remedy(name: str, value: Any, said: str) -> None:
    with pytest.raises(InvalidEvent) as error:
        encode({**INSPECTION, name: value})
    assert said in str(error.value)
    assert str(error.value).startswith(COMPLETED)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("int", 2**31, "is int 2147483648; give a whole number (int) of 32 bits"),
        ("int", -(2**31) - 1, "of 32 bits"),
        ("long", 2**63, "of 64 bits"),
        ("int", True, "is bool True; give a whole number"),
        ("long", False, "is bool False; give a whole number"),
        ("int", 1.0, "is float 1.0; give a whole number"),
        ("boolean", 1, "is int 1; give True or False"),
        ("float", 1e300, "is float 1e+300; give a number (float) of 32 bits"),
        ("bytes", "text", "is str 'text'; give bytes"),
        ("null", 0, "is int 0; give null"),
        ({"type": "fixed", "name": "F", "size": 2}, b"abc", "give exactly 2 bytes"),
        ({"type": "enum", "name": "E", "symbols": ["A", "B"]}, "C", "is str 'C'; give one of: A, B"),
        ({"type": "enum", "name": "E", "symbols": ["A", "B"]}, 0, "is int 0; give one of: A, B"),
        ({"type": "int", "logicalType": "date"}, AT, "is datetime datetime.datetime(2026"),
        ({"type": "int", "logicalType": "date"}, 5, "is int 5; give a date"),
        ({"type": "bytes", "logicalType": "decimal", "precision": 3, "scale": 1}, Decimal("1.23"), "Scale provided"),
        ({"type": "long", "logicalType": "local-timestamp-millis"}, AT, "give a naive datetime"),
        (["null", "int", "string"], 1.5, "give null or a whole number (int) of 32 bits or text (str)"),
        (
            ["null", {"type": "long", "logicalType": "timestamp-millis"}],
            AT.replace(tzinfo=None),
            "give an aware datetime",
        ),
        ({"type": "array", "items": "string"}, ("string", 5), "x[1] is int 5"),
    ],
)
def test_a_wrong_value_of_every_kind_is_named(kind: Any, value: Any, said: str) -> None:
    catalogue = Catalogue([order({"name": "x", "type": kind})])
    with pytest.raises(InvalidEvent) as error:
        catalogue.encode(Event("shop.Order", {"order_id": "1", "x": value}))
    assert str(error.value).startswith("shop.Order: field x")
    assert said in str(error.value)


UUID_TYPE = {"type": "string", "logicalType": "uuid"}
STAMP = {"type": "long", "logicalType": "timestamp-micros"}
PART = {"type": "record", "name": "Part", "fields": [{"name": "n", "type": "int"}, {"name": "id", "type": UUID_TYPE}]}


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ({"type": "array", "items": "int"}, [1, 1.5], "x[1] is float 1.5"),
        ({"type": "array", "items": "int"}, b"ab", "x is bytes b'ab'; give a list"),
        ({"type": "array", "items": "int"}, {1}, "x is set {1}; give a list"),
        ({"type": "array", "items": "string"}, "abc", "x is str 'abc'; give a list"),
        ({"type": "map", "values": "boolean"}, {"a": True, "b": 1}, "x['b'] is int 1"),
        (PART, {"n": 2**31, "id": ID}, "x.n is int 2147483648"),
        (PART, {"n": 1, "id": "x"}, "x.id is str 'x'; give a UUID"),
        (PART, None, "x is null; give an object"),
        ({"type": "array", "items": {"type": "map", "values": PART}}, [{"a": {"n": True, "id": ID}}], "x[0]['a'].n is"),
        (["null", PART], {"n": 1, "id": "x"}, "x.id is str 'x'"),
        (["null", {"type": "array", "items": STAMP}], [AT, AT.replace(tzinfo=None)], "x[1] is datetime"),
        (["null", UUID_TYPE], "x", "x is str 'x'; give a UUID"),
        (["null", "float"], 1e300, "x is float 1e+300"),
        (["null", "string", STAMP], AT.replace(tzinfo=None), "give null or text (str) or an aware datetime"),
        (["null", "string", STAMP], 5, "give null or text (str) or an aware datetime"),
        (["int", PART], {"n": 1, "id": "x"}, "give a whole number (int) of 32 bits or an object"),
    ],
)
def test_what_fastavro_would_write_wrongly_is_refused_at_any_depth(kind: Any, value: Any, said: str) -> None:
    catalogue = Catalogue([order({"name": "x", "type": kind})])
    with pytest.raises(InvalidEvent) as error:
        catalogue.encode(Event("shop.Order", {"order_id": "1", "x": value}))
    assert said in str(error.value)


@pytest.mark.parametrize("name", [name for name in INSPECTION if name not in ("quality_score", "defects")])
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(InvalidEvent, match=f"{COMPLETED}: field {name} is missing and has no default"):
        encode({key: value for key, value in INSPECTION.items() if key != name})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"key": 5}, "the key is int 5; give text"),
        ({"key": "\ud800"}, "lone surrogate"),
        ({"topic": "a b"}, "the topic 'a b' is no Kafka topic name"),
        ({"topic": ""}, "the topic '' is no Kafka topic name"),
        ({"headers": {"a": 1}}, "header 'a' is int 1"),
        ({"headers": {"ce_id": "1"}}, "header ce_id is set by the relay"),
        ({"headers": {"a": "\0"}}, "holds a NUL"),
        ({"id": "5"}, "the id is str '5'; give a UUID"),
    ],
)
def test_a_wrong_envelope_is_named(more: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidEvent) as error:
        encode(INSPECTION, **more)
    assert said in str(error.value)
    assert COMPLETED in str(error.value)


def test_two_ids_that_differ_are_refused() -> None:
    with pytest.raises(InvalidEvent, match="give one of them"):
        encode({**INSPECTION, "event_id": ID}, id=UUID(int=5))
    assert encode({**INSPECTION, "event_id": str(ID)}, id=ID).id == ID


def test_data_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(InvalidEvent, match="the data is list"):
        encode([1])


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("com.chipquality.events.inspection.INSPECTION_COMPLETE", COMPLETED),
        ("INSPECTION_COMPLETED", COMPLETED),
        ("zzz", "the catalogue has 32 types"),
        (None, "the catalogue has 32 types"),
    ],
)
def test_an_unknown_type_is_named_with_the_nearest(name: Any, near: str) -> None:
    with pytest.raises(UnknownEventType) as error:
        UNTYPED.encode(Event(name, {}))
    assert near in str(error.value)
    assert repr(name) in str(error.value)


def test_what_is_no_event_is_refused() -> None:
    with pytest.raises(UnknownEventType, match="is no event; give an Event"):
        UNTYPED.encode({"event_type": "x"})  # type: ignore[arg-type] # the mistake under test


def test_an_event_over_the_limit_is_refused_with_both_sizes_and_its_parts() -> None:
    event = Event(COMPLETED, {**INSPECTION, "chip_id": "x" * 2_000}, key="\u00e9", headers={"a": "\u00e9"})
    value = len(UNTYPED.encode(event).value or b"")
    size = 512 + len(COMPLETED) + value + 2 + (10 + 1 + 2)
    assert UNTYPED.encode(event, max_bytes=size).key == "\u00e9"
    with pytest.raises(EventTooLarge) as error:
        UNTYPED.encode(event, max_bytes=size - 1)
    said = f"{COMPLETED}: a record of {size:,} bytes (value {value:,}, key 2, headers 13), more than the limit of"
    assert str(error.value).startswith(f"{said} {size - 1:,};")
    for large in ({"key": "k" * 1_048_000}, {"headers": {"h": "x" * 1_048_000}}):
        with pytest.raises(EventTooLarge, match="more than the limit of 1,048,588"):
            encode(INSPECTION, **large)


# --- the bytes are Avro's

SCALARS = st.text(st.characters(exclude_categories=["Cs"]))
KEYS = SCALARS.filter(lambda text: "\0" not in text)
DEFECTS = st.fixed_dictionaries(
    {"defect_type": SCALARS, "severity": SCALARS, "confidence": st.floats(allow_nan=False), "location": SCALARS}
)
INSTANTS = st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=-5, minutes=-30))]))
INSPECTIONS = st.fixed_dictionaries(
    {
        "event_id": st.uuids(),
        "timestamp": INSTANTS,
        "metadata": st.dictionaries(SCALARS, SCALARS),
        "inspection_id": KEYS,
        "batch_id": SCALARS,
        "chip_id": SCALARS,
        "inspection_type": SCALARS,
        "status": SCALARS,
        "quality_score": st.none() | st.floats(allow_nan=False),
        "defects": st.lists(DEFECTS, max_size=3),
    }
)


@given(data=INSPECTIONS)
def test_what_was_written_is_read(data: dict[str, Any]) -> None:
    """Untyped and typed, through the frame; a timestamp keeps its milliseconds."""
    message = encode(data)
    event, typed = UNTYPED.decode(frame(message)), TYPED.decode(frame(message))
    assert isinstance(event, Event)
    assert isinstance(typed, chip.InspectionEvent)
    at = event.data["timestamp"]
    assert timedelta(0) <= data["timestamp"] - at < timedelta(milliseconds=1)
    assert event.data == {**data, "timestamp": at, "event_type": "INSPECTION_COMPLETED"}
    assert (event.type, event.key, event.id) == (message.type, data["inspection_id"], data["event_id"])
    assert TYPED.encode(typed) == TYPED.encode(event) == message


EVERY_KIND = Catalogue(
    [
        order(
            {"name": "int", "type": "int"},
            {"name": "long", "type": "long"},
            {"name": "float", "type": "float"},
            {"name": "double", "type": "double"},
            {"name": "boolean", "type": "boolean"},
            {"name": "bytes", "type": "bytes"},
            {"name": "fixed", "type": {"type": "fixed", "name": "F", "size": 3}},
            {"name": "again", "type": "F"},
            {"name": "enum", "type": {"type": "enum", "name": "E", "symbols": ["A", "B"]}},
            {"name": "union", "type": ["int", "null", "string", {"type": "array", "items": "E"}]},
            {"name": "last_null", "type": ["string", "null"]},
            {"name": "map", "type": {"type": "map", "values": {"type": "array", "items": ["null", "double"]}}},
            {"name": "micros", "type": {"type": "long", "logicalType": "timestamp-micros"}},
            {"name": "local", "type": {"type": "long", "logicalType": "local-timestamp-micros"}},
            {"name": "date", "type": {"type": "int", "logicalType": "date"}},
            {"name": "time", "type": {"type": "long", "logicalType": "time-micros"}},
            {"name": "decimal", "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}},
            {
                "name": "part",
                "type": {"type": "record", "name": "P", "fields": [{"name": "of", "type": ["null", "F"]}]},
            },
        )
    ]
)


@given(
    data=st.fixed_dictionaries(
        {
            "order_id": KEYS,
            "int": st.integers(-(2**31), 2**31 - 1),
            "long": st.integers(-(2**63), 2**63 - 1),
            "float": st.floats(width=32, allow_nan=False),
            "double": st.floats(allow_nan=False),
            "boolean": st.booleans(),
            "bytes": st.binary(),
            "fixed": st.binary(min_size=3, max_size=3),
            "again": st.binary(min_size=3, max_size=3),
            "enum": st.sampled_from(["A", "B"]),
            "union": st.none() | st.integers(-5, 5) | SCALARS | st.lists(st.sampled_from(["A", "B"])),
            "last_null": st.none() | SCALARS,
            "map": st.dictionaries(SCALARS, st.lists(st.none() | st.floats(allow_nan=False))),
            "micros": INSTANTS,
            "local": st.datetimes(),
            "date": st.dates(),
            "time": st.times(),
            "decimal": st.decimals(-9999, 9999, places=2),
            "part": st.fixed_dictionaries({"of": st.none() | st.binary(min_size=3, max_size=3)}),
        }
    )
)
def test_what_fits_is_written_and_read_for_every_kind_of_type(data: dict[str, Any]) -> None:
    event = EVERY_KIND.decode(frame(EVERY_KIND.encode(Event("shop.Order", data))))
    assert isinstance(event, Event)
    assert event.data == data


@pytest.mark.parametrize(
    ("kind", "given", "read"),
    [
        ({"type": "int", "logicalType": "date"}, 0, date(1970, 1, 1)),
        ({"type": "int", "logicalType": "time-millis"}, 1_000, clock(0, 0, 1)),
        ({"type": "long", "logicalType": "timestamp-millis"}, 0, datetime(1970, 1, 1, tzinfo=UTC)),
        ({"type": "string", "logicalType": "uuid"}, str(ID), ID),
        ("bytes", "\u00ff", b"\xff"),
        (["null", "int"], None, None),
        ({"type": "array", "items": "int"}, [1], [1]),
        ({"type": "record", "name": "N", "fields": [{"name": "a", "type": "int", "default": 3}]}, {}, {"a": 3}),
        ({"type": "enum", "name": "E", "symbols": ["A", "B"]}, "B", "B"),
        ("double", 1, 1.0),
    ],
)
def test_a_default_is_written_as_its_json_says(kind: Any, given: Any, read: Any) -> None:
    catalogue = Catalogue([order({"name": "x", "type": kind, "default": given})])
    event = catalogue.decode(frame(catalogue.encode(Event("shop.Order", {"order_id": "1"}))))
    assert isinstance(event, Event)
    assert event.data["x"] == read


def test_a_default_outside_its_type_is_a_schema_error() -> None:
    with pytest.raises(SchemaError, match=r"shop.Order: the default of field x is int 4294967296; give"):
        Catalogue([order({"name": "x", "type": "int", "default": 2**32})])


@pytest.mark.parametrize(
    ("kind", "default"),
    [
        ({"type": "array", "items": "int"}, [1, 2**31]),
        ({"type": "enum", "name": "E", "symbols": ["A"]}, "B"),
        ({"type": "record", "name": "N", "fields": [{"name": "a", "type": "int"}]}, {"b": 1}),
    ],
)
def test_a_default_that_does_not_fit_inside_is_a_schema_error(kind: Any, default: Any) -> None:
    with pytest.raises(SchemaError, match=r"shop\.Order: the default of field x"):
        Catalogue([order({"name": "x", "type": kind, "default": default})])


def test_logical_types_are_seen_by_a_reader() -> None:
    """Read with the schema as stored in avro_schema, by fastavro alone: UUID and aware datetime come out."""
    message = encode({**INSPECTION, "event_id": ID, "timestamp": AT})
    assert message.fingerprint is not None
    schema = json.loads(UNTYPED.schema_json(message.fingerprint))
    read: Any = schemaless_reader(BytesIO(message.value or b""), schema, None)
    assert (read["event_id"], read["timestamp"]) == (ID, AT)


# --- decode


def test_the_single_object_frame_is_that_of_the_specification() -> None:
    """Marker C3 01, then the CRC-64 in little-endian: https://avro.apache.org/docs/1.12.0/specification/#single-object-encoding-specification"""
    message = encode(INSPECTION)
    framed = frame(message)
    assert framed[:2] == b"\xc3\x01"
    assert struct.unpack("<q", framed[2:10]) == (message.fingerprint,)
    assert framed[10:] == message.value


GOOD = frame(encode({**INSPECTION, "event_id": ID, "timestamp": AT}))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"", "0 bytes; a single-object frame has at least 10"),
        (GOOD[:9], "9 bytes; a single-object frame"),
        (b"\x00\x00\x00\x00\x05" + GOOD, "starts with 00 00 instead of C3 01: the Confluent frame"),
        (b"\xc3\x02" + GOOD[2:], "starts with C3 02 instead of C3 01"),
        (b"\xc3\x01" + bytes(8) + GOOD[10:], "no schema with the fingerprint 0000000000000000 is known here"),
        (GOOD[:-3], "do not fit the schema"),
        (GOOD[:10], "do not fit the schema"),
        (GOOD + b"\x00", "1 bytes too many after the event"),
        (GOOD.replace(str(ID).encode(), b"x" * 36), "badly formed"),
        (None, "a tombstone has no event"),
    ],
)
@pytest.mark.parametrize("catalogue", [UNTYPED, TYPED])
def test_what_is_no_event_is_a_decode_error(catalogue: Catalogue, value: Any, said: str) -> None:
    with pytest.raises(DecodeError) as error:
        catalogue.decode(value)
    assert said in str(error.value)


FINGERPRINTS = st.sampled_from(UNTYPED.fingerprints).map(lambda number: number.to_bytes(8, "little", signed=True))


@given(fingerprint=FINGERPRINTS, rest=st.binary(max_size=200))
def test_decode_raises_nothing_but_decode_error_for_random_records(fingerprint: bytes, rest: bytes) -> None:
    decode_or_refuse(b"\xc3\x01" + fingerprint + rest)


@given(value=st.binary(max_size=30))
def test_decode_raises_nothing_but_decode_error_for_random_bytes(value: bytes) -> None:
    decode_or_refuse(value)


@given(place=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255))
def test_decode_raises_nothing_but_decode_error_for_a_flipped_byte(place: int, byte: int) -> None:
    decode_or_refuse(GOOD[:place] + bytes([byte]) + GOOD[place + 1 :])


@given(st.integers(0, len(GOOD)), st.integers(0, len(GOOD)), st.binary(max_size=20))
def test_decode_raises_nothing_but_decode_error_for_what_was_cut_filled_or_doubled(
    start: int, end: int, filling: bytes
) -> None:
    decode_or_refuse(GOOD[:start] + filling + GOOD[end:])


def decode_or_refuse(value: bytes) -> None:
    for catalogue in (UNTYPED, TYPED):
        with contextlib.suppress(DecodeError):
            catalogue.decode(value)


# --- schemas of other writers

WRITER = order({"name": "amount", "type": "int"}, {"name": "gone", "type": "string"})
READER = order({"name": "amount", "type": "long"}, {"name": "note", "type": ["null", "string"], "default": None})


def written() -> tuple[int, bytes]:
    message = Catalogue([WRITER]).encode(Event("shop.Order", {"order_id": "1", "amount": 5, "gone": "x"}))
    return message.fingerprint or 0, frame(message)


def resolving(answer: Callable[[int], str | None]) -> Catalogue:
    return Catalogue([READER], resolver=answer)


def test_an_event_of_another_version_is_read_as_ours_and_its_schema_asked_for_once() -> None:
    fingerprint, value = written()
    asked: list[int] = []

    def resolver(number: int) -> str:
        asked.append(number)
        return json.dumps(WRITER)

    catalogue = resolving(resolver)
    for _ in range(2):
        event = catalogue.decode(value)
        assert isinstance(event, Event)
        assert event.data == {"order_id": "1", "amount": 5, "note": None}
        assert (event.type, event.key, event.topic) == ("shop.Order", "1", "orders")
    assert asked == [fingerprint]


def test_a_learned_schema_needs_no_resolver() -> None:
    fingerprint, value = written()
    catalogue = Catalogue([READER])
    assert catalogue.learn(json.dumps(WRITER)) == fingerprint
    assert isinstance(catalogue.decode(value), Event)


def test_a_writers_schema_that_could_end_the_process_is_refused() -> None:
    node = {"type": "record", "name": "Node", "fields": [{"name": "up", "type": ["null", "Node"]}]}
    with pytest.raises(SchemaError, match=r"shop\.Order\.tree\.up: shop\.Node holds itself"):
        Catalogue([READER]).learn(json.dumps(order({"name": "tree", "type": node})))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "no schema with the fingerprint"),
        ("{", "cannot be used: not an Avro schema"),
        ("5", "cannot be used: not an Avro schema"),
        (json.dumps(order(name="Other")), "no record shop.Other in this catalogue"),
        (json.dumps(READER), "the resolver gave schema"),
    ],
)
def test_a_writers_schema_that_is_no_help_is_a_decode_error(answer: str | None, said: str) -> None:
    with pytest.raises(DecodeError, match=said):
        resolving(lambda _: answer).decode(written()[1])


def test_a_writers_schema_that_does_not_resolve_is_a_decode_error() -> None:
    changed = order({"name": "amount", "type": "string"})
    message = Catalogue([changed]).encode(Event("shop.Order", {"order_id": "1", "amount": "5"}))
    with pytest.raises(DecodeError, match=r"shop\.Order: .* do not fit the schema"):
        resolving(lambda _: json.dumps(changed)).decode(frame(message))


def test_trouble_of_the_resolver_itself_passes_through() -> None:
    def away(_: int) -> str:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        resolving(away).decode(written()[1])
