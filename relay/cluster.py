"""What a Kafka cluster says of itself to the relay's user: `relay check`. Changes nothing; blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer, TopicCollection
from confluent_kafka.admin import AdminClient, ConfigResource  # type: ignore[attr-defined]  # not re-exported

from relay.config import RelayConfig
from relay.transaction import control_topic, reached

INTERNAL = ("__transaction_state", "__consumer_offsets")
"""Where the guarantee lives: what became of each transaction, and the lanes' progress."""


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as this user sees it."""

    partitions: int
    replicas: int
    """Of the partition that has the fewest."""
    settings: Mapping[str, str]
    """Empty where this user may not ask."""
    allowed: frozenset[str] | None
    """Operations that this user may do, such as WRITE; None: not known."""


HIDDEN = Topic(0, 0, {}, frozenset())
"""One that this user may not see: it may be there or not."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster as this user sees it."""

    brokers: int
    topics: Mapping[str, Topic]
    """Those asked for that are there, and those that this user may not see, as HIDDEN."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Of one broker; empty where this user may not ask."""
    group: frozenset[str] | None = None
    """What this user may do with the outbox's group; None: not known, as before a relay has used it."""
    transactional: str | None = None
    """Why this user cannot open a producer of the outbox; None: it can."""


def look(config: RelayConfig, name: str, topics: Sequence[str]) -> Cluster:
    """Ask. The one thing that is tried is to open a producer, under an id of its own (`<name>.check`).

    Raises KafkaTrouble: Kafka cannot be reached, or does not let us in; says why.
    """
    brokers = reached(config).brokers
    admin = AdminClient({**config.client(), "log_level": 0})
    asked = list(dict.fromkeys([*topics, control_topic(name), *INTERNAL]))
    return Cluster(
        brokers=len(brokers),
        topics=_topics(admin, asked),
        settings=_settings(admin, [(ConfigResource.Type.BROKER, str(next(iter(brokers))))]).popitem()[1],
        group=_group(admin, name),
        transactional=_transactional(config, name),
    )


def _topics(admin: AdminClient, asked: list[str]) -> dict[str, Topic]:
    answers = admin.describe_topics(TopicCollection(asked), include_authorized_operations=True, request_timeout=10.0)
    found, hidden = {}, {}
    for name, future in answers.items():
        try:
            found[name] = future.result(15)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
                hidden[name] = HIDDEN
    settings = _settings(admin, [(ConfigResource.Type.TOPIC, name) for name in found])
    seen = {
        name: Topic(
            len(one.partitions),
            min((len(partition.replicas) for partition in one.partitions), default=0),
            settings[name],
            _operations(one),
        )
        for name, one in found.items()
    }
    return {**seen, **hidden}


def _group(admin: AdminClient, name: str) -> frozenset[str] | None:
    answers = admin.describe_consumer_groups([name], include_authorized_operations=True, request_timeout=10.0)
    try:
        return _operations(answers[name].result(15))
    except KafkaException as error:
        return frozenset() if error.args[0].code() == KafkaError.GROUP_AUTHORIZATION_FAILED else None


def _settings(admin: AdminClient, asked: list[tuple[Any, str]]) -> dict[str, dict[str, str]]:
    if not asked:
        return {}
    answers = admin.describe_configs([ConfigResource(kind, name) for kind, name in asked], request_timeout=10.0)
    return {
        resource.name: {name: entry.value or "" for name, entry in (_answer(future) or {}).items()}
        for resource, future in answers.items()
    }


def _transactional(config: RelayConfig, name: str) -> str | None:
    settings = {setting: value for setting, value in config.producer().items() if setting != "debug"}
    producer = Producer({**settings, "transactional.id": f"{name}.check"}, logger=_Silence())
    try:
        producer.init_transactions(config.kafka_timeout)
    except KafkaException as error:
        kafka: KafkaError = error.args[0]
        return f"{kafka.str()} ({kafka.name()})"
    return None


class _Silence:
    """In place of a logging.Logger: what matters is raised as well."""

    def log(self, *_: object) -> None:
        """Say nothing."""


def _answer(future: Any) -> Any:
    """None where Kafka refuses the question, or has no such thing."""
    try:
        return future.result(15)
    except KafkaException:
        return None


def _operations(described: Any) -> frozenset[str] | None:
    """None where Kafka says nothing, as of a group that is not there yet."""
    return frozenset(operation.name for operation in described.authorized_operations or ()) or None
