"""Relays that die or sleep at the worst moments, and a Kafka that forgets: nothing is lost, doubled or out of order."""

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, KafkaError, KafkaException

from outbox.migrate import migrate
from relay.lane import Step
from tests.conftest import MakeDatabase, MakeTopic, started
from tests.relay_process import ATTENTIVE, Reader, RelayProcess, Site, check_exactly_once, compare, id_of, patched
from tests.servers import Kafka, Postgres

pytestmark = pytest.mark.crash

SHORT = {"OUTBOX_LEASE": "1"}
"""The shortest lease: a dead relay's lane is free after a second."""

BATCHES = {**SHORT, "OUTBOX_BATCH_ROWS": "1000"}
"""Small batches that are a backlog all the same, so that they overlap."""


@pytest.fixture
def site(make_database: MakeDatabase, kafka: Kafka) -> Iterator[Site]:
    with Site(make_database(), kafka.bootstrap) as site:
        yield site


# ---- kill -9 ---------------------------------------------------------------------------------------------------------

AT_THE_TAKE = (Step.LEASE, Step.FENCE, Step.PROGRESS, Step.RECONCILE)


@pytest.mark.parametrize("step", Step)
def test_a_relay_that_is_killed_after_a_step_is_followed_by_its_standby(
    site: Site, topic: MakeTopic, step: Step
) -> None:
    """Under load: the next batches are on their way. At the take: of a lane that was in use."""
    name = topic(4)
    site.seed(name, 1_000)
    before = site.taken(**BATCHES)
    before.wait_for("batch published")
    before.kill()
    site.seed(name, 8_000)
    victim = site.relay(OUTBOX_FAILPOINT=f"{step}:{1 if step in AT_THE_TAKE else 3}", **BATCHES)
    if step not in AT_THE_TAKE:
        victim.wait_for("lane taken")
        site.relay(**BATCHES)
        site.seed(name, 1_000)
    assert victim.wait() == -signal.SIGKILL, victim.text
    if step in AT_THE_TAKE:
        site.relay(**BATCHES)
        site.seed(name, 1_000)
    assert len(check_exactly_once(site)) == 10_000


@pytest.mark.parametrize("step", [Step.OFFSETS, Step.COMMIT])
def test_a_relay_that_is_killed_after_a_step_again_and_again_gets_on_when_it_is_started_again(
    site: Site, topic: MakeTopic, step: Step
) -> None:
    """Killed at the first batch, each time: after the commit that batch is finished by the next one's take."""
    site.seed(topic(4), 3_000)
    for _ in range(3):
        victim = site.relay(OUTBOX_FAILPOINT=step, **BATCHES)
        assert victim.wait() == -signal.SIGKILL, victim.text
    site.taken(**BATCHES)
    assert len(check_exactly_once(site)) == 3_000


def test_the_first_take_of_a_lane_may_be_interrupted_anywhere(site: Site, topic: MakeTopic) -> None:
    site.seed(topic(), 10)
    for step in AT_THE_TAKE:
        victim = site.relay(OUTBOX_FAILPOINT=step, **SHORT)
        assert victim.wait() == -signal.SIGKILL, victim.text
    site.taken(**SHORT)
    assert len(check_exactly_once(site)) == 10


def test_a_relay_that_is_killed_after_a_clean_start_may_not_take_that_for_a_clean_stop(
    site: Site, topic: MakeTopic, kafka: Kafka
) -> None:
    name = topic()
    site.seed(name, 10)
    relay = site.taken(**SHORT)
    relay.wait_for("batch published", events=10)
    assert relay.stop() == 0
    site.taken(**SHORT).kill()
    assert site.value("SELECT released FROM outbox.lane") is False
    site.seed(name, 10)
    site.taken(**SHORT)
    assert len(check_exactly_once(site)) == 20


