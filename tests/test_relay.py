"""The way end to end: a relay process between a real database and a real broker."""

import json
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from outbox.identity import HERE
from outbox.migrate import migrate
from tests.conftest import MakeDatabase, MakeTopic, started
from tests.relay_process import (
    ATTENTIVE,
    Reader,
    RelayProcess,
    Site,
    check_exactly_once,
    database_of,
    headers_of,
    patched,
)
from tests.servers import Kafka, Postgres

QUICK = {"OUTBOX_KAFKA_TOPIC_METADATA_PROPAGATION_MAX_MS": "1000"}
"""A topic that is not there is known to be so after a second."""

IMPATIENT = {**QUICK, "OUTBOX_KAFKA_TIMEOUT": "3"}
"""A Kafka that does not answer is known to be away after 3 s."""


@pytest.fixture
def site(make_database: MakeDatabase, kafka: Kafka) -> Iterator[Site]:
    with Site(make_database(), kafka.bootstrap) as site:
        yield site


@pytest.fixture
def make_site(make_database: MakeDatabase, kafka: Kafka) -> Iterator[Callable[[int], Site]]:
    sites: list[Site] = []

    def make(lanes: int) -> Site:
        sites.append(Site(make_database(lanes), kafka.bootstrap))
        return sites[-1]

    yield make
    for site in sites:
        site.close()


INSERT = (
    "INSERT INTO outbox.outbox (id, type, topic, key, value, fingerprint, headers, created_at)"
    " VALUES (%(id)s, %(type)s, %(topic)s, %(key)s, %(value)s, %(fingerprint)s, %(headers)s, %(created_at)s)"
)


def add(site: Site, topic: str, **columns: Any) -> UUID:
    """One event in a transaction of its own; its id."""
    event = {
        "id": uuid4(),
        "type": "t",
        "topic": topic,
        "key": "k",
        "value": b"v",
        "fingerprint": None,
        "headers": None,
        "created_at": "2024-02-29T12:00:00.123Z",
        **columns,
    }
    with site.connect() as connection:
        connection.execute(INSERT, event)
    return UUID(str(event["id"]))


# ---- what arrives ----------------------------------------------------------------------------------------------------

MURMUR2 = {
    "21": -973932308,
    "foobar": -790332482,
    "a-little-bit-long-string": -985981536,
    "a-little-bit-longer-string": -1486304829,
    "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    "abc": 479470107,
}
"""org.apache.kafka.common.utils.UtilsTest.testMurmur2 (Apache Kafka)."""


def test_an_avro_event_arrives_as_the_contract_says(site: Site, topic: MakeTopic) -> None:
    name = topic()
    id_ = add(
        site,
        name,
        type="com.acme.orders.ORDERED",
        key="clé",
        value=b"\x02\x00",
        fingerprint=-2,
        headers='{"traceparent": "00-ab"}',
    )
    site.taken()
    [message] = check_exactly_once(site)
    assert message.key() == "clé".encode()
    assert message.value() == b"\xc3\x01\xfe\xff\xff\xff\xff\xff\xff\xff\x02\x00"
    assert message.timestamp() == (1, 1709208000123)
    assert message.headers() == [
        ("ce_specversion", b"1.0"),
        ("ce_id", str(id_).encode()),
        ("ce_type", b"com.acme.orders.ORDERED"),
        ("ce_source", f"/outbox/{site.name}".encode()),
        ("content-type", b"application/avro"),
        ("traceparent", b"00-ab"),
    ]


def test_events_of_any_kind_arrive_once(site: Site, topic: MakeTopic) -> None:
    orders, raw = topic(4), topic()
    add(site, orders, key="a", value=None, fingerprint=1)
    add(site, orders, key="", value=b"", fingerprint=None)
    add(site, orders, key=None, value=b"x", headers='{"none": null}')
    add(site, raw, key="a", value=b'{"raw": true}')
    site.taken(OUTBOX_SOURCE="/orders")
    messages = {(message.topic(), message.key()): message for message in check_exactly_once(site)}
    assert messages[orders, b"a"].value() is None
    assert messages[orders, b""].value() == b""
    assert messages[orders, None].value() == b"x"
    assert headers_of(messages[orders, None])["none"] is None
    assert messages[raw, b"a"].value() == b'{"raw": true}'
    assert "content-type" not in headers_of(messages[raw, b"a"])
    assert {headers_of(message)["ce_source"] for message in messages.values()} == {"/orders"}


