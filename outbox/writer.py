"""Events into the outbox table, in the caller's transaction: Outbox.add, insert, add_asyncpg, add_psycopg.

`add` encodes and remembers; nothing reaches the database before the session commits. Then, once the unit of work is
flushed, all events of the transaction go out in one INSERT, in the order of their add() (docs/design.md, Writing):

    add ─► ledger in Session.info ─► before_commit of the root: 1 flush  2 INSERT  (again while a flush adds events)
             └─ forgotten with the savepoint, or the transaction, that is not committed

Why not a mapped class: the unit of work would write its rows in an order of its own, often before the aggregate's
UPDATE has locked the aggregate, and the order of the key would be void.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter, itemgetter
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from uuid import UUID
from weakref import WeakKeyDictionary, WeakSet

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from outbox.catalogue import MAX_BYTES, Catalogue, TypedEvent
from outbox.errors import TransactionError
from outbox.guards import HOLDS_NOTHING, Backlog, Origin, origin, warn_of
from outbox.headers import current
from outbox.message import Event, Message
from outbox.rows import ASYNCPG, OTHERS, Inserts, StoredSchema
from outbox.tables import SCHEMA, tables
from outbox.transaction import (
    AnySession,
    bind_of,
    explained,
    join,
    refuse_autocommit,
    refuse_autocommit_bind,
    refuse_autocommit_psycopg,
    session_of,
)

if TYPE_CHECKING:
    import psycopg


class AsyncpgConnection(Protocol):
    """What add_asyncpg needs of asyncpg's Connection or of its pool's proxy."""

    def is_in_transaction(self) -> bool: ...
    async def execute(self, query: str, *args: Any) -> str: ...
    async def fetchval(self, query: str, *args: Any) -> Any: ...


class _Insert(sa.Executable, sa.ClauseElement):
    """What `Outbox.insert` gives: executed like a statement of SQLAlchemy's, and written in the driver's own SQL."""

    inherit_cache = False

    def __init__(self, outbox: "Outbox", messages: Sequence[Message]) -> None:
        self._outbox = outbox
        self._messages = messages

    def _execute_on_connection(self, connection: sa.Connection, *_: Any) -> sa.CursorResult[Any]:
        return self._outbox._write(connection, self._messages)  # noqa: SLF001 - the other half of Outbox.insert


class Outbox:
    """Writes events of a catalogue's schemas into the outbox in `schema`. One per service; thread-safe.

    Make it before the first transaction that may use it: its hooks are set on SQLAlchemy's Session then.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        schema: str = SCHEMA,
        max_bytes: int = MAX_BYTES,
        max_backlog: int | None = None,
        warn_unlocked: bool = False,
    ) -> None:
        """Takes no connection; the first transaction does.

        Args:
            schema: SQL schema of the outbox's tables.
            max_bytes: the largest record, as Kafka counts it; no more than the topics' `max.message.bytes`.
            max_backlog: so many events may wait, about (guards.Backlog); more are refused with BacklogFull, by `add` or
                by the INSERT. Of one database: a service with several has an Outbox for each. None: no limit.
            warn_unlocked: UnlockedKey, a warning, where a session commits an event with a key and had written and
                locked nothing before. Costs each transaction with events one more statement.
        """
        self.catalogue = catalogue
        self.schema = schema
        self.max_bytes = max_bytes
        self.warn_unlocked = warn_unlocked
        self._backlog = None if max_backlog is None else Backlog(schema, max_backlog)
        self.table = tables(schema).tables[f"{schema}.outbox"]
        """The table as SQLAlchemy knows it: for the `binds` of a session with several databases."""
        self._bind_clause = sa.insert(self.table)
        self._asyncpg, self._others = Inserts(schema, ASYNCPG), Inserts(schema, OTHERS)
        _LIVING.add(self)
        _hook_sessions()

    def add(
        self, session: AnySession, *events: Event | TypedEvent, headers: Mapping[str, str] | None = None
    ) -> list[UUID]:
        """Put events into the session's transaction; their ids. No I/O, no await, never commits.

        They are committed with it or not at all, savepoints included, in the order of the calls. Begins the transaction
        where none is open, as any statement of the session would. `headers`: Kafka headers of each of these events,
        beside those of the context (outbox/headers.py).

        Raises UnknownEventType, InvalidEvent or EventTooLarge for an event, and then none of the call's events is
        added; TransactionError where there is no transaction to join; BacklogFull. The commit raises TransactionError
        if a savepoint is still open then, MigrationError if the tables are missing, BacklogFull.
        """
        messages = self.encode(*events, headers=headers)
        put(session_of(session), self, messages, origin() if self.warn_unlocked else None)
        return [message.id for message in messages]

    def insert(self, *events: Event | TypedEvent, headers: Mapping[str, str] | None = None) -> sa.Executable:
        """An INSERT of these events for `execute` of a Core Connection or AsyncConnection; part of its transaction.

        `headers` as in `add`. Raises what `add` raises for an event. Executing it raises TransactionError on a
        connection in AUTOCOMMIT and MigrationError where the tables are missing.
        """
        return _Insert(self, self.encode(*events, headers=headers))

    async def add_asyncpg(
        self, connection: AsyncpgConnection, *events: Event | TypedEvent, headers: Mapping[str, str] | None = None
    ) -> list[UUID]:
        """Insert events through a bare asyncpg connection, in its open transaction; their ids.

        `headers` as in `add`. Raises what `add` raises for an event, TransactionError outside a transaction,
        MigrationError where the tables are missing.
        """
        messages = self.encode(*events, headers=headers)
        if not connection.is_in_transaction():
            raise TransactionError(
                "the asyncpg connection is in no transaction, so data and events could be committed one without the"
                " other: call it inside `async with connection.transaction():`"
            )
        if messages:
            with explained(self.schema):
                if self._backlog and (query := self._backlog.due()):
                    self._backlog.take(await connection.fetchval(query))
                sql, parameters = self._asyncpg.events_with_schemas(messages, self._schemas(messages))
                await connection.execute(sql, *parameters)
        return [message.id for message in messages]

    def add_psycopg(
        self,
        connection: "psycopg.Connection[Any]",
        *events: Event | TypedEvent,
        headers: Mapping[str, str] | None = None,
    ) -> list[UUID]:
        """Insert events through a bare connection of psycopg 3, in its transaction; their ids.

        Begins the transaction where none is open, as any `execute` would. `headers` as in `add`. Raises what `add`
        raises for an event, TransactionError in autocommit outside of `connection.transaction()`, MigrationError where
        the tables are missing, BacklogFull.
        """
        from psycopg import Cursor  # here: a service with another driver has no psycopg

        messages = self.encode(*events, headers=headers)
        refuse_autocommit_psycopg(connection)
        if messages:
            cursor = Cursor(connection, row_factory=_first)
            with explained(self.schema):
                if self._backlog and (query := self._backlog.due()):
                    self._backlog.take(cursor.execute(query).fetchall()[0])
                cursor.execute(*self._others.events_with_schemas(messages, self._schemas(messages)))
        return [message.id for message in messages]

    async def add_psycopg_async(
        self,
        connection: "psycopg.AsyncConnection[Any]",
        *events: Event | TypedEvent,
        headers: Mapping[str, str] | None = None,
    ) -> list[UUID]:
        """`add_psycopg` for an AsyncConnection."""
        from psycopg import AsyncCursor

        messages = self.encode(*events, headers=headers)
        refuse_autocommit_psycopg(connection)
        if messages:
            cursor = AsyncCursor(connection, row_factory=_first)
            with explained(self.schema):
                if self._backlog and (query := self._backlog.due()):
                    self._backlog.take((await (await cursor.execute(query)).fetchall())[0])
                await cursor.execute(*self._others.events_with_schemas(messages, self._schemas(messages)))
        return [message.id for message in messages]

    def encode(self, *events: Event | TypedEvent, headers: Mapping[str, str] | None = None) -> list[Message]:
        """The rows of these events, checked, with the headers of the context. Raises what `add` raises for an event."""
        given, encode, limit = current(headers), self.catalogue.encode, self.max_bytes
        return [encode(event, max_bytes=limit, headers=given) for event in events]

    def _schemas(self, messages: Sequence[Message]) -> list[StoredSchema]:
        return [self._schema(fingerprint) for fingerprint in _fingerprints(messages)]

    def _schema(self, fingerprint: int) -> StoredSchema:
        catalogue = self.catalogue
        return StoredSchema(fingerprint, catalogue.subject(fingerprint), catalogue.schema_json(fingerprint))

    def _check(self, session: Session) -> None:
        """Once a transaction, at the first add(): what can be known without I/O."""
        refuse_autocommit_bind(bind_of(session, self._bind_clause))
        if self._backlog is not None:
            self._backlog.check()

    def _warn(self, session: Session, entries: "Sequence[_Entry]") -> None:
        """Ask the database, right before the INSERT: what was flushed until now has written and locked too."""
        if self._connection(session).scalar(sa.text(HOLDS_NOTHING)):
            warn_of((message, entry.origin) for entry in entries for message in entry.messages)

    def _connection(self, session: Session) -> sa.Connection:
        return session.connection(bind_arguments={"clause": self._bind_clause})

    def _write(self, connection: sa.Connection, messages: Sequence[Message]) -> sa.CursorResult[Any]:
        """One INSERT of these messages, behind those of the schemas that may not be there yet.

        In the driver's own SQL: 27 µs of CPU less than `connection.execute`, a quarter of what one event costs.
        """
        refuse_autocommit(connection)
        inserts = self._asyncpg if connection.dialect.driver == "asyncpg" else self._others
        known = _known_in(connection.engine, self.schema)
        with explained(self.schema):
            if self._backlog and (query := self._backlog.due()):
                self._backlog.take(connection.execute(sa.text(query)).scalar_one())
            for fingerprint in sorted(_fingerprints(messages) - known.committed):
                found = connection.exec_driver_sql(*inserts.schemas(self._schema(fingerprint)))
                known.learn(fingerprint, connection.get_transaction(), new=found.rowcount > 0)
            return connection.exec_driver_sql(*inserts.events(messages))


