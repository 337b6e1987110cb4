"""Every interleaving of several relays on one lane, searched: no duplicate, no loss, no disorder, no needless halt.

The relays run the real code: `reconcile`, `Progress`, and `Lane` with its `may_…` questions. Kafka and the database
are modelled, as the values in `World`. A breadth-first search visits every state that any order of their steps can
reach, and checks the invariants in each. Then the same search, with one rule of the protocol broken at a time, must
find a violation: that shows that the rule is needed and that the search has teeth.

What is modelled:

- A relay is one hold on the lane. It may start at any moment, whoever has the lease: the lease's clock is NOT
  modelled. What is, is `lane.owner`, which the lease step sets: a name, not a clock.
- A crash is a pause that never ends, and a commit whose answer never comes is one as well. A search over all
  interleavings holds every pause, so there is no step for a crash.
- Kafka: per transactional.id who holds it and the open transaction; a log in which records stand where they were
  produced, and become visible at the commit; offsets in the order in which they were sent, for the broker keeps the
  one that was SENT last (`OffsetMetadataManager.replayEndTransactionMarker`), in whatever order the transactions
  end.
- The database: rows, and the lane's row. A statement is atomic; between two statements anything may happen.
- Kafka forgets the progress at any time (but for the instant between the two writes of a beginning; a relay would
  have to pause for `offsets.retention.minutes` there). The database may be restored once to any earlier moment (in
  its own scenario).
- Late copies (in their own scenario): librdkafka repeats an EndTxn or a TxnOffsetCommit whose connection broke, and
  the first one arrives at any later moment, in whatever transaction its id then has (KAFKA-17754). The relay knows
  (the client's log) and recycles: nothing more is produced or committed, what was committed is deleted, and the lane
  is taken again from step 2. Records are then sent one by one, and one that comes after its transaction was ended
  opens a new one, as a broker without verification would let it.

Symmetry: relays are the same but for their state, so they are kept as a sorted bag. Epochs are replaced by "holds
the id, or does not". A relay that can touch neither Kafka nor the database again is dropped. Calls of the real code
are made once per distinct argument and remembered; lanes are kept as numbers in a table (`_known`), because hashing
them is what would cost the most.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache
from itertools import pairwise
from typing import NamedTuple
from uuid import UUID

import pytest

from relay.lane import (
    Batch,
    Begin,
    Doubt,
    Finish,
    Lane,
    Progress,
    Resume,
    Runs,
    Stage,
    Verdict,
    parse_progress,
    reconcile,
    runs_of,
)

OUTBOX = UUID(int=7)

Offset = tuple[int, str]
"""What the broker keeps: the number of a batch, and its metadata."""

COMMITTED = -1
"""In the log, in place of the id: the record's transaction was committed."""


class At(IntEnum):
    """What a relay does next."""

    FENCE = 2
    PROGRESS = 3
    ROW = 4  # read the lane's row
    RECONCILE = 5  # the compare-and-set
    BEGUN = 6  # progress written, `released` not cleared yet
    CYCLE = 7
    CUT = 8  # its connection to the database is gone, the one to Kafka is not


class Relay(NamedTuple):
    at: At = At.FENCE
    holds: tuple[bool, bool] = (False, False)
    """The producers of which it opened the last epoch."""
    owner: bool = True
    again: bool = False
    """It was in doubt once."""
    seen: Offset | None = None
    """Until step 4 the progress it read; from then on the progress it wrote or found last."""
    row: tuple[int, bool] | None = None
    """(batch, released) as it read them."""
    lane: int = -1
    """A number from `_known`."""
    sent: int = 0
    """Records that were sent of the batch that is being produced."""
    suspicious: bool = False
    """A request was repeated: a copy may be under way."""


class Database(NamedTuple):
    written: frozenset[int] = frozenset()
    """Every row that a transaction of the service committed."""
    rows: frozenset[int] = frozenset()
    batch: int = 0
    released: bool = True


