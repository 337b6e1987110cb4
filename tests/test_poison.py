"""Poison end to end: what Kafka will not take is parked, and nothing else waits for it."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # not re-exported
    AclBinding,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
)

from relay import destinations
from relay.config import RelayConfig
from relay.destinations import Destinations, look
from relay.errors import KafkaTrouble, Refusal
from tests.conftest import MakeDatabase, MakeTopic, started
from tests.relay_process import PATIENCE, Reader, Site, check_exactly_once, patched
from tests.servers import Kafka
from tests.test_relay import QUICK, add

AUTHORIZING = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "allow.everyone.if.no.acl.found": "true",
}
"""Settings of a broker that heeds ACLs; where a topic has none, everybody may do everything."""

FORGETFUL = "import relay.destinations; relay.destinations.REFUSAL_SECONDS = 1.0"
"""Patch of a relay that asks about a refused topic again each second, not each five."""


@pytest.fixture
def site(make_database: MakeDatabase, kafka: Kafka) -> Iterator[Site]:
    with Site(make_database(), kafka.bootstrap) as site:
        yield site


@pytest.fixture(scope="module")
def strict() -> Iterator[Kafka]:
    """A broker that heeds ACLs."""
    with closing(started(lambda: Kafka(settings=AUTHORIZING))) as server:
        yield server


def allow(kafka: Kafka, topic: str, operation: AclOperation) -> None:
    """From now on the user (nobody has a name here) may do this with the topic, and nothing else."""
    binding = AclBinding(
        ResourceType.TOPIC,
        topic,
        ResourcePatternType.LITERAL,
        "User:ANONYMOUS",
        "*",
        operation,
        AclPermissionType.ALLOW,
    )
    admin = kafka.admin()
    for future in admin.create_acls([binding]).values():
        future.result(30)


def dead(site: Site) -> list[tuple[Any, ...]]:
    return site.rows("SELECT id::text, topic, key, error FROM outbox.dead_event ORDER BY seq")


class Writer(threading.Thread):
    """Writes an event to each topic every few milliseconds, each under a key of its own, until it is told to stop."""

    def __init__(self, site: Site, *topics: str) -> None:
        super().__init__(daemon=True)
        self.count = 0
        self._site, self._topics = site, topics
        self._stopping = threading.Event()
        self.start()

    def run(self) -> None:
        with self._site.connect() as connection:
            while not self._stopping.wait(0.005):
                for topic in self._topics:
                    connection.execute(
                        "INSERT INTO outbox.outbox (type, topic, key, value) VALUES ('t', %s, %s, 'x')",
                        [topic, f"key-{self.count}"],
                    )
                self.count += 1

    def stop(self) -> None:
        self._stopping.set()
        self.join()


# ---- nobody starves --------------------------------------------------------------------------------------------------


@pytest.mark.crash  # measures time: not beside the fast ones
def test_events_flow_while_others_are_written_to_topics_that_are_missing_and_forbidden(
    make_database: MakeDatabase, strict: Kafka, tmp_path: Path
) -> None:
    """Each was 10 s behind, and more, when the relay had to produce such an event to find out. Now about 30 ms; 1 s at
    most when a missing topic is met first, which a busy machine may double."""
    good, forbidden, missing = (f"{name}-{uuid4().hex[:8]}" for name in ("good", "forbidden", "missing"))
    strict.create_topic(good)
    strict.create_topic(forbidden)
    allow(strict, forbidden, AclOperation.READ)
    with Site(make_database(), strict.bootstrap, **patched(tmp_path, FORGETFUL)) as site:
        relay = site.taken()
        writer = Writer(site, good, missing, forbidden)
        try:
            with Reader(site.bootstrap, [good]) as reader:
                delays: list[float] = []
                end = time.monotonic() + 5
                while time.monotonic() < end or not delays:
                    arrived = reader.more(0.05)
                    delays += [time.time() - message.timestamp()[1] / 1000 for message in arrived]
        finally:
            writer.stop()
        assert max(delays) < 3, f"{max(delays):.1f} s; {relay.text[-4000:]}"
        assert sorted(delays)[len(delays) // 2] < 0.5
        assert len(check_exactly_once(site, parked=2 * writer.count)) == writer.count
        errors = {(topic, error) for _, topic, _, error in dead(site)}
        assert {topic for topic, _ in errors} == {missing, forbidden}
        assert all(("AUTHORIZATION" in error) == (topic == forbidden) for topic, error in errors), errors
        assert not relay.said("batch refused"), "nothing had to be tried"
        assert len(relay.said("lane taken")) == 1


@pytest.mark.crash
def test_a_topic_that_is_deleted_under_our_feet_loses_nothing_and_goes_on_when_it_is_there_again(
    site: Site, kafka: Kafka, topic: MakeTopic
) -> None:
    gone, other = topic(), topic()
    relay = site.taken(**QUICK)
    add(site, gone, key="before")
    site.wait_until_published()
    admin = kafka.admin()
    admin.delete_topics([gone])[gone].result(30)
    site.rows("DELETE FROM ledger")  # what was in the topic is gone with it
    ids = [str(add(site, gone, key=key)) for key in "abcab"]
    add(site, other)
    relay.wait_for("events parked", timeout=30)
    add(site, other)
    assert len(check_exactly_once(site, parked=5)) == 2
    assert [id_ for id_, *_ in dead(site)] == ids
    assert not relay.said("lane in trouble"), relay.text


# ---- what is refused when it is produced -----------------------------------------------------------------------------


def test_too_large_events_among_many_are_found_without_many_tries(site: Site, topic: MakeTopic) -> None:
    """Two for the first one: all at once, and large ones alone. None for those as large that come within some
    seconds, where the client does not compress."""
    name = topic(config={"max.message.bytes": "900000"})
    site.seed(name, 2_000)
    for number in range(3):
        add(site, name, key=f"poison-{number}", value=os.urandom(950_000))
        site.seed(name, 300)
    relay = site.taken(OUTBOX_KAFKA_COMPRESSION_TYPE="none")
    assert len(check_exactly_once(site, parked=3)) == 2_900
    assert len(relay.said("batch refused")) == 2, relay.text


def test_with_skip_only_the_refused_event_is_parked(site: Site, topic: MakeTopic) -> None:
    name = topic(config={"max.message.bytes": "20000"})
    add(site, name, key="k", value=os.urandom(50_000))
    add(site, name, key="k", value=b"follows")
    relay = site.taken(OUTBOX_PARKING="skip")
    relay.wait_for("events parked")
    assert relay.stop() == 0
    site.taken(OUTBOX_PARKING="skip")
    add(site, name, key="k", value=b"after a restart")
    messages = check_exactly_once(site, parked=1)
    assert [message.value() for message in messages] == [b"follows", b"after a restart"]


# ---- what a relay knows of topics ------------------------------------------------------------------------------------


@pytest.fixture
def config(kafka: Kafka) -> RelayConfig:
    return RelayConfig(database_url="postgresql://nowhere/x", kafka={"bootstrap.servers": kafka.bootstrap})


def row(topic: str, seq: int = 1, value: bytes | None = b"x", fingerprint: int | None = None) -> tuple[Any, ...]:
    return (seq, f"id-{seq}", "type", topic, "key", value, fingerprint, None, 0)


@pytest.mark.parametrize("name", ["", ".", "..", "no topic", "x" * 250, "größe"])
def test_what_can_be_no_topic_s_name_is_refused_and_not_asked_about(name: str) -> None:
    nowhere = RelayConfig(database_url="postgresql://nowhere/x", kafka={"bootstrap.servers": "127.0.0.1:1"})
    assert look(nowhere, [name]) == {name: "Kafka allows no topic of this name"}


def test_a_topic_is_asked_about_once(config: RelayConfig, topic: MakeTopic) -> None:
    name, known = topic(), Destinations(config)
    assert known.part([row(name)]) == ({name}, {})
    assert not known.learn({name})
    assert known.part([row(name)]) == (set(), {})


def test_a_topic_that_is_being_made_is_waited_for(config: RelayConfig, kafka: Kafka) -> None:
    name = f"soon-{uuid4().hex[:8]}"
    later = threading.Timer(0.2, kafka.create_topic, [name])
    later.start()
    assert not Destinations(config).learn({name})
    later.join()


def test_names_that_are_all_wrong_are_waited_for_now_and_then_only(config: RelayConfig) -> None:
    known = Destinations(config)
    waits = []
    for _ in range(3):
        name, began = f"missing-{uuid4().hex[:8]}", time.monotonic()
        assert known.learn({name})
        waits.append(time.monotonic() - began)
        assert list(known.part([row(name, 7)])[1]) == [7]
    assert waits[0] > destinations.PATIENCE
    assert min(waits[1:]) < destinations.PATIENCE


def test_a_refusal_is_believed_for_a_while(config: RelayConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    name, known = f"missing-{uuid4().hex[:8]}", Destinations(config)
    known.learn({name})
    assert known.part([row(name)])[0] == set()
    monkeypatch.setattr(destinations, "REFUSAL_SECONDS", 0.0)
    assert known.part([row(name)]) == ({name}, {})


def test_a_kafka_that_is_away_refuses_nothing() -> None:
    nowhere = RelayConfig(
        database_url="postgresql://nowhere/x",
        kafka={"bootstrap.servers": "127.0.0.1:1", "topic.metadata.propagation.max.ms": 500},
        kafka_timeout=1,
    )
    known = Destinations(nowhere)
    with pytest.raises(KafkaTrouble):
        known.learn({"orders"})
    assert known.part([row("orders")]) == ({"orders"}, {})


TOO_LARGE = Refusal("too large (MSG_SIZE_TOO_LARGE)", "MSG_SIZE_TOO_LARGE")


@pytest.mark.parametrize(
    ("compression", "parked"),
    [
        ({}, []),
        ({"compression.type": "none"}, [2, 3]),
        ({"compression.codec": "none"}, [2, 3]),
        ({"compression.type": "zstd"}, []),
    ],
)
def test_an_event_as_large_as_one_that_was_too_large_is_not_tried(
    config: RelayConfig, topic: MakeTopic, compression: dict[str, str], parked: list[int]
) -> None:
    """But where the client compresses, as it does by default: how small it becomes is known to it only."""
    name, other = topic(), topic()
    known = Destinations(RelayConfig(database_url=config.database_url, kafka={**config.kafka, **compression}))
    known.learn({name, other})
    known.note(row(name, value=bytes(1_000)), TOO_LARGE)
    rows = [
        row(name, 1, bytes(999)),
        row(name, 2, bytes(1_000)),
        row(name, 3, bytes(2_000)),
        row(other, 4, bytes(3_000)),
    ]
    assert known.part(rows) == (set(), dict.fromkeys(parked, TOO_LARGE.why))


def test_what_the_producer_is_told_of_a_topic_is_believed_too(config: RelayConfig, topic: MakeTopic) -> None:
    name, known = topic(), Destinations(config)
    known.learn({name})
    known.note(row(name), Refusal("forbidden", "TOPIC_AUTHORIZATION_FAILED"))
    assert known.part([row(name, 5)]) == (set(), {5: "forbidden"})
    known.note(row(name), Refusal("odd headers"))
    known.learn({name})
    assert known.part([row(name, 5)]) == (set(), {})


def test_who_may_not_write_to_a_topic_is_told_so(strict: Kafka) -> None:
    config = RelayConfig(database_url="postgresql://nowhere/x", kafka={"bootstrap.servers": strict.bootstrap})
    names: dict[AclOperation | None, str] = {}
    operations: list[AclOperation | None] = [None, AclOperation.WRITE, AclOperation.DESCRIBE, AclOperation.READ]
    for operation in operations:
        names[operation] = strict.create_topic(f"acl-{uuid4().hex[:8]}")
        if operation is not None:
            allow(strict, names[operation], operation)
    until(lambda: sum(why is not None for why in look(config, names.values()).values()) == 2)
    found = look(config, names.values())
    assert [found[names[operation]] is None for operation in operations] == [True, True, False, False]


def until(so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not so():
        assert time.monotonic() < deadline
        time.sleep(0.05)
