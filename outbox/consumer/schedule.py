"""What is at work, what waits, and what may be told to Kafka. Pure: no clock, no I/O, no asyncio.

Lanes     messages of one key (or partition) one behind the other, several lanes at once
Offsets   of a partition: everything below is in the database
Budget    how much may be in hand; the one thing here that two threads share
"""

import threading
from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, NamedTuple, TypeVar

M = TypeVar("M")


class Lane(NamedTuple):
    """What is kept in order: a key of a partition, or all of a partition."""

    topic: str
    partition: int
    key: Hashable


class Lanes(Generic[M]):
    """Messages that wait, by lane. Of a lane at most one unit is at work, and it is the oldest.

        push ─► waiting ─► take ─► at work ─► done ─► (the lane's next unit may be taken)

    Lanes are served in the order in which they became ready: a full one does not starve the others.
    """

    def __init__(self, sizes: Mapping[str, int] | None = None) -> None:
        """`sizes`: how many messages of a lane make a unit at most, by topic; 1 where the topic is not named."""
        self._sizes = sizes or {}
        self._waiting: dict[Lane, deque[M]] = {}
        self._ready: deque[Lane] = deque()
        self._busy: set[Lane] = set()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def busy(self) -> int:
        """Units at work."""
        return len(self._busy)

    def push(self, lane: Lane, *messages: M) -> None:
        """Behind what the lane has."""
        waiting = self._waiting.get(lane)
        if waiting is None:
            self._waiting[lane] = deque(messages)
            if lane not in self._busy:
                self._ready.append(lane)
        else:
            waiting.extend(messages)

    def take(self) -> tuple[Lane, list[M]] | None:
        """The next unit, of a lane of which nothing is at work; None where there is none. Then call `done`."""
        while self._ready:
            lane = self._ready.popleft()
            waiting = self._waiting.get(lane)
            if waiting is None or lane in self._busy:  # dropped since; and then pushed and taken anew
                continue
            size = self._sizes.get(lane.topic, 1)
            if len(waiting) <= size:
                unit = list(waiting)
                del self._waiting[lane]
            else:
                unit = [waiting.popleft() for _ in range(size)]
            self._busy.add(lane)
            return lane, unit
        return None

    def done(self, lane: Lane) -> None:
        """The unit of this lane has ended, whatever became of it."""
        self._busy.remove(lane)
        if lane in self._waiting:
            self._ready.append(lane)

    def drop(self, topic: str, partition: int) -> list[M]:
        """Forget what waits of a partition, and give it back. What is at work goes on."""
        lanes = [lane for lane in self._waiting if lane.partition == partition and lane.topic == topic]
        return [message for lane in lanes for message in self._waiting.pop(lane)]


class Offsets:
    """Of one partition: which messages were received, and up to where all of them are done.

    What is told to Kafka is that prefix, never more: what comes behind the first message that is not done would be
    lost with this process.
    """

    def __init__(self) -> None:
        self._received: deque[tuple[int, int | None]] = deque()
        self._done: set[int] = set()
        self._next: int | None = None

    def __len__(self) -> int:
        """Messages received and not yet behind the prefix."""
        return len(self._received)

    def received(self, offset: int, timestamp_ms: int | None = None) -> None:
        """In the order in which Kafka gives them: with gaps, where records are markers, or compacted."""
        self._received.append((offset, timestamp_ms))

    def done(self, offsets: Iterable[int]) -> None:
        """These are in the database."""
        self._done.update(offsets)
        received = self._received
        while received and received[0][0] in self._done:
            offset, _ = received.popleft()
            self._done.remove(offset)
            self._next = offset + 1

    def reached(self, end: int) -> None:
        """Everything below `end` was received: what lies between the last message and it are markers."""
        if not self._received:
            self._next = max(end, self._next or 0)

    @property
    def next(self) -> int | None:
        """The offset to commit: all below it is done. None: nothing is known yet."""
        return self._next

    @property
    def oldest_ms(self) -> int | None:
        """Kafka's timestamp of the oldest message that is not done."""
        return self._received[0][1] if self._received else None


class Budget:
    """How many messages, and how many of their bytes, may be in hand at once. Thread-safe.

    Once it is full there is room again only when a tenth of it is free: who waits is not woken for each message.
    """

    def __init__(self, messages: int, size: int) -> None:
        self._limits = messages, size
        self._messages = self._size = 0
        self._full = False
        self._room = threading.Condition()

    @property
    def taken(self) -> tuple[int, int]:
        """Messages and bytes in hand."""
        return self._messages, self._size

    def take(self, messages: int, size: int) -> None:
        """They are in hand now; the limit may be passed by what came at once."""
        with self._room:
            self._messages += messages
            self._size += size

    def give_back(self, messages: int, size: int) -> None:
        """They are done, or dropped."""
        with self._room:
            self._messages -= messages
            self._size -= size
            if self._full and self._is_below(0.9):
                self._full = False
                self._room.notify_all()

    def wait_for_room(self, timeout: float) -> bool:
        """Whether more may be taken; waits for it, up to `timeout` seconds."""
        with self._room:
            self._full = self._full or not self._is_below(1)
            return self._room.wait_for(lambda: not self._full, timeout)

    def _is_below(self, share: float) -> bool:
        return self._messages < self._limits[0] * share and self._size < self._limits[1] * share