class World(NamedTuple):
    db: Database
    log: tuple[tuple[int, int], ...]
    """The one partition: (seq, id whose transaction is open, or COMMITTED), in the order of production."""
    pending: tuple[tuple[int, Offset, bool], ...]
    """Offsets of open transactions in the order they were sent: id, offset, whether it still counts (`committed`)."""
    progress: Offset | None
    relays: tuple[Relay, ...]
    unborn: int
    top: int = 0
    """The last seq that was given."""
    forgotten: bool = False
    """Kafka forgot the progress of a lane that was not released, or the database was restored: a halt is right."""
    backup: Database | None = None
    restored: bool = False
    late: tuple[int, Offset | None] | None = None
    """A copy that will arrive late: its id, and the offset it carries; None: it ends the transaction."""


@dataclass(frozen=True)
class Rules:
    """The size of a search, what may happen in it, and the rule that is broken."""

    relays: int = 2
    rows: int = 3
    expiry: bool = True
    restore: bool = False
    late: bool = False
    halts: bool = True
    """Whether a needless halt counts as a violation; if not, only what is wrong in Kafka does."""
    broken: str = ""


# ---- the real code, each distinct call once --------------------------------------------------------------------------


class EarlyCommit(Lane):
    """n+1 committed before the delete of n is acknowledged."""

    def may_commit(self, number: int) -> bool:
        return self._is(number, Stage.FLUSHED) and all(
            before.stage is Stage.COMMITTED for before in self.window if before.number < number
        )


class BlindCommit(Lane):
    """n+1 committed before the commit of n."""

    def may_commit(self, number: int) -> bool:
        return self._is(number, Stage.FLUSHED)


class HidesNothing(Lane):
    """A fetch sees the rows under way."""

    @property
    def hidden(self) -> Runs:
        return ()


class EarlyProduce(Lane):
    """n+1 produced before n was flushed."""

    def may_produce(self, number: int) -> bool:
        return self._is(number, Stage.FETCHED)


LANES: dict[str, type[Lane]] = {
    "n+1 committed before n's delete": EarlyCommit,
    "n+1 committed before n's commit": BlindCommit,
    "a fetch sees rows under way": HidesNothing,
    "n+1 produced before n's flush": EarlyProduce,
}

WITHOUT_OWNER = {"step 4 without owner", "step 4 without owner and batch"}
WITHOUT_BATCH = {"step 4 without batch", "step 4 without owner and batch"}

NEVER_RECYCLES = {"no recycling", "no recycling, progress first"}

_known: list[Lane] = []
_numbers: dict[tuple[type, Lane], int] = {}


def _number(lane: Lane) -> int:
    number = _numbers.setdefault((type(lane), lane), len(_known))
    if number == len(_known):
        _known.append(lane)
    return number


@cache
def new_lane(broken: str, batch: int) -> int:
    return _number(LANES.get(broken, Lane)(batch))


@cache
def hidden(lane: int) -> frozenset[int]:
    return frozenset(seqs_of(_known[lane].hidden))


@cache
def next_number(lane: int) -> int | None:
    """The number of the batch that may be fetched now."""
    return _known[lane].next if _known[lane].may_fetch() else None


@cache
def fetched(lane: int, seqs: tuple[int, ...]) -> int:
    return _number(_known[lane].fetched(runs_of(seqs)))


@cache
def producible(lane: int) -> list[tuple[Batch, int]]:
    return [(b, _number(_known[lane].flushed(b.number))) for b in window(lane) if _known[lane].may_produce(b.number)]


@cache
def committable(lane: int) -> list[tuple[Batch, int]]:
    return [(b, _number(_known[lane].committed(b.number))) for b in window(lane) if _known[lane].may_commit(b.number)]


@cache
def deletable(lane: int) -> list[tuple[Batch, int]]:
    """The batch to be deleted next, if it was committed."""
    oldest = window(lane)[:1]
    return [(b, _number(_known[lane].deleted(b.number))) for b in oldest if b.stage is Stage.COMMITTED]


def window(lane: int) -> tuple[Batch, ...]:
    return _known[lane].window


@cache
def any_committed(lane: int) -> bool:
    return any(batch.stage is Stage.COMMITTED for batch in window(lane))


