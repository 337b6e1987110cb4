"""Events recorded on an object go where its changes go: through flush, rollback, savepoint, expunge, merge, expire."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import ForeignKey, event
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    mapped_column,
    relationship,
)

from examples.chip_quality.events import InspectionEvent
from outbox.aggregate import RecordsEvents
from outbox.catalogue import Catalogue
from outbox.errors import InvalidEvent, UsageError
from outbox.headers import context
from outbox.message import Event
from outbox.writer import Outbox

ROOT = Path(__file__).parents[1]
OUTBOX = Outbox(
    Catalogue(
        [
            {
                "type": "record",
                "name": "Thing",
                "namespace": "test",
                "topic": "things",
                "key": "thing",
                "fields": [{"name": "thing", "type": "string"}],
            }
        ]
    )
)


class Base(DeclarativeBase):
    pass


class Batch(RecordsEvents, Base):
    __tablename__ = "batches"
    __outbox__ = OUTBOX

    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str] = mapped_column(default="")
    version: Mapped[int] = mapped_column(default=0)
    chips: Mapped[list["Chip"]] = relationship(cascade="all, delete-orphan")

    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012 - SQLAlchemy's way

    def say(self, name: str, **options: Any) -> None:
        self.record(Event("test.Thing", {"thing": name}), **options)


class Chip(RecordsEvents, Base):
    __tablename__ = "chips"
    __outbox__ = OUTBOX

    id: Mapped[int] = mapped_column(primary_key=True)
    batch_id: Mapped[int] = mapped_column(ForeignKey(Batch.id))
    kind: Mapped[str] = mapped_column(default="chip")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "chip"}  # noqa: RUF012 - SQLAlchemy's way

    def say(self, name: str) -> None:
        self.record(Event("test.Thing", {"thing": name}))


class Die(Chip):
    """Joined to its base's table."""

    __tablename__ = "dies"
    id: Mapped[int] = mapped_column(ForeignKey(Chip.id), primary_key=True)
    __mapper_args__ = {"polymorphic_identity": "die"}  # noqa: RUF012 - SQLAlchemy's way


class Plain(Base):
    __tablename__ = "plain"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def engine(database: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(database.replace("postgresql://", "postgresql+psycopg://"))
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Batch(id=1))
        session.commit()
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: sa.Engine) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


def keys(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.text("SELECT key FROM outbox.outbox ORDER BY seq")))


def test_events_are_committed_with_the_flush_in_the_order_of_the_calls(engine: sa.Engine, session: Session) -> None:
    batch = session.get_one(Batch, 1)
    assert batch.chips == []  # loaded: no flush comes between
    chip = Chip(id=1)
    chip.say("a chip is made")
    batch.say("it has come")
    batch.note = "one chip"
    chip.say("and was seen")
    batch.chips.append(chip)
    assert [said.data["thing"] for said in batch.recorded_events if isinstance(said, Event)] == ["it has come"]
    session.flush()
    assert batch.recorded_events == chip.recorded_events == ()
    batch.say("the end")
    session.commit()
    assert keys(engine) == ["a chip is made", "it has come", "and was seen", "the end"]
    session.commit()
    assert len(keys(engine)) == 4


def test_an_event_alone_is_a_new_version_and_writes_nothing_where_none_are_counted(
    engine: sa.Engine, session: Session
) -> None:
    batch, chip = session.get_one(Batch, 1), Chip(id=1, batch_id=1)
    session.add(chip)
    session.commit()
    version = batch.version
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    chip.say("1")
    session.commit()
    chip.say("2")  # of an object whose attributes have expired
    session.commit()
    assert not [statement for statement in statements if statement.startswith("UPDATE")]
    batch.say("3")
    session.commit()
    assert (keys(engine), batch.version) == (["1", "2", "3"], version + 1)


def test_a_rollback_takes_the_events_of_an_object_that_is_in_the_database(engine: sa.Engine, session: Session) -> None:
    batch = session.get_one(Batch, 1)
    for flush in (True, False):
        batch.note = "changed"
        batch.say("gone")
        if flush:
            session.flush()
        session.rollback()
        assert (batch.note, batch.recorded_events) == ("", ())
    batch.say("stays")
    session.commit()
    assert keys(engine) == ["stays"]


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("again", ["same session", "another session"])
def test_a_new_object_keeps_its_events_when_it_is_rolled_back_and_says_them_once(
    engine: sa.Engine, session: Session, flush: bool, again: str
) -> None:
    batch = Batch(id=2)
    batch.say("1")
    session.add(batch)
    if flush:
        session.flush()
        batch.say("2")
        session.flush()
    else:
        batch.say("2")
    session.rollback()
    assert len(batch.recorded_events) == 2
    with Session(engine) if again == "another session" else session as other:
        other.add(batch)
        other.commit()
        other.commit()
    assert keys(engine) == ["1", "2"]


