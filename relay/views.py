"""The SQL of those who look: the monitor and the commands for people. Nothing here is part of the protocol, and nothing
writes but what parked events need.

Every look at the outbox's rows is bounded: none counts a backlog of millions.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

    async def backlog(self, floors: Mapping[int, int] | None = None) -> Backlog:
        """What waits in the lanes of `floors` (lane → its safe floor, below which an index scan would only pass dead
        rows) and in those that no relay holds. None: in every lane.

        Up to EXACT rows of a lane are counted. More are estimated: the lane's part of PostgreSQL's own count of live
        rows, or of the span of its seqs where that is less; never less than were counted.
        """
        s = self._schema
        before = time.time()
        [whole] = await self._pool.fetch(
            f"""
            SELECT date_part('epoch', clock_timestamp()) AS epoch,
                   (SELECT count(*) FROM {s}.lane) AS lanes,
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
             WHERE $4 OR f.lane IS NOT NULL OR l.owner IS NULL OR l.lease_until < clock_timestamp()
             ORDER BY l.lane
            """,
            list(floors or ()),
            list((floors or {}).values()),
            EXACT,
            floors is None,
            timeout=LOOK_SECONDS,
        )
        return Backlog(
            tuple(_waiting(row, whole["lanes"], whole["live"]) for row in rows),
            whole["parked"] if whole["parked"] <= EXACT else max(whole["parked"], whole["dead"]),
            offset,
        )


def _waiting(row: Any, lanes: int, live: int) -> Waiting:
    counted, exact = row["counted"], row["counted"] <= EXACT
    if not exact:
        span = row["span"] // lanes
        counted = max(counted, min(span, live // lanes) if live // lanes > EXACT else span)
    oldest = 0.0 if row["empty"] else row["age"]
    return Waiting(row["lane"], counted, exact, None if oldest is None else max(0.0, oldest), row["halted"])