@cache
def offset_of(batch: int, runs: Runs) -> Offset:
    return batch, Progress(OUTBOX, batch, runs).metadata()


@cache
def verdict(batch: int, released: bool, seen: Offset | None) -> Verdict:
    return reconcile(OUTBOX, batch, released, parse_progress(*seen) if seen else None)


@cache
def seqs_of(runs: Runs) -> tuple[int, ...]:
    return tuple(seq for start, end in runs for seq in range(start, end))


Move = tuple[World, Relay | None]
"""The world after a relay's step, and the relay; None: it has nothing more to do."""


# ---- the broker ------------------------------------------------------------------------------------------------------


def aborted(world: World, number: int) -> World:
    """The open transaction of id `number` is gone, and what comes late for it will be refused: its epoch is over."""
    return world._replace(
        late=None if world.late and world.late[0] == number else world.late,
        log=tuple(entry for entry in world.log if entry[1] != number),
        pending=tuple(entry for entry in world.pending if entry[0] != number),
    )


def committed(world: World, number: int) -> World:
    """The open transaction of id `number` becomes visible; its offset counts unless one sent later counts already."""
    log = tuple((seq, COMMITTED if who == number else who) for seq, who in world.log)
    if not sent(world, number):  # what was committed late has no offset yet
        return world._replace(log=log)
    place = [who for who, _, _ in world.pending].index(number)
    _, offset, counts = world.pending[place]
    overtaken = tuple((who, earlier, False) for who, earlier, _ in world.pending[:place])
    after = world._replace(log=log, pending=(*overtaken, *world.pending[place + 1 :]))
    return after._replace(progress=offset, forgotten=world.restored) if counts else after


def sent(world: World, number: int) -> bool:
    """Whether the open transaction of id `number` has an offset."""
    return any(who == number for who, _, _ in world.pending)


def send(world: World, number: int, offset: Offset) -> World:
    """The offset that a transaction sends last is its offset."""
    others = tuple(entry for entry in world.pending if entry[0] != number)
    return world._replace(pending=(*others, (number, offset, True)))


def arrive(world: World) -> World:
    """The late copy arrives. The broker cannot tell it from a request of the transaction that its id has open now."""
    assert world.late is not None
    number, offset = world.late
    after = world._replace(late=None)
    return committed(after, number) if offset is None else send(after, number, offset)


def repeated(rules: Rules, number: int, offset: Offset | None, move: Move) -> Iterator[Move]:
    """`move`, and the same with its request repeated, so that a copy is under way and the relay knows."""
    world, relay = move
    yield move
    if rules.late and world.late is None and relay is not None:
        yield world._replace(late=(number, offset)), relay._replace(suspicious=True)


# ---- steps -----------------------------------------------------------------------------------------------------------


def steps(world: World, rules: Rules) -> Iterator[World]:
    """Every state that one step leads to."""
    yield from environment(world, rules)
    if world.unborn:
        yield with_owner(world._replace(unborn=world.unborn - 1), world.relays, Relay(at=first(rules)))
    for place, relay in enumerate(world.relays):
        others = world.relays[:place] + world.relays[place + 1 :]
        for after, new in STEPS[relay.at](world, relay, rules):
            yield from fenced(after, others, relay, new, rules)


def environment(world: World, rules: Rules) -> Iterator[World]:
    """A row arrives, Kafka forgets the progress, the database is saved or restored."""
    db = world.db
    if world.top < rules.rows:
        row = {world.top + 1}
        yield world._replace(db=db._replace(written=db.written | row, rows=db.rows | row), top=world.top + 1)
    if (
        rules.expiry
        and world.progress
        and not world.restored
        and all(relay.at is not At.BEGUN for relay in world.relays)
    ):
        yield world._replace(progress=None, forgotten=world.forgotten or not db.released)
    if world.late:
        yield arrive(world)
    if rules.restore and not world.restored:
        if world.backup is None:
            yield world._replace(backup=db)
        elif world.progress:
            yield restored(world, world.backup)


