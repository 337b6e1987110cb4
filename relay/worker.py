"""One lane: the only place that orders database steps and Kafka steps (docs/design.md, "The lane protocol").

The numbered steps:

1. lease      the lane is ours for a while, by the database's clock. Liveness only: safety never rests on it
2. fence      two new producers: the former owner can commit nothing any more
3. progress   what Kafka committed last, read committed
4. reconcile  compare with the database and settle what was in doubt, in one database transaction
5. fetch      the rows above the floor, without those under way
6. publish    produce, flush, progress, commit: one Kafka transaction
7. delete     the rows and the batch's number, in one database transaction

What may overlap is asked of `relay.lane.Lane`, which refuses an illegal step. Any doubt ends the hold: the producers
are thrown away, and the next take reads what became of the last batches.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import structlog

from relay.config import RelayConfig
from relay.destinations import Destinations
from relay.errors import (
    ConfigError,
    DatabaseTrouble,
    EventRefused,
    IllegalStep,
    KafkaTrouble,
    LaneHalted,
    LaneLost,
    ProgressError,
    Recycle,
    Refusal,
    TakeAgain,
    Undelivered,
)
from relay.failpoint import Failpoint
from relay.floor import Floor
from relay.lane import PRODUCERS, Begin, Doubt, Finish, Lane, Progress, Runs, Step, cut, digest_of, foreign, reconcile
from relay.metrics import Metrics
from relay.pace import Pace
from relay.quarantine import PACKING, Quarantine, Search
from relay.queries import TROUBLE, Meta, Queries, words_of
from relay.record import Records
from relay.transaction import Transactions, peek, typed

if TYPE_CHECKING:
    from relay.registry import Registry
    from relay.tracing import Tracing

log = structlog.get_logger("relay")

AHEAD_ROWS = 1_000
"""A batch of at least so many rows is a backlog: the next one is fetched and produced while this one commits. Below,
the relay waits for the commit: a transaction costs it and the broker a millisecond of CPU each, so rows gather
meanwhile."""

YIELD_ROWS = 500
"""Rows produced before the event loop gets a turn (about a millisecond): the last batch's delete must not wait for this
batch."""

FLOOR_SECONDS = 0.1
"""A reading of the table's holders costs the database 0.2 ms, and the relay as much as a fetch: not more often, unless
there is a backlog. A fetch passes the dead rows of twice this time, 0.1 µs each."""

GRACE = 5.0
"""Seconds that a call to Kafka may take longer than its timeout allows before it is given up."""

FIRST_KEEPALIVE = 60.0
"""Seconds of rest after which a hold writes the progress that it found again."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shared:
    """What the lanes of one relay have in common."""

    config: RelayConfig
    relay: UUID
    meta: Meta
    queries: Queries
    threads: Executor
    failpoint: Failpoint
    registry: "Registry | None" = None
    """None: no schema registry; the events bear Avro's own frame."""
    metrics: Metrics | None = None
    """None: nobody asks for them."""
    tracing: "Tracing | None" = None
    """None: nobody asks for spans."""
    destinations: Destinations | None = None
    """None: what Kafka would refuse is found out by producing it."""

    async def thread(self, call: Callable[..., T], *args: Any, seconds: float | None = None) -> T:
        """What `call` gives, from a thread. `seconds`: how long it may wait for Kafka, by default `kafka_timeout`.

        Raises:
            KafkaTrouble: it did not return; its thread stays with it. librdkafka does not always keep its timeouts
                (https://github.com/confluentinc/librdkafka/issues/5456).
        """
        future = asyncio.get_running_loop().run_in_executor(self.threads, call, *args)
        try:
            done, _ = await asyncio.wait([future], timeout=(seconds or self.config.kafka_timeout) + GRACE)
        finally:
            future.cancel()  # without effect on one that is done
        if not done:
            raise KafkaTrouble(f"{getattr(call, '__name__', call)} did not return from Kafka in time")
        return future.result()


