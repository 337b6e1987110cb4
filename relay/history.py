"""The last minutes of a relay, a point a second: what the page draws. Out of the counters, without I/O."""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from relay.metrics import SECONDS, Metrics

POINTS = 300
"""Points that are kept: five minutes."""

WINDOW = 5
"""Points over which delays are gathered: one second alone may have seen one event."""


class Point(NamedTuple):
    """One moment."""

    at: float
    """Seconds since 1970."""
    rate: float
    """Events a second since the point before, published by this relay."""
    median: float | None
    """Seconds from `created_at` to the acknowledged commit, of half the events of the last WINDOW points. None: there
    was no event."""
    p99: float | None
    """The same, of 99 in 100."""
    pending: int | None
    """Events that waited in all lanes, as last seen within this second. None: nobody looked."""


class History:
    """Written by the relay's loop once a second; read by the HTTP server's thread, which gets copies."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._points: deque[Point] = deque(maxlen=POINTS)
        self._delays: deque[Sequence[int]] = deque([metrics.delays.counts], maxlen=WINDOW + 1)
        self._published = 0
        self._at = time.time()
        self.pending: int | None = None
        """Events that wait in all lanes, by whoever has just looked."""

    def take(self) -> None:
        """A second has passed."""
        now, published = time.time(), self._metrics.published.total()
        seconds = max(now - self._at, 0.001)
        self._delays.append(self._metrics.delays.counts)
        seen = [last - first for first, last in zip(self._delays[0], self._delays[-1], strict=True)]
        rate = (published - self._published) / seconds
        self._points.append(Point(now, round(rate, 1), quantile(seen, 0.5), quantile(seen, 0.99), self.pending))
        self._at, self._published, self.pending = now, published, None

    def points(self) -> list[Any]:
        """All of them, the oldest first."""
        return list(self._points)


def quantile(counts: Sequence[int], share: float) -> float | None:
    """The duration that `share` of the observations did not exceed, as far as their histogram (`counts` between the
    bounds SECONDS) tells: even between two bounds, and the highest bound for what is above it. None: there is none."""
    wanted = share * sum(counts)
    if not wanted:
        return None
    below = 0.0
    for count, least, most in zip(counts, (0.0, *SECONDS), (*SECONDS, SECONDS[-1]), strict=True):
        if below + count >= wanted:
            return round(least + (most - least) * (wanted - below) / count, 4)
        below += count
    return SECONDS[-1]
