"""A writer: a process that says events in every way there is, and enters each in the ledger, in the same transaction.

    python -m tests.torture.writers NUMBER SEED          OUTBOX_DATABASE_URL, TORTURE_ELSEWHERE_URL

Whoever says an event holds the lock of its aggregate's row, and takes the event's number from it. Works until SIGTERM,
then finishes what it began, prepared transactions too, and says on stdout what it did (one JSON line).

When the database dies during a commit, what became of it is read in the ledger, once there is a database again.
"""

import asyncio
import json
import os
import random
import signal
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
from sqlalchemy import BigInteger, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.chip_quality.events import InspectionEvent, InspectionEventType, QualityEvent, QualityEventType
from outbox.catalogue import Catalogue, TypedEvent
from outbox.message import Message, uuid7
from outbox.writer import Outbox

SCHEMAS = Path(__file__).parents[2] / "schemas"
RAW = "torture.raw"
TOPICS = ("chip-quality.inspection.events", "chip-quality.quality.events", RAW)

TABLES = """
CREATE TABLE aggregate (key text PRIMARY KEY, version bigint NOT NULL);
CREATE TABLE ledger (event_id uuid PRIMARY KEY, topic text NOT NULL, key text, number bigint NOT NULL,
                     type text NOT NULL, value bytea);
CREATE TABLE elsewhere (id bigint GENERATED ALWAYS AS IDENTITY, text text);
INSERT INTO aggregate SELECT kind || '-' || n, 0 FROM generate_series(0, 19) AS n,
    unnest(array['inspection', 'quality', 'raw', 'slow', 'burst', 'snapshot', 'prepared']) AS kind;
"""
ELSEWHERE = "CREATE TABLE elsewhere (id bigint GENERATED ALWAYS AS IDENTITY, text text)"

AWAY = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, SQLAlchemyError)
"""What a database that is away, or a transaction that it refuses, raises."""

HOT = ("inspection", "quality", "raw")
TASKS = 3
PAUSE = 0.1
BURST_EVENTS = 250


class ChangedMind(Exception):  # noqa: N818 -- named for what happened
    """Why a transaction or a savepoint is rolled back here."""


class Base(DeclarativeBase):
    """Tables made by TABLES."""


class Aggregate(Base):
    """What events are about. Its row's lock is the order of its key."""

    __tablename__ = "aggregate"
    key: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger)


class Entry(Base):
    """One event, as its record must be in Kafka."""

    __tablename__ = "ledger"
    event_id: Mapped[UUID] = mapped_column(primary_key=True)
    topic: Mapped[str]
    key: Mapped[str | None]
    number: Mapped[int] = mapped_column(BigInteger)
    type: Mapped[str]
    value: Mapped[bytes | None]


def record_value(message: Message) -> bytes | None:
    """What must be in Kafka: Avro's single-object encoding, or the bytes as they are."""
    if message.fingerprint is None or message.value is None:
        return message.value
    return b"\xc3\x01" + message.fingerprint.to_bytes(8, "little", signed=True) + message.value


def entry_of(message: Message, number: int) -> Entry:
    """The ledger's row of an event."""
    return Entry(
        event_id=message.id,
        topic=message.topic,
        key=message.key,
        number=number,
        type=message.type,
        value=record_value(message),
    )


def typed_event(key: str, number: int) -> TypedEvent:
    """An event of the aggregate `key`, whose kind decides the topic."""
    metadata = {"number": str(number)}
    if key.startswith("quality"):
        return QualityEvent(
            event_type=QualityEventType.QUALITY_ASSESSED,
            inspection_id=key,
            batch_id="b",
            quality_score=1.0,
            pass_fail=True,
            metadata=metadata,
        )
    return InspectionEvent(
        event_type=InspectionEventType.INSPECTION_STARTED,
        inspection_id=key,
        batch_id="b",
        chip_id="c",
        inspection_type="visual",
        status="STARTED",
        metadata=metadata,
    )


def raw_message(key: str | None, number: int) -> Message:
    """What a writer in another language might insert: no Avro, sometimes no key, sometimes a tombstone."""
    value = None if number % 17 == 0 else json.dumps({"key": key, "number": number}).encode()
    keyless = number % 13 == 0 or key is None
    return Message(
        id=uuid7(), type="torture.RAW", topic=RAW, key=None if keyless else key, value=value, fingerprint=None
    )