class LaneWorker:
    """Holds one lane from its lease until it is stopped, lost, halted or in trouble."""

    def __init__(self, shared: Shared, lane: int) -> None:
        self.lane = lane
        self._shared = shared
        self._stopping = asyncio.Event()
        self._quarantine = Quarantine(shared.config.batch_rows, holds=shared.config.parking == "hold")
        self._cycle: _Cycle | None = None
        self.taken_at: float | None = None
        """When the lane was taken first, by the monotonic clock; None until then."""
        self._known = False
        """This is the outbox's database, and the lane's progress in Kafka is its own."""
        self._stepped_at = time.monotonic()

    @property
    def batch(self) -> int | None:
        """The last batch whose delete was acknowledged; None while the lane is not taken."""
        return self._cycle.batch if self._cycle else None

    @property
    def floor(self) -> Floor | None:
        """The safe floor; None while the lane is not taken."""
        return self._cycle.floor if self._cycle else None

    @property
    def turned_at(self) -> float:
        """When it last showed that it goes on, by the monotonic clock; infinite while it may wait for ever."""
        return max(self._stepped_at, self._cycle.turned_at) if self._cycle else self._stepped_at

    def doubt(self) -> None:
        """The lane's row is not where this worker left it: take the lane anew, which finds out why."""
        if self._cycle:
            self._cycle.doubted = True

    def stop(self) -> None:
        """Finish what is under way, then release the lane."""
        self._stopping.set()

    async def run(self) -> None:
        """Take the lane and publish. Returns after `stop`.

        Raises:
            LaneHalted: the lane was halted; the reason stands in the lane's row.
            LaneTrouble: the lane is lost, or Kafka or the database is in trouble; it was given up, so that a relay that
                fares better may take it.
        """
        clean = False
        if self._shared.destinations is not None:
            self._shared.destinations.doubt()
        try:
            while not clean:
                clean = await self._hold()
        except LaneHalted as halted:
            await self._shared.queries.halt(self.lane, self._shared.relay, str(halted))
            raise
        except TROUBLE as error:
            raise DatabaseTrouble(f"{type(error).__name__}: {words_of(error)}") from error
        finally:
            if not clean:
                await self._release(clean)

    async def visit(self, errand: Callable[[], Awaitable[T]]) -> T:
        """Take the lane from whoever has it, do `errand` while nobody publishes or parks its events, and release it:
        whoever takes it next reads anew which keys are held, and every row.

        Raises:
            LaneHalted, LaneTrouble: as `run`; the errand was not done, or its own error is raised.
        """
        async with self.visiting():
            return await errand()

    @asynccontextmanager
    async def visiting(self) -> AsyncIterator[Callable[[Any], Awaitable[None]]]:
        """As `visit`, with what is done meanwhile in the block.

        Given: `last(db)`, to be called once at most. It publishes what waits in the lane, one batch at most, and
        deletes it on the connection `db`, in the transaction that is open there. What becomes of the lane when that
        transaction does not commit is what becomes of one whose relay died before its delete.
        """
        shared = self._shared
        if not await shared.queries.seize(self.lane, shared.relay, shared.config.lease):
            raise LaneHalted(f"lane {self.lane} is halted: `relay resolve` comes first")
        kafka = Transactions(shared.config, shared.meta.name, self.lane)
        clean = False
        try:
            try:
                lane, metadata = await self._take(kafka)
            except LaneHalted as halted:
                await shared.queries.halt(self.lane, shared.relay, str(halted))
                raise

            async def last(db: Any) -> None:
                cycle = _Cycle(shared, self.lane, kafka, db, db, lane, metadata, self._quarantine, self._stopping)
                await cycle.last()

            yield last
            clean = True
        finally:
            await shared.thread(kafka.discard)
            await self._release(clean)

    async def _release(self, clean: bool) -> None:
        try:
            if await self._shared.queries.release(self.lane, self._shared.relay, clean):
                log.info("lane released", lane=self.lane, clean=clean)
        except TROUBLE as error:  # then the lease runs out by itself
            log.debug("lane not released", lane=self.lane, error=words_of(error))

    async def _hold(self) -> bool:
        """One hold on the lane: take it, then cycle. True: stopped with nothing under way. False: take it anew at
        once."""
        self._stepped_at = time.monotonic()
        kafka = _transactions(self._shared, self.lane, self._quarantine)
        try:
            lane, metadata = await self._take(kafka)
            log.info("lane taken", lane=self.lane, batch=lane.batch)
            self.taken_at = self.taken_at or time.monotonic()
            async with self._shared.queries.connection() as reading, self._shared.queries.connection() as writing:
                self._cycle = _Cycle(
                    self._shared, self.lane, kafka, reading, writing, lane, metadata, self._quarantine, self._stopping
                )
                await self._cycle.run()
            if self._stopping.is_set():  # before the producers are thrown away, which a standby need not wait for
                await self._release(clean=True)
                return True
        except TakeAgain as doubt:
            log.info("lane in doubt", lane=self.lane, reason=str(doubt))
            return self._again("in_doubt")
        except Recycle as reason:
            log.info("producers recycled", lane=self.lane, reason=str(reason))
            return self._again("recycled")
        except (EventRefused, Undelivered) as refused:
            log.info("batch refused", lane=self.lane, error=str(refused))
            if self._cycle and self._cycle.refused is not None:
                await self._shared.thread(kafka.abort, self._cycle.refused)
            await self._suspect_topics()
            return self._again("refused")
        finally:
            self._cycle = None
            await self._shared.thread(kafka.discard)
        return self._again("refused")  # a search is over

    async def _suspect_topics(self) -> None:
        """A batch was refused. Where one of its topics has gone, or was forbidden meanwhile, that is why."""
        suspects, self._quarantine.suspects = self._quarantine.suspects, frozenset()
        destinations = self._shared.destinations
        if suspects and destinations is not None:
            to_blame = await self._shared.thread(destinations.learn, suspects)
            if to_blame:
                self._quarantine.acquit()

    def _again(self, reason: str) -> bool:
        if self._shared.metrics is not None:
            self._shared.metrics.ends[reason] += 1
        return False

    # ---- steps 1 to 4 ------------------------------------------------------------------------------------------------

    async def _take(self, kafka: Transactions) -> tuple[Lane, str]:
        """Take the lane; when the two readings contradict each other, once more. Returned: the lane and its progress'
        metadata."""
        try:
            return await self._take_once(kafka)
        except TakeAgain as doubt:
            log.info("lane in doubt", lane=self.lane, reason=str(doubt))
        try:
            return await self._take_once(kafka)
        except TakeAgain as doubt:
            raise LaneHalted(str(doubt)) from None

    async def _take_once(self, kafka: Transactions) -> tuple[Lane, str]:
        shared, done = self._shared, self._done
        if not await shared.queries.lease(self.lane, shared.relay, shared.config.lease):  # 1
            raise LaneLost(f"lane {self.lane} is held by another relay, or halted")
        done(Step.LEASE)
        if not self._known:
            await self._look_before_fencing()
        await _both(shared.thread(kafka.fence, 0), shared.thread(kafka.fence, 1))  # 2
        done(Step.FENCE)
        try:
            progress = await shared.thread(kafka.progress)  # 3
        except ProgressError as error:
            raise LaneHalted(_stranger(error, shared.meta.name)) from error
        done(Step.PROGRESS)
        row = await shared.queries.lane(self.lane)
        settled = await self._settle(kafka, row.batch, row.released, progress)  # 4
        done(Step.RECONCILE)
        self._quarantine.hold(await shared.queries.held(self.lane))
        return settled

    def _done(self, step: Step) -> None:
        self._stepped_at = time.monotonic()
        self._shared.failpoint.done(step)

    async def _look_before_fencing(self) -> None:
        """Once for each worker, so that a wrong database, or a wrong name, does not fence the rightful owner of the
        lane."""
        shared = self._shared
        meta = await shared.queries.meta()
        meta.refuse_copy()
        if (meta.name, meta.uuid) != (shared.meta.name, shared.meta.uuid):
            raise ConfigError(f"the outbox {shared.meta.name} was renamed meanwhile: start the relay anew")
        try:
            progress = await shared.thread(peek, shared.config, meta.name, self.lane)
        except ProgressError as error:
            raise LaneHalted(_stranger(error, meta.name)) from error
        if (reason := foreign(meta.uuid, progress)) is not None:
            raise LaneHalted(reason)
        self._known = True

    async def _settle(
        self, kafka: Transactions, before: int, released: bool, progress: Progress | None
    ) -> tuple[Lane, str]:
        """Step 4. The statement asks for batch = `before`, so a batch that moved since the reading is noticed."""
        shared = self._shared
        verdict = reconcile(shared.meta.uuid, before, released, progress)
        runs: Runs = ()
        if isinstance(verdict, Doubt):
            raise TakeAgain(verdict.reason) if verdict.transient else LaneHalted(verdict.reason)
        if isinstance(verdict, Finish):
            runs = verdict.runs
            if digest_of(await shared.queries.ids(self.lane, runs)) != verdict.digest:
                if (await shared.queries.lane(self.lane)).batch != before:  # the former owner has just deleted them
                    raise TakeAgain(f"the batch of lane {self.lane} moved on from {before} while the lane was taken")
                raise LaneHalted(
                    f"Kafka has batch {verdict.batch}, the database is one behind, and the rows with that batch's seqs "
                    "are not the events of that batch: the database was restored to another moment, or rows were "
                    "deleted by hand"
                )
        if isinstance(verdict, Begin):
            progress = Progress(shared.meta.uuid, verdict.batch, ())
            if (suspicious := await _rewrite(shared, kafka, verdict.batch, progress.metadata())) is not None:
                raise Recycle(suspicious)
        async with shared.queries.connection() as db:
            if not await shared.queries.advance(db, self.lane, before, verdict.batch, runs, {}, shared.relay):
                raise TakeAgain(f"the batch of lane {self.lane} moved on from {before} while the lane was taken")
        if isinstance(verdict, Finish) and shared.metrics is not None:
            shared.metrics.reconciled(sum(end - start for start, end in runs))
        assert progress is not None  # noqa: S101 -- reconcile answers Begin or Doubt for None
        return Lane(verdict.batch), progress.metadata()


