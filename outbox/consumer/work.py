"""A unit of messages takes effect: inbox, handlers and the events they return are one database transaction.

    1 read     bytes → events; what cannot be read is to be parked, what is nobody's is left out
    2 claim    the inbox: what was seen before is left out
    3 hold     messages of a key that has a dead message become dead ones behind it
    4 handle   the user's handlers write with the session
    5 add      the events that they return go to the outbox
    6 park     dead messages
    7 commit   the effect is there, once; or nothing is

When 4 … 7 fail for a reason of the message's own, a unit of many is cut in halves until the message stands alone; that
one is tried again by its policy, and then parked, or the consumer stops. The database's own trouble counts for nothing.
"""

import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol, TypeAlias, TypeVar

import structlog
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from outbox.catalogue import TypedEvent
from outbox.consumer.database import Database, Work, is_mistake, is_trouble
from outbox.consumer.decoding import Decoder, Frame
from outbox.consumer.meta import Meta
from outbox.consumer.metrics import Metrics
from outbox.consumer.policy import Failures, Retry
from outbox.consumer.store import DeadMessage, Death, Key, Store
from outbox.errors import ConsumerStopped, DecodeError
from outbox.inbox import Inbox
from outbox.message import Event
from outbox.writer import Outbox

log = structlog.get_logger("outbox.consumer")

T = TypeVar("T")

AnyEvent: TypeAlias = Event | TypedEvent
Returned: TypeAlias = AnyEvent | Iterable[AnyEvent] | None
"""What a handler returns: events for the outbox, in the same transaction."""

TROUBLE = Retry(attempts=1, first=0.1, most=5.0)
"""How long is waited for a server that is away: for as long as it takes, in these steps."""


@dataclass(frozen=True, slots=True)
class Handler:
    """A function of the user's, and the class of events that it is for."""

    call: Callable[..., Any]
    event: type[Any]


@dataclass(slots=True)
class Topic:
    """How the messages of a topic are handled."""

    name: str
    batch: int
    """Messages of a unit at most. 0: one by one, and several keys of a partition at once."""
    failures: Failures
    handlers: list[Handler] = field(default_factory=list)
    _of_class: dict[type[Any], Handler | None] = field(default_factory=dict)

    def add(self, handler: Handler) -> None:
        """One more."""
        self.handlers.append(handler)
        self._of_class.clear()

    def handler_of(self, event: AnyEvent) -> Handler | None:
        kind = type(event)
        try:
            return self._of_class[kind]
        except KeyError:
            found = next((handler for handler in self.handlers if issubclass(kind, handler.event)), None)
            return self._of_class.setdefault(kind, found)


@dataclass(slots=True)
class Item:
    """A message on its way."""

    meta: Meta
    event: AnyEvent | None = None
    handler: Handler | None = None
    death: Death | None = None
    """Why it is to be parked instead of handled."""


class Gone(Exception):  # noqa: N818 - named for what happened
    """The partition is another member's now, or the process is to end: what has no effect yet is left to the next."""


class HandlerFailed(Exception):  # noqa: N818 - named for what happened
    """For a reason of the message's own; the reason is the cause."""


class Hold(Protocol):
    """What keeps a unit in hand: a partition, while it is ours."""

    async def pause(self, seconds: float) -> None:
        """Wait; raises Gone as soon as the partition is not ours."""
        ...


@dataclass(slots=True)
class _Outcome:
    """What a committed transaction did."""

    handled: list[Item]
    parked: list[tuple[Meta, Death]]
    known: int