def restored(world: World, backup: Database) -> World:
    """The database goes back. Its connections are cut; a relay may still commit what it produced before it notices."""
    cut = tuple(r._replace(at=At.CUT, owner=False) for r in world.relays if r.at is At.CYCLE)
    return bag(world._replace(db=backup, forgotten=True, restored=True, backup=None), cut)


def first(rules: Rules) -> At:
    return At.PROGRESS if rules.broken == "progress read before the fences" else At.FENCE


def fence(world: World, relay: Relay, rules: Rules) -> Iterator[Move]:
    """Step 2: two requests, in any order. What was open is aborted. (`fenced` takes the id from the others.)"""
    for number in (0, 1):
        if not relay.holds[number]:
            holds = (relay.holds[0] or number == 0, relay.holds[1] or number == 1)
            done = all(holds) or rules.broken == "one id left unfenced"
            then = At.ROW if first(rules) is At.PROGRESS else At.PROGRESS
            yield aborted(world, number), relay._replace(holds=holds, at=then if done else At.FENCE)


def read_progress(world: World, relay: Relay, rules: Rules) -> Iterator[Move]:
    """Step 3."""
    yield world, relay._replace(seen=world.progress, at=At.FENCE if first(rules) is At.PROGRESS else At.ROW)


def read_row(world: World, relay: Relay, rules: Rules) -> Iterator[Move]:
    """Step 4, first half."""
    released = world.db.released or (rules.broken == "no progress taken for a beginning" and relay.seen is None)
    yield world, relay._replace(row=(world.db.batch, released), at=At.RECONCILE)


def settle(world: World, relay: Relay, rules: Rules) -> Iterator[Move]:
    """Step 4, second half: act on what was read."""
    assert relay.row is not None
    batch, released = relay.row
    if not relay.owner and rules.broken not in WITHOUT_OWNER:
        yield world, None
        return
    match judged(rules, batch, released, relay.seen):
        case Resume():
            yield advance(world, relay, rules, batch, batch, (), relay.seen)
        case Finish(number, runs):
            gone = () if rules.broken == "Finish deletes nothing" else runs
            yield advance(world, relay, rules, batch, number, gone, relay.seen)
        case Begin(number):
            yield from begin(world, relay, rules, batch, number)
        case Doubt():
            if relay.again and not world.forgotten and rules.halts:
                raise ViolationError("needless halt", world)
            if not relay.again:
                yield world, Relay(at=first(rules), again=True)


def judged(rules: Rules, batch: int, released: bool, seen: Offset | None) -> Verdict:
    """The real verdict, but for two broken rules that would have changed it."""
    found = verdict(batch, released, seen)
    if isinstance(found, Begin):
        if rules.broken == "released cleared on old progress" and seen:
            return Resume(batch)
        if rules.broken == "Begin without a number of its own":
            return Begin(batch)
    return found


def begin(world: World, relay: Relay, rules: Rules, batch: int, number: int) -> Iterator[Move]:
    """Write the progress of an empty batch, and only then (`begun`) set the lane to it and clear `released`."""
    offset = offset_of(number, ())
    if rules.broken == "released cleared before the progress is written":
        after, new = advance(world, relay, rules, batch, number, (), offset)
        yield after, new and new._replace(at=At.BEGUN)
    elif relay.holds[number % 2]:
        move = written(world, number % 2, offset), relay._replace(at=At.BEGUN, seen=offset)
        yield from repeated(rules, number % 2, None, move)


def begun(world: World, relay: Relay, rules: Rules) -> Iterator[Move]:
    assert relay.seen is not None
    number = relay.seen[0]
    if rules.broken == "released cleared before the progress is written":
        if relay.holds[number % 2]:
            yield written(world, number % 2, relay.seen), relay._replace(at=At.CYCLE)
    else:
        assert relay.row is not None
        owns = relay.owner or rules.broken in WITHOUT_OWNER
        yield advance(world, relay, rules, relay.row[0], number, (), relay.seen) if owns else (world, None)


def written(world: World, number: int, offset: Offset) -> World:
    """An empty transaction of id `number` that commits `offset`."""
    return committed(send(world, number, offset), number)


