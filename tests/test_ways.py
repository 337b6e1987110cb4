"""Every way in keeps the same promises: with the caller's rows or not at all, in the order of the calls."""

# ruff: noqa: PT012 - what raises is the end of a block, the commit of its context manager

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from uuid import uuid4

import asyncpg
import psycopg
import pytest
import sqlalchemy as sa
from psycopg import sql
from psycopg.rows import dict_row
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from outbox.catalogue import Catalogue
from outbox.errors import InvalidEvent, MigrationError, TransactionError
from outbox.message import Event
from outbox.migrate import migrate
from outbox.writer import Outbox
from tests.roles import OWNER, ROLES, as_role
from tests.servers import Postgres

CATALOGUE = Catalogue(
    [
        {
            "type": "record",
            "name": "Thing",
            "namespace": "test",
            "topic": "things",
            "key": "thing",
            "fields": [{"name": "thing", "type": "string"}, {"name": "size", "type": "int", "default": 0}],
        }
    ]
)
OUTBOX = Outbox(CATALOGUE)
# Its conflict comes at the COMMIT.
TABLE = "CREATE TABLE uniq (u int UNIQUE DEFERRABLE INITIALLY DEFERRED)"


def thing(name: str) -> Event:
    return Event("test.Thing", {"thing": name})


class Open(ABC):
    """A transaction that is open: rows of the service's own, and events."""

    outbox = OUTBOX

    @abstractmethod
    async def row(self, number: int) -> None: ...

    @abstractmethod
    async def add(self, *events: Event) -> Any: ...

    @abstractmethod
    def savepoint(self) -> AbstractAsyncContextManager[Any]: ...


class OfSession(Open):
    def __init__(self, session: Session | scoped_session[Session]) -> None:
        self.session = session

    async def row(self, number: int) -> None:
        self.session.execute(sa.text(f"INSERT INTO uniq VALUES ({number})"))

    async def add(self, *events: Event) -> Any:
        return self.outbox.add(self.session, *events)

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        with self.session.begin_nested():
            yield


class OfAsyncSession(Open):
    def __init__(self, session: AsyncSession | async_scoped_session[AsyncSession]) -> None:
        self.session = session

    async def row(self, number: int) -> None:
        await self.session.execute(sa.text(f"INSERT INTO uniq VALUES ({number})"))

    async def add(self, *events: Event) -> Any:
        return self.outbox.add(self.session, *events)

    def savepoint(self) -> AbstractAsyncContextManager[Any]:
        return self.session.begin_nested()


class OfConnection(Open):
    def __init__(self, connection: sa.Connection) -> None:
        self.connection = connection

    async def row(self, number: int) -> None:
        self.connection.execute(sa.text(f"INSERT INTO uniq VALUES ({number})"))

    async def add(self, *events: Event) -> Any:
        return self.connection.execute(self.outbox.insert(*events))

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        with self.connection.begin_nested():
            yield


class OfAsyncConnection(Open):
    def __init__(self, connection: AsyncConnection) -> None:
        self.connection = connection

    async def row(self, number: int) -> None:
        await self.connection.execute(sa.text(f"INSERT INTO uniq VALUES ({number})"))

    async def add(self, *events: Event) -> Any:
        return await self.connection.execute(self.outbox.insert(*events))

    def savepoint(self) -> AbstractAsyncContextManager[Any]:
        return self.connection.begin_nested()


class OfAsyncpg(Open):
    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        self.connection = connection

    async def row(self, number: int) -> None:
        await self.connection.execute("INSERT INTO uniq VALUES ($1)", number)

    async def add(self, *events: Event) -> Any:
        return await self.outbox.add_asyncpg(self.connection, *events)

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:  # asyncpg's own does not nest in a BEGIN that was executed
        await self.connection.execute("SAVEPOINT one")
        try:
            yield
        except BaseException:
            await self.connection.execute("ROLLBACK TO one")
            raise
        await self.connection.execute("RELEASE one")


class OfPsycopg(Open):
    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection

    async def row(self, number: int) -> None:
        self.connection.execute("INSERT INTO uniq VALUES (%s)", (number,))

    async def add(self, *events: Event) -> Any:
        return self.outbox.add_psycopg(self.connection, *events)

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        with self.connection.transaction():
            yield


class OfAsyncPsycopg(Open):
    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self.connection = connection

    async def row(self, number: int) -> None:
        await self.connection.execute("INSERT INTO uniq VALUES (%s)", (number,))

    async def add(self, *events: Event) -> Any:
        return await self.outbox.add_psycopg_async(self.connection, *events)

    def savepoint(self) -> AbstractAsyncContextManager[Any]:
        return self.connection.transaction()


