"""The SQL of those who look: the monitor and the commands for people. Nothing here is part of the protocol, and nothing
writes but what parked events need.

Every look at the outbox's rows is bounded: none counts a backlog of millions.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from relay.queries import PLANNER

if TYPE_CHECKING:
    import asyncpg

EXACT = 10_000
"""So many rows are counted (about 2 ms); more are estimated."""

LOOK_SECONDS = 2.0
"""A look that takes longer is given up: what it would have said is not known."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits in a lane."""

    lane: int
    events: int
    exact: bool
    """False: an estimate, and more than `EXACT`."""
    oldest: float | None
    """Seconds since the oldest one was made; 0 when nothing waits, None where it says no moment."""
    halted: str | None


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits and what is parked, at one moment."""

    lanes: tuple[Waiting, ...]
    parked: int
    clock_offset: float
    """Seconds that the database's clock is ahead of this machine's."""


class Views:
    """The statements, over a pool of connections to one outbox."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", schema: str) -> None:
        self._pool = pool
        self._schema = '"' + schema.replace('"', '""') + '"'

    async def backlog(self, floors: Mapping[int, int] | None = None, *, every: bool = False) -> Backlog:
        """What waits in the lanes of `floors` (lane → its safe floor, below which an index scan would only pass dead
        rows) and in those that no relay holds. None, or `every`: in every lane.

        Up to EXACT rows of a lane are counted. More are estimated: the lane's part of PostgreSQL's own count of live
        rows, or of the span of its seqs where that is less; never less than were counted.
        """
        s = self._schema
        before = time.time()
        [whole] = await self._pool.fetch(
            f"""
            SELECT date_part('epoch', clock_timestamp()) AS epoch,
                   (SELECT lanes FROM {s}.meta) AS lanes,
                   pg_stat_get_live_tuples('{s}.outbox'::regclass) AS live,
                   (SELECT count(*) FROM (SELECT FROM {s}.dead_event LIMIT $1 + 1) AS d) AS parked,
                   pg_stat_get_live_tuples('{s}.dead_event'::regclass) AS dead
            """,
            EXACT,
            timeout=LOOK_SECONDS,
        )
        offset = whole["epoch"] - (before + time.time()) / 2
        above = f"FROM {s}.outbox AS o WHERE o.lane = l.lane AND o.seq > coalesce(f.floor, 0) ORDER BY o.seq"
        rows = await self._pool.fetch(
            f"""
            SELECT l.lane, l.halted, n.counted, last.seq - first.seq + 1 AS span, first.seq IS NULL AS empty,
                   CASE WHEN isfinite(first.created_at)
                        THEN date_part('epoch', clock_timestamp() - first.created_at) END AS age
              FROM {s}.lane AS l
              LEFT JOIN unnest($1::smallint[], $2::bigint[]) AS f (lane, floor) ON f.lane = l.lane
             CROSS JOIN LATERAL (SELECT count(*) AS counted FROM (SELECT {above} LIMIT $3 + 1) AS o) AS n
              LEFT JOIN LATERAL (SELECT seq, created_at {above} LIMIT 1) AS first ON true
              LEFT JOIN LATERAL (SELECT seq {above} DESC LIMIT 1) AS last ON true
             WHERE l.lane < (SELECT lanes FROM {s}.meta)
               AND ($4 OR f.lane IS NOT NULL OR l.owner IS NULL OR l.lease_until < clock_timestamp())
             ORDER BY l.lane
            """,
            list(floors or ()),
            list((floors or {}).values()),
            EXACT,
            every or floors is None,
            timeout=LOOK_SECONDS,
        )
        return Backlog(
            tuple(_waiting(row, whole["lanes"], whole["live"]) for row in rows),
            whole["parked"] if whole["parked"] <= EXACT else max(whole["parked"], whole["dead"]),
            offset,
        )

    # ---- status ------------------------------------------------------------------------------------------------------

    async def lanes(self) -> list[dict[str, Any]]:
        """Every lane, its owner as the relay wrote itself down, and the seconds that its lease has left."""
        return await self._dicts(
            f"""
            SELECT l.lane, l.batch, l.released, l.halted, l.owner::text AS owner, r.host, r.pid,
                   date_part('epoch', l.lease_until - clock_timestamp()) AS lease_seconds
              FROM {self._schema}.lane AS l LEFT JOIN {self._schema}.relay AS r ON r.id = l.owner
             WHERE l.lane < (SELECT lanes FROM {self._schema}.meta) ORDER BY l.lane
            """
        )

    async def relays(self) -> list[dict[str, Any]]:
        """The relays that said a sign of life, and how long ago."""
        return await self._dicts(
            f"""
            SELECT id::text, host, pid, version, date_part('epoch', clock_timestamp() - started_at) AS up_seconds,
                   date_part('epoch', clock_timestamp() - seen_at) AS silent_seconds
              FROM {self._schema}.relay ORDER BY started_at
            """
        )

    async def writers(self) -> list[dict[str, Any]]:
        """The open transactions that hold the outbox table for writing, the longest first: the safe floor waits for
        them. What this user may not see of others (`pg_read_all_stats`) is null."""
        return await self._dicts(
            f"""
            SELECT DISTINCT l.pid, a.usename AS "user", a.application_name AS application, a.state, p.gid AS prepared,
                   date_part('epoch', clock_timestamp() - coalesce(p.prepared, a.xact_start)) AS seconds
              FROM pg_locks AS l
              LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
              LEFT JOIN pg_locks AS x ON l.pid IS NULL AND x.pid IS NULL AND x.locktype = 'transactionid'
                    AND x.virtualtransaction = l.virtualtransaction
              LEFT JOIN pg_prepared_xacts AS p ON p.transaction = x.transactionid
             WHERE l.locktype = 'relation' AND l.mode = 'RowExclusiveLock' AND l.granted
               AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
               AND l.relation = '{self._schema}.outbox'::regclass
             ORDER BY seconds DESC NULLS LAST
            """
        )

    # ---- parked events -----------------------------------------------------------------------------------------------

    async def may_change_parked(self) -> bool:
        """Whether this user may do what `retry` and `discard` do. A relay's role may not (docs/sql.md, "Roles")."""
        [row] = await self._dicts(
            f"""
            SELECT has_table_privilege('{self._schema}.outbox', 'INSERT')
                   AND has_table_privilege('{self._schema}.dead_event', 'DELETE') AS may
            """
        )
        return bool(row["may"])

    async def parked(self, chosen: "Chosen", limit: int) -> list[dict[str, Any]]:
        """Parked events without their contents, in the order in which they were parked. `held`: it waits behind an
        earlier one of its key."""
        return await self._dicts(
            f"""
            SELECT id::text, lane, seq, type, topic, key, octet_length(value) AS bytes, created_at::text,
                   died_at::text, attempts, error, error LIKE 'held: %' AS held
              FROM {self._schema}.dead_event WHERE {_CHOSEN} ORDER BY lane, seq LIMIT $5
            """,
            *chosen.values(),
            limit,
        )

    async def parked_event(self, id_: UUID) -> dict[str, Any] | None:
        """All of one parked event; the value as bytes, the headers as JSON text."""
        found = await self._dicts(
            f"""
            SELECT id::text, lane, seq, type, topic, key, value, fingerprint::text, headers::text, created_at::text,
                   died_at::text, attempts, error, error LIKE 'held: %' AS held,
                   (SELECT count(*) FROM {self._schema}.dead_event AS o
                     WHERE o.lane = d.lane AND o.topic = d.topic AND o.key = d.key) AS of_its_key
              FROM {self._schema}.dead_event AS d WHERE id = $1
            """,
            id_,
        )
        return found[0] if found else None

    async def parked_lanes(self, chosen: "Chosen") -> dict[int, int]:
        """Lane → how many of the chosen ones."""
        rows = await self._dicts(
            f"SELECT lane, count(*) FROM {self._schema}.dead_event WHERE {_CHOSEN} GROUP BY lane ORDER BY lane",
            *chosen.values(),
        )
        return {row["lane"]: row["count"] for row in rows}

    async def retry(self, lane: int, owner: UUID, chosen: "Chosen") -> int | None:
        """Put the chosen ones of a lane back into the outbox, and with each all that is parked of its key, under the
        seqs that they had: before whatever their writers wrote after them. How many; None: the lane is not `owner`'s.
        """
        s = self._schema
        return await self._counted(
            f"""
            WITH {self._owned()}, chosen AS (
                SELECT id, topic, key FROM {s}.dead_event WHERE lane = $6 AND {_CHOSEN}),
            gone AS (
                DELETE FROM {s}.dead_event AS d USING own
                 WHERE d.lane = $6 AND (d.id IN (SELECT id FROM chosen)
                                        OR (d.topic, d.key) IN (SELECT topic, key FROM chosen))
                RETURNING d.*),
            back AS (
                INSERT INTO {s}.outbox (seq, id, type, topic, key, value, fingerprint, headers, created_at)
                OVERRIDING SYSTEM VALUE
                SELECT seq, id, type, topic, key, value, fingerprint, headers, created_at FROM gone
                RETURNING 1)
            SELECT (SELECT count(*) FROM own) AS owned, count(*) FROM back
            """,
            lane,
            owner,
            chosen,
        )

    async def discard(self, lane: int, owner: UUID, chosen: "Chosen") -> int | None:
        """Delete the chosen ones of a lane, and no others. As `retry`."""
        return await self._counted(
            f"""
            WITH {self._owned()}, gone AS (
                DELETE FROM {self._schema}.dead_event USING own WHERE dead_event.lane = $6 AND {_CHOSEN} RETURNING 1)
            SELECT (SELECT count(*) FROM own) AS owned, count(*) FROM gone
            """,
            lane,
            owner,
            chosen,
        )

    def _owned(self) -> str:
        """The lane's row is locked until the end: nobody takes the lane meanwhile."""
        return f"own AS (UPDATE {self._schema}.lane SET owner = owner WHERE lane = $6 AND owner = $5 RETURNING 1)"

    async def _counted(self, statement: str, lane: int, owner: UUID, chosen: "Chosen") -> int | None:
        [row] = await self._pool.fetch(statement, *chosen.values(), owner, lane)
        return row["count"] if row["owned"] else None

    # ---- one event ---------------------------------------------------------------------------------------------------

    async def waiting_at(self, id_: UUID) -> dict[str, Any] | None:
        """Where an event waits in the outbox. Reads the whole table: there is no index by id, each write would pay."""
        found = await self._dicts(
            f"""
            SELECT lane, seq, type, topic, key, created_at::text FROM {self._schema}.outbox WHERE id = $1 LIMIT 1
            """,
            id_,
        )
        return found[0] if found else None

    async def topics(self) -> list[str]:
        """The topics that are known here: of registered schemas (`<topic>-value`), of parked events, and of the first
        EXACT events that wait."""
        s = self._schema
        rows = await self._dicts(
            f"""
            SELECT left(subject, -6) AS topic FROM {s}.avro_schema WHERE subject LIKE '%-value'
             UNION SELECT topic FROM {s}.dead_event
             UNION SELECT topic FROM (SELECT topic FROM {s}.outbox LIMIT $1) AS o
             ORDER BY topic
            """,
            EXACT,
        )
        return [row["topic"] for row in rows]

    # ---- check -------------------------------------------------------------------------------------------------------

    async def facts(self, grants: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """What `relay check` judges of the database. `grants`: table → privileges that this user should have."""
        s = self._schema
        before = time.time()
        [row] = await self._pool.fetch(
            f"""
            SELECT current_setting('server_version') AS version, pg_is_in_recovery() AS standby,
                   current_setting('fsync') AS fsync, current_setting('full_page_writes') AS full_page_writes,
                   current_setting('autovacuum') AS autovacuum,
                   ARRAY(SELECT name || ' = off' FROM pg_settings
                          WHERE name = ANY($1) AND setting <> 'off' ORDER BY name) AS planner,
                   date_part('epoch', clock_timestamp()) AS epoch,
                   (SELECT seqcache FROM pg_sequence
                     WHERE seqrelid = pg_get_serial_sequence('{s}.outbox', 'seq')::regclass) AS cache,
                   (SELECT array_agg(option) FROM pg_class, unnest(reloptions) AS option
                     WHERE pg_class.oid = '{s}.outbox'::regclass) AS options,
                   pg_stat_get_dead_tuples('{s}.outbox'::regclass) AS dead_rows
            """,
            list(PLANNER),
        )
        offset = row["epoch"] - (before + time.time()) / 2
        asynchronous = await self._pool.fetch(
            """
            SELECT 'this user' AS who, current_setting('synchronous_commit') AS value
             UNION ALL
            SELECT concat_ws(' in ', 'role ' || nullif(r.rolname, ''), 'database ' || d.datname),
                   split_part(setting, '=', 2)
              FROM pg_db_role_setting AS s CROSS JOIN unnest(setconfig) AS setting
              LEFT JOIN pg_roles AS r ON r.oid = s.setrole
              LEFT JOIN pg_database AS d ON d.oid = s.setdatabase
             WHERE setting LIKE 'synchronous_commit=%'
               AND (s.setdatabase = 0 OR d.datname = current_database())
            """
        )
        asked = [(table, privilege) for table, privileges in grants.items() for privilege in privileges]
        missing = await self._pool.fetch(
            f"""
            SELECT "table", privilege FROM unnest($1::text[], $2::text[]) AS a ("table", privilege)
             WHERE NOT has_table_privilege('{s}.' || "table", privilege)
            """,
            [table for table, _ in asked],
            [privilege for _, privilege in asked],
        )
        return {
            **row,
            "options": dict(option.split("=", 1) for option in row["options"] or ()),
            "clock_offset": offset,
            "synchronous_commit": [(one["who"], one["value"]) for one in asynchronous],
            "missing_grants": [(one["table"], one["privilege"]) for one in missing],
        }

    async def _dicts(self, statement: str, *parameters: Any) -> list[dict[str, Any]]:
        return [dict(row) for row in await self._pool.fetch(statement, *parameters)]


_CHOSEN = (
    "($1::uuid[] IS NULL OR id = ANY ($1)) AND ($2::text IS NULL OR topic = $2)"
    " AND ($3::text IS NULL OR key = $3) AND ($4::text IS NULL OR error LIKE '%' || $4 || '%')"
)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which parked events are meant: those that answer to all that is not None."""

    ids: tuple[UUID, ...] | None = None
    topic: str | None = None
    key: str | None = None
    error: str | None = None
    """Words of the error."""

    def values(self) -> tuple[Any, ...]:
        """The parameters $1 to $4 of the statements."""
        return self.ids, self.topic, self.key, self.error


def _waiting(row: Any, lanes: int, live: int) -> Waiting:
    counted, exact = row["counted"], row["counted"] <= EXACT
    if not exact:
        span = row["span"] // lanes
        counted = max(counted, min(span, live // lanes) if live // lanes > EXACT else span)
    oldest = 0.0 if row["empty"] else row["age"]
    return Waiting(row["lane"], counted, exact, None if oldest is None else max(0.0, oldest), row["halted"])
