"""The relay's SQL: one typed function per statement, whose body is the statement. The only place that speaks to the
database.

Each statement is a transaction of its own. None needs session state, so all pass PgBouncer in transaction mode. Times
are the database's: clocks of relays play no part.
"""

import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from relay.config import ENCODE, RelayConfig
from relay.errors import ConfigError, DatabaseTrouble
from relay.lane import Runs

TROUBLE = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What a database that is away, slow or restarting raises through asyncpg."""

REFUSED = (
    asyncpg.InvalidCatalogNameError,
    asyncpg.InvalidAuthorizationSpecificationError,  # and InvalidPasswordError
    asyncpg.InsufficientPrivilegeError,
    asyncpg.UndefinedTableError,
    asyncpg.InvalidSchemaNameError,
    asyncpg.UndefinedColumnError,
)
"""What waiting does not mend: a name, a password, a grant or a migration is missing."""


def is_final(error: BaseException, config: RelayConfig) -> bool:
    """Whether waiting does not mend it. A password that stands in a file may be about to change there."""
    passing = config.database_from_file and isinstance(error, asyncpg.InvalidAuthorizationSpecificationError)
    return isinstance(error, REFUSED) and not passing


def words_of(error: BaseException) -> str:
    """An error in words that hold no payload: PostgreSQL's DETAIL, which is left out, may show a row."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the database's certificate is not trusted: {error.verify_message.rstrip('.')}. See to sslrootcert and to "
            "the host's name in OUTBOX_DATABASE_URL"
        )
    said = error.args[0] if isinstance(error, asyncpg.PostgresError) and error.args else error
    return str(said) or type(error).__name__


_HERE = (
    "(SELECT concat(system_identifier, '/', oid) FROM pg_control_system(), pg_database"
    " WHERE datname = current_database())"
)
"""As `outbox.identity.HERE`, whose import would bring SQLAlchemy into the relay."""


@dataclass(frozen=True, slots=True)
class Meta:
    """What the outbox says of itself; set when it was created."""

    name: str
    uuid: UUID
    lanes: int
    copied: bool = False
    """This is not the database that the outbox lives in, but a copy of it."""

    def refuse_copy(self) -> None:
        """Raises ConfigError for a copy: with the original's name it would fence the original, and publish its
        events."""
        if self.copied:
            raise ConfigError(
                f"this database is a copy of the outbox {self.name}: `outbox rename NEW_NAME` makes it an outbox of "
                "its own, beside the original. If the outbox has moved here, and the original never runs again: "
                "`relay resolve --apply --adopt`"
            )


@dataclass(frozen=True, slots=True)
class LaneRow:
    """A lane as the database knows it."""

    lane: int
    batch: int
    released: bool
    owner: UUID | None
    free: bool
    """Nobody's, or its lease ran out."""
    halted: str | None