def test_a_flush_that_failed_and_its_retry_say_an_event_once(engine: sa.Engine, session: Session) -> None:
    batch = Batch(id=1)
    batch.say("1")
    session.add(batch)
    with pytest.raises(sa.exc.IntegrityError):
        session.flush()
    session.rollback()
    batch.id = 2
    session.add(batch)
    session.commit()
    assert keys(engine) == ["1"]


def test_a_savepoint_takes_its_own_events_only(engine: sa.Engine, session: Session) -> None:
    batch = session.get_one(Batch, 1)
    batch.say("before")
    savepoint = session.begin_nested()
    batch.say("flushed in it")
    session.flush()
    batch.say("not flushed in it")
    savepoint.rollback()
    batch.say("after")
    with session.begin_nested():
        batch.say("released")
    session.commit()
    assert keys(engine) == ["before", "after", "released"]


def test_a_new_object_of_a_savepoint_that_was_rolled_back_can_be_added_again(
    engine: sa.Engine, session: Session
) -> None:
    batch = Batch(id=2)
    batch.say("1")
    savepoint = session.begin_nested()
    session.add(batch)
    session.flush()
    savepoint.rollback()
    with Session(engine) as other:
        other.add(batch)
        other.commit()
        other.expunge(batch)
    session.rollback()  # knows of it no more
    with Session(engine) as other:
        other.add(batch)
        batch.note = "x"
        other.commit()
    assert keys(engine) == ["1"]


def test_expunge_takes_the_events_that_no_flush_has_taken(engine: sa.Engine, session: Session) -> None:
    batch = session.get_one(Batch, 1)
    batch.say("flushed")
    session.flush()
    batch.note = "not flushed"
    batch.say("goes with it")
    session.expunge(batch)
    session.commit()
    assert keys(engine) == ["flushed"]
    with Session(engine) as other:
        other.add(batch)
        other.commit()
        assert (keys(engine), batch.note) == (["flushed", "goes with it"], "not flushed")


def test_merge_takes_the_events_along_once(engine: sa.Engine, session: Session) -> None:
    source = Batch(id=2, note="from outside")
    source.say("1")
    session.merge(source)
    session.merge(source)
    session.rollback()
    merged = session.merge(source)
    session.flush()
    assert session.merge(source) is merged
    session.commit()
    session.merge(source)
    session.commit()
    assert keys(engine) == ["1"]
    source.say("2")
    session.merge(source)
    session.commit()
    assert keys(engine) == ["1", "2"]


def test_what_is_merged_joins_what_the_object_has(engine: sa.Engine, session: Session) -> None:
    batch = session.get_one(Batch, 1)
    source = Batch(id=1, note="from outside", version=batch.version)
    source.say("first")
    batch.say("second")
    with session.no_autoflush:
        assert session.merge(source) is batch
    session.commit()
    assert keys(engine) == ["first", "second"]


def test_expire_and_refresh_take_what_they_take_of_the_changes(engine: sa.Engine, session: Session) -> None:
    batch = session.get_one(Batch, 1)
    batch.note = "gone"
    batch.say("gone")
    session.expire(batch)
    batch.note = "gone"
    batch.say("gone")
    session.refresh(batch)
    batch.note = "stays"
    batch.say("stays")
    session.refresh(batch, ["version"])
    session.commit()
    assert (keys(engine), batch.note) == (["stays"], "stays")


def test_a_session_that_expires_nothing_says_nothing_twice_and_keeps_nothing(engine: sa.Engine) -> None:
    with Session(engine, expire_on_commit=False) as session:
        batch = session.get_one(Batch, 1)
        for name in "123":
            batch.say(name)
            session.commit()
            session.commit()
            assert len(batch._recorded) == 1
        batch.note = "changed"
        session.rollback()
        session.commit()
    assert keys(engine) == ["1", "2", "3"]


def test_a_deleted_object_says_its_last_words_and_an_orphan_that_was_never_written_nothing(
    engine: sa.Engine, session: Session
) -> None:
    batch = session.get_one(Batch, 1)
    chip = Chip(id=1)
    chip.say("never there")
    batch.chips.append(chip)
    batch.chips.remove(chip)
    session.flush()
    batch.say("deleted")
    session.delete(batch)
    session.commit()
    assert keys(engine) == ["deleted"]