def advance(world: World, relay: Relay, rules: Rules, before: int, batch: int, runs: Runs, seen: Offset | None) -> Move:
    """One statement: UPDATE lane SET batch, released = false WHERE batch = before; and the rows are deleted."""
    if world.db.batch != before and rules.broken not in WITHOUT_BATCH:
        return world, None
    rows = world.db.rows - frozenset(seqs_of(runs))
    after = world._replace(db=world.db._replace(rows=rows, batch=batch, released=False))
    lane = new_lane(rules.broken, batch)
    return after, relay._replace(at=At.CYCLE, again=False, seen=seen, row=None, lane=lane)


def cycle(world: World, relay: Relay, rules: Rules) -> Iterator[Move]:
    yield from delete(world, relay, rules)
    if relay.suspicious and rules.broken not in NEVER_RECYCLES:
        yield from recycle(world, relay, rules)
        return
    yield from fetch(world, relay)
    yield from produce(world, relay, rules)
    yield from commit(world, relay, rules)
    yield from rest(world, relay, rules)


def recycle(world: World, relay: Relay, rules: Rules) -> Iterator[Move]:
    """What was committed is deleted first (`cycle`); then the producers go, and with them all that is not committed.

    A batch whose progress was sent already may still be committed.
    """
    yield from end(world, relay, rules)
    if rules.broken == "n+2 produced before the recycling":
        yield from produce(world, relay, rules)
    if rules.broken == "n+1 committed before the recycling":
        yield from commit(world, relay, rules)
    if not any_committed(relay.lane):
        yield world, Relay(at=first(rules), owner=relay.owner)


def fetch(world: World, relay: Relay) -> Iterator[Move]:
    """Step 5. A batch may be cut anywhere. (One that could never be committed is left out: it changes nothing.)"""
    number = next_number(relay.lane)
    if number is not None and relay.holds[number % 2]:
        seqs = tuple(sorted(world.db.rows - hidden(relay.lane)))
        for count in range(1, len(seqs) + 1):
            yield world, relay._replace(lane=fetched(relay.lane, seqs[:count]))


def produce(world: World, relay: Relay, rules: Rules) -> Iterator[Move]:
    """Step 6, until the flush: the records stand in the log. All at once, unless late copies may come between."""
    for batch, lane in producible(relay.lane):
        number = batch.number % 2
        if not relay.holds[number]:
            continue
        seqs = seqs_of(batch.runs)
        some = seqs[relay.sent : relay.sent + 1] if rules.late else seqs
        after = world._replace(log=world.log + tuple((seq, number) for seq in some))
        if rules.broken == "no recycling, progress first" and not relay.sent:
            after = send(after, number, offset_of(batch.number, batch.runs))
        count = relay.sent + len(some)
        yield after, relay._replace(lane=lane, sent=0) if count == len(seqs) else relay._replace(sent=count)


def commit(world: World, relay: Relay, rules: Rules) -> Iterator[Move]:
    yield from send_progress(world, relay, rules)
    yield from end(world, relay, rules)


def send_progress(world: World, relay: Relay, rules: Rules) -> Iterator[Move]:
    """Step 6, progress. That of n+1 is sent only when n+1 may be committed, so that it is behind that of n."""
    ready = [batch for batch, _ in committable(relay.lane)]
    if rules.broken == "progress of n+1 sent before n's" and relay.at is At.CYCLE:
        ready = [batch for batch in window(relay.lane) if batch.stage is Stage.FLUSHED]
    for batch in ready:
        number = batch.number % 2
        offset = offset_of(batch.number, batch.runs)
        if relay.holds[number] and not sent(world, number):
            yield from repeated(rules, number, offset, (send(world, number, offset), relay))


def end(world: World, relay: Relay, rules: Rules) -> Iterator[Move]:
    """Step 6, commit."""
    for batch, lane in committable(relay.lane):
        number = batch.number % 2
        if relay.holds[number] and sent(world, number):
            seen = offset_of(batch.number, batch.runs)
            yield from repeated(rules, number, None, (committed(world, number), relay._replace(lane=lane, seen=seen)))


