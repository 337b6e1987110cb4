"""What happened when: one JSON line each, for whoever looks for the cause of a failed run."""

import json
import threading
import time
from pathlib import Path
from typing import Any


class Trace:
    """A file of JSON lines. Thread-safe; every line is on disk when `note` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", buffering=1)
        self._lock = threading.Lock()
        self._begun = time.monotonic()

    def note(self, event: str, **fields: Any) -> None:
        """Writes a line with the time of the day, and the seconds since the start of the run."""
        now = time.time()
        line = {"time": _iso(now), "t": round(time.monotonic() - self._begun, 3), "event": event, **fields}
        with self._lock:
            self._file.write(json.dumps(line, default=str) + "\n")

    def close(self) -> None:
        self._file.close()


def _iso(now: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06d}Z"
