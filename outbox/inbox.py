"""Which events a consumer has taken effect of, kept in the transaction of its effects: Inbox.claim, once, purge.

A consumer that claims a batch, writes what the claimed messages mean, and commits both, takes effect exactly once: of
what a producer, a rebalance or a replay delivers again, nothing is claimed a second time (docs/consuming.md).
"""

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from outbox.errors import InvalidMessage, TransactionError, UsageError
from outbox.rows import ASYNCPG, OTHERS, Driver
from outbox.tables import SCHEMA, quoted, tables
from outbox.transaction import (
    AnySession,
    bind_of,
    explained,
    join,
    refuse_autocommit,
    refuse_autocommit_bind,
    session_of,
)

M = TypeVar("M")

# Sorted inside the statement: two batches that hold the same events in another order would wait for each other in a
# circle. DO NOTHING waits for a transaction that is claiming the same event and then sees what became of it; under
# REPEATABLE READ, PostgreSQL raises a serialization failure instead of skipping a row that the snapshot cannot see.
# What comes back is what was claimed before: mostly nothing, where the claimed would be all (500 new ids: 2.4 ms of
# the client's CPU less).
_CLAIM = """WITH given AS (
    SELECT id FROM unnest(CAST(string_to_array(CAST({ids} AS text), ' ') AS uuid[])) AS event (id)
), claimed AS (
    INSERT INTO {schema}.inbox (consumer, event_id) SELECT CAST({consumer} AS text), id FROM given ORDER BY id
    ON CONFLICT DO NOTHING
    RETURNING event_id
)
SELECT id FROM given EXCEPT ALL SELECT event_id FROM claimed"""

# By the primary key, in its order: ids of version 7 begin with the oldest, and two purges cannot wait for each other.
_PURGE = """DELETE FROM {schema}.inbox WHERE consumer = :consumer AND event_id = ANY (ARRAY(
    SELECT event_id FROM {schema}.inbox
    WHERE consumer = :consumer AND processed_at < now() - CAST(:older_than AS interval)
    ORDER BY event_id LIMIT :limit FOR UPDATE SKIP LOCKED
))"""


class KafkaMessage(Protocol):
    """What is read of a message. None of the clients is imported.

    confluent-kafka has methods (`message.headers()`), aiokafka attributes, FastStream a mapping of headers and the
    client's own message as `raw_message`.
    """

    @property
    def headers(self) -> Any: ...


class AsyncpgConnection(Protocol):
    """What claim_asyncpg needs of asyncpg's Connection or of its pool's proxy."""

    def is_in_transaction(self) -> bool: ...
    async def fetch(self, query: str, *args: Any) -> list[Any]: ...


def id_of(message: KafkaMessage) -> UUID:
    """The event's id, out of the header `ce_id` of the CloudEvents Kafka binding. Raises InvalidMessage."""
    headers = _read(message, "headers") or ()
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    found = next((value for name, value in pairs if name == "ce_id"), None)
    try:
        return UUID(found.decode() if isinstance(found, bytes) else found)
    except (ValueError, TypeError, AttributeError):
        what = "no header ce_id" if found is None else f"a header ce_id that is no uuid: {str(found)[:60]!r}"
        raw = getattr(message, "raw_message", message)
        topic, partition, offset = (_read(raw, name) for name in ("topic", "partition", "offset"))
        raise InvalidMessage(
            f"the message at {topic} [{partition}] offset {offset} has {what};"
            " it was not written by an outbox: give claim() an id= that finds one, or leave the message out"
        ) from None


def _read(message: Any, name: str) -> Any:
    found = getattr(message, name, None)
    return found() if callable(found) else found


