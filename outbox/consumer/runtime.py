"""Consumer: the user's handlers, run over the inbox as a member of a group.

    Kafka ─► Feed (a thread) ─► lanes: a key's messages one behind the other, several keys at once
                                  │
                                  ▼
                                Effects: claim + handlers + returned events = one database transaction
                                  │
                                  ▼ committed
                                Offsets: what is done, up to the first that is not ─► Kafka

What is not committed to Kafka comes again, and the inbox knows it. So a crash, a rebalance, a lost commit of offsets
cost time, never a second effect.
"""

import asyncio
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import groupby
from operator import attrgetter
from typing import Any, TypeVar
from uuid import UUID

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from outbox.catalogue import Catalogue, TypedEvent
from outbox.consumer.database import AsyncDatabase, Database, ThreadedDatabase
from outbox.consumer.decoding import Decoder, Registry
from outbox.consumer.feed import Feed, Place, settings
from outbox.consumer.letters import Letters
from outbox.consumer.meta import Meta
from outbox.consumer.metrics import Metrics
from outbox.consumer.policy import Failures, Limits
from outbox.consumer.retention import check_retention
from outbox.consumer.schedule import Budget, Lane, Lanes, Offsets
from outbox.consumer.store import Store
from outbox.consumer.work import Effects, Gone, Handler, Topic
from outbox.errors import UsageError
from outbox.inbox import Inbox
from outbox.message import Event
from outbox.tables import SCHEMA
from outbox.writer import Outbox

log = structlog.get_logger("outbox.consumer")

F = TypeVar("F", bound=Callable[..., Any])

DEAD_SECONDS = 1.0
"""Between looks for dead messages that are to be tried again."""

FORGET_SECONDS = 3_600.0
"""Between rounds of forgetting old claims."""

LEAVE_SECONDS = 5.0
"""That the mark of a clean end may take: it stands between a member and the partitions it waits for."""


