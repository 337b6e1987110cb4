"""A server's process: its log, its signals, its end. It never outlives the process that started it."""

import atexit
import contextlib
import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

from tests.servers import cache as kept
from tests.servers import guardian
from tests.servers.errors import StartFailed

# Below the range from which the kernel takes ports for outgoing connections (Linux 32768, macOS 49152): otherwise a
# client that keeps trying to reach a killed server can be given the server's own port and connect to itself.
PORTS = range(20000, 32768)

_given: set[int] = set()
_given_lock = threading.Lock()

_guardian: subprocess.Popen[str] | None = None
_guardian_lock = threading.Lock()


def free_port() -> int:
    """A port of 127.0.0.1 that was just bound and is free again; it stays the server's over its restarts.

    No port is given twice, in this process or to another one that lives: one may be bound much later than it was asked
    for, and a killed server's is free for a while.
    """
    with _given_lock:
        for port in random.sample(PORTS, 200):
            if port in _given:
                continue
            with contextlib.suppress(OSError):
                fcntl.lockf(_ports(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
                _bind(port)
                _given.add(port)
                return port
    raise StartFailed(f"None of 200 ports between {PORTS.start} and {PORTS.stop} can be bound.")


@cache
def _ports() -> IO[bytes]:
    """A file whose n-th byte is locked by the process that was given port n, until that ends."""
    return (kept.folder() / ".lock-ports").open("wb")


def wait_until_free(port: int, timeout: float = 10.0) -> None:
    """Nothing listens on `port` any more; raises TimeoutError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return _bind(port)
        except OSError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"Port {port} is still taken after {timeout:g} s.") from None
        time.sleep(0.02)


def _bind(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def make_folder(name: str) -> Path:
    """A temporary folder that is removed by `remove_folder`, or when this process dies."""
    path = Path(tempfile.mkdtemp(prefix=f"kafka-outbox-{name}-"))
    _tell(f"folder {path}")
    return path


def remove_folder(path: Path) -> None:
    """Removes a folder of `make_folder`."""
    shutil.rmtree(path, ignore_errors=True)
    _tell(f"gone {path}")


class Process:
    """One server process: started, asked to stop, killed, started again, always with the same command.

    `stop_signal` asks it to end in order; `orphan_signal` is what it gets when this process dies.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        folder: Path,
        stop_signal: signal.Signals,
        orphan_signal: signal.Signals = signal.SIGKILL,
        environment: Mapping[str, str] | None = None,
        user: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._command = [str(part) for part in command]
        self._folder = folder
        self._stop_signal = stop_signal
        self._orphan_signal = orphan_signal
        self._environment = {**os.environ, **(environment or {})}
        self._user = user or {}
        self._child: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def pid(self) -> int:
        """Process id; raises StartFailed when it does not run."""
        if self._child is None:
            raise StartFailed(f"{self.name} is not running.")
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether it runs now."""
        return self._child is not None and self._child.poll() is None

    def start(self) -> None:
        """Starts it; says nothing about its being ready. Its output is appended to `log`."""
        if self.alive:
            raise StartFailed(f"{self.name} is running already (pid {self.pid}).")
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._child = self._spawn(log)
        _tell(f"pid {self._child.pid} {int(self._orphan_signal)}")

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Starts it; the block waits until it is ready, and an error there leaves it killed."""
        self.start()
        try:
            yield
        except BaseException:
            self.kill()
            raise

    def _spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command,
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C at a terminal is for the owner, who then ends its servers in order
            **self._user,
        )

    def wait_for(self, ready: Callable[[], bool], timeout: float) -> None:
        """Returns when `ready()`; raises StartFailed with the log's tail when it dies first or `timeout` s pass."""
        deadline = time.monotonic() + timeout
        while not ready():
            if not self.alive:
                raise self.failure(f"{self.name} ended with status {self._child and self._child.returncode}")
            if time.monotonic() > deadline:
                raise self.failure(f"{self.name} was not ready within {timeout:g} s")
            time.sleep(0.02)

    def failure(self, what: str) -> StartFailed:
        """An error that says what happened and shows what the server said last."""
        return StartFailed(f"{what}. The end of {self.log}:\n{self.tail()}")

    def said(self, text: str) -> bool:
        """Whether its log has contained `text` since the last start."""
        return text in self._log_since_start()

    def tail(self, lines: int = 25) -> str:
        """The last lines of the log since the last start."""
        return "\n".join(self._log_since_start().splitlines()[-lines:])

    def _log_since_start(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def stop(self, timeout: float = 30.0) -> None:
        """Ends it in order; kills it after `timeout` seconds."""
        self.end(self._stop_signal, timeout)

    def kill(self) -> None:
        """Ends it with SIGKILL and returns when it is gone."""
        self.end(signal.SIGKILL)

    def end(self, number: signal.Signals, timeout: float = 30.0) -> None:
        """Sends it a signal and returns when it is gone; SIGKILL after `timeout` seconds."""
        child, self._child = self._child, None
        if child is None:
            return
        child.send_signal(number)
        try:
            child.wait(timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        _tell(f"done {child.pid}")


def _tell(line: str) -> None:
    """Tells the guardian (started by the first call) what to end or to remove when this process dies."""
    global _guardian
    with _guardian_lock:
        if _guardian is None:
            _guardian = subprocess.Popen(
                [sys.executable, "-IS", guardian.__file__],
                stdin=subprocess.PIPE,
                text=True,
                start_new_session=True,  # so that neither Ctrl-C nor the end of a terminal reaches it
            )
            atexit.register(_dismiss, _guardian)
        if _guardian.stdin is None:
            raise StartFailed("The guardian has no pipe.")
        _guardian.stdin.write(line + "\n")
        _guardian.stdin.flush()


def _dismiss(watcher: subprocess.Popen[str]) -> None:
    """At an orderly exit what was not closed is ended and removed before this process is gone."""
    watcher.communicate()
