"""When events become visible to a reader of committed records, and for how long none did."""

import bisect
import threading
import time
from itertools import pairwise
from types import TracebackType
from typing import Self
from uuid import uuid4

from confluent_kafka import Consumer, TopicPartition

from tests.torture.writers import TOPICS


def partitions(consumer: Consumer) -> set[tuple[str, int]]:
    """All of the topics. A broker may not have heard yet of topics that were just made: it is asked again."""
    while True:
        known = consumer.list_topics(timeout=30).topics
        if all(topic in known for topic in TOPICS):
            return {(topic, number) for topic in TOPICS for number in known[topic].partitions}
        time.sleep(0.1)


class Watch:
    """A `read_committed` consumer of all topics, in a thread of its own, for the length of a `with` block."""

    def __init__(self, bootstrap: str) -> None:
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": f"watch-{uuid4()}",
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 20,
                "reconnect.backoff.max.ms": 200,
                "topic.metadata.refresh.interval.ms": 500,
                "log_level": 0,
            }
        )
        self._moments: list[float] = []
        self._newest = 0.0
        self._count = 0
        self._ending = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="watch", daemon=True)

    @property
    def count(self) -> int:
        """Records seen."""
        return self._count

    @property
    def newest(self) -> float:
        """When the youngest event that is visible was said (seconds since 1970, the database's clock)."""
        return self._newest

    def wait_for_event_of(self, moment: float, timeout: float) -> bool:
        """Whether an event that was said after `moment` (seconds since 1970) becomes visible within `timeout` s."""
        with self._changed:
            return self._changed.wait_for(lambda: self._newest > moment, timeout)

    def silence(self, since: float, until: float) -> float:
        """The longest time between these moments (time.monotonic) without a newly visible event, in seconds."""
        with self._changed:
            first = bisect.bisect_left(self._moments, since)
            inside = self._moments[first : bisect.bisect_right(self._moments, until)]
        moments = [since, *inside, until]
        return max(after - before for before, after in pairwise(moments))

    def _read(self) -> None:
        self._consumer.assign([TopicPartition(*place, 0) for place in partitions(self._consumer)])
        while not self._ending.is_set():
            messages = [one for one in self._consumer.consume(2000, 0.1) if one.error() is None]
            if not messages:
                continue
            newest = max(one.timestamp()[1] for one in messages) / 1000
            with self._changed:
                self._moments.append(time.monotonic())
                self._newest = max(self._newest, newest)
                self._count += len(messages)
                self._changed.notify_all()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join(10)
        self._consumer.close()
