"""`relay lanes`: another number of lanes, while writers write and relays publish."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from outbox.tables import lane_expression
from relay.errors import LaneHalted, TakeAgain
from relay.lane import Progress, digest_of
from relay.worker import LaneWorker
from tests.conftest import MakeDatabase, MakeTopic
from tests.relay_process import PATIENCE, ROOT, RelayProcess, Site, check_exactly_once
from tests.servers import Kafka
from tests.test_relay import add

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def site(make_database: MakeDatabase, kafka: Kafka) -> Iterator[Site]:
    with Site(make_database(), kafka.bootstrap, OUTBOX_LEASE="1") as site:
        yield site


@pytest.fixture
def lanes(site: Site) -> Command:
    """The command, at this site."""
    return partial(changed, site)


def changed(site: Site, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`relay lanes`, as the tables' owner."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
    own = {"OUTBOX_DATABASE_URL": site.url, "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": site.bootstrap, **environment}
    return subprocess.run(
        [sys.executable, "-m", "relay", "lanes", *map(str, arguments)],
        cwd=ROOT,
        env={**clean, **own},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def done(completed: subprocess.CompletedProcess[str]) -> Any:
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout)


class Writers:
    """Threads that write events of some keys to a topic, each key locked before, as services do."""

    def __init__(self, site: Site, topic: str, count: int = 3) -> None:
        site.rows("CREATE TABLE IF NOT EXISTS aggregate (key text PRIMARY KEY)")
        site.rows("INSERT INTO aggregate SELECT 'key-' || g FROM generate_series(0, 16) AS g ON CONFLICT DO NOTHING")
        self.longest = 0.0
        """Seconds of the slowest transaction."""
        self._site, self._topic = site, topic
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(number,), daemon=True) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _write(self, number: int) -> None:
        dice = random.Random(number)  # noqa: S311 - no secret
        with psycopg.connect(self._site.url) as connection:
            while not self._stopping.wait(0.005):
                began = time.monotonic()
                with connection.transaction():
                    # In their order, so that nobody waits for a lock in a circle.
                    for key in sorted(dice.sample(range(17), 2)):
                        name = f"key-{key}"
                        connection.execute("SELECT FROM aggregate WHERE key = %s FOR UPDATE", [name])
                        connection.execute(
                            "INSERT INTO outbox.outbox (type, topic, key, value) VALUES ('t', %s, %s, 'x')",
                            [self._topic, name if key else None],
                        )
                self.longest = max(self.longest, time.monotonic() - began)

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def expression(site: Site) -> str:
    """How the database computes the lane."""
    return str(
        site.value(
            "SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef"
            " WHERE adrelid = 'outbox.outbox'::regclass AND adnum = (SELECT attnum FROM pg_attribute"
            " WHERE attrelid = 'outbox.outbox'::regclass AND attname = 'lane')"
        )
    )


@pytest.mark.crash
def test_lanes_come_and_go_and_come_back_under_load(site: Site, topic: MakeTopic, lanes: Command) -> None:
    """1 → 3 → 2 → 3: the third lane goes on where its batches ended. (Writers wait 0.1 s, on a quiet machine.)"""
    name = topic(4)
    relays = [site.taken(), site.relay()]
    with Writers(site, name) as writers:
        before = 1
        for number in (3, 2, 3):
            found = done(lanes(number, "--json"))
            assert (found["before"], found["after"]) == (before, number)
            assert found["waited_seconds"] < 1
            assert len(site.rows("SELECT lane FROM outbox.lane WHERE lane < (SELECT lanes FROM outbox.meta)")) == number
            assert expression(site).replace(" ", "") == lane_expression(number).replace(" ", "")
            published = batches_of(relays, number - 1)
            until(lambda lane=number - 1, least=published: batches_of(relays, lane) > least)  # type: ignore[misc]
            before = number
    assert writers.longest < 3, "seconds; a second more than it may be, for a busy machine"
    assert len(check_exactly_once(site)) > 100
    assert site.value("SELECT bool_and(batch > 1) FROM outbox.lane")


def batches_of(relays: list[RelayProcess], lane: int) -> int:
    return sum(len(relay.said("batch published", lane=lane)) for relay in relays)


def until(so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.crash
@pytest.mark.parametrize("step", ["reconcile:2", "fetch", "flush", "commit", "delete"])
def test_a_change_that_is_killed_anywhere_leaves_everything_as_it_was(
    make_database: MakeDatabase, kafka: Kafka, topic: MakeTopic, step: str
) -> None:
    with Site(make_database(2), kafka.bootstrap) as site:
        name = topic(4)
        site.seed(name, 200)  # no relay has run yet: the command publishes them itself
        change = changed(site, 3, OUTBOX_FAILPOINT=step)
        assert change.returncode == -signal.SIGKILL
        assert site.value("SELECT lanes FROM outbox.meta") == 2
        assert site.value("SELECT count(*) FROM outbox.outbox") == 200
        site.rows("UPDATE outbox.lane SET lease_until = now()")  # 10 s earlier than the killed one's lease runs out
        site.relay()
        site.seed(name, 100)
        assert len(check_exactly_once(site)) == 300


def test_a_writer_that_does_not_end_stands_in_the_way_and_others_hardly_wait(
    site: Site, topic: MakeTopic, lanes: Command
) -> None:
    name = topic()
    site.taken()
    with psycopg.connect(site.url) as holder, Writers(site, name, 1) as writers:
        holder.execute("INSERT INTO outbox.outbox (type, topic) VALUES ('t', %s)", [name])
        refused = lanes(2, "--patience", 0)
        assert refused.returncode == 1
        assert f"pid {holder.info.backend_pid}" in refused.stderr, refused.stderr
    assert writers.longest < 3
    assert site.value("SELECT lanes FROM outbox.meta") == 1
    check_exactly_once(site)


def test_a_backlog_stands_in_the_way(site: Site, topic: MakeTopic, lanes: Command) -> None:
    site.seed(topic(), 1_001)
    refused = lanes(2, "--patience", 0)
    assert refused.returncode == 1
    assert "more than 1000 events wait" in refused.stderr


def test_the_keys_of_parked_events_are_held_in_their_new_lanes(site: Site, topic: MakeTopic, lanes: Command) -> None:
    small = topic(config={"max.message.bytes": "20000"})
    relay = site.taken()
    for number in range(8):
        add(site, small, key=f"key-{number}", value=os.urandom(50_000))
    until(lambda: site.value("SELECT count(*) FROM outbox.dead_event") == 8)
    done(lanes(3, "--json"))
    assert len(site.rows("SELECT DISTINCT lane FROM outbox.dead_event")) > 1
    for number in range(8):
        add(site, small, key=f"key-{number}", value=b"follows")
    add(site, small, key="free")
    assert len(check_exactly_once(site, parked=16)) == 1
    assert relay.said("lane taken", lane=2)


def test_what_cannot_be_is_refused(site: Site, lanes: Command) -> None:
    assert lanes(0).returncode == 2
    assert lanes(1_025).returncode == 2
    refused = lanes(2, OUTBOX_DATABASE_URL=site.relay_url)
    assert refused.returncode == 2
    assert "owner" in refused.stderr
    assert done(lanes(1, "--json")) == {"before": 1, "after": 1, "tries": 0, "waited_seconds": 0.0}
    site.rows("UPDATE outbox.lane SET halted = 'a reason'")
    refused = lanes(2, "--patience", 0)
    assert refused.returncode == 3
    assert "resolve" in refused.stderr


@pytest.mark.parametrize(("found", "meant"), [(2, TakeAgain), (1, LaneHalted)])
async def test_a_delete_that_comes_while_a_lane_is_taken_from_its_owner_is_no_contradiction(
    found: int, meant: type[Exception]
) -> None:
    """Taken from a relay at work, whose last delete comes between the reading of the batch and that of its rows."""

    async def no_ids(*_: object) -> list[str]:
        return []

    async def at_batch(_: int) -> Any:
        return SimpleNamespace(batch=found)

    uuid = uuid4()
    worker = LaneWorker.__new__(LaneWorker)
    worker.lane = 0
    shared: Any = SimpleNamespace(
        meta=SimpleNamespace(uuid=uuid), queries=SimpleNamespace(ids=no_ids, lane=at_batch), metrics=None
    )
    worker._shared = shared
    nothing: Any = None
    with pytest.raises(meant):
        await worker._settle(nothing, 1, False, Progress(uuid, 2, ((1, 2),), digest_of(["an id"])))
