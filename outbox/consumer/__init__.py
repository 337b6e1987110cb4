"""The consumer's runtime: handlers over the inbox, exactly once. Needs the extra `consumer` (confluent-kafka)."""

from outbox.consumer.meta import Meta
from outbox.consumer.policy import Failures, Limits, Retry
from outbox.consumer.runtime import Consumer

__all__ = ["Consumer", "Failures", "Limits", "Meta", "Retry"]
