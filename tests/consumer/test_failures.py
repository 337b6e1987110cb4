"""When a handler fails: tried again, parked, held, stopped; and whatever it was, the rest goes on, each event once."""

import json
import math
from collections import Counter
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from confluent_kafka import Consumer as Client
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from outbox import ConsumerStopped, Event
from outbox.__main__ import main
from outbox.consumer import Consumer, Failures, Meta, Retry
from tests.conftest import MakeTopic
from tests.consumer.stage import (
    Effects,
    Sent,
    catalogue,
    fast,
    insert,
    record,
    running,
    send,
    thing,
    until,
)
from tests.servers import Kafka

QUICK = Retry(attempts=2, first=0.01)


class Refused(Exception):  # noqa: N818 - named for what happened
    """What the tests' handlers raise."""


class Site:
    """One topic, one consumer, whose handler fails at the numbers in `bad`."""

    def __init__(self, kafka: Kafka, topic: str, engine: AsyncEngine, effects: Effects, failures: Failures) -> None:
        self.kafka = kafka
        self.topic = topic
        self.effects = effects
        self.bad: set[int] = set()
        self.works_at: float = math.inf
        """The attempt at which they do not fail any more. (Whoever changes `bad` meanwhile may be too early.)"""
        self.attempts: Counter[int] = Counter()
        self.consumer = Consumer(topic, engine, catalogue=catalogue(), kafka=fast(kafka.bootstrap), failures=failures)

    def one_by_one(self) -> "Site":
        @self.consumer.on(Event, topic=self.topic)
        async def note(event: Event, session: AsyncSession, meta: Meta) -> None:
            number = event.data["number"]
            self.attempts[number] += 1
            await insert(session, [event])
            if number in self.bad and self.attempts[number] < self.works_at:
                raise Refused(f"number {number}")

        return self

    def in_batches(self, size: int = 100) -> "Site":
        @self.consumer.on_batch(Event, topic=self.topic, size=size)
        async def note(events: list[Event], session: AsyncSession, metas: list[Meta]) -> None:
            await insert(session, events)
            for event in events:
                if event.data["number"] in self.bad:
                    self.attempts[event.data["number"]] += 1
                    raise Refused(f"number {event.data['number']}")

        return self

    def send(self, *records: Sent) -> None:
        send(self.kafka.bootstrap, self.topic, records)

    def dead(self) -> list[tuple[Any, ...]]:
        return self.effects.rows(
            "SELECT reason, attempts, convert_from(key, 'UTF8'), error FROM outbox.dead_message ORDER BY seq"
        )


@pytest.fixture
def site(kafka: Kafka, topic: MakeTopic, engine: AsyncEngine, effects: Effects) -> Any:
    def make(failures: Failures | None = None, partitions: int = 1) -> Site:
        return Site(kafka, topic(partitions), engine, effects, failures or Failures(retry=QUICK))

    return make


def outbox(url: str, *arguments: str) -> str:
    done = CliRunner().invoke(main, [*arguments[:2], "--url", url, *arguments[2:]])
    assert done.exit_code == 0, done.output
    return done.output


async def test_a_handler_that_fails_is_tried_again_and_nothing_of_the_failed_attempt_stays(site: Any) -> None:
    here: Site = site(Failures(retry=Retry(attempts=3, first=0.01))).one_by_one()
    here.bad, here.works_at = {3}, 3
    here.send(*(record(thing(number)) for number in range(20)))

    async with running(here.consumer):
        await here.effects.until(20)
    assert here.effects.by_key()["k3"] == [3, 13]
    assert here.attempts[3] == 3
    assert here.consumer.metrics.retries[here.topic] == 2
    assert here.dead() == []


async def test_what_fails_for_good_is_parked_and_its_key_held_until_it_is_retried(site: Any, database: str) -> None:
    here: Site = site().one_by_one()
    here.bad = {3}
    here.send(*(record(thing(number)) for number in range(40)))
    async with running(here.consumer):
        await here.effects.until(36)
        await here.effects.until(4, "SELECT count(*) FROM outbox.dead_message")
        assert [(row[0], row[2]) for row in here.dead()] == [("failed", "k3")] + [("held", "k3")] * 3
        assert here.dead()[0][1] == 2
        assert here.dead()[0][3] == "Refused: number 3"
        listed = json.loads(outbox(database, "dead", "list", "--json"))
        assert listed[0]["stack"].endswith("Refused: number 3\n")

        held = CliRunner().invoke(main, ["dead", "retry", "--url", database, listed[1]["event_id"]])
        assert held.exit_code == 1
        assert "is held behind an earlier message" in held.output
        outbox(database, "dead", "retry", listed[0]["event_id"])  # it fails again, and they stay
        await until(lambda: here.dead()[0][:2] == ("failed", 3))
        here.bad = set()
        outbox(database, "dead", "retry", "--all")
        await here.effects.until(40)
        here.send(record(thing(43)))
        await here.effects.until(41)
    assert here.dead() == []
    assert here.effects.by_key()["k3"] == [3, 13, 23, 33, 43]
    assert here.consumer.metrics.dead == {(here.topic, "failed"): 1, (here.topic, "held"): 3}