class Queries:
    """The statements of one outbox (a SQL schema) over a pool of connections."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", schema: str) -> None:
        self._pool = pool
        self._schema = '"' + schema.replace('"', '""') + '"'

    def connection(self) -> AbstractAsyncContextManager[Any]:
        """A connection of the pool, for a caller who makes many statements."""
        return self._pool.acquire()

    # ---- at start ----------------------------------------------------------------------------------------------------

    async def version(self) -> str | None:
        """The revision of the outbox's tables; None where there are none."""
        s = self._schema
        if await self._pool.fetchval("SELECT to_regclass($1)", f"{s}.alembic_version") is None:
            return None
        return await self._pool.fetchval(f"SELECT version_num FROM {s}.alembic_version")  # type: ignore[no-any-return]

    async def meta(self) -> Meta:
        row = await self._pool.fetchrow(f"SELECT name, uuid, lanes, home <> {_HERE} AS copied FROM {self._schema}.meta")
        if row is None:
            raise ConfigError(
                f"{self._schema}.meta is empty: the outbox was not created by a migration. Run `outbox migrate`"
            )
        return Meta(row["name"], UUID(bytes=row["uuid"].bytes), row["lanes"], row["copied"])

    # ---- leases ------------------------------------------------------------------------------------------------------

    async def lanes(self) -> list[LaneRow]:
        """Every lane that there is, in order."""
        rows = await self._pool.fetch(
            f"""
            SELECT lane, batch, released, owner, owner IS NULL OR lease_until < clock_timestamp() AS free, halted
              FROM {self._schema}.lane WHERE lane < (SELECT lanes FROM {self._schema}.meta) ORDER BY lane
            """
        )
        return [_lane_row(row) for row in rows]

    async def lane(self, lane: int) -> LaneRow:
        """One lane."""
        row = await self._pool.fetchrow(
            f"""
            SELECT lane, batch, released, owner, owner IS NULL OR lease_until < clock_timestamp() AS free, halted
              FROM {self._schema}.lane WHERE lane = $1
            """,
            lane,
        )
        if row is None:
            raise DatabaseTrouble(f"lane {lane} is not there any more")
        return _lane_row(row)

    async def lease(self, lane: int, owner: UUID, seconds: float) -> bool:
        """Step 1: have the lane for `seconds`, if it is free or ours. False: another relay has it, it is halted, or
        there is no such lane any more."""
        status = await self._pool.execute(
            f"""
            UPDATE {self._schema}.lane SET owner = $2, lease_until = clock_timestamp() + make_interval(secs => $3)
             WHERE lane = $1 AND halted IS NULL AND (owner IS NULL OR owner = $2 OR lease_until < clock_timestamp())
               AND lane < (SELECT lanes FROM {self._schema}.meta)
            """,
            lane,
            owner,
            seconds,
        )
        return status == "UPDATE 1"

    async def renew(self, lanes: Sequence[int], owner: UUID, seconds: float) -> set[int]:
        """Prolong the leases of those `lanes` that are still ours; those are returned."""
        rows = await self._pool.fetch(
            f"""
            UPDATE {self._schema}.lane SET lease_until = clock_timestamp() + make_interval(secs => $3)
             WHERE lane = ANY($1::smallint[]) AND owner = $2 RETURNING lane
            """,
            lanes,
            owner,
            seconds,
        )
        return {row["lane"] for row in rows}

    async def release(self, lane: int, owner: UUID, clean: bool) -> bool:
        """Give the lane up. `clean`: nothing is under way or in doubt, so that Kafka may forget its progress."""
        status = await self._pool.execute(
            f"""
            UPDATE {self._schema}.lane SET owner = NULL, lease_until = NULL, released = released OR $3
             WHERE lane = $1 AND owner = $2
            """,
            lane,
            owner,
            clean,
        )
        return status == "UPDATE 1"

    async def seize(self, lane: int, owner: UUID, seconds: float) -> bool:
        """As `lease`, but from whoever has it; that one notices within a third of its lease. False: it is halted."""
        status = await self._pool.execute(
            f"""
            UPDATE {self._schema}.lane SET owner = $2, lease_until = clock_timestamp() + make_interval(secs => $3)
             WHERE lane = $1 AND halted IS NULL
            """,
            lane,
            owner,
            seconds,
        )
        return status == "UPDATE 1"

    async def halt(self, lane: int, owner: UUID, reason: str) -> bool:
        """Stop the lane for a person to look at. Nothing takes it until `halted` is null again."""
        status = await self._pool.execute(
            f"""
            UPDATE {self._schema}.lane SET halted = $3, owner = NULL, lease_until = NULL
             WHERE lane = $1 AND owner = $2
            """,
            lane,
            owner,
            reason,
        )
        return status == "UPDATE 1"

    # ---- relays ------------------------------------------------------------------------------------------------------

    async def heartbeat(self, relay: UUID, host: str, pid: int, version: str, forget_after: float) -> int:
        """Say that this relay lives, forget those that were silent for long; the number of live ones is returned."""
        return await self._pool.fetchval(  # type: ignore[no-any-return]
            f"""
            WITH gone AS (
                DELETE FROM {self._schema}.relay
                 WHERE id <> $1 AND seen_at < clock_timestamp() - make_interval(secs => $5)),
            own AS (
                INSERT INTO {self._schema}.relay (id, host, pid, version, started_at, seen_at)
                VALUES ($1, $2, $3, $4, clock_timestamp(), clock_timestamp())
                ON CONFLICT (id) DO UPDATE SET seen_at = excluded.seen_at)
            SELECT 1 + count(*) FROM {self._schema}.relay
             WHERE id <> $1 AND seen_at >= clock_timestamp() - make_interval(secs => $5)
            """,
            relay,
            host,
            pid,
            version,
            forget_after,
        )

    async def relays(self, relay: UUID, forget_after: float) -> int:
        """The number of live relays, this one included."""
        return await self._pool.fetchval(  # type: ignore[no-any-return]
            f"""
            SELECT 1 + count(*) FROM {self._schema}.relay
             WHERE id <> $1 AND seen_at >= clock_timestamp() - make_interval(secs => $2)
            """,
            relay,
            forget_after,
        )

    async def farewell(self, relay: UUID) -> None:
        """This relay stops."""
        await self._pool.execute(f"DELETE FROM {self._schema}.relay WHERE id = $1", relay)

    # ---- the cycle ---------------------------------------------------------------------------------------------------

    async def fetch(
        self, db: Any, lane: int, batch: int, floor: int, hidden: Runs, rows: int, size: int
    ) -> list[asyncpg.Record]:
        """Step 5: the lane's next rows above `floor` in seq order, without the `hidden` ones.

        None while the lane is not at `batch` or one further (a delete under way): a pooler may go on with a database
        that was restored, and its rows be back.

        At most `rows` rows, and no more after the values reach `size` bytes (one row at least): the database adds the
        lengths up before a value is read. Columns: seq, id (text), type, topic, key, value, fingerprint, headers (JSON
        text), created (ms since 1970, null for an infinite one).
        """
        waiting = f"""
            FROM {self._schema}.outbox
             WHERE lane = $1 AND seq > $2 AND NOT seq <@ $3::int8multirange
               AND (SELECT batch FROM {self._schema}.lane WHERE lane = $1) - $6 BETWEEN 0 AND 1
             ORDER BY seq"""
        # A running sum over each row would cost as much again as the rows themselves: only where the plain one is too
        # large.
        return await db.fetch(  # type: ignore[no-any-return]
            f"""
            SELECT seq, id::text, type, topic, key, value, fingerprint, headers::text,
                   CASE WHEN isfinite(created_at) THEN (date_part('epoch', created_at) * 1000)::bigint END AS created
            {waiting} LIMIT CASE
                WHEN (SELECT sum(octet_length(value)) FROM (SELECT value {waiting} LIMIT $4) AS o) > $5
                THEN (SELECT count(*) FROM (
                          SELECT sum(octet_length(value)) OVER (
                                     ORDER BY seq ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
                          {waiting} LIMIT $4) AS o
                       WHERE before IS NULL OR before < $5)
                ELSE $4 END
            """,
            lane,
            floor,
            _multirange(hidden),
            rows,
            size,
            batch,
        )

    async def holders(self, db: Any) -> list[str]:
        """Who holds the outbox table for writing, prepared transactions too: their virtual transaction ids."""
        return await db.fetchval(  # type: ignore[no-any-return]
            f"""
            SELECT coalesce(array_agg(DISTINCT virtualtransaction), '{{}}') FROM pg_locks
             WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
               AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
               AND relation = '{self._schema}.outbox'::regclass
            """
        )

    def _rows_of(self, runs: str) -> str:
        """The rows of lane $1 in the parameter `runs`, run by run.

        OFFSET 0 keeps the planner from joining the other way round: without statistics (a new or a restored database)
        it would read the whole lane and compare each row with each run.
        """
        return f"""unnest({runs}::int8multirange) AS run, LATERAL (
                       SELECT ctid, seq, id FROM {self._schema}.outbox
                        WHERE lane = $1 AND seq >= lower(run) AND seq < upper(run) OFFSET 0)"""

    async def ids(self, lane: int, runs: Runs) -> list[str]:
        """The ids of the rows that `runs` name, in seq order."""
        rows = await self._pool.fetch(
            f"""
            SELECT id::text FROM {self._rows_of("$2")} AS o ORDER BY seq
            """,
            lane,
            _multirange(runs),
        )
        return [row["id"] for row in rows]

    async def advance(
        self, db: Any, lane: int, before: int, batch: int, runs: Runs, parked: Mapping[int, str], owner: UUID | None
    ) -> bool:
        """Steps 4 and 7: set the lane from batch `before` to `batch`, delete `runs`, and move the rows `parked`
        (seq → error) to dead_event, in one transaction.

        False: the lane was not at `before`, or not `owner`'s where one is named: another relay took it, and nothing was
        done. The transaction is durable when this returns, whatever `synchronous_commit` the database has: a lane that
        goes back would halt.
        """
        return await db.fetchval(  # type: ignore[no-any-return]
            f"""
            WITH own AS (
                UPDATE {self._schema}.lane SET batch = $3, released = false
                 WHERE lane = $1 AND batch = $2 AND ($7::uuid IS NULL OR owner = $7)
                   AND (current_setting('synchronous_commit') <> 'off'
                        OR set_config('synchronous_commit', 'on', true) = 'on')
                RETURNING 1),
            gone AS (
                DELETE FROM {self._schema}.outbox
                 WHERE ctid = ANY (ARRAY(SELECT o.ctid FROM own, {self._rows_of("$4")} AS o))),
            moved AS (
                DELETE FROM {self._schema}.outbox AS o USING own, unnest($5::bigint[], $6::text[]) AS p (seq, error)
                 WHERE o.lane = $1 AND o.seq = p.seq
                RETURNING o.id, o.lane, o.seq, o.type, o.topic, o.key, o.value, o.fingerprint, o.headers, o.created_at,
                          p.error),
            dead AS (
                INSERT INTO {self._schema}.dead_event AS d
                       (id, lane, seq, type, topic, key, value, fingerprint, headers, created_at, error, attempts)
                SELECT DISTINCT ON (id) moved.*, 1 FROM moved ORDER BY id, seq -- written twice is dead once
                ON CONFLICT (id) DO UPDATE SET error = excluded.error, attempts = d.attempts + 1)
            SELECT count(*) = 1 FROM own
            """,
            lane,
            before,
            batch,
            _multirange(runs),
            list(parked),
            list(parked.values()),
            owner,
        )

    async def held(self, lane: int) -> set[tuple[str, str]]:
        """Topic and key of the lane's parked events: later events of such a key wait behind them."""
        rows = await self._pool.fetch(
            f"SELECT DISTINCT topic, key FROM {self._schema}.dead_event WHERE lane = $1 AND key IS NOT NULL", lane
        )
        return {(row["topic"], row["key"]) for row in rows}

    async def avro_schema(self, fingerprint: int) -> str | None:
        """The JSON of the schema with this fingerprint; None where no writer and no deployment has put it there."""
        return await self._pool.fetchval(  # type: ignore[no-any-return]
            f"SELECT schema FROM {self._schema}.avro_schema WHERE fingerprint = $1", fingerprint
        )

    # ---- what a person decides: relay.resolve ------------------------------------------------------------------------

    async def waiting(self, lane: int) -> AsyncIterator[asyncpg.Record]:
        """Every row of the lane in seq order, without its contents. Columns: seq, id (text), topic, created (ms since
        1970, null for a moment that Kafka cannot tell), future (created later than now)."""
        async with self._pool.acquire() as db, db.transaction():
            async for row in db.cursor(
                f"""
                SELECT seq, id::text, topic, created_at > clock_timestamp() AS future,
                       CASE WHEN isfinite(created_at) AND created_at >= 'epoch'
                            THEN (date_part('epoch', created_at) * 1000)::bigint END AS created
                  FROM {self._schema}.outbox WHERE lane = $1 ORDER BY seq
                """,
                lane,
                prefetch=5_000,
            ):
                yield row

    async def resolve(self, lane: int, before: int, batch: int, rows: Sequence[tuple[int, str]]) -> bool:
        """Delete the `rows` (seq, id) of a halted lane, set it from batch `before` to `batch`, and let it go on; in one
        transaction, and durable.

        False: the lane is not halted, or not at `before`: nothing was done.
        """
        return await self._pool.fetchval(  # type: ignore[no-any-return]
            f"""
            WITH own AS (
                UPDATE {self._schema}.lane SET batch = $3, released = true, halted = NULL
                 WHERE lane = $1 AND batch = $2 AND halted IS NOT NULL
                   AND (current_setting('synchronous_commit') <> 'off'
                        OR set_config('synchronous_commit', 'on', true) = 'on')
                RETURNING 1),
            gone AS (
                DELETE FROM {self._schema}.outbox AS o USING own, unnest($4::bigint[], $5::uuid[]) AS p (seq, id)
                 WHERE o.lane = $1 AND o.seq = p.seq AND o.id = p.id)
            SELECT count(*) = 1 FROM own
            """,
            lane,
            before,
            batch,
            [seq for seq, _ in rows],
            [id_ for _, id_ in rows],
        )

    async def adopt(self) -> None:
        """Make this database the outbox's home."""
        await self._pool.execute(f"UPDATE {self._schema}.meta SET home = {_HERE}")

    # ---- the number of lanes: relay.lanes ----------------------------------------------------------------------------

    async def may_change_lanes(self) -> tuple[int, bool]:
        """PostgreSQL's server_version_num, and whether this user may alter the outbox's table."""
        row = await self._pool.fetchrow(
            f"""
            SELECT current_setting('server_version_num')::integer AS version, pg_has_role(relowner, 'USAGE') AS owner
              FROM pg_class WHERE oid = '{self._schema}.outbox'::regclass
            """
        )
        if row is None:
            raise ConfigError(f"there is no table {self._schema}.outbox: run `outbox migrate`")
        return row["version"], row["owner"]

    async def backlog(self, most: int, db: Any = None) -> int:
        """How many events wait; `most` + 1 where it is more than that."""
        return await (db or self._pool).fetchval(  # type: ignore[no-any-return]
            f"SELECT count(*) FROM (SELECT FROM {self._schema}.outbox LIMIT $1 + 1) AS o", most
        )

    async def lock_outbox(self, db: Any, wait: float, hold: float) -> None:
        """In the open transaction of `db`: nobody else reads or writes the outbox until its end. A transaction that
        rests, or a statement that lasts, for `hold` seconds is ended by the database.

        Raises DatabaseTrouble: not to be had within `wait` seconds.
        """
        milliseconds = [f"{round(seconds * 1000)}" for seconds in (wait, hold)]
        try:
            await db.execute(
                f"""
                SET LOCAL lock_timeout = {milliseconds[0]};
                SET LOCAL statement_timeout = {milliseconds[1]};
                SET LOCAL idle_in_transaction_session_timeout = {milliseconds[1]};
                LOCK TABLE {self._schema}.outbox IN ACCESS EXCLUSIVE MODE
                """
            )
        except asyncpg.LockNotAvailableError as error:
            raise DatabaseTrouble(f"the outbox's table could not be locked within {wait:g} s") from error

    async def set_lanes(self, db: Any, owner: UUID, before: int, after: int, expression: str) -> bool:
        """In the open transaction of `db`, which has locked the outbox: from now on it has `after` lanes, and
        `expression` says which one is an event's.

        False: some lane is not `owner`'s any more, or an event still waits. Nobody owns a lane afterwards, and each was
        left clean. The row of a lane that is no more stays: should it come back, its batches are numbered on.
        """
        s = self._schema
        if await self.backlog(0, db):
            return False
        released = await db.execute(
            f"""
            UPDATE {s}.lane SET owner = NULL, lease_until = NULL, released = true
             WHERE lane < $1 AND owner = $2 AND halted IS NULL
            """,
            before,
            owner,
        )
        if released != f"UPDATE {before}":
            return False
        await db.execute(
            f"""
            INSERT INTO {s}.lane (lane) SELECT generate_series($1::integer, $2::integer - 1) ON CONFLICT DO NOTHING
            """,
            before,
            after,
        )
        await db.execute(f"UPDATE {s}.meta SET lanes = $1", after)
        await db.execute(f"UPDATE {s}.dead_event SET lane = {expression} WHERE lane <> {expression}")
        await db.execute(f"ALTER TABLE {s}.outbox ALTER COLUMN lane SET EXPRESSION AS ({expression})")
        return True


