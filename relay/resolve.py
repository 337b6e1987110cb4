"""`relay resolve`: what a halted lane has published is read back from Kafka, and the lane goes on from there
(docs/design.md, "Resolving").

1. look        without fencing: whose progress is it? Another outbox's is left alone, unless this one adopts the name
2. fence       the lane's two producers: from here on nobody else publishes what the lane's rows say
3. read        progress and the lane's row, its rows, and the topics that they name, up to the ends of this moment
4. plan        which rows Kafka has, which it has not, of which it cannot be known
5. progress    both producers write a new, empty batch. That they can proves that nobody has published since step 2
6. settle      one database transaction, which asks for the batch and for `halted`: the rows that Kafka has are deleted,
               the lane is at the new batch, and goes on

A crash anywhere leaves the lane halted, and the same can be done again. The new batch's number is two above both
readings, so that neither a restored database (again) nor a relay that was thought dead takes it for its own next one.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from relay import topics
from relay.config import RelayConfig
from relay.errors import ProgressError, TakeAgain
from relay.lane import PRODUCERS, Begin, Doubt, Finish, Progress, Runs, digest_of, foreign, reconcile
from relay.queries import LaneRow, Meta, Queries
from relay.topics import Place, ReadBack
from relay.transaction import Transactions, peek

MARGIN_MS = 3_600_000
"""Topics are read from the moment of the oldest row less an hour: where a topic stamps its records by the broker's
clock, that may differ from the database's."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What the person has decided beforehand."""

    adopt: bool = False
    """This database takes over the name from another one."""
    accept_unknown: bool = False
    """Events of which it cannot be known whether Kafka has them are published: perhaps again."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row that waits in the outbox."""

    seq: int
    id: str
    topic: str


@dataclass(frozen=True, slots=True)
class LanePlan:
    """What was found for one halted lane, and what would be done."""

    lane: int
    halted: str
    database: int
    """The batch that the database is at."""
    kafka: Progress | None
    """None: Kafka has no progress that can be read."""
    verdict: str
    published: tuple[tuple[Row, Place], ...] = ()
    """To be deleted: Kafka has them."""
    unpublished: tuple[Row, ...] = ()
    """To be published when the lane goes on; unknown ones are among them."""
    unknown: int = 0
    """How many of the unpublished ones Kafka may have had."""
    warnings: tuple[str, ...] = ()
    blocked: str | None = None
    """Why `--apply` leaves the lane halted, and what would change that."""
    applied: bool = False

    @property
    def batch(self) -> int:
        """Where both stand afterwards: two above both, so that no older copy of either mistakes it for its next."""
        return max(self.database, self.kafka.batch if self.kafka else 0) + 2

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "lane": self.lane,
            "halted": self.halted,
            "database": {"batch": self.database, "waiting": len(self.published) + len(self.unpublished)},
            "kafka": self.kafka and {"batch": self.kafka.batch, "outbox": str(self.kafka.outbox)},
            "verdict": self.verdict,
            "published": [
                {"id": row.id, "seq": row.seq, "topic": at.topic, "partition": at.partition, "offset": at.offset}
                for row, at in self.published
            ],
            "unpublished": [{"id": row.id, "seq": row.seq, "topic": row.topic} for row in self.unpublished],
            "unknown": self.unknown,
            "warnings": list(self.warnings),
            "blocked": self.blocked,
            "applied": self.applied,
            "batch": self.batch,
        }


