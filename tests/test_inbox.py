"""Of every event delivered again the inbox claims the first only; a claim counts if its transaction does."""

import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from outbox import DecodeError, Inbox, InvalidMessage, MigrationError, TransactionError, UsageError, uuid7
from outbox.__main__ import main
from outbox.inbox import id_of
from tests.roles import OWNER, ROLES, as_role


@dataclass
class Record:
    """What is read of confluent-kafka's Message."""

    header: Any
    place: tuple[str, int, int] = ("things", 3, 42)

    def headers(self) -> Any:
        return None if self.header is None else [("ce_type", b"t"), ("ce_id", self.header)]

    def topic(self) -> str:
        return self.place[0]

    def partition(self) -> int:
        return self.place[1]

    def offset(self) -> int:
        return self.place[2]


def records(count: int) -> list[Record]:
    return [Record(str(uuid7()).encode()) for _ in range(count)]


@pytest.fixture
def database(database: str) -> str:
    """All of this runs in the inbox role."""
    return as_role(database, ROLES.inbox)


@pytest.fixture
def engine(database: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(database.replace("postgresql://", "postgresql+psycopg://"), pool_size=20)
    yield engine
    engine.dispose()


@pytest.fixture
def inbox() -> Inbox:
    return Inbox("analytics")


def claimed(engine: sa.Engine, inbox: Inbox, messages: list[Record]) -> list[Record]:
    with Session(engine) as session:
        found = inbox.claim(session, messages)
        session.commit()
    return found


def test_first_seen_messages_come_back_in_the_order_given(engine: sa.Engine, inbox: Inbox) -> None:
    first, second = records(5), records(5)
    random.shuffle(first)
    assert claimed(engine, inbox, first) == first
    mixed = first + second
    random.shuffle(mixed)
    assert claimed(engine, inbox, mixed) == [record for record in mixed if record in second]
    assert claimed(engine, inbox, mixed) == []


def test_of_repeats_in_a_batch_the_first_is_kept(engine: sa.Engine, inbox: Inbox) -> None:
    one, two = records(2)
    again = Record(one.header, ("things", 3, 99))
    found = claimed(engine, inbox, [one, two, again])
    assert found == [one, two]
    assert found[0] is one


def test_a_rolled_back_claim_is_no_claim(engine: sa.Engine, inbox: Inbox) -> None:
    batch = records(3)
    with Session(engine) as session:
        assert inbox.claim(session, batch) == batch
        session.rollback()
    assert claimed(engine, inbox, batch) == batch


def test_consumers_do_not_see_each_other(engine: sa.Engine, inbox: Inbox) -> None:
    batch = records(3)
    assert claimed(engine, inbox, batch) == batch
    assert claimed(engine, Inbox("notification"), batch) == batch


def test_an_empty_batch_asks_nothing_of_the_database(inbox: Inbox) -> None:
    with Session() as session:
        assert inbox.claim(session, []) == []


def test_any_message_will_do_with_a_function_for_its_id(engine: sa.Engine, inbox: Inbox) -> None:
    batch = [{"event": uuid4(), "n": n} for n in range(3)]
    with Session(engine) as session:
        assert inbox.claim(session, iter(batch), id=lambda message: UUID(str(message["event"]))) == batch
        session.commit()


async def test_claim_async_and_purge_async_do_the_same(engine: sa.Engine, inbox: Inbox, database: str) -> None:
    async_engine = create_async_engine(database.replace("postgresql://", "postgresql+asyncpg://"))
    batch = records(4)
    async with AsyncSession(async_engine) as session:
        assert await inbox.claim_async(session, [*batch[:2], batch[0]]) == batch[:2]
        await session.commit()
        assert await inbox.claim_async(session, batch) == batch[2:]
        await session.rollback()
    scoped = async_scoped_session(async_sessionmaker(async_engine), scopefunc=lambda: "one")
    assert await inbox.claim_async(scoped, batch) == batch[2:]
    await scoped.commit()
    await scoped.remove()
    age(engine, timedelta(days=2))
    async with AsyncSession(async_engine) as session:
        assert await inbox.purge_async(session, timedelta(days=1), limit=3) == 3
        await session.commit()
    await async_engine.dispose()


def test_a_scoped_session_is_a_session(engine: sa.Engine, inbox: Inbox) -> None:
    batch = records(2)
    scoped = scoped_session(sessionmaker(engine))
    assert inbox.claim(scoped, batch) == batch
    scoped.remove()


# --- Several at once ---


def test_overlapping_batches_in_any_order_claim_each_event_once_and_do_not_deadlock(
    engine: sa.Engine, inbox: Inbox
) -> None:
    events = records(300)

    def consume(seed: int) -> list[bytes]:
        chance, mine = random.Random(seed), []  # noqa: S311 - an order, not a secret
        for _ in range(6):
            mine += [record.header for record in claimed(engine, inbox, chance.sample(events, 100))]
        return mine

    with ThreadPoolExecutor(8) as pool:
        taken = [header for mine in pool.map(consume, range(8)) for header in mine]
    assert len(taken) == len(set(taken))
    assert len(taken) > 250


@pytest.mark.parametrize("outcome", ["commit", "rollback"])
def test_a_second_claimer_waits_for_the_first_and_takes_what_it_gave_up(
    engine: sa.Engine, inbox: Inbox, outcome: str
) -> None:
    batch = records(2)
    with Session(engine) as first, ThreadPoolExecutor(1) as pool:
        assert inbox.claim(first, batch) == batch
        second = pool.submit(claimed, engine, inbox, batch)
        wait_for_a_waiter(engine)
        getattr(first, outcome)()
        assert second.result(10) == ([] if outcome == "commit" else batch)


def wait_for_a_waiter(engine: sa.Engine) -> None:
    query = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    pause = threading.Event()
    while True:
        with engine.connect() as connection:
            if connection.scalar(query):
                return
        pause.wait(0.01)


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_with_a_fixed_snapshot_a_claim_committed_since_is_a_serialization_failure(
    engine: sa.Engine, inbox: Inbox, level: Any
) -> None:
    batch = records(2)
    with Session(engine.execution_options(isolation_level=level)) as session:
        session.execute(sa.text("SELECT count(*) FROM outbox.inbox"))  # the snapshot
        assert claimed(engine, inbox, batch[:1]) == batch[:1]
        with pytest.raises(sa.exc.OperationalError) as failure:
            inbox.claim(session, batch)
        assert getattr(failure.value.orig, "sqlstate", None) == "40001"
        session.rollback()
        assert inbox.claim(session, [*batch, batch[1]]) == batch[1:]
        session.commit()


@dataclass(frozen=True)
class Consumption:
    """A transaction that claims these events, batch by batch."""

    batches: list[list[int]]
    commits: bool
    level: Any


consumptions = st.builds(
    Consumption,
    st.lists(st.lists(st.integers(0, 7), max_size=8), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from(["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]),
)

AGAIN = ("40001", "40P01")
"""Serialization failure, deadlock (of several batches in one transaction): the batches are handled again."""


def consume(engine: sa.Engine, inbox: Inbox, events: list[Record], consumption: Consumption) -> list[int]:
    """The events of which effect was taken, once the transaction has ended as it shall."""
    bound = engine.execution_options(isolation_level=consumption.level)
    while True:
        taken: list[int] = []
        with Session(bound) as session:
            try:
                for batch in consumption.batches:
                    claimed = inbox.claim(session, [events[number] for number in batch])
                    taken += [events.index(record) for record in claimed]
                if not consumption.commits:
                    session.rollback()
                    return []
                session.commit()
            except sa.exc.DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) not in AGAIN:
                    raise
            else:
                return taken


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(consumptions=st.lists(consumptions, min_size=2, max_size=5))
def test_whatever_transactions_do_at_once_each_event_takes_effect_in_exactly_one_that_committed(
    engine: sa.Engine, consumptions: list[Consumption]
) -> None:
    inbox, events = Inbox(f"consumer-{uuid4()}"), records(8)
    with ThreadPoolExecutor(len(consumptions)) as pool:
        results = pool.map(lambda one: consume(engine, inbox, events, one), consumptions)
        taken = [number for result in results for number in result]
    seen = {number for one in consumptions if one.commits for batch in one.batches for number in batch}
    assert sorted(taken) == sorted(seen)
    with Session(engine) as session:
        left = inbox.claim(session, events)
    assert [events.index(record) for record in left] == [number for number in range(8) if number not in seen]


# --- Purge ---


def age(engine: sa.Engine, by: timedelta) -> None:
    with engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE outbox.inbox SET processed_at = processed_at - CAST(:by AS interval)"), {"by": by}
        )


def test_purge_forgets_old_claims_of_this_consumer_batch_by_batch(engine: sa.Engine, inbox: Inbox) -> None:
    old, new = records(25), records(5)
    claimed(engine, inbox, old)
    claimed(engine, Inbox("notification"), old)
    age(engine, timedelta(days=8))
    claimed(engine, inbox, new)
    sizes = []
    while True:
        with Session(engine) as session:
            sizes.append(inbox.purge(session, timedelta(days=7), limit=10))
            session.commit()
        if not sizes[-1]:
            break
    assert sizes == [10, 10, 5, 0]
    assert claimed(engine, inbox, old + new) == old
    assert claimed(engine, Inbox("notification"), old) == []


def test_claims_are_listed_and_purged_by_command(engine: sa.Engine, inbox: Inbox, database: str) -> None:
    claimed(engine, inbox, records(20))
    age(engine, timedelta(days=8))
    claimed(engine, inbox, records(10))
    claimed(engine, Inbox("other"), records(2))

    def run(*arguments: str) -> Any:
        done = CliRunner().invoke(main, ["inbox", *arguments, "--url", database])
        assert done.exit_code == 0, done.output
        return done

    assert "20 claims forgotten" in run("purge", inbox.consumer, "--older-than", "7").output
    assert {row["consumer"]: row["claims"] for row in json.loads(run("list", "--json").stdout)} == {
        inbox.consumer: 10,
        "other": 2,
    }
    assert f"{inbox.consumer}  10  20" in run("list").stdout
    refused = CliRunner().invoke(main, ["inbox", "purge", inbox.consumer, "--older-than", "0", "--url", database])
    assert refused.exit_code == 2


def test_concurrent_purges_step_aside_for_each_other(engine: sa.Engine, inbox: Inbox) -> None:
    claimed(engine, inbox, records(20))
    age(engine, timedelta(days=8))
    with Session(engine) as one, Session(engine) as two:
        assert inbox.purge(one, timedelta(days=7), limit=15) == 15
        assert inbox.purge(two, timedelta(days=7), limit=15) == 5
        one.commit()
        two.commit()


def test_purge_walks_the_primary_key(engine: sa.Engine) -> None:
    from outbox.inbox import _PURGE

    by_owner = sa.create_engine(engine.url.set(username=OWNER), poolclass=sa.NullPool)
    with by_owner.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO outbox.inbox SELECT 'c' || n % 2, gen_random_uuid(), now() - make_interval(mins => n)"
                " FROM generate_series(1, 50000) n"
            )
        )
        connection.execute(sa.text("ANALYZE outbox.inbox"))
        plan = connection.scalar(
            sa.text("EXPLAIN (FORMAT json) " + _PURGE.format(schema="outbox")),
            {"consumer": "c1", "older_than": timedelta(hours=1), "limit": 1000},
        )
    assert "Seq Scan" not in json.dumps(plan)
    assert "inbox_pkey" in json.dumps(plan)