def test_keys_land_where_those_of_java_producers_land(site: Site, topic: MakeTopic) -> None:
    name = topic(7)
    for key in MURMUR2:
        add(site, name, key=key)
    site.taken()
    found = {(message.key() or b"").decode(): message.partition() for message in check_exactly_once(site)}
    assert found == {key: (value & 0x7FFFFFFF) % 7 for key, value in MURMUR2.items()}


def test_concurrent_writers_with_rollbacks_and_sleepers_lose_nothing_and_keep_each_key_s_order(
    site: Site, topic: MakeTopic
) -> None:
    """A writer locks its aggregate before it adds the event, as any read-then-write does."""
    name = topic(4)
    site.rows("CREATE TABLE aggregate (key text PRIMARY KEY, version int)")
    site.rows("INSERT INTO aggregate SELECT 'key-' || g, 0 FROM generate_series(0, 9) AS g")
    relay = site.taken()

    def write(writer: int) -> None:
        with psycopg.connect(site.url) as connection:
            for turn in range(60):
                key = f"key-{(writer * 7 + turn) % 10}"
                connection.execute("UPDATE aggregate SET version = version + 1 WHERE key = %s", (key,))
                connection.execute(
                    "INSERT INTO outbox.outbox (id, type, topic, key, value) VALUES (gen_random_uuid(), 't', %s, %s,"
                    " 'x')",
                    (name, key),
                )
                if turn % 10 == writer:
                    connection.execute("SELECT pg_sleep(0.05)")
                connection.rollback() if turn % 5 == 3 else connection.commit()

    writers = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(check_exactly_once(site)) == 6 * 48
    assert not relay.said("lane in trouble")


def test_a_row_that_commits_late_and_one_of_a_prepared_transaction_are_published(site: Site, topic: MakeTopic) -> None:
    name = topic()
    relay = site.taken()
    late = psycopg.connect(site.url)
    prepared = psycopg.connect(site.url)
    for writer in (late, prepared):
        writer.execute("INSERT INTO outbox.outbox (id, type, topic) VALUES (gen_random_uuid(), 't', %s)", (name,))
    prepared.execute("PREPARE TRANSACTION 'late'")
    for _ in range(20):
        site.seed(name, 50)
        relay.wait_for("batch published")
    site_ledger = site.value("SELECT count(*) FROM ledger")
    late.commit()
    late.close()
    site.rows("COMMIT PREPARED 'late'")
    prepared.close()
    assert len(check_exactly_once(site)) == site_ledger + 2


# ---- how batches are cut ---------------------------------------------------------------------------------------------


def sizes(relay: RelayProcess) -> list[int]:
    return [line["events"] for line in relay.said("batch published")]


def test_a_batch_holds_no_more_rows_than_it_may(site: Site, topic: MakeTopic) -> None:
    site.seed(topic(4), 2_050)
    relay = site.taken(OUTBOX_BATCH_ROWS="100")
    check_exactly_once(site)
    assert max(sizes(relay)) == 100
    assert sum(sizes(relay)) == 2_050


def test_a_batch_holds_no_more_bytes_than_it_may_but_for_its_last_event(site: Site, topic: MakeTopic) -> None:
    name = topic()
    for _ in range(30):
        add(site, name, value=os.urandom(4_000))
    add(site, name, value=os.urandom(100_000))
    add(site, name, value=b"small")
    relay = site.taken(OUTBOX_BATCH_BYTES="10000")
    check_exactly_once(site)
    assert sizes(relay)[:10] == [3] * 10
    assert sum(sizes(relay)) == 32


def test_a_batch_is_cut_where_its_progress_would_not_fit(site: Site, topic: MakeTopic) -> None:
    """Seqs with gaps of any length, as rollbacks leave them: of 8,000 rows that are fetched less than half are taken.
    What was fetched and not taken must not count for the floor."""
    site.rows(
        "INSERT INTO outbox.outbox (seq, id, type, topic, key, value) OVERRIDING SYSTEM VALUE"
        " SELECT sum(1 + floor(random() * 1000)) OVER (ORDER BY g), gen_random_uuid(), 't', %s, md5(g::text), 'x'"
        " FROM generate_series(1, 20000) AS g",
        topic(4),
    )
    relay = site.taken()
    assert len(check_exactly_once(site)) == 20_000
    assert 1_000 < max(sizes(relay)) < 4_000
    assert not relay.said("lane in trouble")


