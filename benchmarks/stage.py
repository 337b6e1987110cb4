"""Where all benchmarks of a run play: one PostgreSQL, one Kafka, databases and topics, and the relays between them."""

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks import machine, naive
from benchmarks.figures import KEYS
from outbox.migrate import migrate
from tests.servers import Kafka, Postgres, ServerError
from tests.servers.broker import VERSION
from tests.servers.process import Process, make_folder, remove_folder

POSTGRES = {
    "shared_buffers": "256MB",  # the default of 128 MB would measure the cache of a 200k backlog
    "max_wal_size": "4GB",  # no checkpoint by volume in the middle of a round
}
"""Server settings beside the defaults of tests/servers; fsync and synchronous_commit are on. Part of every result."""

LIBRARIES = {"shared_preload_libraries": "pg_stat_statements", "pg_stat_statements.track": "none"}
"""It counts nothing before `Stage.track`."""

PARTITIONS = 4

TYPE = "com.chipquality.events.inspection.INSPECTION_COMPLETED"
FINGERPRINT = 1_234_567  # the relay frames the bytes and never reads them
VALUE_BYTES = 200
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Contender:
    """A relay to be measured: its program, its database, the table from which it publishes."""

    name: str
    database: str
    table: str
    command: tuple[str, ...]
    ready: str
    """What its log says when it takes up its work."""
    root: Path = ROOT
    """The tree that its program comes from."""

    def rows(self) -> str:
        """The columns of an event."""
        return f"{self.table} (id, type, topic, key, value, fingerprint)"


@dataclass(frozen=True, slots=True)
class Backlog:
    """Events 1 to `events` that wait. A value starts with the event's number as eight bytes, big-endian."""

    topics: tuple[str, ...]
    """Each key has its topic."""
    events: int
    size: int = VALUE_BYTES
    """Bytes of a value."""
    keys: int = KEYS
    """They take turns (figures.key_of)."""
    partitions: int = PARTITIONS
    """Of each topic."""
    headers: int = 0
    """Of the event's own, 20 bytes each."""

    def insert(self, contender: Contender) -> str:
        """One INSERT of all of them."""
        topics = ", ".join(f"'{topic}'" for topic in self.topics)
        own = ", ".join(f"'header-{number}', 'value-of-{number}'" for number in range(self.headers))
        columns, headers = contender.rows(), ""
        if self.headers:
            columns, headers = columns.replace("fingerprint", "fingerprint, headers"), f", jsonb_build_object({own})"
        return (
            f"INSERT INTO {columns} SELECT gen_random_uuid(), '{TYPE}',"
            f" (ARRAY[{topics}])[1 + n % {self.keys} % {len(self.topics)}], 'key-' || (n % {self.keys}),"
            f" int8send(n) || decode(repeat('ab', {self.size - 8}), 'hex'), {FINGERPRINT}{headers}"
            f" FROM generate_series(1::bigint, {self.events}) AS n"
        )


