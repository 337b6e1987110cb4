"""The lane protocol as values: what is known, what may come next, what a reading means. No I/O, no clock.

A relay takes a lane in four steps and then publishes batches in cycles (docs/design.md, "The lane protocol")::

    take    1 lease  ─► 2 fence ─► 3 progress ─► 4 reconcile ─┬─► cycle
                                                              ├─► once more from 1 (a zombie's stale view)
                                                              └─► halted
    cycle   5 fetch  ─► 6 publish: produce · flush · progress · commit  ─► 7 delete ─► 5

What may overlap, and what may not, is in `Lane`: a batch is FETCHED, then FLUSHED (every record acknowledged, the
transaction open), then COMMITTED, and leaves the window when its delete is acknowledged::

                 fetched()            flushed()              committed()            deleted()
      (a new one) ──────► FETCHED ──────────────► FLUSHED ───────────────► COMMITTED ──────────► (gone; lane.batch = n)
                            may_produce(n):         may_commit(n):
                            n-1 is FLUSHED,         n-1 is gone
                            n-2 is COMMITTED

An illegal step raises `IllegalStep`. tests/test_model.py searches every interleaving of three relays with exactly this
code.
"""

import base64
import binascii
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from hashlib import blake2b
from uuid import UUID

from relay.errors import IllegalStep, ProgressError

Runs = tuple[tuple[int, int], ...]
"""A set of seqs as ascending, disjoint, half-open runs: ((1, 4), (7, 8)) is {1, 2, 3, 7}."""

PRODUCERS = 2
"""transactional.ids of a lane. Batch n is published by id n mod 2: a transaction need not wait for the markers of the
last one."""

WINDOW = 3
"""Batches under way at most: one committing or being deleted, one produced, one fetched."""

METADATA_BYTES = 4095
"""Limit of an offset's metadata: the broker's `offset.metadata.max.bytes` (default 4,096) less one."""

_FORMAT = "1."
_HEAD_BYTES = 16 + 8  # uuid, digest
_INFLATED_BYTES = 1 << 20  # far above what METADATA_BYTES of honest progress can hold; a bound against a zip bomb
_MAX_SEQ = (1 << 63) - 1  # of a bigint


class Step(StrEnum):
    """What a relay has just done when it dies; the failpoints of the crash tests carry these names."""

    LEASE = "lease"
    FENCE = "fence"
    PROGRESS = "progress"
    RECONCILE = "reconcile"
    FETCH = "fetch"
    PRODUCE = "produce"
    FLUSH = "flush"
    OFFSETS = "offsets"
    COMMIT = "commit"
    DELETE = "delete"


# ---- sets of seqs ----------------------------------------------------------------------------------------------------


def runs_of(seqs: Sequence[int]) -> Runs:
    """The runs of strictly ascending seqs."""
    if not seqs:
        return ()
    first, last = seqs[0], seqs[-1]
    if last - first == len(seqs) - 1:
        return ((first, last + 1),)
    out = []
    start = previous = first
    for seq in seqs[1:]:
        if seq != previous + 1:
            out.append((start, previous + 1))
            start = seq
        previous = seq
    out.append((start, previous + 1))
    return tuple(out)


def union(sets: Sequence[Runs]) -> Runs:
    """The runs that hold every seq of the disjoint `sets`; neighbours are merged."""
    out: list[tuple[int, int]] = []
    for start, end in sorted(run for runs in sets for run in runs):
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return tuple(out)


# ---- progress: what Kafka knows of a lane ----------------------------------------------------------------------------


def digest_of(ids: Sequence[str]) -> bytes:
    """Eight bytes that tell the events `ids`, in this order, from any others."""
    return blake2b("".join(ids).encode(), digest_size=8).digest()


@dataclass(frozen=True, slots=True)
class Progress:
    """The last batch that Kafka committed for a lane: offset = its number, metadata = all else."""

    outbox: UUID
    batch: int
    runs: Runs
    """The seqs of its events."""
    digest: bytes = digest_of(())
    """Of the ids of its events, in order: a restored database may give the same seqs to other events."""

    def metadata(self) -> str:
        """The text kept with the offset: a format mark, then base64 of zlib of uuid, digest and the runs as varints."""
        gaps_and_lengths: list[int] = []
        end = 0
        for start, stop in self.runs:
            gaps_and_lengths += (start - end, stop - start)
            end = stop
        raw = self.outbox.bytes + self.digest + _varints(gaps_and_lengths)
        return _FORMAT + base64.b64encode(zlib.compress(raw, 1)).decode("ascii")


