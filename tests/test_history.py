"""What the page draws: rates and delays of the last minutes, out of the counters."""

import time
from typing import Any

import pytest

from relay import history
from relay.history import POINTS, WINDOW, History, quantile
from relay.metrics import SECONDS, Metrics


class Clock:
    """A `time` whose seconds pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(history, "time", clock)
    return clock


def batch(metrics: Metrics, count: int, seconds: float) -> None:
    row: tuple[Any, ...] = (1, "", "t", "topic", "k", b"", None, None, (time.time() - seconds) * 1000)
    metrics.batch([row] * count, 0.01)


def test_a_rate_is_of_the_seconds_that_have_passed_and_a_delay_of_the_last_points(clock: Clock) -> None:
    metrics = Metrics()
    kept = History(metrics)
    batch(metrics, 500, 0.07)
    clock.now += 2
    kept.take()
    [point] = kept.points()
    assert (point.at, point.rate) == (1_002, 250)
    assert 0.05 < point.median <= point.p99 <= 0.1
    for _ in range(WINDOW):
        clock.now += 1
        kept.take()
    assert (kept.points()[-1].rate, kept.points()[-1].median) == (0, None), "what is over is not said for ever"


def test_what_waits_is_said_of_the_second_in_which_it_was_seen_and_unknown_else(clock: Clock) -> None:
    kept = History(Metrics())
    kept.pending = 7
    for _ in range(2):
        clock.now += 1
        kept.take()
    assert [point.pending for point in kept.points()] == [7, None]


def test_it_keeps_five_minutes_and_no_more(clock: Clock) -> None:
    kept = History(Metrics())
    for _ in range(POINTS + 50):
        clock.now += 1
        kept.take()
    assert len(kept.points()) == POINTS
    assert kept.points()[-1].at == clock.now


@pytest.mark.parametrize(
    ("counts", "share", "seconds"),
    [
        ({}, 0.5, None),
        ({0: 10}, 0.5, 0.001),
        ({3: 100}, 0.5, 0.015),
        ({0: 98, 5: 2}, 0.99, 0.075),
        ({len(SECONDS): 1}, 0.5, SECONDS[-1]),
    ],
)
def test_a_quantile_lies_between_the_bounds_that_its_observations_are_between(
    counts: dict[int, int], share: float, seconds: float | None
) -> None:
    assert quantile([counts.get(place, 0) for place in range(len(SECONDS) + 1)], share) == seconds
