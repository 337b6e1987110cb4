"""Another number of lanes, while writers write and relays publish (docs/design.md, "Changing the number of lanes").

1. wait until few events wait
2. take every lane from whoever has it, as a relay takes it: nothing is under way any more, and nobody publishes
3. one database transaction:
   a. lock the outbox's table: writers wait from here on
   b. publish what waits, one batch a lane, each with its delete in this transaction
   c. the outbox is empty, and all lanes are still ours: change the lanes, and release them
   d. commit: writers go on

A crash before 3d leaves the lanes as a relay leaves them that dies before the delete of its last batch: whoever takes
them next deletes it. At 3d no event waits, so none changes its lane, and all of a key that comes later comes in one
lane, behind all of it that Kafka has.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from outbox.errors import UsageError
from outbox.tables import check_lanes, lane_expression
from relay.config import RelayConfig
from relay.destinations import Destinations
from relay.errors import ConfigError, DatabaseTrouble, KafkaTrouble, LaneTrouble
from relay.failpoint import Failpoint
from relay.queries import TROUBLE, Meta, Queries
from relay.registry import Registry
from relay.topics import ensure_control_topic
from relay.views import Views
from relay.worker import LaneWorker, Shared

SINCE = 170_000
"""server_version_num of the first PostgreSQL that can change the expression of a generated column."""

LOCK_SECONDS = 0.3
"""So long the lock may be waited for. A writer that comes meanwhile waits behind it."""

HOLD_SECONDS = 0.5
"""So long it may be held. Both together are what a writer may have to wait, and less than a second."""

BACKLOG = 1_000
"""No more events may wait before the lanes are taken: the relays do better at that."""

LAST_ROWS = 5_000
"""No more events may wait once writers wait for them: they are published in less than 0.2 s."""

LEASE = 10.0
"""Seconds for which the lanes are taken. A command that is killed leaves them unpublished for so long."""

PAUSE = 1.0
"""Seconds between two tries: what has gathered is published, and writers are left alone."""

Last = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Changed:
    """What was done."""

    before: int
    after: int
    tries: int
    waited: float
    """Seconds that writers waited in the last try, at most."""


class NotNow(LaneTrouble):
    """The lanes are as they were: the time has run out. The text says what stood in the way."""


async def change_lanes(
    config: RelayConfig, queries: Queries, views: Views, lanes: int, patience: float, failpoint: Failpoint
) -> Changed:
    """See to it that the outbox has so many lanes; tries for `patience` seconds, and once at least.

    Raises:
        ConfigError: it cannot be, here or by this user.
        LaneHalted: a lane is halted.
        NotNow: nothing was changed, or all of it was and only the answer is not known: try again.
    """
    before = await queries.meta()
    await _check(queries, before, lanes)
    await asyncio.to_thread(ensure_control_topic, config, before.name, max(lanes, before.lanes))
    deadline = time.monotonic() + patience
    tries, waited = 0, 0.0
    while (meta := await queries.meta()).lanes != lanes:
        tries += 1
        try:
            waited = await _try(replace(config, lease=LEASE), meta, queries, views, lanes, failpoint)
        except (LaneTrouble, *TROUBLE) as error:
            if isinstance(error, KafkaTrouble) and time.monotonic() >= deadline:
                raise
            if time.monotonic() >= deadline:
                raise NotNow(await _why(error, views)) from error
            await asyncio.sleep(PAUSE)
    return Changed(before.lanes, lanes, tries, waited)


async def _check(queries: Queries, meta: Meta, lanes: int) -> None:
    meta.refuse_copy()
    try:
        check_lanes(lanes)
    except UsageError as error:
        raise ConfigError(str(error)) from error
    version, owner = await queries.may_change_lanes()
    if version < SINCE:
        raise ConfigError(
            f"PostgreSQL {version // 10_000} cannot change the expression of a generated column: the number of lanes "
            f"can be changed from PostgreSQL {SINCE // 10_000} on"
        )
    if not owner:
        raise ConfigError("this user may not alter the outbox's table: set OUTBOX_DATABASE_URL to that of its owner")


async def _why(error: BaseException, views: Views) -> str:
    """The error, and who is at the table."""
    found = ", ".join(f"pid {one['pid']} since {one['seconds'] or 0:.0f} s" for one in (await views.writers())[:3])
    return (
        f"the number of lanes was not changed: {str(error) or type(error).__name__}. Writers' open transactions: "
        f"{found or 'none'}"
    )


async def _try(
    config: RelayConfig, meta: Meta, queries: Queries, views: Views, lanes: int, failpoint: Failpoint
) -> float:
    """One try. Returned: seconds that writers waited at most."""
    waiting = await queries.backlog(BACKLOG)
    if waiting > BACKLOG:
        raise DatabaseTrouble(f"more than {BACKLOG} events wait to be published: is a relay at work?")
    threads = ThreadPoolExecutor(4 + 2 * meta.lanes)
    registry = Registry(config, queries, threads) if config.registry else None
    destinations = Destinations(config)
    shared = Shared(config, uuid4(), meta, queries, threads, failpoint, registry, destinations=destinations)
    try:
        await shared.thread(destinations.learn, await views.topics())
        async with AsyncExitStack() as stack:
            lasts = await _visited(stack, shared, meta.lanes)
            return await _change(shared, lasts, lanes)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        if registry is not None:
            registry.close()


async def _visited(stack: AsyncExitStack, shared: Shared, lanes: int) -> list[Last]:
    """Step 2, all lanes at once."""
    visits = [LaneWorker(shared, lane).visiting() for lane in range(lanes)]
    entered = await asyncio.gather(*map(stack.enter_async_context, visits), return_exceptions=True)
    lasts = []
    for one in entered:
        if isinstance(one, BaseException):
            raise one
        lasts.append(one)
    return lasts


async def _change(shared: Shared, lasts: Sequence[Last], lanes: int) -> float:
    """Step 3."""
    queries = shared.queries
    async with queries.connection() as db:
        began = time.monotonic()
        async with db.transaction():
            await queries.lock_outbox(db, LOCK_SECONDS, HOLD_SECONDS)  # 3a
            try:
                changed = await asyncio.wait_for(_settle(db, shared, lasts, lanes), HOLD_SECONDS)
            except TimeoutError as error:
                raise DatabaseTrouble(f"it took longer than {HOLD_SECONDS:g} s, and writers were let go on") from error
            if not changed:
                raise DatabaseTrouble("not all that waited could be published, or a relay has taken a lane meanwhile")
        return time.monotonic() - began


async def _settle(db: Any, shared: Shared, lasts: Sequence[Last], lanes: int) -> bool:
    """Steps 3b and 3c. False: not all of it could be done."""
    if await shared.queries.backlog(LAST_ROWS, db) > LAST_ROWS:
        raise DatabaseTrouble(f"more than {LAST_ROWS} events came while the lanes were taken")
    for last in lasts:
        await last(db)
    return await shared.queries.set_lanes(db, shared.relay, len(lasts), lanes, lane_expression(lanes))
