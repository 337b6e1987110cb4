"""What a service is told before it does harm: too large, too many, or in an order that is left to chance."""

import linecache
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from outbox import guards
from outbox.catalogue import Catalogue
from outbox.errors import BacklogFull, EventTooLarge, MigrationError
from outbox.guards import Backlog, UnlockedKey
from outbox.message import Event
from outbox.writer import Outbox
from tests.conftest import MakeTopic
from tests.relay_process import Site, check_exactly_once
from tests.servers import Kafka

FIELDS = [{"name": "thing", "type": "string"}, {"name": "more", "type": "string", "default": ""}]
CATALOGUE = Catalogue(
    [
        {"type": "record", "name": name, "namespace": "test", "topic": name, "fields": FIELDS, **key}
        for name, key in (("Thing", {"key": "thing"}), ("Keyless", {}))
    ]
)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str] = mapped_column(default="")


def thing(name: str, more: str = "", **options: Any) -> Event:
    return Event("test.Thing", {"thing": name, "more": more}, **options)


@pytest.fixture
def engine(database: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(database.replace("postgresql://", "postgresql+psycopg://"))
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Order(id=1))
        session.commit()
    yield engine
    engine.dispose()


def keys(engine: sa.Engine) -> list[str | None]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.text("SELECT key FROM outbox.outbox ORDER BY seq")))


# ---- size ------------------------------------------------------------------------------------------------------------

LIMIT = 4_000


def largest(make: Callable[[int], Event]) -> Event:
    """Of the events `make(0)`, `make(1)` …, the last that an Outbox takes."""
    outbox, fits, too_large = Outbox(CATALOGUE, max_bytes=LIMIT), 0, LIMIT
    while too_large - fits > 1:
        size = (fits + too_large) // 2
        try:
            outbox.encode(make(size))
            fits = size
        except EventTooLarge:
            too_large = size
    return make(fits)


