"""Restores, replacements, copies and failovers: the relay stops rather than publish twice, and `relay resolve` finds
out what Kafka has.

A restore is one of the data folder of a whole PostgreSQL server. What was committed is known from the ledger, which is
restored with the rest: events of transactions that the database has lost are `gone`, and stay in Kafka. A standby that
lacks the last transactions is such a copy as well: same system, same database, an earlier moment.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from click.testing import CliRunner, Result
from confluent_kafka import Consumer, Producer, TopicPartition

from outbox.__main__ import main as outbox_command
from outbox.migrate import migrate
from relay import topics
from relay.__main__ import main as relay_command
from relay.config import RelayConfig
from relay.errors import KafkaTrouble, LaneLost
from relay.lane import Progress, digest_of
from relay.queries import LaneRow, Meta
from relay.resolve import Choice, LanePlan, Row, plan_of, text_of
from relay.topics import Place, ReadBack, ensure_control_topic, read_back
from relay.transaction import Transactions
from tests.conftest import MakeDatabase, MakeTopic, started
from tests.relay_process import PATIENCE, Comparison, Reader, RelayProcess, Site, compare, database_of, id_of
from tests.servers import Kafka, Postgres

SHORT = {"OUTBOX_LEASE": "1"}
"""A dead relay's lane is free after a second."""

KILL_BEFORE_DELETE = {"OUTBOX_FAILPOINT": "commit:1"}
LANE = "SELECT batch, released, halted FROM outbox.lane WHERE lane = 0"


class Restorable(Site):
    """A site on a server of its own, whose data can be taken back to an earlier moment."""

    def __init__(self, server: Postgres, kafka: Kafka) -> None:
        self.server = server
        url = server.create_database(f"restored-{uuid4().hex[:12]}")
        migrate(url)
        super().__init__(url, kafka.bootstrap, **SHORT)

    def backup(self) -> Path:
        self.server.stop()
        copy = self.server.backup()
        self.server.start()
        return copy

    def restore(self, copy: Path) -> set[str]:
        """Returned: the events of the transactions that the database has lost by it."""
        before = self.ids("ledger")
        self.server.stop()
        self.server.restore(copy)
        self.server.start()
        return before - self.ids("ledger")

    def ids(self, table: str) -> set[str]:
        return ids_of(self, table)


def ids_of(site: Site, table: str) -> set[str]:
    name = table if table == "ledger" else f"outbox.{table}"
    return {str(id_) for (id_,) in site.rows(f"SELECT id FROM {name}")}


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """PostgreSQL for this module: its data folder is exchanged."""
    postgres = started(Postgres)
    yield postgres
    postgres.close()


@pytest.fixture
def site(server: Postgres, kafka: Kafka) -> Iterator[Restorable]:
    with Restorable(server, kafka) as site:
        yield site


@pytest.fixture
def make_site(make_database: MakeDatabase, kafka: Kafka) -> Iterator[Callable[..., Site]]:
    """Makes sites whose relays are ended with the test."""
    made: list[Site] = []

    def make(url: str | None = None, bootstrap: str = kafka.bootstrap, lanes: int = 1) -> Site:
        made.append(Site(url or make_database(lanes), bootstrap, **SHORT))
        return made[-1]

    yield make
    for one in made:
        one.close()


