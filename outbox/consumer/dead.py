"""Dead messages as a person sees to them: listed, shown, retried, discarded. Each is one transaction on a connection.

A retry is a mark: a consumer at work finds it within a second, and tries the message as if Kafka had just delivered it;
the row, which is deleted with the effect, makes sure that it is once. A discard leaves the claim, so that no
redelivery brings the message back.
"""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from outbox.consumer.store import DeadMessage, dead_message
from outbox.errors import UsageError
from outbox.tables import SCHEMA, tables
from outbox.transaction import explained


class DeadMessages:
    """The dead messages of a SQL schema: of one consumer, or of all."""

    def __init__(self, connection: sa.Connection, *, schema: str = SCHEMA, consumer: str | None = None) -> None:
        self._connection = connection
        self._schema = schema
        self._table = tables(schema).tables[f"{schema}.dead_message"]
        self._whose: Sequence[sa.ColumnElement[bool]] = [] if consumer is None else [self._table.c.consumer == consumer]

    def listed(self, limit: int) -> list[DeadMessage]:
        """The oldest first."""
        return self._select(limit)

    def one(self, event_id: str) -> DeadMessage:
        """UsageError where there is none, or where several consumers have it."""
        found = self._select(2, self._table.c.event_id == _uuid(event_id))
        if len(found) != 1:
            why = "is no dead message" if not found else "is dead for several consumers: name one with --consumer"
            raise UsageError(f"{event_id} {why}")
        return found[0]

    def retry(self, ids: Sequence[str]) -> int:
        """Have these tried again, or all that are not only held (no ids); how many.

        Raises UsageError for a message that is held: it is tried by itself, once what stands before it is settled.
        """
        chosen = self._chosen(ids)
        if held := [message.event_id for message in chosen if message.reason == "held"]:
            raise UsageError(
                f"{held[0]} is held behind an earlier message of its key: retry or discard that one, and it follows"
            )
        return self._change(sa.update(self._table).values(retry_at=sa.func.now()), ids, held=False)

    def discard(self, ids: Sequence[str]) -> int:
        """Give these up for good; how many. What is held behind them is tried then."""
        self._chosen(ids)
        return self._change(sa.delete(self._table), ids, held=True)

    def _chosen(self, ids: Sequence[str]) -> list[DeadMessage]:
        return [self.one(event_id) for event_id in ids]

    def _change(self, statement: Any, ids: Sequence[str], *, held: bool) -> int:
        where = [*self._whose]
        if ids:
            where.append(self._table.c.event_id.in_([_uuid(event_id) for event_id in ids]))
        if not held:
            where.append(self._table.c.reason != "held")
        with explained(self._schema):
            return int(self._connection.execute(statement.where(*where)).rowcount)

    def _select(self, limit: int, *where: sa.ColumnElement[bool]) -> list[DeadMessage]:
        columns = [self._table.c[name] for name in DeadMessage.__slots__]
        query = sa.select(*columns).where(*self._whose, *where).order_by(self._table.c.seq).limit(limit)
        with explained(self._schema):
            return [dead_message(row) for row in self._connection.execute(query).mappings()]


def _uuid(event_id: str) -> UUID:
    try:
        return UUID(event_id)
    except ValueError:
        raise UsageError(f"{event_id!r} is no event's id: `outbox dead list` shows them") from None