def test_an_object_is_pickled_without_its_events_and_not_with_events_that_would_be_lost(
    engine: sa.Engine, session: Session
) -> None:
    batch = session.get_one(Batch, 1)
    batch.say("1")
    with pytest.raises(UsageError, match="flush it first"):
        pickle.dumps(batch)
    session.flush()
    session.merge(pickle.loads(pickle.dumps(batch)))  # noqa: S301 - made here
    session.commit()
    assert keys(engine) == ["1"]


async def test_an_event_has_the_headers_of_the_moment_in_which_it_was_recorded(
    engine: sa.Engine, database: str
) -> None:
    async_engine = create_async_engine(database.replace("postgresql://", "postgresql+asyncpg://"))
    async with AsyncSession(async_engine) as session:
        batch = await session.get_one(Batch, 1)
        with context(tenant="acme"):
            batch.say("1", headers={"a": "b"})
        with context(tenant="other"):
            await session.commit()
    await async_engine.dispose()
    with engine.connect() as connection:
        assert list(connection.scalars(sa.text("SELECT headers FROM outbox.outbox"))) == [
            {"ce_tenant": "acme", "a": "b"}
        ]


def test_a_wrong_event_is_an_exception_at_the_call_and_none_of_it_is_recorded() -> None:
    batch = Batch(id=2)
    with pytest.raises(InvalidEvent):
        batch.record(Event("test.Thing", {"thing": "1"}), Event("test.Thing", {"thing": 2}))
    assert batch.recorded_events == ()


def test_a_class_without_an_outbox_is_told_where_it_belongs() -> None:
    class Other(DeclarativeBase):
        pass

    class Lost(RecordsEvents, Other):
        __tablename__ = "lost"
        id: Mapped[int] = mapped_column(primary_key=True)

    with pytest.raises(UsageError, match=r"set Lost\.__outbox__ = Outbox"):
        Lost().record(Event("test.Thing", {"thing": "1"}))


def test_mapped_dataclasses_abstract_bases_and_joined_tables_record_too(engine: sa.Engine) -> None:
    class Root(DeclarativeBase):
        __outbox__ = OUTBOX

    class Abstract(RecordsEvents, Root):
        __abstract__ = True

    class Data(MappedAsDataclass, Abstract):
        __tablename__ = "data"
        id: Mapped[int] = mapped_column(primary_key=True)
        note: Mapped[str] = mapped_column(default="x")

    Root.metadata.create_all(engine)
    with Session(engine) as session:
        data, die = Data(id=1), Die(id=1, batch_id=1)
        assert repr(data).endswith("Data(id=1, note='x')")
        data.record(Event("test.Thing", {"thing": "data"}))
        die.say("die")
        session.add_all([data, die])
        session.commit()
        die.say("die again")
        data.record(Event("test.Thing", {"thing": "data again"}))
        session.commit()
    assert keys(engine) == ["data", "die", "die again", "data again"]


def test_what_the_documentation_shows_is_right(engine: sa.Engine) -> None:
    text = (ROOT / "docs/writing.md").read_text().partition("## Events recorded on objects")[2]
    code = text.partition("```python\n")[2].partition("```")[0]

    class Declared(DeclarativeBase):
        pass

    names = {"Base": Declared, "Mapped": Mapped, "Session": Session, "engine": engine, "mapped_column": mapped_column}
    columns = "id text PRIMARY KEY, batch_id text, chip_id text, type text, status text, quality_score float"
    with engine.begin() as connection:
        connection.execute(sa.text(f"CREATE TABLE inspections ({columns})"))
        connection.execute(sa.text("INSERT INTO inspections VALUES ('i-1', 'b', 'c', 'visual', 'STARTED')"))
    outbox = Outbox(Catalogue.from_folder(ROOT / "schemas"))
    exec(code, {**names, "outbox": outbox, "InspectionEvent": InspectionEvent})  # noqa: S102 - ours
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT status FROM inspections")) == "COMPLETED"
        [row] = connection.execute(sa.text("SELECT type, key FROM outbox.outbox")).all()
    assert (row.type.rpartition(".")[2], row.key) == ("INSPECTION_COMPLETED", "i-1")


def test_a_query_does_not_know_of_it_and_no_session_is_hooked_for_it(engine: sa.Engine, session: Session) -> None:
    assert "_recorded" not in str(sa.select(Batch))
    assert "_recorded" not in {column.name for column in Batch.__table__.columns}
    for name in ("before_flush", "after_flush", "before_attach", "after_attach", "after_rollback", "do_orm_execute"):
        assert list(getattr(Session(engine).dispatch, name)) == [], name
    session.add(Plain(id=1))
    session.flush()
    assert not [name for name in session.info if name != "outbox.ledger"]
    assert session.scalars(sa.select(Batch)).one().recorded_events == ()