class Resolver:
    """Plans for the halted lanes of one outbox, and does what it planned."""

    def __init__(self, config: RelayConfig, queries: Queries, meta: Meta, choice: Choice) -> None:
        self._config = config
        self._queries = queries
        self._meta = meta
        self._choice = choice

    async def run(self, only: Sequence[int], apply: bool) -> list[LanePlan]:
        """Plan for each halted lane, of those named in `only` where there are any; with `apply`, do it.

        Raises:
            ConfigError: this database is a copy, and is not adopted; or Kafka does not let this user read.
            LaneTrouble: Kafka or the database is away, or the lane was taken meanwhile; to be tried again.
        """
        if not self._choice.adopt:
            self._meta.refuse_copy()
        await asyncio.to_thread(topics.ensure_control_topic, self._config, self._meta.name, self._meta.lanes)
        if apply and self._choice.adopt:
            await self._queries.adopt()
        halted = [row for row in await self._queries.lanes() if row.halted is not None]
        return [await self._lane(row, apply) for row in halted if not only or row.lane in only]

    async def _lane(self, row: LaneRow, apply: bool) -> LanePlan:
        stranger = await self._stranger(row.lane)  # 1
        if stranger and not self._choice.adopt:
            return _left_alone(row, stranger)
        kafka = Transactions(self._config, self._meta.name, row.lane)
        try:
            await self._fence(kafka)  # 2
            plan = await self._plan(kafka, row.lane)  # 3, 4
            if apply and plan.blocked is None:
                return await self._apply(kafka, plan)  # 5, 6
            return plan
        finally:
            await asyncio.to_thread(kafka.discard)

    async def _stranger(self, lane: int) -> str | None:
        """What to say of a progress that is not this outbox's."""
        try:
            return foreign(self._meta.uuid, await asyncio.to_thread(peek, self._config, self._meta.name, lane))
        except ProgressError as error:
            return str(error)

    async def _fence(self, kafka: Transactions) -> None:
        for number in range(PRODUCERS):
            await asyncio.to_thread(kafka.fence, number)

    async def _plan(self, kafka: Transactions, lane: int) -> LanePlan:
        progress, unreadable = await self._progress(kafka)
        row = await self._queries.lane(lane)
        rows, since = await self._rows(lane)
        wanted = {one.id for one in rows}
        found = await asyncio.to_thread(topics.read_back, self._config, self._meta.name, since, wanted)
        return plan_of(self._meta, row, progress, rows, found, self._choice, unreadable)

    async def _progress(self, kafka: Transactions) -> tuple[Progress | None, str | None]:
        """The lane's progress, or why it cannot be read."""
        try:
            return await asyncio.to_thread(kafka.progress), None
        except ProgressError as error:
            return None, str(error)

    async def _rows(self, lane: int) -> tuple[list[Row], dict[str, int]]:
        """The rows that wait, and since when (ms since 1970) each of their topics may have them."""
        rows: list[Row] = []
        since: dict[str, int] = {}
        async for seq, id_, topic, future, created in self._queries.waiting(lane):
            rows.append(Row(seq, id_, topic))
            if created is not None:  # else no record can be made of it
                # The record of an event of the future may be older than it says, where the broker stamps it.
                since[topic] = min(since.get(topic, created), 0 if future else max(0, created - MARGIN_MS))
        return rows, since

    async def _apply(self, kafka: Transactions, plan: LanePlan) -> LanePlan:
        progress = Progress(self._meta.uuid, plan.batch, ())
        await asyncio.to_thread(kafka.rewrite, plan.batch, progress.metadata())  # 5
        # Read, because a commit may return although another request ended its transaction (KAFKA-17754).
        if await asyncio.to_thread(kafka.progress) != progress:
            raise TakeAgain(f"the progress of lane {plan.lane} changed while it was resolved: try again")
        published = [(row.seq, row.id) for row, _ in plan.published]
        if not await self._queries.resolve(plan.lane, plan.database, plan.batch, published):  # 6
            raise TakeAgain(f"lane {plan.lane} changed while it was resolved, and was left as it is: look again")
        return replace(plan, applied=True)


def _left_alone(row: LaneRow, stranger: str) -> LanePlan:
    return LanePlan(
        row.lane,
        row.halted or "",
        row.batch,
        None,
        f"{stranger}. Nothing was fenced or read",
        blocked="--adopt takes the name over: then the outbox that has it now halts instead, for good. Stop its relays "
        "first, and say --adopt only when it is never to publish again under this name",
    )


# ---- values in, values out -------------------------------------------------------------------------------------------


def verdict_of(meta: Meta, row: LaneRow, progress: Progress | None, rows: Sequence[Row]) -> str:
    """What the two readings mean, in a sentence."""
    verdict = reconcile(meta.uuid, row.batch, row.released, progress)
    if isinstance(verdict, Doubt):
        return verdict.reason
    if isinstance(verdict, Finish):
        named = _among(verdict.runs)
        if digest_of([one.id for one in rows if named(one.seq)]) == verdict.digest:
            return f"the relay stopped between batch {verdict.batch}'s commit in Kafka and its delete here"
        return (
            f"Kafka has batch {verdict.batch}, the database is one behind, and the rows with that batch's seqs are not "
            "the events of that batch: the database was restored, and has given those seqs to other events, or rows "
            "were deleted by hand"
        )
    if isinstance(verdict, Begin):
        return "the lane was left by a clean stop, or never taken: nothing is in doubt"
    return f"the database and Kafka are both at batch {row.batch}: nothing is in doubt"


