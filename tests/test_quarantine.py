"""Which events are parked: the refused ones, and under `hold` the later ones of their key; no others."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from relay.quarantine import PACKING, SEARCH_ROWS, WORDS, Quarantine, Search


def row(seq: int, key: str | None = "k", topic: str = "t") -> tuple[Any, ...]:
    return (seq, f"id-{seq}", "type", topic, key, b"", None, None, 0)


def test_nothing_is_looked_at_while_nothing_is_to_be_parked() -> None:
    quarantine = Quarantine(8_000)
    assert quarantine.idle
    assert (quarantine.rows, quarantine.search) == (8_000, Search.NONE)


def test_after_a_refused_batch_large_records_travel_alone_until_one_is_named() -> None:
    quarantine = Quarantine(8_000)
    quarantine.refused(8_000, {"t"})
    assert (quarantine.search, quarantine.rows, quarantine.suspects) == (Search.LARGE, 8_000, frozenset("t"))
    quarantine.named({10: "too large"})
    assert quarantine.sort([row(10)]) == ([], {10: "too large"})
    assert (quarantine.search, quarantine.packing) == (Search.NONE, None)


def test_where_a_batch_is_refused_again_they_do_so_until_its_last_row_has_passed() -> None:
    quarantine = Quarantine(8_000)
    for seq in (10, 20):
        quarantine.refused(8_000, {"t"})
        quarantine.named({seq: "too large"})
    quarantine.passed(500)
    assert (quarantine.search, quarantine.packing) == (Search.LARGE, None)
    quarantine.passed(8_000)
    assert (quarantine.search, quarantine.packing) == (Search.NONE, None)
    quarantine.refused(9_000, {"t"})
    quarantine.named({8_500: "too large"})
    assert (quarantine.search, quarantine.packing) == (Search.NONE, None)


def test_where_that_names_none_each_record_travels_alone() -> None:
    quarantine = Quarantine(8_000)
    quarantine.refused(8_000, {"t"})
    quarantine.unnamed()
    assert (quarantine.search, quarantine.rows) == (Search.EACH, SEARCH_ROWS)
    assert Quarantine(8).rows == 8


def test_a_batch_of_which_no_event_is_refused_alone_was_too_many_together() -> None:
    quarantine = Quarantine(8_000)
    packings = []
    for each in (False, False, True, True, False):
        quarantine.refused(100, {"t"})
        if each:
            quarantine.unnamed()
        quarantine.passed(100)
        packings.append(quarantine.packing)
    assert packings == [PACKING, PACKING, 2_048, 1_000, 1_000]


def test_where_a_topic_is_to_blame_no_event_is_searched_for() -> None:
    quarantine = Quarantine(8_000)
    quarantine.refused(100, {"t"})
    quarantine.acquit()
    assert (quarantine.search, quarantine.packing) == (Search.NONE, None)


def test_later_events_of_the_key_follow_and_other_keys_and_topics_go_on() -> None:
    quarantine = Quarantine(8_000)
    quarantine.condemn({2: "too large"})
    rows = [row(1), row(2), row(3), row(4, "other"), row(5, topic="elsewhere"), row(6)]
    publish, parked = quarantine.sort(rows)
    assert [one[0] for one in publish] == [1, 4, 5]
    assert list(parked) == [2, 3, 6]
    assert parked[2] == "too large"
    assert "earlier event of its key" in parked[3]


def test_an_event_without_a_key_holds_nothing_back() -> None:
    quarantine = Quarantine(8_000)
    quarantine.condemn({1: "too large"})
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
    quarantine.condemn({1: "too large"})
    quarantine.sort([row(1)])
    quarantine.parked([1])
    publish, parked = quarantine.sort([row(2)])
    assert publish == []
    assert list(parked) == [2]


def test_with_skip_only_the_refused_event_is_parked() -> None:
    quarantine = Quarantine(8_000, holds=False)
    quarantine.hold({("t", "k")})
    quarantine.condemn({1: "too large"})
    publish, parked = quarantine.sort([row(1), row(2)])
    assert [one[0] for one in publish] == [2]
    assert list(parked) == [1]


@given(
    rows=st.lists(st.tuples(st.sampled_from("ab") | st.none(), st.sampled_from("tu")), max_size=30),
    bad=st.sets(st.integers(0, 29)),
)
def test_every_row_is_published_or_parked_and_no_key_overtakes_its_parked_event(
    rows: list[tuple[str | None, str]], bad: set[int]
) -> None:
    quarantine = Quarantine(8_000)
    for seq in bad:
        quarantine.condemn({seq: "bad"})
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
    quarantine.named({2: "y" * 100_000})
    quarantine.condemn({5: "w" * WORDS})
    _, parked = quarantine.sort([row(seq, key=None) for seq in (1, 2, 5)])
    assert [len(error) for error in parked.values()] == [WORDS] * 3
    assert [error[-1] for error in parked.values()] == ["…", "…", "w"]
