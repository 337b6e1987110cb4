"""The demo's processes, and a look at its databases from outside."""

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

from examples.chip_quality.screen import Figures
from tests.servers.process import Process

ROOT = Path(__file__).parents[2]


class Child(Process):
    """A Python process of the demo. It dies with the demo, however that dies. Its output goes to `log`."""

    def __init__(
        self, name: str, module: str, *arguments: str | Path, folder: Path, environment: Mapping[str, str]
    ) -> None:
        super().__init__(
            name,
            [sys.executable, "-m", module, *arguments],
            folder=folder,
            stop_signal=signal.SIGTERM,
            environment={"PYTHONPATH": str(ROOT), **environment},
        )
        self.status: int | None = None
        """How it ended; None while it runs."""
        self.may_end = False
        """Its end is no surprise."""

    def start(self, **more: str) -> None:
        """Starts it, or starts it again, with `more` in its environment."""
        self.status, self.may_end = None, False
        usual, self._environment = self._environment, {**self._environment, **more}
        try:
            super().start()
        finally:
            self._environment = usual

    def has_ended(self) -> bool:
        """Whether it has ended by itself; then its status is kept."""
        if not self.alive:
            self.end(signal.SIGKILL)
        return self.status is not None

    def end(self, number: signal.Signals, timeout: float = 30.0) -> None:
        """Sends it a signal, waits for its end, and keeps its exit status."""
        child = self._child
        super().end(number, timeout)
        if child is not None:
            self.status = child.returncode

    @contextmanager
    def asleep(self) -> Iterator[int]:
        """Stopped by SIGSTOP for the length of the block, which gets the size of its log."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield self.log.stat().st_size
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def events(self, since: int | None = None) -> list[dict[str, Any]]:
        """The JSON lines of its log: since its last start, or behind the first `since` bytes."""
        text = self._log_since_start() if since is None else self.log.read_bytes()[since:].decode(errors="replace")
        lines = text.splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]


@dataclass(frozen=True, slots=True)
class Cast:
    """Who plays."""

    writers: Sequence[Child]
    relays: Sequence[Child]
    """Those of the inspection service, which take turns at its one lane."""
    quality: Child
    quality_relay: Child
    analytics: Child
    notification: Child

    @property
    def all(self) -> list[Child]:
        return [*self.writers, *self.relays, self.quality, self.quality_relay, self.analytics, self.notification]

    def relay_with(self, pid: int | None) -> Child | None:
        """The running relay of this process id."""
        return next((relay for relay in self.relays if relay.alive and relay.pid == pid), None)


@dataclass(frozen=True, slots=True)
class Lane:
    """The lane's row in the database, and the process of its owner."""

    owner: UUID | None
    pid: int | None
    batch: int


class Watch:
    """Reads the databases of the services and the consumers, by name."""

    def __init__(self, urls: Mapping[str, str]) -> None:
        self._databases = {name: psycopg.connect(url, autocommit=True) for name, url in urls.items()}
        self._service = self._databases["inspection"]

    def close(self) -> None:
        """Ends the connections."""
        for database in self._databases.values():
            database.close()

    def lane(self) -> Lane:
        """Who holds the lane, and how far it is."""
        row = self._service.execute(
            "SELECT owner, pid, batch FROM outbox.lane LEFT JOIN outbox.relay ON relay.id = lane.owner"
        ).fetchone()
        return Lane(*row) if row else Lane(None, None, 0)

    def front(self) -> set[int]:
        """The first rows that wait to be published."""
        rows = self._service.execute("SELECT seq FROM outbox.outbox ORDER BY lane, seq LIMIT 1000").fetchall()
        return {row[0] for row in rows}

    def committed(self, topics: Sequence[str] | None = None) -> int:
        """Events in the two services' ledgers (of these topics only)."""
        query = "SELECT count(*) FROM ledger WHERE %(topics)s::text[] IS NULL OR topic = ANY(%(topics)s)"
        return sum(self._number(name, query, {"topics": topics}) for name in ("inspection", "quality"))

    def waiting(self) -> int:
        """Rows in the two services' outboxes."""
        return sum(self._number(name, "SELECT count(*) FROM outbox.outbox") for name in ("inspection", "quality"))

    def counted(self, consumer: str = "analytics") -> int:
        """Events that a consumer has claimed."""
        return self._number(consumer, "SELECT count(*) FROM outbox.inbox")

    def due(self) -> int:
        """Alerts whose mail is to be sent."""
        return self._number("notification", "SELECT count(*) FROM alerts WHERE state = 'DUE'")

    def _number(self, database: str, query: str, values: Mapping[str, Any] | None = None) -> int:
        return int(self._databases[database].execute(query, values).fetchall()[0][0])

    def figures(self, cast: Cast) -> Figures:
        """All of it at once, for the screen."""
        lane = self.lane()
        holder = cast.relay_with(lane.pid)
        name = "nobody" if lane.owner is None else holder.name if holder else "a dead relay"
        return Figures(
            committed=self.committed(), waiting=self.waiting(), counted=self.counted(), batch=lane.batch, owner=name
        )
