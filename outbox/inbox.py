"""Which events a consumer has taken effect of, kept in the transaction of its effects: Inbox.claim, claim_async, purge.

A consumer that claims a batch, writes what the claimed messages mean, and commits both, takes effect exactly once: of
what a producer, a rebalance or a replay delivers again, nothing is claimed a second time (docs/design.md, Consuming).
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from outbox.errors import InvalidMessage, UsageError
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
_CLAIM = """INSERT INTO {schema}.inbox (consumer, event_id)
SELECT :consumer, id FROM unnest(CAST(string_to_array(:ids, ' ') AS uuid[])) AS event (id) ORDER BY id
ON CONFLICT DO NOTHING
RETURNING event_id"""

# By the primary key, in its order: ids of version 7 begin with the oldest, and two purges cannot wait for each other.
_PURGE = """DELETE FROM {schema}.inbox WHERE consumer = :consumer AND event_id = ANY (ARRAY(
    SELECT event_id FROM {schema}.inbox
    WHERE consumer = :consumer AND processed_at < now() - CAST(:older_than AS interval)
    ORDER BY event_id LIMIT :limit FOR UPDATE SKIP LOCKED
))"""


class KafkaMessage(Protocol):
    """What is read of confluent-kafka's Message, whose type this module does not import."""

    def topic(self) -> str | None: ...
    def partition(self) -> int | None: ...
    def offset(self) -> int | None: ...
    def headers(self) -> Any: ...


def id_of(message: KafkaMessage) -> UUID:
    """The event's id, out of the header `ce_id` of the CloudEvents Kafka binding. Raises InvalidMessage."""
    found = next((value for name, value in message.headers() or () if name == "ce_id"), None)
    try:
        return UUID(found.decode() if isinstance(found, bytes) else found)
    except (ValueError, TypeError, AttributeError):
        what = "no header ce_id" if found is None else f"a header ce_id that is no uuid: {str(found)[:60]!r}"
        raise InvalidMessage(
            f"the message at {message.topic()} [{message.partition()}] offset {message.offset()} has {what};"
            " it was not written by an outbox: give claim() an id= that finds one, or leave the message out"
        ) from None


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
        self._claim = sa.text(_CLAIM.format(schema=quoted(schema)))
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
        event's id; by default the header `ce_id` of a confluent-kafka Message.

        Raises InvalidMessage for a message without an id, and then nothing is claimed; TransactionError where there is
        no transaction to join; MigrationError where the tables are missing. Under REPEATABLE READ or SERIALIZABLE the
        database's serialization failure passes through: roll back, and handle the batch again.
        """
        by_id = _by_id(messages, id)
        return _first_seen(by_id, self._claim_ids(session, list(by_id)))

    async def claim_async(
        self,
        session: "AsyncSession | async_scoped_session[Any]",
        messages: Iterable[M],
        *,
        id: Callable[[M], UUID] | None = None,  # noqa: A002 - as in claim
    ) -> list[M]:
        """As `claim`, for an AsyncSession."""
        by_id = _by_id(messages, id)
        claimed = await _plain(session).run_sync(lambda inner: self._claim_ids(inner, list(by_id)))
        return _first_seen(by_id, claimed)

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

    def _claim_ids(self, session: AnySession, ids: Sequence[UUID]) -> set[UUID]:
        if not ids:
            return set()
        with explained(self.schema):
            parameters = {"consumer": self.consumer, "ids": " ".join(map(str, ids))}
            return set(self._connection(session).scalars(self._claim, parameters))

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


def _plain(session: "AsyncSession | async_scoped_session[Any]") -> AsyncSession:
    return session() if isinstance(session, async_scoped_session) else session


def _by_id(messages: Iterable[M], id: Callable[[M], UUID] | None) -> dict[UUID, M]:  # noqa: A002 - the public name
    """The first message of each id, in the order given."""
    found: dict[UUID, M] = {}
    find: Callable[[Any], UUID] = id_of if id is None else id
    for message in messages:
        found.setdefault(find(message), message)
    return found


def _first_seen(by_id: dict[UUID, M], claimed: set[UUID]) -> list[M]:
    return [message for id_, message in by_id.items() if id_ in claimed]