COUNTING = """
import collections, json, pathlib
from relay import queries, transaction
counts = collections.Counter()
def counting(cls, name):
    call = getattr(cls, name)
    def counted(*arguments, **named):
        counts[name] += 1
        return call(*arguments, **named)
    setattr(cls, name, counted)
for name in ("advance", "holders"):
    counting(queries.Queries, name)
counting(transaction.Transactions, "commit")
fetch, farewell = queries.Queries.fetch, queries.Queries.farewell
async def counted_fetch(*arguments):
    rows = await fetch(*arguments)
    counts["fetch"] += bool(rows)
    return rows
async def written(*arguments):
    pathlib.Path(__file__).with_name("counts").write_text(json.dumps(counts))
    await farewell(*arguments)
queries.Queries.fetch, queries.Queries.farewell = counted_fetch, written
"""
"""Patch of a relay that writes down at its end what it asked of its servers."""


def test_a_batch_costs_a_fetch_a_delete_and_one_transaction(site: Site, topic: MakeTopic, tmp_path: Path) -> None:
    """A change that makes it more is seen here, whatever the machine's mood. Taking the lane comes on top: a statement,
    and an empty transaction of each id; and a fetch for a topic that is met first."""
    site.seed(topic(4), 20_000)
    relay = site.taken(**patched(tmp_path, COUNTING), OUTBOX_BATCH_ROWS="1000")
    check_exactly_once(site)
    batches = len(sizes(relay))
    assert batches == 20
    counts = json.loads((tmp_path / "counts").read_text())
    assert counts["fetch"] == batches + 1
    assert counts["advance"] == batches + 1
    assert counts["commit"] == batches + 2
    assert counts["holders"] <= batches + 2


def test_a_slow_delete_holds_the_batches_back_and_breaks_nothing(site: Site, topic: MakeTopic) -> None:
    site.rows(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.1); RETURN NULL; END $$"
    )
    site.rows("CREATE TRIGGER slow AFTER DELETE ON outbox.outbox FOR EACH STATEMENT EXECUTE FUNCTION slow()")
    site.seed(topic(), 20_000)
    relay = site.taken(OUTBOX_BATCH_ROWS="1000")
    check_exactly_once(site)
    assert not relay.said("lane in trouble"), relay.text


# ---- several relays --------------------------------------------------------------------------------------------------


def test_the_second_relay_is_a_hot_standby_that_takes_over_at_once(site: Site, topic: MakeTopic) -> None:
    """So much sooner than the lease would run out that a busy machine cannot be the reason. (About 0.6 s.)"""
    name, lease = topic(4), {"OUTBOX_LEASE": "60"}
    first = site.taken(**lease)
    second = site.relay(**lease)
    second.wait_for("relay started")
    site.seed(name, 1_000)
    site.wait_until_published()
    assert not second.said("lane taken")
    started_at = time.monotonic()
    first.signal(signal.SIGTERM)
    second.wait_for("lane taken", lane=0)
    took = time.monotonic() - started_at
    assert first.wait() == 0
    assert took < 20, f"the handover took {took:.1f} s"
    assert not second.said("lane lost")
    site.seed(name, 1_000)
    assert len(check_exactly_once(site)) == 2_000


def test_two_relays_share_the_lanes_and_one_that_stops_leaves_them_to_the_other(
    make_site: Callable[[int], Site], topic: MakeTopic, tmp_path: Path
) -> None:
    site = make_site(4)
    name = topic(4)
    attentive = patched(tmp_path, ATTENTIVE)
    first = site.relay(**attentive)
    for lane in range(4):
        first.wait_for("lane taken", lane=lane)
    second = site.relay(**attentive)
    second.wait_for("lane taken", count=2)
    owners = [owner for (owner,) in site.rows("SELECT owner FROM outbox.lane")]
    assert sorted(owners.count(owner) for owner in set(owners)) == [2, 2]
    site.seed(name, 5_000)
    site.wait_until_published()
    assert first.stop() == 0
    second.wait_for("lane taken", count=4)
    site.seed(name, 5_000)
    assert len(check_exactly_once(site)) == 10_000


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_sigterm_under_load_finishes_what_is_under_way_and_releases_the_lane(site: Site, topic: MakeTopic) -> None:
    site.seed(topic(4), 30_000)
    relay = site.taken()
    relay.wait_for("batch published")
    assert relay.stop() == 0
    assert site.rows("SELECT released, owner, halted FROM outbox.lane") == [(True, None, None)]
    assert site.rows("SELECT * FROM outbox.relay") == []
    assert [line["event"] for line in relay.lines][-2:] == ["lane released", "relay stopped"]
    site.taken()
    assert len(check_exactly_once(site)) == 30_000


def test_sigint_is_as_good_as_sigterm(site: Site) -> None:
    relay = site.taken()
    relay.signal(signal.SIGINT)
    assert relay.wait() == 0


