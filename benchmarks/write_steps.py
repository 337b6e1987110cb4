"""Where the time of a write goes: each step of it alone, beside the least that it could take.

Of one event of a hundred: the caller's CPU, then the INSERT as the caller waits for it. Of a single event: the INSERT,
beside a round trip that does nothing. Medians; each INSERT in a transaction that has begun.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import fastavro
import psycopg

from outbox import rows
from outbox.catalogue import Catalogue, TypedEvent
from outbox.message import Message
from outbox.tables import SCHEMA

REPEATS = 200

# The row is written, but there is next to nothing to send and to read.
_SAME_ROW = """INSERT INTO outbox.outbox (id, type, topic, key, value, fingerprint)
SELECT {}::uuid, {}, {}, {}, {}::bytea, {}::bigint FROM generate_series(1, {})"""

Step = dict[str, Any]


def steps(url: str, runner: asyncio.Runner, folder: Path, make: Callable[[int], Sequence[TypedEvent]]) -> list[Step]:
    """Each step in µs an event, and the bound that it is compared with."""
    catalogue = Catalogue.from_folder(folder)
    messages = [catalogue.encode(event) for event in make(100)]
    return [
        *_cpu(catalogue, folder, make, messages),
        *_by_psycopg(url, messages),
        *runner.run(_by_asyncpg(url, messages)),
    ]


def _step(name: str, events: int, took: float, bound: str, least: float) -> Step:
    us, bound_us = (round(seconds / events * 1e6, 2) for seconds in (took, least))
    return {"step": name, "events": events, "us": us, "bound": bound, "bound_us": bound_us}


def _cpu(
    catalogue: Catalogue, folder: Path, make: Callable[[int], Sequence[TypedEvent]], messages: Sequence[Message]
) -> list[Step]:
    made, count = make(len(messages)), len(messages)
    plain = [event.to_avro() for event in made]
    schema = fastavro.schema.load_schema(str(folder / "inspection.avsc"))
    text, lists = (rows.Inserts(SCHEMA, driver) for driver in (rows.OTHERS, rows.ASYNCPG))

    def dicts() -> object:
        return [{**one, "event_id": uuid4(), "timestamp": datetime.now(UTC)} for one in plain]

    def bytes_alone() -> object:
        return [fastavro.schemaless_writer(BytesIO(), schema, one) for one in plain]

    def encode() -> object:
        return [catalogue.encode(event) for event in made]

    return [
        _step(
            "make the typed event", count, _cpu_of(lambda: make(count)), "a dict with uuid4() and now()", _cpu_of(dicts)
        ),
        _step("check and encode", count, _cpu_of(encode), "fastavro's schemaless_writer alone", _cpu_of(bytes_alone)),
        _step(
            "parameters for psycopg",
            count,
            _cpu_of(lambda: text.events(messages)),
            "for asyncpg",
            _cpu_of(lambda: lists.events(messages)),
        ),
    ]


def _cpu_of(run: Callable[[], object]) -> float:
    took = []
    for _ in range(REPEATS):
        start = time.thread_time()
        run()
        took.append(time.thread_time() - start)
    return statistics.median(took)


def _by_psycopg(url: str, messages: Sequence[Message]) -> list[Step]:
    inserts = rows.Inserts(SCHEMA, rows.OTHERS)
    with psycopg.connect(url) as connection:

        def took(sql: Any, parameters: Any) -> tuple[float, float]:
            """The statement, and the COMMIT behind it."""
            statements, commits = [], []
            for _ in range(REPEATS):
                connection.execute("SELECT 1")
                start = time.perf_counter()
                connection.execute(sql, parameters, prepare=True)
                executed = time.perf_counter()
                connection.commit()
                statements.append(executed - start)
                commits.append(time.perf_counter() - executed)
            return statistics.median(statements), statistics.median(commits)

        found = [took(*query) for query in _queries(inserts, messages, ["%s"] * 7)]
    (_, behind_all), _, (_, behind_one), _ = found
    return [
        *_inserts("psycopg", messages, *(statement for statement, _ in found)),
        _step("COMMIT, to the disk", len(messages), behind_all, "the same behind one event", behind_one),
    ]


async def _by_asyncpg(url: str, messages: Sequence[Message]) -> list[Step]:
    inserts = rows.Inserts(SCHEMA, rows.ASYNCPG)
    connection = await asyncpg.connect(url)

    async def took(sql: str, parameters: Any) -> float:
        times = []
        for _ in range(REPEATS):
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute("SELECT 1")
            start = time.perf_counter()
            await connection.execute(sql, *parameters)
            times.append(time.perf_counter() - start)
            await transaction.rollback()
        return statistics.median(times)

    found = [await took(*query) for query in _queries(inserts, messages, [f"${n}" for n in range(1, 8)])]
    await connection.close()
    return _inserts("asyncpg", messages, *found)


def _queries(inserts: rows.Inserts, messages: Sequence[Message], placeholders: Sequence[str]) -> list[rows.Query]:
    """Of a hundred events and its bound, of one event and its bound."""
    return [
        inserts.events(messages),
        (_SAME_ROW.format(*placeholders), (*messages[0][:6], len(messages))),
        inserts.events(messages[:1]),
        ("SELECT 1", ()),
    ]


def _inserts(driver: str, messages: Sequence[Message], *took: float) -> list[Step]:
    many, same_row, one, nothing = took
    return [
        _step(f"INSERT by {driver}", len(messages), many, "the same row again and again", same_row),
        _step(f"INSERT by {driver}", 1, one, "a round trip", nothing),
    ]