def plan_of(
    meta: Meta,
    row: LaneRow,
    progress: Progress | None,
    rows: Sequence[Row],
    found: ReadBack,
    choice: Choice,
    unreadable: str | None = None,
) -> LanePlan:
    """The plan for a lane, whose progress may be `unreadable`. An event that stands in two rows counts as published in
    both."""
    verdict = unreadable or verdict_of(meta, row, progress, rows)
    published = tuple((one, found.places[one.id]) for one in rows if one.id in found.places)
    unpublished = tuple(one for one in rows if one.id not in found.places)
    unknown = sum(one.topic in found.gaps for one in unpublished)
    warnings = [f"topic {topic}: Kafka does not have it, or does not show it to this user" for topic in found.missing]
    if unknown:
        gaps = "; ".join(f"topic {topic}: {why}" for topic, why in found.gaps.items())
        warnings.append(f"whether {unknown} events are in Kafka cannot be known. {gaps}")
    if lost := _lost(meta, row, progress, published):
        warnings.append(
            f"of the {_size(progress)} events of Kafka's last batch {lost} are not in the database: it has lost "
            "transactions whose events were published. Consumers have them, the service's own data have not"
        )
    blocked = None
    if unknown and not choice.accept_unknown:
        blocked = f"--accept-unknown publishes those {unknown} events, perhaps a second time"
    return LanePlan(
        row.lane,
        row.halted or "",
        row.batch,
        progress,
        verdict,
        published,
        unpublished,
        unknown,
        tuple(warnings),
        blocked,
    )


def _size(progress: Progress | None) -> int:
    return sum(end - start for start, end in progress.runs) if progress else 0


def _lost(meta: Meta, row: LaneRow, progress: Progress | None, published: Sequence[tuple[Row, Place]]) -> int:
    """How many events of the last batch the database does not have, although it is at a moment before their delete."""
    if progress is None or progress.outbox != meta.uuid or progress.batch <= row.batch:
        return 0
    named = _among(progress.runs)
    return _size(progress) - sum(named(one.seq) for one, _ in published)


def _among(runs: Runs) -> Callable[[int], bool]:
    """Whether a seq is one of `runs`."""
    starts = [start for start, _ in runs]

    def among(seq: int) -> bool:
        place = bisect_right(starts, seq) - 1
        return place >= 0 and seq < runs[place][1]

    return among


# ---- for people ------------------------------------------------------------------------------------------------------

SHOWN = 50
"""Events listed of each kind; `--json` has all."""


def text_of(plan: LanePlan) -> str:
    """The plan, or what was done, as lines."""
    kafka = f"batch {plan.kafka.batch} of outbox {plan.kafka.outbox}" if plan.kafka else "no progress of this outbox"
    lines = [
        f"lane {plan.lane} is halted: {plan.halted}",
        f"  database  batch {plan.database}, {len(plan.published) + len(plan.unpublished)} events wait",
        f"  Kafka     {kafka}",
        f"  verdict   {plan.verdict}",
    ]
    at = [f"{row.id}  {place.topic} [{place.partition}] @ {place.offset}" for row, place in plan.published]
    lines += _listed(f"{len(at)} are in Kafka, and are deleted here", at)
    lines += _listed(
        f"{len(plan.unpublished)} are not in Kafka, and are published when the lane goes on",
        [f"{row.id}  {row.topic}" for row in plan.unpublished],
    )
    lines += [f"  warning   {warning}" for warning in plan.warnings]
    return "\n".join([*lines, f"  {_end(plan)}"])


def _listed(title: str, lines: list[str]) -> list[str]:
    more = [f"    … and {len(lines) - SHOWN} more (--json lists all)"] if len(lines) > SHOWN else []
    return [f"  {title}", *(f"    {line}" for line in lines[:SHOWN]), *more] if lines else []


def _end(plan: LanePlan) -> str:
    if plan.applied:
        return f"done      both are at batch {plan.batch}; the lane goes on"
    if plan.blocked:
        return f"blocked   --apply leaves this lane halted: {plan.blocked}"
    return f"next      --apply does that, sets both to batch {plan.batch}, and lets the lane go on"
