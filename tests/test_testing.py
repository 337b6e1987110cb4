"""What outbox.testing says of a session's events: the same before the commit, after it, and in a transaction that is
rolled back."""

from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from examples.chip_quality import events
from examples.chip_quality.events import InspectionEvent, InspectionEventType, QualityEvent
from examples.chip_quality.process import SCHEMAS
from outbox import Catalogue, Event, Message, MigrationError, Outbox, UsageError, testing
from outbox.aggregate import RecordsEvents
from outbox.testing import (
    assert_emitted,
    assert_emitted_async,
    pending,
    pending_async,
    refute_emitted,
    refute_emitted_async,
)

CREATED = "com.chipquality.events.inspection.INSPECTION_CREATED"


class Base(DeclarativeBase):
    pass


class Note(RecordsEvents, Base):
    """Records its event on itself."""

    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def outbox() -> Outbox:
    """As a service makes it: its catalogue knows no classes."""
    return Outbox(Catalogue.from_folder(SCHEMAS))


@pytest.fixture
def engine(database: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(database.replace("postgresql://", "postgresql+psycopg://"))
    yield engine
    engine.dispose()


@pytest.fixture
async def async_engine(database: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(database.replace("postgresql://", "postgresql+asyncpg://"))
    yield engine
    await engine.dispose()


def created(inspection_id: str) -> InspectionEvent:
    return InspectionEvent.inspection_created(
        inspection_id=inspection_id, batch_id="b", chip_id="c", inspection_type="visual", status="CREATED"
    )


def keys(found: list[testing.Emitted]) -> list[Any]:
    """Of each: an Event, or of its class where another test's Outbox, still alive, knows that."""
    return [event.key if isinstance(event, Event | Message) else cast("Any", event).inspection_id for event in found]


def test_an_event_is_found_before_the_commit_and_after_it(outbox: Outbox, engine: sa.Engine) -> None:
    said = created("i-1")
    with Session(engine) as session:
        refute_emitted(session, InspectionEvent)
        outbox.add(session, created("i-0"), said)
        assert assert_emitted(session, InspectionEvent, inspection_id="i-1", status="CREATED") == said
        session.commit()
        assert assert_emitted(session, InspectionEvent, inspection_id="i-1") == said
        assert assert_emitted(session, InspectionEvent).inspection_id == "i-0", "the first of several"
        refute_emitted(session, InspectionEvent, inspection_id="i-2")
        refute_emitted(session, QualityEvent)
        outbox.add(session, created("i-2"))
        assert keys(pending(session)) == ["i-0", "i-1", "i-2"], "written ones first"
        session.rollback()
        assert keys(pending(session)) == ["i-0", "i-1"]


def test_what_a_savepoint_takes_back_was_not_emitted(outbox: Outbox, engine: sa.Engine) -> None:
    with Session(engine) as session:
        outbox.add(session, created("i-1"))
        savepoint = session.begin_nested()
        outbox.add(session, created("i-2"))
        assert_emitted(session, InspectionEvent, inspection_id="i-2")
        savepoint.rollback()
        assert keys(pending(session)) == ["i-1"]


@pytest.mark.parametrize("mode", ["create_savepoint", "rollback_only"])
def test_inside_an_outer_transaction_that_is_rolled_back(outbox: Outbox, engine: sa.Engine, mode: Any) -> None:
    with engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode=mode) as session:
            outbox.add(session, created("i-1"))
            assert_emitted(session, InspectionEvent, inspection_id="i-1")
            session.commit()
            assert_emitted(session, InspectionEvent, inspection_id="i-1")
            outbox.add(session, created("i-2"))
            session.commit()
            assert keys(pending(session)) == ["i-1", "i-2"]
        outer.rollback()
    with Session(engine) as session:
        assert pending(session) == []


async def test_the_same_under_asyncio(outbox: Outbox, async_engine: AsyncEngine) -> None:
    said = created("i-1")
    async with async_engine.connect() as connection:
        outer = await connection.begin()
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            outbox.add(session, said)
            assert await assert_emitted_async(session, InspectionEvent, inspection_id="i-1") == said
            await session.commit()
            assert await assert_emitted_async(session, InspectionEvent, inspection_id="i-1") == said
            await refute_emitted_async(session, InspectionEvent, inspection_id="i-2")
            with pytest.raises(AssertionError, match="InspectionEvent was emitted"):
                await refute_emitted_async(session, InspectionEvent)
        await outer.rollback()
    scoped = async_scoped_session(async_sessionmaker(async_engine), scopefunc=lambda: "one")
    assert await pending_async(scoped) == []
    outbox.add(scoped, said)
    await scoped.commit()
    assert keys(await pending_async(scoped)) == ["i-1"]
    await scoped.remove()


def test_a_scoped_session_is_a_session(outbox: Outbox, engine: sa.Engine) -> None:
    scoped = scoped_session(sessionmaker(engine))
    outbox.add(scoped, created("i-1"))
    assert_emitted(scoped, InspectionEvent, inspection_id="i-1")
    scoped.remove()


def test_events_that_a_flush_brings_count(outbox: Outbox, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Note, "__outbox__", outbox, raising=False)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        note = Note(id=1)
        session.add(note)
        note.record(created("i-1"))
        with session.no_autoflush:
            refute_emitted(session, InspectionEvent)
        assert_emitted(session, InspectionEvent, inspection_id="i-1")


def test_a_session_without_a_transaction_is_left_so(outbox: Outbox, engine: sa.Engine) -> None:
    with Session(engine) as session:
        outbox.add(session, created("i-1"))
        session.commit()
        assert_emitted(session, InspectionEvent)
        assert not session.in_transaction()
    assert isinstance(engine.pool, sa.QueuePool)
    assert engine.pool.checkedout() == 0


# ---- what an event is read as ----------------------------------------------------------------------------------------


@pytest.fixture
def alone(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> Outbox:
    """No Outbox that another test has left knows the classes."""
    monkeypatch.setattr(testing, "living", lambda: [outbox])
    return outbox


def test_without_a_class_an_event_is_plain_data_with_its_key_topic_and_headers(
    alone: Outbox, engine: sa.Engine
) -> None:
    said = created("i-1")
    with Session(engine) as session:
        alone.add(session, said, headers={"tenant": "acme"})
        for _ in ("before the commit", "after it"):
            [event] = pending(session)
            assert isinstance(event, Event)
            assert (event.type, event.key, event.id) == (CREATED, "i-1", said.event_id)
            assert (event.topic, event.headers) == ("chip-quality.inspection.events", {"tenant": "acme"})
            assert event.data["chip_id"] == "c"
            session.commit()


def test_a_catalogue_that_knows_the_classes_gives_them(outbox: Outbox, engine: sa.Engine) -> None:
    knowing = Outbox(Catalogue.from_folder(SCHEMAS, events=events))
    said = created("i-1"), created("i-2")
    with Session(engine) as session:
        knowing.add(session, said[0])
        outbox.add(session, said[1])
        assert pending(session) == list(said)
        session.commit()
        assert pending(session) == list(said)


def test_an_event_type_is_a_kind_too(alone: Outbox, engine: sa.Engine) -> None:
    data = {"inspection_id": "i-1", "batch_id": "b", "chip_id": "c", "inspection_type": "visual", "status": "CREATED"}
    with Session(engine) as session:
        alone.add(session, Event(CREATED, data))
        found = assert_emitted(session, CREATED, inspection_id="i-1", event_type=InspectionEventType.INSPECTION_CREATED)
        assert isinstance(found, Event)
        refute_emitted(session, CREATED, no_such_field="i-1")
        refute_emitted(session, CREATED.replace("CREATED", "FAILED"))


def test_rows_of_plain_sql_are_read_as_far_as_they_say(outbox: Outbox, engine: sa.Engine) -> None:
    with Session(engine) as session:
        session.execute(
            sa.text("""
            INSERT INTO outbox.outbox (type, topic, key, value)
            VALUES ('shop.PAID', 'orders', '7', convert_to('{"order": 7}', 'UTF8')),
                   ('shop.NOTED', 'orders', '8', '\\xff'),
                   ('shop.GONE', 'orders', '9', NULL)
        """)
        )
        outbox.add(session, created("i-1"))
        paid, noted, gone, _ = pending(session)
        assert isinstance(paid, Event)
        assert isinstance(noted, Message)
        assert isinstance(gone, Message)
        assert (paid.data, noted.value, gone.value) == ({"order": 7}, b"\xff", None)
        assert assert_emitted(session, "shop.PAID", order=7) == paid
        assert assert_emitted(session, "shop.GONE", key="9") == gone


# ---- failures --------------------------------------------------------------------------------------------------------


def test_a_failure_lists_what_was_emitted_with_the_fields_asked_for(outbox: Outbox, engine: sa.Engine) -> None:
    with Session(engine) as session:
        with pytest.raises(AssertionError, match=r"^no InspectionEvent was emitted\. Nothing was\.$"):
            assert_emitted(session, InspectionEvent)
        outbox.add(session, created("i-1"), *(created(f"i-{number}") for number in range(3, 25)))
        with pytest.raises(AssertionError) as failed:
            assert_emitted(session, InspectionEvent, inspection_id="i-2", status="FAILED")
        first, second, third, *_, last = str(failed.value).splitlines()
        assert first == "no InspectionEvent with inspection_id='i-2', status='FAILED' was emitted. Emitted were:"
        assert second == f"  1. {CREATED}, key 'i-1': inspection_id=str 'i-1', status=str 'CREATED'"
        assert third.startswith("  2. ")
        assert last == "  … and 3 more"
        with pytest.raises(AssertionError, match="no QualityEvent with pass_fail=True was") as failed:
            assert_emitted(session, QualityEvent, pass_fail=True)
        assert str(failed.value).splitlines()[1] == f"  1. {CREATED}, key 'i-1'"
        with pytest.raises(AssertionError, match=r"^InspectionEvent with inspection_id='i-1' was emitted\. Emitted"):
            refute_emitted(session, InspectionEvent, inspection_id="i-1")


@pytest.mark.parametrize("check", [assert_emitted, refute_emitted])
def test_a_field_that_the_class_has_not_is_no_pass(check: Any, outbox: Outbox, engine: sa.Engine) -> None:
    with Session(engine) as session, pytest.raises(TypeError, match="no field 'inspektion_id'; it has event_id, "):
        check(session, InspectionEvent, inspektion_id="i-1")


async def test_an_async_session_is_refused_by_the_functions_that_do_not_wait(
    outbox: Outbox, async_engine: AsyncEngine
) -> None:
    async with AsyncSession(async_engine) as session:
        wrong: Any = session
        with pytest.raises(UsageError, match="await"):
            refute_emitted(wrong, InspectionEvent)


async def test_a_check_that_is_not_awaited_fails_its_test(outbox: Outbox, async_engine: AsyncEngine) -> None:
    """The hook is run by hand, around what would be the test."""
    running = testing.pytest_runtest_call()
    next(running)
    async with AsyncSession(async_engine) as session:
        refute_emitted_async(session, InspectionEvent)  # type: ignore[unused-coroutine] # mypy sees it too
        await refute_emitted_async(session, InspectionEvent)
    with pytest.raises(pytest.fail.Exception, match=r"1 checks .* were not awaited"):
        running.send(None)
    awaiting = testing.pytest_runtest_call()
    next(awaiting)
    with pytest.raises(StopIteration):
        awaiting.send(None)


def test_the_plugin_is_loaded_by_itself(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.pluginmanager.get_plugin("outbox") is testing


def test_tables_that_are_not_there_are_named(postgres: Any, outbox: Outbox) -> None:
    engine = sa.create_engine(postgres.url().replace("postgresql://", "postgresql+psycopg://"))
    with Session(engine) as session, pytest.raises(MigrationError, match="outbox migrate"):
        pending(session)
    engine.dispose()


def test_without_an_outbox_there_is_nothing_to_read_with(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "living", list)
    with Session(engine) as session, pytest.raises(UsageError, match="no Outbox"):
        pending(session)