def test_kills_at_random_moments_under_load_lose_and_double_nothing(site: Site, topic: MakeTopic) -> None:
    """Two relays at a time; whoever has the lane is killed, sometimes the other one. The seed is in the failure."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)  # noqa: S311 - no secret
    name = topic(4)
    stop = threading.Event()
    writer = threading.Thread(target=_write, args=(site, name, stop))
    writer.start()
    try:
        relays = [site.relay(**BATCHES) for _ in range(2)]
        for _ in range(8):
            stop.wait(chance.uniform(0.2, 1.5))
            victim = relays.pop(_holder(relays, site) if chance.random() < 0.8 else 0)
            victim.kill()
            relays.append(site.relay(**BATCHES))
    finally:
        stop.set()
        writer.join()
    check_exactly_once(site)


def _write(site: Site, topic: str, stop: threading.Event) -> None:
    """Transactions of 1 to 1,500 events, as fast as they commit, up to 200 a second."""
    count = 0
    while not stop.wait(0.005):
        count += 1
        site.seed(topic, 1_500 if count % 50 == 0 else 1 + count % 5)


def _holder(relays: list[RelayProcess], site: Site) -> int:
    """The place of the relay that has the lane, else 0."""
    owners = dict(site.rows("SELECT pid, owner FROM outbox.relay JOIN outbox.lane ON owner = id"))
    return next((place for place, relay in enumerate(relays) if relay.pid in owners), 0)


def test_the_lanes_of_a_killed_relay_are_taken_and_kept(
    make_database: MakeDatabase, kafka: Kafka, topic: MakeTopic, tmp_path: Path
) -> None:
    """The dead one counts as a relay for a while; its share must not be handed back to it."""
    name = topic(4)
    with Site(make_database(4), kafka.bootstrap, **SHORT, **patched(tmp_path, ATTENTIVE)) as site:
        relays = [site.relay() for _ in range(2)]
        for relay in relays:
            relay.wait_for("lane taken", count=2)
        site.seed(name, 1_000)
        site.wait_until_published()
        survivor = relays[1]
        before, taken = len(survivor.lines), len(survivor.said("lane taken"))
        relays[0].kill()
        survivor.wait_for("lane taken", count=taken + 4 - _held(site, survivor))
        for _ in range(8):
            site.seed(name, 1_000)
            site.wait_until_published()
        assert _held(site, survivor) == 4
        assert not [line for line in survivor.lines[before:] if line["event"] == "lane released"], survivor.text
        check_exactly_once(site)


def _held(site: Site, relay: RelayProcess) -> int:
    return int(site.value("SELECT count(*) FROM outbox.lane JOIN outbox.relay ON owner = id WHERE pid = %s", relay.pid))


# ---- zombies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delete", ["arrives", "is lost"])
def test_a_zombie_with_an_open_transaction_wakes_up_after_its_lane_was_taken(
    site: Site, topic: MakeTopic, kafka: Kafka, delete: str
) -> None:
    """It sleeps for longer than its lease: one batch is committed and its delete under way, the next one is produced.

    Its delete reaches the database behind its back, or is lost: then the successor finishes that batch.
    """
    name = topic()
    zombie = site.taken(**BATCHES)
    with psycopg.connect(site.url) as holder, Reader(kafka.bootstrap, [name], "read_uncommitted") as reader:
        holder.execute("SELECT * FROM outbox.lane FOR UPDATE")  # so that the delete waits
        site.seed(name, 3_000)
        reader.until(lambda found: len(found) >= 2_000)
        zombie.signal(signal.SIGSTOP)
        if delete == "is lost":
            holder.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        holder.rollback()
    successor = site.taken(**BATCHES)
    site.wait_until_published()
    zombie.signal(signal.SIGCONT)
    site.seed(name, 500)
    site.wait_until_published()
    assert len(check_exactly_once(site)) == 3_500
    assert not successor.said("lane lost"), "the zombie leaves its successor alone"


def test_a_zombie_that_slept_while_idle_goes_back_to_being_a_standby(site: Site, topic: MakeTopic) -> None:
    name = topic()
    zombie = site.taken(**SHORT)
    site.seed(name, 10)
    zombie.wait_for("batch published", events=10)
    zombie.signal(signal.SIGSTOP)
    site.taken(**SHORT)
    zombie.signal(signal.SIGCONT)
    for _ in range(20):
        site.seed(name, 10)
        site.wait_until_published()
    assert len(check_exactly_once(site)) == 210


def test_relays_that_are_put_to_sleep_in_turns_double_nothing(site: Site, topic: MakeTopic) -> None:
    """Each wakes up into a lane that is another's, with whatever it had under way."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)  # noqa: S311 - no secret
    name = topic(4)
    stop = threading.Event()
    writer = threading.Thread(target=_write, args=(site, name, stop))
    writer.start()
    relays = [site.relay(**BATCHES) for _ in range(2)]
    try:
        relays[0].wait_for("relay started")
        relays[1].wait_for("relay started")
        for _ in range(5):
            sleeper = relays[_holder(relays, site)]
            sleeper.signal(signal.SIGSTOP)
            stop.wait(chance.uniform(1.2, 2.2))
            sleeper.signal(signal.SIGCONT)
            stop.wait(chance.uniform(0, 0.5))
    finally:
        stop.set()
        writer.join()
    check_exactly_once(site)


# ---- what Kafka forgets ----------------------------------------------------------------------------------------------

