"""Event (what a service says) and Message (its bytes: one outbox row = one Kafka record)."""

import os
import time
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, NamedTuple
from uuid import UUID, SafeUUID

from outbox.errors import InvalidEvent

# Seeded by the operating system; not random's own, which programs and test tools seed with constants. A forked child
# starts anew. Eight times as fast as os.urandom for each id; an id is unique, it is no secret.
_random = Random()  # noqa: S311 - see above
if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_random.seed)

_VERSION_7 = 0x7000 << 64 | 0x8 << 60  # with the variant of RFC 9562
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_UNKNOWN = SafeUUID.unknown
_set = object.__setattr__  # a UUID refuses its own


@dataclass(frozen=True, slots=True)
class Event:
    """What a service says, as plain data. The typed classes that `outbox codegen` makes are the better form.

    `type` is `<record namespace>.<ENUM SYMBOL>` where the record has an `event_type` enum, else the record's full name.
    `data` are the record's fields. `event_type`, `event_id`, `timestamp` and `metadata` may be left out: the catalogue
    fills them in; every other field is written by name, with a default or without one.
    """

    type: str
    data: Mapping[str, Any]
    _: KW_ONLY
    key: str | None = None
    """None: taken from the field that the schema names as its key."""
    id: UUID | None = None
    """None: the record's `event_id`, or a fresh uuid7."""
    topic: str | None = None
    """None: the schema's topic."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Kafka headers beside the CloudEvents ones."""


class Message(NamedTuple):
    """One row of the outbox = one record in Kafka. Every field is final: nothing downstream looks into `value`.

    A tuple, in the order of the INSERT's columns: a dataclass takes a microsecond more to make.
    """

    id: UUID
    type: str
    topic: str
    key: str | None
    """None: no key; Kafka chooses a partition and no order is kept."""
    value: bytes | None
    """Bare Avro bytes when `fingerprint` is set; else sent as they are. None: a tombstone."""
    fingerprint: int | None
    """Avro's CRC-64 of the writer's schema, as a signed 64-bit integer. None: `value` is not Avro."""
    headers: Mapping[str, str] | None = None


def uuid7() -> UUID:
    """A new UUID version 7 (RFC 9562, section 5.7): sorts by the time of its making, to a quarter of a microsecond.

    48 bits of Unix milliseconds, 12 bits of the fraction of the millisecond (section 6.2, method 3), 62 random bits.
    Ids of two processes, or of one within the clock's resolution, have no promised order.
    """
    ticks = (time.time_ns() << 12) // 1_000_000
    made = object.__new__(UUID)
    # As UUID(int=…) does, without its checks, which take half of the time.
    _set(made, "int", (ticks >> 12) << 80 | (ticks & 0xFFF) << 64 | _VERSION_7 | _random.getrandbits(62))
    _set(made, "is_safe", _UNKNOWN)
    return made


def now() -> datetime:
    """The time in UTC, cut to the millisecond as Avro's timestamp-millis is: what is read equals what was said."""
    return _EPOCH + time.time_ns() // 1_000_000 * _MILLISECOND


def require_aware(value: object, event: str, field: str) -> None:
    """Refuse a datetime without a time zone (InvalidEvent): it would be taken for the machine's local time.

    Values of other types pass: the type checker and `Catalogue.encode` see those.
    """
    if isinstance(value, datetime) and value.tzinfo is None:
        raise InvalidEvent(
            f"{event}: field {field} is {value.isoformat()} without a time zone; "
            "give an aware datetime, such as datetime.now(UTC)"
        )
