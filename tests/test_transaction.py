"""The Kafka transaction on a real broker: progress and events together or not at all, zombies fenced, refusals told
apart."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from os import urandom
from typing import Any
from uuid import UUID, uuid4

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from relay.config import RelayConfig
from relay.errors import (
    ConfigError,
    EventRefused,
    KafkaTrouble,
    LaneLost,
    LaneTrouble,
    NotLetIn,
    ProgressError,
    Undelivered,
)
from relay.lane import METADATA_BYTES, Progress, cut
from relay.topics import ensure_control_topic
from relay.transaction import FENCED, REFUSED, Transactions, Watch, check_settings, classify, control_topic, typed
from tests.conftest import MakeTopic
from tests.relay_process import Reader
from tests.servers import Kafka

OUTBOX = UUID(int=7)


def config_of(bootstrap: str, **kafka: Any) -> RelayConfig:
    return RelayConfig(database_url="postgresql://nowhere/x", kafka={"bootstrap.servers": bootstrap, **kafka})


Open = Callable[..., Transactions]


@pytest.fixture
def config(kafka: Kafka) -> RelayConfig:
    return config_of(kafka.bootstrap, **{"topic.metadata.propagation.max.ms": 1_000})


@pytest.fixture
def name(config: RelayConfig) -> str:
    """Of an outbox with two lanes, whose control topic is there."""
    name = f"test-{uuid4().hex[:12]}"
    ensure_control_topic(config, name, 2)
    return name


@pytest.fixture
def take(config: RelayConfig, name: str) -> Iterator[Open]:
    """Opens the two producers of a lane, as step 2 does."""
    opened: list[Transactions] = []

    def take(
        lane: int = 0, given: RelayConfig = config, *, closely: bool = False, packing: int | None = None
    ) -> Transactions:
        transactions = Transactions(given, name, lane, closely=closely, packing=packing)
        opened.append(transactions)
        transactions.fence(0)
        transactions.fence(1)
        return transactions

    yield take
    for transactions in opened:
        transactions.discard()


def publish(transactions: Transactions, batch: int, *values: tuple[str, bytes]) -> Progress:
    """A whole batch. Returned: its progress."""
    progress, metadata = cut(OUTBOX, batch, list(range(1, len(values) + 1)), [str(n) for n in range(len(values))])
    produce(transactions, batch, *values)
    transactions.offsets(batch, metadata)
    transactions.commit(batch)
    return progress


def produce(transactions: Transactions, batch: int, *values: tuple[str, bytes]) -> None:
    hand_over = transactions.begin(batch)
    with typed("produce", EventRefused):
        for topic, value in values:
            hand_over(topic, value, "key", -1, None, None, 1_700_000_000_000, [("ce_id", b"x")])
    transactions.flush(batch)


def visible(kafka: Kafka, topic: str, wanted: int) -> list[bytes | None]:
    """What can be read, once so many can: a commit is answered before its markers are written."""
    with Reader(kafka.bootstrap, [topic]) as reader:
        messages: list[Message] = reader.until(lambda found: len(found) >= wanted) + reader.to_end()
    return [message.value() for message in messages]


def test_a_group_that_kafka_never_heard_of_has_no_progress(take: Open) -> None:
    assert take().progress() is None


def test_progress_is_read_as_it_was_written_and_another_lane_has_none(take: Open, topic: MakeTopic) -> None:
    first = take()
    written = publish(first, 1, (topic(), b"a"))
    assert first.progress() == written
    assert take(lane=1).progress() is None
    assert take().progress() == written


def test_the_largest_progress_that_is_cut_is_taken_by_the_broker(take: Open) -> None:
    """The broker's default limit of an offset's metadata; runs of one seq that do not compress."""
    seqs, seq = [], 0
    state = 1
    for _ in range(8_000):
        state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        seq += 2 + (state >> 44)
        seqs.append(seq)
    progress, metadata = cut(OUTBOX, 1, seqs, [str(n) for n in seqs])
    assert METADATA_BYTES - 300 < len(metadata) <= METADATA_BYTES
    first = take()
    first.begin(1)
    first.offsets(1, metadata)
    first.commit(1)
    assert first.progress() == progress


def test_events_and_progress_are_visible_together(take: Open, topic: MakeTopic, kafka: Kafka) -> None:
    name = topic()
    first = take()
    hand_over = first.begin(2)
    hand_over(name, b"two", None, -1, None, None, 0, [])
    first.flush(2)
    first.offsets(2, Progress(OUTBOX, 2, ((1, 2),)).metadata())
    assert visible(kafka, name, 0) == []
    first.commit(2)
    assert visible(kafka, name, 1) == [b"two"]
    found = first.progress()
    assert found is not None
    assert found.batch == 2


def test_a_fenced_zombie_commits_nothing_and_learns_that_the_lane_is_lost(
    take: Open, topic: MakeTopic, kafka: Kafka
) -> None:
    name = topic()
    zombie = take()
    publish(zombie, 1, (name, b"one"))
    produce(zombie, 2, (name, b"never"))
    zombie.offsets(2, Progress(OUTBOX, 2, ()).metadata())
    successor = take()
    found = successor.progress()
    assert found is not None
    assert found.batch == 1, "what was open is aborted before the progress is read"
    with pytest.raises(LaneLost):
        zombie.commit(2)
    assert visible(kafka, name, 1) == [b"one"]
    publish(successor, 2, (name, b"two"))
    assert visible(kafka, name, 2) == [b"one", b"two"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_zombie_is_fenced_at_whatever_it_does_next(take: Open, topic: MakeTopic, number: int) -> None:
    name = topic()
    zombie = take()
    take()
    with pytest.raises(LaneLost):
        publish(zombie, number, (name, b"never"))


def test_one_id_that_is_fenced_does_not_hinder_the_other(take: Open, topic: MakeTopic, kafka: Kafka) -> None:
    """Why a take must open both: between the two fences the zombie can still commit."""
    name = topic()
    zombie = take()
    half = Transactions(config_of(kafka.bootstrap), zombie._name, 0)
    half.fence(0)
    publish(zombie, 1, (name, b"one"))
    half.fence(1)
    half.discard()
    with pytest.raises(LaneLost):
        publish(zombie, 3, (name, b"three"))
    assert visible(kafka, name, 1) == [b"one"]


def test_a_rewrite_leaves_the_progress_as_it_was_and_uses_both_ids(take: Open, topic: MakeTopic) -> None:
    first = take()
    written = publish(first, 5, (topic(), b"a"))
    for _ in range(3):
        assert first.rewrite(5, written.metadata()) is None
    assert first.progress() == written
    publish(first, 6, (topic(), b"b"))


def test_what_is_discarded_is_aborted_by_the_next_taker(take: Open, topic: MakeTopic, kafka: Kafka) -> None:
    name = topic()
    first = take()
    produce(first, 1, (name, b"never"))
    first.discard()
    second = take()
    assert second.progress() is None
    publish(second, 1, (name, b"one"))
    assert visible(kafka, name, 1) == [b"one"]


@pytest.mark.parametrize("metadata", ["", "hello", "1.!!!", "2.AAAA"])
def test_an_offset_that_no_relay_wrote_is_no_progress(take: Open, kafka: Kafka, name: str, metadata: str) -> None:
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": name, "enable.auto.commit": False})
    offset = TopicPartition(control_topic(name), 0, 3, metadata)
    consumer.commit(offsets=[offset], asynchronous=False)
    consumer.close()
    with pytest.raises(ProgressError, match="batch 3"):
        take().progress()


@pytest.mark.parametrize("value", [2_000_000, 1_048_580])
def test_an_event_too_large_for_the_client_is_told_by_its_place(take: Open, topic: MakeTopic, value: int) -> None:
    name = topic()
    first = take(closely=True, packing=10_000)
    with pytest.raises(EventRefused) as caught:
        publish(first, 1, (name, b"small"), (name, bytes(value)), (name, b"small"))
    assert {place: event.code for place, event in caught.value.events.items()} == {1: "MSG_SIZE_TOO_LARGE"}


def test_an_event_of_the_largest_size_that_services_may_write_is_published(
    take: Open, topic: MakeTopic, kafka: Kafka
) -> None:
    name = topic()
    publish(take(), 1, (name, bytes(1_000_010)))
    assert [len(value or b"") for value in visible(kafka, name, 1)] == [1_000_010]


def test_a_batch_with_an_event_too_large_for_its_topic_is_refused_when_it_is_flushed_closely(
    take: Open, topic: MakeTopic
) -> None:
    name = topic(config={"max.message.bytes": "1000"})
    with pytest.raises(Undelivered, match="MSG_SIZE_TOO_LARGE"):
        publish(take(), 1, (name, urandom(5_000)))
    with pytest.raises(EventRefused, match="MSG_SIZE_TOO_LARGE"):
        publish(take(closely=True), 1, (name, urandom(5_000)))


def test_fewer_records_travel_together_where_all_of_them_were_too_many(
    take: Open, topic: MakeTopic, kafka: Kafka
) -> None:
    name = topic(config={"max.message.bytes": "1000"})
    events = [(name, urandom(100)) for _ in range(20)]
    with pytest.raises(Undelivered, match="MSG_SIZE_TOO_LARGE"):
        publish(take(), 1, *events)
    publish(take(packing=900), 1, *events)
    assert len(visible(kafka, name, 20)) == 20


@pytest.mark.parametrize("unknown", ["nowhere", "no topic", "x" * 300])
def test_events_of_a_topic_that_is_not_there_are_told_by_their_places(
    take: Open, topic: MakeTopic, unknown: str
) -> None:
    name = topic()
    events = ((name, b"a"), (unknown, b"b"), (name, b"c"), (unknown, b"d"))
    with pytest.raises(Undelivered):
        publish(take(), 1, *events)
    with pytest.raises(EventRefused) as caught:
        publish(take(closely=True), 1, *events)
    assert sorted(caught.value.events) == [1, 3]
    assert all("opic" in event.why for event in caught.value.events.values())


def test_a_closely_watched_batch_without_a_fault_is_published_as_any_other(
    take: Open, topic: MakeTopic, kafka: Kafka
) -> None:
    name = topic()
    first = take(closely=True, packing=1)
    publish(first, 1, *((name, b"%d" % n) for n in range(100)))
    publish(first, 2, (name, b"last"))
    assert visible(kafka, name, 101) == [b"%d" % n for n in range(100)] + [b"last"]


def test_a_control_topic_that_is_gone_is_trouble_and_no_event_s_fault(
    take: Open, config: RelayConfig, kafka: Kafka, name: str
) -> None:
    first = take(given=replace(config, kafka_timeout=2.0))
    admin = kafka.admin()
    admin.delete_topics([control_topic(name)])[control_topic(name)].result(30)
    with pytest.raises((KafkaTrouble, Undelivered)):
        first.rewrite(1, Progress(OUTBOX, 1, ()).metadata())


def test_a_kafka_that_is_away_is_trouble() -> None:
    away = RelayConfig(
        database_url="postgresql://nowhere/x",
        kafka={"bootstrap.servers": "127.0.0.1:1", "topic.metadata.propagation.max.ms": 100},
        kafka_timeout=0.5,
    )
    transactions = Transactions(away, "away", 0)
    with pytest.raises(KafkaTrouble):
        transactions.fence(0)
    with pytest.raises(KafkaTrouble):
        transactions.progress()
    transactions.discard()


def test_discarding_twice_or_early_is_no_error(config: RelayConfig) -> None:
    transactions = Transactions(config, "early", 0)
    transactions.discard()


@pytest.mark.parametrize(
    "kafka",
    [
        {"no.such.setting": 1},
        {"linger.ms": "soon"},
        {"security.protocol": "carrier pigeon"},
        {"transaction.timeout.ms": 15_000, "message.timeout.ms": 60_000},
        {"ssl.ca.location": "/no/such/file", "security.protocol": "ssl"},
    ],
)
def test_settings_that_the_client_does_not_take_are_refused_before_anything_is_opened(kafka: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"Kafka setting cannot be used: .{20}"):
        check_settings(config_of("127.0.0.1:1", **kafka))


def test_settings_that_the_client_takes_pass() -> None:
    check_settings(config_of("127.0.0.1:1", **{"linger.ms": "5", "compression.type": "lz4"}))


@pytest.mark.parametrize("code", sorted(FENCED))
@pytest.mark.parametrize("refusal", [EventRefused, Undelivered, KafkaTrouble])
def test_a_fence_means_that_the_lane_is_lost_wherever_it_shows(code: int, refusal: type[LaneTrouble]) -> None:
    assert type(classify("x", KafkaError(code), refusal)) is LaneLost


@pytest.mark.parametrize("code", sorted(REFUSED))
def test_a_refusal_means_what_the_caller_says_and_trouble_by_default(code: int) -> None:
    assert type(classify("x", KafkaError(code), EventRefused)) is EventRefused
    assert type(classify("x", KafkaError(code), Undelivered)) is Undelivered
    assert type(classify("x", KafkaError(code))) is KafkaTrouble


BROKERS_OWN = [
    KafkaError._TRANSPORT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._TIMED_OUT,
    KafkaError._MSG_TIMED_OUT,
    KafkaError._STATE,
    KafkaError._FATAL,
    KafkaError._PURGE_QUEUE,
    KafkaError.NOT_ENOUGH_REPLICAS,
    KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND,
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.BROKER_NOT_AVAILABLE,
    KafkaError.KAFKA_STORAGE_ERROR,
    KafkaError.INVALID_PRODUCER_ID_MAPPING,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
]


@pytest.mark.parametrize("code", BROKERS_OWN)
def test_trouble_of_the_broker_parks_nothing(code: int) -> None:
    for refusal in (EventRefused, Undelivered, KafkaTrouble):
        assert type(classify("x", KafkaError(code), refusal)) is KafkaTrouble


def test_an_error_s_text_says_what_was_tried_and_kafka_s_words() -> None:
    text = str(classify("commit a batch", KafkaError(KafkaError._TIMED_OUT)))
    assert text.startswith("cannot commit a batch: ")
    assert "_TIMED_OUT" in text


def test_a_full_queue_is_trouble() -> None:
    with pytest.raises(KafkaTrouble, match="queue is full"), typed("produce"):
        raise BufferError


@pytest.mark.parametrize(
    ("line", "suspicious"),
    [
        ("FAIL [rdkafka#producer-1] [thrd:TxnCoordinator]: TxnCoordinator: 127.0.0.1:9092: Disconnected", True),
        ("REQTMOUT [rdkafka#producer-1] [thrd:TxnCoordinator]: Timed out EndTxnRequest in flight", True),
        ("FAIL [rdkafka#producer-1] [thrd:x]: Connect to ipv4#127.0.0.1:1 failed: Connection refused", False),
        ("TXNERR [rdkafka#producer-1] [thrd:main]: Current transaction failed", False),
    ],
)
def test_a_connection_that_is_lost_with_requests_under_way_is_suspicious(line: str, suspicious: bool) -> None:
    watch = Watch()
    watch.log(3, line)
    assert (watch.suspicious is not None) == suspicious


@pytest.mark.parametrize(
    ("line", "failure", "refused"),
    [
        (
            (
                "FAIL [rdkafka#producer-1] [thrd:sasl_ssl://k:1/bootstrap]: sasl_ssl://k:1/bootstrap: "
                "SASL authentication error: Authentication failed (after 312ms in state AUTH_REQ, 3 suppressed)"
            ),
            "sasl_ssl://k:1/bootstrap: SASL authentication error: Authentication failed",
            True,
        ),
        (
            (
                "FAIL [rdkafka#producer-1] [thrd:ssl://k:1/1]: ssl://k:1/1: Connect to ipv4#127.0.0.1:1 failed: "
                "Connection refused (after 0ms in state CONNECT)"
            ),
            "ssl://k:1/1: Connect to ipv4#127.0.0.1:1 failed: Connection refused",
            False,
        ),
        ("REQTMOUT [rdkafka#producer-1] [thrd:x]: Timed out EndTxnRequest in flight", None, False),
    ],
)
def test_why_there_is_no_connection_is_heard_and_whether_we_were_not_let_in(
    line: str, failure: str | None, refused: bool
) -> None:
    watch = Watch()
    watch.log(3, line)
    assert (watch.failure, watch.refused) == (failure, refused)
    told = classify("x", KafkaError(KafkaError._TRANSPORT), watch=watch)
    assert type(told) is (NotLetIn if refused else KafkaTrouble)
    assert (failure or "") in str(told)
    assert (failure or "-") not in str(classify("x", KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART), watch=watch))


def test_a_lost_connection_shows_in_the_log_that_is_watched(kafka: Kafka) -> None:
    """What the client says when a connection cannot be had reaches the watch through `logger=` at `poll(0)`."""
    lines: list[str] = []

    class Heard(Watch):
        def log(self, level: int, line: str, *values: object) -> None:
            lines.append(line % values)
            super().log(level, line, *values)

    watch = Heard()
    producer = Producer({"bootstrap.servers": "127.0.0.1:1", "transactional.id": "x"}, logger=watch)
    with pytest.raises(KafkaException):
        producer.init_transactions(1)
    producer.poll(0)
    assert any(line.startswith("FAIL") for line in lines)
    assert watch.suspicious is None, "a connection that never came up carried no request"