Way = Callable[[str], AbstractAsyncContextManager[Open]]
"""Opens a transaction on a database; it commits at the end of the block, or rolls back by an exception."""


def sync_engine(url: str) -> sa.Engine:
    return sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)


def async_engine(url: str, driver: str) -> Any:
    return create_async_engine(url.replace("postgresql://", f"postgresql+{driver}://"), poolclass=sa.NullPool)


@asynccontextmanager
async def session_begin(url: str) -> AsyncIterator[Open]:
    with Session(sync_engine(url)) as session, session.begin():
        yield OfSession(session)


@asynccontextmanager
async def session_commit(url: str) -> AsyncIterator[Open]:
    with Session(sync_engine(url)) as session:
        yield OfSession(session)
        session.commit()


@asynccontextmanager
async def sessionmaker_begin(url: str) -> AsyncIterator[Open]:
    with sessionmaker(sync_engine(url)).begin() as session:
        yield OfSession(session)


@asynccontextmanager
async def scoped(url: str) -> AsyncIterator[Open]:
    session = scoped_session(sessionmaker(sync_engine(url)))
    try:
        yield OfSession(session)
        session.commit()
    finally:
        session.remove()


@asynccontextmanager
async def async_session_asyncpg(url: str) -> AsyncIterator[Open]:
    async with AsyncSession(async_engine(url, "asyncpg")) as session, session.begin():
        yield OfAsyncSession(session)


@asynccontextmanager
async def async_sessionmaker_psycopg(url: str) -> AsyncIterator[Open]:
    async with async_sessionmaker(async_engine(url, "psycopg")).begin() as session:
        yield OfAsyncSession(session)


@asynccontextmanager
async def async_scoped(url: str) -> AsyncIterator[Open]:
    session = async_scoped_session(async_sessionmaker(async_engine(url, "asyncpg")), scopefunc=lambda: "one")
    try:
        yield OfAsyncSession(session)
        await session.commit()
    finally:
        await session.remove()


@asynccontextmanager
async def core(url: str) -> AsyncIterator[Open]:
    with sync_engine(url).begin() as connection:
        yield OfConnection(connection)


@asynccontextmanager
async def async_core_asyncpg(url: str) -> AsyncIterator[Open]:
    async with async_engine(url, "asyncpg").begin() as connection:
        yield OfAsyncConnection(connection)


@asynccontextmanager
async def async_core_psycopg(url: str) -> AsyncIterator[Open]:
    async with async_engine(url, "psycopg").begin() as connection:
        yield OfAsyncConnection(connection)


@asynccontextmanager
async def bare_asyncpg(url: str) -> AsyncIterator[Open]:
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            yield OfAsyncpg(connection)
    finally:
        await connection.close()


@asynccontextmanager
async def bare_psycopg(url: str) -> AsyncIterator[Open]:
    with contextlib.closing(psycopg.connect(url)) as connection:
        yield OfPsycopg(connection)
        connection.commit()


@asynccontextmanager
async def bare_psycopg_in_autocommit(url: str) -> AsyncIterator[Open]:
    with contextlib.closing(psycopg.connect(url, autocommit=True)) as connection, connection.transaction():
        yield OfPsycopg(connection)


@asynccontextmanager
async def bare_async_psycopg(url: str) -> AsyncIterator[Open]:
    connection = await psycopg.AsyncConnection.connect(url)
    try:
        yield OfAsyncPsycopg(connection)
        await connection.commit()
    finally:
        await connection.close()


@asynccontextmanager
async def session_twophase(url: str) -> AsyncIterator[Open]:
    with sessionmaker(sync_engine(url), twophase=True).begin() as session:
        yield OfSession(session)


@asynccontextmanager
async def async_session_twophase(url: str) -> AsyncIterator[Open]:
    async with async_sessionmaker(async_engine(url, "asyncpg"), twophase=True).begin() as session:
        yield OfAsyncSession(session)


@asynccontextmanager
async def core_twophase(url: str) -> AsyncIterator[Open]:
    with sync_engine(url).connect() as connection, connection.begin_twophase() as transaction:
        yield OfConnection(connection)
        transaction.prepare()


@asynccontextmanager
async def bare_psycopg_twophase(url: str) -> AsyncIterator[Open]:
    with contextlib.closing(psycopg.connect(url)) as connection:  # an exception ends the connection
        connection.tpc_begin("of psycopg")
        yield OfPsycopg(connection)
        connection.tpc_prepare()
        connection.tpc_commit()


