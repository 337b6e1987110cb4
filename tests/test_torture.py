"""The torture run's own parts: the checker finds each kind of wrong, a seed decides all, gates do what they say; and a
run of two minutes."""

import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from tests.servers import ServerUnavailable, kafka, postgres
from tests.servers.choice import FORCED, Source, is_forced
from tests.servers.process import free_port
from tests.torture.checker import Effects, Entry, Findings, Record, check
from tests.torture.faults import java_hash
from tests.torture.proxy import Gate, Proxies
from tests.torture.schedule import FORMS, LEASE, Kind, schedule

ROOT = Path(__file__).parent.parent

# ---- the checker -----------------------------------------------------------------------------------------------------


def entry(number: int, key: str | None = "k", topic: str = "t") -> Entry:
    return Entry(UUID(int=number), topic, key, number, "type", b"value %d" % number)


def record(of: Entry) -> Record:
    headers = (("ce_id", str(of.event_id).encode()), ("ce_type", of.type.encode()))
    return Record(of.topic, 0, of.key.encode() if of.key else None, of.value, headers)


LEDGER = [entry(number) for number in range(1, 6)]
RECORDS = [record(one) for one in LEDGER]
IDS = [one.event_id for one in LEDGER]
EFFECTS = Effects({("t", "k"): IDS}, {("t", "k"): 5})


def found(records: list[Record], effects: Effects = EFFECTS) -> str:
    return str(check(LEDGER, records, effects))


def test_what_is_as_it_must_be_is_right() -> None:
    findings = check(LEDGER, RECORDS, EFFECTS)
    assert not findings
    assert str(findings) == "lost 0 · doubled 0 · reordered 0 · phantom 0 · effects wrong 0"


def test_a_missing_record_is_lost() -> None:
    assert found(RECORDS[:2] + RECORDS[3:]) == "lost 1 · doubled 0 · reordered 0 · phantom 0 · effects wrong 0"


def test_a_second_record_is_doubled_wherever_it_stands() -> None:
    elsewhere = replace(RECORDS[1], partition=2)
    records = [*RECORDS, RECORDS[0], elsewhere]
    assert found(records) == "lost 0 · doubled 2 · reordered 0 · phantom 0 · effects wrong 0"


def test_a_record_behind_a_later_one_of_its_key_is_reordered() -> None:
    records = [RECORDS[1], RECORDS[0], *RECORDS[2:]]
    assert found(records) == "lost 0 · doubled 0 · reordered 1 · phantom 0 · effects wrong 0"


def test_a_record_in_another_partition_than_its_key_is_reordered() -> None:
    records = [*RECORDS[:4], replace(RECORDS[4], partition=1)]
    assert found(records) == "lost 0 · doubled 0 · reordered 1 · phantom 0 · effects wrong 0"


def test_a_record_of_no_committed_event_is_a_phantom() -> None:
    records = [*RECORDS, record(entry(99)), replace(RECORDS[0], headers=())]
    assert found(records) == "lost 0 · doubled 0 · reordered 0 · phantom 2 · effects wrong 0"


@pytest.mark.parametrize(
    "alter",
    [
        lambda one: replace(one, key=b"other"),
        lambda one: replace(one, value=one.value + b"!"),
        lambda one: replace(one, value=None),
        lambda one: replace(one, topic="other"),
        lambda one: replace(one, headers=(one.headers[0], ("ce_type", b"other"))),
        lambda one: replace(one, headers=(*one.headers, one.headers[0])),
    ],
)
def test_an_altered_record_is_a_phantom_and_its_event_lost(alter: Callable[[Record], Record]) -> None:
    records = [*RECORDS[:3], alter(RECORDS[3]), RECORDS[4]]
    assert found(records) == "lost 1 · doubled 0 · reordered 0 · phantom 1 · effects wrong 0"


@pytest.mark.parametrize(
    ("rows", "counter", "wrong"),
    [
        (IDS[1:], 5, 1),  # missing
        ([*IDS, IDS[0]], 5, 1),  # twice
        ([IDS[1], IDS[0], *IDS[2:]], 5, 1),  # out of order
        (IDS, 6, 1),  # counted twice
        ([], 0, 2),  # nothing at all
    ],
)
def test_effects_that_are_not_the_ledgers_are_wrong(rows: list[UUID], counter: int, wrong: int) -> None:
    effects = Effects({("t", "k"): rows}, {("t", "k"): counter})
    assert len(check(LEDGER, RECORDS, effects).effects) == wrong