@pytest.mark.parametrize(("older_than", "limit"), [(timedelta(0), 10), (timedelta(days=1), 0)])
def test_purge_without_an_age_or_a_limit_is_refused(
    engine: sa.Engine, inbox: Inbox, older_than: timedelta, limit: int
) -> None:
    with Session(engine) as session, pytest.raises(UsageError, match="above zero"):
        inbox.purge(session, older_than, limit)


# --- Refusals ---


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (None, "no header ce_id"),
        (b"", "a header ce_id that is no uuid: \"b''\""),
        (b"not-a-uuid", "a header ce_id that is no uuid"),
        (b"\xff\xfe", "a header ce_id that is no uuid"),
        (b"x" * 5_000, "a header ce_id that is no uuid"),
    ],
)
def test_a_message_without_an_id_is_named_and_nothing_is_claimed(
    engine: sa.Engine, inbox: Inbox, header: Any, said: str
) -> None:
    good = records(1)
    with Session(engine) as session:
        with pytest.raises(InvalidMessage, match=rf"things \[3\] offset 42 has {said}") as refused:
            inbox.claim(session, [*good, Record(header)])
        assert isinstance(refused.value, DecodeError)
        assert len(str(refused.value)) < 400
        session.commit()
    assert claimed(engine, inbox, good) == good