def test_signals_change_the_log_level_and_back(site: Site, topic: MakeTopic) -> None:
    name = topic()
    relay = site.relay(OUTBOX_LOG_LEVEL="error")
    site.seed(name, 10)
    site.wait_until_published()
    assert not relay.lines
    relay.signal(signal.SIGUSR1)
    relay.wait_for("log level changed", to="debug")
    site.seed(name, 10)
    relay.wait_for("batch published")
    relay.signal(signal.SIGUSR2)
    relay.wait_for("log level changed", to="error")
    said = len(relay.lines)
    site.seed(name, 10)
    assert len(check_exactly_once(site)) == 30
    assert len(relay.lines) == said


def test_a_second_sigterm_leaves_at_once_and_nothing_is_doubled(site: Site, topic: MakeTopic) -> None:
    relay = site.taken()
    with psycopg.connect(site.url) as holder:
        holder.execute("SELECT * FROM outbox.lane FOR UPDATE")  # so that the delete cannot finish
        site.seed(topic(), 10)
        site.wait_until_published()
        relay.signal(signal.SIGTERM)
        relay.wait_for("relay stopping")
        relay.signal(signal.SIGTERM)
        assert relay.wait(10) == 128 + signal.SIGTERM
    site.taken()
    assert len(check_exactly_once(site)) == 10


def test_a_drain_that_takes_too_long_is_abandoned_and_nothing_is_doubled(site: Site, topic: MakeTopic) -> None:
    relay = site.taken(OUTBOX_DRAIN_TIMEOUT="0.5")
    with psycopg.connect(site.url) as holder:
        holder.execute("SELECT * FROM outbox.lane FOR UPDATE")
        site.seed(topic(), 10)
        site.wait_until_published()
        relay.signal(signal.SIGTERM)
        relay.wait_for("batch abandoned")
        holder.rollback()
    assert relay.wait() == 0
    assert site.value("SELECT released FROM outbox.lane") is False, "something was under way"
    site.taken()
    assert len(check_exactly_once(site)) == 10


def refused(site: Site, **environment: str) -> str:
    """What a relay says that ends with status 2."""
    relay = site.relay(**environment)
    assert relay.wait() == 2, relay.text
    assert "Traceback" not in relay.text
    return str(relay.lines[-1]["text"])


def test_a_database_without_an_outbox_is_refused_with_the_remedy(site: Site) -> None:
    assert "outbox migrate" in refused(site, OUTBOX_SCHEMA="elsewhere")
    site.rows("DROP SCHEMA outbox CASCADE")
    assert "outbox migrate" in refused(site)


@pytest.mark.parametrize("version", ["9999", "0000"])
def test_tables_of_another_version_are_refused_with_both_versions(site: Site, version: str) -> None:
    site.rows("UPDATE outbox.alembic_version SET version_num = %s", version)
    said = refused(site)
    assert version in said
    assert "0001" in said


def test_wrong_settings_are_refused_with_their_names(site: Site) -> None:
    assert "OUTBOX_BATCH_ROWS" in refused(site, OUTBOX_BATCH_ROW="1")
    assert "acks" in refused(site, OUTBOX_KAFKA_ACKS="1")
    assert "no.such.thing" in refused(site, OUTBOX_KAFKA_NO_SUCH_THING="1")
    assert "STEP" in refused(site, OUTBOX_FAILPOINT="lunch")


def test_who_may_not_is_refused_with_postgresql_s_words(site: Site) -> None:
    role = f"role_{uuid4().hex[:12]}"
    site.rows(f"CREATE ROLE {role} NOLOGIN")
    try:
        assert "not permitted to log in" in refused(site, OUTBOX_DATABASE_URL=site.url.replace("postgres@", f"{role}@"))
        site.rows(f"ALTER ROLE {role} LOGIN")
        assert "permission denied" in refused(site, OUTBOX_DATABASE_URL=site.url.replace("postgres@", f"{role}@"))
    finally:
        site.rows(f"DROP ROLE {role}")
    assert "nowhere" in refused(site, OUTBOX_DATABASE_URL=site.url.rsplit("/", 1)[0] + "/nowhere")


def test_what_the_migration_is_missing_can_be_made_up_while_the_relay_waits_to_be_restarted(
    site: Site, topic: MakeTopic
) -> None:
    """As an orchestrator does: it fails, it is started again."""
    version = site.value("SELECT version_num FROM outbox.alembic_version")
    site.rows("UPDATE outbox.alembic_version SET version_num = '9999'")
    refused(site)
    site.rows("UPDATE outbox.alembic_version SET version_num = %s", version)
    site.seed(topic(), 5)
    site.taken()
    assert len(check_exactly_once(site)) == 5


# ---- poison ----------------------------------------------------------------------------------------------------------


