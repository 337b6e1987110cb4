"""A relay as a process on real servers, the ledger of what was committed, and an independent reader of Kafka.

`Site` is one outbox and its topics. A trigger notes each event in a table `ledger`, in the writer's transaction: so
what was committed is known, whatever became of the writer. `check_exactly_once` compares it with what a reader of
committed records reads.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import psycopg
from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from tests.roles import ROLES, as_role, grant_roles

ROOT = Path(__file__).parent.parent
PATIENCE = float(os.environ.get("OUTBOX_TEST_PATIENCE", "60"))
"""Seconds that a wait may take on a busy machine before it is a failure."""

LEDGER = """
CREATE TABLE ledger (seq bigint PRIMARY KEY, id uuid NOT NULL, topic text NOT NULL, key text);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN
        INSERT INTO ledger SELECT seq, id, topic, key FROM written ON CONFLICT DO NOTHING; -- put back by `relay dead`
        RETURN NULL;
    END $$;
CREATE TRIGGER note AFTER INSERT ON outbox.outbox REFERENCING NEW TABLE AS written
    FOR EACH STATEMENT EXECUTE FUNCTION note();
"""

SEED = """
INSERT INTO outbox.outbox (id, type, topic, key, value, fingerprint)
SELECT gen_random_uuid(), 'test.SEEDED', %s, 'key-' || g %% 97, convert_to(repeat('x', 100) || g, 'UTF8'), 42
  FROM generate_series(1, %s) AS g
"""


def patched(folder: Path, code: str) -> dict[str, str]:
    """Environment of a relay in which `code` has run before it begins."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


ATTENTIVE = "import relay.supervisor; relay.supervisor.HEARTBEAT = 0.5"
"""Patch of a relay that notices within half a second, not ten, that another one has come."""


