"""An event's content for people: decoded where its schema is in `avro_schema`, and never more than a page of it."""

import json
from typing import Any

from outbox.catalogue import Catalogue
from outbox.errors import OutboxError
from outbox.message import Event

LARGEST = 65_536
"""Bytes of a value that are decoded; of a larger one its first bytes are shown."""

SHOWN = 1_024
"""Bytes that are shown of a value that is not decoded."""

_MARKER = b"\xc3\x01"


def content(value: bytes | None, fingerprint: int | None, schema: str | None) -> dict[str, Any]:
    """{"format": "avro" | "json" | "text" | "hex" | "tombstone", "data": …}, and "why" where Avro's bytes are shown as
    they are.

    `schema`: the JSON of the schema with this fingerprint, if the database has it.
    """
    if value is None:
        return {"format": "tombstone", "data": None}
    if len(value) > LARGEST:
        return {**_hex(value), "why": f"it has {len(value):,} bytes; up to {LARGEST:,} are decoded"}
    if fingerprint is None:
        return _as_is(value)
    if schema is None:
        return {**_hex(value), "why": "its schema is not in avro_schema: run `outbox schemas sync`"}
    try:
        return {"format": "avro", "data": _plain(_decoded(value, fingerprint, schema))}
    except (OutboxError, ValueError, KeyError, TypeError, RecursionError) as error:  # of a schema that is none of ours
        return {**_hex(value), "why": f"it cannot be decoded: {error}"}


def _decoded(value: bytes, fingerprint: int, schema: str) -> Any:
    """By the catalogue, which takes no schema that could make bytes decode to far more than they are."""
    record = {"topic": "any", **json.loads(schema)}  # a writer in another language need not name one
    event = Catalogue([record]).decode(_MARKER + fingerprint.to_bytes(8, "little", signed=True) + value)
    return event.data if isinstance(event, Event) else event.to_avro()


def _as_is(value: bytes) -> dict[str, Any]:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return _hex(value)
    try:
        return {"format": "json", "data": _plain(json.loads(text))}
    except (ValueError, RecursionError):
        return {"format": "text", "data": text}


def _plain(data: Any) -> Any:
    """As JSON has it, numbers that it has not (NaN) as text. RecursionError for what is too deep to be printed."""
    text = json.dumps(data, indent=1, default=lambda value: value.hex(" ") if isinstance(value, bytes) else str(value))
    return json.loads(text, parse_constant=str)


def _hex(value: bytes) -> dict[str, Any]:
    return {"format": "hex", "data": value[:SHOWN].hex(" "), "bytes_left_out": max(0, len(value) - SHOWN)}
