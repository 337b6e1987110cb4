"""The commands for people: what they say is so, what they change keeps every key's order, and their exit codes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import structlog
from click.testing import CliRunner, Result
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # not re-exported
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
)

from relay.__main__ import main
from relay.config import RelayConfig, load, masked
from relay.trace import moment_of
from tests.conftest import MakeDatabase, MakeTopic
from tests.relay_process import PATIENCE, ROOT, RelayProcess, Site, check_exactly_once
from tests.servers import Kafka
from tests.test_relay import add

SMALL = {"max.message.bytes": "20000"}
"""A topic for which an event of 50,000 bytes is poison."""


@pytest.fixture
def site(make_database: MakeDatabase, kafka: Kafka) -> Iterator[Site]:
    with Site(make_database(), kafka.bootstrap) as site:
        yield site


@pytest.fixture
def relay(site: Site) -> Iterator[Callable[..., Result]]:
    """The command in this process, with the owner's settings."""

    def run(*arguments: str, **environment: str | None) -> Result:
        settings = {
            **{name: None for name in os.environ if name.startswith("OUTBOX_")},
            "OUTBOX_DATABASE_URL": site.url,
            "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": site.bootstrap,
            **environment,
        }
        result = CliRunner().invoke(main, arguments, env=settings)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result

    yield run
    structlog.reset_defaults()


def document(result: Result, code: int = 0) -> Any:
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def parked(site: Site) -> list[tuple[str, str | None, str]]:
    return site.rows("SELECT topic, key, error FROM outbox.dead_event ORDER BY seq")


def let_large_events_in(kafka: Kafka, topic: str) -> None:
    entry = ConfigEntry("max.message.bytes", "200000", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=[entry])
    admin = kafka.admin()
    for future in admin.incremental_alter_configs([resource]).values():
        future.result(30)


def with_poison(site: Site, topic: MakeTopic) -> tuple[str, RelayProcess, list[UUID]]:
    """A topic, a relay, and three parked events of the key "poison": the first is too large, the others held."""
    name = topic(config=SMALL)
    ids = [add(site, name, key="poison", value=os.urandom(50_000))]
    ids += [add(site, name, key="poison", value=b"follows") for _ in range(2)]
    relay = site.taken()
    relay.wait_for("events parked")
    until(lambda: len(parked(site)) == 3)
    return name, relay, ids


