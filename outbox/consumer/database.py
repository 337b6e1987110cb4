"""One transaction in the user's database: through an AsyncEngine in the loop, through an Engine in a thread."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

T = TypeVar("T")

Work = Callable[[Session, "Session | AsyncSession"], T]
"""What is done in a transaction. The second one is what a handler is given: the first, or what wraps it."""


class Database(Protocol):
    """Where effects go."""

    async def do(self, work: Work[T]) -> T:
        """Do this on a new session; what `work` does not commit is rolled back."""
        ...

    def close(self) -> None:
        """Let go of the threads. The engine is the user's."""
        ...


class AsyncDatabase:
    """For `async def` handlers."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def do(self, work: Work[T]) -> T:
        def closed(inner: Session, outer: AsyncSession) -> T:
            done = work(inner, outer)
            inner.close()  # here: `async with` would make a task and a greenlet for it, a twentieth of a message's CPU
            return done

        session = self._sessions()
        try:
            return await session.run_sync(closed, session)
        except BaseException:
            await asyncio.shield(asyncio.create_task(session.close()))
            raise

    def close(self) -> None:
        pass


class ThreadedDatabase:
    """For `def` handlers: each transaction, its handlers included, runs in a thread of its own."""

    def __init__(self, engine: sa.Engine, threads: int) -> None:
        self._sessions = sessionmaker(engine, expire_on_commit=False)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="outbox-consumer")

    async def do(self, work: Work[T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._do, work)

    def _do(self, work: Work[T]) -> T:
        with self._sessions() as session:
            return work(session, session)

    def close(self) -> None:
        self._pool.shutdown(wait=False)


_AWAY = ("08", "53")
"""SQLSTATE classes: connection exception, insufficient resources."""

_PASSING = ("57P01", "57P02", "57P03", "57P05", "40001", "40P01", "25006")
"""Shutdown, crash, starting up, idle session ended; serialization failure, deadlock; a standby before its promotion."""


def is_mistake(error: BaseException) -> bool:
    """Whether the database refuses the statement itself (SQLSTATE class 42: no such table or column, no privilege).

    No other message would fare better: to park them all would only hide it.
    """
    return _state(error).startswith("42")


def is_trouble(error: BaseException, *, in_handler: bool) -> bool:
    """Whether the database is in the way, not the message: then nothing is counted, and it is tried until it works.

    `in_handler`: an OSError or a timeout may be that of another server which the handler asks.
    """
    state = _state(error)
    if state.startswith(_AWAY) or state in _PASSING:
        return True
    if isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated:
        return True
    kinds: tuple[type[Any], ...] = (OSError, sa.exc.TimeoutError, sa.exc.InterfaceError, sa.exc.OperationalError)
    return not in_handler and isinstance(error, kinds)


def _state(error: BaseException) -> str:
    original = getattr(error, "orig", None) or error
    return str(getattr(original, "sqlstate", None) or "")
