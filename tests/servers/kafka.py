"""Apache Kafka for the tests: the broker's own jars on the wheel's Java, or Docker. One broker or three (KRaft)."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from tests.servers import docker, java
from tests.servers.broker import (
    VERSION,
    Door,
    LocalBroker,
    ask_cluster_id,
    fast_start,
    lacks_parts,
    listeners,
    new_id,
    with_doors,
)
from tests.servers.choice import Source, choose
from tests.servers.errors import ServerError, ServerUnavailable, StartFailed
from tests.servers.process import free_port

URL_VARIABLE = "OUTBOX_TEST_KAFKA"


def settings_for(brokers: int) -> dict[str, str]:
    """What differs from the broker's defaults, with the reason of each."""
    replicas = str(min(3, brokers))
    return {
        "auto.create.topics.enable": "false",  # a mistyped topic must be an error
        "group.initial.rebalance.delay.ms": "0",  # default 3 s a consumer group
        "group.min.session.timeout.ms": "500",  # default 6 s before a killed member is missed
        "offsets.topic.replication.factor": replicas,
        "transaction.state.log.replication.factor": replicas,
        "transaction.state.log.min.isr": str(min(2, brokers)),
        "min.insync.replicas": str(min(2, brokers)),
        "default.replication.factor": replicas,
        "offsets.topic.num.partitions": "8",  # default 50: half a second of creating files at the first commit
        "transaction.state.log.num.partitions": "8",
        "broker.session.timeout.ms": "3000",  # default 9 s, which a killed broker waits out before it is let in again
        "broker.heartbeat.interval.ms": "500",
        "log.retention.ms": "-1",  # default 7 days: records of other years would be gone 30 s after the start
        "log.cleaner.dedupe.buffer.size": "16777216",  # default 128 MB of heap
    }