def until(so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- dead ------------------------------------------------------------------------------------------------------------


def test_a_retry_keeps_the_key_s_order_while_its_writer_goes_on(
    site: Site, kafka: Kafka, topic: MakeTopic, relay: Callable[..., Result]
) -> None:
    """The retried events stand before what was written after them: parked later, waiting, or written meanwhile."""
    name, _, _ = with_poison(site, topic)
    let_large_events_in(kafka, name)
    done = threading.Event()

    def write() -> None:
        with site.connect() as connection:
            while not done.is_set():
                connection.execute(
                    "INSERT INTO outbox.outbox (type, topic, key, value) VALUES ('t', %s, 'poison', 'later')", [name]
                )
                done.wait(0.01)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        time.sleep(0.1)  # some of them are parked
        assert document(relay("dead", "retry", "--key", "poison", "--json"))["events"] >= 3
        until(lambda: site.value("SELECT count(*) FROM outbox.outbox WHERE value = 'follows'") == 0)
    finally:
        done.set()
        writer.join()
    assert len(check_exactly_once(site)) > 10


def test_retrying_one_event_takes_all_of_its_key_along_and_no_other(
    site: Site, kafka: Kafka, topic: MakeTopic, relay: Callable[..., Result]
) -> None:
    name, _, ids = with_poison(site, topic)
    add(site, name, key="other", value=os.urandom(50_000))
    until(lambda: len(parked(site)) == 4)
    let_large_events_in(kafka, name)
    assert document(relay("dead", "retry", str(ids[2]), "--json")) == {"events": 3}
    assert len(check_exactly_once(site, parked=1)) == 3
    assert [key for _, key, _ in parked(site)] == ["other"]


def test_what_still_cannot_be_published_is_parked_again(
    site: Site, topic: MakeTopic, relay: Callable[..., Result]
) -> None:
    _, process, _ = with_poison(site, topic)
    before = len(process.said("events parked"))
    assert document(relay("dead", "retry", "--all", "--json")) == {"events": 3}
    process.wait_for("events parked", count=before + 1)
    check_exactly_once(site, parked=3)


def test_a_discarded_event_is_gone_and_the_rest_of_its_key_can_be_retried(
    site: Site, topic: MakeTopic, relay: Callable[..., Result]
) -> None:
    name, _, ids = with_poison(site, topic)
    assert document(relay("dead", "discard", str(ids[0]), "--yes", "--json")) == {"events": 1}
    assert len(parked(site)) == 2, "the held ones wait for a decision of their own"
    assert document(relay("dead", "retry", "--topic", name, "--json")) == {"events": 2}
    site.rows("DELETE FROM ledger WHERE id = %s", ids[0])
    assert len(check_exactly_once(site)) == 2


def test_when_all_of_a_key_was_discarded_the_key_is_held_no_more(
    site: Site, topic: MakeTopic, relay: Callable[..., Result]
) -> None:
    name, _, _ = with_poison(site, topic)
    site.rows("DELETE FROM ledger")
    assert document(relay("dead", "discard", "--error", "held:", "--yes", "--json")) == {"events": 2}
    assert document(relay("dead", "discard", "--all", "--yes", "--json")) == {"events": 1}
    add(site, name, key="poison", value=b"goes through")
    assert len(check_exactly_once(site)) == 1


def test_a_discard_asks_first(site: Site, topic: MakeTopic, relay: Callable[..., Result]) -> None:
    with_poison(site, topic)
    refused = relay("dead", "discard", "--all")  # no answer
    assert refused.exit_code == 1
    assert "Delete 3 events" in refused.output
    assert len(parked(site)) == 3


def test_parked_events_are_listed_and_shown_without_their_content(
    site: Site, topic: MakeTopic, relay: Callable[..., Result]
) -> None:
    name, _, ids = with_poison(site, topic)
    listed = document(relay("dead", "list", "--topic", name, "--json"))
    assert [one["id"] for one in listed] == [str(id_) for id_ in ids]
    assert [one["held"] for one in listed] == [False, True, True]
    assert listed[0]["bytes"] == 50_000
    assert "value" not in listed[0]
    assert document(relay("dead", "list", "--key", "sound", "--json")) == []
    text = relay("dead", "list", "--limit", "1").stdout
    assert "1 parked events (there may be more)" in text
    assert "MSG_SIZE_TOO_LARGE" in text
    shown = document(relay("dead", "show", str(ids[1])))
    assert (shown["of_its_key"], shown["bytes"], "value" in shown) == (3, 7, False)
    assert document(relay("dead", "show", str(ids[1]), "--value"))["value"] == "Zm9sbG93cw=="
    assert relay("dead", "show", str(uuid4())).exit_code == 1


def test_nothing_is_retried_that_was_not_named(site: Site, relay: Callable[..., Result]) -> None:
    assert relay("dead", "retry").exit_code == 2
    assert document(relay("dead", "retry", "--all", "--json"), 1) == {"events": 0}


def test_a_halted_lane_is_resolved_first(site: Site, topic: MakeTopic, relay: Callable[..., Result]) -> None:
    _, process, _ = with_poison(site, topic)
    assert process.stop() == 0
    site.rows("UPDATE outbox.lane SET halted = 'why'")
    result = relay("dead", "retry", "--all")
    assert result.exit_code == 3
    assert "relay resolve" in result.stderr
    assert len(parked(site)) == 3


def test_a_relay_s_own_role_may_not_bring_events_back(
    site: Site, topic: MakeTopic, relay: Callable[..., Result]
) -> None:
    _, process, _ = with_poison(site, topic)
    result = relay("dead", "retry", "--all", OUTBOX_DATABASE_URL=site.relay_url)
    assert result.exit_code == 2
    assert "permission denied" in result.stderr
    process.wait_for("lane taken", count=2)
    check_exactly_once(site, parked=3)


# ---- status ----------------------------------------------------------------------------------------------------------


def test_status_shows_lanes_relays_backlog_and_who_holds_the_floor(site: Site, relay: Callable[..., Result]) -> None:
    alone = document(relay("status", "--json"), 1)
    assert alone["lanes"][0]["owner"] is None
    process = site.taken(OUTBOX_HTTP="127.0.0.1:0")
    port = process.wait_for("http listening")["port"]
    with psycopg.connect(site.url, application_name="report") as writer:
        writer.execute("INSERT INTO outbox.outbox (type, topic) VALUES ('t', 'none')")
        held = document(relay("status", "--json", OUTBOX_HTTP=f":{port}"))
        [lane] = held["lanes"]
        assert (lane["pid"], lane["pending"], lane["pending_is_exact"], lane["floor_lag"]) == (process.pid, 0, True, 0)
        assert held["relay_beside"]["ready"] == []
        assert [one["pid"] for one in held["relays"]] == [process.pid]
        [open_] = held["writers"]
        assert (open_["application"], open_["state"], open_["prepared"]) == ("report", "idle in transaction", None)
        assert 0 <= open_["seconds"] < 60
        writer.rollback()
        writer.execute("INSERT INTO outbox.outbox (type, topic) VALUES ('t', 'none')")
        writer.execute("PREPARE TRANSACTION 'left-behind'")
        text = relay("status").stdout
        assert "prepared left-behind" in text
        assert f"({process.pid})" in text
        writer.commit()
        with psycopg.connect(site.url, autocommit=True) as other:
            other.execute("ROLLBACK PREPARED 'left-behind'")
    site.rows("UPDATE outbox.lane SET halted = 'restored'")
    halted = relay("status")
    assert halted.exit_code == 1
    assert "HALTED: restored" in halted.stdout


def test_status_is_watched_until_it_is_interrupted(site: Site) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
    watching = subprocess.Popen(
        [sys.executable, "-m", "relay", "status", "--watch", "--json"],
        cwd=ROOT,
        env={
            **environment,
            "OUTBOX_DATABASE_URL": site.relay_url,
            "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": site.bootstrap,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout
    first, second = (json.loads(watching.stdout.readline()) for _ in range(2))
    assert first["outbox"] == site.name
    assert first["at"] < second["at"]
    watching.send_signal(signal.SIGINT)
    _, said = watching.communicate(timeout=PATIENCE)
    assert (watching.returncode, said) == (0, "")


def test_status_says_what_this_user_may_not_see(site: Site, relay: Callable[..., Result]) -> None:
    with psycopg.connect(site.url, application_name="report") as writer:
        writer.execute("INSERT INTO outbox.outbox (type, topic) VALUES ('t', 'none')")
        text = relay("status", OUTBOX_DATABASE_URL=site.relay_url).stdout
    assert "report" in text
    assert "not visible: GRANT pg_read_all_stats" in text


@pytest.mark.parametrize("command", [("status",), ("dead", "list"), ("trace", str(UUID(int=1)))])
def test_a_database_that_is_away_and_wrong_settings_have_codes_of_their_own(
    relay: Callable[..., Result], command: tuple[str, ...]
) -> None:
    assert relay(*command, OUTBOX_DATABASE_URL="postgresql://a@127.0.0.1:1/x").exit_code == 3
    wrong = relay(*command, OUTBOX_LEASE="0")
    assert (wrong.exit_code, "OUTBOX_LEASE" in wrong.stderr) == (2, True)
    assert relay(*command, OUTBOX_SCHEMA="nowhere").exit_code == 2


# ---- check -----------------------------------------------------------------------------------------------------------


def levels(result: Result, code: int = 0) -> dict[str, str]:
    return {one["what"]: one["level"] for one in document(result, code)["findings"]}


def test_the_tests_own_servers_can_be_worked_with_and_are_called_weak(
    site: Site, topic: MakeTopic, relay: Callable[..., Result]
) -> None:
    name = topic()
    site.seed(name, 1)
    found = levels(relay("check", "--json", OUTBOX_DATABASE_URL=site.relay_url))
    assert "wrong" not in found.values()
    assert found["durability"] == "weak", "the tests' PostgreSQL has fsync off"
    assert found[f"topic {name}: copies"] == "weak", "one broker"
    assert found[f"topic {name}: rights"] == found["transactional ids"] == found["grants"] == "ok"
    assert found["autovacuum"] == found["sequence cache"] == found["synchronous_commit"] == "ok"
    assert found["progress is kept"] == found["transactions are verified"] == "ok"
    assert relay("check", "--strict").exit_code == 1
    assert "Each committed event once" in relay("check").stdout


def test_what_was_broken_in_the_database_is_found(site: Site, relay: Callable[..., Result]) -> None:
    site.rows("ALTER TABLE outbox.outbox ALTER COLUMN seq SET CACHE 100")
    site.rows("ALTER TABLE outbox.outbox RESET (autovacuum_vacuum_threshold)")
    site.rows("REVOKE DELETE ON outbox.outbox FROM outbox_relay")
    site.rows(f'ALTER ROLE outbox_writer IN DATABASE "{site.url.rsplit("/", 1)[1]}" SET synchronous_commit = off')
    site.seed("no-such-topic", 1)
    result = relay("check", "--json", OUTBOX_DATABASE_URL=site.relay_url)
    found = levels(result, 1)
    assert found["sequence cache"] == found["grants"] == found["topic no-such-topic"] == "wrong"
    assert found["autovacuum"] == found["synchronous_commit"] == "weak"
    assert "outbox_writer" in result.stdout
    assert document(result, 1)["guarantee"].startswith("No guarantee")


def test_a_kafka_and_a_registry_that_are_away_are_findings(site: Site, relay: Callable[..., Result]) -> None:
    away = {
        "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
        "OUTBOX_KAFKA_TIMEOUT": "0.5",
        "OUTBOX_KAFKA_TOPIC_METADATA_PROPAGATION_MAX_MS": "100",
        "OUTBOX_REGISTRY_URL": "http://127.0.0.1:1",
    }
    found = levels(relay("check", "--json", **away), 1)
    assert found["Kafka"] == found["registry"] == "wrong"


# ---- trace -----------------------------------------------------------------------------------------------------------


def test_an_event_is_found_wherever_it_is(site: Site, topic: MakeTopic, relay: Callable[..., Result]) -> None:
    name, process, ids = with_poison(site, topic)
    published = add(site, name, key="sound")
    site.wait_until_published()
    assert process.stop() == 0
    waiting = add(site, name, key="late")
    at = document(relay("trace", str(published), "--json"))
    assert at == {"event": str(published), "found": "kafka", "topic": name, "partition": 0, "offset": at["offset"]}
    assert "@ " in relay("trace", str(published), "--topic", name, "--since", "2024-01-01").stdout
    parked = document(relay("trace", str(ids[0]), "--json"))
    assert (parked["found"], parked["of_its_key"]) == ("parked", 3)
    assert (document(relay("trace", str(waiting), "--json")))["found"] == "outbox"
    nowhere = relay("trace", str(uuid4()), "--topic", name, "--topic", "no-such")
    assert nowhere.exit_code == 1
    assert "no-such: Kafka does not have it" in nowhere.stdout
    site.taken()
    check_exactly_once(site, parked=3)


def test_the_moment_in_an_id_is_believed_with_an_hour_s_margin() -> None:
    now = int(time.time() * 1000)
    assert moment_of(UUID(int=(now << 80) | (7 << 76) | (2 << 62))) == now - 3_600_000
    assert moment_of(uuid4()) == 0
    assert moment_of(UUID(int=((now + 10_000_000) << 80) | (7 << 76) | (2 << 62))) == 0


# ---- config ----------------------------------------------------------------------------------------------------------

SECRET = "hunter2"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://u:{SECRET}@h:5432/d",
        f"postgresql://u:{SECRET}/x@h/d",
        f"postgresql://u:a?{SECRET}@h/d",
        f"postgresql://u:a#{SECRET}@h/d",
        f"postgresql://u:a/{SECRET}@h/d",
        f"postgresql://u@h/d?sslmode=require&password={SECRET}",
        f"postgresql://u@h?password={SECRET}",
        f"postgresql:///d?host=/tmp&sslpassword={SECRET}@x",
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str) -> None:
    shown = masked(RelayConfig(database_url=url, kafka={"bootstrap.servers": "k:1"}))["database_url"]
    assert SECRET not in shown
    assert shown.startswith("postgresql://")


def test_the_settings_in_force_are_shown_without_their_secrets(relay: Callable[..., Result]) -> None:
    shown = document(
        relay(
            "config",
            OUTBOX_DATABASE_URL=f"postgresql://u:{SECRET}@h/d?sslmode=require",
            OUTBOX_BATCH_ROWS="7",
            OUTBOX_KAFKA_SASL_PASSWORD=SECRET,
            OUTBOX_KAFKA_SASL_USERNAME="relay",
            OUTBOX_KAFKA_SSL_KEY_PEM=SECRET,
            OUTBOX_KAFKA_SSL_KEYSTORE_PASSWORD=SECRET,
            OUTBOX_KAFKA_SASL_OAUTHBEARER_CLIENT_SECRET=SECRET,
            OUTBOX_REGISTRY_URL=f"http://u:{SECRET}@r",
            OUTBOX_REGISTRY_BASIC_AUTH_USER_INFO=f"u:{SECRET}",
        )
    )
    assert SECRET not in json.dumps(shown)
    assert shown["database_url"] == "postgresql://u:***@h/d?sslmode=require"
    assert (shown["batch_rows"], shown["kafka"]["sasl.username"], shown["kafka"]["sasl.password"]) == (
        7,
        "relay",
        "***",
    )
    assert shown["kafka"]["transaction.timeout.ms"] == 15_000, "defaults too"
    assert set(shown) == set(RelayConfig.__dataclass_fields__)


def test_settings_that_contradict_each_other_end_config_with_2(relay: Callable[..., Result]) -> None:
    assert relay("config", OUTBOX_KAFKA_ACKS="1").exit_code == 2
    assert load({"OUTBOX_DATABASE_URL": "postgresql://h/d", "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": "k:1"}).http == ""