header_values = st.none() | st.binary() | st.text() | st.integers() | st.uuids().map(lambda id_: str(id_).encode())
header_lists = st.none() | st.lists(st.tuples(st.sampled_from(["ce_id", "ce_type", ""]) | st.text(), header_values))


@given(header_lists, st.none() | st.text(), st.none() | st.integers())
def test_whatever_the_headers_are_there_is_an_id_or_an_invalid_message(
    headers: Any, topic: Any, place: int | None
) -> None:
    message: Any = SimpleNamespace(
        headers=lambda: headers, topic=lambda: topic, partition=lambda: place, offset=lambda: place
    )
    with suppress(InvalidMessage):
        found = id_of(message)
        first = next(value for name, value in headers if name == "ce_id")
        assert found == UUID(first.decode() if isinstance(first, bytes) else first)


def test_autocommit_is_refused(engine: sa.Engine, inbox: Inbox) -> None:
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
    with Session(autocommit) as session, pytest.raises(TransactionError, match="AUTOCOMMIT"):
        inbox.claim(session, records(1))


def test_missing_tables_are_named_with_the_command(engine: sa.Engine) -> None:
    nowhere = Inbox("analytics", schema="nowhere")
    with Session(engine) as session, pytest.raises(MigrationError, match="outbox migrate --schema nowhere URL"):
        nowhere.claim(session, records(1))


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_a_consumer_needs_a_name(name: str) -> None:
    with pytest.raises(UsageError, match="name"):
        Inbox(name)


