"""Each step of a drained event alone: what it costs with nothing around it, and the least that it could cost.

The relay's own statements and its records, beside a COPY out, a DELETE by range and a producer that knows nothing of
transactions. CPU of the process that does it and of the server that answers, µs an event.
"""

import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import psycopg
import uvloop
from confluent_kafka import Producer

from benchmarks import machine
from benchmarks.figures import difference, key_of
from benchmarks.stage import FINGERPRINT, TYPE, Backlog, Contender, Stage, say
from relay.config import RelayConfig
from relay.lane import cut
from relay.queries import Queries, connect
from relay.record import Records

DEFAULTS = RelayConfig(
    database_url="postgresql://nowhere", kafka={"bootstrap.servers": "nowhere", "compression.type": "none"}
)
ROWS = DEFAULTS.batch_rows

Step = dict[str, Any]


def steps(stage: Stage, contender: Contender, backlog: Backlog) -> list[Step]:
    """Of the database, of the relay, of Kafka."""
    found = []
    for step in (*_rows(stage, contender, backlog), *_records(stage, backlog)):
        say(f"budget: {step}")
        found.append(step)
    return found


def _alone(stage: Stage, step: str, events: int, server: str | None, run: Callable[[], object]) -> dict[str, Any]:
    pids = {server: stage.pids()[server]} if server else {}
    gc.collect()
    gc.disable()  # what was prepared for the step is not the step's to look through
    before, start = machine.readings(pids), time.process_time()
    run()
    here, spent = time.process_time() - start, difference(before, machine.readings(pids))
    gc.enable()
    there = spent[server] if server else None
    return {
        "step": step,
        "server": server,
        "here_us_per_event": round(here / events * 1e6, 2),
        "server_us_per_event": None if there is None else round(there / events * 1e6, 2),
    }


def _rows(stage: Stage, contender: Contender, backlog: Backlog) -> Iterator[dict[str, Any]]:
    """Out of the database and deleted there: by the relay's statements, and by the barest that there are."""
    url, events = stage.postgres.url(contender.database), backlog.events

    def seeded() -> None:
        stage.vacuum(contender)
        stage.seed(contender, backlog)
        stage.settle(contender)

    def alone(step: str, run: Callable[[], object]) -> dict[str, Any]:
        return _alone(stage, step, events, "database", run)

    seeded()
    yield alone("a bare COPY out, binary", lambda: _copy(url))
    yield alone("the relay's fetch, in batches", lambda: uvloop.run(_fetch(url)))
    yield alone("the relay's delete, in batches", lambda: uvloop.run(_delete(url)))
    seeded()
    yield alone("a bare DELETE, in batches", lambda: _bare_delete(url))


def _copy(url: str) -> None:
    columns = "seq, id, type, topic, key, value, fingerprint, headers, created_at"
    query = f"COPY (SELECT {columns} FROM outbox.outbox ORDER BY lane, seq) TO STDOUT (FORMAT binary)"
    with psycopg.connect(url) as session, session.cursor() as cursor, cursor.copy(query.encode()) as rows:
        for _ in rows:
            pass


def _bare_delete(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as session:
        for first, end in _ranges(*session.execute(SEQS).fetchall()[0]):
            session.execute("DELETE FROM outbox.outbox WHERE lane = 0 AND seq >= %s AND seq < %s", (first, end))


SEQS = "SELECT min(seq), max(seq) FROM outbox.outbox"


def _ranges(first: int, last: int) -> Iterator[tuple[int, int]]:
    return ((seq, min(seq + ROWS, last + 1)) for seq in range(first, last + 1, ROWS))


@asynccontextmanager
async def _queries(url: str) -> AsyncIterator[tuple[Queries, Any]]:
    """The relay's statements, and a connection as the relay's are."""
    pool = await connect(replace(DEFAULTS, database_url=url), 2)
    queries = Queries(pool, DEFAULTS.schema)
    async with queries.connection() as db:
        yield queries, db
    await pool.close()


async def _fetch(url: str) -> None:
    async with _queries(url) as (queries, db):
        floor, batch = 0, (await queries.lane(0)).batch
        while rows := await queries.fetch(db, 0, batch, floor, (), ROWS, DEFAULTS.batch_bytes):
            floor = rows[-1][0]


async def _delete(url: str) -> None:
    async with _queries(url) as (queries, db):
        batch = (await queries.lane(0)).batch
        for number, run in enumerate(_ranges(*(await db.fetch(SEQS))[0]), batch):
            if not await queries.advance(db, 0, number, number + 1, (run,), {}, None):
                raise RuntimeError("the lane is at another batch: somebody else is at work on it")


def _records(stage: Stage, backlog: Backlog) -> Iterator[dict[str, Any]]:
    """From rows to the broker: without Kafka, then by a producer that is idempotent and knows no transactions."""
    rows = [_row(number, backlog) for number in range(backlog.events)]
    ids, seqs, outbox = [row[1] for row in rows], [row[0] for row in rows], uuid4()

    def made() -> None:
        Records("/outbox/budget").produce(rows, lambda *_: None)

    def cuts() -> None:
        for start in range(0, len(rows), ROWS):
            cut(outbox, 1, seqs[start : start + ROWS], ids[start : start + ROWS])

    yield _alone(stage, "records made and not produced", len(rows), None, made)
    yield _alone(stage, "progress of the batches", len(rows), None, cuts)
    records: list[tuple[Any, ...]] = []
    Records("/outbox/budget").produce(rows, lambda *one: records.append(one))
    _produce(stage, records)  # the broker warms up for a producer without transactions
    yield _alone(stage, "a bare producer", len(rows), "broker", lambda: _produce(stage, records))
    bare = [(topic, value, key, -1) for topic, value, key, *_ in records]
    yield _alone(stage, "a bare producer, no headers", len(rows), "broker", lambda: _produce(stage, bare))


def _row(number: int, backlog: Backlog) -> tuple[Any, ...]:
    """As `Queries.fetch` gives it."""
    value = number.to_bytes(8) + b"\xab" * (backlog.size - 8)
    key = key_of(number, backlog.keys).decode()
    return number + 1, str(uuid4()), TYPE, backlog.topics[0], key, value, FINGERPRINT, None, time.time_ns() // 1_000_000


def _produce(stage: Stage, records: list[tuple[Any, ...]]) -> None:
    """By the relay's settings, but for the transactions and the debug log."""
    settings = {name: value for name, value in DEFAULTS.producer().items() if name != "debug"}
    producer = Producer({**settings, "bootstrap.servers": stage.kafka.bootstrap, "enable.idempotence": True})
    produce = producer.produce
    for start in range(0, len(records), ROWS):
        for record in records[start : start + ROWS]:
            produce(*record)
        producer.flush()
