"""What a relay counts while its HTTP server is on (`OUTBOX_HTTP`): once a batch, never once an event. No I/O.

Written by the relay's event loop, read by the server's thread. docs/operations.md, "Metrics".
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

SIZES = (1, 3, 10, 30, 100, 300, 1_000, 2_000, 4_000, 8_000, 16_000)
"""Upper bounds of the sizes of batches."""

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of durations."""

SAMPLES = 8
"""Delays looked at in a batch; each stands for the events up to the next one. All of them would cost 0.3 µs an
event."""

ENDS = ("stopped", "recycled", "in_doubt", "refused", "lost", "halted", "kafka", "database", "other")
"""Why a hold on a lane ended."""

_TOPIC = itemgetter(3)
_CREATED = 8


class Histogram:
    """How many observations were at most so large, as Prometheus wants them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """The same value, so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.total += value * times

    @property
    def counts(self) -> tuple[int, ...]:
        """Observations between each bound and the one before it, and those above the last."""
        return tuple(self._counts)

    def cumulated(self) -> list[tuple[str, float]]:
        """Upper bound and count, up to +Inf."""
        so_far, pairs = 0, []
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            so_far += count
            pairs.append((bound, float(so_far)))
        return pairs


class Metrics:
    """The counters of one relay process."""

    def __init__(self) -> None:
        self.published: Counter[str] = Counter()
        """Events by topic, of batches whose commit Kafka acknowledged to this relay."""
        self.sizes = Histogram(SIZES)
        """Events in a batch."""
        self.transactions = Histogram(SECONDS)
        """From the begin of a Kafka transaction to its acknowledged commit."""
        self.delays = Histogram(SECONDS)
        """From an event's created_at to its acknowledged commit, by the database's clock."""
        self.ends: Counter[str] = Counter(dict.fromkeys(ENDS, 0))
        """Holds on lanes by why they ended."""
        self.reconciled_batches = 0
        """Batches that a take found committed in Kafka and not yet deleted, and finished."""
        self.reconciled_events = 0
        self.clock_offset = 0.0
        """Seconds that the database's clock is ahead of this machine's, as last measured."""

    def batch(self, rows: Sequence[Any], seconds: float) -> None:
        """A batch of `rows` (as `Queries.fetch` returns them) was acknowledged, `seconds` after its transaction
        began."""
        count = len(rows)
        self.sizes.observe(count)
        self.transactions.observe(seconds)
        self.published.update(map(_TOPIC, rows))  # a loop in C, 0.06 µs an event
        now = (time.time() + self.clock_offset) * 1000
        share = -(-count // SAMPLES) or 1
        for place in range(0, count, share):
            self.delays.observe(max(0.0, now - rows[place][_CREATED]) / 1000, min(share, count - place))

    def reconciled(self, events: int) -> None:
        """A batch was finished by a take."""
        self.reconciled_batches += 1
        self.reconciled_events += events