def delete(world: World, relay: Relay, rules: Rules) -> Iterator[Move]:
    """Step 7."""
    for batch, lane in deletable(relay.lane):
        if world.db.batch == batch.number - 1 or rules.broken == "delete without compare-and-set":
            db = world.db._replace(
                rows=world.db.rows - frozenset(seqs_of(batch.runs)), batch=batch.number, released=False
            )
            yield world._replace(db=db), relay._replace(lane=lane)
        else:
            yield world, None


def rest(world: World, relay: Relay, rules: Rules) -> Iterator[Move]:
    """Nothing is under way: write the progress again (keep-alive), or stop cleanly."""
    idle = not window(relay.lane)
    if idle and relay.seen:
        offset = relay.seen
        if rules.broken == "keep-alive without the seqs":
            offset = offset_of(offset[0], ())
        for number in (0, 1):
            if relay.holds[number] and world.progress != offset:
                yield from repeated(rules, number, None, (written(world, number, offset), relay))
    if (idle or rules.broken == "released with a batch under way") and (
        relay.owner or rules.broken == "clean stop without owner"
    ):
        yield world._replace(db=world.db._replace(released=True)), None


def cut_off(world: World, relay: Relay, rules: Rules) -> Iterator[Move]:
    yield from commit(world, relay, rules)


STEPS = {
    At.FENCE: fence,
    At.PROGRESS: read_progress,
    At.ROW: read_row,
    At.RECONCILE: settle,
    At.BEGUN: begun,
    At.CYCLE: cycle,
    At.CUT: cut_off,
}


# ---- relays as a sorted bag ------------------------------------------------------------------------------------------


def fenced(world: World, others: tuple[Relay, ...], old: Relay, new: Relay | None, rules: Rules) -> Iterator[World]:
    """The state after the step `old` → `new` of one relay: what it took, the others have lost."""
    if new is None:
        yield bag(world, others)
        return
    if new.holds != old.holds and any(new.holds):
        kept = (new.holds[0] == old.holds[0], new.holds[1] == old.holds[1])
        others = tuple(
            o._replace(holds=(o.holds[0] and kept[0], o.holds[1] and kept[1])) if any(o.holds) else o for o in others
        )
        if not rules.broken:
            others = tuple(o for o in others if not spent(o))
    if new.again and not old.again:
        yield with_owner(world, others, new)
    elif not rules.broken and spent(new):
        yield bag(world, others)
    else:
        yield bag(world, (*others, new))


def with_owner(world: World, others: tuple[Relay, ...], new: Relay) -> World:
    """Step 1, the lease: `new` is the owner."""
    return bag(world, (*(o._replace(owner=False) if o.owner else o for o in others), new))


def spent(relay: Relay) -> bool:
    """It holds no id, has no delete to make and cannot stop cleanly: it will change neither Kafka nor the database."""
    if relay.at < At.CYCLE or any(relay.holds):
        return False
    if relay.at is At.CUT:
        return True
    return not any_committed(relay.lane) and not (relay.owner and not window(relay.lane))


def bag(world: World, relays: tuple[Relay, ...]) -> World:
    return world._replace(relays=tuple(sorted(relays, key=hash)) if len(relays) > 1 else relays)


# ---- invariants and the search ---------------------------------------------------------------------------------------


class ViolationError(Exception):
    def __init__(self, what: str, world: World) -> None:
        super().__init__(what)
        self.what = what
        self.world = world


def check(world: World, rules: Rules) -> None:
    """What must be true in every state."""
    visible = [seq for seq, who in world.log if who == COMMITTED]
    if any(a >= b for a, b in pairwise(visible)):
        raise ViolationError("duplicate" if len(set(visible)) < len(visible) else "disorder", world)
    if not world.db.written <= world.db.rows.union(visible):
        raise ViolationError("loss", world)
    if (
        rules.halts
        and not world.forgotten
        and isinstance(verdict(world.db.batch, world.db.released, world.progress), Doubt)
    ):
        raise ViolationError("needless doubt", world)


