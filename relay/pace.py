"""How long to wait: before the next fetch when the last one found nothing, and after trouble. No I/O, no clock."""

import random
from dataclasses import dataclass

BACKOFF_FIRST, BACKOFF_MOST = 0.1, 5.0
"""Seconds before the first retry, and at most. It doubles in between, with jitter, for ever."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Adaptive polling: quick while events come, slow when idle. The wait grows with the time since the last event.

    With the defaults: 1.5 ms at first, 5 ms after 0.1 s of silence, 50 ms after a second, 125 ms after two and a half
    (docs/design.md, "Waking").
    """

    shortest: float = 0.0015
    """Seconds. The wait right after an event."""
    longest: float = 0.125
    """Seconds. The wait of an idle lane; an event that ends the silence is noticed half of this later on average."""
    slope: float = 0.05
    """Seconds of wait a second of silence."""

    def wait(self, silence: float) -> float:
        """Seconds to wait, `silence` seconds after the last event."""
        return min(self.longest, max(self.shortest, silence * self.slope))


class Backoff:
    """Waits that grow, drawn between half of the step and all of it."""

    def __init__(self) -> None:
        self._step = BACKOFF_FIRST

    def wait(self) -> float:
        """Seconds to wait before the next try."""
        step, self._step = self._step, min(self._step * 2, BACKOFF_MOST)
        return step * random.uniform(0.5, 1.0)  # noqa: S311 -- jitter, no secret