@asynccontextmanager
async def bare_asyncpg_twophase(url: str) -> AsyncIterator[Open]:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("BEGIN")
        yield OfAsyncpg(connection)
        await connection.execute("PREPARE TRANSACTION 'of asyncpg'")
        await connection.execute("COMMIT PREPARED 'of asyncpg'")
    finally:
        await connection.close()


WAYS: Sequence[Way] = (
    session_begin,
    session_commit,
    sessionmaker_begin,
    scoped,
    async_session_asyncpg,
    async_sessionmaker_psycopg,
    async_scoped,
    core,
    async_core_asyncpg,
    async_core_psycopg,
    bare_asyncpg,
    bare_psycopg,
    bare_psycopg_in_autocommit,
    bare_async_psycopg,
    session_twophase,
    async_session_twophase,
    core_twophase,
    bare_psycopg_twophase,
    bare_asyncpg_twophase,
)

# SQLAlchemy on psycopg tries to roll back what could not be prepared, and says that nothing is prepared.
CONFLICT = (
    sa.exc.IntegrityError,
    sa.exc.ProgrammingError,
    asyncpg.UniqueViolationError,
    psycopg.errors.UniqueViolation,
)


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request: pytest.FixtureRequest) -> Way:
    found: Way = request.param
    return found


@pytest.fixture(scope="module")
def site(postgres: Postgres, template: Callable[[int], str]) -> Iterator[str]:
    """One database for all of this, which is many small tests."""
    name = f"ways_{uuid4().hex[:12]}"
    url = postgres.create_database(name, template(1))
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(TABLE)
        connection.execute(sql.SQL("GRANT ALL ON uniq TO {}").format(sql.Identifier(ROLES.writer)))
    yield url
    postgres.drop_database(name)


@pytest.fixture
def url(site: str) -> str:
    """In the role of a writer, which may do nothing with the outbox but INSERT."""
    with psycopg.connect(site, autocommit=True) as connection:
        connection.execute("TRUNCATE outbox.outbox, outbox.avro_schema, uniq")
    return as_role(site, ROLES.writer)


def there(url: str) -> tuple[list[str], list[int]]:
    """What an independent reader sees: keys in the order of seq, and the service's own rows."""
    with psycopg.connect(as_role(url, OWNER)) as connection:
        keys = connection.execute("SELECT key FROM outbox.outbox ORDER BY seq").fetchall()
        rows = connection.execute("SELECT u FROM uniq ORDER BY u").fetchall()
    return [key for (key,) in keys], [number for (number,) in rows]


async def test_events_are_committed_with_the_rows_in_the_order_of_the_calls(way: Way, url: str) -> None:
    async with way(url) as transaction:
        await transaction.add(thing("1"))
        await transaction.row(7)
        await transaction.add(thing("2"), thing("3"))
        await transaction.add()
    assert there(url) == (["1", "2", "3"], [7])
    with psycopg.connect(as_role(url, OWNER), row_factory=dict_row) as connection:
        (schema,) = connection.execute("SELECT fingerprint, subject, schema FROM outbox.avro_schema").fetchall()
    fingerprint = CATALOGUE.fingerprints[0]
    assert schema == {
        "fingerprint": fingerprint,
        "subject": "things-value",
        "schema": CATALOGUE.schema_json(fingerprint),
    }


async def test_an_exception_takes_rows_and_events_back(way: Way, url: str) -> None:
    with pytest.raises(KeyError):
        async with way(url) as transaction:
            await transaction.row(7)
            await transaction.add(thing("1"))
            raise KeyError
    assert there(url) == ([], [])


async def test_a_savepoint_takes_its_own_events_only(way: Way, url: str) -> None:
    async with way(url) as transaction:
        await transaction.add(thing("1"))
        with contextlib.suppress(KeyError):
            async with transaction.savepoint():
                await transaction.row(7)
                await transaction.add(thing("lost"))
                async with transaction.savepoint():
                    await transaction.add(thing("lost too"))
                raise KeyError
        async with transaction.savepoint():
            await transaction.row(8)
            await transaction.add(thing("2"))
        await transaction.add(thing("3"))
    assert there(url) == (["1", "2", "3"], [8])