_LIVING: WeakSet[Outbox] = WeakSet()


def living() -> list[Outbox]:
    """Every Outbox of this process: outbox.testing reads by their catalogues what they wrote."""
    return list(_LIVING)


def _fingerprints(messages: Sequence[Message]) -> set[int]:
    return {message.fingerprint for message in messages if message.fingerprint is not None}


def _first(_: Any) -> Callable[[Sequence[Any]], Any]:
    """A row factory of psycopg's."""
    return itemgetter(0)


# --- The schemas that a database has ---


class _Known:
    """The fingerprints that are in avro_schema for sure, of one database and SQL schema."""

    def __init__(self) -> None:
        self.committed: set[int] = set()
        self._written: WeakKeyDictionary[sa.Transaction, set[int]] = WeakKeyDictionary()

    def learn(self, fingerprint: int, transaction: sa.Transaction | None, *, new: bool) -> None:
        """Of an INSERT in this root transaction. What it found there is committed, unless this transaction wrote it."""
        written = self._written.setdefault(transaction, set()) if transaction else set()
        if new:
            written.add(fingerprint)
        elif fingerprint not in written:
            self.committed.add(fingerprint)


_KNOWN: WeakKeyDictionary[sa.Engine, dict[str, _Known]] = WeakKeyDictionary()