# ---- the library's ways in, behind one face --------------------------------------------------------------------------


class Way(ABC):
    """A transaction that says events. `said` are the ids of those that a commit commits."""

    def __init__(self) -> None:
        self.said: list[UUID] = []

    @abstractmethod
    async def say(self, key: str, count: int = 1) -> None:
        """Lock the aggregate, say `count` events of it."""

    @abstractmethod
    def nested(self) -> AbstractAsyncContextManager[Any]:
        """A savepoint."""

    @abstractmethod
    async def commit(self) -> None: ...

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        """A savepoint, rolled back by ChangedMind."""
        before = len(self.said)
        try:
            async with self.nested():
                yield
        except ChangedMind:
            del self.said[before:]


class SessionWay(Way):
    """An AsyncSession with mapped objects, and Outbox.add."""

    def __init__(self, session: AsyncSession, outbox: Outbox) -> None:
        super().__init__()
        self._session = session
        self._outbox = outbox

    async def say(self, key: str, count: int = 1) -> None:
        await self._session.flush()  # the next line reads the row again
        aggregate = await self._session.get_one(Aggregate, key, with_for_update=True)
        for _ in range(count):
            aggregate.version += 1
            event = typed_event(key, aggregate.version)
            self.said += self._outbox.add(self._session, event)
            self._session.add(entry_of(self._outbox.catalogue.encode(event), aggregate.version))

    def nested(self) -> AbstractAsyncContextManager[Any]:
        return self._session.begin_nested()

    async def commit(self) -> None:
        await self._session.commit()


class BareWay(Way):
    """A bare asyncpg connection with add_asyncpg, or with plain SQL."""

    def __init__(self, connection: Any, outbox: Outbox, commit: Callable[[], Awaitable[Any]], *, plain: bool) -> None:
        super().__init__()
        self._connection = connection
        self._commit = commit
        self._outbox = outbox
        self._plain = plain

    async def say(self, key: str, count: int = 1) -> None:
        db = self._connection
        top = await db.fetchval(
            "UPDATE aggregate SET version = version + $2 WHERE key = $1 RETURNING version", key, count
        )
        numbers = range(top - count + 1, top + 1)
        if key.startswith(("raw", "burst")):
            messages = [raw_message(key, number) for number in numbers]
            await self._insert(messages)
        else:
            events = [typed_event(key, number) for number in numbers]
            messages = [self._outbox.catalogue.encode(event) for event in events]
            await (self._insert(messages) if self._plain else self._outbox.add_asyncpg(db, *events))
        self.said += [message.id for message in messages]
        entries = [entry_of(message, number) for message, number in zip(messages, numbers, strict=True)]
        await db.executemany(
            "INSERT INTO ledger (event_id, topic, key, number, type, value) VALUES ($1, $2, $3, $4, $5, $6)",
            [(one.event_id, one.topic, one.key, one.number, one.type, one.value) for one in entries],
        )

    async def _insert(self, messages: Sequence[Message]) -> None:
        await self._connection.execute(
            """
            INSERT INTO outbox.outbox (id, type, topic, key, value, fingerprint)
            SELECT id, type, topic, key, value, fingerprint
              FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::bigint[])
                   WITH ORDINALITY AS row (id, type, topic, key, value, fingerprint, n) ORDER BY n
            """,
            [one.id for one in messages],
            [one.type for one in messages],
            [one.topic for one in messages],
            [one.key for one in messages],
            [one.value for one in messages],
            [one.fingerprint for one in messages],
        )

    def nested(self) -> AbstractAsyncContextManager[Any]:
        transaction: AbstractAsyncContextManager[Any] = self._connection.transaction()
        return transaction

    async def commit(self) -> None:
        await self._commit()


# ---- the writer ------------------------------------------------------------------------------------------------------


