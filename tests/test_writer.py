"""Events are committed with the caller's data or not at all, in the order of add(), through every kind of session."""

# ruff: noqa: PT012 - what raises is the end of a block, the commit of its context manager

import contextlib
import gc
import json
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from outbox import writer
from outbox.catalogue import Catalogue
from outbox.errors import EventTooLarge, InvalidEvent, MigrationError, TransactionError, UnknownEventType
from outbox.message import Event
from outbox.writer import Outbox
from tests.roles import OWNER, ROLES, as_role

SCHEMA = {
    "type": "record",
    "name": "Thing",
    "namespace": "test",
    "topic": "things",
    "key": "thing",
    "fields": [{"name": "thing", "type": "string"}],
}
OTHER = SCHEMA | {"name": "Other", "topic": "others"}


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str]


class Uniq(Base):
    """Its conflict comes at the COMMIT, after every flush."""

    __tablename__ = "uniq"
    __table_args__ = (sa.UniqueConstraint("u", deferrable=True, initially="DEFERRED"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    u: Mapped[int]


def thing(name: str, **options: Any) -> Event:
    return Event("test.Thing", {"thing": name}, **options)


def other(name: str) -> Event:
    return Event("test.Other", {"thing": name})


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    folder = tmp_path_factory.mktemp("schemas")
    for schema in (SCHEMA, OTHER):
        (folder / f"{schema['name']}.avsc").write_text(json.dumps(schema))
    return Catalogue.from_folder(folder)


@pytest.fixture
def outbox(catalogue: Catalogue) -> Outbox:
    return Outbox(catalogue)


@pytest.fixture
def database(database: str) -> str:
    """All of this runs in the writer's role: it can INSERT into the outbox and into avro_schema, and nothing else."""
    return as_role(database, ROLES.writer)


@contextmanager
def owner(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction of who owns the tables."""
    with sa.create_engine(engine.url.set(username=OWNER), poolclass=sa.NullPool).begin() as connection:
        yield connection


@pytest.fixture
def engine(database: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(database.replace("postgresql://", "postgresql+psycopg://"))
    with owner(engine) as connection:
        Base.metadata.create_all(connection)
        for kind in ("TABLES", "SEQUENCES"):
            connection.execute(sa.text(f"GRANT ALL ON ALL {kind} IN SCHEMA public TO {ROLES.writer}"))
    yield engine
    engine.dispose()


@pytest.fixture
async def async_engine(database: str, engine: sa.Engine) -> AsyncIterator[AsyncEngine]:
    async_engine = create_async_engine(database.replace("postgresql://", "postgresql+asyncpg://"))
    yield async_engine
    await async_engine.dispose()


def keys(engine: sa.Engine) -> list[str | None]:
    """What an independent reader sees, in the order of seq."""
    with owner(engine) as connection:
        return list(connection.scalars(sa.text("SELECT key FROM outbox.outbox ORDER BY seq")))


def schemas_there(engine: sa.Engine) -> list[str]:
    with owner(engine) as connection:
        return list(connection.scalars(sa.text("SELECT subject FROM outbox.avro_schema ORDER BY subject")))


# --- The 21 cases, each on Session with psycopg and on AsyncSession with asyncpg ---


class Savepoint:
    """begin_nested() of a Session with the manners of AsyncSession: awaited, or entered with `async with`."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __await__(self) -> Any:
        self.transaction = self.session.begin_nested()
        return self._self().__await__()

    async def _self(self) -> "Savepoint":
        return self

    async def __aenter__(self) -> "Savepoint":
        self.transaction = self.session.begin_nested()
        self.transaction.__enter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        self.transaction.__exit__(*error)

    async def commit(self) -> None:
        self.transaction.commit()

    async def rollback(self) -> None:
        self.transaction.rollback()

    async def close(self) -> None:
        self.transaction.close()


class Calm:
    """A Session whose methods are awaited, so that one body of a case runs on both kinds."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.sync_session = session

    def add(self, row: Any) -> None:
        self.session.add(row)

    def begin_nested(self) -> Savepoint:
        return Savepoint(self.session)

    def expunge_all(self) -> None:
        self.session.expunge_all()

    async def commit(self) -> None:
        self.session.commit()

    async def rollback(self) -> None:
        self.session.rollback()

    async def flush(self) -> None:
        self.session.flush()

    async def execute(self, *args: Any) -> Any:
        return self.session.execute(*args)

    async def close(self) -> None:
        self.session.close()


@dataclass
class Ground:
    """What a case stands on."""

    outbox: Outbox
    engine: sa.Engine
    async_engine: AsyncEngine | None

    @asynccontextmanager
    async def session(self, **options: Any) -> AsyncIterator[Any]:
        """`with Session(…)`: closed at the end, nothing more."""
        if self.async_engine is not None:
            async with AsyncSession(self.async_engine, **options) as session:
                yield session
        else:
            with Session(self.engine, **options) as session:
                yield Calm(session)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[Any]:
        """`with sessionmaker.begin()`: committed at the end, rolled back by an exception."""
        if self.async_engine is not None:
            async with async_sessionmaker(self.async_engine).begin() as session:
                yield session
        else:
            with sessionmaker(self.engine).begin() as session:
                yield Calm(session)

    def emit(self, session: Any, *names: str) -> None:
        target = session.session if isinstance(session, Calm) else session
        self.outbox.add(target, *map(thing, names))


@pytest.fixture(params=["psycopg, Session", "asyncpg, AsyncSession"])
def ground(request: pytest.FixtureRequest, outbox: Outbox, engine: sa.Engine, async_engine: AsyncEngine) -> Ground:
    return Ground(outbox, engine, async_engine if request.param.startswith("asyncpg") else None)


async def case_events_and_rows(g: Ground) -> list[str]:
    async with g.begin() as s:
        s.add(Order(note="a"))
        g.emit(s, "1")
        g.emit(s, "2")
    return ["1", "2"]


async def case_rollback(g: Ground) -> list[str]:
    async with g.session() as s:
        s.add(Order(note="a"))
        g.emit(s, "1")
        await s.rollback()
        await s.commit()
    return []


async def case_only_events(g: Ground) -> list[str]:
    async with g.begin() as s:
        g.emit(s, "1")
    return ["1"]


async def case_events_beside_core_statements(g: Ground) -> list[str]:
    async with g.begin() as s:
        await s.execute(sa.insert(Order), {"note": "z"})
        g.emit(s, "1")
    return ["1"]


async def case_savepoint_released(g: Ground) -> list[str]:
    async with g.begin() as s:
        g.emit(s, "1")
        async with s.begin_nested():
            s.add(Order(note="n"))
            g.emit(s, "2")
        g.emit(s, "3")
    return ["1", "2", "3"]


async def case_savepoint_rolled_back(g: Ground) -> list[str]:
    async with g.begin() as s:
        g.emit(s, "1")
        savepoint = await s.begin_nested()
        g.emit(s, "2")
        await s.flush()
        await savepoint.rollback()
        g.emit(s, "3")
    return ["1", "3"]


async def case_savepoint_rolled_back_by_an_exception(g: Ground) -> list[str]:
    async with g.begin() as s:
        g.emit(s, "1")
        with pytest.raises(ValueError, match="no"):
            async with s.begin_nested():
                g.emit(s, "2")
                raise ValueError("no")
        g.emit(s, "3")
    return ["1", "3"]


async def case_released_inner_savepoint_in_a_rolled_back_outer_one(g: Ground) -> list[str]:
    async with g.begin() as s:
        g.emit(s, "0")
        savepoint = await s.begin_nested()
        g.emit(s, "1")
        async with s.begin_nested():
            g.emit(s, "2")
        g.emit(s, "2b")
        await savepoint.rollback()
        g.emit(s, "3")
    return ["0", "3"]


async def case_event_of_a_flush_hook(g: Ground) -> list[str]:
    async with g.session() as s:

        @event.listens_for(s.sync_session, "after_flush")
        def after_flush(session: Session, _context: Any) -> None:
            if any(isinstance(row, Order) for row in session.new):
                g.emit(session, "hook")

        s.add(Order(note="q"))
        await s.commit()
    return ["hook"]


async def case_root_commit_over_an_open_savepoint_is_refused(g: Ground) -> list[str]:
    with pytest.raises(TransactionError, match=r"a savepoint .* is open"):
        async with g.begin() as s:
            g.emit(s, "1")
            await s.begin_nested()
            g.emit(s, "2")
    return []


async def case_session_commit_releases_an_open_savepoint(g: Ground) -> list[str]:
    async with g.session() as s:
        g.emit(s, "1")
        await s.begin_nested()
        g.emit(s, "2")
        await s.commit()
    return ["1", "2"]


async def case_closed_and_used_again(g: Ground) -> list[str]:
    async with g.session() as s:
        g.emit(s, "1")
        await s.close()
        s.add(Order(note="r"))
        await s.commit()
    return []


async def case_exception(g: Ground) -> list[str]:
    with pytest.raises(KeyError):
        async with g.begin() as s:
            s.add(Order(note="a"))
            g.emit(s, "1")
            raise KeyError
    return []


async def case_failed_commit_and_another_try(g: Ground) -> list[str]:
    async with g.session() as s:
        s.add(Uniq(u=1))
        s.add(Uniq(u=1))
        g.emit(s, "1")
        with pytest.raises(sa.exc.IntegrityError):
            await s.commit()
        await s.rollback()
        s.add(Uniq(u=2))
        g.emit(s, "2")
        await s.commit()
    return ["2"]


async def case_inside_somebody_s_connection(g: Ground) -> list[str]:
    """As tests of services do: the outer transaction is rolled back at the end."""
    query = sa.text("SELECT n_tup_ins FROM pg_stat_xact_user_tables WHERE relid = to_regclass('outbox.outbox')")
    mode: Any = {"join_transaction_mode": "create_savepoint"}
    if g.async_engine is not None:
        async with g.async_engine.connect() as connection:
            outer = await connection.begin()
            async with AsyncSession(connection, **mode) as s:
                s.add(Order(note="t"))
                g.emit(s, "1")
                await s.commit()
            assert await connection.scalar(query) == 1
            await outer.rollback()
    else:
        with g.engine.connect() as bare, bare.begin() as transaction:
            with Session(bare, **mode) as session:
                session.add(Order(note="t"))
                g.emit(session, "1")
                session.commit()
            assert bare.scalar(query) == 1
            transaction.rollback()
    async with g.begin() as s:  # and what the lost transaction taught is not believed: the schema is written again
        g.emit(s, "2")
    assert schemas_there(g.engine) == ["things-value"]
    return ["2"]


async def case_add_begins_the_transaction(g: Ground) -> list[str]:
    async with g.session() as s:
        g.emit(s, "1")
        await s.commit()
        g.emit(s, "2")
        await s.commit()
    return ["1", "2"]


async def case_two_phase_commit(g: Ground) -> list[str]:
    async with g.session(twophase=True) as s:
        s.add(Order(note="2p"))
        g.emit(s, "1")
        await s.commit()
        g.emit(s, "2")
        if g.async_engine is None:  # AsyncSession has no prepare()
            s.session.prepare()
            with pytest.raises(TransactionError, match="is prepared"):
                g.emit(s, "too late")
        await s.commit()
    return ["1", "2"]


async def case_expunge_all(g: Ground) -> list[str]:
    async with g.session() as s:
        g.emit(s, "1")
        s.expunge_all()
        await s.commit()
    return ["1"]


async def case_several_commits(g: Ground) -> list[str]:
    async with g.session() as s:
        for name in "012":
            g.emit(s, name)
            await s.commit()
    return ["0", "1", "2"]


async def case_savepoint_whose_flush_fails(g: Ground) -> list[str]:
    async with g.begin() as s:
        g.emit(s, "1")
        with pytest.raises(sa.exc.SQLAlchemyError):
            async with s.begin_nested():
                g.emit(s, "2")
                s.add(Order(id=1, note="a"))
                await s.flush()
                s.add(Order(id=2, note=None))
        g.emit(s, "3")
    return ["1", "3"]


async def case_inner_savepoint_released_then_outer_rolled_back_then_another(g: Ground) -> list[str]:
    async with g.begin() as s:
        g.emit(s, "0")
        outer = await s.begin_nested()
        inner = await s.begin_nested()
        g.emit(s, "x")
        await inner.commit()
        await outer.rollback()
        again = await s.begin_nested()
        g.emit(s, "1")
        await again.commit()
    return ["0", "1"]


# --- and more of the kind ---


async def case_savepoint_closed_without_a_word(g: Ground) -> list[str]:
    if g.async_engine is not None:
        return []  # AsyncSessionTransaction has no close()
    async with g.begin() as s:
        g.emit(s, "1")
        savepoint = await s.begin_nested()
        g.emit(s, "2")
        await savepoint.close()
        g.emit(s, "3")
    return ["1", "3"]


async def case_outer_savepoint_rolled_back_over_an_open_inner_one(g: Ground) -> list[str]:
    async with g.begin() as s:
        outer = await s.begin_nested()
        g.emit(s, "1")
        await s.begin_nested()
        g.emit(s, "2")
        await outer.rollback()
        g.emit(s, "3")
    return ["3"]


async def case_first_event_added_by_a_late_before_commit_listener(g: Ground) -> list[str]:
    async with g.session() as s:

        @event.listens_for(s.sync_session, "before_commit")
        def late(session: Session) -> None:
            if session.get_nested_transaction() is None:
                session.add(Order(note="late"))
                g.emit(session, "late")

        s.add(Order(note="a"))
        await s.commit()
    return ["late"]


async def case_flush_hook_while_the_root_commits_over_an_open_savepoint_is_refused(g: Ground) -> list[str]:
    with pytest.raises(TransactionError, match=r"a savepoint .* is open"):
        async with g.begin() as s:

            @event.listens_for(s.sync_session, "after_flush")
            def after_flush(session: Session, _context: Any) -> None:
                g.emit(session, "hook")

            await s.begin_nested()
            s.add(Order(note="q"))
    return []


async def case_flush_hook_of_a_flush_after_ours_is_refused(g: Ground) -> list[str]:
    async with g.session() as s:

        @event.listens_for(s.sync_session, "before_commit")
        def late(session: Session) -> None:
            session.add(Order(note="late"))

        @event.listens_for(s.sync_session, "after_flush")
        def after_flush(session: Session, _context: Any) -> None:
            g.emit(session, "hook")

        g.emit(s, "1")
        with pytest.raises(TransactionError, match="already flushing"):
            await s.commit()
    return []


async def case_hook_that_changes_rows_and_adds_events_in_turn(g: Ground) -> list[str]:
    async with g.session() as s:
        order = Order(note="0")

        @event.listens_for(s.sync_session, "after_flush_postexec")
        def after_flush(session: Session, _context: Any) -> None:
            g.emit(session, f"saw {order.note}")
            if order.note < "2":
                order.note = str(int(order.note) + 1)

        s.add(order)
        await s.commit()
    return ["saw 0", "saw 1", "saw 2"]


CASES = [value for name, value in list(globals().items()) if name.startswith("case_")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.removeprefix("case_"))
async def test_case(case: Callable[[Ground], Awaitable[list[str]]], ground: Ground) -> None:
    expected = await case(ground)
    assert keys(ground.engine) == expected


# --- What is written ---


def test_the_row_is_the_message(outbox: Outbox, engine: sa.Engine, catalogue: Catalogue) -> None:
    fixed = uuid4()
    with Session(engine) as session:
        ids = outbox.add(session, thing("ä\"\\'\n", id=fixed, headers={"h": "wert €"}), thing("2", key="own"))
        session.commit()
    assert ids[0] == fixed
    with owner(engine) as connection:
        query = (
            "SELECT id, type, topic, key, value, fingerprint, headers, lane, created_at FROM outbox.outbox ORDER BY seq"
        )
        first, second = connection.execute(sa.text(query)).all()
    expected = catalogue.encode(thing("ä\"\\'\n", id=fixed))
    assert first[:7] == (
        fixed, "test.Thing", "things", "ä\"\\'\n", expected.value, expected.fingerprint, {"h": "wert €"},
    )  # fmt: skip
    assert (second.id, second.key, second.headers, second.lane) == (ids[1], "own", None, 0)
    assert second.created_at >= first.created_at


def test_the_events_of_a_transaction_are_one_insert_after_its_flush(outbox: Outbox, engine: sa.Engine) -> None:
    statements: list[str] = []
    with Session(engine) as session:
        for _ in range(2):  # the second finds the schema of the first, and so knows that it is committed
            outbox.add(session, thing("first"))
            session.commit()
        event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
        outbox.add(session, thing("1"))
        session.add(Order(note="a"))
        outbox.add(session, *map(thing, "234"))
        session.add(Order(note="b"))
        assert statements == [], "add() does no I/O"
        session.commit()
    assert [statement.split()[2] for statement in statements] == ["orders", '"outbox".outbox']
    assert keys(engine) == ["first", "first", "1", "2", "3", "4"]


async def test_add_needs_no_await_and_no_greenlet(outbox: Outbox, async_engine: AsyncEngine, engine: sa.Engine) -> None:
    async with AsyncSession(async_engine) as session:
        assert not async_engine.pool.checkedout()  # type: ignore[attr-defined]
        (id_,) = outbox.add(session, thing("1"))
        assert isinstance(id_, UUID)
        assert not async_engine.pool.checkedout()  # type: ignore[attr-defined]
        await session.commit()
    assert keys(engine) == ["1"]


async def test_scoped_sessions_and_subclasses_are_sessions(
    outbox: Outbox, engine: sa.Engine, async_engine: AsyncEngine
) -> None:
    class Mine(Session):
        pass

    scoped = scoped_session(sessionmaker(engine, class_=Mine))
    outbox.add(scoped, thing("1"))
    scoped.commit()
    scoped.remove()
    async_scoped = async_scoped_session(
        async_sessionmaker(async_engine, sync_session_class=Mine), scopefunc=lambda: "one"
    )
    outbox.add(async_scoped, thing("2"))
    await async_scoped.commit()
    await async_scoped.remove()
    assert keys(engine) == ["1", "2"]


def test_a_hundred_thousand_bytes_and_five_thousand_events_keep_their_order(outbox: Outbox, engine: sa.Engine) -> None:
    names = [str(n) for n in range(5_000)] + ["x" * 100_000]
    with Session(engine) as session:
        for name in names:
            outbox.add(session, thing(name))
        session.commit()
    assert keys(engine) == names


def test_two_outboxes_on_one_table_keep_the_order_of_add(catalogue: Catalogue, engine: sa.Engine) -> None:
    one, two = Outbox(catalogue), Outbox(catalogue)
    with Session(engine) as session:
        for number in range(6):
            (one, two)[number % 2].add(session, thing(str(number)))
        session.commit()
    assert keys(engine) == list("012345")


def test_a_session_with_several_databases_finds_the_outbox_by_its_table(outbox: Outbox, engine: sa.Engine) -> None:
    with Session(binds={outbox.table: engine}) as session:
        outbox.add(session, thing("1"))
        session.commit()
    assert keys(engine) == ["1"]
    with Session(binds={Order: engine}) as session, pytest.raises(TransactionError, match=r"Outbox\.table in `binds`"):
        outbox.add(session, thing("2"))


def test_a_trace_under_way_goes_along(outbox: Outbox, engine: sa.Engine) -> None:
    from opentelemetry import trace

    context = trace.SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=trace.TraceFlags(1))
    with Session(engine) as session:
        with trace.use_span(trace.NonRecordingSpan(context)):
            outbox.add(session, thing("1"), thing("2", headers={"traceparent": "mine"}))
        outbox.add(session, thing("3"))
        session.commit()
    with owner(engine) as connection:
        headers = list(connection.scalars(sa.text("SELECT headers FROM outbox.outbox ORDER BY seq")))
    assert headers == [{"traceparent": f"00-{0xABC:032x}-{0xDEF:016x}-01"}, {"traceparent": "mine"}, None]


# --- The schemas that go along ---


def test_a_schema_is_written_with_its_first_event_and_known_once_it_was_found_committed(
    outbox: Outbox, engine: sa.Engine, catalogue: Catalogue
) -> None:
    with Session(engine) as session:
        outbox.add(session, thing("1"))
        session.flush()
        session.rollback()
        assert schemas_there(engine) == []
        for name in "23":
            outbox.add(session, thing(name), other(name))
            session.commit()
        assert schemas_there(engine) == ["others-value", "things-value"]
        with owner(engine) as connection:
            stored = connection.execute(sa.text("SELECT fingerprint, schema FROM outbox.avro_schema")).all()
            connection.execute(sa.text("DELETE FROM outbox.avro_schema"))
        assert {row.fingerprint: row.schema for row in stored} == {
            one: catalogue.schema_json(one) for one in catalogue.fingerprints
        }
        outbox.add(session, thing("4"))
        session.commit()
        assert schemas_there(engine) == [], "known: not sent a third time"


@pytest.mark.parametrize("lost", ["savepoint", "transaction"])
def test_a_schema_that_was_rolled_back_is_written_again(outbox: Outbox, engine: sa.Engine, lost: str) -> None:
    with engine.connect() as connection:
        transaction = connection.begin()
        with contextlib.suppress(KeyError), connection.begin_nested():
            for name in "12":
                connection.execute(outbox.insert(thing(name)))
            raise KeyError
        if lost == "transaction":
            transaction.rollback()
            transaction = connection.begin()
        connection.execute(outbox.insert(thing("3")))
        transaction.commit()
    assert schemas_there(engine) == ["things-value"]
    assert keys(engine) == ["3"]


def test_a_failed_commit_teaches_nothing(outbox: Outbox, engine: sa.Engine) -> None:
    with Session(engine) as session:
        session.add_all([Uniq(u=1), Uniq(u=1)])
        outbox.add(session, thing("1"))
        with pytest.raises(sa.exc.IntegrityError):
            session.commit()
        session.rollback()
        outbox.add(session, thing("2"))
        session.commit()
    assert schemas_there(engine) == ["things-value"]


def test_a_schema_known_in_one_database_is_still_written_in_another(
    catalogue: Catalogue, engine: sa.Engine, make_database: Callable[[], str]
) -> None:
    outbox = Outbox(catalogue)
    url = as_role(make_database(), ROLES.writer)
    second = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    for target in (engine, second):
        with Session(target) as session:
            outbox.add(session, thing("1"))
            session.commit()
        assert schemas_there(target) == ["things-value"]
    second.dispose()


# --- Core and asyncpg ---


def test_insert_is_part_of_a_core_transaction(outbox: Outbox, engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(outbox.insert(thing("1"), other("2")))
        connection.execute(outbox.insert(thing("3")))
    with engine.connect() as connection:
        connection.execute(outbox.insert(thing("lost")))
    assert keys(engine) == ["1", "2", "3"]
    assert schemas_there(engine) == ["others-value", "things-value"]


async def test_insert_works_on_an_async_connection(
    outbox: Outbox, async_engine: AsyncEngine, engine: sa.Engine
) -> None:
    async with async_engine.begin() as connection:
        await connection.execute(outbox.insert(thing("1"), thing("2")))
    assert keys(engine) == ["1", "2"]


async def test_add_asyncpg_is_part_of_the_transaction(outbox: Outbox, database: str, engine: sa.Engine) -> None:
    connection = await asyncpg.connect(database)
    for kind in ("json", "jsonb"):  # as many users do
        await connection.set_type_codec(kind, encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
    async with connection.transaction():
        ids = await outbox.add_asyncpg(connection, thing("1", headers={"a": "b"}), other("2"))
        assert len(ids) == 2
    with pytest.raises(KeyError):
        async with connection.transaction():
            await outbox.add_asyncpg(connection, thing("lost"))
            raise KeyError
    async with (
        asyncpg.create_pool(database, min_size=1, max_size=1) as pool,
        pool.acquire() as proxy,
        proxy.transaction(),
    ):
        await outbox.add_asyncpg(proxy, thing("3"))
        assert await outbox.add_asyncpg(proxy) == []
    with pytest.raises(TransactionError, match=r"async with connection\.transaction"):
        await outbox.add_asyncpg(connection, thing("4"))
    await connection.close()
    assert keys(engine) == ["1", "2", "3"]
    assert schemas_there(engine) == ["others-value", "things-value"]


# --- Refusals: at the call, typed, with nothing written ---


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (Event("test.Nothing", {}), UnknownEventType),
        (Event("test.Thing", {}), InvalidEvent),
        (Event("test.Thing", {"thing": 1}), InvalidEvent),
        (thing("x" * 2_000), EventTooLarge),
    ],
)
def test_one_bad_event_of_a_call_and_none_is_added(
    catalogue: Catalogue, engine: sa.Engine, bad: Event, error: type[Exception]
) -> None:
    outbox = Outbox(catalogue, max_bytes=1_000)
    with Session(engine) as session:
        outbox.add(session, thing("1"))
        with pytest.raises(error):
            outbox.add(session, thing("2"), bad)
        with pytest.raises(error):
            outbox.insert(thing("2"), bad)
        session.commit()
    assert keys(engine) == ["1"]


def autocommit_engines(engine: sa.Engine) -> list[sa.Engine]:
    made = sa.create_engine(engine.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    return [engine.execution_options(isolation_level="AUTOCOMMIT"), made]


def test_autocommit_is_refused_at_add(outbox: Outbox, engine: sa.Engine) -> None:
    for target in autocommit_engines(engine):
        with Session(target) as session, pytest.raises(TransactionError, match="AUTOCOMMIT"):
            outbox.add(session, thing("1"))
        with target.connect() as connection, pytest.raises(TransactionError, match="AUTOCOMMIT"):
            connection.execute(outbox.insert(thing("1")))
        with target.connect() as connection, Session(connection) as session, pytest.raises(TransactionError):
            outbox.add(session, thing("1"))
            session.commit()
    with Session(engine) as session:  # known only at the commit: the option was given to the session's connection
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        outbox.add(session, thing("1"))
        with pytest.raises(TransactionError, match="AUTOCOMMIT"):
            session.commit()
    assert keys(engine) == []


async def test_autocommit_is_refused_under_asyncio(outbox: Outbox, async_engine: AsyncEngine) -> None:
    autocommit = async_engine.execution_options(isolation_level="AUTOCOMMIT")
    async with AsyncSession(autocommit) as session:
        with pytest.raises(TransactionError, match="AUTOCOMMIT"):
            outbox.add(session, thing("1"))
    async with autocommit.connect() as connection:
        with pytest.raises(TransactionError, match="AUTOCOMMIT"):
            await connection.execute(outbox.insert(thing("1")))


def test_a_session_closed_for_good_is_refused(outbox: Outbox, engine: sa.Engine) -> None:
    session = Session(engine, close_resets_only=False)
    session.close()
    with pytest.raises(TransactionError, match="open a new one"):
        outbox.add(session, thing("1"))


def test_a_session_that_does_not_begin_by_itself_must_have_begun(outbox: Outbox, engine: sa.Engine) -> None:
    with Session(engine, autobegin=False) as session:
        with pytest.raises(TransactionError, match=r"call begin\(\)"):
            outbox.add(session, thing("1"))
        with session.begin():
            outbox.add(session, thing("2"))
    assert keys(engine) == ["2"]


def test_a_failed_transaction_is_refused_until_it_is_rolled_back(outbox: Outbox, engine: sa.Engine) -> None:
    with Session(engine) as session:
        session.add(Order(note=None))
        with pytest.raises(sa.exc.IntegrityError):
            session.flush()
        with pytest.raises(TransactionError, match=r"call rollback\(\) first"):
            outbox.add(session, thing("1"))
        session.rollback()
        outbox.add(session, thing("2"))
        session.commit()
    assert keys(engine) == ["2"]


def test_what_is_no_session_is_told_where_to_go(outbox: Outbox, engine: sa.Engine) -> None:
    with engine.connect() as connection, pytest.raises(TransactionError, match=r"Outbox\.insert"):
        outbox.add(connection, thing("1"))  # type: ignore[arg-type]


def test_after_a_commit_that_failed_half_way_an_event_is_written_at_once_or_refused(
    outbox: Outbox, engine: sa.Engine
) -> None:
    """A listener after ours stops the commit: the events are in the transaction, which goes on."""
    with Session(engine) as session:
        stop = [True]

        @event.listens_for(session, "before_commit")
        def listener(_session: Session) -> None:
            if stop.pop():
                raise KeyError("not yet")

        outbox.add(session, thing("1"))
        with pytest.raises(KeyError):
            session.commit()
        outbox.add(session, thing("2"))
        stop.append(False)
        session.commit()
    assert keys(engine) == ["1", "2"]


async def test_the_same_under_asyncio_is_refused_not_lost(
    outbox: Outbox, engine: sa.Engine, async_engine: AsyncEngine
) -> None:
    async with AsyncSession(async_engine) as session:

        @event.listens_for(session.sync_session, "before_commit")
        def listener(_session: Session) -> None:
            raise KeyError("not yet")

        outbox.add(session, thing("1"))
        with pytest.raises(KeyError):
            await session.commit()
        with pytest.raises(TransactionError, match=r"call rollback\(\)"):
            outbox.add(session, thing("2"))
        await session.rollback()
    assert keys(engine) == []


def test_a_hook_that_feeds_itself_is_stopped(outbox: Outbox, engine: sa.Engine) -> None:
    with Session(engine) as session:

        @event.listens_for(session, "after_flush_postexec")
        def feed(inner: Session, _context: Any) -> None:
            inner.add(Order(note="more"))
            outbox.add(inner, thing("more"))

        session.add(Order(note="first"))
        with pytest.raises(TransactionError, match="feeds itself"):
            session.commit()
    assert keys(engine) == []


async def test_missing_tables_are_a_migration_error_that_names_the_command(
    catalogue: Catalogue, engine: sa.Engine, async_engine: AsyncEngine, database: str
) -> None:
    nowhere = Outbox(catalogue, schema="nowhere")
    message = "outbox migrate --schema nowhere URL"
    with Session(engine) as session:
        nowhere.add(session, thing("1"))
        with pytest.raises(MigrationError, match=message):
            session.commit()
        with pytest.raises(sa.exc.SQLAlchemyError):
            session.commit()  # no COMMIT of a failed transaction that looks like success
    async with async_engine.connect() as connection:
        with pytest.raises(MigrationError, match=message):
            await connection.execute(nowhere.insert(thing("1")))
    bare = await asyncpg.connect(database)
    with pytest.raises(MigrationError, match=message):
        async with bare.transaction():
            await nowhere.add_asyncpg(bare, thing("1"))
    await bare.close()


# --- Nothing left behind ---


def test_sessions_leave_nothing_behind(outbox: Outbox, engine: sa.Engine) -> None:
    seen: list[weakref.ref[Session]] = []
    for number in range(20):
        session = sessionmaker(engine)()
        seen.append(weakref.ref(session))
        outbox.add(session, thing(str(number)))
        if number % 2:
            session.commit()
            assert "outbox.ledger" not in session.info
        session.close()
        assert "outbox.ledger" not in session.info
        del session
    gc.collect()
    assert [reference() for reference in seen] == [None] * 20


def test_engines_are_held_weakly(outbox: Outbox, engine: sa.Engine) -> None:
    before = len(writer._KNOWN)
    for _ in range(5):
        with Session(engine.execution_options(stream_results=False)) as session:
            outbox.add(session, thing("1"))
            session.commit()
    del session
    gc.collect()
    assert len(writer._KNOWN) <= before + 1


def test_many_outboxes_hook_sessions_once(catalogue: Catalogue, engine: sa.Engine) -> None:
    for _ in range(3):
        outbox = Outbox(catalogue)
    with Session(engine) as session:
        assert list(session.dispatch.before_commit) == [writer._before_commit]
        outbox.add(session, thing("1"))
        session.commit()
    assert keys(engine) == ["1"]


def test_concurrent_first_writers_of_two_schemas_do_not_deadlock(catalogue: Catalogue, engine: sa.Engine) -> None:
    from concurrent.futures import ThreadPoolExecutor

    outbox = Outbox(catalogue)

    def write(number: int) -> None:
        with engine.begin() as connection:
            events = [thing("a"), other("b")]
            connection.execute(outbox.insert(*(events if number % 2 else reversed(events))))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    assert len(keys(engine)) == 80
    assert schemas_there(engine) == ["others-value", "things-value"]