def test_an_event_that_fits_is_published_and_one_that_is_512_bytes_larger_kafka_would_refuse(
    database: str, kafka: Kafka, topic: MakeTopic, engine: sa.Engine
) -> None:
    """Whatever is large: value, key, one header, many headers."""
    name = topic(config={"max.message.bytes": str(LIMIT)})
    fitting = [
        largest(lambda size: thing("é", "x" * size, topic=name)),
        largest(lambda size: thing("é" * (size // 2), topic=name, headers={"ce_tenant": "acme"})),
        largest(lambda size: thing("", topic=name, headers={"x": "é" * (size // 2)})),
        largest(lambda size: thing("", topic=name, headers={f"h{one}": "" for one in range(size // 10)})),
    ]
    refused = thing("é", fitting[0].data["more"] + "x" * 512, topic=name)
    with Site(database, kafka.bootstrap) as site:
        with Session(engine) as session, session.begin():
            Outbox(CATALOGUE).add(session, *fitting, refused)
        site.taken(OUTBOX_KAFKA_COMPRESSION_TYPE="none")
        assert len(check_exactly_once(site, parked=1)) == len(fitting)
        assert site.value("SELECT id FROM outbox.dead_event") is not None


# ---- how many wait ---------------------------------------------------------------------------------------------------


def counted(engine: sa.Engine, outbox: Outbox, count: int) -> None:
    """Commits so many events, and makes PostgreSQL's statistics count them now, not within ten seconds."""
    with engine.begin() as connection:
        connection.execute(outbox.insert(*(thing(str(one)) for one in range(count))))
        connection.execute(sa.text("SELECT pg_stat_force_next_flush()"))


def test_a_full_outbox_takes_no_event_by_any_way_in_until_it_has_room(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, database: str
) -> None:
    monkeypatch.setattr(guards, "READ_AGAIN", 3600)
    writer, outbox = Outbox(CATALOGUE), Outbox(CATALOGUE, max_backlog=3)
    outbox._backlog._read_at = -3600  # type: ignore[union-attr]
    counted(engine, writer, 3)
    with Session(engine) as session:
        session.add(Order(id=2))
        outbox.add(session, thing("the first learns it"))
        with pytest.raises(BacklogFull, match="about 3 events wait in the outbox and max_backlog is 3"):
            session.commit()
        session.rollback()
        with pytest.raises(BacklogFull):
            outbox.add(session, thing("the next at the call"))
    with engine.connect() as connection, pytest.raises(BacklogFull):
        connection.execute(outbox.insert(thing("core")))
    assert len(keys(engine)) == 3

    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM outbox.outbox WHERE key = '0'"))
        connection.execute(sa.text("SELECT pg_stat_force_next_flush()"))
    outbox._backlog._read_at = -3600  # type: ignore[union-attr]
    with Session(engine) as session, session.begin():
        outbox.add(session, thing("again"))
    assert keys(engine) == ["1", "2", "again"]


async def test_asyncpg_and_asyncsession_meet_the_limit_too(engine: sa.Engine, database: str) -> None:
    counted(engine, Outbox(CATALOGUE), 3)
    full = Outbox(CATALOGUE, max_backlog=3)
    connection = await asyncpg.connect(database)
    for _ in range(2):  # by a reading, and by the memory of it
        with pytest.raises(BacklogFull):
            async with connection.transaction():
                await full.add_asyncpg(connection, thing("lost"))
    async with connection.transaction():
        await Outbox(CATALOGUE, max_backlog=4).add_asyncpg(connection, thing("3"))
    await connection.close()
    async_engine = create_async_engine(database.replace("postgresql://", "postgresql+asyncpg://"))
    async with AsyncSession(async_engine) as session:
        Outbox(CATALOGUE, max_backlog=3).add(session, thing("lost"))
        with pytest.raises(BacklogFull):
            await session.commit()
    await async_engine.dispose()
    assert keys(engine) == ["0", "1", "2", "3"]


async def test_bare_psycopg_meets_the_limit_too(engine: sa.Engine, database: str) -> None:
    counted(engine, Outbox(CATALOGUE), 3)
    full, async_full = Outbox(CATALOGUE, max_backlog=3), Outbox(CATALOGUE, max_backlog=3)
    with psycopg.connect(database) as connection:
        async with await psycopg.AsyncConnection.connect(database) as async_connection:
            for _ in range(2):  # by a reading, and by the memory of it
                with pytest.raises(BacklogFull):
                    full.add_psycopg(connection, thing("lost"))
                with pytest.raises(BacklogFull):
                    await async_full.add_psycopg_async(async_connection, thing("lost"))
    assert keys(engine) == ["0", "1", "2"]


def test_the_backlog_is_read_once_a_second_at_most(engine: sa.Engine) -> None:
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    outbox = Outbox(CATALOGUE, max_backlog=1_000)
    outbox._backlog._read_at = float("inf")  # type: ignore[union-attr] # read just now, as long as the test takes
    for name in "12":
        with Session(engine) as session, session.begin():
            outbox.add(session, thing(name))
    assert not [statement for statement in statements if "pg_stat" in statement]


def test_a_reading_at_the_limit_is_believed_for_a_second_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(guards, "monotonic", lambda: clock[0])
    backlog = Backlog("outbox", 5)
    backlog.check()
    before = backlog.is_due
    backlog.take(4)
    assert (before, backlog.is_due) == (True, False)
    with pytest.raises(BacklogFull):
        backlog.take(5)
    clock[0] += 0.99
    with pytest.raises(BacklogFull):
        backlog.check()
    clock[0] += 0.02
    backlog.check()  # one may try: it reads again
    assert backlog.is_due


def test_a_schema_with_quotes_in_its_name_is_read_and_a_missing_one_said(engine: sa.Engine) -> None:
    odd = """o'"x%"""
    with engine.begin() as connection:
        connection.execute(sa.text('CREATE SCHEMA "o\'""x%"'))
        connection.execute(sa.text('CREATE TABLE "o\'""x%".outbox (id int)'))
        assert connection.scalar(sa.text(Backlog(odd, 1).query)) == 0
    with Session(engine) as session:
        Outbox(CATALOGUE, schema="nowhere", max_backlog=1).add(session, thing("1"))
        with pytest.raises(MigrationError, match="--schema nowhere"):
            session.commit()


# ---- a key that nothing was locked for -------------------------------------------------------------------------------


@pytest.fixture
def wary() -> Outbox:
    return Outbox(CATALOGUE, warn_unlocked=True)


def test_a_key_without_a_lock_or_a_write_is_warned_of_at_the_line_of_the_add(engine: sa.Engine, wary: Outbox) -> None:
    with Session(engine) as session:
        session.get_one(Order, 1)  # read, not locked
        wary.add(session, thing("k"), thing("other"))
        with pytest.warns(UnlockedKey, match=r"test\.Thing, key 'k': .* lock the aggregate first") as caught:
            session.commit()
    [one] = caught
    assert linecache.getline(one.filename, one.lineno).strip() == 'wary.add(session, thing("k"), thing("other"))'
    assert keys(engine) == ["k", "other"]


def locked(session: Session) -> None:
    session.get_one(Order, 1, with_for_update=True)


def locked_lightly(session: Session) -> None:
    session.execute(sa.text("SELECT FROM orders FOR KEY SHARE"))


def written_later(session: Session) -> None:
    session.get_one(Order, 1).note = "flushed before the events are written"


def inserted(session: Session) -> None:
    session.add(Order(id=2))


def written_by_core(session: Session) -> None:
    session.connection().execute(sa.update(Order).values(note="core"))


def advised(session: Session) -> None:
    session.execute(sa.text("SELECT pg_advisory_xact_lock(1)"))


def locked_in_a_savepoint(session: Session) -> None:
    with session.begin_nested():
        locked(session)


@pytest.mark.parametrize(
    "act", [locked, locked_lightly, written_later, inserted, written_by_core, advised, locked_in_a_savepoint]
)
def test_whoever_locked_or_wrote_anything_is_not_warned(
    engine: sa.Engine, wary: Outbox, act: Callable[[Session], None]
) -> None:
    with Session(engine) as session, session.begin():
        wary.add(session, thing("k"))
        act(session)
    assert keys(engine) == ["k"]  # warnings are errors here


def test_without_a_key_or_without_being_asked_nobody_is_warned(engine: sa.Engine, wary: Outbox) -> None:
    with Session(engine) as session, session.begin():
        wary.add(session, Event("test.Keyless", {"thing": "1"}))
    with Session(engine) as session, session.begin():
        Outbox(CATALOGUE).add(session, thing("1"))


async def test_the_warning_comes_under_asyncio_too_and_can_be_an_error(
    engine: sa.Engine, wary: Outbox, database: str
) -> None:
    async_engine = create_async_engine(database.replace("postgresql://", "postgresql+asyncpg://"))
    async with AsyncSession(async_engine) as session:
        wary.add(session, thing("k"))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnlockedKey)
            with pytest.raises(UnlockedKey):
                await session.commit()
    await async_engine.dispose()
    assert keys(engine) == []