class Writer:
    """Everything one process does."""

    def __init__(self, url: str, elsewhere_url: str, number: int, seed: int) -> None:
        self._url = url
        self._elsewhere_url = elsewhere_url
        self._number = number
        self._dice = random.Random(f"{seed} {number}")
        self._engine = create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"), pool_size=TASKS + 1)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)
        self._outbox = Outbox(Catalogue.from_folder(SCHEMAS))
        self._pool: asyncpg.Pool[Any]
        self._stopping = asyncio.Event()
        self._prepared = 0
        self.done: Counter[str] = Counter()
        """What happened, how often."""

    def stop(self) -> None:
        """Finish the transactions under way, then return from `run`."""
        self._stopping.set()

    async def run(self) -> None:
        """Work until `stop`."""
        tasks = [
            *([self._mixed] * TASKS),
            *([self._slow] * 2),
            self._prepare,
            self._snapshot,
            self._other_table,
            self._other_database,
            *([self._burst] if self._number == 0 else []),
        ]
        async with asyncpg.create_pool(self._url, min_size=0, max_size=20, timeout=5) as self._pool:
            async with asyncio.TaskGroup() as group:
                for task in tasks:
                    group.create_task(self._forever(task))
                group.create_task(self._sweep())
            await self._finish_prepared(later=False)
        await self._engine.dispose()

    async def _forever(self, task: Callable[[], Awaitable[None]]) -> None:
        while not self._stopping.is_set():
            try:
                await task()
            except AWAY as error:
                self.done[f"{task.__name__[1:]}: {type(error).__name__}"] += 1
                await self._pause(0.2)

    async def _pause(self, seconds: float) -> None:
        """Or until `stop`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    # ---- the everyday transaction ------------------------------------------------------------------------------------

    async def _mixed(self) -> None:
        await self._pause(self._dice.uniform(0, 2 * PAUSE))
        way = self._dice.choice(("session", "asyncpg", "plain"))
        async with self._transaction(way) as transaction:
            await self._story(transaction, HOT[:2] if way == "session" else HOT)

    async def _story(self, way: Way, kinds: Sequence[str]) -> None:
        """Several events of one or two aggregates; savepoints released and rolled back; a change of mind at the end."""
        dice = self._dice
        keys = sorted(f"{dice.choice(kinds)}-{dice.randrange(20)}" for _ in range(dice.choice((1, 1, 2))))
        for key in keys:
            await way.say(key, dice.randint(1, 3))
        if dice.random() < 0.3:
            async with way.savepoint():
                await way.say(keys[0])
            async with way.savepoint():
                await way.say(keys[0], 2)
                self.done["savepoints rolled back"] += 1
                self._change_mind(1)
            await way.say(keys[0])
        self._change_mind(0.125)

    def _change_mind(self, chance: float) -> None:
        if self._dice.random() < chance:
            raise ChangedMind

    @asynccontextmanager
    async def _transaction(self, way: str, isolation: str = "read_committed") -> AsyncIterator[Way]:
        """Committed at the end of the block, rolled back by ChangedMind."""
        try:
            if way == "session":
                async with self._sessions() as session:
                    transaction: Way = SessionWay(session, self._outbox)
                    yield transaction
                    await self._commit(transaction)
                return
            async with self._connection() as connection:
                outer = connection.transaction(isolation=isolation)
                await outer.start()
                transaction = BareWay(connection, self._outbox, outer.commit, plain=way == "plain")
                try:
                    yield transaction
                except ChangedMind:
                    await outer.rollback()
                    raise
                await self._commit(transaction)
        except ChangedMind:
            self.done["rolled back"] += 1

    async def _commit(self, way: Way) -> None:
        try:
            await way.commit()
        except AWAY:
            await self._settle(way.said)
            raise
        self.done["committed"] += 1
        self.done["events"] += len(way.said)

    async def _settle(self, ids: Sequence[UUID]) -> None:
        """The client does not know what became of its commit. The ledger does: all of these ids, or none."""
        while True:
            try:
                async with self._connection() as db:
                    found = await db.fetchval("SELECT count(*) FROM ledger WHERE event_id = ANY($1::uuid[])", ids)
                    break
            except AWAY:
                await asyncio.sleep(0.2)
        if found not in (0, len(ids)):
            raise AssertionError(f"{found} of the {len(ids)} ledger rows of one transaction: {ids}")
        self.done["unknown, found committed" if found else "unknown, found rolled back"] += 1

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        """A connection of the pool; what is open in it at the end of the block is rolled back."""
        async with self._pool.acquire(timeout=5) as connection:
            try:
                yield connection
            finally:
                if not connection.is_closed() and connection.is_in_transaction():
                    await connection.execute("ROLLBACK")

    # ---- the awkward ones --------------------------------------------------------------------------------------------

    async def _slow(self) -> None:
        """Says an event early, commits it seconds later, behind hundreds of others."""
        way = self._dice.choice(("asyncpg", "plain"))
        async with self._transaction(way) as transaction:
            await transaction.say(f"slow-{self._dice.randrange(20)}", self._dice.randint(1, 3))
            await self._pause(self._dice.uniform(0.5, 4))
            self._change_mind(0.2)
            self.done["slow"] += 1

    async def _burst(self) -> None:
        """2,500 events in one transaction: a backlog, which relays work off in overlapping batches."""
        await self._pause(self._dice.uniform(10, 20))
        async with self._transaction("plain") as transaction:
            for number in range(10):
                await transaction.say(f"burst-{number}", BURST_EVENTS)
            self.done["bursts"] += 1

    async def _snapshot(self) -> None:
        """A session holds a snapshot for long, and then says an event, in the sight of that old snapshot."""
        async with self._transaction("asyncpg", "repeatable_read") as transaction:
            await transaction.say(f"snapshot-{self._number}", 0)
            await self._pause(self._dice.uniform(4, 12))
            await transaction.say(f"snapshot-{self._number}", 1)
            self.done["snapshots"] += 1

    async def _other_table(self) -> None:
        """A long transaction that has nothing to do with the outbox."""
        async with self._connection() as connection, connection.transaction():
            await self._write_elsewhere(connection)

    async def _other_database(self) -> None:
        """The same in another database of the cluster."""
        connection = await asyncpg.connect(self._elsewhere_url, timeout=5)
        try:
            async with connection.transaction():
                await self._write_elsewhere(connection)
        finally:
            connection.terminate()

    async def _write_elsewhere(self, connection: Any) -> None:
        await connection.execute("INSERT INTO elsewhere (text) VALUES ('long')")
        await self._pause(self._dice.uniform(5, 20))
        self.done["long writers elsewhere"] += 1

    # ---- prepared transactions ---------------------------------------------------------------------------------------

    async def _prepare(self) -> None:
        """A prepared transaction, whose name says what is to become of it, and when."""
        await self._pause(self._dice.uniform(0.2, 1.5))
        end = self._dice.choice(("COMMIT", "COMMIT", "ROLLBACK"))
        self._prepared += 1
        late = int(self._dice.uniform(300, 4000))
        name = f"{self._number}:{self._prepared}:{end}:{late}"
        async with self._connection() as connection:
            await connection.execute("BEGIN; SET LOCAL lock_timeout = '3s'")

            async def prepare() -> None:
                await connection.execute(f"PREPARE TRANSACTION '{name}'")

            way = BareWay(connection, self._outbox, prepare, plain=self._dice.random() < 0.5)
            await way.say(f"prepared-{self._dice.randrange(20)}", self._dice.randint(1, 3))
            await way.commit()
            self.done["prepared"] += 1

    async def _sweep(self) -> None:
        while not self._stopping.is_set():
            with suppress(*AWAY):
                await self._finish_prepared(later=True)
            await self._pause(0.2)

    async def _finish_prepared(self, *, later: bool) -> None:
        """Those of this writer whose time has come (all, when not `later`), as their names say.

        Raises what a database that is away raises; then they wait for the next call.
        """
        async with self._connection() as connection:
            rows = await connection.fetch(
                "SELECT gid FROM pg_prepared_xacts WHERE split_part(gid, ':', 1) = $1 AND database = current_database()"
                " AND (NOT $2 OR clock_timestamp() - prepared > split_part(gid, ':', 4)::int * interval '1 ms')",
                str(self._number),
                later,
            )
            for (gid,) in rows:
                end = gid.split(":")[2]
                await connection.execute(f"{end} PREPARED '{gid}'")
                self.done[f"prepared, {end}"] += 1


async def main(number: int, seed: int) -> None:
    """The process."""
    writer = Writer(os.environ["OUTBOX_DATABASE_URL"], os.environ["TORTURE_ELSEWHERE_URL"], number, seed)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, writer.stop)
    await writer.run()
    print(json.dumps({"event": "writer finished", **writer.done}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
