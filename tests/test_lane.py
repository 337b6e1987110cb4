"""The lane protocol's values: sets of seqs, the progress and its bytes, the verdicts, the steps that are refused."""

import base64
import random
import zlib
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate, pairwise
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.errors import IllegalStep, ProgressError
from relay.lane import (
    METADATA_BYTES,
    WINDOW,
    Begin,
    Doubt,
    Finish,
    Lane,
    Progress,
    Resume,
    Runs,
    Verdict,
    cut,
    digest_of,
    parse_progress,
    reconcile,
    runs_of,
    union,
)

OUTBOX = UUID("0199c0de-0000-7000-8000-000000000007")
OTHER = UUID("0199c0de-0000-7000-8000-000000000008")
MAX_SEQ = 2**63 - 2  # the run that ends with it is written with the seq behind it

seq_sets = st.sets(st.integers(1, 200)) | st.sets(st.integers(1, MAX_SEQ), max_size=30)


def seqs_of(runs: Runs) -> list[int]:
    return [seq for start, end in runs for seq in range(start, end)]


# ---- sets of seqs ----------------------------------------------------------------------------------------------------


def test_runs_are_half_open() -> None:
    assert runs_of([1, 2, 3, 7]) == ((1, 4), (7, 8))


@given(seq_sets)
def test_runs_hold_exactly_the_seqs_and_are_apart(seqs: set[int]) -> None:
    runs = runs_of(sorted(seqs))
    assert seqs_of(runs) == sorted(seqs)
    assert all(end < start for (_, end), (start, _) in pairwise(runs))


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2)), unique_by=lambda pair: pair[0]))
def test_a_union_is_the_runs_of_all(pairs: list[tuple[int, int]]) -> None:
    parts = [runs_of(sorted(seq for seq, part in pairs if part == number)) for number in range(3)]
    assert union(parts) == runs_of(sorted(seq for seq, _ in pairs))


# ---- progress --------------------------------------------------------------------------------------------------------


@given(seq_sets, st.uuids(), st.integers(0, MAX_SEQ))
@example({MAX_SEQ}, OUTBOX, 0)
def test_progress_comes_back_as_it_was_written(seqs: set[int], outbox: UUID, batch: int) -> None:
    progress = Progress(outbox, batch, runs_of(sorted(seqs)), digest_of([str(seq) for seq in seqs]))
    assert parse_progress(batch, progress.metadata()) == progress


@st.composite
def backlogs(draw: st.DrawFn) -> list[int]:
    """Up to 8,000 ascending seqs, with gaps as several lanes and rollbacks make them."""
    gap = draw(st.sampled_from([1, 2, 5, 100, 100_000]))
    gaps = random.Random(draw(st.integers())).choices(range(1, gap + 1), k=draw(st.integers(1, 8_000)))  # noqa: S311 -- no secret
    return list(accumulate(gaps, initial=draw(st.integers(1, 2**62))))


@given(backlogs())
def test_a_cut_batch_fits_and_is_not_much_smaller_than_it_could_be(seqs: list[int]) -> None:
    progress, text = cut(OUTBOX, 9, seqs, [str(seq) for seq in seqs])
    count = len(seqs_of(progress.runs))
    assert len(text) <= METADATA_BYTES
    assert seqs_of(progress.runs) == seqs[:count]
    assert parse_progress(9, text) == progress
    if count < len(seqs):
        assert len(text) > METADATA_BYTES * 0.9


def test_one_row_is_taken_whatever_the_limit() -> None:
    progress, _ = cut(OUTBOX, 1, [MAX_SEQ - 1, MAX_SEQ], ["a", "b"], limit=1)
    assert progress.runs == ((MAX_SEQ - 1, MAX_SEQ),)


HEAD = OUTBOX.bytes + digest_of(())


def packed(raw: bytes) -> str:
    return "1." + base64.b64encode(zlib.compress(raw)).decode()


texts = (
    st.text()
    | st.text().map("1.".__add__)
    | st.binary().map(lambda raw: "1." + base64.b64encode(raw).decode())
    | st.binary().map(packed)
    | st.binary().map(lambda raw: packed(HEAD + raw))
)


@given(texts)
def test_no_text_raises_anything_but_a_progress_error(text: str) -> None:
    with suppress(ProgressError):
        progress = parse_progress(5, text)
        assert parse_progress(5, progress.metadata()) == progress


