"""The safe floor never passes a row that is still to come: every order of writers, fetches and readings, searched.

Writers take the table's lock, then seqs; they commit, roll back or prepare at any moment. A prepared transaction keeps
its name or gets a new one (`relay.floor.PREPARED`). The relay fetches (cut off by a limit or not) and reads the holders
whenever `Floor.due` says so. A reading of pg_locks is no snapshot, but it names everyone who held the lock all the
time that it took; who came or went meanwhile may as well have done so before or after it.
"""

import copy
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.floor import PREPARED, Floor


class At(IntEnum):
    IDLE = 0
    LOCKED = 1
    PREPARED = 2
    RENAMED = 3
    ENDED = 4


class Writer(NamedTuple):
    name: int
    at: At = At.IDLE
    seqs: tuple[int, ...] = ()

    def holder(self) -> str:
        return f"{PREPARED}{self.name}" if self.at is At.RENAMED else f"3/{self.name}"


class World(NamedTuple):
    writers: tuple[Writer, ...]
    top: int
    """The last seq that was given."""
    rows: frozenset[int]
    """Committed, and not fetched yet."""
    fetched: tuple[int, ...]
    """In the order of the fetches; fetched rows are hidden or deleted."""
    floor: tuple[int, int, int, frozenset[str] | None]


@dataclass(frozen=True)
class Rules:
    floor: type[Floor] = Floor
    writers: int = 3
    seqs: int = 3
    sees_prepared: bool = True
    sees_cut: bool = True
    counts_untaken: bool = False
    keyed: bool = False
    """All events are of one key, and a writer locks the key's aggregate before it takes a seq."""


def thaw(kind: type[Floor], frozen: tuple[int, int, int, frozenset[str] | None]) -> Floor:
    floor = kind()
    floor.value, floor.top, floor._candidate = frozen[:3]
    floor._blockers = None if frozen[3] is None else set(frozen[3])
    return floor


def freeze(floor: Floor) -> tuple[int, int, int, frozenset[str] | None]:
    blockers = None if floor._blockers is None else frozenset(floor._blockers)
    return floor.value, floor.top, floor._candidate, blockers


def steps(world: World, rules: Rules) -> Iterator[World]:
    for place, writer in enumerate(world.writers):
        for after, new in write(world, writer, rules):
            yield after._replace(writers=(*world.writers[:place], new, *world.writers[place + 1 :]))
    for limit in (1, 2, rules.seqs + 1):
        yield fetch(world, limit, rules)
    floor = thaw(rules.floor, world.floor)
    if floor.due():
        floor.read(holders(world, rules))
        yield world._replace(floor=freeze(floor))


def write(world: World, writer: Writer, rules: Rules) -> Iterator[tuple[World, Writer]]:
    """One step of a writer."""
    match writer.at:
        case At.IDLE:
            yield world, writer._replace(at=At.LOCKED)
        case At.LOCKED:
            others = any(other.seqs and other.at is not At.ENDED for other in world.writers if other != writer)
            if world.top < rules.seqs and not (rules.keyed and others):
                seq = world.top + 1
                yield world._replace(top=seq), writer._replace(seqs=(*writer.seqs, seq))
            yield world, writer._replace(at=At.PREPARED)
            yield world, writer._replace(at=At.RENAMED)
        case At.PREPARED:  # by a restart
            yield world, writer._replace(at=At.RENAMED)
    if At.IDLE < writer.at < At.ENDED:
        ended = writer._replace(at=At.ENDED, seqs=())
        yield world, ended
        if writer.seqs:
            yield world._replace(rows=world.rows.union(writer.seqs)), ended


def fetch(world: World, limit: int, rules: Rules) -> World:
    """Step 5 of the lane protocol, and what the floor is told of it."""
    floor = thaw(rules.floor, world.floor)
    found = sorted(seq for seq in world.rows if seq > floor.value)
    taken = found[:limit]
    last = found if rules.counts_untaken else taken
    floor.fetched(last[-1] if last else 0, complete=len(found) < limit or not rules.sees_cut)
    return world._replace(rows=world.rows - set(taken), fetched=(*world.fetched, *taken), floor=freeze(floor))


def holders(world: World, rules: Rules) -> list[str]:
    last = At.RENAMED if rules.sees_prepared else At.LOCKED
    return [writer.holder() for writer in world.writers if At.IDLE < writer.at <= last]


def problem(world: World, rules: Rules) -> str | None:
    """What is wrong with this state, if anything is."""
    value = world.floor[0]
    if any(seq <= value for seq in world.rows):
        return "a committed row is below the floor"
    if any(seq <= value for writer in world.writers for seq in writer.seqs):
        return "a row to come is below the floor"
    if rules.keyed and any(a > b for a, b in pairwise(world.fetched)):
        return "out of order"
    return None