FORGETFUL = {
    "offsets.retention.minutes": "1",
    "offsets.retention.check.interval.ms": "1000",
    "transactional.id.expiration.ms": "20000",
    "transaction.remove.expired.transaction.cleanup.interval.ms": "1000",
    "producer.id.expiration.ms": "20000",
}
"""Ten thousand times as forgetful as by default (7 days)."""


@dataclass(frozen=True)
class Idle:
    """Lanes at rest, each left in another way."""

    broker: Kafka
    kept: Site
    stopped: Site
    killed: Site
    neglected: Site
    topic: str

    def sites(self) -> list[Site]:
        return [self.kept, self.stopped, self.killed, self.neglected]


@pytest.fixture(scope="session", autouse=True)  # of this file's tests
def idle(postgres: Postgres) -> Iterator[Idle]:
    """They rest while other tests run."""
    with closing(started(lambda: Kafka(settings=FORGETFUL))) as broker:
        topic = broker.create_topic(f"events-{uuid4().hex[:8]}")
        kept, stopped, killed, neglected = (_own_site(postgres, broker) for _ in range(4))
        lanes = Idle(broker, kept, stopped, killed, neglected, topic)
        for site in lanes.sites():
            site.seed(topic, 10)
            relay = site.taken(OUTBOX_KEEPALIVE="5" if site is kept else "100000")
            relay.wait_for("batch published", events=10)
        assert stopped.relays[0].stop() == 0
        killed.relays[0].kill()
        assert all(_has_progress(broker, site) for site in lanes.sites())
        yield lanes
        for site in lanes.sites():
            site.close()
            postgres.drop_database(site.name)


def _own_site(postgres: Postgres, broker: Kafka) -> Site:
    url = postgres.create_database(f"idle_{uuid4().hex[:12]}")
    migrate(url)
    return Site(url, broker.bootstrap, **SHORT)


@pytest.mark.patient
@pytest.mark.timeout(300)
def test_what_kafka_forgets_of_a_lane_at_rest_is_kept_alive_or_was_left_clean_or_halts_it(
    idle: Idle,
) -> None:
    """A lane at rest for longer than the broker keeps offsets and transactional ids. One wait for four lanes.

    - its relay keeps the progress alive: it goes on as if nothing had been
    - it was stopped in order: the next relay goes on
    - it was killed: the next one halts, for what became of the last batch cannot be known
    - its relay was there but neglected it (OUTBOX_KEEPALIVE too long): it halts, too
    """
    lanes, broker = idle, idle.broker
    kept, neglected = lanes.kept.relays[0], lanes.neglected.relays[0]
    takes = len(kept.said("lane taken"))
    for site in (lanes.stopped, lanes.killed, lanes.neglected):
        _wait_until_forgotten(broker, site, kept)
    assert _has_progress(broker, lanes.kept)
    for site in lanes.sites():
        site.seed(lanes.topic, 5)
    kept.wait_for("batch published", events=5)
    assert len(kept.said("lane taken")) == takes, f"its offsets or its transactional ids were forgotten:\n{kept.text}"
    lanes.stopped.taken().wait_for("batch published", events=5)
    killed = lanes.killed.relay()
    for relay in (killed, neglected):
        assert "Kafka has no progress" in relay.wait_for("lane halted")["reason"]
    for site in (lanes.kept, lanes.stopped):
        _check(site, lanes.topic, published=15)
    for site in (lanes.killed, lanes.neglected):
        _check(site, lanes.topic, published=10)


def _has_progress(broker: Kafka, site: Site) -> bool:
    admin = broker.admin()
    asked = ConsumerGroupTopicPartitions(site.name)
    try:
        found = admin.list_consumer_group_offsets([asked])[site.name].result(30)
    except KafkaException as error:
        if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
            return False
        raise
    return bool(found.topic_partitions)


def _wait_until_forgotten(broker: Kafka, site: Site, kept: RelayProcess) -> None:
    """Looks each time that the one relay that is awake has written its progress again (5 s)."""
    for _ in range(40):
        if not _has_progress(broker, site):
            return
        kept.wait_for("progress kept alive", count=len(kept.said("progress kept alive")) + 1)
    raise AssertionError("Kafka forgets nothing")


def _check(site: Site, topic: str, published: int) -> None:
    """Of the site's events so many are there, once; the others wait in the outbox."""
    with Reader(site.bootstrap, [topic]) as reader:
        messages = reader.to_end()
    ours = {str(id_) for (id_,) in site.rows("SELECT id FROM ledger")}
    waiting = {str(id_) for (id_,) in site.rows("SELECT id FROM outbox.outbox")}
    found = compare(site, [message for message in messages if id_of(message) in ours])
    assert found.doubled == set()
    assert found.lost == waiting
    assert len(ours) - len(waiting) == published