def resolve(site: Site, *options: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code and the lanes of `relay resolve --json`."""
    result = invoked(site, "--json", *options)
    assert result.stdout, (result.exit_code, result.stderr, result.exception)
    return result.exit_code, json.loads(result.stdout)["lanes"]


def invoked(site: Site, *options: str) -> Result:
    environment = {"OUTBOX_DATABASE_URL": site.relay_url, "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": site.bootstrap}
    return CliRunner().invoke(relay_command, ["resolve", *options], env=environment)


def published(plan: dict[str, Any]) -> set[str]:
    return {one["id"] for one in plan["published"]}


def unpublished(plan: dict[str, Any]) -> set[str]:
    return {one["id"] for one in plan["unpublished"]}


def places(site: Site, *topics: str) -> dict[str, tuple[str, int, int]]:
    """Where an independent reader of committed records finds each event."""
    with Reader(site.bootstrap, topics or site.topics()) as reader:
        return {
            id_of(message): (message.topic() or "", message.partition() or 0, message.offset() or 0)
            for message in reader.to_end()
        }


def published_by(site: Site, count: int, topic: str) -> None:
    """`count` events, published by a relay that then stops."""
    site.seed(topic, count)
    site.taken()
    site.settle()


def halted(site: Site, **environment: str) -> str:
    """Why a new relay halts the lane; it goes on running."""
    return str(site.relay(**environment).wait_for("lane halted")["reason"])


def killed_at_rest(site: Site) -> None:
    """A relay takes the lane and is killed while nothing is under way: the lane is not released."""
    relay = site.taken()
    site.wait_until_published()
    deadline = time.monotonic() + PATIENCE
    while site.value("SELECT count(*) FROM outbox.outbox"):  # what can be read is not yet deleted
        assert time.monotonic() < deadline, relay.text
        time.sleep(0.02)
    relay.kill()


def check(site: Site, gone: set[str] = frozenset()) -> None:  # type: ignore[assignment] # an empty set
    """Settled: nothing is lost, doubled or out of order; in Kafka, but not in the ledger, is only what is `gone`."""
    site.settle()
    with Reader(site.bootstrap, site.topics()) as reader:
        found = compare(site, reader.to_end())
    logs = "\n--- next relay\n".join(relay.text[-4000:] for relay in site.relays)
    assert found == Comparison(set(), set(), gone, []), f"{found}\n{logs}"
    assert site.value("SELECT count(*) FROM outbox.outbox") == 0, logs


# ---- a database at an earlier moment ---------------------------------------------------------------------------------


@pytest.mark.crash
def test_a_database_restored_to_just_before_the_last_delete_goes_on_by_itself(
    site: Restorable, topic: MakeTopic
) -> None:
    name = topic()
    published_by(site, 20, name)
    site.seed(name, 30)
    site.relay(**KILL_BEFORE_DELETE).wait()
    copy = site.backup()
    site.taken()
    site.settle()
    assert site.restore(copy) == set()
    assert len(site.ids("outbox")) == 30, "they are back, and Kafka has them"
    site.seed(name, 5)
    site.taken()
    check(site)


@pytest.mark.crash
@pytest.mark.parametrize("at_rest", [True, False], ids=["left by a clean stop", "killed between commit and delete"])
def test_a_database_restored_to_many_batches_back(site: Restorable, topic: MakeTopic, at_rest: bool) -> None:
    """Halts; the plan names exactly the rows that Kafka has, and where; afterwards everything is there once."""
    names = [topic(3), topic()]
    published_by(site, 20, names[0])
    for name in names:
        site.seed(name, 20)
    if not at_rest:
        site.relay(OUTBOX_BATCH_ROWS="3", OUTBOX_FAILPOINT="commit:4").wait()
    copy = site.backup()
    waiting = site.ids("outbox")
    site.seed(names[0], 15)
    site.taken(OUTBOX_BATCH_ROWS="3")
    site.settle()

    gone = site.restore(copy)
    assert len(gone) == 15
    assert site.ids("outbox") == waiting
    site.seed(names[1], 7)
    new = site.ids("outbox") - waiting
    assert "the database is behind" in halted(site)

    code, [plan] = resolve(site)
    assert code == 0
    assert (published(plan), unpublished(plan), plan["unknown"]) == (waiting, new, 0)
    at = places(site)
    assert {one["id"]: (one["topic"], one["partition"], one["offset"]) for one in plan["published"]} == {
        id_: at[id_] for id_ in waiting
    }
    assert "are not in the database: it has lost transactions" in plan["warnings"][0]
    assert site.ids("outbox") == waiting | new, "a plan changes nothing"
    assert site.value("SELECT halted FROM outbox.lane") is not None

    code, [done] = resolve(site, "--apply")
    assert (code, done["applied"], published(done)) == (0, True, waiting)
    check(site, gone)
    assert resolve(site) == (0, [])


@pytest.mark.crash
def test_a_database_that_gave_the_last_batch_s_seqs_to_other_events(site: Restorable, topic: MakeTopic) -> None:
    """One batch back, so that the seqs alone would have the relay delete events that were never published."""
    name = topic()
    site.seed(name, 5)
    killed_at_rest(site)
    copy = site.backup()
    site.seed(name, 8)
    first = site.rows("SELECT seq FROM outbox.outbox ORDER BY seq")
    site.taken()
    site.settle()

    gone = site.restore(copy)
    site.seed(name, 8)
    assert site.rows("SELECT seq FROM outbox.outbox ORDER BY seq") == first, "the same seqs"
    new = site.ids("outbox")
    assert len(gone) == 8
    assert "are not the events of that batch" in halted(site)

    code, [plan] = resolve(site, "--apply")
    assert (code, published(plan), unpublished(plan)) == (0, set(), new)
    assert "given those seqs to other events" in plan["verdict"]
    assert "of the 8 events of Kafka's last batch 8 are not in the database" in plan["warnings"][0]
    check(site, gone)


@pytest.mark.crash
def test_a_database_restored_to_before_a_resolve_halts_again(site: Restorable, topic: MakeTopic) -> None:
    name = topic()
    site.seed(name, 6)
    copy = site.backup()
    site.taken(OUTBOX_BATCH_ROWS="2")
    site.settle()
    site.restore(copy)
    halted(site)
    for relay in site.relays:
        relay.kill()
    with_halt = site.backup()
    for copy in (with_halt, with_halt):
        assert resolve(site, "--apply")[0] == 0
        site.restore(copy)
    site.rows("UPDATE outbox.lane SET halted = NULL")  # as if it had been restored to just before it halted
    assert "the database is behind" in halted(site)
    code, [plan] = resolve(site, "--apply")
    assert (code, len(plan["published"])) == (0, 6)
    check(site)


@pytest.mark.crash
@pytest.mark.parametrize("lost", ["delete", "delete and insert"])
def test_a_failover_to_a_standby_that_lacks_the_last_transactions(
    site: Restorable, topic: MakeTopic, lost: str
) -> None:
    """The relay is at work meanwhile: the address is the same, the server behind it another."""
    name = topic()
    site.seed(name, 5)
    killed_at_rest(site)
    if lost == "delete":
        site.seed(name, 10)
    copy = site.backup()
    if lost == "delete and insert":
        site.seed(name, 10)
    relay = site.taken()
    site.wait_until_published()
    gone = site.restore(copy)
    if lost == "delete":
        relay.wait_for("lane taken", count=2)
        assert gone == set()
    else:
        relay.wait_for("lane halted")
        code, [plan] = resolve(site, "--apply")
        assert (code, plan["published"], plan["unpublished"]) == (0, [], [])
        assert "of the 10 events of Kafka's last batch 10 are not in the database" in plan["warnings"][0]
        relay.wait_for("lane taken", count=2)
        assert len(gone) == 10
    site.seed(name, 5)
    check(site, gone)


def test_a_database_that_is_ahead_of_kafka(make_site: Callable[..., Site], topic: MakeTopic) -> None:
    """Kafka was restored: here the database's number is moved instead."""
    site, name = make_site(), topic()
    published_by(site, 10, name)
    site.rows("UPDATE outbox.lane SET batch = batch + 40, released = false")
    site.seed(name, 10)
    assert "the database is ahead" in halted(site)
    code, [plan] = resolve(site, "--apply")
    assert (code, len(plan["published"]), len(plan["unpublished"])) == (0, 0, 10)
    check(site)


# ---- another Kafka ---------------------------------------------------------------------------------------------------


@pytest.mark.crash
def test_an_empty_cluster_in_the_place_of_the_old_one(make_site: Callable[..., Site], topic: MakeTopic) -> None:
    site, name = make_site(), topic()
    site.seed(name, 10)
    killed_at_rest(site)
    site.seed(name, 10)
    other = started(Kafka)
    try:
        site.bootstrap = other.bootstrap
        assert "Kafka was replaced or emptied" in halted(site)
        code, [plan] = resolve(site)
        assert (code, plan["kafka"], len(plan["unpublished"])) == (0, None, 10)
        assert name in plan["warnings"][0], "the topic is not there"
        other.create_topic(name)
        code, [plan] = resolve(site, "--apply")
        assert (code, plan["warnings"]) == (0, [])
        site.rows("DELETE FROM ledger WHERE NOT id = ANY (SELECT id FROM outbox.outbox)")  # the old cluster's
        check(site)
    finally:
        site.close()
        other.close()


@pytest.mark.crash
def test_progress_that_kafka_has_forgotten(site: Restorable, topic: MakeTopic, kafka: Kafka) -> None:
    """What offsets.retention.minutes does in a week is done by hand. The rows of the last batch are in doubt; so they
    are when the database is restored to before the resolve, whose own batch names none of them."""
    name = topic()
    site.seed(name, 10)
    site.relay(**KILL_BEFORE_DELETE).wait()
    waiting = site.ids("outbox")
    forget_progress(kafka, site)
    copy = site.backup()
    site.seed(name, 5)
    assert "offsets.retention.minutes" in halted(site)
    code, [plan] = resolve(site, "--apply")
    assert (code, published(plan), len(unpublished(plan))) == (0, waiting, 5)
    for relay in site.relays:
        if relay.alive:
            relay.kill()

    gone = site.restore(copy)
    published_before = set(places(site, name))
    assert "the database is behind" in halted(site)
    code, [plan] = resolve(site, "--apply")
    assert (code, published(plan)) == (0, waiting)
    check(site, gone & published_before)


@pytest.mark.crash
def test_an_emptied_topic_keeps_what_it_had_to_itself(
    make_site: Callable[..., Site], topic: MakeTopic, kafka: Kafka
) -> None:
    """Whether the events were there cannot be known; that is for a person to decide."""
    site, name = make_site(), topic()
    site.seed(name, 10)
    site.relay(**KILL_BEFORE_DELETE).wait()
    waiting = ids_of(site, "outbox")
    empty(kafka, name)
    forget_progress(kafka, site)
    halted(site)
    code, [plan] = resolve(site, "--apply")
    assert (code, plan["applied"], plan["unknown"], unpublished(plan)) == (1, False, 10, waiting)
    assert "--accept-unknown" in plan["blocked"]
    assert "younger than the oldest event" in plan["warnings"][0]
    assert "--apply leaves this lane halted" in invoked(site).stdout
    assert site.value("SELECT halted FROM outbox.lane") is not None
    code, [plan] = resolve(site, "--apply", "--accept-unknown")
    assert (code, plan["applied"]) == (0, True)
    check(site)


def empty(kafka: Kafka, topic: str) -> None:
    admin = kafka.admin()
    admin.delete_records([TopicPartition(topic, 0, -1)])[TopicPartition(topic, 0)].result(30)


def forget_progress(kafka: Kafka, site: Site) -> None:
    admin = kafka.admin()
    admin.delete_consumer_groups([site.name])[site.name].result(30)


def test_aborted_records_are_not_taken_for_published_ones(make_site: Callable[..., Site], topic: MakeTopic) -> None:
    site, name = make_site(), topic()
    site.seed(name, 5)
    site.relay(OUTBOX_FAILPOINT="offsets:1").wait()  # its records are in the topic, and never committed
    site.rows("UPDATE outbox.lane SET batch = batch + 10")
    halted(site)
    code, [plan] = resolve(site, "--apply")
    assert (code, len(plan["published"]), len(plan["unpublished"])) == (0, 0, 5)
    check(site)


def test_a_relay_that_was_thought_dead_publishes_nothing_that_was_taken_for_absent(
    make_site: Callable[..., Site], topic: MakeTopic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with its next batch right after the topics were read back."""
    site, name = make_site(), topic()
    site.seed(name, 5)
    [(id_, batch, uuid)] = site.rows("SELECT o.id, batch, uuid FROM outbox.outbox o, outbox.lane, outbox.meta LIMIT 1")
    config = RelayConfig(database_url=site.url, kafka={"bootstrap.servers": site.bootstrap})
    ensure_control_topic(config, site.name, 1)
    zombie = Transactions(config, site.name, 0)
    for number in range(2):
        zombie.fence(number)
    site.rows("UPDATE outbox.lane SET halted = 'by hand'")

    def publish() -> None:
        zombie.begin(batch + 1)(name, b"value", b"key", headers={"ce_id": str(id_)})
        zombie.flush(batch + 1)
        zombie.offsets(batch + 1, Progress(uuid, batch + 1, ()).metadata())
        zombie.commit(batch + 1)

    def then_the_zombie_publishes(*arguments: Any) -> ReadBack:
        found = read_back(*arguments)
        with pytest.raises((LaneLost, KafkaTrouble)):  # fenced: either, by where the client notices
            publish()
        return found

    monkeypatch.setattr(topics, "read_back", then_the_zombie_publishes)
    code, [plan] = resolve(site, "--apply")
    assert (code, len(plan["published"]), len(plan["unpublished"])) == (0, 0, 5)
    zombie.discard()
    site.taken()
    check(site)


def test_what_stands_behind_an_open_transaction_of_someone_else_is_waited_for(
    make_site: Callable[..., Site], topic: MakeTopic, kafka: Kafka
) -> None:
    """An open transaction of someone else holds the reading up: it waits, and says so."""
    site, name = make_site(), topic()
    site.seed(name, 5)
    other = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": f"other-{uuid4()}", "log_level": 0})
    other.init_transactions()
    other.begin_transaction()
    other.produce(name, b"in the way", headers={"ce_id": str(uuid4())})
    other.flush()
    site.relay(**KILL_BEFORE_DELETE).wait()
    site.rows("UPDATE outbox.lane SET batch = batch - 10")
    halted(site)
    result = CliRunner().invoke(
        relay_command,
        ["resolve"],
        env={
            "OUTBOX_DATABASE_URL": site.relay_url,
            "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": site.bootstrap,
            "OUTBOX_KAFKA_TIMEOUT": "1",
            "OUTBOX_KAFKA_TOPIC_METADATA_PROPAGATION_MAX_MS": "500",
        },
    )
    assert result.exit_code == 3, result.output
    assert "another producer has left a transaction open" in result.stderr
    other.commit_transaction()
    code, [plan] = resolve(site, "--apply")
    assert (code, len(plan["published"])) == (0, 5)
    site.settle()
    assert set(places(site, name)) >= ids_of(site, "ledger")


def test_only_the_lanes_that_are_asked_for_and_halted_are_touched(
    make_site: Callable[..., Site], topic: MakeTopic
) -> None:
    site, name = make_site(lanes=4), topic(4)
    site.seed(name, 200)
    relay = site.relay()
    for lane in range(4):
        relay.wait_for("lane taken", lane=lane)
    site.settle()
    site.rows("UPDATE outbox.lane SET batch = batch + 9 WHERE lane IN (1, 3)")
    site.seed(name, 200)
    relay = site.relay()
    relay.wait_for("lane halted", lane=1)
    relay.wait_for("lane halted", lane=3)
    assert resolve(site, "--apply", "--lane", "0") == (0, [])
    _, plans = resolve(site, "--apply", "--lane", "3")
    assert [(plan["lane"], plan["applied"]) for plan in plans] == [(3, True)]
    _, plans = resolve(site)
    assert [(plan["lane"], plan["applied"]) for plan in plans] == [(1, False)]
    assert resolve(site, "--apply")[0] == 0
    check(site)


# ---- copies, and two of one name -------------------------------------------------------------------------------------


@pytest.fixture
def copied(postgres: Postgres) -> Iterator[Callable[[Site], str]]:
    """Makes copies of a site's database on the same server; dropped with the test."""
    made: list[str] = []

    def copy(site: Site) -> str:
        made.append(f"copy-{uuid4().hex[:12]}")
        return postgres.create_database(made[-1], database_of(site.url))

    yield copy
    for name in made:
        postgres.drop_database(name)


class Copy(Site):
    """The copy's ledger came with it."""

    def __init__(self, url: str, bootstrap: str) -> None:
        self.url, self.bootstrap, self.relays, self._environment = url, bootstrap, [], {}


def test_a_copy_is_refused_before_anything_is_fenced(
    make_site: Callable[..., Site], topic: MakeTopic, copied: Callable[[Site], str]
) -> None:
    site, name = make_site(), topic()
    published_by(site, 10, name)
    site.seed(name, 10)
    copy = copied(site)
    original = site.taken()
    refused = RelayProcess({"OUTBOX_DATABASE_URL": copy, "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": site.bootstrap})
    assert refused.wait() == 2
    for words in (f"copy of the outbox {site.name}", "outbox rename", "relay resolve --apply --adopt"):
        assert words in refused.text
    assert invoked(Copy(copy, site.bootstrap)).exit_code == 2
    check(site)
    assert_never_fenced(original)


def assert_never_fenced(relay: RelayProcess) -> None:
    for event in ("lane lost", "lane in trouble", "lane in doubt", "producers recycled"):
        assert not relay.said(event), relay.text
    assert len(relay.said("lane taken")) == 1


@pytest.mark.parametrize("events", ["publish", "discard"])
def test_a_copy_with_a_name_of_its_own_lives_beside_the_original(
    make_site: Callable[..., Site], topic: MakeTopic, copied: Callable[[Site], str], events: str
) -> None:
    site, name, other = make_site(), topic(), topic()
    published_by(site, 10, name)
    site.seed(name, 10)
    url = copied(site)
    new_name = f"beside-{uuid4().hex[:8]}"
    refused = renamed(url, new_name)
    assert (refused.exit_code, "10 events wait" in refused.stderr, "--events" in refused.stderr) == (1, True, True)
    assert renamed(url, new_name, "--events", events).exit_code == 0
    original = site.taken()
    with Copy(url, site.bootstrap) as copy:
        copy.rows("DELETE FROM ledger WHERE NOT id = ANY (SELECT id FROM outbox.outbox)")
        copy.rows("UPDATE outbox.outbox SET topic = %s", other)
        copy.rows("UPDATE ledger SET topic = %s", other)
        copy.seed(other, 5)
        copy.taken()
        check(copy)
        assert len(places(copy, other)) == (15 if events == "publish" else 5)
    check(site)
    assert_never_fenced(original)


def renamed(url: str, name: str, *options: str) -> Result:
    return CliRunner().invoke(outbox_command, ["rename", name, url, *options])


def test_an_outbox_at_work_is_not_renamed(make_site: Callable[..., Site], topic: MakeTopic) -> None:
    site = make_site()
    relay = site.taken()
    refused = renamed(site.url, "other")
    assert (refused.exit_code, "a relay is at work" in refused.stderr) == (1, True)
    relay.kill()
    site.rows("UPDATE outbox.lane SET lease_until = now() - interval '1 s'")
    site.seed(topic(), 3)
    refused = renamed(site.url, "other")
    assert (refused.exit_code, "did not stop clean" in refused.stderr) == (1, True)


def test_a_database_that_moved_is_adopted(
    make_site: Callable[..., Site], topic: MakeTopic, copied: Callable[[Site], str]
) -> None:
    site, name = make_site(), topic()
    published_by(site, 10, name)
    site.seed(name, 10)
    with Copy(copied(site), site.bootstrap) as moved:
        assert resolve(moved, "--apply", "--adopt") == (0, [])
        moved.taken()
        check(moved)


@pytest.mark.crash
def test_an_adopted_copy_and_a_relay_that_the_original_still_has(
    make_site: Callable[..., Site], topic: MakeTopic, copied: Callable[[Site], str]
) -> None:
    """Told apart by the batch alone: whoever is behind halts, and nothing is published twice."""
    site, name = make_site(), topic()
    site.seed(name, 5)
    killed_at_rest(site)
    site.seed(name, 40)
    with Copy(copied(site), site.bootstrap) as moved:
        resolve(moved, "--apply", "--adopt")
        relays = [one.relay(OUTBOX_BATCH_ROWS="2") for one in (site, moved)]
        wait_until(lambda: any(relay.said("lane halted") for relay in relays) or not ids_of(moved, "outbox"))
        site.wait_until_published() if relays[1].said("lane halted") else moved.wait_until_published()
        with Reader(site.bootstrap, [name]) as reader:
            found = compare(site, reader.to_end())
        assert found == Comparison(set(), set(), set(), []), [relay.text for relay in relays]


def wait_until(done: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def namesake(make_site: Callable[..., Site]) -> Callable[[Site], Site]:
    """Makes a second outbox, with a uuid of its own, of a site's name."""

    def make(site: Site) -> Site:
        other = make_site()
        other.rows("UPDATE outbox.meta SET name = %s", site.name)
        return other

    return make


def test_of_two_outboxes_of_one_name_the_second_halts_and_fences_nobody(
    make_site: Callable[..., Site], namesake: Callable[[Site], Site], topic: MakeTopic
) -> None:
    site, mine, other = make_site(), topic(), topic()
    rightful = site.taken()
    second = namesake(site)
    second.seed(other, 5)
    reason = halted(second)
    assert str(site.value("SELECT uuid FROM outbox.meta")) in reason
    assert "outbox rename" in reason
    code, [plan] = resolve(second)
    assert code == 1
    assert "--adopt takes the name over" in plan["blocked"]
    site.seed(mine, 5)
    site.wait_until_published()
    assert_never_fenced(rightful)

    second.close()
    assert renamed(second.url, f"own-{uuid4().hex[:8]}").exit_code == 0
    second.taken()
    check(second)
    check(site)


def test_the_second_takes_the_name_over_and_then_the_first_halts(
    make_site: Callable[..., Site], namesake: Callable[[Site], Site], topic: MakeTopic
) -> None:
    site, mine, other = make_site(), topic(), topic()
    published_by(site, 5, mine)
    second = namesake(site)
    second.seed(other, 5)
    halted(second)
    assert resolve(second, "--apply")[0] == 1
    code, [plan] = resolve(second, "--apply", "--adopt")
    assert (code, plan["applied"], plan["warnings"]) == (0, True, [])
    check(second)
    site.seed(mine, 5)
    assert str(second.value("SELECT uuid FROM outbox.meta")) in halted(site)


def test_progress_that_no_relay_has_written_is_replaced_when_adopted(
    make_site: Callable[..., Site], topic: MakeTopic, kafka: Kafka
) -> None:
    site, name = make_site(), topic()
    published_by(site, 5, name)
    stranger = Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": site.name})
    stranger.commit(offsets=[TopicPartition(f"{site.name}.lanes", 0, 7)], asynchronous=False)
    stranger.close()
    site.seed(name, 5)
    assert "Something else than a relay" in halted(site)
    code, [plan] = resolve(site, "--apply")
    assert (code, plan["applied"]) == (1, False)
    assert resolve(site, "--apply", "--adopt")[0] == 0
    check(site)


# ---- the plan, without servers ---------------------------------------------------------------------------------------

META = Meta("shop", UUID(int=1), 1)
ROWS = [Row(seq, f"event-{seq}", "orders") for seq in (3, 4, 5)]
AT = Place("orders", 0, 8)


def lane(batch: int, released: bool = False) -> LaneRow:
    return LaneRow(0, batch, released, None, True, "why")


def planned(row: LaneRow, progress: Progress | None, found: ReadBack, choice: Choice | None = None) -> LanePlan:
    return plan_of(META, row, progress, ROWS, found, choice or Choice())


def test_both_stand_two_above_both_afterwards() -> None:
    nothing = ReadBack({}, (), {})
    assert planned(lane(7), Progress(META.uuid, 4, ()), nothing).batch == 9
    assert planned(lane(4), Progress(META.uuid, 7, ()), nothing).batch == 9
    assert planned(lane(7), None, nothing).batch == 9


def test_a_row_is_published_or_not_and_unknown_only_where_its_topic_forgets() -> None:
    found = ReadBack({"event-4": AT}, (), {"orders": "it is compacted"})
    plan = planned(lane(7), None, found)
    assert [row.seq for row, _ in plan.published] == [4]
    assert [row.seq for row in plan.unpublished] == [3, 5]
    assert plan.unknown == 2
    assert plan.blocked
    assert planned(lane(7), None, found, Choice(accept_unknown=True)).blocked is None
    everything = ReadBack({row.id: AT for row in ROWS}, (), {"orders": "it is compacted"})
    assert planned(lane(7), None, everything).blocked is None


def test_a_batch_that_waits_for_its_delete_only_is_told_from_one_with_the_same_seqs() -> None:
    found = ReadBack({}, (), {})
    own = Progress(META.uuid, 8, ((3, 5),), digest_of(["event-3", "event-4"]))
    others = Progress(META.uuid, 8, ((3, 5),), digest_of(["a", "b"]))
    assert "between batch 8's commit" in planned(lane(7), own, found).verdict
    assert "given those seqs to other events" in planned(lane(7), others, found).verdict


def test_another_outbox_s_seqs_are_not_counted_as_lost_here() -> None:
    assert planned(lane(7), Progress(UUID(int=2), 9, ((1, 100),)), ReadBack({}, (), {})).warnings == ()


def test_the_text_names_events_and_places_and_what_comes_next() -> None:
    plan = planned(lane(5), Progress(META.uuid, 8, ((3, 5),)), ReadBack({"event-3": AT}, ("gone",), {}))
    text = text_of(plan)
    for words in ("event-3  orders [0] @ 8", "event-5  orders", "topic gone", "--apply", "batch 10", "behind"):
        assert words in text


def test_long_lists_are_cut_in_the_text() -> None:
    rows = [Row(seq, f"event-{seq}", "orders") for seq in range(1, 200)]
    plan = plan_of(META, lane(1), None, rows, ReadBack({}, (), {}), Choice())
    assert "and 149 more" in text_of(plan)


def test_a_database_or_a_kafka_that_is_away_is_trouble_and_wrong_settings_are_no_trouble() -> None:
    def code(**environment: str) -> int:
        return CliRunner().invoke(relay_command, ["resolve"], env=environment).exit_code

    away = {"OUTBOX_DATABASE_URL": "postgresql://x@127.0.0.1:1/x", "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"}
    assert code(**away) == 3
    assert code(OUTBOX_DATABASE_URL="mysql://x") == 2
