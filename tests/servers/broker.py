"""One Kafka node (broker and controller) from the broker's own jars: its storage, its JVM, its proof of identity."""

import base64
import shutil
import signal
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from tests.servers import cache, java
from tests.servers.errors import ServerUnavailable, StartFailed
from tests.servers.process import Process, free_port, make_folder, remove_folder, wait_until_free

VERSION = "4.3.1"
JARS = (f"org.apache.kafka:kafka_2.13:{VERSION}", "org.apache.logging.log4j:log4j-slf4j-impl:2.25.3!")
CACHED = f"kafka-{VERSION}"
JAVA = 17  # what Kafka 4 needs at least
START_SECONDS = 60.0
TRAIN_SECONDS = 180.0

# The broker's own log, on its stdout.
LOG4J = """\
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = [%d] %p %m (%c)%n
rootLogger.level = INFO
rootLogger.appenderRef.out.ref = out
"""


def lacks_parts() -> str | None:
    """What is missing to run the broker from its jars; None when nothing."""
    return java.lacks(JAVA, CACHED)


def listeners(number: int, port: int, controller: int, voters: str, host: str = "127.0.0.1") -> dict[str, str]:
    """The properties of a node that is broker (at `port`) and controller (at `controller`) in one."""
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


@dataclass(frozen=True, slots=True)
class Door:
    """One more listener of a broker: for clients that come through a proxy of the test's own, or must show who they
    are."""

    name: str
    advertised: int
    """The port that clients are told: the broker's own, or a proxy's and nobody's before the test listens there."""
    behind: int
    """The port that the broker listens at."""
    protocol: str = "PLAINTEXT"


def with_doors(properties: Mapping[str, str], doors: Sequence[Door]) -> dict[str, str]:
    """The `properties` of `listeners`, with a listener for each door."""
    added = {
        "listeners": [f"{door.name}://127.0.0.1:{door.behind}" for door in doors],
        "advertised.listeners": [f"{door.name}://127.0.0.1:{door.advertised}" for door in doors],
        "listener.security.protocol.map": [f"{door.name}:{door.protocol}" for door in doors],
    }
    return {**properties, **{name: ",".join([properties[name], *more]) for name, more in added.items()}}


def new_id() -> str:
    """A uuid in Kafka's form: 22 characters of URL-safe base64, the first of them no `-`."""
    while (text := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        pass
    return text


def ask_cluster_id(bootstrap: str) -> str:
    """The id of the cluster that answers; raises StartFailed when none does within 30 s."""
    client = AdminClient({"bootstrap.servers": bootstrap, "reconnect.backoff.max.ms": 200, "log_level": 0})
    try:
        return str(client.list_topics(timeout=30).cluster_id)  # any broker answers; describe_cluster waits for one more
    except KafkaException as error:
        raise StartFailed(f"Kafka does not answer at {bootstrap}: {error}") from error


class LocalBroker:
    """A storage folder and the JVM on it. `options` are the JVM's."""

    def __init__(
        self, number: int, port: int, properties: Mapping[str, str], *, cluster_id: str, options: Sequence[str]
    ) -> None:
        self.port = port
        self.cluster_id = cluster_id
        self.folder = make_folder(f"kafka-{number}")
        _write_storage(self.folder / "data", number, cluster_id)
        self.process = _process(self.folder, properties, options)

    def start(self) -> None:
        """Ready for clients, and a member of the cluster whose id was written into its storage; else not running."""
        with self.process.starting():
            self.process.wait_for(lambda: self.process.said("Kafka Server started"), START_SECONDS)
            self._check_identity()

    def _check_identity(self) -> None:
        found = ask_cluster_id(f"127.0.0.1:{self.port}")
        if found != self.cluster_id or not self.process.alive:
            raise self.process.failure(f"Port {self.port}: cluster {found} answers instead of {self.cluster_id}")

    def stop(self) -> None:
        """A controlled shutdown."""
        self.process.stop()

    def kill(self) -> None:
        """SIGKILL; afterwards its port is free."""
        self.process.kill()
        wait_until_free(self.port)

    def close(self) -> None:
        """Ends it for good and removes its folder."""
        self.process.kill()
        remove_folder(self.folder)


def _process(folder: Path, properties: Mapping[str, str], options: Sequence[str]) -> Process:
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
    return Process("kafka", command, folder=folder, stop_signal=signal.SIGTERM)


def _java() -> list[str]:
    """The launcher with the options and the class path that all runs of the broker share."""
    found = _found_java()
    return [str(found.launcher), *java.JVM, "-cp", java.class_path(_jars())]


def _found_java() -> java.Java:
    found = java.find(JAVA)
    if found is None:
        raise ServerUnavailable(f"No Kafka: {lacks_parts()}.")
    return found


def _jars() -> Path:
    return java.jars(CACHED, JARS, hint="46 jars, 44 MB, once")


def _write_properties(path: Path, properties: Mapping[str, str]) -> None:
    path.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))


def _write_storage(data: Path, number: int, cluster_id: str) -> None:
    """What `StorageTool format` writes, without its JVM: the levels of one formatted once, ids of our own."""
    shutil.copytree(_formatted(), data)
    identity = {"version": "1", "cluster.id": cluster_id, "node.id": str(number), "directory.id": new_id()}
    _write_properties(data / "meta.properties", identity)


def _formatted() -> Path:
    def make(folder: Path) -> None:
        properties = {**listeners(0, 9092, 9093, "0@127.0.0.1:9093"), "log.dirs": str(folder)}
        _write_properties(folder / "server.properties", properties)
        command = [
            *_java(),
            "kafka.tools.StorageTool",
            "format",
            "-t",
            new_id(),
            "-c",
            str(folder / "server.properties"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        if done.returncode:
            raise StartFailed(f"StorageTool format failed with status {done.returncode}:\n{done.stdout}{done.stderr}")
        (folder / "server.properties").unlink()

    return cache.once(f"{CACHED}-storage", make)


def fast_start() -> list[str]:
    """JVM options that take the AOT cache (start in 1.7 s, not 2.9), made by a broker that is thrown away.

    Empty where Java is too old for it, where making it failed once (its reason is kept in the cache folder), and in
    the run that has just waited for the jars: that one does not wait for this as well.
    """
    found = _found_java()
    _jars()
    if found.version < java.AOT_SINCE or CACHED in cache.made:
        return []
    archive = cache.once(f"{CACHED}-aot-{found.build}", _train) / "kafka.aot"
    return [f"-XX:AOTCache={archive}"] if archive.exists() else []


def _train(folder: Path) -> None:
    cache.say(f"Kafka {VERSION}: making the cache of its JVM's start (once, about 10 s) …")
    port, controller = free_port(), free_port()
    broker = LocalBroker(
        0,
        port,
        listeners(0, port, controller, f"0@127.0.0.1:{controller}"),
        cluster_id=new_id(),
        options=[f"-XX:AOTCacheOutput={folder / 'kafka.aot'}"],
    )
    try:
        broker.start()
        broker.process.stop(TRAIN_SECONDS)  # the JVM writes the cache at its end
    except StartFailed as error:
        (folder / "failed.log").write_text(str(error))
    finally:
        broker.close()
