"""The catalogue: .avsc files → encode(event) → Message, decode(bytes) → event.

Every mistake in an event is found by `encode`, before anything is sent to the database, and named with its field.
"""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Protocol, Self
from uuid import UUID

from fastavro import parse_schema, schemaless_reader, schemaless_writer

from outbox import schemas
from outbox.checks import Check, compile_check, faults
from outbox.errors import DecodeError, EventTooLarge, InvalidEvent, SchemaError, UnknownEventType, show
from outbox.headers import NONE, fault, is_storable
from outbox.message import Event, Message, uuid7

MAX_BYTES = 1_048_588
"""Kafka's default limit of a record batch, which holds one event at least: `max.message.bytes` of a topic."""

# What Kafka counts beside value, key, type and the event's own headers, in bytes: a batch's head (61), the parts of a
# record (at most 30), the frame (10), and the relay's headers (at most 150, and the source, /outbox/<name>, 208). An
# event that fits is never too large for Kafka; one that does not is less than this away from what Kafka would take.
_AROUND = 512

_FRAME = struct.Struct("<2sq")  # single-object encoding: the marker, and the schema's fingerprint, little-endian
_MARKER = b"\xc3\x01"


class TypedEvent(Protocol):
    """What `outbox codegen` makes of a record: a frozen dataclass that knows its schema."""

    AVRO_RECORD: ClassVar[str]
    AVRO_FINGERPRINT: ClassVar[int]

    def to_avro(self) -> dict[str, Any]:
        """The fields by name, as `Catalogue.encode` takes them."""
        ...

    @classmethod
    def from_avro(cls, data: Mapping[str, Any]) -> Self:
        """The event out of the fields that Avro's reader gives."""
        ...


Resolver = Callable[[int], str | None]
"""Fingerprint → the JSON of the writer's schema (a row of avro_schema), or None where there is none."""


@dataclass(frozen=True, slots=True)
class _Record:
    """One schema, ready to use."""

    name: str
    topic: str
    key: str | None
    key_default: Any
    fingerprint: int
    json: str
    parsed: Any
    expanded: Any
    check: Check | None
    types: Mapping[str, str]  # enum symbol → event type; {"": name} without an event_type enum
    fields: frozenset[str]
    stamped: bool  # it has a `timestamp` that is one