def parse_progress(batch: int, metadata: str) -> Progress:
    """Read what `Progress.metadata` wrote.

    Raises:
        ProgressError: the text was not written by a relay, is damaged, or comes from a newer format.
    """
    if not metadata.startswith(_FORMAT):
        raise ProgressError(f"progress of batch {batch} has no known format mark: {metadata[:20]!r}")
    try:
        inflate = zlib.decompressobj()
        raw = inflate.decompress(base64.b64decode(metadata[len(_FORMAT) :], validate=True), _INFLATED_BYTES)
        complete = inflate.eof
    except (binascii.Error, ValueError, zlib.error) as error:
        raise ProgressError(f"progress of batch {batch} is damaged: {error}") from error
    if not complete or len(raw) < _HEAD_BYTES:
        raise ProgressError(f"progress of batch {batch} is damaged: {len(raw)} bytes, cut short")
    numbers = _parse_varints(raw[_HEAD_BYTES:], batch)
    runs = []
    end = 0
    for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
        runs.append((end + gap, end + gap + length))
        end += gap + length
    return Progress(UUID(bytes=raw[:16]), batch, tuple(runs), raw[16:_HEAD_BYTES])


def cut(
    outbox: UUID, batch: int, seqs: Sequence[int], ids: Sequence[str], limit: int = METADATA_BYTES
) -> tuple[Progress, str]:
    """The progress of a batch of as many of the first `seqs` as its metadata can name in `limit` bytes (one at least),
    and that text. `ids`: of the events, beside their seqs."""
    count = len(seqs)
    while True:
        progress = Progress(outbox, batch, runs_of(seqs[:count]), digest_of(ids[:count]))
        text = progress.metadata()
        if len(text) <= limit or count == 1:
            return progress, text
        count = max(1, int(count * limit / len(text) * 0.97))


def _varints(numbers: list[int]) -> bytes:
    """Base-128 little-endian, as in Protocol Buffers."""
    if not numbers or max(numbers) < 128:
        return bytes(numbers)
    out = bytearray()
    for number in numbers:
        rest = number
        while rest > 127:
            out.append(rest & 127 | 128)
            rest >>= 7
        out.append(rest)
    return bytes(out)


def _parse_varints(raw: bytes, batch: int) -> list[int]:
    out = []
    number = shift = 0
    for byte in raw:
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            out.append(number)
            number = shift = 0
        elif shift > 63:  # longer than any bigint: do not add up a megabyte of them
            break
    if shift or len(out) % 2 or sum(out) > _MAX_SEQ or 0 in out[1::2] or 0 in out[2::2]:
        raise ProgressError(f"progress of batch {batch} is damaged: its runs do not add up")
    return out


# ---- step 4: what the two readings mean ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resume:
    """Nothing is in doubt: the former holder did not stop, but nothing of it was under way. Go on after `batch`."""

    batch: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The crash came between commit and delete: delete `runs` and set the lane to `batch`, in one transaction.

    Only if their events' ids have this `digest`: else the database was restored, and gave those seqs to other events.
    """

    batch: int
    runs: Runs
    digest: bytes


@dataclass(frozen=True, slots=True)
class Begin:
    """The lane was left clean, so Kafka may have forgotten its progress, or be about to: begin with the empty batch
    `batch`.

    Write its progress first (an empty transaction), then set the lane from `batch - 1` to `batch`, which clears
    `released`; after a crash between the two the same beginning is made again. It has a number of its own because its
    progress names no rows: a database restored to before the last real batch must not take it for that one's.
    """

    batch: int


@dataclass(frozen=True, slots=True)
class Doubt:
    """The two cannot both be true. `transient`: a zombie's last step may explain it, take once more; else halt."""

    reason: str
    transient: bool


Verdict = Resume | Finish | Begin | Doubt


def foreign(outbox: UUID, progress: Progress | None) -> str | None:
    """What to say when the progress is another outbox's than this one; None when it is not."""
    if progress is None or progress.outbox == outbox:
        return None
    return (
        f"the progress in Kafka belongs to the outbox {progress.outbox}, this database is the outbox {outbox}: two "
        "databases use one name at one Kafka cluster. `outbox rename` gives this one a name of its own"
    )