class Consumer:
    """One consumer of events: its name is the group in Kafka, and the consumer in the inbox.

        consumer = Consumer("analytics", engine, catalogue=catalogue, kafka={"bootstrap.servers": "localhost:9092"})

        @consumer.on(QualityEvent, topic="chip-quality.quality.events")
        async def record(event: QualityEvent, session: AsyncSession, meta: Meta) -> None:
            session.add(...)

        await consumer.run()

    Each event takes effect once: what a handler writes with `session`, the events that it returns (they go to the
    outbox) and the claim in the inbox are one transaction. What a handler does outside of the database may happen
    again. Events of one key are handled in order, several keys at once.
    """

    def __init__(
        self,
        name: str,
        engine: AsyncEngine | sa.Engine,
        *,
        catalogue: Catalogue,
        kafka: Mapping[str, Any],
        registry: Registry | None = None,
        schema: str = SCHEMA,
        failures: Failures | None = None,
        limits: Limits | None = None,
        generation: str | None = None,
        id: Callable[[Meta], UUID] | None = None,  # noqa: A002 - what it finds, at every message
    ) -> None:
        """`engine`: an AsyncEngine for `async def` handlers, an Engine for `def` handlers, which run in threads.

        Args:
            kafka: librdkafka's configuration. `group.instance.id` makes membership static; `group.id` is the name where
                it is not given.
            registry: for messages in Confluent's frame.
            schema: the SQL schema of the outbox's tables.
            failures: what becomes of what cannot be handled; a topic may have its own.
            generation: names a rebuilt read model: its inbox is another one (docs/consuming.md, Replay).
            id: finds an event's id; by default the header `ce_id`.
        """
        self.name = name
        self.engine = engine
        self.catalogue = catalogue
        self.kafka = dict(kafka)
        self.registry = registry
        self.schema = schema
        self.failures = failures or Failures()
        self.limits = limits or Limits()
        self.find_id = id
        self.inbox = self.inbox_of(generation)
        self.outbox = Outbox(catalogue, schema=schema)
        self.metrics = Metrics(name)
        self.topics: dict[str, Topic] = {}
        self._stopping: asyncio.Event | None = None
        self._stop_asked = False

    def on(
        self, event: type[TypedEvent] | type[Event], *, topic: str | None = None, failures: Failures | None = None
    ) -> Callable[[F], F]:
        """Decorates the handler of one event: `handler(event, session, meta)`, a coroutine where the engine is async.

        It may return an event, or several: they are added to the outbox. `topic`: by default that of the event's
        schema. A topic may have a handler for each class of events; an event that none is for is skipped, and counted.
        """
        return self._register(event, topic, 0, failures)

    def on_batch(
        self,
        event: type[TypedEvent] | type[Event],
        *,
        topic: str | None = None,
        size: int = 500,
        failures: Failures | None = None,
    ) -> Callable[[F], F]:
        """Decorates the handler of many events: `handler(events, session, metas)`, two lists of one length.

        One transaction for up to `size` events of one partition, in its order: the fast way. When it fails, the batch
        is cut in halves until the message that fails stands alone.
        """
        if size < 1:
            raise UsageError(f"a batch has one event or more, not {size}")
        return self._register(event, topic, size, failures)

    def _register(self, event: type[Any], topic: str | None, batch: int, failures: Failures | None) -> Callable[[F], F]:
        name = self._topic_of(event) if topic is None else topic
        found = self.topics.get(name) or Topic(name, batch, failures or self.failures)
        if found.batch != batch or (failures is not None and found.failures != failures):
            raise UsageError(f"the handlers of {name} must agree: one by one or batches of one size, one policy")
        if any(handler.event is event for handler in found.handlers):
            raise UsageError(f"{name} has a handler of {event.__name__} already")

        def decorate(call: F) -> F:
            self._check_kind(call)
            self.topics[name] = found
            found.add(Handler(call, event))
            return call

        return decorate

    def _topic_of(self, event: type[Any]) -> str:
        fingerprint = getattr(event, "AVRO_FINGERPRINT", None)
        if fingerprint is None:
            raise UsageError(f"{event.__name__} is of no one topic: name it with topic=")
        return self.catalogue.subject(fingerprint).removesuffix("-value")

    def _check_kind(self, call: Callable[..., Any]) -> None:
        is_async = isinstance(self.engine, AsyncEngine)
        if inspect.iscoroutinefunction(call) is not is_async:
            name = getattr(call, "__name__", repr(call))
            raise UsageError(
                f"{name} is {'no ' if is_async else 'an '}`async def`: with an AsyncEngine handlers are coroutines,"
                " with an Engine they are functions, and run in threads"
            )

    async def run(self) -> None:
        """Consume until `stop` is called, then end in order: what is at work is finished within the deadline.

        Raises ConsumerStopped where a policy says `stop` or Kafka's client has ended for good; UsageError without a
        handler, or for settings that cannot be; MigrationError where the tables are missing; the database's own error
        where it refuses a handler's statement as such (SQLSTATE class 42: no such table, no privilege).
        """
        if not self.topics:
            raise UsageError(f"the consumer {self.name!r} has no handler: decorate one with @consumer.on(…)")
        self._stopping = asyncio.Event()
        if self._stop_asked:
            self._stopping.set()
        run = _Run(self, settings(self.name, self.kafka))
        try:
            await run.until(self._stopping)
        finally:
            self._stopping, self._stop_asked = None, False

    def stop(self) -> None:
        """Ask `run` to end. In the loop's thread; may be a signal handler of the loop."""
        self._stop_asked = True
        if self._stopping is not None:
            self._stopping.set()

    def database(self) -> Database:
        """Where effects go."""
        if isinstance(self.engine, AsyncEngine):
            return AsyncDatabase(self.engine)
        return ThreadedDatabase(self.engine, self.limits.concurrency + 2)

    def inbox_of(self, generation: str | None) -> Inbox:
        """The inbox of a generation of the read model."""
        return Inbox(self.name if generation is None else f"{self.name}@{generation}", schema=self.schema)

    def effects(self, database: Database, inbox: Inbox) -> Effects:
        """What gives messages their effect, on that database."""
        store = Store(inbox.consumer, schema=self.schema)

        async def find(fingerprint: int) -> str | None:
            return await database.do(lambda session, _: store.avro_schema(session, fingerprint))

        decoder = Decoder(self.catalogue, find, self.registry)
        return Effects(database, inbox, store, decoder, self.topics, self.outbox, self.metrics)


