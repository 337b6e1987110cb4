"""The servers, the processes, and what is seen of them from outside."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

from examples.chip_quality.stage import Child
from outbox.migrate import migrate
from tests.servers import Kafka, Postgres, running
from tests.torture import consumer, relay, writers
from tests.torture.checker import Effects, Entry, Record
from tests.torture.proxy import Gate, Proxies
from tests.torture.schedule import LEASE
from tests.torture.trace import Trace
from tests.torture.watch import partitions

RELAYS = 3
WRITERS = 2
BROKERS = 3
PARTITIONS = 3

CLOCKS = (0.0, 420.0, -660.0)
"""Seconds that the relays' clocks are ahead at the start."""

SETTINGS: Sequence[Mapping[str, str]] = (
    {},  # as shipped
    {"OUTBOX_DATABASE_TIMEOUT": "5", "OUTBOX_KAFKA_TIMEOUT": "11"},  # gives up before what is held is let go
    {"OUTBOX_BATCH_ROWS": "1000"},  # bursts make overlapping batches
)
"""What differs from relay to relay."""

AWAY = (psycopg.Error, OSError)


class Failed(Exception):  # noqa: N818 -- named for what happened
    """The run cannot go on; says why."""


@dataclass(frozen=True, slots=True)
class Relay:
    """A relay's process and what stands between it and its servers."""

    child: Child
    clock: Path
    database: Gate
    brokers: Sequence[Gate]


