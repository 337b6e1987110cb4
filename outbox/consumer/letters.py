"""The dead letter topic: a copy of each dead message, for whoever listens there. The table stays the account.

Key, value and headers are the original's, byte for byte; `dead_…` headers say who gave up, why, and where it stood. At
least once: a crash between Kafka's answer and the mark in the table publishes it again, with the same `ce_id`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from outbox.consumer.policy import connection
from outbox.consumer.store import DeadMessage, decoded

MAX_HEADER = 4_000
"""Bytes of an error or a stack in a header: brokers and readers count headers into the size of the record."""

FLUSH_SECONDS = 30.0


class Letters:
    """Publishes dead messages. Blocks: call it in a thread."""

    def __init__(self, kafka: Mapping[str, Any]) -> None:
        # As the relay and Java's producers choose partitions, so that a key's letters stand together.
        self._configuration = {
            **connection(kafka),
            "enable.idempotence": True,
            "partitioner": "murmur2_random",
            "log_level": 0,
        }
        self._producer: Any = None

    def publish(self, topic: str, messages: Sequence[DeadMessage]) -> None:
        """All of them are in the topic when this returns. Raises KafkaException where one is not."""
        from confluent_kafka import KafkaException, Producer

        if self._producer is None:
            self._producer = Producer(self._configuration)
        failed: list[Any] = []
        for message in messages:
            self._producer.produce(
                topic,
                message.value,
                message.key,
                headers=headers_of(message),
                on_delivery=lambda error, _: failed.append(error) if error else None,
            )
        left = self._producer.flush(FLUSH_SECONDS)
        if failed or left:
            self._producer = None  # with what it still holds: all of it is published again
            raise KafkaException(failed[0]) if failed else TimeoutError(f"{left} dead letters were not delivered")


def headers_of(message: DeadMessage) -> list[tuple[str, bytes | None]]:
    """The original's, then ours."""
    said = {
        "dead_consumer": message.consumer,
        "dead_reason": message.reason,
        "dead_error": message.error,
        "dead_stack": message.stack,
        "dead_attempts": str(message.attempts),
        "dead_topic": message.topic,
        "dead_partition": str(message.partition),
        "dead_offset": str(message.position),
        "dead_sent_at": None if message.sent_at is None else message.sent_at.isoformat(),
        "dead_died_at": message.died_at.isoformat(),
    }
    ours = [(name, text.encode()[-MAX_HEADER:]) for name, text in said.items() if text is not None]
    return [*decoded(message.headers), *ours]