class _Partition:
    """One that is ours, from its assignment to its end; the next time it is another object."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.offsets = Offsets()
        self.committed: int | None = None
        self.early: list[Meta] | None = []
        """What came before the partition was opened. None: it is open."""
        self.to_record = 0
        """So many messages more, that its last owner may have had at work when it died, are written down first."""
        self.gone = asyncio.Event()
        self.units = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.unended: set[str] = set()
        """Events whose attempt was written down, and was given up without a death."""
        self.cut = False
        """A unit was cancelled: a thread, or the database, may still be at it."""

    async def pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.gone.wait(), seconds)
        except TimeoutError:
            return
        raise Gone

    def began(self) -> None:
        self.units += 1
        self.idle.clear()

    def ended(self) -> None:
        self.units -= 1
        if not self.units:
            self.idle.set()


class Process:
    """The hold of what is not of one partition: it lasts until the process ends."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.gone.wait(), seconds)
        except TimeoutError:
            return
        raise Gone


class _Unit:
    """Messages at work, and whose they are."""

    __slots__ = ("lane", "messages", "partition", "recorded")

    def __init__(self, lane: Lane, messages: list[Meta], partition: _Partition) -> None:
        self.lane = lane
        self.messages = messages
        self.partition = partition
        self.recorded = partition.to_record > 0


