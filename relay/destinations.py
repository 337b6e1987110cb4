"""What Kafka would say of the events of a topic, known before they are handed to it (docs/design.md, "Poison").

A topic that is not there, or that this user may not write to, is asked about once, before the first event of it is
produced; so is an event as large as one that its topic has just refused not tried again. Such events are parked as part
of a batch that succeeds: they cost the other events of their lane nothing. What is not known here is found out by
producing it, which costs the lane new producers.

What is known is forgotten when Kafka refuses something all the same. Source of the questions: KIP-430.
"""

import math
import re
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient

from relay.config import KAFKA_DEFAULTS, RelayConfig
from relay.errors import KafkaTrouble, Refusal

REFUSAL_SECONDS = 5.0
"""So long a refusal is believed; then Kafka is asked again, for a person may have made the topic or given the grant."""

PATIENCE = 0.8
"""Seconds for which a topic may be unknown before its events are parked: a broker hears a moment later than the
controller that a topic was made. The lane waits meanwhile."""

REST = 10.0
"""Seconds between two such waits: names that are wrong each in their own way do not hold a lane up again and again."""

AGAIN = 0.1
"""Seconds between two questions."""

_CODEC = ("compression.type", "compression.codec")

_LEGAL = re.compile(r"[a-zA-Z0-9._-]{1,249}")

_SIZE = frozenset({"MSG_SIZE_TOO_LARGE", "RECORD_LIST_TOO_LARGE"})
_TOPIC = frozenset({"TOPIC_EXCEPTION", "TOPIC_AUTHORIZATION_FAILED", "_UNKNOWN_TOPIC", "UNKNOWN_TOPIC_OR_PART"})
"""Kafka's words of which the first are said of each event as large, the second of each event of the topic."""


class Destinations:
    """What a relay knows of the topics; its lanes share it. `learn` blocks and is meant for a thread."""

    def __init__(self, config: RelayConfig) -> None:
        self._config = config
        self._good: set[str] = set()
        self._bad: dict[str, tuple[str, float]] = {}
        """Topic → why, and when that was said."""
        self._sizes: dict[str, tuple[int, str, float]] = {}
        """Topic → the size of an event that was too large for it, why, and when that was said."""
        # Compressed, a larger event may fit where a smaller one did not.
        settings = {**KAFKA_DEFAULTS, **config.kafka}  # of the two names of the setting the later one counts
        self._by_size = [value for name, value in settings.items() if name in _CODEC][-1] == "none"
        self._patient_from = 0.0

    def part(self, rows: Sequence[Any]) -> tuple[set[str], dict[int, str]]:
        """The topics of these rows that are to be learned first; where there are none, the rows to park (seq → why)."""
        topics = {row[3] for row in rows}
        if topics <= self._good and not self._sizes:
            return set(), {}
        now = time.monotonic()
        bad = {topic: why for topic in topics if (why := self._why(topic, now)) is not None}
        unknown = topics - self._good - bad.keys()
        if unknown:
            return unknown, {}
        refused = {row[0]: why for row in rows if (why := bad.get(row[3]) or self._too_large(row, now)) is not None}
        return set(), refused

    def learn(self, topics: Collection[str]) -> bool:
        """Ask Kafka about these topics, whatever is known of them. True: it would not take an event of one of them.

        Raises KafkaTrouble: Kafka is away, or says neither yes nor no.
        """
        self._good.difference_update(topics)
        found = self._ask_on(look(self._config, topics))
        for topic, why in found.items():
            if why is None:
                self._bad.pop(topic, None)
                self._good.add(topic)
            else:
                self._bad[topic] = why, time.monotonic()
        return any(found.values())

    def _ask_on(self, found: dict[str, str | None]) -> dict[str, str | None]:
        """Ask again about those that Kafka does not know, and did not lack before: they may be on their way."""
        began = time.monotonic()
        if began < self._patient_from:
            return found
        while time.monotonic() < began + PATIENCE:
            missing = [topic for topic, why in found.items() if why == _missing(topic) and topic not in self._bad]
            if not missing:
                return found
            time.sleep(AGAIN)
            found = {**found, **look(self._config, missing)}
        self._patient_from = time.monotonic() + REST
        return found

    def note(self, row: Any, refusal: Refusal) -> None:
        """Kafka refused this very row."""
        topic = row[3]
        if refusal.code in _TOPIC:
            self._good.discard(topic)
            self._bad[topic] = refusal.why, time.monotonic()
        elif refusal.code in _SIZE and self._by_size:
            self._sizes[topic] = _size(row), refusal.why, time.monotonic()

    def doubt(self) -> None:
        """A lane is taken, perhaps after a person has mended what was refused, and has put it back: nothing that was
        refused is believed any more."""
        self._sizes.clear()
        self._bad = {topic: (why, -math.inf) for topic, (why, _) in self._bad.items()}

    def _why(self, topic: str, now: float) -> str | None:
        why, since = self._bad.get(topic, (None, 0.0))
        return why if now - since < REFUSAL_SECONDS else None

    def _too_large(self, row: Any, now: float) -> str | None:
        least, why, since = self._sizes.get(row[3], (0, None, 0.0))
        return why if now - since < REFUSAL_SECONDS and _size(row) >= least else None


