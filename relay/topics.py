"""Topics: the control topic, made when it is not there and checked when it is; and the topics of events, read back."""

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # not re-exported
    AdminClient,
    ConfigResource,
    NewPartitions,
    NewTopic,
)

from relay.config import RelayConfig
from relay.errors import ConfigError, KafkaTrouble
from relay.transaction import control_topic, reached


def ensure_control_topic(config: RelayConfig, name: str, lanes: int) -> None:
    """See to it that the control topic has a partition for each lane. Blocks.

    Raises:
        ConfigError: Kafka forbids it, by name or by grant; the text says what to create by hand.
        KafkaTrouble: Kafka cannot be reached, or does not let us in; says why.
    """
    topic = control_topic(name)
    reached(config, topic)
    admin = AdminClient({**config.client(), "log_level": 0})
    try:
        if not _made_or_grown(admin, topic, lanes, config.kafka_timeout):
            _made_or_grown(admin, topic, lanes, config.kafka_timeout)
    except KafkaException as error:
        kafka: KafkaError = error.args[0]
        if kafka.code() in _FORBIDDEN:
            raise ConfigError(
                f"Kafka does not let the relay make its control topic {topic} ({kafka.str()}): create it with {lanes} "
                "partition(s), and allow this user to describe it and to use "
                f"the group {name} and transactional ids {name}.*"
            ) from error
        raise KafkaTrouble(f"cannot see to the control topic {topic}: {kafka.str()}") from error


def _made_or_grown(admin: AdminClient, topic: str, lanes: int, timeout: float) -> bool:
    """False: it came into being meanwhile, with who knows how many partitions.

    Another relay made it, or a broker that makes the topics it is asked about.
    """
    found = admin.list_topics(topic, timeout=timeout).topics[topic]
    if found.error is None:
        if len(found.partitions) < lanes:
            _wait(admin.create_partitions([NewPartitions(topic, lanes)], operation_timeout=10.0))
        return True
    try:
        _wait(admin.create_topics([NewTopic(topic, lanes)], operation_timeout=10.0))
    except KafkaException as error:
        if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise
        return False
    return True


_FORBIDDEN = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.TOPIC_EXCEPTION,
        KafkaError.POLICY_VIOLATION,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError._AUTHENTICATION,
    }
)


def _wait(futures: dict[str, Any]) -> None:
    for future in futures.values():
        future.result(15)


# ---- what Kafka has --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class ReadBack:
    """What a reading of topics has found."""

    places: dict[str, Place]
    """Of the events asked for, by id, those that are there: the first place of each."""
    missing: tuple[str, ...]
    """Topics that Kafka does not have, or does not show to this user."""
    gaps: dict[str, str]
    """Topic → why an event may have been in it and be gone."""


def read_back(config: RelayConfig, name: str, since: Mapping[str, int], wanted: Collection[str]) -> ReadBack:
    """Look for the events `wanted` (ids) in the topics `since`, in all that is committed at this moment. Blocks.

    `since`: topic → ms since 1970; records that were written before are not read. Whoever may have published the events
    must be fenced before the call. Keeps nothing but the places of events that were asked for.

    Raises:
        ConfigError: this user may not read a topic.
        KafkaTrouble: Kafka is away, or the end was not reached: a transaction of somebody else stays open.
    """
    own = {**config.client(), "group.id": name, "enable.auto.commit": False, "log_level": 0}
    # The end, and the search by time, must see what stands behind another producer's open transaction.
    looking = Consumer({**own, "isolation.level": "read_uncommitted"})
    reading = Consumer(
        {**own, "isolation.level": "read_committed", "enable.partition.eof": True, "auto.offset.reset": "error"}
    )
    try:
        with _reading_back():
            known = looking.list_topics(timeout=config.kafka_timeout).topics
            topics = [topic for topic in since if topic in known and known[topic].error is None]
            asked = [TopicPartition(topic, part, since[topic]) for topic in topics for part in known[topic].partitions]
            spans = _spans(looking, asked, config.kafka_timeout)
            places = _search(reading, spans, wanted, 2 * config.kafka_timeout)
            gaps = _gaps(spans, _policies(config, topics))
            return ReadBack(places, tuple(topic for topic in since if topic not in topics), gaps)
    finally:
        looking.close()
        reading.close()


