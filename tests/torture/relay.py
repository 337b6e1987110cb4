"""`relay run` with a clock that is not this machine's: OUTBOX_TEST_CLOCK names a file with the seconds it is ahead.

The file may change while the relay runs: the clock jumps. time.time and time.time_ns are shifted, and what Python code
makes of them; intervals (time.monotonic) go on, as they do on every machine whose clock is set. Not by libfaketime:
under 0.9.10 time.sleep of Python 3.11 fails with EINVAL.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

CLOCK = "OUTBOX_TEST_CLOCK"
LOOK_SECONDS = 0.2


def set_clock(clock: Path, ahead: float) -> None:
    """In one step: nobody reads half of it."""
    new = clock.with_suffix(".new")
    new.write_text(str(ahead))
    new.replace(clock)


class Clock:
    """The shifted clock of this process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._time, self._time_ns = time.time, time.time_ns
        self._ahead = 0.0
        self._look()

    def time(self) -> float:
        return self._time() + self._ahead

    def time_ns(self) -> int:
        return self._time_ns() + int(self._ahead * 1_000_000_000)

    def follow(self) -> None:
        """Read the file for ever, and say when it has changed."""
        while True:
            time.sleep(LOOK_SECONDS)
            self._look()

    def _look(self) -> None:
        ahead = float(self._path.read_text())
        if ahead != self._ahead:
            self._ahead = ahead
            print(json.dumps({"event": "clock jumped", "ahead": ahead}), file=sys.stderr, flush=True)


def main() -> None:
    """The process. On SIGUSR1 it says on stderr what each thread is at."""
    faulthandler.register(signal.SIGUSR1)
    clock = Clock(Path(os.environ[CLOCK]))
    threading.Thread(target=clock.follow, daemon=True).start()
    time.time, time.time_ns = clock.time, clock.time_ns

    from relay.__main__ import main as relay  # only now: what it imports shall find the shifted clock

    relay(["run"])


if __name__ == "__main__":
    main()
