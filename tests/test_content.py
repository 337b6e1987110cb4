"""An event's content for people: decoded where it can be, a page of it at most, and never an error."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from outbox.catalogue import Catalogue
from outbox.message import Event
from relay.content import LARGEST, SHOWN, content

AT = {"type": "long", "logicalType": "timestamp-millis"}
SCHEMA: dict[str, Any] = {
    "type": "record",
    "name": "Order",
    "namespace": "shop",
    "topic": "orders",
    "fields": [{"name": "note", "type": "string"}, {"name": "lines", "type": {"type": "array", "items": "int"}}],
}
MESSAGE = Catalogue([SCHEMA]).encode(Event("shop.Order", {"note": "für Åsa", "lines": [1, 2]}, id=uuid4()))


def test_avro_is_read_by_the_schema_that_its_writer_has_put_into_the_database() -> None:
    shown = content(MESSAGE.value, MESSAGE.fingerprint, json.dumps(SCHEMA))
    assert shown == {"format": "avro", "data": {"note": "für Åsa", "lines": [1, 2]}}


@pytest.mark.parametrize("depth", [100, 900, *range(930, 1_000, 10), 5_000])
def test_what_is_nested_however_deeply_can_be_printed(depth: int) -> None:
    shown = content(b"[" * depth + b"]" * depth, None, None)
    assert shown["format"] == "json" if depth < 500 else shown["format"] in ("json", "text")
    assert json.dumps({"content": shown}, indent=2)


def test_what_json_has_no_word_for_is_text() -> None:
    fields = [{"name": "x", "type": "double"}, {"name": "b", "type": "bytes"}, {"name": "at", "type": AT}]
    schema = {**SCHEMA, "fields": fields}
    event = Event("shop.Order", {"x": math.nan, "b": b"\x00\xff", "at": datetime(2026, 1, 2, tzinfo=UTC)})
    message = Catalogue([schema]).encode(event)
    shown = content(message.value, message.fingerprint, json.dumps(schema))
    assert shown["data"] == {"x": "NaN", "b": "00 ff", "at": "2026-01-02 00:00:00+00:00"}


def test_a_schema_of_another_language_s_writer_need_not_name_a_topic() -> None:
    bare = {name: value for name, value in SCHEMA.items() if name != "topic"}
    assert content(MESSAGE.value, MESSAGE.fingerprint, json.dumps(bare))["format"] == "avro"


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parent.parent / "schemas").glob("*.avsc")), ids=lambda p: p.stem
)
def test_every_schema_of_the_example_is_one_that_can_be_read_with(file: Path) -> None:
    schema = file.read_text()
    [fingerprint] = Catalogue([json.loads(schema)]).fingerprints
    assert "cannot be decoded" in content(b"", fingerprint, schema)["why"], "no bytes are no event"


@pytest.mark.parametrize(
    ("value", "schema", "why"),
    [
        (b"\xff\xff", json.dumps(SCHEMA), "cannot be decoded"),
        (MESSAGE.value, None, "not in avro_schema"),
        (MESSAGE.value, "{", "cannot be decoded"),
        (MESSAGE.value, "[]", "cannot be decoded"),
        (MESSAGE.value, '"int"', "cannot be decoded"),
        (MESSAGE.value, '{"type": "record"}', "cannot be decoded"),
        (b"x" * (LARGEST + 1), json.dumps(SCHEMA), "65,537 bytes"),
    ],
)
def test_avro_that_cannot_be_read_is_shown_as_bytes_with_the_reason(value: bytes, schema: str | None, why: str) -> None:
    shown = content(value, MESSAGE.fingerprint, schema)
    assert shown["format"] == "hex"
    assert why in shown["why"]
    assert len(bytes.fromhex(shown["data"])) + shown["bytes_left_out"] == len(value)
    assert len(bytes.fromhex(shown["data"])) <= SHOWN


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, {"format": "tombstone", "data": None}),
        (b'{"a": [1, null]}', {"format": "json", "data": {"a": [1, None]}}),
        (b'[NaN, -Infinity, "Infinity"]', {"format": "json", "data": ["NaN", "-Infinity", "Infinity"]}),
        (b"plain", {"format": "text", "data": "plain"}),
        (b"[" * 50_000, {"format": "text", "data": "[" * 50_000}),
        (b"\xff\x00", {"format": "hex", "data": "ff 00", "bytes_left_out": 0}),
    ],
)
def test_other_bytes_are_json_text_or_shown_as_they_are(value: bytes | None, shown: dict[str, Any]) -> None:
    assert content(value, None, None) == shown
