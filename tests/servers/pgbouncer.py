"""PgBouncer before a PostgreSQL: the one on the PATH, else Debian's package, unpacked into the cache."""

import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg

from tests.servers import debian
from tests.servers.postgres import demoted_user
from tests.servers.process import Process, free_port, make_folder, remove_folder

START_SECONDS = 20.0

SETTINGS = """\
[databases]
* = host=127.0.0.1 port={server}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {folder}/users.txt
pool_mode = transaction
default_pool_size = 4
max_client_conn = 200
"""


class PgBouncer:
    """PgBouncer in transaction mode before the server at port `server` of this machine. Each of the
    `users`, whom the server trusts, has four sessions of a database, however many connections it makes here."""

    def __init__(self, server: int, users: Sequence[str]) -> None:
        self.port = free_port()
        self._users = users
        self._server = server
        self._folder: Path | None = None
        self._process: Process | None = None

    def start(self) -> None:
        """Ready for connections; ServerUnavailable where this machine has no PgBouncer and cannot have it."""
        program, libraries = _program()
        self._folder = folder = make_folder("pgbouncer")
        (folder / "pgbouncer.ini").write_text(SETTINGS.format(server=self._server, port=self.port, folder=folder))
        (folder / "users.txt").write_text("".join(f'"{user}" ""\n' for user in self._users))
        environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)} if libraries else None
        user: dict[str, Any] = demoted_user()
        if user:
            folder.chmod(0o755)
            program, environment = _readable(program, libraries, folder, environment)
        command = [program, folder / "pgbouncer.ini"]
        self._process = process = Process(
            "pgbouncer", command, folder=folder, stop_signal=signal.SIGINT, environment=environment, user=user
        )
        with process.starting():
            process.wait_for(self._answers, START_SECONDS)

    def _answers(self) -> bool:
        try:
            psycopg.connect(f"postgresql://{self._users[0]}@127.0.0.1:{self.port}/postgres", connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def close(self) -> None:
        """Ends it for good and removes its folder."""
        if self._process is not None:
            self._process.kill()
        if self._folder is not None:
            remove_folder(self._folder)


def _program() -> tuple[Path, Path | None]:
    """The program, and the folder of its libraries where it was unpacked here."""
    if found := shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
        return Path(found), None
    parts = debian.unpacked("pgbouncer", r"libevent\S*|libc-?ares\S*")
    [libraries] = {path.parent for path in parts.rglob("libevent-*.so*")}
    return next(parts.rglob("sbin/pgbouncer")), libraries


def _readable(
    program: Path, libraries: Path | None, folder: Path, environment: dict[str, str] | None
) -> tuple[Path, dict[str, str] | None]:
    """Copies where an unprivileged user can run them, of what lies in the cache of root."""
    if libraries is None:
        return program, environment
    shutil.copytree(libraries, folder / "lib", symlinks=True)
    return Path(shutil.copy(program, folder)), {**os.environ, "LD_LIBRARY_PATH": str(folder / "lib")}
