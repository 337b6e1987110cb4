"""Every statement of the relay on a real database: what it returns, what it changes, what it refuses, and its plan."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import psycopg
import pytest

from relay.config import RelayConfig
from relay.errors import ConfigError, DatabaseTrouble
from relay.lane import Runs, digest_of
from relay.queries import Meta, Queries, connect, is_final, words_of
from tests.conftest import MakeDatabase
from tests.roles import ROLES, as_role

ONE, OTHER = UUID(int=1), UUID(int=2)
ALL = 10_000
MANY_BYTES = 1 << 40


def config_of(url: str, **settings: Any) -> RelayConfig:
    return RelayConfig(database_url=url, kafka={"bootstrap.servers": "nowhere:1"}, **settings)


class Outbox:
    """The database of a test: rows are written, and looked at, beside the relay's statements."""

    def __init__(self, url: str) -> None:
        self.url = url

    def rows(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(sql, parameters or None)
            return cursor.fetchall() if cursor.description else []

    def add(self, count: int, **columns: Any) -> list[int]:
        """Seqs of `count` new events."""
        values = {"type": "t", "topic": "topic", "key": "k", "value": b"v", **columns}
        names = ", ".join(values)
        marks = ", ".join(["%s"] * len(values))
        with psycopg.connect(self.url, autocommit=True) as connection:
            sql = f"INSERT INTO outbox.outbox (id, {names}) VALUES (gen_random_uuid(), {marks}) RETURNING seq"
            return [connection.execute(sql, list(values.values())).fetchall()[0][0] for _ in range(count)]

    def lane(self) -> tuple[Any, ...]:
        """batch, released, owner, halted."""
        return self.rows("SELECT batch, released, owner, halted FROM outbox.lane WHERE lane = 0")[0]

    def seqs(self) -> list[int]:
        return [seq for (seq,) in self.rows("SELECT seq FROM outbox.outbox ORDER BY seq")]


@pytest.fixture
def outbox(database: str) -> Outbox:
    return Outbox(database)


@pytest.fixture
async def queries(database: str) -> AsyncIterator[Queries]:
    pool = await connect(config_of(as_role(database, ROLES.relay)), 4)
    yield Queries(pool, "outbox")
    await pool.close()


@pytest.fixture
async def db(queries: Queries) -> AsyncIterator[Any]:
    async with queries.connection() as connection:
        yield connection


async def fetched(queries: Queries, db: Any, **arguments: Any) -> list[int]:
    given = {"lane": 0, "batch": 0, "floor": 0, "hidden": (), "rows": ALL, "size": MANY_BYTES, **arguments}
    return [row["seq"] for row in await queries.fetch(db, **given)]


async def advanced(queries: Queries, db: Any, runs: Runs, **arguments: Any) -> bool:
    given = {"lane": 0, "before": 0, "batch": 1, "runs": runs, "parked": {}, "owner": None, **arguments}
    return await queries.advance(db, **given)


# ---- at start --------------------------------------------------------------------------------------------------------


async def test_the_version_and_the_outbox_own_account_are_read(queries: Queries, outbox: Outbox) -> None:
    assert await queries.version() == "0001"
    [(name, uuid)] = outbox.rows("SELECT name, uuid FROM outbox.meta")
    assert await queries.meta() == Meta(name, uuid, 1)


async def test_a_schema_that_is_not_there_has_no_version(queries: Queries) -> None:
    assert await Queries(queries._pool, 'no"where').version() is None


async def test_an_outbox_without_its_own_account_is_refused(queries: Queries, outbox: Outbox) -> None:
    outbox.rows("DELETE FROM outbox.meta")
    with pytest.raises(ConfigError, match="outbox migrate"):
        await queries.meta()


async def test_a_name_that_must_be_quoted_is(queries: Queries, outbox: Outbox) -> None:
    outbox.rows('ALTER SCHEMA outbox RENAME TO "Out ""box"')
    renamed = Queries(queries._pool, 'Out "box')
    assert await renamed.version() == "0001"
    async with renamed.connection() as db:
        assert await fetched(renamed, db) == []
        assert await renamed.holders(db) == []


@pytest.mark.parametrize(
    ("url", "words"),
    [("/nowhere", "nowhere"), ("?sslmode=perhaps", "OUTBOX_DATABASE_URL"), ("x/nowhere", "OUTBOX_DATABASE_URL")],
)
async def test_a_database_that_waiting_does_not_mend_is_refused(database: str, url: str, words: str) -> None:
    base = database if url.startswith("?") else database.rsplit("/", 1)[0]
    with pytest.raises(ConfigError, match=words):
        await connect(config_of(base + url), 1)


async def test_a_database_that_is_away_is_trouble() -> None:
    with pytest.raises(DatabaseTrouble, match="cannot be reached"):
        await connect(config_of("postgresql://relay@127.0.0.1:1/nowhere"), 1)


# ---- leases ----------------------------------------------------------------------------------------------------------


async def test_a_lane_has_one_owner_at_a_time(queries: Queries) -> None:
    assert await queries.lease(0, ONE, 60)
    assert not await queries.lease(0, OTHER, 60)
    assert await queries.lease(0, ONE, 60)
    lane = await queries.lane(0)
    assert (lane.owner, lane.free, lane.halted) == (ONE, False, None)
    assert await queries.lanes() == [lane]


async def test_of_two_that_ask_at_once_one_gets_the_lane(queries: Queries) -> None:
    for _ in range(20):
        got = await asyncio.gather(*(queries.lease(0, uuid4(), 60) for _ in range(4)))
        assert sorted(got) == [False, False, False, True]
        owner = (await queries.lane(0)).owner
        assert owner is not None
        assert await queries.release(0, owner, True)


async def test_a_lease_runs_out_by_the_database_clock(queries: Queries) -> None:
    assert await queries.lease(0, ONE, 0)
    assert (await queries.lane(0)).free
    assert await queries.lease(0, OTHER, 60)
    assert not await queries.lease(0, ONE, 60)


@pytest.mark.parametrize("wrong", [-3_600.0, 3_600.0], ids=["behind", "ahead"])
async def test_the_relay_s_clock_plays_no_part(
    queries: Queries, outbox: Outbox, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + wrong)
    left = "SELECT extract(epoch FROM lease_until - clock_timestamp()) BETWEEN 0 AND 60 FROM outbox.lane"
    assert await queries.lease(0, ONE, 60)
    assert outbox.rows(left) == [(True,)]
    assert await queries.renew([0], ONE, 60)
    assert outbox.rows(left) == [(True,)]


async def test_only_leases_that_are_still_ours_are_renewed(queries: Queries, outbox: Outbox) -> None:
    assert await queries.lease(0, ONE, 0)
    assert await queries.renew([0], ONE, 60) == {0}, "expired, but nobody else has it"
    assert not (await queries.lane(0)).free
    assert await queries.renew([0], OTHER, 60) == set()
    assert await queries.renew([], ONE, 60) == set()
    assert await queries.renew([0, 1, 7], ONE, 60) == {0}


async def test_only_the_owner_releases_and_only_a_clean_release_is_noted(queries: Queries, outbox: Outbox) -> None:
    outbox.rows("UPDATE outbox.lane SET released = false")
    assert await queries.lease(0, ONE, 60)
    assert not await queries.release(0, OTHER, True)
    assert outbox.lane() == (0, False, ONE, None)
    assert await queries.release(0, ONE, False)
    assert outbox.lane() == (0, False, None, None)
    assert not await queries.release(0, ONE, True), "it was released already"
    assert await queries.lease(0, ONE, 60)
    assert await queries.release(0, ONE, True)
    assert outbox.lane() == (0, True, None, None)


async def test_a_release_that_is_not_clean_takes_nothing_back(queries: Queries, outbox: Outbox) -> None:
    """A lane is taken, and given up before its first step: Kafka may still have forgotten its progress."""
    assert await queries.lease(0, ONE, 60)
    assert await queries.release(0, ONE, False)
    assert outbox.lane() == (0, True, None, None)


async def test_a_halted_lane_is_nobody_s_until_a_person_decides(queries: Queries, outbox: Outbox) -> None:
    assert await queries.lease(0, ONE, 60)
    assert not await queries.halt(0, OTHER, "not yours")
    assert await queries.halt(0, ONE, "restored")
    assert not await queries.lease(0, ONE, 60)
    assert (await queries.lane(0)).halted == "restored"
    outbox.rows("UPDATE outbox.lane SET halted = NULL")
    assert await queries.lease(0, OTHER, 60)


async def test_a_lane_that_is_not_there_is_trouble(queries: Queries) -> None:
    with pytest.raises(DatabaseTrouble, match="lane 5"):
        await queries.lane(5)


async def test_relays_are_counted_while_they_say_that_they_live(queries: Queries, outbox: Outbox) -> None:
    assert await queries.heartbeat(ONE, "host", 1, "0.1", 30) == 1
    assert await queries.heartbeat(OTHER, "host", 2, "0.1", 30) == 2
    assert await queries.heartbeat(ONE, "host", 1, "0.1", 30) == 2
    outbox.rows("UPDATE outbox.relay SET seen_at = now() - interval '31 s' WHERE id = %s", OTHER)
    assert await queries.heartbeat(ONE, "host", 1, "0.1", 30) == 1
    assert outbox.rows("SELECT id FROM outbox.relay") == [(ONE,)]
    await queries.farewell(ONE)
    assert outbox.rows("SELECT id FROM outbox.relay") == []


async def test_two_relays_that_forget_a_third_do_not_hinder_each_other(queries: Queries, outbox: Outbox) -> None:
    for _ in range(10):
        outbox.rows(
            "INSERT INTO outbox.relay SELECT gen_random_uuid(), 'h', 1, 'v', now(), now() - interval '1 h'"
            " FROM generate_series(1, 20)"
        )
        await asyncio.gather(*(queries.heartbeat(UUID(int=n), "host", n, "v", 30) for n in range(1, 5)))
    assert await queries.heartbeat(ONE, "host", 1, "v", 30) == 4


# ---- fetch -----------------------------------------------------------------------------------------------------------


async def test_rows_come_in_seq_order_above_the_floor_without_hidden_ones(
    queries: Queries, db: Any, outbox: Outbox
) -> None:
    first, *_ = outbox.add(10)
    assert await fetched(queries, db) == list(range(first, first + 10))
    assert await fetched(queries, db, floor=first + 3) == list(range(first + 4, first + 10))
    hidden = ((first, first + 2), (first + 5, first + 6))
    assert await fetched(queries, db, hidden=hidden) == [first + n for n in (2, 3, 4, 6, 7, 8, 9)]
    assert await fetched(queries, db, hidden=hidden, rows=3) == [first + n for n in (2, 3, 4)]
    assert await fetched(queries, db, lane=1) == []


async def test_a_row_is_fetched_as_it_was_written(queries: Queries, db: Any, outbox: Outbox) -> None:
    id_ = uuid4()
    outbox.rows(
        "INSERT INTO outbox.outbox (id, type, topic, key, value, fingerprint, headers, created_at) VALUES"
        " (%s, 'type', 'topic', 'clé', '\\x00ff', -5, '{\"a\": \"b\"}', '2024-02-29T12:00:00.123Z')",
        id_,
    )
    [row] = await queries.fetch(db, 0, 0, 0, (), ALL, MANY_BYTES)
    created = 1709208000123
    assert tuple(row)[1:] == (str(id_), "type", "topic", "clé", b"\x00\xff", -5, '{"a": "b"}', created)


async def test_a_row_may_leave_out_what_may_be_null(queries: Queries, db: Any, outbox: Outbox) -> None:
    outbox.rows("INSERT INTO outbox.outbox (id, type, topic) VALUES (gen_random_uuid(), '', '')")
    [row] = await queries.fetch(db, 0, 0, 0, (), ALL, MANY_BYTES)
    assert tuple(row)[2:8] == ("", "", None, None, None, None)


async def test_a_moment_without_end_is_fetched_as_none(queries: Queries, db: Any, outbox: Outbox) -> None:
    for moment in ("infinity", "-infinity", "1969-12-31T23:59:59Z", "294276-01-01"):
        outbox.add(1, created_at=moment)
    rows = await queries.fetch(db, 0, 0, 0, (), ALL, MANY_BYTES)
    assert [row["created"] for row in rows] == [None, None, -1000, 9224286393600000]


async def test_uncommitted_and_rolled_back_rows_are_not_fetched(queries: Queries, db: Any, outbox: Outbox) -> None:
    with psycopg.connect(outbox.url) as writer:
        writer.execute("INSERT INTO outbox.outbox (id, type, topic) VALUES (gen_random_uuid(), '', '')")
        [later] = outbox.add(1)
        assert await fetched(queries, db) == [later]
        writer.rollback()
    assert await fetched(queries, db) == [later]


async def test_bytes_bound_a_batch_before_a_value_is_read(queries: Queries, db: Any, outbox: Outbox) -> None:
    """Large values lie outside the row (TOAST), and compress: what counts is the size that will be read."""
    kib = 1024
    first = outbox.add(1, value=bytes(300 * kib))[0]  # compresses to nothing
    outbox.add(4, value=b"%")
    outbox.rows(
        "INSERT INTO outbox.outbox (id, type, topic, value) SELECT gen_random_uuid(), '', '',"
        " (SELECT decode(string_agg(md5(random()::text), ''), 'hex') FROM generate_series(1, 6400))"  # 100 KiB
        " FROM generate_series(1, 10)"
    )

    async def taken(size: int, floor: int = 0) -> int:
        return len(await fetched(queries, db, size=size, floor=floor))

    assert await taken(1) == 1, "one row at least"
    assert await taken(300 * kib) == 1
    assert await taken(300 * kib + 1) == 2
    assert await taken(300 * kib + 4) == 5
    assert await taken(300 * kib + 5) == 6, "the row that goes over the limit is the last one"
    assert await taken(300 * kib + 4 + 100 * kib) == 6
    assert await taken(MANY_BYTES) == 15
    assert await taken(250 * kib, floor=first + 4) == 3
    assert await taken(MANY_BYTES, floor=first + 14) == 0


async def test_large_values_beyond_the_limit_are_not_read_from_disk(queries: Queries, db: Any, outbox: Outbox) -> None:
    outbox.rows(
        "INSERT INTO outbox.outbox (id, type, topic, value) SELECT gen_random_uuid(), '', '',"
        " (SELECT decode(string_agg(md5(random()::text), ''), 'hex') FROM generate_series(1, 6400) WHERE g > 0)"
        " FROM generate_series(1, 200) AS g"
    )
    toast = "SELECT coalesce(sum(heap_blks_read + heap_blks_hit), 0) FROM pg_statio_all_tables WHERE relname = %s"
    name = outbox.rows(
        "SELECT t.relname FROM pg_class c JOIN pg_class t ON t.oid = c.reltoastrelid"
        " WHERE c.oid = 'outbox.outbox'::regclass"
    )[0][0]
    outbox.rows("SELECT pg_stat_force_next_flush()")
    before = outbox.rows(toast, name)[0][0]
    await fetched(queries, db, size=1)
    await db.fetchval("SELECT pg_stat_force_next_flush()")
    await db.fetchval("SELECT 1")
    read = outbox.rows(toast, name)[0][0] - before
    assert read < 50, f"{read} blocks of 8 KiB were read for one value of 100 KiB"


async def test_tombstones_weigh_nothing(queries: Queries, db: Any, outbox: Outbox) -> None:
    outbox.add(5, value=None)
    assert len(await fetched(queries, db, size=1)) == 5


async def test_a_lane_that_is_elsewhere_gives_no_rows(queries: Queries, db: Any, outbox: Outbox) -> None:
    """A database restored behind a pooler; one batch further is a delete under way."""
    outbox.add(2)
    outbox.rows("UPDATE outbox.lane SET batch = 10")
    assert [len(await fetched(queries, db, batch=batch)) for batch in (8, 9, 10, 11)] == [0, 2, 2, 0]


async def test_rows_are_fetched_of_one_lane_only(make_database: MakeDatabase) -> None:
    outbox = Outbox(make_database(4))
    for number in range(40):
        outbox.add(1, key=f"key-{number}")
    outbox.add(40, key=None)
    pool = await connect(config_of(outbox.url), 1)
    queries = Queries(pool, "outbox")
    async with queries.connection() as db:
        lanes = [await fetched(queries, db, lane=lane) for lane in range(4)]
    await pool.close()
    assert sorted(chain(*lanes)) == outbox.seqs()
    assert all(lanes)


# ---- advance ---------------------------------------------------------------------------------------------------------


async def test_the_lane_moves_and_its_rows_go_together(queries: Queries, db: Any, outbox: Outbox) -> None:
    first, *_ = outbox.add(10)
    assert await advanced(queries, db, ((first, first + 2), (first + 4, first + 5)))
    assert outbox.lane()[:2] == (1, False)
    assert outbox.seqs() == [first + n for n in (2, 3, 5, 6, 7, 8, 9)]


async def test_a_lane_that_moved_on_is_left_alone(queries: Queries, db: Any, outbox: Outbox) -> None:
    first, *_ = outbox.add(3)
    outbox.rows("UPDATE outbox.lane SET batch = 7")
    assert not await advanced(queries, db, ((first, first + 3),), parked={first: "error"})
    assert outbox.lane()[:2] == (7, True)
    assert len(outbox.seqs()) == 3
    assert outbox.rows("SELECT * FROM outbox.dead_event") == []
    assert await advanced(queries, db, ((first, first + 3),), before=7, batch=8)
    assert not await advanced(queries, db, ((first, first + 3),), before=7, batch=8)


async def test_an_empty_batch_moves_the_lane_only(queries: Queries, db: Any, outbox: Outbox) -> None:
    outbox.add(3)
    assert await advanced(queries, db, ())
    assert outbox.lane()[:2] == (1, False)
    assert len(outbox.seqs()) == 3


async def test_where_an_owner_is_named_the_lane_must_be_its(queries: Queries, db: Any, outbox: Outbox) -> None:
    first, *_ = outbox.add(1)
    assert not await advanced(queries, db, ((first, first + 1),), owner=ONE)
    await queries.lease(0, OTHER, 60)
    assert not await advanced(queries, db, ((first, first + 1),), owner=ONE)
    assert len(outbox.seqs()) == 1
    assert await advanced(queries, db, ((first, first + 1),), owner=OTHER)


async def test_rows_of_other_lanes_are_not_deleted(make_database: MakeDatabase) -> None:
    outbox = Outbox(make_database(2))
    for number in range(20):
        outbox.add(1, key=f"key-{number}")
    lanes = dict(outbox.rows("SELECT seq, lane FROM outbox.outbox"))
    pool = await connect(config_of(outbox.url), 1)
    queries = Queries(pool, "outbox")
    async with queries.connection() as db:
        assert await advanced(queries, db, ((min(lanes), max(lanes) + 1),), parked={max(lanes): "elsewhere"}, lane=1)
    await pool.close()
    assert outbox.seqs() == [seq for seq, lane in lanes.items() if lane == 0]
    assert outbox.rows("SELECT lane, batch FROM outbox.lane ORDER BY 1") == [(0, 0), (1, 1)]


async def test_of_two_that_advance_at_once_one_does(queries: Queries, outbox: Outbox) -> None:
    async def attempt(before: int) -> bool:
        async with queries.connection() as db:
            return await advanced(queries, db, (), before=before, batch=before + 1)

    for before in range(20):
        assert sorted(await asyncio.gather(*(attempt(before) for _ in range(3)))) == [False, False, True]


async def test_parked_rows_are_moved_whole(queries: Queries, db: Any, outbox: Outbox) -> None:
    first, *_ = outbox.add(3, fingerprint=9, headers='{"a": "b"}', value=b"\x00")
    columns = "id, lane, seq, type, topic, key, value, fingerprint, headers, created_at"
    before = outbox.rows(f"SELECT {columns} FROM outbox.outbox WHERE seq = %s", first + 1)
    parked = {first + 1: "too large"}
    assert await advanced(queries, db, ((first, first + 1), (first + 2, first + 3)), parked=parked)
    assert outbox.seqs() == []
    assert outbox.rows(f"SELECT {columns} FROM outbox.dead_event") == before
    assert outbox.rows("SELECT error, attempts FROM outbox.dead_event") == [("too large", 1)]
    assert await queries.held(0) == {("topic", "k")}
    assert await queries.held(1) == set()


async def test_an_event_that_is_parked_again_counts_its_attempts(queries: Queries, db: Any, outbox: Outbox) -> None:
    [first] = outbox.add(1)
    assert await advanced(queries, db, (), parked={first: "once"})
    outbox.rows(
        "INSERT INTO outbox.outbox (id, type, topic, key, value) SELECT id, type, topic, key, value"
        " FROM outbox.dead_event"
    )
    assert await advanced(queries, db, (), before=1, batch=2, parked={outbox.seqs()[0]: "twice"})
    assert outbox.rows("SELECT error, attempts FROM outbox.dead_event") == [("twice", 2)]


async def test_one_event_written_twice_is_parked_once(queries: Queries, db: Any, outbox: Outbox) -> None:
    id_ = uuid4()
    for _ in range(2):
        outbox.rows("INSERT INTO outbox.outbox (id, type, topic, key) VALUES (%s, 't', 't', 'k')", id_)
    assert await advanced(queries, db, (), parked=dict.fromkeys(outbox.seqs(), "no"))
    assert outbox.seqs() == []
    assert outbox.rows("SELECT id FROM outbox.dead_event") == [(id_,)]


async def test_events_without_a_key_hold_nothing_back(queries: Queries, db: Any, outbox: Outbox) -> None:
    [first] = outbox.add(1, key=None)
    assert await advanced(queries, db, (), parked={first: "no"})
    assert await queries.held(0) == set()


async def test_ids_of_runs_come_in_order_and_their_digest_tells_events_apart(queries: Queries, outbox: Outbox) -> None:
    first, *_ = outbox.add(5)
    wanted = [str(id_) for (id_,) in outbox.rows("SELECT id FROM outbox.outbox ORDER BY seq")]
    found = await queries.ids(0, ((first, first + 2), (first + 3, first + 5)))
    assert found == wanted[:2] + wanted[3:]
    assert digest_of(found) != digest_of(wanted)
    assert await queries.ids(0, ()) == []


@pytest.mark.parametrize(("setting", "used"), [("off", "on"), ("local", "local"), ("remote_apply", "remote_apply")])
async def test_the_commit_is_durable_whatever_the_database_says(database: str, setting: str, used: str) -> None:
    """A lane whose last batch was lost in a power cut would halt. A trigger that fires at the commit sees it."""
    outbox = Outbox(database)
    outbox.rows(f"ALTER DATABASE {database.rsplit('/', 1)[1]} SET synchronous_commit = '{setting}'")
    outbox.rows("CREATE TABLE seen (setting text)")
    outbox.rows(
        "CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO seen VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$"
    )
    outbox.rows(
        "CREATE CONSTRAINT TRIGGER see AFTER UPDATE ON outbox.lane DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION see()"
    )
    pool = await connect(config_of(database), 1)
    queries = Queries(pool, "outbox")
    async with queries.connection() as db:
        assert await db.fetchval("SELECT current_setting('synchronous_commit')") == setting
        assert await advanced(queries, db, ())
        assert not await advanced(queries, db, ())
        assert await db.fetchval("SELECT current_setting('synchronous_commit')") == setting, "for that transaction only"
    await pool.close()
    assert outbox.rows("SELECT * FROM seen") == [(used,)]


# ---- holders ---------------------------------------------------------------------------------------------------------

INSERT = "INSERT INTO outbox.outbox (id, type, topic) VALUES (gen_random_uuid(), '', '')"


async def test_a_writer_is_a_holder_until_its_transaction_ends(queries: Queries, db: Any, outbox: Outbox) -> None:
    assert await queries.holders(db) == []
    with psycopg.connect(outbox.url) as writer:
        writer.execute(INSERT)
        [holder] = await queries.holders(db)
        writer.execute(INSERT)
        assert await queries.holders(db) == [holder]
        writer.rollback()
        assert await queries.holders(db) == []
        writer.execute(INSERT)
        [another] = await queries.holders(db)
        assert another != holder
        writer.commit()
    assert await queries.holders(db) == []


async def test_a_rollback_to_a_savepoint_keeps_the_writer_a_holder_if_it_wrote_before(
    queries: Queries, db: Any, outbox: Outbox
) -> None:
    with psycopg.connect(outbox.url) as writer:
        writer.execute(INSERT)
        writer.execute("SAVEPOINT one")
        writer.execute(INSERT)
        writer.execute("ROLLBACK TO one")
        assert len(await queries.holders(db)) == 1


async def test_readers_and_writers_of_other_tables_are_no_holders(queries: Queries, db: Any, outbox: Outbox) -> None:
    with psycopg.connect(outbox.url) as reader, psycopg.connect(outbox.url) as writer:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT count(*) FROM outbox.outbox")
        writer.execute("CREATE TABLE other AS SELECT 1")
        writer.execute("UPDATE outbox.lane SET batch = batch")
        assert await queries.holders(db) == []


async def test_a_writer_of_an_outbox_in_another_database_is_no_holder(
    queries: Queries, db: Any, make_database: MakeDatabase
) -> None:
    """Databases copied from one template have the same oids."""
    with psycopg.connect(make_database()) as writer:
        writer.execute(INSERT)
        assert await queries.holders(db) == []


async def test_a_prepared_transaction_is_a_holder_without_a_connection(
    queries: Queries, db: Any, outbox: Outbox
) -> None:
    name = f"prepared-{uuid4()}"
    with psycopg.connect(outbox.url) as writer:
        writer.execute(INSERT)
        writer.execute(f"PREPARE TRANSACTION '{name}'")
    [holder] = await queries.holders(db)
    assert "/" in holder
    outbox.rows(f"COMMIT PREPARED '{name}'")
    assert await queries.holders(db) == []
    assert len(outbox.seqs()) == 1


async def test_the_relay_s_own_delete_is_a_holder_only_while_it_runs(queries: Queries, db: Any, outbox: Outbox) -> None:
    first, *_ = outbox.add(1)
    async with queries.connection() as writing:
        transaction = writing.transaction()
        await transaction.start()
        assert await advanced(queries, writing, ((first, first + 1),))
        assert len(await queries.holders(db)) == 1
        await transaction.commit()
    assert await queries.holders(db) == []


# ---- plans -----------------------------------------------------------------------------------------------------------


class Explained:
    """Stands for a connection: keeps the generic plan of what it is asked, the one that the relay's connections use."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self.plans: list[str] = []

    async def fetch(self, sql: str, *arguments: Any) -> list[Any]:
        self._explain(sql, len(arguments))
        return []

    async def fetchval(self, sql: str, *arguments: Any) -> Any:
        self._explain(sql, len(arguments))

    def _explain(self, sql: str, arguments: int) -> None:
        with psycopg.connect(self._outbox.url, autocommit=True) as connection:
            connection.execute("SET plan_cache_mode = force_generic_plan")
            connection.execute(f"PREPARE statement AS {sql}".encode())
            nulls = ", ".join(["NULL"] * arguments)
            rows = connection.execute(f"EXPLAIN EXECUTE statement ({nulls})".encode()).fetchall()
        self.plans.append("\n".join(row[0] for row in rows))


SEED = """
INSERT INTO outbox.outbox (id, type, topic, key, value)
SELECT gen_random_uuid(), 't', 'topic', 'key-' || mod(g, 1000), '\\x0102' FROM generate_series(1, rows) AS g
"""


SEED_200K = SEED.replace("rows", "200000")
STATISTICS = {
    "true": (SEED_200K, "ANALYZE outbox.outbox", "ANALYZE outbox.lane"),
    "empty": ("VACUUM ANALYZE outbox.outbox", "ANALYZE outbox.lane", SEED_200K),
    "none": (SEED_200K,),
    "full of dead rows": (SEED_200K, "ANALYZE outbox.outbox", "DELETE FROM outbox.outbox WHERE seq < 190000"),
}
"""What the planner may believe of 200,000 rows: the truth, that the table is empty, nothing, that it is full."""


@pytest.mark.parametrize("known", ["true", "empty", "none", "full of dead rows"])
async def test_hot_statements_go_by_the_primary_key_whatever_the_statistics_say(
    queries: Queries, db: Any, outbox: Outbox, known: str
) -> None:
    outbox.rows("ALTER TABLE outbox.outbox SET (autovacuum_enabled = off)")
    for statement in STATISTICS[known]:
        outbox.rows(statement)
    [low] = outbox.rows("SELECT min(seq) FROM outbox.outbox")[0]
    explained = Explained(outbox)
    hidden = tuple((low + 10 * n, low + 10 * n + 3) for n in range(100))
    await queries.fetch(explained, 0, 0, low, hidden, 8_000, 1 << 24)
    await queries.advance(explained, 0, 0, 1, ((low, low + 8_000),), {}, None)
    await queries.advance(explained, 0, 0, 1, hidden, {low + 5: "no"}, ONE)
    for plan in explained.plans:
        assert "Seq Scan on outbox" not in plan, plan
        conditions = [
            (node, line) for node, line in pairwise(plan.splitlines()) if "Cond: " in line and "lane = " in line
        ]
        assert [line for _, line in conditions if "seq" in line], plan
        assert not [node for node, line in conditions if "seq" not in line and "lane_pkey" not in node], plan
    fetch = explained.plans[0]
    assert "Index Scan using outbox_pkey on outbox" in fetch
    assert "Sort" not in fetch, fetch
    assert "Materialize" not in explained.plans[1], explained.plans[1]


@pytest.mark.parametrize("known", ["true", "empty", "none"])
async def test_a_fetch_and_a_delete_touch_their_rows_and_no_more(
    queries: Queries, db: Any, outbox: Outbox, known: str
) -> None:
    """Measured rather than believed: blocks touched by the sixth execution, when the plan has become generic."""
    outbox.rows("ALTER TABLE outbox.outbox SET (autovacuum_enabled = off)")
    for statement in STATISTICS[known]:
        outbox.rows(statement)
    [low] = outbox.rows("SELECT min(seq) FROM outbox.outbox")[0]
    for batch in range(6):
        rows = await queries.fetch(db, 0, batch, low - 1, (), 500, 1 << 24)
        assert len(rows) == 500
        runs = ((rows[0]["seq"], rows[-1]["seq"] + 1),)
        before = await _blocks(db, outbox)
        assert await advanced(queries, db, runs, before=batch, batch=batch + 1)
        low = rows[-1]["seq"] + 1
    deleted = await _blocks(db, outbox) - before
    before = await _blocks(db, outbox)
    assert len(await queries.fetch(db, 0, 6, low - 1, (), 500, 1 << 24)) == 500
    read = await _blocks(db, outbox) - before
    assert deleted < 2_000, f"a delete of 500 rows touched {deleted} blocks"
    assert read < 1_000, f"a fetch of 500 rows touched {read} blocks"


async def test_a_plan_that_is_kept_from_when_the_table_was_empty_is_good_when_it_has_grown(
    queries: Queries, db: Any, outbox: Outbox
) -> None:
    outbox.rows("ALTER TABLE outbox.outbox SET (autovacuum_enabled = off)")
    outbox.add(1)
    outbox.rows("DELETE FROM outbox.outbox")
    outbox.rows("VACUUM ANALYZE outbox.outbox")  # no page is left, and PostgreSQL knows it
    for batch in range(6):  # the sixth plan is generic, and stays
        assert await fetched(queries, db, batch=batch) == []
        assert await advanced(queries, db, ((1, 2),), before=batch, batch=batch + 1)
    outbox.rows(SEED_200K)
    [low] = outbox.rows("SELECT min(seq) FROM outbox.outbox")[0]
    before = await _blocks(db, outbox)
    assert len(await queries.fetch(db, 0, 6, low + 100_000, (), 500, 1 << 24)) == 500
    read = await _blocks(db, outbox) - before
    assert await advanced(queries, db, ((low + 100_000, low + 100_500),), before=6, batch=7)
    deleted = await _blocks(db, outbox) - before - read
    assert read < 1_000, f"a fetch of 500 rows touched {read} blocks"
    assert deleted < 2_000, f"a delete of 500 rows touched {deleted} blocks"


async def _blocks(db: Any, outbox: Outbox) -> int:
    """Blocks of the outbox and its index that this server's processes have touched."""
    await db.fetchval("SELECT pg_stat_force_next_flush()")
    await db.fetchval("SELECT 1")
    sql = (
        "SELECT heap_blks_read + heap_blks_hit + idx_blks_read + idx_blks_hit FROM pg_statio_all_tables"
        " WHERE relid = 'outbox.outbox'::regclass"
    )
    return int(outbox.rows(sql)[0][0])


async def test_deletes_of_scattered_rows_do_not_read_what_lies_between(
    queries: Queries, db: Any, outbox: Outbox
) -> None:
    outbox.rows(SEED.replace("rows", "100000"))
    [low] = outbox.rows("SELECT min(seq) FROM outbox.outbox")[0]
    runs = tuple((low + 50 * n, low + 50 * n + 1) for n in range(2_000))
    before = await _blocks(db, outbox)
    assert await advanced(queries, db, runs)
    touched = await _blocks(db, outbox) - before
    assert outbox.rows("SELECT count(*) FROM outbox.outbox") == [(98_000,)]
    assert touched < 2_000 * 10, f"a delete of 2,000 rows touched {touched} blocks"


async def test_a_statement_that_takes_too_long_is_given_up(database: str) -> None:
    pool = await connect(config_of(database, database_timeout=0.2), 2)
    queries = Queries(pool, "outbox")
    with psycopg.connect(database) as holder:
        holder.execute("SELECT * FROM outbox.lane FOR UPDATE")
        with pytest.raises(TimeoutError):
            await queries.lease(0, ONE, 60)
    assert await queries.lease(0, ONE, 60), "the pool has connections that work"
    await pool.close()


async def test_without_prepared_statements_the_same_is_true(database: str) -> None:
    pool = await connect(config_of(database, prepared_statements=False), 1)
    queries = Queries(pool, "outbox")
    outbox = Outbox(database)
    first, *_ = outbox.add(3)
    async with queries.connection() as db:
        assert await fetched(queries, db) == [first, first + 1, first + 2]
        assert await advanced(queries, db, ((first, first + 3),))
        assert await db.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE name <> ''") <= 1
    await pool.close()
    assert outbox.seqs() == []


async def test_what_is_said_of_an_error_holds_no_row(database: str, outbox: Outbox) -> None:
    outbox.rows("CREATE TABLE own (secret text CHECK (secret = ''))")
    pool = await connect(config_of(database), 1)
    try:
        with pytest.raises(asyncpg.CheckViolationError, match=r"Failing row contains .hunter2.") as caught:
            await pool.execute("INSERT INTO own VALUES ('hunter2')")
    finally:
        pool.terminate()
    assert words_of(caught.value) == 'new row for relation "own" violates check constraint "own_secret_check"'
    assert words_of(TimeoutError()) == "TimeoutError"


def test_a_password_that_is_refused_is_final_unless_a_file_may_bring_another() -> None:
    plain = config_of("postgresql://h/d")
    filed = replace(plain, files={"database_password": Path("x")})
    other = replace(plain, files={"kafka.sasl.password": Path("x")})
    password, grant = asyncpg.InvalidPasswordError("no"), asyncpg.InsufficientPrivilegeError("no")
    assert [is_final(password, config) for config in (plain, filed, other)] == [True, False, True]
    assert [is_final(grant, config) for config in (plain, filed)] == [True, True]
    assert not is_final(ConnectionRefusedError(), plain)


@pytest.mark.parametrize("url", ["postgresql://me:hunter2/3@127.0.0.1/d", "postgresql://h:hunter2/d"])
async def test_a_url_whose_parts_are_mixed_up_is_refused_without_a_word_of_it(url: str) -> None:
    with pytest.raises(ConfigError, match="percent-encoded") as caught:
        await connect(config_of(url), 1)
    assert "hunter" not in str(caught.value)


async def test_a_mode_of_tls_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"OUTBOX_DATABASE_URL cannot be used: .*verify-full"):
        await connect(config_of("postgresql://127.0.0.1/d?sslmode=full"), 1)
