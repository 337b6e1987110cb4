"""Meta: one record as Kafka delivered it, with what a handler may want to know beside the event."""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid5

from outbox.errors import InvalidMessage

Headers = list[tuple[str, bytes | None]]

_UUID = re.compile(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PLACES = UUID("6f3a3d1e-58f4-5c0e-9a35-0c5b8a4a7d10")
"""Namespace of the ids of messages that bear none: made from where they stand."""


class Meta:
    """Where an event came from. Handlers read it; only the runtime writes it."""

    __slots__ = (
        "attempt",
        "event_id",
        "flaw",
        "headers",
        "key",
        "offset",
        "partition",
        "replay",
        "size",
        "timestamp_ms",
        "topic",
        "type",
        "value",
    )

    def __init__(
        self,
        topic: str,
        partition: int,
        offset: int,
        key: bytes | None,
        value: bytes | None,
        headers: Headers,
        timestamp_ms: int | None,
    ) -> None:
        self.topic = topic
        self.partition = partition
        self.offset = offset
        self.key = key
        self.value = value
        self.headers = headers
        """All of them, in Kafka's order; a name may come twice."""
        self.timestamp_ms = timestamp_ms
        """Kafka's timestamp, ms since 1970; an outbox writes the moment of the event. None: the record has none."""
        self.type: str | None = None
        """The event's type, by the header `ce_type`."""
        self.attempt = 1
        """Of the handler at this event: 1, 2, …"""
        self.replay = False
        """It is read again by `outbox replay`: leave out what must not happen again outside the database."""
        self.event_id = ""
        """The event's id as the inbox knows it: a uuid's text, in lower case."""
        self.flaw: str | None = None
        """Why the message has no id of its own; then `event_id` is made from where it stands."""
        self.size = _OVERHEAD + len(key or b"") + len(value or b"")
        """Bytes of key and value, and some for the rest: what it is counted as where memory is bounded."""

    @property
    def id(self) -> UUID:
        """The event's id: what is outside the database can know a repeat by it."""
        return UUID(self.event_id)

    @property
    def timestamp(self) -> datetime | None:
        """Kafka's timestamp, in UTC."""
        return None if self.timestamp_ms is None else datetime.fromtimestamp(self.timestamp_ms / 1000, UTC)

    def header(self, name: str) -> str | None:
        """The text of the first header of this name; None where there is none."""
        value = next((value for found, value in self.headers if found == name), None)
        return None if value is None else value.decode(errors="replace")

    def __repr__(self) -> str:
        return f"{self.topic} [{self.partition}] offset {self.offset}"


_OVERHEAD = 1_000
"""Bytes that a message of a few headers takes in Python beside its key and value."""


def meta_of(message: Any, find_id: Callable[[Meta], UUID] | None = None) -> Meta:
    """What a confluent-kafka Message without an error says. Raises nothing: a message without an id has a `flaw`."""
    timestamp_kind, timestamp = message.timestamp()
    headers: Headers = message.headers() or []
    meta = Meta(
        message.topic(),
        message.partition(),
        message.offset(),
        message.key(),
        message.value(),
        headers,
        timestamp if timestamp_kind else None,
    )
    found = None
    for name, value in headers:
        if name == "ce_id":
            found = value if found is None else found
        elif name == "ce_type" and value is not None and meta.type is None:
            meta.type = value.decode(errors="replace")
    if find_id is None and found is not None and _UUID.fullmatch(found):
        meta.event_id = found.decode()
    else:
        _identify(meta, found, find_id)
    return meta


def _identify(meta: Meta, header: bytes | None, find_id: Callable[[Meta], UUID] | None) -> None:
    """The slow way: another form of uuid, a function of the user's, or no id at all."""
    try:
        if find_id is not None:
            meta.event_id = str(UUID(str(find_id(meta))))
        else:
            meta.event_id = str(UUID((header or b"").decode()))
    except Exception as error:  # noqa: BLE001 - whatever the user's function, or the bytes, come to
        what = "no header ce_id" if header is None else f"a header ce_id that is no uuid: {str(header)[:60]!r}"
        meta.flaw = str(
            InvalidMessage(f"{meta!r} has {what}" if find_id is None else f"no id was found in {meta!r}: {error!r}")
        )
        meta.event_id = str(uuid5(_PLACES, f"{meta!r} {meta.timestamp_ms}"))
