"""An independent consumer in a process of its own: `read_committed`, and it knows nothing of the relay but the topic.

It says three things over its pipe: that it is in place, that all events have come, and, after a while of listening for
repeats, what became of them.
"""

import gc
import time
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from confluent_kafka import Consumer, KafkaException, TopicPartition

from benchmarks.figures import Mark, Tally, arrival_times, steady_rate, tally
from benchmarks.stage import Backlog, Stage

CHUNK = 2_000
"""Events taken at once in a drain: some 15 ms of it."""

NUMBER = slice(10, 18)
"""Where the event's number stands in the value: behind the frame of Avro's single-object encoding."""

PATIENCE = 60.0
"""Seconds without an event after which the missing ones are lost."""

LISTEN = 0.5
"""Seconds for which it goes on listening for repeats when all have come."""

SETTINGS = {
    "group.id": "benchmark-reader",  # never joined: partitions are assigned by hand
    "isolation.level": "read_committed",
    "enable.auto.commit": False,
    "fetch.min.bytes": 1,
    "fetch.wait.max.ms": 100,  # the broker answers as soon as there is anything; this only bounds an empty wait
    "queued.min.messages": 1_000_000,  # it never stops fetching because it was slow for a moment
    "queued.max.messages.kbytes": 1_000_000,
    "check.crcs": False,
}


@dataclass(frozen=True, slots=True)
class Task:
    """Read `count` events of `topics`, from their present ends."""

    bootstrap: str
    topics: tuple[str, ...]
    partitions: int
    count: int
    keys: int
    every: int
    """Take each event as soon as it is there, and note when every so many-th came (latency). 0: in chunks
    (throughput)."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the reader found."""

    tally: Tally
    rate: float
    """Events a second from the first to the last."""
    cpu: float
    """CPU seconds of the reader."""
    times: dict[int, int]
    """Number → arrival in ns of CLOCK_MONOTONIC; empty where `Task.every` is 0."""


class Reader:
    """The reader's process, seen from the benchmark. In place when the `with` block begins."""

    def __init__(self, stage: Stage, backlog: Backlog, *, every: int = 0) -> None:
        context = get_context("spawn")
        self._pipe, self._its_pipe = context.Pipe()
        task = Task(stage.kafka.bootstrap, backlog.topics, backlog.partitions, backlog.events, backlog.keys, every)
        self._process = context.Process(target=read, args=(self._its_pipe, task), daemon=True)

    def done(self) -> None:
        """Returns when all events have come, or it has given up on the missing ones."""
        self._pipe.recv()

    def reading(self) -> Reading:
        """What became of the events; after `done`."""
        reading: Reading = self._pipe.recv()
        return reading

    def __enter__(self) -> Self:
        self._process.start()
        self._its_pipe.close()  # so that its death is an EOFError here
        self._pipe.recv()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()
        self._process.join()


def read(pipe: Connection, task: Task) -> None:
    """The reader's process."""
    gc.disable()  # nothing here makes cycles
    consumer = Consumer({**SETTINGS, "bootstrap.servers": task.bootstrap})
    places = [TopicPartition(topic, number) for topic in task.topics for number in range(task.partitions)]
    consumer.assign([_end(consumer, place) for place in places])
    consumer.poll(0)
    collected = _Collected(consumer)
    pipe.send("in place")
    started = time.process_time()
    _collect(collected, task)
    cpu = time.process_time() - started
    pipe.send("all have come")
    while collected.take(CHUNK, LISTEN):
        pass
    consumer.close()
    pipe.send(collected.reading(task, cpu))


def _end(consumer: Consumer, partition: TopicPartition) -> TopicPartition:
    _low, high = consumer.get_watermark_offsets(partition, timeout=30)
    return TopicPartition(partition.topic, partition.partition, high)


def _collect(collected: "_Collected", task: Task) -> None:
    deadline = time.monotonic() + PATIENCE
    while (left := task.count - len(collected.numbers)) > 0 and time.monotonic() < deadline:
        came = collected.take_at_once() if task.every else collected.take(min(CHUNK, left), 0.1)
        if came:
            deadline = time.monotonic() + PATIENCE


@dataclass(slots=True)
class _Collected:
    """Numbers and keys as they came. They are judged afterwards, so that reading costs little."""

    consumer: Consumer
    numbers: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def take(self, most: int, wait: float) -> int:
        """A chunk: up to `most` events, those that come within `wait` seconds."""
        return self._keep(self.consumer.consume(most, wait))

    def take_at_once(self) -> int:
        """The first event that comes within 0.1 s, as soon as it is there, and whatever is there beside it."""
        first = self.consumer.poll(0.1)
        return 0 if first is None else self._keep([first]) + self._keep(self.consumer.consume(CHUNK, 0))

    def _keep(self, messages: list[Any]) -> int:
        now = time.monotonic_ns()
        for message in messages:
            if message.error():
                raise KafkaException(message.error())
        self.numbers.extend([int.from_bytes(message.value()[NUMBER]) for message in messages])
        self.keys.extend([message.key() for message in messages])
        if messages:
            self.marks.append(Mark(len(self.numbers), now))
        return len(messages)

    def reading(self, task: Task, cpu: float) -> Reading:
        return Reading(
            tally(task.count, zip(self.numbers, self.keys, strict=True), task.keys),
            steady_rate(task.count, self.marks),
            cpu,
            arrival_times(self.numbers, self.marks, task.every) if task.every else {},
        )