class RelayProcess:
    """`relay run` in a process of its own. Its log lines are read as they come."""

    def __init__(self, environment: dict[str, str]) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "relay", "run"],
            cwd=ROOT,
            env={**clean, **environment},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[dict[str, Any]] = []
        """The log: JSON lines as they are, others as {"text": …}."""
        self._news = threading.Condition()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        stream = self._child.stderr
        if stream is None:
            return
        with stream:
            for line in stream:
                entry = _parsed(line)
                with self._news:
                    self.lines.append(entry)
                    self._news.notify_all()
        self._child.wait()
        with self._news:
            self._news.notify_all()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    @property
    def text(self) -> str:
        """The whole log, for a failure's message."""
        return "\n".join(json.dumps(line) for line in self.lines)

    def said(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The lines so far of this event with these fields."""
        with self._news:
            return [line for line in self.lines if _matches(line, event, fields)]

    def wait_for(self, event: str, count: int = 1, timeout: float = PATIENCE, **fields: Any) -> dict[str, Any]:
        """The `count`-th line of this event with these fields, as soon as it is there."""
        with self._news:
            found: list[dict[str, Any]] = []

            def enough() -> bool:
                found[:] = [line for line in self.lines if _matches(line, event, fields)]
                return len(found) >= count or not self._reading.is_alive() or not self.alive

            self._news.wait_for(enough, timeout)
        assert len(found) >= count, f"no {event!r} {fields} (alive: {self.alive}) in:\n{self.text}"
        return found[count - 1]

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit status, once it has ended and its log was read to the end."""
        try:
            status = self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the relay did not end within {timeout:g} s:\n{self.text}") from None
        self._reading.join(timeout)
        return status

    def signal(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def stop(self, timeout: float = PATIENCE) -> int:
        """SIGTERM, and its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._child.kill()
        self.wait()


def _parsed(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    return entry if isinstance(entry, dict) else {"text": line.rstrip("\n")}


def _matches(line: dict[str, Any], event: str, fields: dict[str, Any]) -> bool:
    return line.get("event") == event and all(line.get(name) == value for name, value in fields.items())


class Site:
    """One outbox with a ledger, the topics its events go to, and the relays that a test runs for it."""

    def __init__(self, url: str, bootstrap: str, **environment: str) -> None:
        self.url = url
        self.bootstrap = bootstrap
        self.relays: list[RelayProcess] = []
        self._environment = environment
        with self.connect() as connection:
            connection.execute(LEDGER)
        grant_roles(url)

    @property
    def relay_url(self) -> str:
        """The database for a relay: its role may do what a relay needs, and nothing else."""
        return as_role(self.url, ROLES.relay)

    @property
    def name(self) -> str:
        """The outbox's name."""
        return str(self.value("SELECT name FROM outbox.meta"))

    def connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        """A connection in autocommit."""
        return psycopg.connect(self.url, autocommit=True, connect_timeout=10)

    def rows(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with self.connect() as connection:
            cursor = connection.execute(sql, parameters or None)
            return cursor.fetchall() if cursor.description else []

    def value(self, sql: str, *parameters: Any) -> Any:
        return self.rows(sql, *parameters)[0][0]

    def seed(self, topic: str, count: int) -> None:
        """`count` events of 97 keys in one transaction."""
        self.rows(SEED, topic, count)

    def relay(self, **environment: str) -> RelayProcess:
        """A relay that has just been started."""
        relay = RelayProcess(
            {
                "OUTBOX_DATABASE_URL": self.relay_url,
                "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": self.bootstrap,
                "OUTBOX_LOG_LEVEL": "debug",
                **self._environment,
                **environment,
            }
        )
        self.relays.append(relay)
        return relay

    def taken(self, lane: int = 0, /, **environment: str) -> RelayProcess:
        """A relay that holds `lane`."""
        relay = self.relay(**environment)
        relay.wait_for("lane taken", lane=lane)
        return relay

    def wait_until_published(self, timeout: float = PATIENCE) -> None:
        """Every committed event can be read; says which cannot when `timeout` s have passed."""
        wanted = {str(id_) for (id_,) in self.rows("SELECT id FROM ledger")}
        wanted -= {str(id_) for (id_,) in self.rows("SELECT id FROM outbox.dead_event")}
        with Reader(self.bootstrap, self.topics()) as reader:
            deadline = time.monotonic() + timeout
            while wanted and time.monotonic() < deadline:
                wanted -= {id_of(message) for message in reader.more()}
                if wanted and not reader.news:  # parked meanwhile, or of a topic that is new
                    wanted -= {str(id_) for (id_,) in self.rows("SELECT id FROM outbox.dead_event")}
        logs = "\n--- next relay\n".join(relay.text[-6000:] for relay in self.relays)
        assert not wanted, f"{len(wanted)} events were not published within {timeout:g} s. Relays:\n{logs}"

    def topics(self) -> list[str]:
        """Topics of committed events."""
        return [topic for (topic,) in self.rows("SELECT DISTINCT topic FROM ledger ORDER BY 1")]

    def settle(self) -> None:
        """All is published, and the relays that still run stop cleanly."""
        self.wait_until_published()
        for relay in self.relays:
            if relay.alive:
                assert relay.stop() == 0, relay.text

    def close(self) -> None:
        for relay in self.relays:
            if relay.alive:
                relay.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Reader:
    """A `read_committed` consumer of whole topics, from their start. Topics that Kafka does not have are left out."""

    def __init__(self, bootstrap: str, topics: Sequence[str], isolation: str = "read_committed") -> None:
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": "reader",
                "isolation.level": isolation,
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "earliest",
                "fetch.wait.max.ms": 50,
                "reconnect.backoff.max.ms": 500,
                "topic.metadata.refresh.interval.ms": 1000,
                "log_level": 0,
            }
        )
        known = self._consumer.list_topics(timeout=PATIENCE).topics
        wanted = [
            TopicPartition(topic, partition, 0)
            for topic in topics
            if topic in known
            for partition in known[topic].partitions
        ]
        self._consumer.assign(wanted)
        self._ends: set[tuple[str, int]] = set()
        self._partitions = {(one.topic, one.partition) for one in wanted}
        self.news = False
        """Whether the last `more` brought something."""

    @property
    def at_end(self) -> bool:
        """The end of each partition (of what is committed) was seen, and nothing came after it."""
        return self._ends == self._partitions

    def more(self, timeout: float = 0.2) -> list[Message]:
        """What has come meanwhile; waits for `timeout` s at most."""
        found = []
        first = self._consumer.poll(timeout) if self._partitions else None
        for message in [first, *self._consumer.consume(5000, 0)] if first is not None else []:
            error = message.error()
            place = (message.topic() or "", message.partition() or 0)
            if error is None:
                found.append(message)
                self._ends.discard(place)
            elif error.code() == KafkaError._PARTITION_EOF:
                self._ends.add(place)
            elif not error.retriable() and error.code() not in (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN):
                raise AssertionError(error.str())
        self.news = bool(found)
        return found

    def to_end(self, timeout: float = PATIENCE) -> list[Message]:
        """All of it, in the order of each partition."""
        found = []
        deadline = time.monotonic() + timeout
        while not self.at_end:
            assert time.monotonic() < deadline, f"only {self._ends} of {self._partitions} were read to the end"
            found += self.more()
        return found

    def until(self, enough: Callable[[list[Message]], bool], timeout: float = PATIENCE) -> list[Message]:
        """What has come until `enough` says so."""
        found: list[Message] = []
        deadline = time.monotonic() + timeout
        while not enough(found):
            assert time.monotonic() < deadline, f"not within {timeout:g} s; {len(found)} came"
            found += self.more()
        return found

    def close(self) -> None:
        self._consumer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def headers_of(message: Message) -> dict[str, Any]:
    """A record's headers, values as text."""
    headers: Any = message.headers() or []
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in headers}


