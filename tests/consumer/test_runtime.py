"""The consumer on a real Kafka and a real PostgreSQL: each event takes effect once, in the order of its key."""

import asyncio
import re

import pytest
import sqlalchemy as sa
from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from outbox import Event, UsageError
from outbox.consumer import Consumer, Limits, Meta, feed
from outbox.consumer.metrics import collector
from tests.conftest import MakeTopic
from tests.consumer.stage import (
    INSERT,
    TYPE,
    Effects,
    async_engine,
    catalogue,
    committed,
    fast,
    insert,
    record,
    row,
    running,
    send,
    thing,
    until,
)
from tests.roles import ROLES, SERVICE, as_role
from tests.servers import Kafka


async def test_each_event_takes_effect_once_in_the_order_of_its_key(
    kafka: Kafka, topic: MakeTopic, engine: AsyncEngine, effects: Effects
) -> None:
    name = topic(3)
    records = [record(thing(number)) for number in range(300)]
    send(kafka.bootstrap, name, records + records[:50])
    consumer = Consumer(name, engine, catalogue=catalogue(), kafka=fast(kafka.bootstrap))

    @consumer.on(Event, topic=name)
    async def note(event: Event, session: AsyncSession, meta: Meta) -> None:
        assert meta.id == event.id
        assert meta.type == TYPE
        await insert(session, [event])

    async with running(consumer):
        await effects.until(300)
        await until(lambda: consumer.metrics.duplicates[name] == 50)
    assert effects.by_key() == {f"k{n}": list(range(n, 300, 10)) for n in range(10)}
    assert sum(committed(kafka.bootstrap, name, name).values()) == 350


def test_functions_run_in_threads_with_a_session(
    kafka: Kafka, topic: MakeTopic, database: str, effects: Effects
) -> None:
    name = topic(2)
    send(kafka.bootstrap, name, [record(thing(number)) for number in range(60)])
    url = as_role(database, ROLES.inbox)
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"), pool_size=12)
    consumer = Consumer(name, engine, catalogue=catalogue(), kafka=fast(kafka.bootstrap), limits=Limits(concurrency=4))

    @consumer.on(Event, topic=name)
    def note(event: Event, session: Session, _: Meta) -> None:
        session.execute(INSERT, row(event))

    async def run() -> None:
        async with running(consumer):
            await effects.until(60)

    asyncio.run(run())
    engine.dispose()
    assert effects.by_key() == {f"k{n}": list(range(n, 60, 10)) for n in range(10)}


async def test_batches_take_effect_in_one_transaction_and_returned_events_go_to_the_outbox_with_it(
    kafka: Kafka, topic: MakeTopic, database: str, effects: Effects
) -> None:
    name, engine = topic(2), async_engine(as_role(database, SERVICE))
    send(kafka.bootstrap, name, [record(thing(number)) for number in range(500)])
    consumer = Consumer(name, engine, catalogue=catalogue(), kafka=fast(kafka.bootstrap))
    sizes = []

    @consumer.on_batch(Event, topic=name, size=100)
    async def note(events: list[Event], session: AsyncSession, metas: list[Meta]) -> list[Event]:
        assert [event.id for event in events] == [meta.id for meta in metas]
        sizes.append(len(events))
        await insert(session, events)
        return [thing(number=len(events), name="batch")]

    async with running(consumer):
        await effects.until(500)
    assert max(sizes) == 100
    assert effects.by_key() == {f"k{n}": list(range(n, 500, 10)) for n in range(10)}
    assert effects.rows("SELECT count(*), min(topic) FROM outbox.outbox") == [(len(sizes), "things")]
    await engine.dispose()


# --- limits ---