@dataclass(frozen=True, slots=True)
class Stage:
    """Everything that runs."""

    folder: Path
    trace: Trace
    postgres: Postgres
    kafka: Kafka
    relays: Sequence[Relay]
    writers: Sequence[Child]
    consumer: Child

    @property
    def children(self) -> list[Child]:
        return [*(relay.child for relay in self.relays), *self.writers, self.consumer]

    # ---- the database, from outside ----------------------------------------------------------------------------------

    def rows(self, query: str, database: str = "service", parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Raises what a database that is away raises."""
        with psycopg.connect(self.postgres.url(database), autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []

    def number(self, query: str, database: str = "service") -> int:
        """The one number that a query gives."""
        return int(self.rows(query, database)[0][0])

    def owner(self) -> Relay | None:
        """The relay that holds lane 0, if it runs."""
        rows = self.rows("SELECT pid FROM outbox.lane JOIN outbox.relay ON relay.id = lane.owner WHERE lane = 0")
        return next((one for one in self.relays if rows and one.child.alive and one.child.pid == rows[0][0]), None)

    def entries(self) -> list[Entry]:
        """The ledger."""
        return [Entry(*row) for row in self.rows("SELECT event_id, topic, key, number, type, value FROM ledger")]

    def effects(self) -> Effects:
        """The consumer's tables."""
        rows: dict[tuple[str, str | None], list[UUID]] = {}
        for topic, key, event_id in self.rows("SELECT topic, key, event_id FROM effect ORDER BY place", "effects"):
            rows.setdefault((topic, _key(key)), []).append(event_id)
        counters = self.rows("SELECT topic, key, events FROM counter", "effects")
        return Effects(rows, {(topic, _key(key)): events for topic, key, events in counters})


def _key(text: str) -> str | None:
    return None if text == consumer.NO_KEY else text[1:]


# ---- setting up ------------------------------------------------------------------------------------------------------


@contextmanager
def staged(folder: Path, trace: Trace, seed: int, lanes: int) -> Iterator[Stage]:
    """Servers and processes started, ended at the end of the block."""
    postgres = Postgres(fsync=True)
    kafka = Kafka(BROKERS, {"num.network.threads": "1"}, heap="400m", doors=RELAYS)
    with ExitStack() as stack:
        stack.enter_context(running(postgres, kafka))
        trace.note("servers started")
        _prepare(postgres, kafka, lanes)
        proxies = stack.enter_context(Proxies())
        stage = Stage(
            folder=folder,
            trace=trace,
            postgres=postgres,
            kafka=kafka,
            relays=[_relay(folder, postgres, kafka, proxies, number) for number in range(RELAYS)],
            writers=[_writer(folder, postgres, seed, number) for number in range(WRITERS)],
            consumer=_child(
                folder,
                "consumer",
                "tests.torture.consumer",
                {"TORTURE_EFFECTS_URL": postgres.url("effects"), "TORTURE_BOOTSTRAP": kafka.bootstrap},
            ),
        )
        for child in stage.children:
            stack.callback(child.kill)
            child.start()
        stack.enter_context(observed(stage))
        yield stage


def _prepare(postgres: Postgres, kafka: Kafka, lanes: int) -> None:
    """Databases, tables and topics."""
    service = postgres.create_database("service")
    migrate(service, lanes=lanes)
    migrate(postgres.create_database("effects"))
    postgres.create_database("elsewhere")
    for database, tables in (
        ("service", writers.TABLES),
        ("effects", consumer.TABLES),
        ("elsewhere", writers.ELSEWHERE),
    ):
        postgres.execute(tables, database)
    for topic in writers.TOPICS:
        kafka.create_topic(topic, PARTITIONS)


def _relay(folder: Path, postgres: Postgres, kafka: Kafka, proxies: Proxies, number: int) -> Relay:
    database = proxies.gate_before(_port(postgres.url()))
    brokers = [proxies.gate(door.advertised, door.behind) for door in kafka.doors[number]]
    clock = folder / f"clock-{number}"
    relay.set_clock(clock, CLOCKS[number % len(CLOCKS)])
    environment = {
        "OUTBOX_DATABASE_URL": f"postgresql://postgres@127.0.0.1:{database.port}/service",
        "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": ",".join(f"127.0.0.1:{gate.port}" for gate in brokers),
        "OUTBOX_LEASE": str(LEASE),
        "OUTBOX_LOG_LEVEL": "debug",
        relay.CLOCK: str(clock),
        **SETTINGS[number % len(SETTINGS)],
    }
    return Relay(_child(folder, f"relay-{number}", "tests.torture.relay", environment), clock, database, brokers)


def _writer(folder: Path, postgres: Postgres, seed: int, number: int) -> Child:
    environment = {"OUTBOX_DATABASE_URL": postgres.url("service"), "TORTURE_ELSEWHERE_URL": postgres.url("elsewhere")}
    return _child(folder, f"writer-{number}", "tests.torture.writers", environment, str(number), str(seed))


def _child(folder: Path, name: str, module: str, environment: Mapping[str, str], *arguments: str) -> Child:
    return Child(name, module, *arguments, folder=folder, environment=environment)


def _port(url: str) -> int:
    return int(url.rpartition("/")[0].rpartition(":")[2])


# ---- what is seen meanwhile ------------------------------------------------------------------------------------------


@contextmanager
def observed(stage: Stage) -> Iterator[None]:
    """Changes of the lanes' owners, and what the relays log, go into the trace."""
    ending = threading.Event()
    thread = threading.Thread(target=_observe, args=(stage, ending), name="observer", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join(10)


def _observe(stage: Stage, ending: threading.Event) -> None:
    owners: dict[int, Any] = {}
    places = dict.fromkeys(stage.children, 0)
    while not ending.wait(0.1):
        for child in places:
            places[child] = _note_log(stage.trace, child, places[child])
        with suppress(*AWAY):
            _note_owners(stage, owners)


def _note_owners(stage: Stage, owners: dict[int, Any]) -> None:
    query = "SELECT lane, owner, pid, batch, halted FROM outbox.lane LEFT JOIN outbox.relay ON relay.id = lane.owner"
    for lane, owner, pid, batch, halted in stage.rows(query):
        if owners.get(lane) != (owner, halted):
            owners[lane] = (owner, halted)
            name = next((one.child.name for one in stage.relays if one.child.alive and one.child.pid == pid), None)
            stage.trace.note("lane owner", lane=lane, owner=owner, relay=name, batch=batch, halted=halted)


def _note_log(trace: Trace, child: Child, place: int) -> int:
    """Notes the whole lines behind `place` in a child's log; where the next one begins. Each batch is not news."""
    with child.log.open("rb") as log:
        log.seek(place)
        text, _, _ = log.read().rpartition(b"\n")
    for line in text.splitlines():
        if b'"level": "debug"' not in line:
            trace.note("log", of=child.name, line=_parsed(line.decode(errors="replace")))
    return place + len(text) + bool(text)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line


def wait_until(ready: Callable[[], bool], timeout: float, interval: float = 0.02) -> bool:
    """Whether `ready()` within `timeout` s; a database that is away counts as not ready."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with suppress(*AWAY):
            if ready():
                return True
        time.sleep(interval)
    return False


# ---- what is in Kafka ------------------------------------------------------------------------------------------------


def records(bootstrap: str, timeout: float) -> Iterator[Record]:
    """Every committed record of the topics from the start to the end; Failed when the end is not reached in time."""
    reader = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": f"checker-{uuid4()}",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )
    left = partitions(reader)
    reader.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for topic, number in left])
    deadline = time.monotonic() + timeout
    try:
        while left:
            if time.monotonic() > deadline:
                raise Failed(f"no end of {sorted(left)} within {timeout:g} s")
            for message in reader.consume(1000, 0.2):
                place = message.topic() or "", message.partition() or 0
                if (error := message.error()) is None:
                    headers: Any = message.headers() or []
                    key: Any = message.key()
                    yield Record(*place, key, message.value(), headers)
                elif error.code() == KafkaError._PARTITION_EOF:
                    left.discard(place)
                else:
                    raise KafkaException(error)
    finally:
        reader.close()