def reconcile(outbox: UUID, batch: int, released: bool, progress: Progress | None) -> Verdict:
    """Step 4: compare the database (`batch`, `released`) with Kafka (`progress`, read after both fences).

    Args:
        outbox: the uuid of this outbox.
        batch: number of the last batch whose rows were deleted.
        released: the lane was never taken, or was left by a clean stop: nothing was under way.
        progress: the lane's progress in Kafka, None where Kafka has none.
    """
    if progress is None:
        if released:
            return Begin(batch + 1)
        return Doubt(
            f"Kafka has no progress for this lane, the database is at batch {batch}, and the lane was not left by a "
            "clean stop. Kafka was replaced or emptied, or the relay was away for longer than the broker keeps offsets "
            "(offsets.retention.minutes). Whether the last batch was published cannot be known from here",
            transient=True,
        )
    if (reason := foreign(outbox, progress)) is not None:
        return Doubt(reason, transient=False)
    if progress.batch == batch:
        return Begin(batch + 1) if released else Resume(batch)
    if progress.batch == batch + 1:
        if released and not progress.runs:
            return Begin(progress.batch)
        return Finish(progress.batch, progress.runs, progress.digest)
    found = "behind" if progress.batch > batch else "ahead"
    return Doubt(
        f"the database is at batch {batch}, Kafka at batch {progress.batch}: the database is {found}. "
        "One of them was restored to another moment, or replaced",
        transient=True,
    )


# ---- steps 5 to 7: what may overlap ----------------------------------------------------------------------------------


class Stage(Enum):
    FETCHED = 1
    FLUSHED = 2
    COMMITTED = 3


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch under way. An empty one (keep-alive) has no runs."""

    number: int
    runs: Runs
    stage: Stage = Stage.FETCHED


@dataclass(frozen=True, slots=True)
class Lane:
    """What a relay knows of a lane it holds, between step 4 and the loss of the lane. Immutable: every step gives the
    next value."""

    batch: int
    """Number of the last batch whose delete was acknowledged."""
    window: tuple[Batch, ...] = ()
    """The batches under way, oldest first, numbered batch + 1, batch + 2, …"""

    @property
    def next(self) -> int:
        """The number of the batch to be fetched next."""
        return self.batch + len(self.window) + 1

    @property
    def hidden(self) -> Runs:
        """Seqs that a fetch must not return: they are under way."""
        return union([batch.runs for batch in self.window])

    def may_fetch(self) -> bool:
        return len(self.window) < WINDOW

    def may_produce(self, number: int) -> bool:
        """n may be produced once n-1 was flushed (so it stands behind it in every partition) and its id's last
        transaction ended."""
        return self._is(number, Stage.FETCHED) and all(
            before.stage is not Stage.FETCHED
            and (before.number > number - PRODUCERS or before.stage is Stage.COMMITTED)
            for before in self.window
            if before.number < number
        )

    def may_commit(self, number: int) -> bool:
        """n may be committed only after the commit of n-1 returned and its delete was acknowledged."""
        return self._is(number, Stage.FLUSHED) and number == self.batch + 1

    def fetched(self, runs: Runs) -> "Lane":
        if not self.may_fetch():
            raise IllegalStep(f"{len(self.window)} batches are under way already")
        return replace(self, window=(*self.window, Batch(self.next, runs)))

    def flushed(self, number: int) -> "Lane":
        if not self.may_produce(number):
            raise IllegalStep(f"batch {number} may not be produced in {self}")
        return self._stage(number, Stage.FLUSHED)

    def committed(self, number: int) -> "Lane":
        if not self.may_commit(number):
            raise IllegalStep(f"batch {number} may not be committed in {self}")
        return self._stage(number, Stage.COMMITTED)

    def deleted(self, number: int) -> "Lane":
        if not (self._is(number, Stage.COMMITTED) and number == self.batch + 1):
            raise IllegalStep(f"batch {number} may not be deleted in {self}")
        return replace(self, batch=number, window=self.window[1:])

    def _is(self, number: int, stage: Stage) -> bool:
        position = number - self.batch - 1
        return 0 <= position < len(self.window) and self.window[position].stage is stage

    def _stage(self, number: int, stage: Stage) -> "Lane":
        return replace(self, window=tuple(replace(b, stage=stage) if b.number == number else b for b in self.window))
