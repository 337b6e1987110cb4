"""Kafka's side of a consumer: a thread that is a member of the group, reads, and commits offsets.

The thread owns the client: nobody else calls it, for confluent-kafka lets one thread in at a time, and whoever comes
while another polls is left waiting. The thread tells an `Owner` in the event loop what came and which partitions come
and go, and waits for the loop in one place only: before partitions go to another member (`release`).

Where there is no room, the thread does not ask the client, whose own queue is bounded. Only a standstill of STALL
seconds pauses the partitions: pausing throws away what the client has fetched ahead
(https://github.com/confluentinc/librdkafka/issues/5343), so a consumer that is merely slower than Kafka would have
everything fetched again and again.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol
from uuid import UUID

import structlog

from outbox.consumer.meta import Meta, meta_of
from outbox.consumer.schedule import Budget
from outbox.errors import ConsumerStopped, UsageError

log = structlog.get_logger("outbox.consumer")

Place = tuple[str, int]
"""Topic and partition."""

STALL = 1.0
"""Seconds without room before the partitions are paused and the group is served only."""

POLL = 0.1
"""Seconds that one wait for a message takes: how late a stop is noticed."""

LOOK = 1.0
"""Seconds between looks at the ends of the partitions, for the lag."""

CHUNK = 1_000
"""Messages taken from the client at once."""

_OURS: dict[str, Any] = {
    "isolation.level": "read_committed",
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "enable.partition.eof": True,
}
"""What the guarantee rests on."""

_DEFAULTS: dict[str, Any] = {
    "auto.offset.reset": "earliest",  # Kafka's "latest" would leave out what was said before the first start
    "queued.max.messages.kbytes": 16_384,  # librdkafka's 64 MB come on top of what is in hand
    "queued.min.messages": 10_000,  # librdkafka's 100,000 are thrown away at a pause
    "fetch.queue.backoff.ms": 10,  # librdkafka looks only once a second whether its full queue has room again
    "fetch.wait.max.ms": 100,
    "client.id": "outbox-consumer",
}


class Owner(Protocol):
    """Whose messages they are. All of it is called in the event loop."""

    def assigned(self, places: Sequence[Place]) -> None:
        """These partitions are ours from now on."""
        ...

    async def release(self, places: Sequence[Place]) -> dict[Place, int]:
        """These are about to be another's: end what is at work; the offsets to commit."""
        ...

    def lost(self, places: Sequence[Place]) -> None:
        """These are another's already."""
        ...

    def deliver(self, messages: Sequence[Meta], ends: Sequence[tuple[Place, int]]) -> None:
        """Messages as they came, and up to where partitions were read when there was no more."""
        ...

    def failed(self, error: BaseException) -> None:
        """The thread has ended with this."""
        ...


