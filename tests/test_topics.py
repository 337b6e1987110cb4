"""The control topic: made, checked, grown, whoever else does the same at the same time."""

import time
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest

from relay.config import RelayConfig
from relay.errors import ConfigError, KafkaTrouble
from relay.topics import ensure_control_topic
from tests.relay_process import PATIENCE
from tests.servers import Kafka


@pytest.fixture
def config(kafka: Kafka) -> RelayConfig:
    return RelayConfig(database_url="postgresql://nowhere/x", kafka={"bootstrap.servers": kafka.bootstrap})


@pytest.fixture
def name() -> str:
    return f"test-{uuid4().hex[:12]}"


def partitions(kafka: Kafka, name: str, expected: int) -> int:
    """What the broker says, as soon as it has heard of the `expected` ones from the controller."""
    admin, topic, deadline = kafka.admin(), f"{name}.lanes", time.monotonic() + PATIENCE
    while (count := len(admin.list_topics(topic, timeout=30).topics[topic].partitions)) != expected:
        if time.monotonic() > deadline:
            break
    return count


def test_it_is_made_with_a_partition_for_each_lane_and_then_left_alone(
    config: RelayConfig, kafka: Kafka, name: str
) -> None:
    for _ in range(2):
        ensure_control_topic(config, name, 3)
        assert partitions(kafka, name, 3) == 3


def test_it_grows_with_the_lanes_and_never_shrinks(config: RelayConfig, kafka: Kafka, name: str) -> None:
    for lanes, expected in ((1, 1), (4, 4), (2, 4)):
        ensure_control_topic(config, name, lanes)
        assert partitions(kafka, name, expected) == expected


def test_several_relays_may_start_at_once(config: RelayConfig, kafka: Kafka, name: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        for call in [pool.submit(ensure_control_topic, config, name, 4) for _ in range(4)]:
            call.result(60)
    assert partitions(kafka, name, 4) == 4


def test_a_name_that_kafka_does_not_take_is_the_operator_s_mistake(config: RelayConfig) -> None:
    with pytest.raises(ConfigError, match=r"no topic\.lanes.*create it with 2 partition"):
        ensure_control_topic(config, "no topic", 2)


def test_a_kafka_that_is_away_is_trouble() -> None:
    away = RelayConfig(
        database_url="postgresql://nowhere/x",
        kafka={"bootstrap.servers": "127.0.0.1:1", "topic.metadata.propagation.max.ms": 100},
        kafka_timeout=0.5,
    )
    with pytest.raises(KafkaTrouble, match="Connection refused"):
        ensure_control_topic(away, "away", 1)