async def test_a_failed_commit_is_tried_again(way: Way, url: str) -> None:
    async def attempt(*numbers: int) -> None:
        async with way(url) as transaction:
            for number in numbers:
                await transaction.row(number)
            await transaction.add(thing(f"try {numbers}"))

    with pytest.raises(CONFLICT):
        await attempt(1, 1)
    assert there(url) == ([], [])
    await attempt(1, 2)
    assert there(url) == (["try (1, 2)"], [1, 2])


async def test_ten_thousand_events_of_one_transaction_keep_their_order(way: Way, url: str) -> None:
    names = [str(number) for number in range(10_000)]
    async with way(url) as transaction:
        await transaction.add(*map(thing, names))
    assert there(url) == (names, [])


async def test_a_bad_event_is_refused_at_the_call_and_the_transaction_goes_on(way: Way, url: str) -> None:
    async with way(url) as transaction:
        with pytest.raises(InvalidEvent):
            await transaction.add(thing("1"), Event("test.Thing", {"thing": "2", "size": 2**31}))
        await transaction.add(thing("3"))
    assert there(url) == (["3"], [])


HARD = "ä\"\\'\n{},\t€"


async def test_the_row_is_the_message(way: Way, url: str) -> None:
    """Alone, which is VALUES, and as one of two, which are arrays; what PostgreSQL's array syntax has a meaning for."""
    event = Event("test.Thing", {"thing": HARD}, key=HARD, headers={"h": HARD, "NULL": "NULL"})
    async with way(url) as transaction:
        await transaction.add(event)
        await transaction.add(event, Event("test.Thing", {"thing": "NULL"}, topic="own"))
    with psycopg.connect(as_role(url, OWNER)) as connection:
        query = "SELECT type, topic, key, value, fingerprint, headers FROM outbox.outbox ORDER BY seq"
        found = connection.execute(query).fetchall()
    expected = CATALOGUE.encode(event)
    first = ("test.Thing", "things", HARD, expected.value, expected.fingerprint, {"h": HARD, "NULL": "NULL"})
    assert found[:2] == [first, first]
    assert found[2] == ("test.Thing", "own", "NULL", b"\x08NULL\x00", expected.fingerprint, None)


async def test_a_sql_schema_of_any_name(database: str) -> None:
    odd = "o'\"x%s {} $1"
    migrate(database, schema=odd)
    outbox = Outbox(CATALOGUE, schema=odd)
    with Session(sync_engine(database)) as session, session.begin():
        outbox.add(session, thing("1"))
        session.execute(outbox.insert(thing("2"), thing("3")))
    async with async_engine(database, "asyncpg").begin() as awaited:
        await awaited.execute(outbox.insert(thing("4")))
    with psycopg.connect(database) as connection:
        outbox.add_psycopg(connection, thing("5"))
        query = sql.SQL("SELECT key FROM {}.outbox ORDER BY seq").format(sql.Identifier(odd))
        assert [key for (key,) in connection.execute(query)] == ["2", "3", "1", "4", "5"]


# --- Bare psycopg ---


def test_psycopg_in_autocommit_is_refused_outside_of_a_transaction(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        with pytest.raises(TransactionError, match=r"with connection\.transaction"):
            OUTBOX.add_psycopg(connection, thing("1"))
        with connection.pipeline(), connection.transaction():
            OUTBOX.add_psycopg(connection, thing("2"))
    assert there(url) == (["2"], [])


async def test_async_psycopg_in_autocommit_is_refused_too(url: str) -> None:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        with pytest.raises(TransactionError, match=r"with connection\.transaction"):
            await OUTBOX.add_psycopg_async(connection, thing("1"))
        async with connection.pipeline(), connection.transaction():
            await OUTBOX.add_psycopg_async(connection, thing("2"))
    assert there(url) == (["2"], [])


async def test_psycopg_with_cursors_of_the_services_own(url: str) -> None:
    """Its row factory and its cursor class are of no account: RawCursor has other placeholders."""
    with psycopg.connect(url, row_factory=dict_row, cursor_factory=psycopg.RawCursor) as connection:
        OUTBOX.add_psycopg(connection, thing("1"), thing("2"))
    assert there(url) == (["1", "2"], [])


async def test_missing_tables_are_a_migration_error_for_psycopg_too(url: str) -> None:
    nowhere = Outbox(CATALOGUE, schema="nowhere")
    with psycopg.connect(url) as connection, pytest.raises(MigrationError, match="--schema nowhere"):
        nowhere.add_psycopg(connection, thing("1"))
    async with await psycopg.AsyncConnection.connect(url) as awaited:
        with pytest.raises(MigrationError, match="--schema nowhere"):
            await nowhere.add_psycopg_async(awaited, thing("1"))
