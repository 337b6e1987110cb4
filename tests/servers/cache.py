"""What is made once for a machine and kept between runs: $XDG_CACHE_HOME (or ~/.cache) / kafka-outbox."""

import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# What this process has made, and so has waited for.
made: set[str] = set()


def folder() -> Path:
    """The cache folder, made when missing; deleting it is always safe while nothing runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "kafka-outbox"
    path.mkdir(parents=True, exist_ok=True)
    return path


def once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, complete: made by one process while the others wait, and renamed when done.

    `make` fills the folder that it is given. Its error leaves nothing behind, so that the next call tries again.
    """
    target = folder() / name
    if target.exists():
        return target
    with _lock(name):
        if not target.exists():
            unfinished = folder() / f".making-{name}"
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that died; nobody else holds the lock
            unfinished.mkdir()
            try:
                make(unfinished)
                unfinished.rename(target)
                made.add(name)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return target


def say(sentence: str) -> None:
    """One line for the person who waits, on stderr."""
    print(sentence, file=sys.stderr, flush=True)


@contextmanager
def _lock(name: str) -> Iterator[None]:
    """An exclusive lock that dies with its process."""
    with (folder() / f".lock-{name}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
