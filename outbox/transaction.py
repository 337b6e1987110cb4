"""The caller's transaction, which writer and inbox join and never open or end: found, or refused with a reason.

Nothing here does I/O, so that a mistake is said at the call that made it, also under asyncio.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from outbox.errors import TransactionError
from outbox.tables import missing_tables

if TYPE_CHECKING:
    import psycopg

AnySession = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]
"""What carries a transaction in SQLAlchemy's ORM; under asyncio each wraps a Session."""

_IDLE = 0  # psycopg.pq.TransactionStatus, libpq's PQTRANS_IDLE
_TABLES_MISSING = ("42P01", "42703", "3F000")  # SQLSTATE: undefined table, undefined column, invalid schema name


def session_of(session: AnySession) -> Session:
    """The Session at the bottom of it. TransactionError where there is none."""
    found: Any = session() if isinstance(session, scoped_session | async_scoped_session) else session
    found = found.sync_session if isinstance(found, AsyncSession) else found
    if not isinstance(found, Session):
        raise TransactionError(
            f"{type(session).__name__} is no Session or AsyncSession of SQLAlchemy: for a Core connection execute"
            " Outbox.insert(...), for asyncpg or psycopg use Outbox.add_asyncpg(...) or add_psycopg(...)"
        )
    return found


def join(session: Session) -> None:
    """Make sure that the session has a live transaction; begins one as the session's own first statement would.

    Raises TransactionError where none can be: a session closed for good, one that does not begin by itself, one whose
    transaction has failed.
    """
    if not session.in_transaction():
        if not session.autobegin:
            raise TransactionError("the session has autobegin=False and no transaction: call begin() before add()")
        try:
            session.begin()
        except sa.exc.InvalidRequestError as error:  # what SQLAlchemy says after close() with close_resets_only=False
            raise TransactionError(f"the session takes no more transactions, open a new one: {error}") from error
    if not session.is_active:
        raise TransactionError(
            "the session's transaction takes no more events, for it has failed or is prepared: call rollback() first"
        )


def bind_of(session: Session, clause: sa.ClauseElement) -> sa.Engine | sa.Connection:
    """Where the session would execute this; TransactionError where it would not know."""
    try:
        return session.get_bind(clause=clause)
    except sa.exc.UnboundExecutionError as error:
        raise TransactionError(
            f"the session does not know which database holds the outbox ({error}): give it `bind`, or the table"
            " Outbox.table in `binds`"
        ) from error


def refuse_autocommit_bind(bind: sa.Engine | sa.Connection) -> None:
    """TransactionError, as far as it can be known before there is a connection."""
    level = bind.get_execution_options().get("isolation_level")
    if level is None:
        # create_engine(isolation_level=…) is kept nowhere else; without the attribute the check at the write remains
        level = getattr(bind.dialect, "_on_connect_isolation_level", None)
    if level == "AUTOCOMMIT":
        raise _autocommit()


def refuse_autocommit(connection: sa.Connection) -> None:
    """TransactionError when the driver's connection commits each statement by itself."""
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise _autocommit()


def refuse_autocommit_psycopg(connection: "psycopg.Connection[Any] | psycopg.AsyncConnection[Any]") -> None:
    """TransactionError when a bare connection of psycopg's commits each statement, and no transaction() is open."""
    if connection.autocommit and connection.info.transaction_status == _IDLE:
        raise TransactionError(
            "the psycopg connection is in autocommit and in no transaction, so data and events could be committed one"
            " without the other: call it inside `with connection.transaction():`"
        )


def _autocommit() -> TransactionError:
    return TransactionError(
        "the connection is in AUTOCOMMIT, so there is no transaction that data and events could share: use an engine"
        " or connection with another isolation level"
    )


@contextmanager
def explained(schema: str) -> Iterator[None]:
    """Turns the driver's "relation does not exist" into a MigrationError that names the command."""
    try:
        yield
    except Exception as error:
        if getattr(getattr(error, "orig", error), "sqlstate", None) in _TABLES_MISSING:
            raise missing_tables(schema) from error
        raise