def dead(site: Site) -> list[tuple[str, str | None, str]]:
    return site.rows("SELECT topic, key, error FROM outbox.dead_event ORDER BY seq")


def test_an_event_too_large_for_its_topic_is_parked_with_what_follows_it_and_other_keys_go_on(
    site: Site, topic: MakeTopic
) -> None:
    name = topic(config={"max.message.bytes": "20000"})
    site.seed(name, 300)
    add(site, name, key="poison", value=os.urandom(50_000))
    add(site, name, key="poison", value=b"follows")
    site.seed(name, 300)
    relay = site.taken()
    relay.wait_for("events parked")
    add(site, name, key="poison", value=b"follows later")
    add(site, name, key="sound", value=b"goes on")
    assert len(check_exactly_once(site, parked=3)) == 601
    first, *others = dead(site)
    assert "MSG_SIZE_TOO_LARGE" in first[2]
    assert [(one, key) for one, key, _ in (first, *others)] == [(name, "poison")] * 3
    assert all("earlier event of its key" in error for _, _, error in others)
    seqs = [seq for (seq,) in site.rows("SELECT seq FROM outbox.dead_event ORDER BY died_at, seq")]
    assert seqs == sorted(seqs), "in the order of their key"


def test_the_held_keys_are_held_by_the_next_relay_too(site: Site, topic: MakeTopic) -> None:
    name = topic(config={"max.message.bytes": "20000"})
    add(site, name, key="poison", value=os.urandom(50_000))
    relay = site.taken()
    relay.wait_for("events parked")
    assert relay.stop() == 0
    add(site, name, key="poison", value=b"follows")
    add(site, name, key="sound")
    site.taken()
    assert len(check_exactly_once(site, parked=2)) == 1


def test_events_of_topics_that_are_not_there_are_parked_and_the_others_go_on(site: Site, topic: MakeTopic) -> None:
    name = topic()
    unknown = ["nowhere", "", "no topic", "x" * 300]
    site.seed(name, 100)
    for other in unknown:
        add(site, other, key="a")
        add(site, other, key=None)
    site.seed(name, 100)
    relay = site.taken(**QUICK)
    assert len(check_exactly_once(site, parked=8)) == 200
    assert [(one, key) for one, key, _ in dead(site)] == [(other, key) for other in unknown for key in ("a", None)]
    assert not relay.said("lane in trouble"), relay.text


ODD: list[dict[str, str]] = [
    {"headers": '["no", "object"]'},
    {"headers": '{"number": 1}'},
    {"created_at": "infinity"},
    {"created_at": "1960-01-01"},
    {"created_at": "20000-01-01"},
]
"""What plain SQL can write, and Kafka not carry."""


def test_rows_that_no_record_can_be_made_of_are_parked_and_the_others_go_on(site: Site, topic: MakeTopic) -> None:
    name = topic()
    site.rows("ALTER TABLE outbox.outbox DROP CONSTRAINT outbox_headers_are_texts")  # owners can
    for number, columns in enumerate(ODD):
        site.seed(name, 5)
        add(site, name, key=f"odd-{number}", **columns)
    site.taken()
    assert len(check_exactly_once(site, parked=len(ODD))) == 5 * len(ODD)
    assert [key for _, key, _ in dead(site)] == [f"odd-{number}" for number in range(len(ODD))]


def test_an_event_that_a_service_may_write_is_not_too_large_for_the_client(site: Site, topic: MakeTopic) -> None:
    add(site, topic(), value=os.urandom(1_000_000), fingerprint=1, headers='{"traceparent": "%s"}' % ("x" * 500))
    site.taken()
    assert len(check_exactly_once(site)) == 1


def test_a_topic_smaller_than_the_client_s_batches_parks_nothing(site: Site, topic: MakeTopic) -> None:
    """The refusal is of a request with many records, none of which is too large."""
    site.seed(topic(config={"max.message.bytes": "3000"}), 60)
    site.taken()
    assert len(check_exactly_once(site)) == 60


# ---- halting ---------------------------------------------------------------------------------------------------------


