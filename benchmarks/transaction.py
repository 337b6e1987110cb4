"""`transaction`: what one bare Kafka transaction of the relay costs, step by step: Kafka's part of the latency.

One event and progress, 100 times a second, by the relay's own `Transactions`; no database, no outbox, no reader.
"""

import time
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from benchmarks.figures import summary
from benchmarks.stage import Stage, say
from relay.config import RelayConfig
from relay.lane import Progress
from relay.transaction import Transactions, control_topic

STEPS = ("produce and flush", "progress", "commit", "all")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many transactions are made to warm the broker, and how many are measured."""

    warming: int = 8_000
    measured: int = 2_000


FULL = Sizes()
QUICK = Sizes(warming=100, measured=100)


def transaction(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    """Each step's p50, p95, p99 and maximum in ms."""
    name, topic = "transaction", stage.topic("transaction")
    stage.topic(control_topic(name))
    config = RelayConfig(database_url="postgresql://none", kafka={"bootstrap.servers": stage.kafka.bootstrap})
    kafka = Transactions(config, name, 0)
    for number in (0, 1):
        kafka.fence(number)
    metadata = Progress(uuid4(), 0, ((1, 2),)).metadata()
    for number in range(sizes.warming):
        _once(kafka, number, topic, metadata)
    seconds: dict[str, list[float]] = {step: [] for step in STEPS}
    for number in range(sizes.warming, sizes.warming + sizes.measured):
        times = _once(kafka, number, topic, metadata)
        for step, one in zip(STEPS, times, strict=True):
            seconds[step].append(one)
        time.sleep(max(0.0, 0.01 - times[-1]))
    kafka.discard()
    steps = {step: summary(found) for step, found in seconds.items()}
    say(f"transaction: {steps}")
    return {"transactions": sizes.measured, "steps": steps}


def _once(kafka: Transactions, number: int, topic: str, metadata: str) -> tuple[float, ...]:
    """Seconds of each step, and of all."""
    start = time.perf_counter()
    kafka.begin(number)(topic, b"x" * 200, f"key-{number % 1000}")
    kafka.flush(number)
    flushed = time.perf_counter()
    kafka.offsets(number, metadata)
    written = time.perf_counter()
    kafka.commit(number)
    end = time.perf_counter()
    return flushed - start, written - flushed, end - written, end - start
