"""Parked events, and how they come back (docs/design.md, "Poison").

What is parked is one event that Kafka refused, and those of its key that came later and are held behind it. To let some
go, in the order of their key, and without a pause of the writers:

1. the lane is taken from whoever publishes it, as a relay takes it: from here on nobody parks anything of it
2. one database transaction, which asks for the lease: they go back into the outbox **under the seqs that they had**, or
   are deleted
3. the lane is released. Whoever takes it next reads anew which keys are held, and all rows from the start

So at every moment either the key is held, or all of it that was not published stands in the outbox in the order in
which it was written: what was parked has lower seqs than what the writers wrote meanwhile. A crash between the steps
leaves either state. New seqs would not do: an event that was written just before the retry would overtake them.
"""

from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID, uuid4

from relay.config import RelayConfig
from relay.errors import LaneLost
from relay.failpoint import Failpoint
from relay.queries import Meta, Queries
from relay.views import Chosen
from relay.worker import LaneWorker, Shared

THREADS = 4

Change = Callable[[int, UUID, Chosen], Awaitable[int | None]]


async def change_parked(
    config: RelayConfig, queries: Queries, meta: Meta, lanes: Iterable[int], change: Change, chosen: Chosen
) -> int:
    """Do `change` (`Views.retry` or `Views.discard`) to the chosen ones of `lanes`; how many events it was.

    Raises:
        ConfigError: the database is a copy.
        LaneHalted, LaneTrouble: lanes before that one are done.
    """
    meta.refuse_copy()
    threads = ThreadPoolExecutor(THREADS)
    shared = Shared(config, uuid4(), meta, queries, threads, Failpoint(None))
    try:
        return sum([await _in_lane(shared, lane, change, chosen) for lane in lanes])
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


async def _in_lane(shared: Shared, lane: int, change: Change, chosen: Chosen) -> int:
    done = await LaneWorker(shared, lane).visit(lambda: change(lane, shared.relay, chosen))
    if done is None:
        raise LaneLost(f"lane {lane} was taken by a relay meanwhile, and nothing of it was changed: try again")
    return done