@given(seq_sets, st.data())
def test_a_damaged_byte_is_refused_or_makes_other_progress(seqs: set[int], data: st.DataObject) -> None:
    text = Progress(OUTBOX, 5, runs_of(sorted(seqs))).metadata()
    place = data.draw(st.integers(0, len(text) - 1))
    with suppress(ProgressError):
        parse_progress(5, text[:place] + data.draw(st.characters()) + text[place + 1 :])
    with pytest.raises(ProgressError):
        parse_progress(5, text[: data.draw(st.integers(0, len(text) - 1)) // 4 * 4])


ids = st.lists(st.uuids().map(str), max_size=20)


@given(ids, ids)
def test_a_digest_tells_events_from_any_others_and_in_any_other_order(one: list[str], other: list[str]) -> None:
    assert (digest_of(one) == digest_of(other)) == (one == other)
    assert (digest_of(one) == digest_of(one[::-1])) == (one == one[::-1])


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty: another client committed this offset"),
        pytest.param("2.AAAA", id="a newer format"),
        pytest.param("1.", id="nothing behind the mark"),
        pytest.param("1.é", id="not ASCII"),
        pytest.param("1.====", id="not base64"),
        pytest.param("1.AAAA", id="not zlib"),
        pytest.param(packed(b"short"), id="no room for a uuid"),
        pytest.param(packed(OUTBOX.bytes), id="no room for a digest"),
        pytest.param(packed(bytes(100 << 20)), id="a zip bomb"),
        pytest.param(packed(HEAD + b"\x01"), id="half a run"),
        pytest.param(packed(HEAD + b"\x01\x00"), id="an empty run"),
        pytest.param(packed(HEAD + b"\x01\x80"), id="a number without end"),
        pytest.param(packed(HEAD + b"\xff" * 1_000_000 + b"\x01\x01"), id="a number of 875 kB"),
        pytest.param(packed(HEAD + (b"\xff" * 8 + b"\x7f\x01") * 3), id="seqs beyond a bigint"),
        pytest.param(packed(HEAD + b"\x01\x03\x00\x03"), id="runs that touch"),
        pytest.param(Progress(OUTBOX, 5, ((1, 4),)).metadata()[:-8], id="cut short"),
    ],
)
def test_damaged_progress_is_refused(text: str) -> None:
    with pytest.raises(ProgressError):
        parse_progress(5, text)


# ---- step 4 ----------------------------------------------------------------------------------------------------------

RUNS: Runs = ((1, 4),)
FIVE = Progress(OUTBOX, 5, RUNS)
EMPTY = Progress(OUTBOX, 5, ())


@pytest.mark.parametrize(
    ("batch", "released", "progress", "verdict"),
    [
        pytest.param(0, True, None, Begin(1), id="the first start"),
        pytest.param(5, True, None, Begin(6), id="Kafka forgot a lane that rested"),
        pytest.param(5, True, FIVE, Begin(6), id="Kafka is about to forget"),
        pytest.param(4, True, EMPTY, Begin(5), id="a beginning that was cut short"),
        pytest.param(5, False, FIVE, Resume(5), id="nothing was under way"),
        pytest.param(4, False, FIVE, Finish(5, RUNS, FIVE.digest), id="a crash between commit and delete"),
        pytest.param(4, True, FIVE, Finish(5, RUNS, FIVE.digest), id="the database was restored to one batch back"),
        pytest.param(4, False, EMPTY, Finish(5, (), EMPTY.digest), id="the same, behind an empty batch"),
    ],
)
def test_what_the_two_readings_mean(batch: int, released: bool, progress: Progress | None, verdict: Verdict) -> None:
    assert reconcile(OUTBOX, batch, released, progress) == verdict