def _known_in(engine: sa.Engine, schema: str) -> _Known:
    return _KNOWN.setdefault(engine, {}).setdefault(schema, _Known())


# --- The ledger of a session: what was added and is not yet written ---


class _Entry(NamedTuple):
    """Of one add()."""

    outbox: Outbox
    messages: Sequence[Message]
    savepoints: tuple[SessionTransaction, ...]
    """Those open at the add(): the events are gone when one of them is rolled back."""
    origin: Origin | None
    """Where the Outbox warns of keys that nothing was locked for."""


@dataclass(slots=True, eq=False)
class Fate:
    """What became of messages that were put into a transaction."""

    committed: bool | None = None
    """None: the transaction has not ended."""
    savepoints: tuple[SessionTransaction, ...] = ()

    def settle(self, *, committed: bool) -> None:
        """Once: what went with a savepoint is not committed with the root."""
        if self.committed is None:
            self.committed, self.savepoints = committed, ()


@dataclass(slots=True, eq=False)
class _Ledger:
    """Of one root transaction. In Session.info, so that it lives and dies with the session."""

    entries: list[_Entry] = field(default_factory=list)
    checked: list[Outbox] = field(default_factory=list)
    released: set[SessionTransaction] = field(default_factory=set)
    fates: list[Fate] = field(default_factory=list)
    """Of events whose recorder wants to know."""
    releasing: SessionTransaction | None = None
    """The savepoint that was the innermost one at the last before_commit."""
    closing: bool = False
    """The root's before_commit is through: what is added now is written at once."""


_LEDGER = "outbox.ledger"


def _ledger_of(session: Session) -> _Ledger:
    ledger: _Ledger | None = session.info.get(_LEDGER)
    if ledger is None:
        ledger = session.info[_LEDGER] = _Ledger()
    return ledger


def _open_savepoints(session: Session) -> tuple[SessionTransaction, ...]:
    found = []
    transaction = session.get_nested_transaction()
    while transaction is not None:
        if transaction.nested:
            found.append(transaction)
        transaction = transaction.parent
    return tuple(found)


def put(
    session: Session,
    outbox: Outbox,
    messages: Sequence[Message],
    where: Origin | None,
    fate: Fate | None = None,
) -> None:
    """Messages of this Outbox into the session's transaction: what `Outbox.add` does once they are encoded.

    `fate` is settled when the transaction, or a savepoint that they depend on, has ended.
    """
    join(session)
    ledger = _ledger_of(session)
    if outbox not in ledger.checked:
        outbox._check(session)  # noqa: SLF001 - the ledger is the other half of Outbox
        ledger.checked.append(outbox)
    savepoints = _open_savepoints(session)
    before = len(ledger.entries)
    if messages:
        ledger.entries.append(_Entry(outbox, messages, savepoints, where))
    if fate is not None:
        fate.savepoints = savepoints
        ledger.fates.append(fate)
    if ledger.closing:
        _write_late(session, ledger, before)


