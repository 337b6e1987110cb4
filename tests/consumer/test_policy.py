"""Retries back off and end, settings that contradict themselves are refused, ids are found or made."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import UsageError
from outbox.consumer import Failures, Limits, Meta, Retry
from outbox.consumer.feed import settings
from outbox.consumer.meta import meta_of
from outbox.consumer.policy import connection
from outbox.consumer.retention import refuse_short
from outbox.consumer.store import Death, decoded, encoded


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_a_delay_doubles_up_to_the_most_and_is_never_less_than_half_of_its_step(attempt: int, chance: float) -> None:
    retry = Retry(first=0.1, most=30)
    step = min(30.0, 0.1 * 2 ** min(attempt - 1, 60))
    assert step / 2 <= retry.delay(attempt, lambda: chance) <= step


def test_a_retry_ends_with_its_attempts_or_at_an_error_that_it_cannot_cure() -> None:
    retry = Retry(attempts=3, never=(KeyError,))
    assert [retry.again(ValueError(), attempt) for attempt in (1, 2, 3)] == [True, True, False]
    assert not retry.again(KeyError(), 1)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Retry(attempts=0),
        lambda: Retry(first=2, most=1),
        lambda: Failures(kills=2),
        lambda: Limits(concurrency=0),
        lambda: settings("g", {"bootstrap.servers": "x", "enable.auto.commit": True}),
        lambda: settings("g", {"bootstrap.servers": "x", "isolation.level": "read_uncommitted"}),
        lambda: settings("g", {}),
    ],
)
def test_settings_under_which_the_guarantee_would_be_gone_are_refused(wrong: Any) -> None:
    with pytest.raises(UsageError):
        wrong()


def test_the_users_settings_go_before_the_defaults() -> None:
    found = settings("group", {"bootstrap.servers": "b", "auto.offset.reset": "latest", "enable.auto.commit": "false"})
    assert found["group.id"] == "group"
    assert found["auto.offset.reset"] == "latest"
    assert found["partition.assignment.strategy"] == "cooperative-sticky"
    assert "partition.assignment.strategy" not in settings(
        "g", {"bootstrap.servers": "b", "group.protocol": "consumer"}
    )
    assert connection({"bootstrap.servers": "b", "group.id": "g", "ssl.ca.location": "c"}) == {
        "bootstrap.servers": "b",
        "ssl.ca.location": "c",
    }


# --- where a message came from ---


def message(headers: Any, **more: Any) -> Any:
    fields = {
        "topic": "t",
        "partition": 1,
        "offset": 7,
        "key": b"k",
        "value": b"v",
        "timestamp": (1, 1_700_000_000_123),
    }
    return SimpleNamespace(headers=lambda: headers, **{name: lambda v=v: v for name, v in {**fields, **more}.items()})


def test_the_id_is_the_header_in_whatever_form_of_uuid() -> None:
    event_id = uuid4()
    for text in (str(event_id), str(event_id).upper(), event_id.hex, f"{{{event_id}}}"):
        meta = meta_of(message([("ce_id", text.encode()), ("ce_id", b"second"), ("ce_type", b"x.Y")]))
        assert (meta.id, meta.type, meta.flaw) == (event_id, "x.Y", None)
    assert meta.timestamp is not None
    assert meta.timestamp.isoformat() == "2023-11-14T22:13:20.123000+00:00"
    assert (meta.header("ce_type"), meta.header("other"), repr(meta)) == ("x.Y", None, "t [1] offset 7")


def test_a_message_without_an_id_has_one_of_its_place_and_says_what_is_missing() -> None:
    found = [meta_of(message(None)), meta_of(message([("ce_id", b"no")])), meta_of(message(None))]
    assert found[0].flaw == "t [1] offset 7 has no header ce_id"
    assert "no uuid" in (found[1].flaw or "")
    assert found[0].event_id == found[2].event_id
    assert meta_of(message(None, offset=8)).event_id != found[0].event_id
    assert meta_of(message(None, timestamp=(0, -1))).timestamp is None


def test_an_id_may_come_from_a_function_of_the_users() -> None:
    event_id = uuid4()
    own = [("ce_id", str(uuid4()).encode()), ("own", str(event_id).encode())]
    assert meta_of(message(own), lambda meta: UUID(meta.header("own") or "")).id == event_id
    refused = meta_of(message(None), lambda meta: UUID(meta.header("own") or ""))
    assert "no id was found" in (refused.flaw or "")


header_lists = st.lists(st.tuples(st.text(), st.none() | st.binary()))


@given(header_lists)
def test_headers_are_kept_as_they_were(headers: list[tuple[str, bytes | None]]) -> None:
    clean = [(name.replace("\0", "").encode(errors="ignore").decode(), value) for name, value in headers]
    assert decoded(encoded(clean)) == clean


def test_an_error_and_its_stack_are_cut_and_hold_nothing_that_postgresql_refuses() -> None:
    with pytest.raises(ValueError, match="invalid literal") as raised:
        int("\0" + "x" * 100_000)
    death = Death.of("failed", raised.value, 3)
    assert len(death.error) <= 2_000
    assert len(death.stack or "") <= 16_000
    assert "\0" not in death.error + (death.stack or "")


# --- claims and topics ---


@pytest.mark.parametrize(
    ("topic", "claims", "said"),
    [
        ({"retention.ms": "86400000", "cleanup.policy": "delete"}, timedelta(days=1), "1 day, 0:00:00, claims"),
        ({"retention.ms": "-1", "cleanup.policy": "delete"}, timedelta(days=999), "for ever"),
        ({"retention.ms": "1", "cleanup.policy": "compact"}, timedelta(days=1), "for ever"),
        ({}, timedelta(days=1), "for ever"),
    ],
)
def test_claims_must_outlive_the_topic(topic: dict[str, str], claims: timedelta, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        refuse_short("t", topic, claims)


def test_claims_that_outlive_the_topic_may_be_forgotten() -> None:
    refuse_short("t", {"retention.ms": "86400000", "cleanup.policy": "compact,delete"}, timedelta(days=2))


def test_a_meta_counts_for_what_it_holds() -> None:
    assert Meta("t", 0, 0, b"k" * 10, b"v" * 100, [], None).size >= 110
