"""Ids, times, and the two forms of an event."""

import dataclasses
import os
import random
import time
from datetime import UTC, datetime
from uuid import RFC_4122, UUID

import pytest

from outbox.errors import InvalidEvent
from outbox.message import Event, Message, now, require_aware, uuid7


def test_uuid7_has_the_version_the_variant_and_the_time_of_rfc_9562() -> None:
    before = time.time_ns() // 1_000_000
    made = uuid7()
    after = time.time_ns() // 1_000_000
    assert (made.version, made.variant) == (7, RFC_4122)
    assert before <= made.int >> 80 <= after


def test_uuid7_behaves_as_any_uuid() -> None:
    made = uuid7()
    assert made == UUID(str(made))
    assert hash(made) == hash(UUID(str(made)))
    assert made.is_safe == UUID(str(made)).is_safe


def test_uuid7_sorts_by_time_and_never_repeats() -> None:
    made = []
    for _ in range(200):
        made.append(uuid7())
        time.sleep(0.000_01)  # more than the clock's quarter of a microsecond
    assert sorted(made) == made
    assert len({uuid7() for _ in range(20_000)}) == 20_000


def test_uuid7_is_random_after_a_fork_and_under_a_fixed_seed() -> None:
    def tail() -> int:
        random.seed(1)
        return uuid7().int & (1 << 62) - 1

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, tail().to_bytes(8))
        os._exit(0)
    os.waitpid(child, 0)
    assert len({int.from_bytes(os.read(read, 8)), tail(), tail()}) == 3
    os.close(read)
    os.close(write)


def test_now_is_aware_and_cut_to_what_avro_keeps() -> None:
    stamp = now()
    assert stamp.tzinfo is UTC
    assert stamp.microsecond % 1_000 == 0
    assert abs((datetime.now(UTC) - stamp).total_seconds()) < 1


def test_a_naive_datetime_is_refused_with_the_field_and_the_remedy() -> None:
    with pytest.raises(
        InvalidEvent, match=r"Order: field at is 2026-01-02T00:00:00 without a time zone; give an aware"
    ):
        require_aware(datetime(2026, 1, 2), "Order", "at")  # noqa: DTZ001 - the mistake under test
    require_aware(datetime(2026, 1, 2, tzinfo=UTC), "Order", "at")
    require_aware(None, "Order", "at")


def test_events_and_messages_cannot_be_changed() -> None:
    event = Event("a.B", {})
    message = Message(id=uuid7(), type="a.B", topic="t", key=None, value=None, fingerprint=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.key = "k"  # type: ignore[misc] # the mistake under test
    with pytest.raises(AttributeError):
        message.key = "k"  # type: ignore[misc] # the mistake under test
