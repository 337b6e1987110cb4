"""Apache Kafka for the tests: the broker's own jars on the wheel's Java, or Docker. One broker or three (KRaft)."""

import base64
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from tests.servers import cache, docker, java
from tests.servers.choice import Source, choose
from tests.servers.errors import ServerError, ServerUnavailable, StartFailed
from tests.servers.process import Process, free_port, make_folder, remove_folder, wait_until_free

URL_VARIABLE = "OUTBOX_TEST_KAFKA"
VERSION = "4.3.1"
NAME = f"Kafka {VERSION}"
JARS = (f"org.apache.kafka:kafka_2.13:{VERSION}", "org.apache.logging.log4j:log4j-slf4j-impl:2.25.3!")
CACHED = f"kafka-{VERSION}"
START_SECONDS = 60.0

# The broker's own log, on its stdout.
LOG4J = """\
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = [%d] %p %m (%c)%n
rootLogger.level = INFO
rootLogger.appenderRef.out.ref = out
"""


def settings_for(brokers: int) -> dict[str, str]:
    """What differs from the broker's defaults, with the reason of each."""
    replicas = str(min(3, brokers))
    return {
        "auto.create.topics.enable": "false",  # a mistyped topic must be an error
        "group.initial.rebalance.delay.ms": "0",  # default 3 s a consumer group
        "offsets.topic.replication.factor": replicas,
        "transaction.state.log.replication.factor": replicas,
        "transaction.state.log.min.isr": str(min(2, brokers)),
        "min.insync.replicas": str(min(2, brokers)),
        "default.replication.factor": replicas,
        "offsets.topic.num.partitions": "8",  # default 50: half a second of creating files at the first commit
        "transaction.state.log.num.partitions": "8",
        "broker.session.timeout.ms": "3000",  # default 9 s, which a killed broker waits out before it is let in again
        "broker.heartbeat.interval.ms": "500",
        "log.cleaner.dedupe.buffer.size": "16777216",  # default 128 MB of heap
    }


