"""Replay: history read into a consumer again, beside the group, which does not notice.

Under the consumer's own inbox what was seen is skipped: a replay repairs what is missing, and no more. Under a new
generation nothing was seen yet: a read model is rebuilt, by the same handlers (docs/consuming.md, Replay).
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from outbox.consumer.feed import Place, settings
from outbox.consumer.meta import Meta, meta_of
from outbox.consumer.runtime import Consumer, Process
from outbox.consumer.schedule import Lane, Lanes
from outbox.consumer.work import Effects
from outbox.errors import UsageError
from outbox.inbox import Inbox

CHUNK = 1_000
"""Messages in hand at once."""

PATIENCE = 30.0
"""Seconds without news from Kafka before a replay gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is read again: of one topic, from a place on, up to its end at the beginning of the replay."""

    topic: str
    since: datetime | None = None
    """Messages whose Kafka timestamp is not before it."""
    offsets: Mapping[int, int] = field(default_factory=dict)
    """Partition → first offset. Partitions that are not named are left out, where any is."""
    key: str | None = None
    """This key's messages only."""

    def __post_init__(self) -> None:
        if self.since is not None and self.offsets:
            raise UsageError("a replay begins at a time or at offsets, not at both")
        if self.since is not None and self.since.tzinfo is None:
            raise UsageError(f"--since {self.since.isoformat()} has no time zone: add Z, or +02:00")


@dataclass(slots=True)
class Report:
    """What a replay has come to so far."""

    total: int = 0
    """Offsets to be read, markers and gaps included."""
    read: int = 0
    """Of those."""
    chosen: int = 0
    """Messages of the selection."""
    known: int = 0
    """Of those, the ones whose claim is in the inbox: skipped."""


@dataclass(frozen=True, slots=True)
class _Span:
    place: Place
    start: int
    end: int