def search(rules: Rules) -> int:
    """Visit every state; their number is returned.

    Raises:
        ViolationError: of a shortest way to one.
    """
    start = World(Database(), (), (), None, (), rules.relays)
    seen = {start}
    queue = deque([start])
    while queue:
        for after in steps(queue.popleft(), rules):
            if after not in seen:
                check(after, rules)
                seen.add(after)
                queue.append(after)
    return len(seen)


# ---- the proof -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rules",
    [
        Rules(relays=2, rows=4),
        Rules(relays=2, rows=2, restore=True),
        Rules(relays=2, rows=3, late=True),
    ],
    ids=str,
)
def test_no_interleaving_breaks_the_promise(rules: Rules) -> None:
    assert search(rules) > 10_000


@pytest.mark.crash
@pytest.mark.parametrize(
    "rules",
    [
        Rules(relays=3, rows=4),
        Rules(relays=3, rows=2, restore=True),
        Rules(relays=3, rows=2, late=True),
    ],
    ids=str,
)
def test_no_interleaving_of_three_relays_breaks_the_promise(rules: Rules) -> None:
    """Up to half a minute each."""
    assert search(rules) > 100_000


TWO = Rules(relays=2, rows=2)
TWO_KAFKA = replace(TWO, halts=False)
THREE_KAFKA = Rules(relays=3, rows=2, halts=False)
RESTORE = Rules(relays=2, rows=2, halts=False, restore=True, expiry=False)
LATE = Rules(relays=2, rows=3, halts=False, late=True, expiry=False)

BROKEN = {
    "progress read before the fences": ("duplicate", TWO_KAFKA),
    "one id left unfenced": ("duplicate", THREE_KAFKA),
    "n+1 committed before n's delete": ("needless doubt", TWO),
    "n+1 committed before n's commit": ("duplicate", TWO_KAFKA),
    "progress of n+1 sent before n's": ("duplicate", TWO_KAFKA),
    "n+1 produced before n's flush": ("disorder", TWO_KAFKA),
    "a fetch sees rows under way": ("duplicate", TWO_KAFKA),
    "delete without compare-and-set": ("needless doubt", TWO),
    "step 4 without owner": ("duplicate", THREE_KAFKA),
    "step 4 without owner and batch": ("duplicate", THREE_KAFKA),
    "no progress taken for a beginning": ("duplicate", TWO_KAFKA),
    "released cleared before the progress is written": ("needless doubt", TWO),
    "released cleared on old progress": ("needless doubt", TWO),
    "released with a batch under way": ("duplicate", TWO_KAFKA),
    "clean stop without owner": ("duplicate", THREE_KAFKA),
    "Finish deletes nothing": ("duplicate", TWO_KAFKA),
    "keep-alive without the seqs": ("duplicate", RESTORE),
    "Begin without a number of its own": ("duplicate", Rules(relays=3, rows=1, halts=False, restore=True)),
    "no recycling": ("disorder", LATE),
    "no recycling, progress first": ("loss", LATE),
    "n+2 produced before the recycling": ("disorder", LATE),
}
"""The broken rule, the worst that comes of it, a small search that shows it (`halts=False`: past needless halts)."""


@pytest.mark.parametrize(
    "broken", [pytest.param(b, marks=[pytest.mark.crash] if r.relays > 2 else []) for b, (_, r) in BROKEN.items()]
)
def test_a_broken_rule_is_found(broken: str) -> None:
    worst, rules = BROKEN[broken]
    with pytest.raises(ViolationError) as found:
        search(replace(rules, broken=broken))
    assert found.value.what == worst


@pytest.mark.parametrize(
    ("unneeded", "rules"),
    [
        ("step 4 without batch", Rules(relays=3, rows=1)),
        ("n+1 committed before the recycling", Rules(relays=2, rows=2, late=True)),
    ],
)
def test_a_rule_that_is_stricter_than_it_must_be(unneeded: str, rules: Rules) -> None:
    """The owner in step 4 makes its comparison of the batch a second lock; n+1 is on the id that is not suspicious."""
    assert search(replace(rules, broken=unneeded)) > 10_000