class Kafka:
    """A Kafka cluster of our own: same data, ports and cluster id over `kill()` and `start()`.

    `settings` are broker properties added to `settings_for` and win over it. `heap` is the JVM's -Xmx. `brief`: the JVM
    compiles for a life of some minutes, which costs half the CPU; False for measurements: as brokers run in earnest.
    `stop`, `kill` and `start` take one broker's number, or act on all of them. `doors`: so many more listeners has a
    broker, each advertised at the port of a proxy that the test runs (`self.doors[door][broker]`, known after `start`).
    `guarded`: more listeners by name, with their security protocol; `address` tells where, and what they ask of clients
    is in `settings`.
    """

    def __init__(
        self,
        brokers: int = 1,
        settings: Mapping[str, str] | None = None,
        *,
        heap: str = "768m",
        doors: int = 0,
        guarded: Mapping[str, str] | None = None,
        brief: bool = True,
    ) -> None:
        def lacks_docker() -> str | None:
            special = brokers > 1 or doors or guarded
            return "Docker is used for one broker with one listener only" if special else docker.lacks()

        self._source = choose("Kafka", variable=URL_VARIABLE, local=lacks_parts, docker=lacks_docker)
        if self._source is Source.URL and (doors or guarded):
            raise ServerUnavailable(f"The Kafka of {URL_VARIABLE} has no listeners of a test's own.")
        self._settings = {**settings_for(brokers), **(settings or {})}
        self._size = brokers
        self._options = ["-Xms256m", f"-Xmx{heap}", *([java.BRIEF] if brief else [])]
        self._doors = doors
        self.doors: list[list[Door]] = []
        self._protocols = dict(guarded or {})
        self._guarded: list[list[Door]] = []
        self._brokers: list[LocalBroker] | list[_DockerBroker] = []
        self.cluster_id = new_id()
        self.bootstrap = os.environ.get(URL_VARIABLE, "")

    def start(self, broker: int | None = None) -> None:
        """Ready for clients, and proved by its cluster id to be the cluster made here; raises StartFailed otherwise."""
        if self._source is Source.URL:
            self.cluster_id = ask_cluster_id(self.bootstrap)
            return
        if not self._brokers:
            self._make()
        with ThreadPoolExecutor(self._size) as pool:  # a quorum: none is ready before the others run
            list(pool.map(lambda one: one.start(), self._chosen(broker)))

    def _make(self) -> None:
        ports = [(free_port(), free_port()) for _ in range(self._size)]
        self.bootstrap = ",".join(f"127.0.0.1:{port}" for port, _ in ports)
        if self._source is Source.DOCKER:
            self._brokers = [_DockerBroker(ports[0][0], self._settings, self.cluster_id)]
            return
        self.doors = [[Door(f"DOOR{number}", free_port(), free_port()) for _ in ports] for number in range(self._doors)]
        self._guarded = [
            [Door(name, port, port, protocol) for port in [free_port() for _ in ports]]
            for name, protocol in self._protocols.items()
        ]
        more = [*self.doors, *self._guarded]
        options = [*self._options, *fast_start()]
        voters = ",".join(f"{number}@127.0.0.1:{controller}" for number, (_, controller) in enumerate(ports))
        self._brokers = [
            LocalBroker(
                number,
                port,
                {
                    **with_doors(listeners(number, port, controller, voters), [doors[number] for doors in more]),
                    **self._settings,
                },
                cluster_id=self.cluster_id,
                options=options,
            )
            for number, (port, controller) in enumerate(ports)
        ]

    def stop(self, broker: int | None = None) -> None:
        """Ends it in order (SIGTERM: a controlled shutdown)."""
        with ThreadPoolExecutor(self._size) as pool:
            list(pool.map(lambda one: one.stop(), self._chosen(broker)))

    def kill(self, broker: int | None = None) -> None:
        """SIGKILL; returns when it is gone and its port is free."""
        for one in self._chosen(broker):
            one.kill()

    def close(self) -> None:
        """Ends it for good, without an orderly shutdown, and removes its folders."""
        for broker in self._brokers:
            broker.close()
        self._brokers = []

    def pid(self, broker: int = 0) -> int:
        """Process id of a broker (local only)."""
        return self._local(broker).process.pid

    def log(self, broker: int = 0) -> Path:
        """The log of a broker (local only)."""
        return self._local(broker).process.log

    @property
    def logs(self) -> list[Path]:
        """The logs of all brokers (local only)."""
        return [self.log(number) for number in range(self._size)]

    def address(self, listener: str) -> str:
        """Where a guarded listener is reached (local only)."""
        doors = [door for doors in self._guarded for door in doors if door.name == listener]
        return ",".join(f"127.0.0.1:{door.advertised}" for door in doors)

    def admin(self) -> AdminClient:
        """A new admin client of the cluster."""
        return AdminClient({"bootstrap.servers": self.bootstrap})

    def create_topic(self, name: str, partitions: int = 1, config: Mapping[str, str] | None = None) -> str:
        """Creates a topic, replicated as far as there are brokers; returns its name when its leaders are known."""
        admin = self.admin()
        topic = NewTopic(name, partitions, min(3, self._size), config=dict(config or {}))
        admin.create_topics([topic])[name].result(30)
        while any(part.leader < 0 for part in admin.list_topics(name, timeout=30).topics[name].partitions.values()):
            pass  # list_topics waits for the broker's answer: no busy loop
        return name

    def log_bytes(self, topic: str) -> int | None:
        """Bytes of the topic's log on the first broker's disk; None where that cannot be seen from here."""
        if not self._brokers or not isinstance(self._brokers[0], LocalBroker):
            return None
        return sum(log.stat().st_size for log in self._brokers[0].folder.glob(f"data/{topic}-*/*.log"))

    def _chosen(self, broker: int | None) -> "list[LocalBroker] | list[_DockerBroker]":
        if not self._brokers:
            raise ServerError("This Kafka was not started here, so it cannot be stopped here.")
        return self._brokers if broker is None else self._brokers[broker : broker + 1]

    def _local(self, broker: int) -> "LocalBroker":
        one = self._chosen(broker)[0]
        if not isinstance(one, LocalBroker):
            raise ServerError("Only a local broker has a process and a log here.")
        return one

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _DockerBroker:
    """One broker in a container, at a fixed port of this machine. Untested where it was written."""

    def __init__(self, port: int, settings: Mapping[str, str], cluster_id: str) -> None:
        def check() -> None:
            found = ask_cluster_id(f"127.0.0.1:{port}")
            if found != cluster_id:
                raise StartFailed(f"Port {port}: cluster {found} answers instead of {cluster_id}.")

        controller = 29093
        properties = {**listeners(1, port, controller, f"1@localhost:{controller}", host="0.0.0.0"), **settings}  # noqa: S104 # inside the container
        self._container = docker.kafka(f"apache/kafka:{VERSION}", port, properties, cluster_id, ready=check)
        self.start = self._container.start
        self.stop = self._container.stop
        self.kill = self._container.kill
        self.close = self._container.close