async def test_a_discarded_message_never_comes_back_and_what_is_held_behind_it_follows(
    site: Any, database: str
) -> None:
    here: Site = site().one_by_one()
    here.bad = {0}
    bad = record(thing(0))
    here.send(bad, record(thing(10)), record(thing(20)))
    async with running(here.consumer):
        await here.effects.until(3, "SELECT count(*) FROM outbox.dead_message")
        outbox(database, "dead", "discard", str(bad.id))
        here.send(bad)
        await here.effects.until(2)
        await until(lambda: here.consumer.metrics.duplicates[here.topic] == 1)
    assert here.effects.by_key() == {"k0": [10, 20]}
    assert here.dead() == []


async def test_without_hold_later_messages_of_the_key_go_on(site: Any) -> None:
    here: Site = site(Failures(retry=QUICK, hold=False)).one_by_one()
    here.bad = {3}
    here.send(*(record(thing(number)) for number in range(20)))
    async with running(here.consumer):
        await here.effects.until(19)
    assert [row[:3] for row in here.dead()] == [("failed", 2, "k3")]
    assert here.effects.by_key()["k3"] == [13]


async def test_of_a_batch_only_the_message_that_fails_is_parked(site: Any) -> None:
    here: Site = site(Failures(retry=QUICK, hold=False)).in_batches()
    here.bad = {17, 18, 80}
    here.send(*(record(thing(number)) for number in range(100)))
    async with running(here.consumer):
        await here.effects.until(97)
        await here.effects.until(3, "SELECT count(*) FROM outbox.dead_message")
    assert [row[3] for row in here.dead()] == [f"Refused: number {n}" for n in (17, 18, 80)]
    numbers = [number for _, number in here.effects.rows()]
    assert numbers == [number for number in range(100) if number not in here.bad]


async def test_in_a_batch_messages_behind_a_dead_one_of_their_key_are_held(site: Any) -> None:
    here: Site = site().in_batches()
    here.bad = {17}
    here.send(*(record(thing(number)) for number in range(100)))
    async with running(here.consumer):
        await here.effects.until(99 - 8)
        await here.effects.until(9, "SELECT count(*) FROM outbox.dead_message")
    assert here.effects.by_key()["k7"] == [7]
    assert [row[0] for row in here.dead()] == ["failed"] + ["held"] * 8


async def test_exceptions_that_cannot_be_cured_are_not_tried_again(site: Any) -> None:
    here: Site = site(Failures(retry=Retry(attempts=100, first=0.01, never=(Refused,)))).one_by_one()
    here.bad = {3}
    here.send(record(thing(3)))
    async with running(here.consumer):
        await until(lambda: len(here.dead()) == 1)
    assert here.attempts[3] == 1


async def test_stop_ends_the_consumer_with_the_error_and_the_message_comes_again(site: Any) -> None:
    here: Site = site(Failures(retry=QUICK, then="stop")).one_by_one()
    here.bad = {3}
    here.send(*(record(thing(number)) for number in range(5)))
    with pytest.raises(ConsumerStopped, match=r"offset 3 .*Refused\('number 3'\)") as stopped:
        await here.consumer.run()
    assert isinstance(stopped.value.__cause__, Refused)
    here.bad = set()
    async with running(here.consumer):
        await here.effects.until(5)
    assert sorted(number for _, number in here.effects.rows()) == list(range(5))


async def test_bytes_that_nothing_reads_are_parked_with_their_reason_and_stop_nothing(site: Any) -> None:
    here: Site = site(Failures(retry=QUICK, then="stop", hold=False)).in_batches()
    good = record(thing(1))
    broken = [
        Sent(good.id, b"a", b"\xc3\x01 no", good.headers),
        Sent(good.id, b"b", good.value, [("ce_type", "test.Thing.SEEN")]),
        Sent(good.id, b"c", good.value, [("ce_id", "not-a-uuid")]),
        Sent(good.id, b"d", b"\x00\x00\x00\x00\x07confluent", [("ce_id", str(thing(0).id))]),
        Sent(good.id, b"\xff\x00 key", b"", [("ce_id", str(thing(0).id)), ("x", b"\xff"), ("x", None)]),
    ]
    here.send(*broken[:2], *broken[2:], record(thing(2)), record(thing(3)))
    async with running(here.consumer):
        await here.effects.until(2)
        await here.effects.until(5, "SELECT count(*) FROM outbox.dead_message")
    reasons = here.effects.rows("SELECT reason, error FROM outbox.dead_message ORDER BY seq")
    assert {reason for reason, _ in reasons} == {"undecodable"}
    said = ["no frame|fewer|at least 10|starts with", "no header ce_id", "no uuid", "no registry=", ""]
    assert all(any(word in error for word in words.split("|")) for (_, error), words in zip(reasons, said, strict=True))
    assert here.effects.rows("SELECT headers FROM outbox.dead_message ORDER BY seq DESC LIMIT 1")[0][0][1:] == [
        ["x", "/w=="],
        ["x", None],
    ]