@dataclass(frozen=True, slots=True)
class _Span:
    """What is to be read of one partition: from `start` (None: nothing) up to `end`; its log begins at `low`."""

    topic: str
    partition: int
    low: int
    start: int | None
    end: int


def _spans(looking: Consumer, asked: list[TopicPartition], timeout: float) -> list[_Span]:
    spans = []
    for one in looking.offsets_for_times(asked, timeout) if asked else []:
        if one.error is not None:
            raise KafkaException(one.error)
        low, end = looking.get_watermark_offsets(one, timeout)
        spans.append(_Span(one.topic, one.partition, low, one.offset if 0 <= one.offset < end else None, end))
    return spans


def _search(reading: Consumer, spans: list[_Span], wanted: Collection[str], patience: float) -> dict[str, Place]:
    """Read every span to its end. `patience`: seconds without any news."""
    ends = {(span.topic, span.partition): span.end for span in spans if span.start is not None}
    reading.assign([TopicPartition(s.topic, s.partition, s.start) for s in spans if s.start is not None])
    places: dict[str, Place] = {}
    deadline = time.monotonic() + patience
    while ends:
        for message in reading.consume(5_000, 0.5):
            position = _position(message)
            if position is None:
                continue
            deadline = time.monotonic() + patience
            topic, partition, offset = position
            if message.error() is None and (id_ := _id_of(message)) in wanted:
                places.setdefault(id_, Place(topic, partition, offset - 1))
            if offset >= ends.get((topic, partition), offset + 1):
                del ends[topic, partition]
                reading.pause([TopicPartition(topic, partition)])
        if time.monotonic() > deadline:
            raise KafkaTrouble(
                f"{ends} (topic, partition: end) was not reached within {patience:g} s: if Kafka is well, another "
                "producer has left a transaction open (kafka-transactions.sh find-hanging)"
            )
    return places


def _position(message: Message) -> tuple[str, int, int] | None:
    """Up to where the partition has been read with this message; None for an error that passes."""
    error = message.error()
    if error is not None and error.code() != KafkaError._PARTITION_EOF:
        if error.retriable() or error.code() in (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN):
            return None
        raise KafkaException(error)
    return message.topic() or "", message.partition() or 0, (message.offset() or 0) + (error is None)


def _id_of(message: Message) -> str:
    headers: Any = message.headers() or ()
    return next((str(value, "utf-8", "replace") for name, value in headers if name == "ce_id" and value), "")


def _gaps(spans: list[_Span], policies: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    gaps = {}
    for span in spans:
        settings = policies.get(span.topic, {})
        if "compact" in settings.get("cleanup.policy", ""):
            gaps[span.topic] = "it is compacted: the earlier events of a key may be gone"
        elif span.low > 0 and (span.start == span.low or span.low == span.end):
            gaps[span.topic] = (
                f"partition {span.partition} begins at offset {span.low}, which is younger than the oldest event that "
                f"waits (retention.ms is {settings.get('retention.ms', 'not known')}): older records were deleted"
            )
    return gaps


def _policies(config: RelayConfig, topics: list[str]) -> dict[str, dict[str, str]]:
    """How the topics forget. Empty where this user may not ask."""
    if not topics:
        return {}
    admin = AdminClient({**config.client(), "log_level": 0})
    resources = [ConfigResource(ConfigResource.Type.TOPIC, topic) for topic in topics]
    found = {}
    for resource, future in admin.describe_configs(resources, request_timeout=10.0).items():
        try:
            found[resource.name] = {name: entry.value or "" for name, entry in future.result(15).items()}
        except KafkaException as error:
            if error.args[0].code() not in _FORBIDDEN:
                raise
    return found


@contextmanager
def _reading_back() -> Iterator[None]:
    try:
        yield
    except KafkaException as error:
        kafka: KafkaError = error.args[0]
        if kafka.code() in _FORBIDDEN:
            raise ConfigError(
                f"Kafka does not let this user read the topics back ({kafka.str()}): allow it to read and to describe "
                "them, or use another user's settings"
            ) from error
        raise KafkaTrouble(f"cannot read the topics back: {kafka.str()}") from error