def unwritten(session: Session) -> list[Message]:
    """What was put into the session's transaction and waits for its INSERT, in order."""
    ledger: _Ledger | None = session.info.get(_LEDGER)
    return [] if ledger is None else [message for entry in ledger.entries for message in entry.messages]


def _write_entries(session: Session, ledger: _Ledger) -> None:
    """One INSERT (more where several Outbox objects take turns). Keeps the entries when it fails."""
    for outbox, group in groupby(ledger.entries, key=attrgetter("outbox")):
        entries = list(group)
        if outbox.warn_unlocked:
            outbox._warn(session, entries)  # noqa: SLF001 - the ledger is the other half of Outbox
        messages = [message for entry in entries for message in entry.messages]
        outbox._write(outbox._connection(session), messages)  # noqa: SLF001 - the same
    ledger.entries.clear()


def _write_late(session: Session, ledger: _Ledger, before: int) -> None:
    """For a before_commit listener that runs after ours: flush what it changed, then write what it added.

    Not inside a flush that comes so late: before_flush and after_flush cannot be told apart, and a seq taken before the
    aggregate's UPDATE would void the order of its key. Refused, then.
    """
    try:
        session.flush()
        _write_entries(session, ledger)
    except sa.exc.InvalidRequestError as error:  # prepared, already flushing, or outside of the commit under asyncio
        del ledger.entries[before:]
        raise TransactionError(
            "the session has written its events already, for a commit that was prepared or failed half-way:"
            f" call rollback(), or add the event before the commit ({error})"
        ) from error


# --- Hooks: once, for every Session; one without events pays a look into its `info` and a flush that comes anyway ---


_HOOKING = Lock()

MAX_FLUSHES = 100
"""Of one commit, as in SQLAlchemy itself: more means that a flush hook makes work for itself."""


def _hook_sessions() -> None:
    # On the base class, not on the class of each session: a sessionmaker makes a class of its own every time, and a
    # base hooked after its subclass would call twice.
    with _HOOKING:
        if not event.contains(Session, "before_commit", _before_commit):
            event.listen(Session, "before_commit", _before_commit)
            event.listen(Session, "after_commit", _after_commit)
            event.listen(Session, "after_transaction_end", _after_transaction_end)


def _before_commit(session: Session) -> None:
    """Fires for the root and for each savepoint's release, before SQLAlchemy's own last flush."""
    ledger = _ledger_of(session)
    savepoint = session.get_nested_transaction()
    if savepoint is not None:
        _before_release(session, ledger, savepoint)
        return
    for _ in range(MAX_FLUSHES):
        session.flush()  # its hooks may add events
        if not ledger.entries:
            break
        _write_entries(session, ledger)
    else:
        raise TransactionError(f"each of {MAX_FLUSHES} flushes of one commit added events: a flush hook feeds itself")
    ledger.closing = True


def _before_release(session: Session, ledger: _Ledger, savepoint: SessionTransaction) -> None:
    """A release says so once. Twice for one savepoint: the root commits over it, and said so before its child did."""
    if ledger.releasing is not savepoint:
        ledger.releasing = savepoint
        return
    session.flush()  # its hooks may add events
    if ledger.entries:
        raise TransactionError(
            "the transaction commits while a savepoint (begin_nested) is open, and its events would be lost:"
            " commit or roll back the savepoint first, best with `with session.begin_nested():`"
        )
    ledger.closing = True


def _after_commit(session: Session) -> None:
    ledger: _Ledger | None = session.info.get(_LEDGER)
    if ledger is None:
        return
    savepoint = session.get_nested_transaction()
    if savepoint is not None:
        ledger.released.add(savepoint)
        return
    if ledger.entries:  # no way here is known; if there is one, it must not pass in silence
        lost = sum(len(entry.messages) for entry in ledger.entries)
        raise TransactionError(f"committed without {lost} events: was Outbox made inside the commit?")
    for fate in ledger.fates:
        fate.settle(committed=True)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    """However it ended. A savepoint that was not released takes its events along; the root takes the ledger."""
    ledger: _Ledger | None = session.info.get(_LEDGER)
    if ledger is None:
        return
    if transaction.parent is None:
        del session.info[_LEDGER]
        for fate in ledger.fates:
            fate.settle(committed=False)
    elif transaction.nested:
        if transaction in ledger.released:
            ledger.released.remove(transaction)
        else:
            ledger.entries = [entry for entry in ledger.entries if transaction not in entry.savepoints]
            for fate in ledger.fates:
                if transaction in fate.savepoints:
                    fate.settle(committed=False)
        ledger.releasing = None