def test_the_default_id_reads_a_real_confluent_message() -> None:
    """The signatures that id_of relies on are those of the client itself."""
    from confluent_kafka import Message

    methods: list[Callable[..., Any]] = [Message.headers, Message.topic, Message.partition, Message.offset]
    assert all(callable(method) for method in methods)


# --- Messages of other clients, bare connections, one message ---


def of_aiokafka(header: bytes | None) -> Any:
    from aiokafka.structs import ConsumerRecord

    headers = [("ce_type", b"t"), *([] if header is None else [("ce_id", header)])]
    return ConsumerRecord("things", 3, 42, 0, 0, None, b"v", None, 0, 1, headers)


def of_faststream(header: bytes | None) -> Any:
    """As its parser makes them: the record inside, headers as text by name."""
    from faststream.kafka.message import KafkaMessage as StreamMessage

    raw = of_aiokafka(header)
    headers = {name: value.decode() for name, value in raw.headers}
    return StreamMessage(raw_message=raw, body=b"v", headers=headers, consumer=None)  # type: ignore[arg-type] # not asked


@pytest.mark.parametrize("make", [of_aiokafka, of_faststream])
def test_messages_of_other_clients_are_claimed_as_they_come(
    engine: sa.Engine, inbox: Inbox, make: Callable[[bytes | None], Any]
) -> None:
    batch = [make(str(uuid7()).encode()) for _ in range(3)]
    with Session(engine) as session:
        assert inbox.claim(session, [*batch, batch[0]]) == batch
        assert inbox.claim(session, batch) == []
        with pytest.raises(InvalidMessage, match=r"the message at things \[3\] offset 42 has no header ce_id"):
            inbox.claim(session, [make(None)])


async def test_bare_asyncpg_claims_in_its_transaction_and_nowhere_else(database: str, inbox: Inbox) -> None:
    connection = await asyncpg.connect(as_role(database, ROLES.inbox))
    batch = records(4)
    try:
        async with connection.transaction():
            assert await inbox.claim_asyncpg(connection, [*batch[:2], batch[0]]) == batch[:2]
        transaction = connection.transaction()
        await transaction.start()
        assert await inbox.claim_asyncpg(connection, batch) == batch[2:]
        await transaction.rollback()
        async with connection.transaction():
            assert await inbox.claim_asyncpg(connection, batch) == batch[2:]
            assert await inbox.claim_asyncpg(connection, []) == []
        with pytest.raises(TransactionError, match="in no transaction"):
            await inbox.claim_asyncpg(connection, batch)
        async with connection.transaction():
            with pytest.raises(MigrationError, match="outbox migrate --schema nowhere URL"):
                await Inbox("analytics", schema="nowhere").claim_asyncpg(connection, batch)
    finally:
        await connection.close()


def test_once_is_true_once_and_an_error_that_is_caught_takes_the_claim_along(engine: sa.Engine, inbox: Inbox) -> None:
    [one] = records(1)
    with Session(engine) as session:
        with suppress(ZeroDivisionError), inbox.once(session, one) as first:
            assert first
            _ = 1 / 0
        with inbox.once(session, one) as first:
            assert first, "the failed block was undone, the claim with it"
        session.commit()
        with inbox.once(session, one) as first:
            assert not first
        session.rollback()
    with Session(engine) as session, pytest.raises(InvalidMessage), inbox.once(session, Record(None)):
        pytest.fail("a message without an id has no effect")


def test_once_leaves_no_savepoint_open_where_the_claim_fails(engine: sa.Engine) -> None:
    with Session(engine) as session:
        with pytest.raises(MigrationError), Inbox("c", schema="nowhere").once(session, records(1)[0]):
            pytest.fail("there is no table")
        assert session.get_nested_transaction() is None
        assert session.scalar(sa.text("SELECT 1")) == 1


async def test_once_is_for_an_async_session_too(database: str, inbox: Inbox) -> None:
    async_engine = create_async_engine(as_role(database, ROLES.inbox).replace("postgresql://", "postgresql+asyncpg://"))
    [one] = records(1)
    async with AsyncSession(async_engine) as session:
        with suppress(ZeroDivisionError):
            async with inbox.once(session, one) as first:
                assert first
                _ = 1 / 0
        async with inbox.once(session, one) as first:
            assert first
        await session.commit()
        async with inbox.once(session, one) as first:
            assert not first
    await async_engine.dispose()