class Effects:
    """Gives messages their effect. For one event loop; transactions run at once as their caller lets them."""

    def __init__(
        self,
        database: Database,
        inbox: Inbox,
        store: Store,
        decoder: Decoder,
        topics: Mapping[str, Topic],
        outbox: Outbox,
        metrics: Metrics,
    ) -> None:
        self._database = database
        self._inbox = inbox
        self._store = store
        self._decoder = decoder
        self._topics = topics
        self._outbox = outbox
        self._metrics = metrics
        self.held: set[Key] = set()
        """Keys that may have a dead message. One that is not in it has none: only who has the partition parks."""

    async def take(self, messages: Sequence[Meta], hold: Hold, *, recorded: bool = False) -> None:
        """All of these have their effect when this returns, or are parked, or nobody's.

        `recorded`: that it was begun is written down before, and that it has ended is part of the transaction.
        Raises Gone when `hold` is lost before; ConsumerStopped where the policy says so; what is no message's fault (a
        table or a privilege that is missing) as it is.
        """
        items = await self._read(messages, hold)
        if not items:
            return
        if recorded:
            ids = [item.meta.event_id for item in items]
            await self.patiently(lambda session: self._store.begin(session, ids), hold)
        await self._take(items, hold, recorded)

    async def load_held(self, topic: str, hold: Hold) -> None:
        """The keys of a topic that have a dead message: before its first message is taken."""
        self.held |= await self.patiently(lambda session: self._store.held_keys(session, topic), hold)

    async def take_suspect(self, meta: Meta, attempts: int, hold: Hold) -> None:
        """One that was at work when the process died, so many times: alone, or parked if that was too often."""
        failures = self._topics[meta.topic].failures
        if attempts >= failures.kills - 1:  # the first death was not written down
            text = f"the process died each of the last {attempts + 1} times that this message was being handled"
            await self._take([Item(meta, death=Death("killed", text, attempts=attempts + 1))], hold, recorded=True)
        else:
            await self.take([meta], hold, recorded=True)

    async def patiently(self, work: Callable[[Session], T], hold: Hold) -> T:
        """A transaction of our own: committed when this returns, tried again while the database is away."""

        def committed(session: Session, _: object) -> T:
            done = work(session)
            session.commit()
            return done

        return await self._patiently(committed, hold)

    async def _patiently(self, work: Work[T], hold: Hold) -> T:
        trouble = 0
        while True:
            try:
                return await self._database.do(work)
            except Exception as error:
                if not is_trouble(error, in_handler=False):
                    raise
                trouble += 1
                await self._wait_for_database(error, trouble, hold)

    # --- 1 read ---

    async def _read(self, messages: Sequence[Meta], hold: Hold) -> list[Item]:
        missing = self._decoder.missing
        frames = {frame for meta in messages if meta.value is not None and (frame := missing(meta.value))}
        refused = {frame: flaw for frame in frames if (flaw := await self._learn(frame, hold))}
        return [item for meta in messages if (item := self._item(meta, refused)) is not None]

    async def _learn(self, frame: Frame, hold: Hold) -> DecodeError | None:
        trouble = 0
        while True:
            try:
                await self._decoder.learn(frame)
            except DecodeError as error:
                return error
            except Exception as error:  # noqa: BLE001 - whatever an HTTP client or a driver raises: the schema is not here
                trouble += 1
                self._metrics.trouble["schemas"] += 1
                log.warning("a schema cannot be asked for", schema=frame, error=repr(error), times=trouble)
                await hold.pause(TROUBLE.delay(trouble))
            else:
                return None

    def _item(self, meta: Meta, refused: Mapping[Frame, DecodeError]) -> Item | None:
        topic = self._topics[meta.topic]
        if meta.value is None:
            self._metrics.skipped[meta.topic, "tombstone"] += 1
            return None
        if not self._decoder.knows_type(meta):
            if topic.failures.unknown == "park":
                return Item(meta, death=Death("unknown", f"the catalogue has no event type {meta.type!r}"))
            self._metrics.skipped[meta.topic, "unknown type"] += 1
            return None
        if meta.flaw is not None:
            return Item(meta, death=Death("undecodable", meta.flaw))
        try:
            frame = self._decoder.missing(meta.value) if refused else None
            if frame is not None and frame in refused:
                raise refused[frame]
            event = self._decoder.decode(meta.value)
        except DecodeError as error:
            return Item(meta, death=Death.of("undecodable", error, 0))
        handler = topic.handler_of(event)
        if handler is None:
            self._metrics.skipped[meta.topic, "no handler"] += 1
            return None
        return Item(meta, event, handler)

    # --- 2 to 7, until they have worked ---

    async def _take(self, items: Sequence[Item], hold: Hold, recorded: bool) -> None:
        attempt, trouble = 1, 0
        while True:
            try:
                outcome = await self._database.do(lambda inner, outer: self._transact(items, inner, outer, recorded))
            except HandlerFailed as failed:
                if len(items) > 1:
                    log.warning("a batch has failed: in halves", size=len(items), error=repr(failed.__cause__))
                    await self._take(items[: len(items) // 2], hold, recorded)
                    return await self._take(items[len(items) // 2 :], hold, recorded)
                attempt = await self._after_failure(items[0], failed, attempt, hold)
            except Exception as error:
                if not is_trouble(error, in_handler=False):
                    raise
                trouble += 1
                await self._wait_for_database(error, trouble, hold)
            else:
                return self._count(items, outcome)

    async def _after_failure(self, item: Item, failed: HandlerFailed, attempt: int, hold: Hold) -> int:
        """Wait for the next attempt, whose number is returned; or condemn the message; or stop."""
        error = failed.__cause__
        if error is None or item.death is not None:  # parking has failed: not the message's fault
            raise failed
        failures, meta = self._topics[item.meta.topic].failures, item.meta
        if failures.retry.again(error, attempt):
            delay = failures.retry.delay(attempt)
            log.warning("a handler has failed", message=meta, attempt=attempt, wait=round(delay, 3), error=repr(error))
            self._metrics.retries[meta.topic] += 1
            await hold.pause(delay)
            meta.attempt = attempt + 1
            return attempt + 1
        if failures.then == "stop":
            raise ConsumerStopped(
                f"the handler of {meta!r} (event {meta.event_id}) has failed {attempt} times: {error!r}; the policy is"
                " to stop, and the message comes again at the next start"
            ) from error
        item.death = Death.of("failed", error, attempt)
        return attempt

    async def _wait_for_database(self, error: Exception, trouble: int, hold: Hold) -> None:
        self._metrics.trouble["database"] += 1
        log.warning("the database is in the way", error=repr(getattr(error, "orig", None) or error), times=trouble)
        await hold.pause(TROUBLE.delay(trouble))

    def _transact(
        self, items: Sequence[Item], session: Session, given: Session | AsyncSession, recorded: bool
    ) -> _Outcome:
        by_id = {item.meta.event_id: item for item in reversed(items)}
        ordered = [item for item in items if by_id[item.meta.event_id] is item]  # of repeats, the first
        known = {str(id_) for id_ in self._inbox.claim_ids(session, by_id)}  # 2
        try:
            fresh = [item for item in ordered if item.meta.event_id not in known] if known else ordered
            live, dying = self._hold(session, fresh, known)  # 3
            events = self._handle(live, given)  # 4
            if events:
                self._outbox.add(session, *events)  # 5
            if dying:
                self._store.park(session, dying)  # 6
            if recorded:
                self._store.end(session, list(by_id))
            session.commit()  # 7
        except Exception as error:
            if is_trouble(error, in_handler=True) or is_mistake(error):
                raise
            raise HandlerFailed from error
        return _Outcome(live, dying, len(items) - len(fresh))

    def _hold(
        self, session: Session, fresh: Sequence[Item], known: set[str]
    ) -> tuple[list[Item], list[tuple[Meta, Death]]]:
        """Those to be handled, and those to be parked: by their own fault, or behind another of their key."""
        if known:  # by somebody who had the partition before, and may have parked them
            self.held |= self._store.keys_of(session, known)
        if not self.held and not any(item.death for item in fresh):
            return list(fresh), []
        keys = {key for item in fresh if (key := _key(item.meta)) is not None and key in self.held}
        held = self._store.still_held(session, keys) if keys else set()
        self.held -= keys - held
        live, dying = [], []
        for item in fresh:
            key, failures = _key(item.meta), self._topics[item.meta.topic].failures
            if item.death is not None:
                dying.append((item.meta, item.death))
            elif failures.hold and key in held:
                dying.append((item.meta, Death("held", "an earlier message of its key is dead")))
            else:
                live.append(item)
                continue
            if key is not None:
                held.add(key)
        return live, dying

    def _handle(self, live: Sequence[Item], given: Session | AsyncSession) -> list[AnyEvent]:
        events: list[AnyEvent] = []
        for (topic, handler), group in groupby(live, key=lambda item: (item.meta.topic, item.handler)):
            items = list(group)
            if handler is None:
                raise TypeError(f"no handler for {items[0].meta!r}")
            if self._topics[topic].batch:
                arguments = [item.event for item in items], given, [item.meta for item in items]
                events += _events(self._call(topic, handler, arguments))
            else:
                for item in items:
                    events += _events(self._call(topic, handler, (item.event, given, item.meta)))
        return events

    def _call(self, topic: str, handler: Handler, arguments: tuple[Any, Any, Any]) -> Returned:
        start = time.perf_counter()
        try:
            returned = handler.call(*arguments)
            result: Returned = await_only(returned) if inspect.isawaitable(returned) else returned
            return result
        finally:
            self._metrics.took(topic, time.perf_counter() - start)

    def _count(self, items: Sequence[Item], outcome: _Outcome) -> None:
        """After the commit."""
        metrics = self._metrics
        metrics.processed[items[0].meta.topic] += len(outcome.handled)
        if outcome.known:
            metrics.duplicates[items[0].meta.topic] += outcome.known
        for meta, death in outcome.parked:
            metrics.dead[meta.topic, death.reason] += 1
            if death.reason != "held":  # there may be thousands behind one
                log.error(
                    "a message is dead", message=meta, event_id=meta.event_id, reason=death.reason, error=death.error
                )
            if (key := _key(meta)) is not None:
                self.held.add(key)

    # --- dead messages that are tried again ---

    async def retry_one(self, hold: Hold) -> bool:
        """Try one dead message that is due, once. False: none is."""
        dead = await self.patiently(self._store.take_due, hold)
        if dead is None:
            return False
        try:
            items = await self._read([dead.meta()], hold)
            if death := next((item.death for item in items if item.death), None):
                await self._failed_again(dead, death, hold)
            else:
                await self._patiently(lambda inner, outer: self._settle(dead, items, inner, outer), hold)
                log.info("a dead message is settled", topic=dead.topic, event_id=dead.event_id)
        except HandlerFailed as failed:
            await self._failed_again(dead, Death.of("failed", failed.__cause__ or failed, dead.attempts), hold)
        return True

    def _settle(
        self, dead: DeadMessage, items: Sequence[Item], session: Session, given: Session | AsyncSession
    ) -> None:
        """As 4 to 7; the row is what is claimed. What is nobody's any more (no items) needs no effect."""
        if not self._store.settle(session, dead.event_id):
            return
        try:
            if events := self._handle(items, given):
                self._outbox.add(session, *events)
            session.commit()
        except Exception as error:
            if is_trouble(error, in_handler=True) or is_mistake(error):
                raise
            raise HandlerFailed from error
        self._metrics.processed[dead.topic] += len(items)

    async def _failed_again(self, dead: DeadMessage, death: Death, hold: Hold) -> None:
        log.error("a dead message has failed again", event_id=dead.event_id, error=death.error)
        again = Death(death.reason, death.error, death.stack, dead.attempts)
        await self.patiently(lambda session: self._store.failed_again(session, dead.event_id, again), hold)


def _key(meta: Meta) -> Key | None:
    return None if meta.key is None else (meta.topic, meta.key)


def _events(returned: Returned) -> Iterable[AnyEvent]:
    if returned is None:
        return ()
    if isinstance(returned, Event) or hasattr(returned, "AVRO_RECORD"):
        return (returned,)  # type: ignore[return-value] # told apart by what every generated class has
    return returned
