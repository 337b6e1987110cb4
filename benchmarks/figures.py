"""What is computed from measurements. Pure: no clock, no I/O."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` (0 to 1) of them do not exceed (nearest rank: a value that was
    measured, none between two). ValueError where there are no values."""
    if not values or not 0 <= share <= 1:
        raise ValueError(f"percentile {share} of {len(values)} values")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Latencies in seconds as p50, p95, p99 and the longest, in ms."""
    named = {"p50_ms": 0.50, "p95_ms": 0.95, "p99_ms": 0.99, "max_ms": 1.0}
    return {name: round(percentile(seconds, share) * 1e3, 2) for name, share in named.items()}


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of events that were numbered 1 to n in the order in which they were written."""

    lost: int
    doubled: int
    reordered: int
    """Events that came first behind a later one of their key. A repeat is doubled, never reordered."""
    strangers: int
    """Events that were never written, and those under a key that is not theirs."""

    @property
    def flawless(self) -> bool:
        return not (self.lost or self.doubled or self.reordered or self.strangers)


KEYS = 1_000
"""So many keys take turns."""


def key_of(number: int, keys: int = KEYS) -> bytes:
    """The key of the event with this number, as `Stage.seed` says it in SQL."""
    return b"key-%d" % (number % keys)


def tally(count: int, arrivals: Iterable[tuple[int, bytes]], keys: int = KEYS) -> Tally:
    """Compare what came (number and key, in the order of arrival within each key) with 1 to `count`."""
    seen: set[int] = set()
    latest: dict[bytes, int] = {}
    doubled = reordered = strangers = 0
    for number, key in arrivals:
        if number in seen:
            doubled += 1
        elif not 1 <= number <= count or key != key_of(number, keys):
            strangers += 1
        else:
            seen.add(number)
            reordered += number < latest.get(key, 0)
            latest[key] = max(number, latest.get(key, 0))
    return Tally(count - len(seen), doubled, reordered, strangers)


def added(tallies: Iterable[Tally]) -> Tally:
    """The sum over rounds."""
    rows = list(tallies)
    return Tally(
        sum(one.lost for one in rows),
        sum(one.doubled for one in rows),
        sum(one.reordered for one in rows),
        sum(one.strangers for one in rows),
    )


@dataclass(frozen=True, slots=True)
class Mark:
    """So many events had come at this time (ns of CLOCK_MONOTONIC, which all processes of a machine share)."""

    events: int
    at: int


def steady_rate(count: int, marks: Sequence[Mark]) -> float:
    """Events a second from the first chunk that came, whose events do not count, to the one that completed `count`.

    0 where there are fewer than two chunks: then nothing can be said.
    """
    last = next((mark for mark in marks if mark.events >= count), marks[-1] if marks else None)
    if last is None or last is marks[0]:
        return 0.0
    return (last.events - marks[0].events) / (last.at - marks[0].at) * 1e9


def arrival_times(numbers: Sequence[int], marks: Sequence[Mark], every: int = 1) -> dict[int, int]:
    """When each number that `every` divides came first: the time of the chunk that brought it."""
    times: dict[int, int] = {}
    for before, mark in pairwise([Mark(0, 0), *marks]):
        for number in numbers[before.events : mark.events]:
            if number % every == 0:
                times.setdefault(number, mark.at)
    return times


def difference(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> dict[str, float | None]:
    """CPU seconds spent between two readings; None where a process cannot be read."""
    return {
        name: None if was is None or (now := after.get(name)) is None else round(now - was, 3)
        for name, was in before.items()
    }
