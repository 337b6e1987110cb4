"""The servers that the demo, the tests and the benchmarks share: real ones, started here, proved to be ours.

    with Postgres() as postgres, Kafka() as kafka:            # one after the other
    postgres, kafka = Postgres(fsync=True), Kafka(brokers=3)
    with running(postgres, kafka): ...                        # side by side

A server is a URL in the environment, local parts, or a container (choice.py); on the first use its parts are
downloaded and kept (cache.py). It ends with the process that started it, however that dies (guardian.py).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

from tests.servers.errors import ServerError, ServerUnavailable, StartFailed
from tests.servers.kafka import Kafka
from tests.servers.pgbouncer import PgBouncer
from tests.servers.postgres import Postgres
from tests.servers.registry import Registry

__all__ = [
    "Kafka",
    "PgBouncer",
    "Postgres",
    "Registry",
    "Server",
    "ServerError",
    "ServerUnavailable",
    "StartFailed",
    "running",
    "start_all",
]


class Server(Protocol):
    """What every server can do."""

    def start(self) -> None: ...
    def close(self) -> None: ...


def start_all(*servers: Server) -> None:
    """Starts servers side by side; when one fails, all are closed and its error is raised."""
    with ThreadPoolExecutor(len(servers)) as pool:
        started = [pool.submit(server.start) for server in servers]
    errors = [error for future in started if (error := future.exception())]
    if errors:
        for server in servers:
            server.close()
        raise errors[0]


@contextmanager
def running(*servers: Server) -> Iterator[None]:
    """Servers started side by side, closed at the end of the block."""
    start_all(*servers)
    try:
        yield
    finally:
        for server in servers:
            server.close()
