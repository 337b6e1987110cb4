"""The control topic of an outbox: made when it is not there, checked when it is."""

from typing import Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic  # type: ignore[attr-defined]  # not re-exported

from relay.config import RelayConfig
from relay.errors import ConfigError, KafkaTrouble
from relay.transaction import control_topic


def ensure_control_topic(config: RelayConfig, name: str, lanes: int) -> None:
    """See to it that the control topic has a partition for each lane. Blocks.

    Raises:
        ConfigError: Kafka forbids it, by name or by grant; the text says what to create by hand.
        KafkaTrouble: Kafka cannot be reached.
    """
    topic = control_topic(name)
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