def _multirange(runs: Runs) -> list[asyncpg.Range[int]]:
    return [asyncpg.Range(start, end) for start, end in runs]


def _lane_row(row: Any) -> LaneRow:
    owner = row["owner"]
    return LaneRow(
        row["lane"], row["batch"], row["released"], owner and UUID(bytes=owner.bytes), row["free"], row["halted"]
    )


PLANNER = {"enable_seqscan": "off", "enable_bitmapscan": "off", "enable_sort": "off", "jit": "off"}
"""The planner's settings in the relay's sessions: every statement of the cycle walks the index in its order. Else the
plan that a session made, and keeps, while the table was empty reads all of a table that has grown, at each fetch, until
an autovacuum makes it plan anew. `jit`: before PostgreSQL 18 what is switched off counts as dear, and dear is
compiled."""


async def _no_reset(_connection: Any) -> None:
    """No statement here leaves session state behind, so there is nothing to reset."""


async def connect(config: RelayConfig, connections: int) -> "asyncpg.Pool[asyncpg.Record]":
    """A pool to the service's database, its sessions under `PLANNER` where no pooler forbids it. Each new connection
    takes the URL and the password as their files hold them then.

    Raises:
        ConfigError: the database refuses us by name, password or grant; waiting does not help.
        DatabaseTrouble: it is away.
    """
    try:
        try:
            return await _pool(config, connections, PLANNER)
        except asyncpg.ProtocolViolationError:  # what PgBouncer says of settings that it cannot keep for a session
            return await _pool(config, connections, {})
    except TROUBLE as error:
        if is_final(error, config):
            raise ConfigError(f"the database refuses the relay: {words_of(error)}") from error
        if isinstance(error, asyncpg.ClientConfigurationError):
            raise ConfigError(f"OUTBOX_DATABASE_URL cannot be used: {error}") from error
        raise DatabaseTrouble(f"the database cannot be reached: {type(error).__name__}: {words_of(error)}") from error
    except ValueError:  # its words may be a part of the password
        raise ConfigError(f"OUTBOX_DATABASE_URL cannot be used: {ENCODE}") from None


async def _pool(config: RelayConfig, connections: int, settings: Mapping[str, str]) -> "asyncpg.Pool[asyncpg.Record]":
    async def connected(*_: Any, **options: Any) -> "asyncpg.Connection[asyncpg.Record]":
        url, password = config.database()
        return await asyncpg.connect(url, password=password, **options)

    return await asyncpg.create_pool(
        connect=connected,
        min_size=1,
        max_size=connections,
        timeout=min(10.0, config.database_timeout),
        command_timeout=config.database_timeout,
        statement_cache_size=100 if config.prepared_statements else 0,
        reset=_no_reset,
        server_settings=dict(settings),
    )