class Restorable(Site):
    """A site whose database can be copied and put back while no relay runs."""

    def __init__(self, postgres: Postgres, url: str, bootstrap: str) -> None:
        super().__init__(url, bootstrap, OUTBOX_LEASE="1")
        self._postgres = postgres

    def copy(self) -> str:
        name = f"copy_{uuid4().hex[:12]}"
        self._end_sessions()
        self._postgres.create_database(name, database_of(self.url))
        return name

    def restore(self, copy: str) -> None:
        """As a restore of the whole server does it: the database is the same one, at an earlier moment."""
        self._end_sessions()
        self._postgres.drop_database(database_of(self.url))
        self._postgres.create_database(database_of(self.url), copy)
        self._postgres.drop_database(copy)
        self.rows(f"UPDATE outbox.meta SET home = {HERE}")

    def _end_sessions(self) -> None:
        """Those of killed relays may not have noticed yet."""
        self._postgres.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            f" WHERE datname = '{database_of(self.url)}' AND pid <> pg_backend_pid()"
        )

    def published(self, topic: str, count: int) -> None:
        """`count` events in one batch, whose delete is done; the relay is killed then."""
        batch = self.value("SELECT batch FROM outbox.lane")
        self.seed(topic, count)
        relay = self.relay()
        relay.wait_for("batch published", events=count)
        relay.kill()
        assert self.value("SELECT batch FROM outbox.lane") > batch

    def visible(self) -> int:
        with Reader(self.bootstrap, self.topics()) as reader:
            return len(reader.to_end())


@pytest.fixture
def restorable(postgres: Postgres, make_database: MakeDatabase, kafka: Kafka) -> Iterator[Restorable]:
    with Restorable(postgres, make_database(), kafka.bootstrap) as site:
        yield site


def halted(site: Site) -> str:
    """The reason for which a new relay halts the lane, in its log and in the database."""
    relay = site.relay()
    reason = str(relay.wait_for("lane halted", lane=0)["reason"])
    assert site.value("SELECT halted FROM outbox.lane") == reason
    assert site.value("SELECT owner FROM outbox.lane") is None
    assert relay.stop() == 0, "it waits for a person, and for its other lanes"
    return reason


def test_a_database_restored_one_batch_back_finishes_right(restorable: Restorable, topic: MakeTopic) -> None:
    name = topic()
    restorable.published(name, 10)
    restorable.seed(name, 20)
    copy = restorable.copy()
    relay = restorable.relay()
    relay.wait_for("batch published", events=20)
    relay.kill()
    restorable.restore(copy)
    assert restorable.value("SELECT count(*) FROM outbox.outbox") == 20
    restorable.taken()
    restorable.seed(name, 5)
    assert len(check_exactly_once(restorable)) == 35


def test_a_database_restored_two_batches_back_halts(restorable: Restorable, topic: MakeTopic) -> None:
    name = topic()
    restorable.published(name, 10)
    copy = restorable.copy()
    restorable.published(name, 20)
    restorable.published(name, 30)
    restorable.restore(copy)
    assert "behind" in halted(restorable)
    assert restorable.visible() == 60


def test_a_database_restored_to_before_the_last_batch_was_written_halts_when_its_seqs_are_given_again(
    restorable: Restorable, topic: MakeTopic
) -> None:
    """The new events have the seqs of published ones; to delete them would be a loss."""
    name = topic()
    restorable.published(name, 10)
    copy = restorable.copy()
    restorable.published(name, 20)
    restorable.restore(copy)
    restorable.seed(name, 20)
    assert "not the events of that batch" in halted(restorable)
    assert restorable.value("SELECT count(*) FROM outbox.outbox") == 20
    assert restorable.visible() == 30


def test_a_database_restored_after_a_clean_stop_does_not_take_the_empty_batch_for_one_of_its_own(
    restorable: Restorable, topic: MakeTopic
) -> None:
    name = topic()
    restorable.published(name, 10)
    restorable.seed(name, 20)
    copy = restorable.copy()
    relay = restorable.relay()
    relay.wait_for("batch published", events=20)
    assert relay.stop() == 0
    relay = restorable.taken()
    assert relay.stop() == 0
    restorable.restore(copy)
    halted(restorable)
    assert restorable.value("SELECT count(*) FROM outbox.outbox") == 20
    assert restorable.visible() == 30


def test_two_databases_of_one_name_at_one_kafka_halt(restorable: Restorable, topic: MakeTopic) -> None:
    restorable.published(topic(), 10)
    restorable.rows("UPDATE outbox.meta SET uuid = gen_random_uuid()")
    reason = halted(restorable)
    assert "two databases use one name" in reason
    assert str(restorable.value("SELECT uuid FROM outbox.meta")) in reason


def test_a_kafka_that_lost_its_progress_halts_a_lane_that_was_not_left_clean(
    restorable: Restorable, topic: MakeTopic, kafka: Kafka
) -> None:
    restorable.published(topic(), 10)
    admin = kafka.admin()
    admin.delete_consumer_groups([restorable.name])[restorable.name].result(30)
    assert "Kafka has no progress" in halted(restorable)
    assert restorable.visible() == 10