async def test_a_handler_that_is_slow_holds_back_what_is_taken_and_the_member_stays_in_the_group(
    kafka: Kafka, topic: MakeTopic, engine: AsyncEngine, effects: Effects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than the stall after which partitions are paused, and than the session's timeout."""
    monkeypatch.setattr(feed, "STALL", 0.2)
    monkeypatch.setattr(feed, "CHUNK", 20)  # by so many and one the limit may be passed
    name = topic(1)
    limits = Limits(messages=50, concurrency=2)
    consumer = Consumer(name, engine, catalogue=catalogue(), kafka=fast(kafka.bootstrap), limits=limits)
    go = asyncio.Event()

    @consumer.on(Event, topic=name)
    async def note(event: Event, session: AsyncSession, _: Meta) -> None:
        await go.wait()
        await insert(session, [event])

    async with running(consumer):
        send(kafka.bootstrap, name, [record(thing(number)) for number in range(40)])
        await until(lambda: consumer.metrics.received[name] == 40)
        send(kafka.bootstrap, name, [record(thing(number)) for number in range(40, 400)])
        await until(lambda: consumer.metrics.in_hand()[0] >= 50)
        await asyncio.sleep(1.3)  # the session's timeout, and then some
        in_hand = consumer.metrics.in_hand()[0]
        go.set()
        await effects.until(400)
    assert 50 <= in_hand < 50 + 21
    assert effects.by_key() == {f"k{n}": list(range(n, 400, 10)) for n in range(10)}
    assert consumer.metrics.duplicates[name] == 0, "a member that was thrown out would read again"


async def test_a_stop_waits_for_what_is_at_work_up_to_the_deadline_and_what_is_cancelled_comes_again(
    kafka: Kafka, topic: MakeTopic, engine: AsyncEngine, effects: Effects
) -> None:
    name = topic(1)
    send(kafka.bootstrap, name, [record(thing(number)) for number in (0, 1)])
    limits = Limits(deadline=0.3)
    consumer = Consumer(name, engine, catalogue=catalogue(), kafka=fast(kafka.bootstrap), limits=limits)
    begun, endless = 0, asyncio.Event()

    @consumer.on(Event, topic=name)
    async def note(event: Event, session: AsyncSession, _: Meta) -> None:
        nonlocal begun
        begun += 1
        await insert(session, [event])
        await (asyncio.sleep(0.1) if event.data["number"] == 0 else endless.wait())

    async with running(consumer):
        await until(lambda: begun == 2)
    assert effects.rows() == [("k0", 0)]
    endless.set()
    async with running(consumer):
        await effects.until(2)
    assert effects.rows() == [("k0", 0), ("k1", 1)]


async def test_what_is_counted_is_shown_to_prometheus(
    kafka: Kafka, topic: MakeTopic, engine: AsyncEngine, effects: Effects
) -> None:
    name = topic(1)
    repeated = record(thing(0))
    send(kafka.bootstrap, name, [repeated, record(thing(1)), repeated])
    consumer = Consumer(name, engine, catalogue=catalogue(), kafka=fast(kafka.bootstrap), limits=Limits(commit=0.05))

    @consumer.on(Event, topic=name)
    async def note(event: Event, session: AsyncSession, _: Meta) -> None:
        await insert(session, [event])

    registry = CollectorRegistry()
    registry.register(collector(consumer.metrics))

    def sample(suffix: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"outbox_consumer_{suffix}", {"consumer": name, **labels})

    async with running(consumer):
        await until(lambda: consumer.metrics.duplicates[name] == 1)
        await until(lambda: sample("lag", topic=name, partition="0") == 0)
        assert sample("processed_total", topic=name) == 2
        assert sample("received_total", topic=name) == 3
        assert sample("duplicates_total", topic=name) == 1
        assert sample("handler_seconds_count", topic=name) == 2
        assert (sample("in_hand_messages"), sample("in_hand_bytes")) == (0, 0)
    text = generate_latest(registry).decode()
    assert "outbox_consumer_handler_seconds_bucket" in text
    assert re.findall(r"# TYPE (\S+) counter", text) == [
        f"outbox_consumer_{one}_total"
        for one in ("received", "processed", "duplicates", "skipped", "retries", "dead_messages", "trouble")
    ]


# --- refusals ---


async def test_handlers_that_cannot_work_are_refused_when_they_are_registered(engine: AsyncEngine) -> None:
    consumer = Consumer("c", engine, catalogue=catalogue(), kafka={"bootstrap.servers": "nowhere"})

    async def note(event: Event, session: AsyncSession, meta: Meta) -> None: ...

    with pytest.raises(UsageError, match="name it with topic="):
        consumer.on(Event)
    consumer.on(Event, topic="t")(note)
    with pytest.raises(UsageError, match="has a handler of Event already"):
        consumer.on(Event, topic="t")
    with pytest.raises(UsageError, match="must agree"):
        consumer.on_batch(Event, topic="t")
    with pytest.raises(UsageError, match=r"is no `async def`"):
        consumer.on(Event, topic="u")(lambda *_: None)
    with pytest.raises(UsageError, match="one event or more"):
        consumer.on_batch(Event, topic="v", size=0)
    with pytest.raises(UsageError, match="no handler"):
        await Consumer("c", engine, catalogue=catalogue(), kafka={}).run()