def _size(row: Any) -> int:
    """To compare rows of a topic by: what differs between their records, but for some bytes."""
    _seq, _id, type_, _topic, key, value, fingerprint, headers, _created = row
    return sum(len(part) for part in (type_, key, value, headers) if part) + (40 if fingerprint is not None else 0)


def look(config: RelayConfig, topics: Collection[str]) -> dict[str, str | None]:
    """Each topic, and why Kafka would take no event of it; None: it would. Blocks.

    A broker that makes the topics that clients ask for (`auto.create.topics.enable`) makes those that it lacks.

    Raises:
        KafkaTrouble: Kafka is away, or says neither yes nor no.
    """
    legal = [topic for topic in topics if _LEGAL.fullmatch(topic) and topic not in (".", "..")]
    found: dict[str, str | None] = dict.fromkeys(topics, "Kafka allows no topic of this name")
    if not legal:
        return found
    admin = AdminClient({**config.client(), "log_level": 0})
    answers: Mapping[str, Future[Any]] = admin.describe_topics(
        TopicCollection(legal), include_authorized_operations=True, request_timeout=config.kafka_timeout
    )
    for topic, answer in answers.items():
        found[topic] = _meaning(topic, answer)
        if found[topic] == _missing(topic):
            _ask_for(admin, topic, config.kafka_timeout)
    return found


def _meaning(topic: str, answer: "Future[Any]") -> str | None:
    try:
        described = answer.result()
    except KafkaException as error:
        kafka: KafkaError = error.args[0]
        if kafka.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            return _missing(topic)
        if kafka.code() in (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.TOPIC_EXCEPTION):
            return f"{kafka.str()} ({kafka.name()})"
        raise KafkaTrouble(f"cannot look at the topic {topic}: {kafka.str()} ({kafka.name()})") from error
    allowed = {operation.name for operation in described.authorized_operations or ()}
    if allowed and not allowed & {"WRITE", "ALL"}:
        return "the relay's user may not write to the topic (TOPIC_AUTHORIZATION_FAILED)"
    return None


def _missing(topic: str) -> str:
    return f"Kafka has no topic {topic} (UNKNOWN_TOPIC_OR_PART)"


def _ask_for(admin: AdminClient, topic: str, timeout: float) -> None:
    """As a producer does: a broker may make the topic. What it answers is seen by the next look."""
    try:
        admin.list_topics(topic, timeout)
    except KafkaException as error:
        raise KafkaTrouble(f"cannot look at the topic {topic}: {error.args[0].str()}") from error
