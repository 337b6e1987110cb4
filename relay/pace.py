"""How long to wait before the next fetch when the last one found nothing. No I/O, no clock."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pace:
    """Adaptive polling: quick while events come, slow when idle. The wait grows with the time since the last event.

    With the defaults: 1.5 ms at first, 5 ms after 0.1 s of silence, 50 ms after a second (docs/design.md, "Waking").
    """

    shortest: float = 0.0015
    """Seconds. The wait right after an event."""
    longest: float = 0.05
    """Seconds. The wait of an idle lane; an event that ends the silence is noticed half of this later on average."""
    slope: float = 0.05
    """Seconds of wait a second of silence."""

    def wait(self, silence: float) -> float:
        """Seconds to wait, `silence` seconds after the last event."""
        return min(self.longest, max(self.shortest, silence * self.slope))