class Catalogue:
    """The schemas of a service. Immutable but for what it learns about the schemas of other writers; thread-safe."""

    def __init__(self, records: Iterable[Mapping[str, Any]], *, resolver: Resolver | None = None) -> None:
        """`records`: the JSON of .avsc files that `schemas.lint` passes. SchemaError where a default does not fit."""
        self._records: dict[str, _Record] = {}
        self._by_type: dict[str, tuple[_Record, Mapping[str, Any]]] = {}
        self._by_fingerprint: dict[int, _Record] = {}
        self._learned: dict[int, tuple[Any, _Record]] = {}
        self._classes: dict[str, type[TypedEvent]] = {}
        self._resolver = resolver
        for schema in records:
            self._add(_record(dict(schema)))

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        events: ModuleType | Iterable[type[TypedEvent]] = (),
        resolver: Resolver | None = None,
    ) -> Self:
        """The catalogue of all .avsc under `path`, decoding into the classes of `events` (the generated module).

        `resolver` finds the schema of a writer that this catalogue does not hold; it is asked once per fingerprint.
        Raises SchemaError naming file and field, for every problem at once.
        """
        catalogue = cls(schemas.load(path).values(), resolver=resolver)
        catalogue.register(*(events.EVENTS if isinstance(events, ModuleType) else events))
        return catalogue

    @property
    def types(self) -> tuple[str, ...]:
        """All event types."""
        return tuple(self._by_type)

    @property
    def fingerprints(self) -> tuple[int, ...]:
        """The fingerprints of the catalogue's own schemas, sorted."""
        return tuple(sorted(self._by_fingerprint))

    def register(self, *classes: type[TypedEvent]) -> None:
        """Decode into these classes. Raises SchemaError when one was generated from another version of its schema."""
        for cls in classes:
            record = self._records.get(cls.AVRO_RECORD)
            if record is None or record.fingerprint != cls.AVRO_FINGERPRINT:
                raise SchemaError(_stale(cls))
            self._classes[cls.AVRO_RECORD] = cls

    def schema_json(self, fingerprint: int) -> str:
        """The JSON of one of the catalogue's own schemas. Raises SchemaError when it has no such fingerprint."""
        return self._own(fingerprint).json

    def subject(self, fingerprint: int) -> str:
        """The subject of one of the catalogue's own schemas in a registry: `<topic>-value`."""
        return f"{self._own(fingerprint).topic}-value"

    def encode(
        self, event: Event | TypedEvent, *, max_bytes: int = MAX_BYTES, headers: Mapping[str, str] = NONE
    ) -> Message:
        """The row of an event, complete and checked: whatever is wrong with the event is said here.

        Left-out `event_type`, `event_id` (uuid7), `timestamp` (now) and `metadata`, and fields with a default, are
        filled in. `headers` (checked ones) go with it; what the event says itself goes before. Raises UnknownEventType,
        InvalidEvent (type, field, remedy) or EventTooLarge (over `max_bytes`, as Kafka counts a record).
        """
        if isinstance(event, Event):
            event_type = event.type
            record, preset = self._find(event_type)
            data = _complete(record, preset, event)
            key, topic = event.key, event.topic
            if event.headers:
                headers = {**headers, **_own(event.headers, event_type)}
        else:
            record = self._of(event)
            data = _fields(event)
            event_type = _type_of(record, data)
            key = topic = None
        value = _write(record, data, event_type)
        if key is None and record.key is not None:
            key = data.get(record.key, record.key_default)
        if key is not None:
            key = _key(key, event_type)
        size = _AROUND + len(event_type) + len(value) + _length(key)
        if headers:
            size += _size(headers)
        if size > max_bytes:
            raise EventTooLarge(_too_large(event_type, size, value, key, headers, max_bytes))
        return Message(
            _id(record, data.get("event_id"), event),
            event_type,
            record.topic if topic is None else _topic(topic, event_type),
            key,
            value,
            record.fingerprint,
            headers or None,
        )

    def decode(self, value: bytes) -> Event | TypedEvent:
        """The event in a single-object frame: its registered class, else Event.

        A schema that only other writers have is asked of the resolver and read as this catalogue's record of the same
        name (Avro's schema resolution). Raises DecodeError, and nothing else, for anything that is no such event;
        what the resolver itself raises (its database is away) passes through. No bytes can make it take more memory
        than some hundred times their own size, since `schemas.lint` refuses the types that would allow it; bytes that
        were damaged, and still are some event of the schema, are read as that one.
        """
        fingerprint = _unframe(value)
        own = self._by_fingerprint.get(fingerprint)
        writer, record = (own.parsed, own) if own else self._learned.get(fingerprint) or self._resolve(fingerprint)
        rest = BytesIO(value[_FRAME.size :])
        try:
            data: Any = schemaless_reader(rest, writer, None if own else record.parsed)
            cls = self._classes.get(record.name)
            event = cls.from_avro(data) if cls else _untyped(record, data)
        except Exception as error:  # fastavro raises whatever its C code meets; each says that the bytes do not fit
            raise DecodeError(
                f"{record.name}: {len(value):,} bytes do not fit the schema {_hex(fingerprint)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if extra := len(rest.read()):
            raise DecodeError(f"{record.name}: {extra:,} bytes too many after the event (schema {_hex(fingerprint)})")
        return event

    def learn(self, schema_json: str) -> int:
        """Take in the schema of another writer (a row of avro_schema), to decode its events; its fingerprint.

        Raises SchemaError when it is no schema, none of a record in this catalogue, or not safe to read with.
        """
        try:
            schema = json.loads(schema_json)
            fingerprint, name = schemas.fingerprint(schema), schemas.full_name(schema)
        except Exception as error:  # the parsers raise KeyError, TypeError and more on strange input
            raise SchemaError(f"not an Avro schema: {type(error).__name__}: {error}") from error
        if name not in self._records:
            raise SchemaError(f"no record {name} in this catalogue to read the events as; add its .avsc")
        schemas.expand(schema)
        self._learned[fingerprint] = (parse_schema(schema), self._records[name])
        return fingerprint

    def _add(self, record: _Record) -> None:
        self._records[record.name] = record
        self._by_fingerprint[record.fingerprint] = record
        preset: dict[str, Any] = {"metadata": {}} if "metadata" in record.fields else {}
        for symbol, name in record.types.items():
            self._by_type[name] = record, {**preset, "event_type": symbol} if symbol else preset

    def _own(self, fingerprint: int) -> _Record:
        try:
            return self._by_fingerprint[fingerprint]
        except KeyError:
            raise SchemaError(f"no schema with the fingerprint {_hex(fingerprint)} in this catalogue") from None

    def _find(self, event_type: str) -> tuple[_Record, Mapping[str, Any]]:
        """The record of an event type, and the fields that are the same for each event of it."""
        try:
            return self._by_type[event_type]
        except (KeyError, TypeError):
            near = get_close_matches(str(event_type), self._by_type, n=3, cutoff=0.5)
            near = near or [name for name in self._by_type if name.endswith(f".{event_type}")]
            hint = f"did you mean {' or '.join(near)}?" if near else f"the catalogue has {len(self._by_type)} types"
            raise UnknownEventType(f"no schema has the event type {event_type!r}; {hint}") from None

    def _of(self, event: TypedEvent) -> _Record:
        fingerprint = getattr(event, "AVRO_FINGERPRINT", None)
        if fingerprint is None:
            raise UnknownEventType(f"{show(event)} is no event; give an Event or a class made by outbox codegen")
        record = self._by_fingerprint.get(fingerprint)
        if record is None:
            raise UnknownEventType(_stale(type(event)))
        return record

    def _resolve(self, fingerprint: int) -> tuple[Any, _Record]:
        text = self._resolver(fingerprint) if self._resolver else None
        if text is None:
            raise DecodeError(
                f"no schema with the fingerprint {_hex(fingerprint)} is known here; add the writer's .avsc, "
                "or give the catalogue a resolver that reads avro_schema"
            )
        try:
            found = self.learn(text)
        except SchemaError as error:
            raise DecodeError(f"the writer's schema {_hex(fingerprint)} cannot be used: {error}") from error
        if found != fingerprint:
            raise DecodeError(f"the resolver gave schema {_hex(found)} for {_hex(fingerprint)}; check avro_schema")
        return self._learned[fingerprint]


def _record(schema: dict[str, Any]) -> _Record:
    name = schemas.full_name(schema)
    fields = schemas.fields(schema)
    expanded = schemas.expand(schema)
    stamp = fields.get("timestamp", {}).get("type")
    return _Record(
        name=name,
        topic=schema["topic"],
        key=schema.get("key"),
        key_default=fields.get(schema.get("key", ""), {}).get("default"),
        fingerprint=schemas.fingerprint(schema),
        json=schemas.text(schema),
        parsed=_parsed(schema),
        expanded=expanded,
        check=compile_check(expanded),
        types={symbol: name for name, symbol in schemas.event_types(schema).items()},
        fields=frozenset(fields),
        stamped=isinstance(stamp, dict) and str(stamp.get("logicalType")).startswith("timestamp-"),
    )


def _parsed(schema: dict[str, Any]) -> Any:
    """The schema as fastavro reads and writes it, with each default as it is written: JSON has bytes as text."""
    named: dict[str, Any] = {}
    parsed = parse_schema(schema, named_schemas=named)
    for record in named.values():
        for field in record.get("fields", ()):
            first = field["type"][0] if isinstance(field["type"], list) else field["type"]
            kind = named.get(first, first) if isinstance(first, str) else first
            if (kind["type"] if isinstance(kind, dict) else kind) in ("bytes", "fixed") and "default" in field:
                field["default"] = field["default"].encode("latin-1")
    return parsed


def _write(record: _Record, data: Mapping[str, Any], event_type: str) -> bytes:
    out, reason = BytesIO(), None
    try:
        if record.check is None or record.check(data):
            schemaless_writer(out, record.parsed, data, strict_allow_default=True, disable_tuple_notation=True)
            return out.getvalue()
    except Exception as error:  # noqa: BLE001 - fastavro raises whatever its C code meets; the fields say why, below
        reason = error
    path, problem = next(faults(record.expanded, data), ("(all)", f"does not fit: {reason!r}"))
    raise InvalidEvent(f"{event_type}: field {path} {problem}") from reason


def _fields(event: TypedEvent) -> dict[str, Any]:
    try:
        return event.to_avro()
    except (AttributeError, TypeError) as error:  # a nested value that is no list, or not of its class
        raise InvalidEvent(
            f"{event.AVRO_RECORD}: a nested field has the wrong type: {error}; give what the class says"
        ) from error


def _complete(record: _Record, preset: Mapping[str, Any], event: Event) -> dict[str, Any]:
    """The data of an untyped event, with what the envelope needs filled in."""
    if not isinstance(event.data, (dict, Mapping)):
        raise InvalidEvent(f"{event.type}: the data is {show(event.data)}; give a mapping of field names to values")
    if event.id is not None and not isinstance(event.id, UUID):
        raise InvalidEvent(f"{event.type}: the id is {show(event.id)}; give a UUID, or none")
    data = {**preset, **event.data}
    if "event_type" in preset and data["event_type"] != preset["event_type"]:
        raise InvalidEvent(
            f"{event.type}: field event_type is {show(data['event_type'])}; leave it out, the type says it"
        )
    if "event_id" in record.fields:
        _complete_id(data, event)
    if record.stamped and "timestamp" not in data:
        data["timestamp"] = datetime.now(UTC)
    return data


def _complete_id(data: dict[str, Any], event: Event) -> None:
    if "event_id" not in data:
        data["event_id"] = event.id or uuid7()
    elif event.id is not None and str(event.id) != str(data["event_id"]).lower():
        found = show(data["event_id"])
        raise InvalidEvent(
            f"{event.type}: field event_id is {found} but the event's id is {event.id}; give one of them"
        )


def _type_of(record: _Record, data: Mapping[str, Any]) -> str:
    symbol = data.get("event_type", "")
    return record.types.get(symbol if isinstance(symbol, str) else "", record.name)


def _id(record: _Record, event_id: Any, event: Event | TypedEvent) -> UUID:
    """The record's event_id; of a record without one, the event's, or a fresh one."""
    if isinstance(event_id, UUID):
        return event_id
    if "event_id" in record.fields:
        return UUID(event_id)
    return (event.id if isinstance(event, Event) else None) or uuid7()


def _key(key: Any, event_type: str) -> str:
    if isinstance(key, UUID):
        return str(key)
    if not isinstance(key, str):
        raise InvalidEvent(f"{event_type}: the key is {show(key)}; give text (str)")
    if not is_storable(key):
        raise InvalidEvent(f"{event_type}: the key {key!r} holds a NUL or a lone surrogate; PostgreSQL's text cannot")
    return key


def _topic(topic: Any, event_type: str) -> str:
    if not isinstance(topic, str) or not schemas.TOPIC.fullmatch(topic):
        raise InvalidEvent(f"{event_type}: the topic {topic!r} is no Kafka topic name: 1 to 249 of a-z A-Z 0-9 . _ -")
    return topic


def _own(headers: Mapping[str, str], event_type: str) -> Mapping[str, str]:
    for name, value in headers.items():
        if problem := fault(name, value):
            raise InvalidEvent(f"{event_type}: {problem}")
    return headers


def _length(text: str | None) -> int:
    """Of its UTF-8."""
    if text is None:
        return 0
    return len(text) if text.isascii() else len(text.encode())


def _size(headers: Mapping[str, str]) -> int:
    """What they add to a record: each name and value, and the length of each (2 bytes up to 8,191, at most 5)."""
    size = 10 * len(headers)
    for name, value in headers.items():
        size += len(name) + len(value) if name.isascii() and value.isascii() else len(name.encode() + value.encode())
    return size


def _too_large(
    event_type: str, size: int, value: bytes, key: str | None, headers: Mapping[str, str], limit: int
) -> str:
    return (
        f"{event_type}: a record of {size:,} bytes (value {len(value):,}, key {_length(key):,}, headers "
        f"{_size(headers):,}), more than the limit of {limit:,}; store the large part elsewhere and send a reference, "
        "or raise max_bytes and the topic's max.message.bytes"
    )


def _unframe(value: bytes) -> int:
    if not isinstance(value, bytes):
        raise DecodeError(f"{show(value)} is no frame" + ("; a tombstone has no event" if value is None else ""))
    if len(value) < _FRAME.size:
        raise DecodeError(
            f"{len(value)} bytes; a single-object frame has at least 10: C3 01, the fingerprint, the record"
        )
    marker, fingerprint = _FRAME.unpack_from(value)
    if marker != _MARKER:
        kind = "the Confluent frame (a registry's schema id)" if value[0] == 0 else "no Avro single-object frame"
        raise DecodeError(f"starts with {marker.hex(' ').upper()} instead of C3 01: {kind}")
    return int(fingerprint)


def _untyped(record: _Record, data: dict[str, Any]) -> Event:
    event_id = data.get("event_id")
    return Event(
        _type_of(record, data),
        data,
        key=None if record.key is None else str(data[record.key]),
        id=event_id if isinstance(event_id, UUID) else None,
        topic=record.topic,
    )


def _stale(cls: type[Any]) -> str:
    return (
        f"{cls.__module__}.{cls.__qualname__} was generated from a schema of {cls.AVRO_RECORD} "
        f"({_hex(cls.AVRO_FINGERPRINT)}) that is not in this catalogue; run outbox codegen again"
    )


def _hex(fingerprint: int) -> str:
    return f"{fingerprint & 0xFFFF_FFFF_FFFF_FFFF:016x}"