class Kafka:
    """A Kafka cluster of our own: same data, ports and cluster id over `kill()` and `start()`.

    `settings` are broker properties added to `settings_for` and win over it. `heap` is the JVM's -Xmx.
    `stop`, `kill` and `start` take one broker's number, or act on all of them.
    """

    def __init__(self, brokers: int = 1, settings: Mapping[str, str] | None = None, *, heap: str = "768m") -> None:
        def lacks_docker() -> str | None:
            return docker.lacks() if brokers == 1 else "Docker is used for one broker only"

        self._source = choose("Kafka", variable=URL_VARIABLE, local=lacks_parts, docker=lacks_docker)
        self._settings = {**settings_for(brokers), **(settings or {})}
        self._size = brokers
        self._heap = heap
        self._brokers: list[_LocalBroker] | list[_DockerBroker] = []
        self.cluster_id = _new_cluster_id()
        self.bootstrap = os.environ.get(URL_VARIABLE, "")

    def start(self, broker: int | None = None) -> None:
        """Ready for clients, and proved by its cluster id to be the cluster made here; raises StartFailed otherwise."""
        if self._source is Source.URL:
            self.cluster_id = _ask_cluster_id(self.bootstrap)
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
        voters = ",".join(f"{number}@127.0.0.1:{controller}" for number, (_, controller) in enumerate(ports))
        self._brokers = [
            _LocalBroker(
                number,
                port,
                {**_listeners(number, port, controller, voters), **self._settings},
                cluster_id=self.cluster_id,
                heap=self._heap,
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

    def _chosen(self, broker: int | None) -> "list[_LocalBroker] | list[_DockerBroker]":
        if not self._brokers:
            raise ServerError("This Kafka was not started here, so it cannot be stopped here.")
        return self._brokers if broker is None else self._brokers[broker : broker + 1]

    def _local(self, broker: int) -> "_LocalBroker":
        one = self._chosen(broker)[0]
        if not isinstance(one, _LocalBroker):
            raise ServerError("Only a local broker has a process and a log here.")
        return one

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _LocalBroker:
    """A storage folder and the JVM on it; broker and controller in one."""

    def __init__(self, number: int, port: int, properties: Mapping[str, str], *, cluster_id: str, heap: str) -> None:
        self.number = number
        self.port = port
        self.cluster_id = cluster_id
        self.folder = make_folder(f"kafka-{number}")
        _write_storage(self.folder / "data", number, cluster_id)
        self.process = _broker_process(self.folder, properties, ["-Xms256m", f"-Xmx{heap}"])

    def start(self) -> None:
        self.process.start()
        self.process.wait_for(lambda: self.process.said("Kafka Server started"), START_SECONDS)
        found = _ask_cluster_id(f"127.0.0.1:{self.port}")
        if found != self.cluster_id or not self.process.alive:
            raise self.process.failure(f"Port {self.port}: cluster {found} answers instead of {self.cluster_id}")

    def stop(self) -> None:
        self.process.stop()

    def kill(self) -> None:
        self.process.kill()
        wait_until_free(self.port)

    def close(self) -> None:
        self.process.kill()
        remove_folder(self.folder)


class _DockerBroker:
    """One broker in a container, at a fixed port of this machine. Untested where it was written."""

    def __init__(self, port: int, settings: Mapping[str, str], cluster_id: str) -> None:
        def check() -> None:
            found = _ask_cluster_id(f"127.0.0.1:{port}")
            if found != cluster_id:
                raise StartFailed(f"Port {port}: cluster {found} answers instead of {cluster_id}.")

        controller = 29093
        properties = {**_listeners(1, port, controller, f"1@localhost:{controller}", host="0.0.0.0"), **settings}  # noqa: S104 # inside the container
        self._container = docker.kafka(f"apache/kafka:{VERSION}", port, properties, cluster_id, ready=check)
        self.start = self._container.start
        self.stop = self._container.stop
        self.kill = self._container.kill
        self.close = self._container.close


def _listeners(number: int, port: int, controller: int, voters: str, host: str = "127.0.0.1") -> dict[str, str]:
    return {
        "process.roles": "broker,controller",
        "node.id": str(number),
        "controller.quorum.voters": voters,
        "controller.listener.names": "CONTROLLER",
        "listeners": f"PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
        "inter.broker.listener.name": "PLAINTEXT",
    }


def _ask_cluster_id(bootstrap: str) -> str:
    """The id of the cluster that answers; raises StartFailed when none does within 30 s."""
    client = AdminClient({"bootstrap.servers": bootstrap, "reconnect.backoff.max.ms": 200, "log_level": 0})
    try:
        return str(client.describe_cluster(request_timeout=30).result(35).cluster_id)
    except KafkaException as error:
        raise StartFailed(f"Kafka does not answer at {bootstrap}: {error}") from error


def _new_cluster_id() -> str:
    """A uuid in Kafka's form: 22 characters of URL-safe base64, the first of them no `-`."""
    while (text := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        pass
    return text


def lacks_parts() -> str | None:
    """What is missing to run the broker from its jars; None when nothing."""
    return java.lacks(17, CACHED)


def _broker_process(folder: Path, properties: Mapping[str, str], options: list[str]) -> Process:
    _write_properties(folder / "server.properties", {**properties, "log.dirs": str(folder / "data")})
    (folder / "log4j2.properties").write_text(LOG4J)
    (folder / "tmp").mkdir()
    command = [
        *_java(),
        *options,
        f"-Dlog4j2.configurationFile={folder / 'log4j2.properties'}",
        f"-Djava.io.tmpdir={folder / 'tmp'}",  # the compressors unpack their native parts there
        "kafka.Kafka",
        str(folder / "server.properties"),
    ]
    return Process(folder.name.removeprefix("kafka-outbox-"), command, folder=folder, stop_signal=signal.SIGTERM)


def _java() -> list[str]:
    """The launcher with the options and the class path that all runs of the broker share."""
    found = java.find(17)
    if found is None:
        raise ServerUnavailable(f"No Kafka: {lacks_parts()}.")
    return [str(found.launcher), *java.JVM, "-cp", java.class_path(_jars())]


def _jars() -> Path:
    return java.jars(CACHED, JARS, hint="46 jars, once, 44 MB")


def _write_properties(path: Path, properties: Mapping[str, str]) -> None:
    path.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))


def _write_storage(data: Path, number: int, cluster_id: str) -> None:
    """What `StorageTool format` writes, without its JVM: the levels of one formatted once, ids of our own."""
    shutil.copytree(_formatted(), data)
    identity = {"version": "1", "cluster.id": cluster_id, "node.id": str(number), "directory.id": _new_cluster_id()}
    _write_properties(data / "meta.properties", identity)


def _formatted() -> Path:
    def make(folder: Path) -> None:
        properties = {**_listeners(0, 9092, 9093, "0@127.0.0.1:9093"), "log.dirs": str(folder)}
        _write_properties(folder / "server.properties", properties)
        command: list[str | Path] = [
            *_java(),
            "kafka.tools.StorageTool",
            "format",
            "-t",
            _new_cluster_id(),
            "-c",
            folder / "server.properties",
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        if done.returncode:
            raise StartFailed(f"StorageTool format failed with status {done.returncode}:\n{done.stdout}{done.stderr}")
        (folder / "server.properties").unlink()

    return cache.once(f"{CACHED}-storage", make)