@pytest.mark.parametrize(
    ("batch", "released", "progress", "transient", "says"),
    [
        pytest.param(5, False, None, True, "offsets.retention.minutes", id="Kafka forgot a lane that was at work"),
        pytest.param(3, False, FIVE, True, "behind", id="the database was restored"),
        pytest.param(3, True, FIVE, True, "behind", id="the database was restored to when it rested"),
        pytest.param(6, False, FIVE, True, "ahead", id="Kafka was restored"),
        pytest.param(6, True, FIVE, True, "ahead", id="Kafka was restored while the lane rested"),
        pytest.param(5, False, Progress(OTHER, 5, RUNS), False, str(OTHER), id="a clone, at the same batch"),
        pytest.param(5, True, Progress(OTHER, 5, RUNS), False, str(OTHER), id="a clone that rested"),
        pytest.param(4, False, Progress(OTHER, 5, RUNS), False, str(OTHER), id="a clone, one batch behind"),
    ],
)
def test_what_cannot_be_settled(
    batch: int, released: bool, progress: Progress | None, transient: bool, says: str
) -> None:
    found = reconcile(OUTBOX, batch, released, progress)
    assert isinstance(found, Doubt)
    assert found.transient is transient
    assert says in found.reason


# ---- steps 5 to 7 ----------------------------------------------------------------------------------------------------

FETCHED = Lane(4).fetched(RUNS)
FLUSHED = FETCHED.flushed(5)
COMMITTED = FLUSHED.committed(5)
AHEAD = FLUSHED.fetched(((4, 6),)).flushed(6)


def test_a_batch_goes_its_way() -> None:
    assert FETCHED.next == 6
    assert FETCHED.hidden == RUNS
    assert COMMITTED.deleted(5) == Lane(5)


def test_batches_overlap() -> None:
    assert AHEAD.fetched(((6, 7),)).hidden == ((1, 7),)
    assert AHEAD.committed(5).deleted(5).committed(6).deleted(6) == Lane(6)
    assert AHEAD.committed(5).fetched(()).flushed(7).next == 8


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(lambda: Lane(4).flushed(5), id="flushed before it was fetched"),
        pytest.param(lambda: FLUSHED.flushed(5), id="flushed twice"),
        pytest.param(lambda: FETCHED.flushed(6), id="flushed, and not there"),
        pytest.param(lambda: FETCHED.fetched(()).flushed(6), id="produced before the batch before it was flushed"),
        pytest.param(lambda: AHEAD.fetched(()).flushed(7), id="produced while its id's last transaction is open"),
        pytest.param(lambda: FETCHED.committed(5), id="committed before it was flushed"),
        pytest.param(lambda: COMMITTED.committed(5), id="committed twice"),
        pytest.param(lambda: AHEAD.committed(6), id="committed before the batch before it was"),
        pytest.param(lambda: AHEAD.committed(5).committed(6), id="committed before the batch before it was deleted"),
        pytest.param(lambda: FLUSHED.deleted(5), id="deleted before it was committed"),
        pytest.param(lambda: COMMITTED.deleted(5).deleted(5), id="deleted twice"),
        pytest.param(lambda: COMMITTED.deleted(6), id="deleted, and not there"),
        pytest.param(lambda: COMMITTED.deleted(4), id="deleted long ago"),
    ],
)
def test_an_illegal_step_is_refused(step: Callable[[], Lane]) -> None:
    with pytest.raises(IllegalStep):
        step()


def test_no_more_than_the_window_is_under_way() -> None:
    lane = Lane(4)
    for _ in range(WINDOW):
        lane = lane.fetched(())
    assert not lane.may_fetch()
    with pytest.raises(IllegalStep):
        lane.fetched(())


@given(st.lists(st.integers(0, 99), max_size=40))
def test_every_walk_keeps_the_order(choices: list[int]) -> None:
    """Whatever is allowed is done: the window stays in order, commits and deletes take turns, and none is left out."""
    lane, next_seq, done = Lane(0), 1, list[str]()
    for choice in choices:
        steps: list[tuple[str, Callable[[], Lane]]] = []
        if lane.may_fetch():
            steps.append(("fetch", lambda lane=lane, seq=next_seq: lane.fetched(((seq, seq + 1),))))  # type: ignore[misc]
        for batch in lane.window:
            number = batch.number
            for name, step in (("flush", lane.flushed), ("commit", lane.committed), ("delete", lane.deleted)):
                try:
                    step(number)
                except IllegalStep:
                    continue
                steps.append((f"{name} {number}", lambda step=step, number=number: step(number)))  # type: ignore[misc]
        name, made = steps[choice % len(steps)]
        lane = made()
        next_seq += name == "fetch"
        done += [name] if name.startswith(("commit", "delete")) else []
        assert [batch.number for batch in lane.window] == list(range(lane.batch + 1, lane.next))
    assert done == [f"{name} {n}" for n in range(1, len(done) + 1) for name in ("commit", "delete")][: len(done)]