class Stage:
    """The servers of a run, each started at its first use."""

    def __init__(self) -> None:
        self._postgres: Postgres | None = None
        self._kafka: Kafka | None = None

    @property
    def postgres(self) -> Postgres:
        """PostgreSQL with fsync on."""
        if self._postgres is None:
            self._postgres = Postgres(fsync=True, settings={**POSTGRES, **LIBRARIES})
            self._postgres.start()
        return self._postgres

    @property
    def kafka(self) -> Kafka:
        """One broker."""
        if self._kafka is None:
            self._kafka = Kafka(brief=False)
            self._kafka.start()
        return self._kafka

    def database(self, name: str, lanes: int = 1) -> str:
        """URL of a new database with the outbox's tables."""
        url = self.postgres.create_database(name)
        migrate(url, lanes=lanes)
        return url

    def relay(self, database: str, lanes: int = 1) -> Contender:
        """Our relay on a new database."""
        self.database(database, lanes)
        return Contender("relay", database, "outbox.outbox", ("relay", "run"), "lane taken")

    def naive(self, database: str) -> Contender:
        """The naive relay on a new database with a table of its own."""
        self.postgres.create_database(database)
        self.postgres.execute(naive.TABLE, database)
        return Contender("naive", database, "naive", ("benchmarks.naive",), naive.READY)

    def topic(self, name: str, partitions: int = PARTITIONS) -> str:
        """A new topic."""
        return self.kafka.create_topic(name, partitions)

    def seed(self, contender: Contender, backlog: Backlog) -> None:
        """All of it in one INSERT."""
        self.postgres.execute(backlog.insert(contender), contender.database)

    def track(self, contender: Contender) -> None:
        """Count the statements of sessions that begin from now on in its database."""
        self.postgres.execute("CREATE EXTENSION pg_stat_statements", contender.database)
        self.postgres.execute(f"ALTER DATABASE {contender.database} SET pg_stat_statements.track = 'top'")

    def wal(self) -> int:
        """Bytes of WAL that were written since the cluster began."""
        return int(self.postgres.execute("SELECT pg_current_wal_insert_lsn() - '0/0'")[0][0])

    def vacuum(self, contender: Contender) -> None:
        """No vacuum is due in the next round: its figure would depend on when it comes."""
        self.postgres.execute(f"VACUUM {contender.table}", contender.database)

    def settle(self, contender: Contender) -> None:
        """After a seed: the planner knows the backlog, and what the seed wrote is not written out during the round."""
        self.postgres.execute(f"ANALYZE {contender.table}", contender.database)
        self.postgres.execute("CHECKPOINT")

    @contextmanager
    def running(
        self, contender: Contender, *, ready: str | None = None, settings: Mapping[str, str] | None = None
    ) -> Iterator[Process]:
        """The contender's process, from when its log says `ready` until it has stopped in order. `settings` go into its
        environment."""
        environment = {
            "OUTBOX_DATABASE_URL": self.postgres.url(contender.database),
            "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": self.kafka.bootstrap,
            "PYTHONPATH": str(contender.root),
            "OUTBOX_KAFKA_COMPRESSION_TYPE": "none",  # the naive relay has none either, and a filler says nothing of it
            **(settings or {}),
        }
        folder = make_folder("benchmark")
        command = [sys.executable, "-m", *contender.command]
        process = Process(contender.name, command, folder=folder, stop_signal=signal.SIGTERM, environment=environment)
        try:
            with process.starting():
                process.wait_for(lambda: process.said(ready or contender.ready), 30)
            yield process
            for line in _complaints(process):
                say(f"  {contender.name} says: {line}")
            if not process.alive:
                raise process.failure(f"{contender.name} ended by itself")
        finally:
            process.stop()
            remove_folder(folder)

    def pids(self, **others: int | None) -> dict[str, int | None]:
        """Whose CPU is counted: `others` by their names, broker and database. None: it cannot be read from here."""
        return {**others, "broker": _pid_of_broker(self._kafka), "database": _pid_of_database(self._postgres)}

    def description(self) -> dict[str, Any]:
        """What every result says about machine, versions and settings."""
        described = machine.description()
        versions: dict[str, Any] = described["versions"]
        if self._postgres is not None:
            versions["postgresql"] = self._postgres.execute("SHOW server_version")[0][0]
        if self._kafka is not None:
            versions["kafka"] = VERSION if _pid_of_broker(self._kafka) else "not started here"
        return {**described, "settings": self._settings()}

    def _settings(self) -> Mapping[str, str]:
        if self._postgres is None:
            return {}
        names = ("fsync", "synchronous_commit", *POSTGRES)
        return {name: self._postgres.execute(f"SHOW {name}")[0][0] for name in names}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in (self._kafka, self._postgres):
            if server is not None:
                server.close()


def _complaints(process: Process) -> list[str]:
    """What its log has beside the ordinary: a figure measured with a lane lost in between says something else."""
    words = ('"warning"', '"error"', "Error", "recycled", "lane lost", "lane in doubt")
    return [line for line in process.tail(1_000).splitlines() if any(word in line for word in words)]


def _pid_of_broker(kafka: Kafka | None) -> int | None:
    try:
        return kafka.pid() if kafka else None
    except ServerError:
        return None


def _pid_of_database(postgres: Postgres | None) -> int | None:
    try:
        return postgres.pid if postgres else None
    except ServerError:
        return None


def say(text: str) -> None:
    """Progress, for people: stderr, so that stdout holds JSON lines only."""
    print(text, file=sys.stderr, flush=True)
