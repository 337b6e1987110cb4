"""Servers as containers, for those who have Docker. Not run where this was written (no engine there): untested.

Every container has a fixed port of this machine, so that it comes back at the same address; testcontainers' own
watcher removes them when this process dies.
"""

import importlib.util
import signal
import subprocess
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from tests.servers.errors import StartFailed

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

POSTGRES_IMAGE = "postgres:18"


def lacks() -> str | None:
    """What is missing to run containers, None when nothing."""
    if importlib.util.find_spec("testcontainers") is None:
        return "install `testcontainers` (dependency group `servers`)"
    try:
        done = subprocess.run(["docker", "info"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "install and start Docker"
    return None if done.returncode == 0 else "start the Docker engine (`docker info` fails)"


class Container:
    """One container; made by the first `start`, kept until `close`. `ready` raises until the server answers."""

    def __init__(self, container: "DockerContainer", ready: Callable[[], None], timeout: float = 60.0) -> None:
        self._container = container
        self._ready = ready
        self._timeout = timeout
        self._made = False

    def start(self) -> None:
        if self._made:
            self._container.get_wrapped_container().start()
        else:
            self._container.start()
            self._made = True
        self._wait()

    def _wait(self) -> None:
        import time

        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return self._ready()
            except StartFailed:
                wrapped = self._container.get_wrapped_container()
                wrapped.reload()
                if wrapped.status != "running" or time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def stop(self) -> None:
        self._container.get_wrapped_container().stop()

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        wrapped = self._container.get_wrapped_container()
        wrapped.kill(number.name)
        wrapped.wait()

    def close(self) -> None:
        if self._made:
            self._container.stop()


def postgres(port: int, settings: Mapping[str, str], ready: Callable[[], None]) -> Container:
    """PostgreSQL at 127.0.0.1:`port`, without a password."""
    from testcontainers.core.container import DockerContainer

    options = " ".join(f"-c {name}={value}" for name, value in settings.items() if " " not in value)
    container = (
        DockerContainer(POSTGRES_IMAGE)
        .with_env("POSTGRES_HOST_AUTH_METHOD", "trust")
        .with_bind_ports(5432, port)
        .with_command(f"postgres {options}")
    )
    return Container(container, ready)


def kafka(
    image: str, port: int, properties: Mapping[str, str], cluster_id: str, ready: Callable[[], None]
) -> Container:
    """One broker at 127.0.0.1:`port`, its properties given as the image's KAFKA_… variables."""
    from testcontainers.core.container import DockerContainer

    container = DockerContainer(image).with_bind_ports(port, port).with_env("CLUSTER_ID", cluster_id)
    for name, value in properties.items():
        container = container.with_env("KAFKA_" + name.upper().replace(".", "_"), value)
    return Container(container, ready)
