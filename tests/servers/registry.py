"""Apicurio, a schema registry with Confluent's API, for the tests: its distribution on the wheel's Java, or a URL."""

import os
import signal
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.servers import java
from tests.servers.choice import Source, choose
from tests.servers.errors import ServerError, ServerUnavailable
from tests.servers.process import Process, free_port, make_folder, remove_folder

URL_VARIABLE = "OUTBOX_TEST_REGISTRY"
VERSION = "3.3.3"
ARTIFACT = ("io.apicurio", "apicurio-registry-app", VERSION, "all")
CACHED = f"apicurio-{VERSION}"
JAVA = 21
START_SECONDS = 60.0


class Registry:
    """A registry of our own, its data in memory: every start is an empty one, at the same address.

    Its global compatibility is NONE until a client sets another.
    """

    def __init__(self) -> None:
        self._source = choose(
            "schema registry",
            variable=URL_VARIABLE,
            local=lambda: java.lacks(JAVA, CACHED),
            docker=lambda: "Docker is not used for the registry",
        )
        self._folder: Path | None = None
        self._process: Process | None = None
        self.url = os.environ.get(URL_VARIABLE, "")

    def start(self) -> None:
        """Ready: our own process has said that it listens; raises StartFailed otherwise."""
        if self._source is Source.URL:
            return
        if self._process is None:
            self._process = self._make()
        process = self._process
        with process.starting():
            process.wait_for(lambda: process.said("Listening on: "), START_SECONDS)

    def _make(self) -> Process:
        found = java.find(JAVA)
        if found is None:
            raise ServerUnavailable(f"No schema registry: {java.lacks(JAVA, CACHED)}.")
        runner = next(java.archive(CACHED, *ARTIFACT, hint="170 MB unpacked, once").rglob("quarkus-run.jar"))
        port, management = free_port(), free_port()
        self._folder = make_folder("registry")
        self.url = f"http://127.0.0.1:{port}/apis/ccompat/v7"
        options = {
            "java.io.tmpdir": self._folder,
            "quarkus.http.host": "127.0.0.1",
            "quarkus.http.port": port,
            "quarkus.management.host": "127.0.0.1",  # default: port 9000 of every interface
            "quarkus.management.port": management,
        }
        properties = [f"-D{name}={value}" for name, value in options.items()]
        command: list[str | Path] = [found.launcher, "-Xmx512m", java.BRIEF, *properties, "-jar", runner]
        return Process("registry", command, folder=self._folder, stop_signal=signal.SIGTERM)

    def stop(self) -> None:
        """Ends it in order."""
        self._owned().stop()

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._owned().kill()

    def close(self) -> None:
        """Ends it for good and removes its folder."""
        if self._process is not None and self._folder is not None:
            self._process.kill()
            remove_folder(self._folder)
            self._process = None

    @property
    def pid(self) -> int:
        """Its process id (local only)."""
        return self._owned().pid

    @property
    def log(self) -> Path:
        """Its log (local only)."""
        return self._owned().log

    def _owned(self) -> Process:
        if self._process is None:
            raise ServerError("This registry was not started here, so it cannot be stopped here.")
        return self._process

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