def id_of(message: Message) -> str:
    return str(headers_of(message)["ce_id"])


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was committed against what Kafka shows. Ids."""

    lost: set[str]
    doubled: set[str]
    stray: set[str]
    """In Kafka, but never committed."""
    disordered: list[tuple[str, str, int, int]]
    """Topic, key, seq, and the seq that stood before it although it is higher."""


def compare(site: Site, messages: Sequence[Message]) -> Comparison:
    """Parked events count as not lost."""
    ledger = {str(row[1]): (row[0], row[2], row[3]) for row in site.rows("SELECT * FROM ledger")}
    dead = {str(id_) for (id_,) in site.rows("SELECT id FROM outbox.dead_event")}
    seen = Counter(id_of(message) for message in messages)
    return Comparison(
        lost=set(ledger) - set(seen) - dead,
        doubled={id_ for id_, count in seen.items() if count > 1} | (set(seen) & dead),
        stray={id_ for id_ in seen if id_ not in ledger},
        disordered=list(_disordered(messages, ledger)),
    )


def _disordered(
    messages: Sequence[Message], ledger: dict[str, tuple[int, str, str | None]]
) -> Iterator[tuple[str, str, int, int]]:
    last: dict[tuple[str, str], int] = {}
    for seq, topic, key in (ledger[id_of(message)] for message in messages if id_of(message) in ledger):
        if key is not None:
            before = last.get((topic, key), 0)
            if before > seq:
                yield topic, key, seq, before
            last[topic, key] = max(before, seq)


def check_exactly_once(site: Site, parked: int = 0) -> list[Message]:
    """Settle, then: nothing lost, doubled, stray or out of its key's order, and the outbox is empty.

    `parked`: so many events are in dead_event, no more and no less. All messages are returned.
    """
    site.settle()
    with Reader(site.bootstrap, site.topics()) as reader:
        messages = reader.to_end()
    found = compare(site, messages)
    logs = "\n--- next relay\n".join(relay.text[-6000:] for relay in site.relays)
    assert found == Comparison(set(), set(), set(), []), f"{found}\nRelays:\n{logs}"
    left = site.value("SELECT count(*) FROM outbox.outbox")
    assert left == 0, f"{left} rows were left in the outbox. Relays:\n{logs}"
    dead = site.rows("SELECT topic, key, error FROM outbox.dead_event")
    assert len(dead) == parked, f"parked: {dead}. Relays:\n{logs}"
    return messages


def database_of(url: str) -> str:
    """The name of a URL's database."""
    return urlsplit(url).path.lstrip("/")
