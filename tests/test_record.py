"""A row as a Kafka record: key, frame, headers, timestamp; and what cannot be said in Kafka is refused by name."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import EventRefused
from relay.record import Records

ID = "01890a5d-ac96-774b-bcce-b302099a8057"


def produced(*rows: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    Records("/outbox/test").produce(rows, lambda *call: calls.append(call))
    return calls


def row(
    value: bytes | None = b"\x02", fingerprint: int | None = 1, headers: str | None = None, created: int | None = 1_700
) -> tuple[Any, ...]:
    return (5, ID, "com.acme.ORDERED", "orders", "key-1", value, fingerprint, headers, created)


def test_an_avro_event_is_framed_and_carries_the_cloudevents_headers_in_order() -> None:
    [call] = produced(row())
    assert call == (
        "orders",
        b"\xc3\x01" + b"\x01\x00\x00\x00\x00\x00\x00\x00" + b"\x02",
        "key-1",
        -1,
        None,
        None,
        1_700,
        [
            ("ce_specversion", b"1.0"),
            ("ce_id", ID),
            ("ce_type", b"com.acme.ORDERED"),
            ("ce_source", b"/outbox/test"),
            ("content-type", b"application/avro"),
        ],
    )


@pytest.mark.parametrize(
    ("fingerprint", "wire"),
    [
        (0x63DD24E7CC258F8A, "8a8f25cce724dd63"),  # Avro's test vector of the schema "null"
        (-0x5D5B9B1D52D4D0F2, "0e2f2bade264a4a2"),
        (-1, "ffffffffffffffff"),
        (-(1 << 63), "0000000000000080"),
        ((1 << 63) - 1, "ffffffffffffff7f"),
    ],
)
def test_the_fingerprint_is_eight_bytes_little_endian_whatever_its_sign(fingerprint: int, wire: str) -> None:
    [call] = produced(row(fingerprint=fingerprint))
    assert call[1] == b"\xc3\x01" + bytes.fromhex(wire) + b"\x02"


def test_raw_bytes_go_as_they_are_and_say_no_content_type() -> None:
    [call] = produced(row(b"{}", fingerprint=None))
    assert call[1] == b"{}"
    assert "content-type" not in dict(call[7])


@pytest.mark.parametrize("fingerprint", [None, 1])
def test_a_tombstone_stays_null(fingerprint: int | None) -> None:
    [call] = produced(row(None, fingerprint))
    assert call[1] is None


@pytest.mark.parametrize(("fingerprint", "value"), [(None, b""), (1, b"\xc3\x01\x01" + bytes(7))])
def test_an_empty_value_is_no_tombstone(fingerprint: int | None, value: bytes) -> None:
    [call] = produced(row(b"", fingerprint))
    assert call[1] == value


def test_own_headers_come_last_in_utf_8_and_may_be_null() -> None:
    [call] = produced(row(headers=json.dumps({"traceparent": "00-é", "none": None})))
    assert call[7][-2:] == [("traceparent", "00-é".encode()), ("none", None)]


def test_the_time_is_said_where_it_is_asked_for_before_the_row_s_own_headers() -> None:
    calls: list[tuple[Any, ...]] = []
    Records("/outbox/test", time=True).produce(
        [row(created=1_709_208_000_123, headers='{"a": "b"}')], lambda *call: calls.append(call)
    )
    assert calls[0][7][-2:] == [("ce_time", b"2024-02-29T12:00:00.123+00:00"), ("a", b"b")]


@pytest.mark.parametrize("created", [568_971_820_800_000, (1 << 63) - 1])
def test_a_year_that_ce_time_cannot_tell_is_refused_by_the_event(created: int) -> None:
    with pytest.raises(EventRefused, match=ID):
        Records("/outbox/test", time=True).produce([row(created=created)], print)


def test_a_json_null_is_no_headers() -> None:
    assert produced(row(headers="null")) == produced(row())


@pytest.mark.parametrize("headers", ["[]", '"a"', "1", "true", '{"a": 1}', '{"a": {"b": "c"}}', '{"a": ["b"]}'])
def test_headers_that_kafka_cannot_carry_are_refused_by_the_event(headers: str) -> None:
    with pytest.raises(EventRefused, match=f"headers of event {ID}"):
        produced(row(headers=headers))


@pytest.mark.parametrize("created", [None, -1])
def test_a_moment_that_kafka_cannot_tell_is_refused_by_the_event(created: int | None) -> None:
    with pytest.raises(EventRefused, match=ID):
        produced(row(created=created))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda part: st.lists(part) | st.dictionaries(st.text(), part),
)


@given(json_values)
def test_headers_of_any_json_are_carried_whole_or_refused(value: object) -> None:
    try:
        [call] = produced(row(headers=json.dumps(value)))
    except EventRefused:
        assert not isinstance(value, dict) or not all(v is None or isinstance(v, str) for v in value.values())
    else:
        own = {name: text if text is None else text.decode() for name, text in call[7][5:]}
        assert own == (value or {})
