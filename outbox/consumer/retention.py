"""How long claims are kept, against how long Kafka can deliver their events again."""

from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import Any

from outbox.consumer.policy import connection
from outbox.errors import UsageError

SECONDS = 30.0


def check_retention(kafka: Mapping[str, Any], topics: Collection[str], claims: timedelta) -> None:
    """Nothing, if claims that are kept for `claims` outlive the messages of these topics. Blocks.

    Raises UsageError where a topic keeps messages as long or longer: one that is delivered again after its claim was
    forgotten takes effect twice. KafkaException where Kafka does not answer.
    """
    from confluent_kafka.admin import AdminClient, ConfigResource  # type: ignore[attr-defined] # not re-exported

    client = AdminClient({**connection(kafka), "log_level": 0})
    asked = [ConfigResource(ConfigResource.Type.TOPIC, topic) for topic in sorted(topics)]
    for resource, answer in client.describe_configs(asked, request_timeout=SECONDS).items():
        refuse_short(resource.name, {name: entry.value for name, entry in answer.result(SECONDS).items()}, claims)


def refuse_short(topic: str, settings: Mapping[str, str | None], claims: timedelta) -> None:
    """The check of one topic, by its `retention.ms` and `cleanup.policy`."""
    kept = int(settings.get("retention.ms") or -1)
    if "delete" not in (settings.get("cleanup.policy") or "") or kept < 0:
        raise UsageError(
            f"{topic} keeps its messages for ever (retention.ms {kept}, cleanup.policy"
            f" {settings.get('cleanup.policy')}), so claims of it cannot be forgotten: leave retention= out"
        )
    if claims <= timedelta(milliseconds=kept):
        raise UsageError(
            f"{topic} keeps its messages for {timedelta(milliseconds=kept)}, claims would be kept for {claims} only: a"
            " message that is delivered again after its claim was forgotten takes effect twice; keep claims longer"
        )