def test_a_kafka_that_lost_its_progress_after_a_clean_stop_goes_on(
    restorable: Restorable, topic: MakeTopic, kafka: Kafka
) -> None:
    name = topic()
    restorable.seed(name, 10)
    relay = restorable.relay()
    relay.wait_for("batch published", events=10)
    assert relay.stop() == 0
    admin = kafka.admin()
    admin.delete_consumer_groups([restorable.name])[restorable.name].result(30)
    restorable.seed(name, 10)
    restorable.taken()
    assert len(check_exactly_once(restorable)) == 20


def test_a_halted_lane_goes_on_when_a_person_says_so(restorable: Restorable, topic: MakeTopic) -> None:
    name = topic()
    restorable.published(name, 10)
    uuid = restorable.value("SELECT uuid FROM outbox.meta")
    restorable.rows("UPDATE outbox.meta SET uuid = gen_random_uuid()")
    halted(restorable)
    restorable.rows("UPDATE outbox.meta SET uuid = %s", uuid)
    restorable.seed(name, 10)
    relay = restorable.relay()
    relay.wait_for("relay started")
    restorable.rows("UPDATE outbox.lane SET halted = NULL")
    assert len(check_exactly_once(restorable)) == 20


def test_progress_that_something_else_wrote_halts(restorable: Restorable, topic: MakeTopic, kafka: Kafka) -> None:
    from confluent_kafka import Consumer, TopicPartition

    restorable.published(topic(), 10)
    name = restorable.name
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": name, "enable.auto.commit": False})
    consumer.commit(offsets=[TopicPartition(f"{name}.lanes", 0, 1, "mine")], asynchronous=False)
    consumer.close()
    assert "Something else than a relay" in halted(restorable)


# ---- servers that are away -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_kafka() -> Iterator[Kafka]:
    with closing(started(Kafka)) as server:
        yield server


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[Postgres]:
    with closing(started(lambda: Postgres(fsync=True))) as server:
        yield server


def said_once(relay: RelayProcess, *events: str, after: int = 0) -> None:
    """Each trouble is a line, not a line a second. `after`: in the log from this line on."""
    counts: dict[str, int] = defaultdict(int)
    for line in relay.lines[after:]:
        if line.get("level") in ("warning", "error") or "level" not in line:
            counts[str(line.get("event", line.get("text")))] += 1
    assert set(counts) <= set(events), relay.text
    assert all(count == 1 for count in counts.values()), relay.text


@pytest.mark.crash
def test_kafka_away_at_the_start_is_said_once_and_waited_for(make_database: MakeDatabase, own_kafka: Kafka) -> None:
    name = own_kafka.create_topic(f"start-{uuid4().hex[:8]}")
    own_kafka.kill()
    with Site(make_database(), own_kafka.bootstrap) as site:
        try:
            site.seed(name, 100)
            impatient = site.relay(OUTBOX_KAFKA_TIMEOUT="60")
            while not site.value(SESSIONS):
                pass  # each look waits for the database: no busy loop
            began = time.monotonic()
            assert impatient.stop() == 0
            assert time.monotonic() - began < 20, "SIGTERM does not wait for Kafka"
            relay = site.relay(**IMPATIENT)
            relay.wait_for("kafka away")
        finally:
            own_kafka.start()
        relay.wait_for("kafka back")
        assert len(check_exactly_once(site)) == 100
        said_once(relay, "kafka away", "lane in trouble")


@pytest.mark.crash
def test_kafka_away_under_load_is_said_once_and_nothing_is_lost_or_doubled(
    make_database: MakeDatabase, own_kafka: Kafka
) -> None:
    """One transaction is open, the one before is committed and its delete under way.

    Not a kill at any moment: a lone broker that is killed between a commit's decision and its markers skips them at its
    next start ("Couldn't find leader endpoint for partitions …"), and whoever reads what is committed waits for ever.
    """
    name = own_kafka.create_topic(f"middle-{uuid4().hex[:8]}")
    with Site(make_database(), own_kafka.bootstrap) as site:
        relay = site.taken(OUTBOX_BATCH_ROWS="1000", **IMPATIENT)
        with psycopg.connect(site.url) as holder:
            holder.execute("SELECT * FROM outbox.lane FOR UPDATE")  # so that the delete waits
            site.seed(name, 20_000)
            for isolation, count in (("read_committed", 1_000), ("read_uncommitted", 2_000)):
                with Reader(site.bootstrap, [name], isolation) as reader:
                    reader.until(lambda found, count=count: len(found) >= count)  # type: ignore[misc]
            before = len(relay.lines)
            own_kafka.kill()
        try:
            site.seed(name, 1_000)
            relay.wait_for("lane in trouble")
        finally:
            own_kafka.start()
        assert len(check_exactly_once(site)) == 21_000
        said_once(relay, "lane in trouble", after=before)