def _transactions(shared: Shared, lane: int, quarantine: Quarantine) -> Transactions:
    """As the search for what Kafka refuses asks for it."""
    packing = quarantine.packing
    if quarantine.search is not Search.NONE:
        packing = 1 if quarantine.search is Search.EACH else min(packing or PACKING, PACKING)
    closely = quarantine.search is not Search.NONE
    return Transactions(shared.config, shared.meta.name, lane, closely=closely, packing=packing)


def _stranger(error: ProgressError, name: str) -> str:
    return f"{error}. Something else than a relay writes to the group {name}"


async def _rewrite(shared: Shared, kafka: Transactions, batch: int, metadata: str) -> str | None:
    return await shared.thread(kafka.rewrite, batch, metadata, seconds=PRODUCERS * shared.config.transaction_timeout)


async def _both(one: Awaitable[None], other: Awaitable[None]) -> None:
    """Wait for both; neither may still be at work in its thread when an error of the other is handled."""
    for result in await asyncio.gather(one, other, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


@dataclass(frozen=True, slots=True)
class _Finishing:
    """The two tasks that finish a batch that was flushed. `commit` gives what was suspicious about the connection."""

    commit: asyncio.Task[str | None]
    delete: asyncio.Task[None]


@dataclass(slots=True)
class _Fetched:
    """A batch as step 5 leaves it."""

    number: int
    rows: list[Any]
    progress: Progress
    metadata: str
    parked: dict[int, str] = field(default_factory=dict)
    began: float = 0.0
    """When its Kafka transaction began, by the monotonic clock."""
    count: int = field(init=False)
    """Of its rows, which are let go once Kafka has them: of a backlog they are most of the relay's memory."""
    last: int = field(init=False)
    """The highest seq of its rows and of those it parks."""

    def __post_init__(self) -> None:
        self.count = len(self.rows)
        self.last = max(self.rows[-1][0] if self.rows else 0, max(self.parked, default=0))


@contextmanager
def _of_row(place: int | None) -> Iterator[None]:
    """A refusal that no record of Kafka's comes with is of the row at this place, where one is named."""
    try:
        yield
    except EventRefused as refused:
        if place is None:
            raise
        raise EventRefused(str(refused), {place: Refusal(str(refused))}) from refused


class _Cycle:
    """Steps 5 to 7 of one hold, overlapping as far as `Lane` allows."""

    def __init__(
        self,
        shared: Shared,
        number: int,
        kafka: Transactions,
        reading: Any,
        writing: Any,
        lane: Lane,
        metadata: str,
        quarantine: Quarantine,
        stopping: asyncio.Event,
    ) -> None:
        self._shared = shared
        self._number = number
        self._kafka = kafka
        self._reading = reading
        self._writing = writing
        self._lane = lane
        self._metadata = metadata
        self._quarantine = quarantine
        self._stopping = stopping
        self.floor = Floor()
        self._floor_read = 0.0
        self._pace = Pace(shared.config.poll_shortest, shared.config.poll_longest)
        frames = shared.registry.frames if shared.registry else None
        source = shared.config.source or f"/outbox/{shared.meta.name}"
        self._records = Records(source, frames, time=shared.config.ce_time)
        self._finishing: dict[int, _Finishing] = {}
        self._begun: dict[int, _Fetched] = {}
        """Batches in Kafka transactions that were not acknowledged."""
        self._search = quarantine.search
        """As the producers of this hold were opened for it."""
        self.refused: int | None = None
        """The batch of which Kafka refused something."""
        self.doubted = False
        self._last_event = self.turned_at = time.monotonic()
        # How long ago the progress was written is not known here: a relay that crashes each hour would let it expire.
        self._last_progress = self._last_event - max(0.0, shared.config.keepalive - FIRST_KEEPALIVE)

    @property
    def batch(self) -> int:
        return self._lane.batch

    async def run(self) -> None:
        """Cycle until `stopping`, or until a search for a refused event is over; then nothing is under way. Every error
        ends the hold."""
        try:
            while not self._stopping.is_set() and self._search is self._quarantine.search:
                self.turned_at = time.monotonic()
                self._raise_failure()
                await self._room()
                fetched = await self._fetch()
                if fetched is not None:
                    await self._publish(fetched)
                await self._read_holders(fetched.count if fetched else 0)
                if fetched is None:
                    await self._rest()
            await self._drain()
        except BaseException as error:
            self._trace_unfinished(error)
            raise
        finally:
            await self._cancel()

    async def last(self) -> None:
        """One batch, of what there is now: published, and its delete sent."""
        try:
            if (fetched := await self._fetch()) is not None:
                await self._publish(fetched)
            await self._drain()
        finally:
            await self._cancel()

    def _raise_failure(self) -> None:
        if self.doubted:
            raise TakeAgain(f"the row of lane {self._number} is not at batch {self._lane.batch}, where it was left")
        for finishing in self._finishing.values():
            if finishing.delete.done():
                finishing.delete.result()

    async def _room(self) -> None:
        """Wait until the lane has room for another batch: a slow delete may hold up three of them."""
        while not self._lane.may_fetch():
            await self._finishing[self._lane.batch + 1].delete

    # ---- step 5 ------------------------------------------------------------------------------------------------------

    async def _fetch(self) -> _Fetched | None:
        """Step 5. None when there is nothing."""
        shared, config = self._shared, self._shared.config
        limit, batch = self._quarantine.rows, self._lane.batch
        rows = await shared.queries.fetch(
            self._reading,
            self._number,
            batch,
            self.floor.value,
            self._lane.hidden,
            limit,
            config.batch_bytes,
        )
        shared.failpoint.done(Step.FETCH)
        ready = await self._framed(rows)
        if rows and not (ready and await self._addressed(ready)):
            return None
        fetched = self._cut(ready) if ready else None
        self._raise_floor(fetched, rows, limit, looked=bool(rows) or self._lane.batch == batch)
        return fetched

    async def _framed(self, rows: list[Any]) -> list[Any]:
        """The rows before the first one whose id in the registry is to be learned. None where that is the very first:
        all ids were learned meanwhile, which may have taken long, so the rows are to be fetched anew."""
        registry = self._shared.registry
        if registry is None:
            return rows
        ready, refused = registry.part(rows)
        self._quarantine.condemn(refused)
        if rows and not ready:
            self.turned_at = float("inf")  # the registry may be away for as long as it likes
            await registry.learn(rows, self._stopping)
        return ready

    async def _addressed(self, rows: list[Any]) -> bool:
        """Condemn the rows whose topic would not take them. False: topics had to be asked about first, which may have
        taken long, so the rows are to be fetched anew."""
        destinations = self._shared.destinations
        if destinations is None:
            return True
        unknown, refused = destinations.part(rows)
        if unknown:
            await self._shared.thread(destinations.learn, unknown)
            return False
        self._quarantine.condemn(refused)
        return True

    def _cut(self, rows: list[Any]) -> _Fetched:
        """Part the rows to park from those to publish, and take no more than one progress can name."""
        parked: dict[int, str] = {}
        if not self._quarantine.idle:
            rows, parked = self._quarantine.sort(rows)
        number = self._lane.next
        progress, metadata = cut(self._shared.meta.uuid, number, [row[0] for row in rows], [row[1] for row in rows])
        count = sum(end - start for start, end in progress.runs)
        if count < len(rows):
            last = rows[count - 1][0]
            parked = {seq: error for seq, error in parked.items() if seq < last}
            rows = rows[:count]
        return _Fetched(number, rows, progress, metadata, parked)

    def _raise_floor(self, fetched: _Fetched | None, rows: list[Any], limit: int, looked: bool) -> None:
        """Note the fetch.

        `looked`: False when a batch was deleted during a fetch that brought nothing. Two may have been, and then the
        statement refused to look.
        """
        if fetched is None:
            self.floor.fetched(0, complete=looked)
        else:
            last = fetched.last
            taken = fetched.count + len(fetched.parked)
            complete = taken == len(rows) < limit and not self._full(rows)
            self.floor.fetched(last, complete)

    async def _read_holders(self, rows: int) -> None:
        """Read who holds the table when that can move the floor. Behind the batch, which it would delay."""
        now = time.monotonic()
        if self.floor.due() and (rows >= AHEAD_ROWS or now - self._floor_read >= FLOOR_SECONDS):
            self.floor.read(await self._shared.queries.holders(self._reading))
            self._floor_read = now

    def _full(self, rows: list[Any]) -> bool:
        """The database may have cut the rows off by their bytes, those to park included."""
        return sum(len(row[5] or b"") for row in rows) >= self._shared.config.batch_bytes

    # ---- step 6 ------------------------------------------------------------------------------------------------------

    async def _publish(self, fetched: _Fetched) -> None:
        """Produce and flush; progress, commit and delete follow in tasks. A backlog does not wait for them, else rows
        gather."""
        number = fetched.number
        self._lane = self._lane.fetched(fetched.progress.runs)
        if number - PRODUCERS in self._finishing:
            suspicious = await self._finishing[number - PRODUCERS].commit
            if suspicious is not None:  # its delayed EndTxn could end the transaction that would begin now
                raise Recycle(suspicious)
        with self._noting_refusal(fetched):
            await self._produce(fetched)
            await self._shared.thread(self._kafka.flush, number)
        self._lane = self._lane.flushed(number)
        self._shared.failpoint.done(Step.FLUSH)
        commit = asyncio.create_task(self._commit(fetched))
        self._finishing[number] = _Finishing(commit, asyncio.create_task(self._delete(fetched, commit)))
        if fetched.parked:
            await self._finishing[number].delete
        elif fetched.count < AHEAD_ROWS or self._search is not Search.NONE:
            await commit
        if self._search is self._quarantine.search:  # else this batch was begun before a search, and says nothing of it
            self._quarantine.passed(fetched.last)
        self._last_event = time.monotonic()

    @contextmanager
    def _noting_refusal(self, fetched: _Fetched) -> Iterator[None]:
        """A refusal may show at any call from `produce` on, and may be of something else than an event: such a batch is
        produced once more, closely. Then what is said record by record is an event's fault, and nothing else is."""
        try:
            yield
        except (EventRefused, Undelivered) as refused:
            if not fetched.count:
                raise KafkaTrouble(str(refused)) from refused
            self.refused = fetched.number
            if self._search is Search.NONE:
                self._quarantine.refused(fetched.last, {row[3] for row in fetched.rows})
                raise Undelivered(str(refused)) from refused
            if isinstance(refused, Undelivered) or not (refused.events or self._search is Search.LARGE):
                raise KafkaTrouble(str(refused)) from refused
            if refused.events:
                self._name(fetched, refused.events)
            else:
                self._quarantine.unnamed()
            raise

    def _name(self, fetched: _Fetched, events: Mapping[int, Refusal]) -> None:
        self._quarantine.named({fetched.rows[place][0]: event.why for place, event in events.items()})
        if self._shared.destinations is not None:
            for place, event in events.items():
                self._shared.destinations.note(fetched.rows[place], event)

    async def _produce(self, fetched: _Fetched) -> None:
        if not self._lane.may_produce(fetched.number):
            raise IllegalStep(f"batch {fetched.number} may not be produced in {self._lane}")
        fetched.began = time.monotonic()
        self._begun[fetched.number] = fetched
        produce = self._kafka.begin(fetched.number)
        rows = YIELD_ROWS if self._search is Search.NONE else 1
        for start in range(0, fetched.count, rows):
            with _of_row(None if self._search is Search.NONE else start), typed("produce a batch", EventRefused):
                self._records.produce(fetched.rows[start : start + rows], produce)
            if start % YIELD_ROWS == 0:
                await asyncio.sleep(0)
        self._shared.failpoint.done(Step.PRODUCE)

    async def _commit(self, fetched: _Fetched) -> str | None:
        """Progress and commit, after the delete of the batch before was acknowledged."""
        number = fetched.number
        if number - 1 in self._finishing:
            await self._finishing[number - 1].delete
        if not self._lane.may_commit(number):
            raise IllegalStep(f"batch {number} may not be committed in {self._lane}")
        with self._noting_refusal(fetched):
            suspicious = await self._shared.thread(
                self._commit_in_thread, number, fetched.metadata, seconds=self._shared.config.transaction_timeout
            )
        self._lane = self._lane.committed(number)
        del self._begun[number]
        self._shared.failpoint.done(Step.COMMIT)
        self._metadata = fetched.metadata
        self._last_progress = time.monotonic()
        if self._shared.metrics is not None:
            self._shared.metrics.batch(fetched.rows, self._last_progress - fetched.began)
        if self._shared.tracing is not None:
            self._shared.tracing.batch(self._number, number, fetched.rows, self._last_progress - fetched.began)
        fetched.rows = []
        return suspicious

    def _commit_in_thread(self, number: int, metadata: str) -> str | None:
        self._kafka.offsets(number, metadata)
        self._shared.failpoint.done(Step.OFFSETS)
        return self._kafka.commit(number)

    # ---- step 7 ------------------------------------------------------------------------------------------------------

    async def _delete(self, fetched: _Fetched, commit: asyncio.Task[str | None]) -> None:
        suspicious = await commit
        queries, number = self._shared.queries, fetched.number
        moved = await queries.advance(
            self._writing, self._number, number - 1, number, fetched.progress.runs, fetched.parked, None
        )
        if not moved:
            raise LaneLost(f"lane {self._number} was taken by another relay: it is not at batch {number - 1} any more")
        self._lane = self._lane.deleted(number)
        if fetched.parked:
            self._quarantine.parked(list(fetched.parked))
            error = next(iter(fetched.parked.values()))
            log.warning("events parked", lane=self._number, events=len(fetched.parked), error=error)
        self._shared.failpoint.done(Step.DELETE)
        log.debug("batch published", lane=self._number, batch=number, events=fetched.count)
        if suspicious is not None:  # stays in `_finishing`, where whoever comes next finds it
            raise Recycle(suspicious)
        del self._finishing[number]

    # ---- between batches ---------------------------------------------------------------------------------------------

    async def _rest(self) -> None:
        """Wait for the next fetch; while idle, see to the connections, and for long, to what Kafka knows of the
        lane."""
        now = time.monotonic()
        for number in range(PRODUCERS) if not self._finishing else ():
            if (lost := self._kafka.lost(number)) is not None:
                raise Recycle(lost)
        if not self._finishing and now - self._last_progress > self._shared.config.keepalive:
            suspicious = await _rewrite(self._shared, self._kafka, self._lane.batch, self._metadata)
            if suspicious is not None:
                raise Recycle(suspicious)
            self._last_progress = now
            log.debug("progress kept alive", lane=self._number, batch=self._lane.batch)
        await asyncio.sleep(self._pace.wait(now - self._last_event))

    async def _drain(self) -> None:
        """Wait until nothing is under way."""
        for finishing in list(self._finishing.values()):
            await finishing.delete

    def _trace_unfinished(self, error: BaseException) -> None:
        if self._shared.tracing is not None:
            for number, fetched in self._begun.items():
                took = time.monotonic() - fetched.began
                said = type(error).__name__, words_of(error)
                self._shared.tracing.batch(self._number, number, fetched.rows, took, said)

    async def _cancel(self) -> None:
        """Leave no task behind. A call to Kafka that is under way in a thread ends by itself."""
        tasks = [task for finishing in self._finishing.values() for task in (finishing.commit, finishing.delete)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
