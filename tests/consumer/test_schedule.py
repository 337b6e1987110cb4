"""Lanes keep a key's order and starve none, Offsets never pass what is not done, a Budget lets in what has room."""

import random
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from outbox.consumer.schedule import Budget, Lane, Lanes, Offsets


def lane(key: int, partition: int = 0, topic: str = "t") -> Lane:
    return Lane(topic, partition, key)


def test_a_lane_has_one_unit_at_work_and_it_is_the_oldest() -> None:
    lanes: Lanes[int] = Lanes({"batched": 2})
    for number in range(5):
        lanes.push(lane(0, topic="batched"), number)
    first = lanes.take()
    assert first == (lane(0, topic="batched"), [0, 1])
    assert lanes.take() is None
    assert (lanes.busy, len(lanes)) == (1, 3)
    lanes.done(first[0])
    assert lanes.take() == (lane(0, topic="batched"), [2, 3])


def test_lanes_are_served_in_turn() -> None:
    lanes: Lanes[str] = Lanes()
    for message in ("a1", "a2", "a3"):
        lanes.push(lane(1), message)
    lanes.push(lane(2), "b1")
    served = []
    while taken := lanes.take():
        served += taken[1]
        lanes.done(taken[0])
    assert served == ["a1", "b1", "a2", "a3"]


def test_what_waits_of_a_partition_is_dropped_and_what_is_at_work_goes_on() -> None:
    lanes: Lanes[str] = Lanes()
    for message in ("a1", "a2"):
        lanes.push(lane(1), message)
    lanes.push(lane(2, partition=1), "other")
    taken = lanes.take()
    assert taken == (lane(1), ["a1"])
    assert lanes.drop("t", 0) == ["a2"]
    lanes.push(lane(1), "again")  # the partition came back while its old unit is still at work
    assert lanes.take() == (lane(2, partition=1), ["other"])
    assert lanes.take() is None
    lanes.done(lane(1))
    assert lanes.take() == (lane(1), ["again"])


steps = st.lists(st.tuples(st.sampled_from(["push", "take", "done", "drop"]), st.integers(0, 3)), max_size=60)


@given(steps)
def test_whatever_happens_a_lane_is_never_at_work_twice_and_keeps_its_order(steps: list[tuple[str, int]]) -> None:
    lanes: Lanes[int] = Lanes({"t": 3})
    waiting: dict[Lane, list[int]] = defaultdict(list)
    at_work: list[Lane] = []
    for number, (step, key) in enumerate(steps):
        one = lane(key, partition=key % 2)
        if step == "push":
            lanes.push(one, number)
            waiting[one].append(number)
        elif step == "take":
            taken = lanes.take()
            free = [found for found, messages in waiting.items() if messages and found not in at_work]
            assert (taken is None) == (not free)
            if taken is not None:
                assert taken[0] in free
                assert taken[1] == waiting[taken[0]][:3]
                del waiting[taken[0]][:3]
                at_work.append(taken[0])
        elif step == "done" and at_work:
            lanes.done(at_work.pop(0))
        elif step == "drop":
            dropped = [message for found in waiting for message in waiting[found] if found.partition == key % 2]
            assert sorted(lanes.drop("t", key % 2)) == sorted(dropped)
            for found in waiting:
                if found.partition == key % 2:
                    waiting[found].clear()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_the_offset_to_commit_is_behind_the_first_that_is_not_done(gaps: list[int], chance: random.Random) -> None:
    offsets, numbers, at = Offsets(), [], 0
    for gap in gaps:  # markers and compaction leave gaps
        at += gap
        numbers.append(at)
        offsets.received(at, at * 1000)
    order = list(numbers)
    chance.shuffle(order)
    done: set[int] = set()
    for number in order:
        offsets.done([number])
        done.add(number)
        first = next((one for one in numbers if one not in done), None)
        assert len(offsets) == len([one for one in numbers if first is not None and one >= first])
        assert offsets.oldest_ms == (None if first is None else first * 1000)
        before = [one for one in numbers if first is None or one < first]
        assert offsets.next == (before[-1] + 1 if before else None)


def test_markers_behind_the_last_message_are_passed_when_nothing_is_left() -> None:
    offsets = Offsets()
    offsets.received(5)
    seen = []
    steps: Sequence[Callable[[], object]] = (
        lambda: offsets.reached(9),
        lambda: offsets.done([5]),
        lambda: offsets.reached(9),
        lambda: offsets.reached(7),  # the end as an earlier fetch saw it
    )
    for step in steps:
        step()
        seen.append(offsets.next)
    assert seen == [None, 6, 9, 9]


def test_a_budget_lets_in_what_there_is_room_for() -> None:
    budget = Budget(messages=10, size=1_000)
    assert budget.wait_for_room(0)
    budget.take(10, 10)
    assert not budget.wait_for_room(0)
    budget.give_back(1, 1)
    assert not budget.wait_for_room(0), "a tenth is not yet free"
    budget.give_back(1, 1)
    assert budget.wait_for_room(0)
    budget.take(1, 992)
    assert not budget.wait_for_room(0), "as many bytes as there may be"
    waiting = threading.Thread(target=lambda: budget.give_back(5, 500))
    waiting.start()
    assert budget.wait_for_room(10)
    waiting.join()
    assert budget.taken == (4, 500)
