"""Which events are parked: the refused ones, and under `hold` the later ones of their key; no others."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from relay.quarantine import WORDS, Quarantine


def row(seq: int, key: str | None = "k", topic: str = "t") -> tuple[Any, ...]:
    return (seq, f"id-{seq}", "type", topic, key, b"", None, None, 0)


def test_nothing_is_looked_at_while_nothing_is_to_be_parked() -> None:
    quarantine = Quarantine(8_000)
    assert quarantine.idle
    assert quarantine.rows == 8_000


def test_the_batch_shrinks_by_eighths_until_the_event_stands_alone_and_grows_by_doubling() -> None:
    quarantine = Quarantine(8_000)
    sizes = []
    seqs = list(range(8_000))
    while len(seqs) > 1:
        quarantine.refused(seqs, "too large", {})
        sizes.append(quarantine.rows)
        seqs = seqs[: quarantine.rows]
    assert sizes == [1_000, 125, 15, 1]
    assert quarantine.sort([row(0)]) == ([row(0)], {})
    quarantine.refused(seqs, "too large", {})
    assert quarantine.sort([row(0)]) == ([], {0: "too large"})
    grown = []
    for _ in range(14):
        quarantine.published()
        grown.append(quarantine.rows)
    assert grown == [2**n for n in range(1, 13)] + [8_000, 8_000]


def test_events_that_kafka_names_are_condemned_at_once() -> None:
    quarantine = Quarantine(8_000)
    quarantine.refused([10, 20, 30], "two of them", {0: "unknown topic", 2: "too large"})
    publish, parked = quarantine.sort([row(10, "a"), row(20, "b"), row(30, "c")])
    assert [one[0] for one in publish] == [20]
    assert parked == {10: "unknown topic", 30: "too large"}
    assert quarantine.rows == 8_000


def test_later_events_of_the_key_follow_and_other_keys_and_topics_go_on() -> None:
    quarantine = Quarantine(8_000)
    quarantine.refused([2], "too large", {})
    rows = [row(1), row(2), row(3), row(4, "other"), row(5, topic="elsewhere"), row(6)]
    publish, parked = quarantine.sort(rows)
    assert [one[0] for one in publish] == [1, 4, 5]
    assert list(parked) == [2, 3, 6]
    assert parked[2] == "too large"
    assert "earlier event of its key" in parked[3]


def test_an_event_without_a_key_holds_nothing_back() -> None:
    quarantine = Quarantine(8_000)
    quarantine.refused([1], "too large", {})
    publish, parked = quarantine.sort([row(1, None), row(2, None)])
    assert [one[0] for one in publish] == [2]
    assert list(parked) == [1]


def test_keys_that_the_database_says_are_held_are_held() -> None:
    quarantine = Quarantine(8_000)
    quarantine.hold({("t", "k")})
    publish, parked = quarantine.sort([row(1), row(2, "free"), row(3, None)])
    assert [one[0] for one in publish] == [2, 3]
    assert list(parked) == [1]


def test_an_event_that_is_in_dead_event_is_condemned_no_longer_but_its_key_is_held() -> None:
    quarantine = Quarantine(8_000)
    quarantine.refused([1], "too large", {})
    quarantine.sort([row(1)])
    quarantine.parked([1])
    publish, parked = quarantine.sort([row(2)])
    assert publish == []
    assert list(parked) == [2]


def test_the_client_is_asked_about_each_record_until_batches_have_their_size_again() -> None:
    quarantine = Quarantine(16)
    quarantine.refused(list(range(16)), "one of them", {})
    seen = []
    while quarantine.closely:
        quarantine.published()
        seen.append(quarantine.rows)
    assert seen == [4, 8, 16, 16]


@given(
    rows=st.lists(st.tuples(st.sampled_from("ab") | st.none(), st.sampled_from("tu")), max_size=30),
    bad=st.sets(st.integers(0, 29)),
)
def test_every_row_is_published_or_parked_and_no_key_overtakes_its_parked_event(
    rows: list[tuple[str | None, str]], bad: set[int]
) -> None:
    quarantine = Quarantine(8_000)
    for seq in bad:
        quarantine.refused([seq], "bad", {})
    table = [row(seq, key, topic) for seq, (key, topic) in enumerate(rows)]
    publish, parked = quarantine.sort(table)
    assert sorted([one[0] for one in publish] + list(parked)) == list(range(len(rows)))
    assert bad & set(range(len(rows))) <= set(parked)
    for one in publish:
        earlier = [seq for seq in parked if seq < one[0] and one[4] is not None]
        assert not [seq for seq in earlier if (table[seq][3], table[seq][4]) == (one[3], one[4])]


def test_the_error_that_is_kept_is_no_longer_than_a_person_reads() -> None:
    """A registry's refusal may hold a whole schema, a proxy's a whole page."""
    quarantine = Quarantine(8_000)
    quarantine.condemn({1: "x" * 100_000})
    quarantine.refused([2, 3], "", {0: "y" * 100_000})
    quarantine.refused([4], "z" * 100_000, {})
    quarantine.condemn({5: "w" * WORDS})
    _, parked = quarantine.sort([row(seq, key=None) for seq in (1, 2, 4, 5)])
    assert [len(error) for error in parked.values()] == [WORDS] * 4
    assert [error[-1] for error in parked.values()] == ["…", "…", "…", "w"]