def search(rules: Rules) -> tuple[int, str | None]:
    """The number of states, and the first problem."""
    start = World(tuple(Writer(i) for i in range(rules.writers)), 0, frozenset(), (), freeze(rules.floor()))
    seen = {start}
    queue = deque([start])
    while queue:
        for after in steps(queue.popleft(), rules):
            if after not in seen:
                if found := problem(after, rules):
                    return len(seen), found
                seen.add(after)
                queue.append(after)
    return len(seen), None


@pytest.mark.parametrize("rules", [Rules(), Rules(keyed=True, seqs=4)], ids=["any keys", "one key"])
def test_no_row_is_passed_and_the_key_s_order_holds(rules: Rules) -> None:
    states, found = search(rules)
    assert found is None
    assert states > 10_000


class Naive(Floor):
    def fetched(self, last: int, complete: bool) -> None:  # noqa: ARG002 -- what is naive about it
        self.value = self.top = max(self.top, last)


class NoExtraFetch(Floor):
    def read(self, holders: Collection[str]) -> None:
        super().read(holders)
        if not self._blockers:
            self.value, self._blockers = self._candidate, None


class NoExtraFetchAfterFirstReading(Floor):
    def read(self, holders: Collection[str]) -> None:
        super().read(holders)
        if self._candidate == self.top and not holders:
            self.value, self._blockers = self._candidate, None


class NewNamesIgnored(Floor):
    def read(self, holders: Collection[str]) -> None:
        before = copy.copy(self._blockers)
        super().read(holders)
        if before is not None and self._blockers is not None:
            self._blockers &= before


BROKEN = {
    "naive": Rules(floor=Naive),
    "no extra fetch": Rules(floor=NoExtraFetch),
    "no extra fetch when nobody holds the table": Rules(floor=NoExtraFetchAfterFirstReading),
    "a prepared transaction's new name ignored": Rules(floor=NewNamesIgnored),
    "prepared transactions not among the holders": Rules(sees_prepared=False),
    "complete ignored": Rules(sees_cut=False),
    "rows counted that the batch did not take": Rules(counts_untaken=True),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_floor_is_found(broken: str) -> None:
    rules = BROKEN[broken]
    _, found = search(rules)
    if found is None:
        _, found = search(replace(rules, seqs=4))
    assert found in {"a committed row is below the floor", "a row to come is below the floor"}


# ---- step by step ----------------------------------------------------------------------------------------------------


def test_a_new_floor_knows_nothing() -> None:
    floor = Floor()
    assert (floor.value, floor.top, floor.lag) == (0, 0, 0)
    assert not floor.due()


def test_the_floor_waits_for_the_holders_and_one_more_fetch() -> None:
    floor = Floor()
    floor.fetched(9, complete=True)
    floor.read(["3/1"])
    floor.fetched(12, complete=True)
    assert (floor.value, floor.lag) == (0, 12)
    floor.read(["3/2"])
    assert not floor.due()  # nobody is waited for; what is due is a fetch
    floor.fetched(0, complete=True)
    assert (floor.value, floor.lag) == (9, 3)
    assert floor.due()


def test_a_fetch_that_was_cut_off_moves_the_floor_if_it_reached_it() -> None:
    floor = Floor()
    floor.fetched(9, complete=True)
    floor.read([])
    floor.fetched(5, complete=False)
    assert floor.value == 0
    floor.fetched(9, complete=False)
    assert floor.value == 9


def test_a_holder_that_is_gone_may_be_a_prepared_transaction() -> None:
    floor = Floor()
    floor.fetched(9, complete=True)
    floor.read(["3/1"])
    floor.read(["-1/77"])
    assert floor.due()
    floor.read([])
    floor.fetched(0, complete=True)
    assert floor.value == 9


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(1, 5))
def test_the_floor_moves_under_a_constant_load_of_prepared_transactions(lives: list[int], stay: int) -> None:
    """Every reading shows a new writer and new prepared ones, which stay for `stay` readings. No blocker outlives its
    transaction, and prepared ones are added only when one of the first holders goes: the last of those ends it."""
    floor = Floor()
    floor.fetched(9, complete=True)
    readings = 0
    while floor.due():
        first = [f"3/{i}" for i, life in enumerate(lives) if life > readings]
        passing = [f"-1/{readings - age}" for age in range(stay)]
        floor.read([*first, *passing, f"4/{readings}"])
        readings += 1
        assert readings <= max(lives) + 1 + stay + 1
    floor.fetched(0, complete=True)
    assert floor.value == 9
