"""The fair share of lanes: what a relay takes, keeps and hands over, by what the database says."""

from itertools import pairwise
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from relay.leases import Plan, plan
from relay.queries import LaneRow

OTHER = UUID(int=1)
PATIENCE = 3.0


def lane(number: int, *, free: bool = True, halted: str | None = None) -> LaneRow:
    return LaneRow(number, 0, False, None if free else OTHER, free, halted)


def test_a_single_relay_takes_every_lane() -> None:
    assert plan([lane(n) for n in range(4)], set(), 1, 0, PATIENCE) == Plan((0, 1, 2, 3), ())


def test_one_lane_that_is_held_makes_the_second_relay_a_standby() -> None:
    assert plan([lane(0, free=False)], set(), 2, 0, PATIENCE) == Plan((), ())


def test_the_standby_takes_the_lane_as_soon_as_it_is_free() -> None:
    assert plan([lane(0)], set(), 2, 0, PATIENCE) == Plan((0,), ())


def test_a_relay_hands_over_what_is_above_its_share() -> None:
    lanes = [lane(n, free=False) for n in range(4)]
    assert plan(lanes, {0, 1, 2, 3}, 2, 0, PATIENCE) == Plan((), (2, 3))


def test_a_share_is_rounded_up_so_that_no_lane_stays_behind() -> None:
    lanes = [lane(n) for n in range(5)]
    assert plan(lanes, set(), 2, 0, PATIENCE).take == (0, 1, 2)


def test_a_halted_lane_is_not_taken_and_counts_for_no_share() -> None:
    lanes = [lane(0, halted="why"), lane(1), lane(2)]
    assert plan(lanes, set(), 2, 0, PATIENCE) == Plan((1,), ())
    assert plan(lanes, set(), 1, 0, PATIENCE) == Plan((1, 2), ())


def test_a_lane_that_nobody_comes_for_is_taken_above_the_share() -> None:
    lanes = [lane(0, free=False), lane(1)]
    assert plan(lanes, {0}, 2, PATIENCE - 0.1, PATIENCE) == Plan((), ())
    assert plan(lanes, {0}, 2, PATIENCE + 0.1, PATIENCE) == Plan((1,), ())


def test_a_lane_that_is_being_taken_is_not_taken_twice() -> None:
    assert plan([lane(0), lane(1)], {0}, 1, 0, PATIENCE) == Plan((1,), ())


def test_no_lanes_and_no_relays_are_no_error() -> None:
    assert plan([], set(), 0, 0, PATIENCE) == Plan((), ())


@given(lanes=st.integers(1, 40), relays=st.integers(1, 8), order=st.randoms(use_true_random=False))
def test_relays_that_look_in_any_order_settle_on_shares_that_differ_by_a_share_rounding(
    lanes: int, relays: int, order: object
) -> None:
    """Whoever looks and in whatever order, after a few rounds every lane has a relay and nobody has above its share."""
    holding: list[set[int]] = [set() for _ in range(relays)]
    holding[0] = set(range(lanes))  # the first one came alone
    for _ in range(4):
        for own in holding:
            held = set().union(*holding)
            rows = [lane(n, free=n not in held) for n in range(lanes)]
            decided = plan(rows, own, relays, 0, PATIENCE)
            own |= set(decided.take)
            own -= set(decided.give)
    assert sorted(n for own in holding for n in own) == list(range(lanes))
    assert max(len(own) for own in holding) <= -(-lanes // relays)
    assert all(not one & other for one, other in pairwise(holding))