async def test_an_event_of_a_type_that_is_not_known_yet_is_skipped_counted_and_not_claimed(site: Any) -> None:
    here: Site = site().one_by_one()
    new = record(thing(1))
    here.send(Sent(new.id, new.key, new.value, [("ce_id", str(new.id)), ("ce_type", "test.Thing.MELTED")]))
    here.send(Sent(new.id, new.key, None, new.headers), record(thing(2)))
    async with running(here.consumer):
        await here.effects.until(1)
        skipped = here.consumer.metrics.skipped
        await until(lambda: skipped == {(here.topic, "unknown type"): 1, (here.topic, "tombstone"): 1})
    assert here.effects.rows("SELECT count(*) FROM outbox.inbox") == [(1,)]


async def test_an_unknown_type_can_be_parked_and_retried_by_a_version_that_knows_it(site: Any, database: str) -> None:
    here: Site = site(Failures(retry=QUICK, unknown="park")).one_by_one()
    new = record(thing(1))
    here.send(Sent(new.id, new.key, new.value, [("ce_id", str(new.id)), ("ce_type", "test.Thing.MELTED")]))
    async with running(here.consumer):
        await until(lambda: len(here.dead()) == 1)
    assert here.dead()[0][0] == "unknown"
    # the newer version's catalogue, whose name of the type is the one in the header
    here.effects.rows("UPDATE outbox.dead_message SET headers = '[]' RETURNING 1")
    async with running(here.consumer):
        outbox(database, "dead", "retry", "--all")
        await here.effects.until(1)
        await until(lambda: here.dead() == [])


async def test_dead_letters_carry_the_original_bytes_and_say_why(site: Any, topic: MakeTopic) -> None:
    letters = topic(1)
    here: Site = site(Failures(retry=QUICK, topic=letters)).one_by_one()
    here.bad = {3}
    bad = record(thing(3))
    here.send(Sent(bad.id, bad.key, bad.value, [*bad.headers, ("own", b"\xff\x00")]), record(thing(13)))
    async with running(here.consumer):
        await here.effects.until(1, "SELECT count(published_at) FROM outbox.dead_message")
    client = Client({"bootstrap.servers": here.kafka.bootstrap, "group.id": letters, "auto.offset.reset": "earliest"})
    client.subscribe([letters])
    [letter] = client.consume(1, 20)
    assert client.consume(1, 0.2) == [], "what is only held is no letter"
    client.close()
    assert (letter.key(), letter.value()) == (bad.key, bad.value)
    headers = dict(letter.headers() or [])
    assert headers["ce_id"] == str(bad.id).encode()
    assert headers["own"] == b"\xff\x00"
    assert headers["dead_consumer"] == here.topic.encode()
    assert headers["dead_error"] == b"Refused: number 3"
    assert (headers["dead_topic"], headers["dead_partition"], headers["dead_offset"]) == (
        here.topic.encode(),
        b"0",
        b"0",
    )
    assert b"raise Refused" in (headers["dead_stack"] or b"")


async def test_keys_are_held_over_a_restart(site: Any) -> None:
    here: Site = site().one_by_one()
    here.bad = {3}
    here.send(record(thing(3)))
    async with running(here.consumer):
        await until(lambda: len(here.dead()) == 1)
    here.send(record(thing(13)), record(thing(4)))
    async with running(here.consumer):
        await here.effects.until(1)
        await until(lambda: len(here.dead()) == 2)
    assert here.effects.by_key() == {"k4": [4]}


async def test_trouble_of_the_database_parks_nothing(site: Any, engine: AsyncEngine, postgres: Any) -> None:
    """Connections are cut while handlers are at work; more often than a handler would be tried."""
    here: Site = site(Failures(retry=Retry(attempts=1)))
    cuts = 0

    @here.consumer.on(Event, topic=here.topic)
    async def note(event: Event, session: AsyncSession, meta: Meta) -> None:
        nonlocal cuts
        await insert(session, [event])
        if event.data["number"] == 7 and cuts < 3:
            cuts += 1
            await session.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))

    here.send(*(record(thing(number)) for number in range(20)))
    async with running(here.consumer):
        await here.effects.until(20)
    assert cuts == 3
    assert here.dead() == []
    assert here.effects.by_key() == {f"k{n}": [n, n + 10] for n in range(10)}
    assert here.consumer.metrics.trouble["database"] >= 3


async def test_a_statement_that_is_wrong_for_every_message_ends_the_consumer_and_parks_nothing(site: Any) -> None:
    here: Site = site(Failures(retry=QUICK))

    @here.consumer.on(Event, topic=here.topic)
    async def note(event: Event, session: AsyncSession, meta: Meta) -> None:
        await session.execute(sa.text("INSERT INTO no_such_table VALUES (1)"))

    here.send(record(thing(1)))
    with pytest.raises(sa.exc.ProgrammingError, match="no_such_table"):
        await here.consumer.run()
    assert here.dead() == []
