"""Bytes to events: which schema a message was written with, and where that schema is found. Decoding does no I/O.

    C3 01 <fingerprint>   Avro's single-object encoding    the catalogue, or avro_schema in the consumer's database
    00 <schema id>        Confluent's frame                the registry, once per id

A frame whose schema is not known yet is `missing`; `learn` fetches it (that is the I/O), and then `decode` knows it.
"""

import asyncio
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from outbox.catalogue import Catalogue, TypedEvent
from outbox.consumer.meta import Meta
from outbox.errors import DecodeError, SchemaError, SchemaRefused
from outbox.message import Event
from outbox.registry import SchemaRegistry

_SINGLE = b"\xc3\x01"
_FINGERPRINT = struct.Struct("<2sq")
_CONFLUENT = struct.Struct(">bI")

Registry = str | Mapping[str, Any]
"""A schema registry: its URL, or the settings of Confluent's client (outbox/registry.py)."""


def _settings(registry: Registry) -> Mapping[str, Any]:
    return {"url": registry} if isinstance(registry, str) else registry


class Frame(NamedTuple):
    """Which schema a message names."""

    kind: str
    """`fingerprint` or `id`."""
    number: int


class Decoder:
    """Decodes what Kafka delivers into the events of a catalogue. For one event loop."""

    def __init__(
        self,
        catalogue: Catalogue,
        find_fingerprint: Callable[[int], Awaitable[str | None]],
        registry: Registry | None = None,
    ) -> None:
        """`find_fingerprint`: a schema's JSON by its fingerprint, None where there is none."""
        self._catalogue = catalogue
        self._types = frozenset(catalogue.types)
        self._find = find_fingerprint
        self._registry = None if registry is None else SchemaRegistry(_settings(registry))
        self._known: set[int] = set(catalogue.fingerprints)
        self._frames: dict[int, bytes] = {}
        self._refused: dict[Frame, str] = {}

    def knows_type(self, meta: Meta) -> bool:
        """Whether the catalogue has the event's type; True for a message that names none."""
        return meta.type is None or meta.type in self._types

    def missing(self, value: bytes) -> Frame | None:
        """The frame's schema, where `learn` has to be asked for it first."""
        if value.startswith(_SINGLE):
            if len(value) < _FINGERPRINT.size:
                return None
            fingerprint = _FINGERPRINT.unpack_from(value)[1]
            return None if fingerprint in self._known else Frame("fingerprint", fingerprint)
        if value[:1] == b"\0" and len(value) >= _CONFLUENT.size:
            schema_id = _CONFLUENT.unpack_from(value)[1]
            return None if schema_id in self._frames else Frame("id", schema_id)
        return None

    async def learn(self, frame: Frame) -> None:
        """Find the frame's schema, and remember it.

        Raises DecodeError where there is none, or none that can be read as one of the catalogue's. What the database
        or the registry raise because they are away passes through: try again.
        """
        if frame.kind == "fingerprint":
            await self._learn_fingerprint(frame.number)
        elif frame.number not in self._frames:
            await self._learn_id(frame.number)

    async def _learn_fingerprint(self, fingerprint: int) -> None:
        text = await self._find(fingerprint)
        if text is None:  # the catalogue's own resolver may have it: `decode` asks
            return
        self._learned(text, f"the schema {fingerprint & (1 << 64) - 1:016x} in avro_schema")
        self._known.add(fingerprint)

    async def _learn_id(self, schema_id: int) -> None:
        if self._registry is None:
            raise DecodeError(f"Confluent's frame with schema id {schema_id}, but the consumer was given no registry=")
        try:
            text = await asyncio.to_thread(self._registry.schema, schema_id)
        except SchemaRefused as error:
            raise DecodeError(f"the registry has no schema {schema_id}: {error}") from error
        fingerprint = self._learned(text, f"the registry's schema {schema_id}")
        self._frames[schema_id] = _FINGERPRINT.pack(_SINGLE, fingerprint)

    def _learned(self, text: str, what: str) -> int:
        try:
            return self._catalogue.learn(text)
        except SchemaError as error:
            raise DecodeError(f"{what} cannot be used: {error}") from error

    def decode(self, value: bytes) -> Event | TypedEvent:
        """The event. Raises DecodeError, and what the catalogue's own resolver raises."""
        if value[:1] == b"\0" and len(value) >= _CONFLUENT.size:
            frame = self._frames.get(_CONFLUENT.unpack_from(value)[1])
            if frame is None:
                raise DecodeError("Confluent's frame with a schema id that was not learned")
            value = frame + value[_CONFLUENT.size :]
        return self._catalogue.decode(value)