class Inbox:
    """The claims of one consumer, in the SQL schema `schema` of its own database. Immutable; thread-safe."""

    def __init__(self, consumer: str, *, schema: str = SCHEMA) -> None:
        """`consumer`: names the effect, not the process; all instances of a service share it, for ever."""
        if not consumer or "\0" in consumer:
            raise UsageError("a consumer needs a name: that of its effect, such as 'analytics'")
        self.consumer = consumer
        self.schema = schema
        self.table = tables(schema).tables[f"{schema}.inbox"]
        """The table as SQLAlchemy knows it: for the `binds` of a session with several databases."""
        self._bind_clause = sa.insert(self.table)
        self._claim_asyncpg, self._claim_others = _claim_for(ASYNCPG, schema), _claim_for(OTHERS, schema)
        self._purge = sa.text(_PURGE.format(schema=quoted(schema)))

    def claim(
        self,
        session: "Session | scoped_session[Any]",
        messages: Iterable[M],
        *,
        id: Callable[[M], UUID] | None = None,  # noqa: A002 - what it finds, at every call
    ) -> list[M]:
        """The messages that this consumer has not taken effect of, in the order given; of repeats in them the first.

        One statement, in the session's transaction: the claim counts if that commits, and not otherwise. `id` finds the
        event's id; by default the header `ce_id` of a message of confluent-kafka, aiokafka or FastStream.

        Raises InvalidMessage for a message without an id, and then nothing is claimed; TransactionError where there is
        no transaction to join; MigrationError where the tables are missing. Under REPEATABLE READ or SERIALIZABLE the
        database's serialization failure passes through: roll back, and handle the batch again.
        """
        by_id = _by_id(messages, id)
        return _first_seen(by_id, self.claim_ids(session, by_id))

    async def claim_async(
        self,
        session: "AsyncSession | async_scoped_session[Any]",
        messages: Iterable[M],
        *,
        id: Callable[[M], UUID] | None = None,  # noqa: A002 - as in claim
    ) -> list[M]:
        """As `claim`, for an AsyncSession."""
        by_id = _by_id(messages, id)
        return _first_seen(by_id, await _plain(session).run_sync(self.claim_ids, by_id))

    async def claim_asyncpg(
        self,
        connection: AsyncpgConnection,
        messages: Iterable[M],
        *,
        id: Callable[[M], UUID] | None = None,  # noqa: A002 - as in claim
    ) -> list[M]:
        """As `claim`, through a bare asyncpg connection, in its open transaction."""
        by_id = _by_id(messages, id)
        if not connection.is_in_transaction():
            raise TransactionError(
                "the asyncpg connection is in no transaction, so claim and effect could be committed one without the"
                " other: call it inside `async with connection.transaction():`"
            )
        if not by_id:
            return []
        with explained(self.schema):
            known = await connection.fetch(self._claim_asyncpg, _joined(by_id), self.consumer)
        # asyncpg's own UUID is equal to the standard one, and hashes as it does
        return _first_seen(by_id, {row[0] for row in known})

    def claim_ids(self, session: AnySession, ids: Iterable[UUID | str]) -> set[UUID]:
        """Claim these events; those of them that were claimed *before*. The ids must differ."""
        joined = _joined(ids)
        if not joined:
            return set()
        with explained(self.schema):
            connection = self._connection(session)
            sql = self._claim_asyncpg if connection.dialect.driver == "asyncpg" else self._claim_others
            # In the driver's own SQL: a tenth of what a message that comes alone costs is saved.
            return set(connection.exec_driver_sql(sql, (joined, self.consumer)).scalars())

    def once(
        self,
        session: AnySession,
        message: M,
        *,
        id: Callable[[M], UUID] | None = None,  # noqa: A002 - as in claim
    ) -> "Once[M]":
        """A block for the effect of one message: whether it is seen for the first time.

            with inbox.once(session, message) as first:          # AsyncSession: async with
                if first:
                    session.add(...)

        Claim and block are one savepoint: where the block raises, the claim is undone too, also when the caller
        catches the exception and commits. Raises what `claim` raises.
        """
        return Once(self, session, message, id)

    def purge(self, session: "Session | scoped_session[Any]", older_than: timedelta, limit: int = 10_000) -> int:
        """Forget up to `limit` claims made more than `older_than` ago; how many they were. Commit, and again until 0.

        An event that Kafka still holds and delivers again after its claim was forgotten takes effect twice:
        `older_than` must be longer than the topics' retention, or than the furthest replay.
        """
        return self._purge_claims(session, older_than, limit)

    async def purge_async(
        self, session: "AsyncSession | async_scoped_session[Any]", older_than: timedelta, limit: int = 10_000
    ) -> int:
        """As `purge`, for an AsyncSession."""
        return await _plain(session).run_sync(lambda inner: self._purge_claims(inner, older_than, limit))

    def _purge_claims(self, session: AnySession, older_than: timedelta, limit: int) -> int:
        if older_than <= timedelta(0) or limit < 1:
            raise UsageError(f"purge needs an age and a limit above zero, not {older_than} and {limit}")
        with explained(self.schema):
            parameters = {"consumer": self.consumer, "older_than": older_than, "limit": limit}
            return self._connection(session).execute(self._purge, parameters).rowcount

    def _connection(self, session: AnySession) -> sa.Connection:
        target = session_of(session)
        join(target)
        refuse_autocommit_bind(bind_of(target, self._bind_clause))
        connection = target.connection(bind_arguments={"clause": self._bind_clause})
        refuse_autocommit(connection)
        return connection


def _claim_for(driver: Driver, schema: str) -> str:
    name = quoted(schema).replace("%", driver.percent)
    return _CLAIM.format(schema=name, ids=driver.placeholder.format(1), consumer=driver.placeholder.format(2))


def _plain(session: "AsyncSession | async_scoped_session[Any]") -> AsyncSession:
    return session() if isinstance(session, async_scoped_session) else session


def _by_id(messages: Iterable[M], id: Callable[[M], UUID] | None) -> dict[UUID, M]:  # noqa: A002 - the public name
    """The first message of each id, in the order given."""
    found: dict[UUID, M] = {}
    find: Callable[[Any], UUID] = id_of if id is None else id
    for message in messages:
        found.setdefault(find(message), message)
    return found


def _first_seen(by_id: dict[UUID, M], known: set[UUID]) -> list[M]:
    return [message for id_, message in by_id.items() if id_ not in known] if known else list(by_id.values())


def _joined(ids: Iterable[UUID | str]) -> str:
    return " ".join(map(str, ids))


class Once(Generic[M]):
    """The block that `Inbox.once` makes."""

    def __init__(
        self,
        inbox: Inbox,
        session: AnySession,
        message: M,
        id: Callable[[M], UUID] | None,  # noqa: A002 - as in claim
    ) -> None:
        self._inbox = inbox
        self._session = session
        self._by_id = _by_id([message], id)
        self._savepoint: Any = None

    def __enter__(self) -> bool:
        session = session_of(self._session)
        self._savepoint = session.begin_nested()
        try:
            return not self._inbox.claim_ids(session, self._by_id)
        except BaseException:
            self._savepoint.rollback()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._savepoint.__exit__(kind, error, trace)

    async def __aenter__(self) -> bool:
        session = _plain(self._session)  # type: ignore[arg-type] # an AsyncSession, or it fails below as it should
        return await session.run_sync(lambda _: self.__enter__())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session = _plain(self._session)  # type: ignore[arg-type] # as above
        await session.run_sync(lambda _: self.__exit__(kind, error, trace))
