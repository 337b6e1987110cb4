"""A long life: relays are replaced under load, memory stays flat, a database hangs, a pooler stands before it, a broker
cannot write to its disk."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import psutil
import psycopg
import pytest

from tests.conftest import MakeDatabase, MakeTopic, started
from tests.relay_process import PATIENCE, Reader, Site, check_exactly_once
from tests.roles import OWNER, ROLES
from tests.servers import Kafka, PgBouncer, Postgres
from tests.servers.broker import LocalBroker
from tests.test_relay import IMPATIENT
from tests.torture.proxy import Proxies


@pytest.fixture
def site(make_database: MakeDatabase, kafka: Kafka) -> Iterator[Site]:
    with Site(make_database(), kafka.bootstrap) as site:
        yield site


class Writer(threading.Thread):
    """Writes some hundred events a second into the database at `url`, until it is told to stop."""

    def __init__(self, url: str, topic: str) -> None:
        super().__init__(daemon=True)
        self.count = 0
        self._url, self._topic = url, topic
        self._stopping = threading.Event()
        self.start()

    def run(self) -> None:
        with psycopg.connect(self._url, autocommit=True, prepare_threshold=None) as connection:
            while not self._stopping.wait(0.003):
                connection.execute(
                    "INSERT INTO outbox.outbox (type, topic, key, value) VALUES ('t', %s, %s, 'x')",
                    [self._topic, f"{id(self)}-{self.count % 31}"],
                )
                self.count += 1

    def stop(self) -> None:
        self._stopping.set()
        self.join()


class Arrivals(threading.Thread):
    """Notes when the events of a topic can be read, committed."""

    def __init__(self, site: Site, topic: str) -> None:
        super().__init__(daemon=True)
        self.moments: list[float] = []
        self._reader = Reader(site.bootstrap, [topic])
        self._stopping = threading.Event()
        self.start()

    def run(self) -> None:
        with self._reader as reader:
            while not self._stopping.is_set():
                if reader.more(0.02):
                    self.moments.append(time.monotonic())

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    def longest_pause(self, since: float, until: float) -> float:
        """Seconds without an arrival."""
        moments = [moment for moment in self.moments if since - 0.5 <= moment <= until]
        return max(later - earlier for earlier, later in pairwise(moments))


def port_of(postgres: Postgres) -> int:
    return urlsplit(postgres.url()).port or 5432


def until(so: Callable[[], bool], timeout: float = PATIENCE) -> None:
    deadline = time.monotonic() + timeout
    while not so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- relays are replaced ---------------------------------------------------------------------------------------------


@pytest.mark.crash
@pytest.mark.parametrize("lanes", [1, 2])
def test_relays_are_replaced_one_after_the_other_under_load_without_a_long_pause(
    make_database: MakeDatabase, kafka: Kafka, topic: MakeTopic, lanes: int
) -> None:
    """As a rolling update does: a new one comes, then an old one is told to stop. About 0.4 s without an event each
    time, on a quiet machine; a crashed relay's lanes would wait for their lease."""
    name = topic()
    with Site(make_database(lanes), kafka.bootstrap, OUTBOX_LEASE="60") as site:
        old = [site.relay() for _ in range(2)]
        for relay in old:
            relay.wait_for("relay started")
        for lane in range(lanes):
            until(lambda lane=lane: any(relay.said("lane taken", lane=lane) for relay in old))  # type: ignore[misc]
        writer, arrivals = Writer(site.url, name), Arrivals(site, name)
        pauses: list[float] = []
        try:
            for relay in old:
                site.relay().wait_for("relay started")
                until(lambda: writer.count > 100 * (len(pauses) + 1))
                began = time.monotonic()
                assert relay.stop() == 0, relay.text
                until(lambda: arrivals.moments[-1] > time.monotonic() - 0.1)
                until(lambda began=began: time.monotonic() > began + 1.5)  # type: ignore[misc]
                pauses.append(arrivals.longest_pause(began, time.monotonic()))
        finally:
            writer.stop()
            arrivals.stop()
        assert min(pauses) < 1, pauses
        assert max(pauses) < 5, pauses
        assert len(check_exactly_once(site)) == writer.count


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.crash
def test_memory_is_flat_over_batches_large_and_small_and_over_takes(site: Site, topic: MakeTopic) -> None:
    name = topic(4)
    relay = site.taken()
    process = psutil.Process(relay.pid)
    sizes = []
    for round_ in range(1, 6):
        site.seed(name, 8_000)
        for _ in range(10):
            site.seed(name, 1)
        site.wait_until_published()
        site.rows(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        relay.wait_for("lane taken", count=round_ + 1)
        sizes.append(process.memory_info().rss / 1e6)
    assert max(sizes[2:]) - sizes[1] < 10, f"MB after each round: {[round(size, 1) for size in sizes]}"
    check_exactly_once(site)


# ---- the database hangs ----------------------------------------------------------------------------------------------


@pytest.mark.crash
def test_a_database_connection_that_hangs_is_given_up_and_the_relay_goes_on(
    site: Site, postgres: Postgres, topic: MakeTopic
) -> None:
    """Bytes are swallowed, nobody is told. Its standby takes over; it goes on when the way is free again; and SIGTERM
    ends it meanwhile."""
    name = topic()
    with Proxies() as proxies:
        gate = proxies.gate_before(port_of(postgres))
        behind = site.relay_url.replace(f":{port_of(postgres)}/", f":{gate.port}/")
        assert behind != site.relay_url
        hangs = {"OUTBOX_DATABASE_URL": behind, "OUTBOX_DATABASE_TIMEOUT": "1", "OUTBOX_LEASE": "1"}
        first = site.taken(**hangs)
        second = site.relay(OUTBOX_LEASE="1")
        second.wait_for("relay started")
        site.seed(name, 100)
        site.wait_until_published()
        gate.hold()
        site.seed(name, 100)
        second.wait_for("lane taken", timeout=20)
        first.wait_for("lane in trouble", timeout=20)
        gate.heal()
        first.wait_for("database back", timeout=20)
        assert second.stop() == 0
        first.wait_for("lane taken", count=2, timeout=20)
        site.seed(name, 100)
        site.wait_until_published()
        gate.hold()
        began = time.monotonic()
        assert first.stop() == 0
        assert time.monotonic() - began < 20, first.text
        gate.heal()
        site.taken(OUTBOX_LEASE="1")
        assert len(check_exactly_once(site)) == 300


# ---- a pooler --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pgbouncer(postgres: Postgres) -> Iterator[PgBouncer]:
    with closing(started(lambda: PgBouncer(port_of(postgres), [OWNER, ROLES.relay]))) as server:
        yield server


def test_writers_and_relays_behind_pgbouncer_in_transaction_mode(
    site: Site, postgres: Postgres, pgbouncer: PgBouncer, topic: MakeTopic
) -> None:
    """Few sessions of the database for many connections: each transaction may get another one."""
    name = topic(4)

    def behind(url: str) -> str:
        return url.replace(f":{port_of(postgres)}/", f":{pgbouncer.port}/")

    through = {"OUTBOX_DATABASE_URL": behind(site.relay_url), "OUTBOX_LEASE": "1"}
    first = site.taken(**through, OUTBOX_PREPARED_STATEMENTS="false")
    second = site.relay(**through, OUTBOX_PREPARED_STATEMENTS="false")
    second.wait_for("relay started")
    writers = [Writer(behind(site.url), name) for _ in range(3)]
    site.seed(name, 20_000)
    until(lambda: min(writer.count for writer in writers) > 100)
    first.kill()
    second.wait_for("lane taken")
    until(lambda: min(writer.count for writer in writers) > 200)
    for writer in writers:
        writer.stop()
    assert len(check_exactly_once(site)) == 20_000 + sum(writer.count for writer in writers)
    assert not second.said("lane in trouble"), second.text


# ---- a broker whose disk is full -------------------------------------------------------------------------------------


@pytest.mark.crash
def test_a_broker_that_cannot_write_any_more_stops_the_lane_and_loses_nothing(make_database: MakeDatabase) -> None:
    """No disk is filled: the system refuses the broker to let a file grow (RLIMIT_FSIZE), which its code meets as the
    same IOException in the same places. A broker with one log directory then halts itself; it is started again with
    room."""
    kafka = started(Kafka)
    with closing(kafka), Site(make_database(), kafka.bootstrap, **IMPATIENT) as site:
        name = kafka.create_topic(f"full-{uuid4().hex[:8]}")
        relay = site.taken()
        site.seed(name, 1_000)
        site.wait_until_published()
        limit_files_to(kafka, log_size(kafka, name) + 20_000)
        site.seed(name, 5_000)
        relay.wait_for("lane in trouble")
        until(lambda: not broker_of(kafka).process.alive)
        assert site.value("SELECT count(*) FROM outbox.outbox") >= 5_000
        assert site.value("SELECT count(*) FROM outbox.dead_event") == 0
        kafka.kill()
        kafka.start()
        assert len(check_exactly_once(site)) == 6_000


def broker_of(kafka: Kafka) -> LocalBroker:
    broker = kafka._brokers[0]
    assert isinstance(broker, LocalBroker)
    return broker


def log_size(kafka: Kafka, topic: str) -> int:
    [log] = Path(broker_of(kafka).folder / "data" / f"{topic}-0").glob("*.log")
    return log.stat().st_size


def limit_files_to(kafka: Kafka, size: int) -> None:
    child = broker_of(kafka).process._child
    assert child is not None
    _, most = psutil.Process(child.pid).rlimit(psutil.RLIMIT_FSIZE)
    psutil.Process(child.pid).rlimit(psutil.RLIMIT_FSIZE, (size, most))
