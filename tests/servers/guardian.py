"""Ends the servers and removes their folders when their owner dies, even by SIGKILL.

Runs as a process of its own (`python guardian.py`) whose stdin is a pipe from the owner: end of file means that the
owner is gone. Not PR_SET_PDEATHSIG: that fires when the *thread* that started a server ends, and knows Linux only.
Lines: `pid <pid> <signal>` · `done <pid>` · `folder <path>` · `gone <path>`.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable

# A server that was asked to end gets this long before it is killed.
GRACE_SECONDS = 5.0


def read(lines: Iterable[str]) -> tuple[dict[int, int], set[str]]:
    """The processes (with the signal that ends each) and the folders that are left at the end of the input."""
    processes: dict[int, int] = {}
    folders: set[str] = set()
    for line in lines:
        word, _, rest = line.rstrip("\n").partition(" ")
        if word == "pid":
            pid, _, number = rest.partition(" ")
            processes[int(pid)] = int(number)
        elif word == "done":
            processes.pop(int(rest), None)
        elif word == "folder":
            folders.add(rest)
        elif word == "gone":
            folders.discard(rest)
    return processes, folders


def end(processes: dict[int, int]) -> None:
    """Every process is gone afterwards: its own signal first, SIGKILL after GRACE_SECONDS."""
    left = {pid for pid, number in processes.items() if _send(pid, number)}
    deadline = time.monotonic() + GRACE_SECONDS
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = {pid for pid in left if _send(pid, 0)}
    for pid in left:
        _send(pid, signal.SIGKILL)


def _send(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    """Waits for the owner's end, then cleans up."""
    processes, folders = read(sys.stdin)
    end(processes)
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