class _Run:
    """One run of a consumer. The Owner of a Feed: all of it happens in the loop."""

    def __init__(self, consumer: Consumer, configuration: dict[str, Any]) -> None:
        self._limits = limits = consumer.limits
        self._topics = consumer.topics
        self._metrics = consumer.metrics
        self._database = consumer.database()
        self._effects = consumer.effects(self._database, consumer.inbox)
        self._store = Store(consumer.inbox.consumer, schema=consumer.schema)
        self._budget = Budget(limits.messages, limits.size)
        self._metrics.in_hand = lambda: self._budget.taken
        self._lanes: Lanes[Meta] = Lanes({topic.name: topic.batch for topic in consumer.topics.values() if topic.batch})
        self._partitions: dict[Place, _Partition] = {}
        self._suspects: dict[str, int] = {}
        """Events that were at work when a process died, and how often they were begun."""
        self._alone: _Unit | None = None
        """A unit with suspects, which waits until nothing else is at work."""
        self._exclusive = False
        """It is at work."""
        self._units: set[asyncio.Task[None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        self._process = Process()
        self._kafka = consumer.kafka
        self._letters = Letters(consumer.kafka)
        self._inbox = consumer.inbox
        self._failure: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._feed = Feed(
            configuration,
            consumer.topics,
            self,
            self._budget,
            asyncio.get_running_loop(),
            patience=limits.revoke,
            find_id=consumer.find_id,
        )

    async def until(self, stopping: asyncio.Event) -> None:
        """Run, and end in order whatever the reason."""
        self._feed.start()
        self._spawn(self._tick())
        self._spawn(self._see_to_the_dead())
        if self._limits.claims is not None:
            self._spawn(self._forget_claims(self._limits.claims))
        stopped: asyncio.Future[Any] = asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait([stopped, self._failure], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            await self._end()
        if self._failure.done():
            self._failure.result()

    async def _end(self) -> None:
        """1 take nothing more  2 let what is at work end, by the deadline  3 offsets, leave the group."""
        self._draining = True
        self._feed.drain()
        self._process.gone.set()
        for partition in self._partitions.values():
            partition.gone.set()  # who waits for another attempt waits no more
        deadline = time.monotonic() + self._limits.deadline
        while self._units and time.monotonic() < deadline:
            await asyncio.wait(self._units, timeout=max(0.0, deadline - time.monotonic()))
        if self._units:
            log.warning("the deadline has passed, what is at work comes again", units=len(self._units))
        for task in [*self._units, *self._tasks]:
            task.cancel()
        await asyncio.gather(*self._units, *self._tasks, return_exceptions=True)
        await self._feed.close()
        self._database.close()

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Any) -> None:
        try:
            await work
        except Gone:
            pass
        except Exception as error:  # noqa: BLE001 - it is raised by run()
            self.failed(error)

    # --- the Owner of the feed ---

    def failed(self, error: BaseException) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)

    def assigned(self, places: Sequence[Place]) -> None:
        log.info("partitions assigned", partitions=places)
        for place in places:
            partition = self._partitions[place] = _Partition(place)
            self._spawn(self._open(partition))

    async def _open(self, partition: _Partition) -> None:
        """Before its first message: was it left clean, and which keys are held?"""

        def opened(session: Session) -> tuple[bool, dict[str, int]]:
            clean = self._store.open(session, *partition.place)
            attempts = {} if clean else self._store.attempts(session)
            self._effects.held |= self._store.held_keys(session, partition.place[0])
            return clean, attempts

        clean, attempts = await self._effects.patiently(opened, partition)
        if not clean:
            log.warning("the last owner of this partition died", partition=partition.place, suspects=len(attempts))
            partition.to_record = self._limits.messages
            self._suspects |= attempts
        early, partition.early = partition.early or [], None
        if not partition.gone.is_set():
            self._queue(early)
            self._dispatch()

    def deliver(self, messages: Sequence[Meta], ends: Sequence[tuple[Place, int]]) -> None:
        ours = self._partitions
        for place, run in groupby(messages, key=attrgetter("topic", "partition")):
            partition, found = ours.get(place), list(run)
            if partition is None:  # delivered just before it went
                self._budget.give_back(len(found), sum(meta.size for meta in found))
                continue
            self._metrics.received[place[0]] += len(found)
            for meta in found:
                partition.offsets.received(meta.offset, meta.timestamp_ms)
            if partition.early is not None:
                partition.early += found
            else:
                self._queue(found)
        for place, end in ends:
            if place in ours:
                ours[place].offsets.reached(end)
        self._dispatch()

    async def release(self, places: Sequence[Place]) -> dict[Place, int]:
        """Of partitions that go in order: what is at work may end, what waits is dropped."""
        log.info("partitions revoked", partitions=places)
        leaving = self._drop(places)
        idle = asyncio.gather(*(partition.idle.wait() for partition in leaving))
        with suppress(TimeoutError):
            await asyncio.wait_for(idle, self._limits.revoke)
        await self._leave(leaving)
        return {partition.place: partition.offsets.next for partition in leaving if partition.offsets.next is not None}

    def lost(self, places: Sequence[Place]) -> None:
        log.warning("partitions lost", partitions=places)
        self._drop(places)

    def _drop(self, places: Sequence[Place]) -> list[_Partition]:
        leaving = [partition for place in places if (partition := self._partitions.pop(place, None))]
        for partition in leaving:
            partition.gone.set()
            waiting = [*self._lanes.drop(*partition.place), *(partition.early or ())]
            self._budget.give_back(len(waiting), sum(meta.size for meta in waiting))
            self._metrics.lag.pop(partition.place, None)
            self._metrics.oldest_ms.pop(partition.place, None)
            if self._alone is not None and self._alone.partition is partition:
                self._give_up(self._alone)
        return leaving

    def _give_up(self, unit: _Unit) -> None:
        """A unit that waits to be alone, and whose partition goes."""
        self._alone = None
        self._lanes.done(unit.lane)
        self._budget.give_back(len(unit.messages), sum(meta.size for meta in unit.messages))

    async def _leave(self, leaving: list[_Partition]) -> None:
        """Say that nothing is at work, where it is so; or the next owner looks for what has killed us."""
        clean = [one.place for one in leaving if one.idle.is_set() and one.early is None and not one.cut]
        unended = {event_id for partition in leaving for event_id in partition.unended}

        def left(session: Session, _: Any) -> None:
            if unended:
                self._store.end(session, unended)
            self._store.leave(session, clean)
            session.commit()

        try:
            await asyncio.wait_for(self._database.do(left), LEAVE_SECONDS)
        except Exception as error:  # noqa: BLE001 - the next owner is careful then, no more
            log.warning("partitions were not marked as left clean", partitions=clean, error=repr(error))

    # --- units ---

    def _queue(self, messages: Sequence[Meta]) -> None:
        """Messages of one partition."""
        if messages and self._topics[messages[0].topic].batch:
            self._lanes.push(Lane(messages[0].topic, messages[0].partition, None), *messages)
            return
        for meta in messages:
            key = meta.offset if meta.key is None else meta.key
            self._lanes.push(Lane(meta.topic, meta.partition, key), meta)

    def _dispatch(self) -> None:
        while self._may_begin() and (taken := self._lanes.take()) is not None:
            lane, messages = taken
            unit = _Unit(lane, messages, self._partitions[lane.topic, lane.partition])
            if self._suspects and any(meta.event_id in self._suspects for meta in messages):
                self._alone = unit
            else:
                self._begin(unit, self._take(unit))
        if self._alone is not None and not self._units and not self._draining:
            unit, self._alone = self._alone, None
            self._exclusive = True
            self._begin(unit, self._take_suspects(unit))

    def _may_begin(self) -> bool:
        at_rest = self._alone is None and not self._exclusive and not self._draining
        return at_rest and len(self._units) < self._limits.concurrency

    def _begin(self, unit: _Unit, work: Any) -> None:
        unit.partition.began()
        task = asyncio.ensure_future(self._finish(unit, work))
        self._units.add(task)
        task.add_done_callback(self._after)

    def _after(self, task: asyncio.Task[None]) -> None:
        self._units.discard(task)
        self._dispatch()

    async def _take(self, unit: _Unit) -> None:
        await self._effects.take(unit.messages, unit.partition, recorded=unit.recorded)

    async def _take_suspects(self, unit: _Unit) -> None:
        """One after the other, while nothing else is at work: who dies now is known."""
        unit.recorded = True
        try:
            for meta in unit.messages:
                await self._effects.take_suspect(meta, self._suspects.get(meta.event_id, 0), unit.partition)
                self._suspects.pop(meta.event_id, None)
        finally:
            self._exclusive = False

    async def _finish(self, unit: _Unit, work: Any) -> None:
        partition, done = unit.partition, False
        try:
            await work
            done = True
        except Gone:
            pass
        except asyncio.CancelledError:
            partition.cut = True
            raise
        except Exception as error:  # noqa: BLE001 - it is raised by run()
            self.failed(error)
        finally:
            if done:
                partition.offsets.done(meta.offset for meta in unit.messages)
                partition.to_record = max(0, partition.to_record - len(unit.messages))
            elif unit.recorded:
                partition.unended |= {meta.event_id for meta in unit.messages}
            self._budget.give_back(len(unit.messages), sum(meta.size for meta in unit.messages))
            self._lanes.done(unit.lane)
            partition.ended()

    # --- by the clock ---

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._limits.commit)
            changed = {}
            for place, partition in self._partitions.items():
                self._observe(place, partition)
                if partition.offsets.next not in (None, partition.committed):
                    partition.committed = changed[place] = partition.offsets.next
            self._feed.commit(changed)

    def _observe(self, place: Place, partition: _Partition) -> None:
        end, oldest = self._feed.end_of(place), partition.offsets.oldest_ms
        if end is not None and partition.offsets.next is not None:
            self._metrics.lag[place] = max(0, end - partition.offsets.next)
        if oldest is None:
            self._metrics.oldest_ms.pop(place, None)
        else:
            self._metrics.oldest_ms[place] = oldest

    async def _see_to_the_dead(self) -> None:
        while True:
            if await self._effects.retry_one(self._process):
                continue
            for topic in self._topics.values():
                if topic.failures.topic is not None:
                    await self._publish_dead(topic.name, topic.failures.topic)
            await self._process.pause(DEAD_SECONDS)

    async def _forget_claims(self, older_than: timedelta) -> None:
        """Batch by batch, so that no transaction is long."""
        await asyncio.to_thread(check_retention, self._kafka, self._topics, older_than)
        while True:
            while await self._effects.patiently(lambda session: self._inbox.purge(session, older_than), self._process):
                pass
            await self._process.pause(FORGET_SECONDS)

    async def _publish_dead(self, topic: str, to: str) -> None:
        """Copies of dead messages of our partitions to the dead letter topic; while it is away the table has them."""
        while partitions := [number for name, number in self._partitions if name == topic]:
            messages = await self._effects.patiently(
                lambda session: self._store.unpublished(session, topic, partitions),
                self._process,
            )
            if not messages:
                return
            try:
                await asyncio.to_thread(self._letters.publish, to, messages)
            except Exception as error:  # noqa: BLE001 - KafkaException, whose module is not imported here
                self._metrics.trouble["kafka"] += 1
                log.warning("dead letters cannot be published", topic=to, error=str(error))
                return
            ids = [message.event_id for message in messages]
            await self._effects.patiently(lambda session: self._store.published(session, ids), self._process)  # noqa: B023 - awaited here