class Replay:
    """One replay. `run` it once."""

    def __init__(
        self,
        consumer: Consumer,
        selection: Selection,
        *,
        generation: str | None = None,
        dry_run: bool = False,
        rate: float | None = None,
        progress: Callable[[Report], None] = lambda _: None,
    ) -> None:
        """`rate`: events a second at most. `dry_run`: counts, and changes nothing.

        Raises UsageError where the consumer has no handler of the topic.
        """
        if selection.topic not in consumer.topics:
            raise UsageError(f"{consumer.name} has no handler of {selection.topic}: {', '.join(consumer.topics)}")
        self._consumer = consumer
        self._selection = selection
        self._inbox = consumer.inbox if generation is None else consumer.inbox_of(generation)
        self._dry_run = dry_run
        self._rate = rate
        self._progress = progress
        self._report = Report()

    async def run(self) -> Report:
        """Read to the end. Raises what `Consumer.run` raises, and KafkaException where Kafka does not answer."""
        from confluent_kafka import Consumer as Client

        configuration = {
            **settings(f"{self._consumer.name}.replay", self._consumer.kafka),
            "auto.offset.reset": "error",
        }
        configuration.pop("group.instance.id", None)
        client = Client(configuration)
        database = self._consumer.database()
        try:
            spans = await asyncio.to_thread(self._spans, client)
            self._report.total = sum(span.end - span.start for span in spans)
            await self._read(client, spans, self._consumer.effects(database, self._inbox), database)
        finally:
            await asyncio.to_thread(client.close)
            database.close()
        return self._report

    def _spans(self, client: Any) -> list[_Span]:
        """From where to where each partition is read. The end is that of the log: open transactions end it earlier."""
        from confluent_kafka import TopicPartition

        topic, chosen = self._selection.topic, self._selection
        known = client.list_topics(topic, timeout=PATIENCE).topics[topic]
        if known.error is not None:
            raise UsageError(f"Kafka has no topic {topic}: {known.error.str()}")
        numbers = sorted(chosen.offsets or known.partitions)
        starts = dict(chosen.offsets)
        if chosen.since is not None:
            asked = [TopicPartition(topic, number, round(chosen.since.timestamp() * 1000)) for number in numbers]
            found = client.offsets_for_times(asked, timeout=PATIENCE)
            starts = {one.partition: one.offset for one in found}
        spans = []
        for number in numbers:
            low, end = client.get_watermark_offsets(TopicPartition(topic, number), timeout=PATIENCE)
            start = starts.get(number, low)
            if 0 <= start < end and end > low:  # a time after the last message has no offset (-1)
                spans.append(_Span((topic, number), max(low, start), end))
        return spans

    async def _read(self, client: Any, spans: Sequence[_Span], effects: Effects, database: Any) -> None:
        from confluent_kafka import TopicPartition

        hold = Process()
        topic = self._selection.topic
        await effects.load_held(topic, hold)
        client.assign([TopicPartition(topic, span.place[1], span.start) for span in spans])
        position = {span.place[1]: span.start for span in spans}
        ends = {span.place[1]: span.end for span in spans}
        while ends:
            messages = await asyncio.to_thread(self._next, client, position, ends)
            started = time.monotonic()
            chosen = [meta for meta in messages if self._is_chosen(meta)]
            self._report.chosen += len(chosen)
            self._report.read = self._report.total - sum(end - position[number] for number, end in ends.items())
            if self._dry_run:
                self._report.known += await database.do(lambda session, _: known(session, self._inbox, chosen))  # noqa: B023 - awaited here
            else:
                await self._take(chosen, effects, hold)
            self._progress(self._report)
            if self._rate is not None:
                await asyncio.sleep(max(0.0, len(chosen) / self._rate - (time.monotonic() - started)))

    def _next(self, client: Any, position: dict[int, int], ends: dict[int, int]) -> list[Meta]:
        """Some messages within the ends; takes partitions that are read through out of `ends`."""
        from confluent_kafka import KafkaError, KafkaException

        size = CHUNK if self._rate is None else max(1, min(CHUNK, round(self._rate)))
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            messages = []
            for message in client.consume(size, 0.5):
                number, offset = message.partition(), message.offset()
                if message.error() is None:
                    if number in ends and offset < ends[number]:
                        messages.append(meta_of(message, self._consumer.find_id))
                    position[number] = offset + 1
                elif message.error().code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - librdkafka's own codes
                    position[number] = ends.get(number, offset)
                else:
                    raise KafkaException(message.error())
                if number in ends and position[number] >= ends[number]:
                    del ends[number]
            if messages or not ends:
                return messages
        raise TimeoutError(f"Kafka has said nothing for {PATIENCE:g} s: {ends} (partition: end) was not reached")

    def _is_chosen(self, meta: Meta) -> bool:
        key = self._selection.key
        meta.replay = True
        return key is None or meta.key == key.encode()

    async def _take(self, messages: Sequence[Meta], effects: Effects, hold: Process) -> None:
        """As the runtime does: a key's messages one behind the other, several lanes at once."""
        topic = self._consumer.topics[self._selection.topic]
        lanes: Lanes[Meta] = Lanes({topic.name: topic.batch} if topic.batch else None)
        for meta in messages:
            key = None if topic.batch else (meta.offset if meta.key is None else meta.key)
            lanes.push(Lane(meta.topic, meta.partition, key), meta)

        async def worker() -> None:
            while (taken := lanes.take()) is not None:
                lane, unit = taken
                try:
                    await effects.take(unit, hold)
                finally:
                    lanes.done(lane)

        before = self._consumer.metrics.duplicates[topic.name]
        async with asyncio.TaskGroup() as group:
            for _ in range(self._consumer.limits.concurrency):
                group.create_task(worker())
        self._report.known += self._consumer.metrics.duplicates[topic.name] - before


def known(session: Any, inbox: Inbox, messages: Sequence[Meta]) -> int:
    """How many of these the inbox has."""
    ids = {meta.id for meta in messages}
    query = (
        sa.select(sa.func.count())
        .select_from(inbox.table)
        .where(inbox.table.c.consumer == inbox.consumer, inbox.table.c.event_id.in_(ids))
    )
    return int(session.scalar(query))