def settings(group: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The client's configuration. UsageError where the guarantee would be gone, or no broker is named."""
    for name, value in _OURS.items():
        if name in given and str(given[name]).lower() != str(value).lower():
            raise UsageError(f"kafka: {name} must be {value}, the guarantee rests on it: leave it out")
    if "bootstrap.servers" not in given:
        raise UsageError("kafka: bootstrap.servers is missing, such as 'localhost:9092'")
    found = {"group.id": group, **_DEFAULTS, **given, **_OURS}
    if str(found.get("group.protocol", "classic")) == "classic":
        found.setdefault("partition.assignment.strategy", "cooperative-sticky")
    return found


class Feed:
    """The thread. `start` it once, then `drain`, then `close`."""

    def __init__(
        self,
        configuration: Mapping[str, Any],
        topics: Iterable[str],
        owner: Owner,
        budget: Budget,
        loop: asyncio.AbstractEventLoop,
        *,
        patience: float,
        find_id: Callable[[Meta], UUID] | None = None,
    ) -> None:
        """`patience`: seconds that `release` may take."""
        self._configuration = dict(configuration)
        self._topics = sorted(topics)
        self._owner = owner
        self._budget = budget
        self._loop = loop
        self._patience = patience
        self._find_id = find_id
        self._client: Any = None
        self._lock = threading.Lock()
        self._to_commit: dict[Place, int] = {}
        self._ends: dict[Place, int] = {}
        self._look_at = 0.0
        self._paused: bool | None = False
        """None: partitions came, and are not as the others may be."""
        self._draining = threading.Event()
        self._closing = threading.Event()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="outbox-consumer-feed", daemon=True)

    def start(self) -> None:
        """Join the group."""
        self._thread.start()

    def drain(self) -> None:
        """Deliver no more, and stay in the group."""
        self._draining.set()

    async def close(self) -> None:
        """Leave the group, by way of `release`; returns when the thread has ended."""
        self._draining.set()
        self._closing.set()
        await self._ended.wait()

    def commit(self, offsets: Mapping[Place, int]) -> None:
        """Tell Kafka soon, without waiting. What does not arrive comes again, and the inbox knows it."""
        with self._lock:
            self._to_commit |= offsets

    def end_of(self, place: Place) -> int | None:
        """The end of a partition as a fetch saw it about a second ago; None when there was none."""
        return self._ends.get(place)

    # --- in the thread ---

    def _run(self) -> None:
        try:
            from confluent_kafka import Consumer

            self._client = Consumer(self._configuration, logger=_Log())
            self._client.subscribe(
                self._topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )
            while not self._closing.is_set():
                self._round()
        except BaseException as error:  # noqa: BLE001 - it ends the consumer, in the loop
            self._tell(self._owner.failed, error)
        finally:
            self._leave()
            self._tell(self._ended.set)

    def _leave(self) -> None:
        self._closing.set()
        if self._client is not None:
            try:
                self._client.close()  # revokes, so that `release` is asked
            except Exception as error:  # noqa: BLE001 - nothing depends on it any more
                log.warning("the group was not left in order", error=repr(error))

    def _round(self) -> None:
        paused = self._draining.is_set() or not self._budget.wait_for_room(STALL)
        if paused is not self._paused:
            self._pause(paused)
        with self._lock:
            offsets, self._to_commit = self._to_commit, {}
        if offsets:
            self._commit(offsets, wait=False)
        if time.monotonic() > self._look_at:
            self._look()
        first = self._client.poll(POLL)
        if first is None:
            return
        messages, ends = [], []
        for message in (first, *self._client.consume(CHUNK, 0)):
            if message.error() is None:
                messages.append(meta_of(message, self._find_id))
            elif (end := _end(message)) is not None:
                ends.append(end)
        self._budget.take(len(messages), sum(meta.size for meta in messages))
        self._tell(self._owner.deliver, messages, ends)

    def _look(self) -> None:
        """What the last fetches said of the ends; asks no broker."""
        from confluent_kafka import KafkaException

        self._look_at, ends = time.monotonic() + LOOK, {}
        for partition in self._client.assignment():
            with suppress(KafkaException):
                _, end = self._client.get_watermark_offsets(partition, cached=True)
                if end >= 0:
                    ends[partition.topic, partition.partition] = end
        self._ends = ends

    def _pause(self, paused: bool) -> None:
        assigned = self._client.assignment()
        if assigned:
            (self._client.pause if paused else self._client.resume)(assigned)
        self._paused = paused

    def _on_assign(self, _: Any, partitions: Sequence[Any]) -> None:
        self._paused = None
        self._tell(self._owner.assigned, _places(partitions))

    def _on_revoke(self, _: Any, partitions: Sequence[Any]) -> None:
        places = _places(partitions)
        try:
            offsets = self._ask(self._owner.release(places))
        except TimeoutError:
            log.warning("partitions go to another member while their messages are at work", partitions=places)
            return
        if offsets:
            self._commit(offsets, wait=True)

    def _on_lost(self, _: Any, partitions: Sequence[Any]) -> None:
        self._tell(self._owner.lost, _places(partitions))

    def _commit(self, offsets: Mapping[Place, int], *, wait: bool) -> None:
        from confluent_kafka import KafkaException, TopicPartition

        told = [TopicPartition(topic, partition, offset) for (topic, partition), offset in offsets.items()]
        try:
            self._client.commit(offsets=told, asynchronous=not wait)
        except (KafkaException, RuntimeError) as error:
            log.warning("offsets were not committed: their messages may come again", error=str(error))

    def _tell(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self._closing.set()

    def _ask(self, question: Coroutine[Any, Any, dict[Place, int]]) -> dict[Place, int]:
        try:
            answer = asyncio.run_coroutine_threadsafe(question, self._loop)
        except RuntimeError:
            question.close()
            return {}
        return answer.result(self._patience + 5)


class _Log:
    """What librdkafka says, in our log."""

    def log(self, level: int, text: str, *arguments: Any) -> None:
        """As logging.Logger.log."""
        log.log(level, "kafka client", said=text % arguments)


def _places(partitions: Sequence[Any]) -> list[Place]:
    return [(partition.topic, partition.partition) for partition in partitions]


def _end(message: Any) -> tuple[Place, int] | None:
    """Of an error: the end of a partition; None for what passes by itself. Raises ConsumerStopped for the rest."""
    from confluent_kafka import KafkaError

    error = message.error()
    if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - librdkafka's own codes begin so
        return (message.topic(), message.partition()), message.offset()
    if error.fatal():
        raise ConsumerStopped(f"Kafka's client has ended for good: {error.str()}")
    log.warning("kafka", error=error.str(), code=error.name())
    return None
