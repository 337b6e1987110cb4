"""The consumer on a real Kafka and a real PostgreSQL: each event takes effect once, in the order of its key."""

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from outbox import Event
from outbox.consumer import Consumer, Limits, Meta
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
    import asyncio

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