def test_effects_of_unknown_keys_are_wrong() -> None:
    effects = Effects({**EFFECTS.rows, ("t", "other"): [UUID(int=9)]}, {**EFFECTS.counters, ("t", "other"): 1})
    assert len(check(LEDGER, RECORDS, effects).effects) == 2


def test_without_a_key_no_order_is_asked_for() -> None:
    ledger = [entry(number, key=None) for number in (1, 2)]
    backwards = Effects({("t", None): [UUID(int=2), UUID(int=1)]}, {("t", None): 2})
    assert check(ledger, [record(ledger[1]), record(ledger[0])], backwards) == Findings()


# ---- the schedule ----------------------------------------------------------------------------------------------------


def test_the_seed_decides_everything() -> None:
    first = schedule(7, 5)
    random.seed(0)
    assert schedule(7, 5) == first
    assert schedule(8, 5) != first
    code = "from tests.torture.schedule import schedule; print(schedule(7, 5))"
    elsewhere = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "5"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert elsewhere.stdout.strip() == str(first)


@pytest.mark.parametrize("seed", range(1, 9))
def test_a_short_run_has_every_kind_and_a_long_one_every_form(seed: int) -> None:
    assert {fault.kind for fault in schedule(seed, 0.1)} == set(Kind)
    long = schedule(seed, 60)
    assert {(fault.kind, fault.form) for fault in long} == {(kind, form) for kind in Kind for form in FORMS[kind]}
    assert long[:12] == schedule(seed, 2)[:12]
    assert all(fault.seconds > LEASE for fault in long if fault.kind is Kind.RELAY_FROZEN)


def test_partitions_of_groups_and_transactional_ids_are_those_of_java() -> None:
    assert java_hash("torture") == 0x7FFF_FFFF & sum(ord(c) * 31 ** (6 - n) for n, c in enumerate("torture"))
    assert java_hash("hello") == 99162322


# ---- the proxy -------------------------------------------------------------------------------------------------------


@contextmanager
def echoing() -> Iterator[tuple[Gate, list[bytes]]]:
    """A gate before a server that says back what it is told, and the list of what it was told."""
    told: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(100):
                    told.append(data)
                    connection.sendall(data)
            except OSError:
                pass

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener, Proxies() as proxies:
        threading.Thread(target=serve, daemon=True).start()
        yield proxies.gate(free_port(), listener.getsockname()[1]), told
        listener.shutdown(socket.SHUT_RDWR)


def hears(client: socket.socket, seconds: float) -> bytes | None:
    """None: nothing within that time."""
    client.settimeout(seconds)
    try:
        return client.recv(100)
    except TimeoutError:
        return None


def test_a_gate_passes_holds_and_heals() -> None:
    with echoing() as (gate, told), socket.create_connection(("127.0.0.1", gate.port)) as client:
        client.sendall(b"one")
        assert hears(client, 5) == b"one"
        gate.hold()
        client.sendall(b"two")
        assert hears(client, 0.2) is None
        gate.heal()
        assert hears(client, 5) == b"two"
        gate.hold(requests=False)
        client.sendall(b"three")
        assert hears(client, 0.2) is None
        assert told == [b"one", b"two", b"three"]
        assert gate.links == 1
        assert gate.cut() == 1
        with pytest.raises(ConnectionResetError):
            hears(client, 5)


def test_a_gate_that_holds_takes_new_connections_and_says_nothing() -> None:
    with echoing() as (gate, told):
        gate.hold()
        with socket.create_connection(("127.0.0.1", gate.port)) as client:
            client.sendall(b"one")
            assert hears(client, 0.2) is None
            assert not told
            gate.heal()
            assert hears(client, 5) == b"one"


# ---- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def environment() -> dict[str, str]:
    """Of a run on servers of its own: none that a URL names, for nobody may kill those."""
    if os.environ.get(FORCED) == Source.URL:
        pytest.skip("the servers are somebody else's, and this test kills its own")
    named = (kafka.URL_VARIABLE, postgres.URL_VARIABLE)
    with pytest.MonkeyPatch.context() as patch:
        for name in named:
            patch.delenv(name, raising=False)
        try:
            postgres.Postgres(), kafka.Kafka(3, doors=1)
        except ServerUnavailable as error:
            if is_forced():
                raise
            pytest.skip(str(error))
    return {name: value for name, value in os.environ.items() if name not in named}


@pytest.mark.crash
@pytest.mark.timeout(240)
def test_two_minutes_of_faults_lose_double_and_reorder_nothing(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "tests.torture", "--minutes", "2", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("lost 0 · doubled 0 · reordered 0 · phantom 0 · effects wrong 0")