@pytest.mark.crash
def test_kafka_away_while_idle_is_noticed_when_there_is_something_to_publish(
    make_database: MakeDatabase, own_kafka: Kafka
) -> None:
    name = own_kafka.create_topic(f"idle-{uuid4().hex[:8]}")
    with Site(make_database(), own_kafka.bootstrap) as site:
        relay = site.taken(**IMPATIENT)
        site.seed(name, 10)
        relay.wait_for("batch published", events=10)
        site.wait_until_published()
        before = len(relay.lines)
        own_kafka.kill()
        own_kafka.start()
        site.seed(name, 10)
        assert len(check_exactly_once(site)) == 20
        said_once(relay, "lane in trouble", after=before)


SESSIONS = (
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND query LIKE '%%.meta%%' AND query NOT LIKE '%%pg_stat_activity%%'"
)
"""Of a relay that has read the outbox's own account of itself, and goes on to Kafka."""


def own_site(postgres: Postgres, kafka: Kafka) -> Site:
    url = postgres.create_database(f"own_{uuid4().hex[:12]}")
    migrate(url)
    return Site(url, kafka.bootstrap)


@pytest.mark.crash
def test_the_database_away_at_the_start_is_said_once_and_waited_for(
    own_postgres: Postgres, kafka: Kafka, topic: MakeTopic
) -> None:
    with own_site(own_postgres, kafka) as site:
        site.seed(topic(), 100)
        own_postgres.stop()
        try:
            impatient = site.relay()
            impatient.wait_for("database away")
            assert impatient.stop() == 0
            relay = site.relay()
            relay.wait_for("database away")
        finally:
            own_postgres.start()
        relay.wait_for("database back")
        assert len(check_exactly_once(site)) == 100
        said_once(relay, "database away")


@pytest.mark.crash
@pytest.mark.parametrize("end", ["kill", "stop", "immediate"])
def test_the_database_away_under_load_is_said_once_and_nothing_is_lost_or_doubled(
    own_postgres: Postgres, kafka: Kafka, topic: MakeTopic, end: str
) -> None:
    name = topic(4)
    with own_site(own_postgres, kafka) as site:
        site.seed(name, 20_000)
        relay = site.taken(OUTBOX_BATCH_ROWS="500")
        relay.wait_for("batch published", count=3)
        try:
            getattr(own_postgres, end)()
            relay.wait_for("database away")
        finally:
            own_postgres.start()
        site.seed(name, 1_000)
        assert len(check_exactly_once(site)) == 21_000
        said_once(relay, "database away", "lane in trouble")


@pytest.mark.crash
def test_connections_that_a_person_ends_are_made_again(site: Site, topic: MakeTopic) -> None:
    name = topic()
    relay = site.taken()
    for _ in range(3):
        site.rows(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        site.seed(name, 100)
        site.wait_until_published()
    assert len(check_exactly_once(site)) == 300
    assert relay.said("lane taken")


def test_a_wrong_password_is_refused_and_a_right_one_is_not(own_postgres: Postgres, kafka: Kafka) -> None:
    with own_site(own_postgres, kafka) as site:
        role = f"role_{uuid4().hex[:8]}"
        site.rows(f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD 'right'")
        hba = Path(own_postgres.execute("SHOW hba_file")[0][0])
        before = hba.read_text()
        hba.write_text(f"host all {role} 127.0.0.1/32 scram-sha-256\n{before}")
        try:
            own_postgres.execute("SELECT pg_reload_conf()")
            said = refused(site, OUTBOX_DATABASE_URL=site.url.replace("postgres@", f"{role}:wrong@"))
            assert "password authentication failed" in said
            relay = site.taken(OUTBOX_DATABASE_URL=site.url.replace("postgres@", f"{role}:right@"))
            assert relay.stop() == 0
            assert "right" not in relay.text
        finally:
            hba.write_text(before)
            own_postgres.execute("SELECT pg_reload_conf()")


@pytest.mark.crash
def test_a_broker_that_makes_topics_by_itself_gives_every_lane_its_partition(make_database: MakeDatabase) -> None:
    broker = started(lambda: Kafka(settings={"auto.create.topics.enable": "true"}))
    with closing(broker), Site(make_database(4), broker.bootstrap) as site:
        name = broker.create_topic("events", 4)
        relay = site.relay()
        for lane in range(4):
            relay.wait_for("lane taken", lane=lane)
        site.seed(name, 1_000)
        assert len(check_exactly_once(site)) == 1_000
