"""What a consumer does when a handler fails, and how much it may have in hand: settings, and their arithmetic."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

from outbox.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often a handler is tried at an event, and how long is waited in between."""

    attempts: int = 5
    """In all, the first included."""
    first: float = 0.1
    """Seconds before the second attempt; doubled before each further one."""
    most: float = 30.0
    """Seconds, never waited longer."""
    never: tuple[type[Exception], ...] = ()
    """Exceptions that another attempt cannot cure."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or not 0 <= self.first <= self.most:
            raise UsageError(f"a retry needs one attempt or more, and 0 ≤ first ≤ most: {self}")

    def again(self, error: BaseException, attempt: int) -> bool:
        """Whether there is another attempt after `attempt` has failed so."""
        return attempt < self.attempts and not isinstance(error, self.never)

    def delay(self, attempt: int, chance: Callable[[], float] = random.random) -> float:
        """Seconds to wait after this attempt: half to the whole of the step, so that many do not come back at once.

        Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015 ("equal jitter").
        """
        step: float = min(self.most, self.first * 2.0 ** min(attempt - 1, 60))
        return step * (0.5 + chance() / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """What becomes of a message that cannot be handled."""

    retry: Retry = field(default_factory=Retry)
    then: Literal["park", "stop"] = "park"
    """`park`: it becomes a dead message, and the consumer goes on. `stop`: the consumer ends with the error, and the
    message comes again at its next start. Bytes that cannot be read, and what kills the process, are always parked."""
    hold: bool = True
    """Later messages of its key wait behind it, as dead messages too, until it is retried or discarded. Off: they are
    handled as if it had never been."""
    topic: str | None = None
    """Dead messages are published to this topic as well: original key, bytes and headers, and `dead_…` headers."""
    kills: int = 3
    """A message that was being handled at so many deaths of the process in a row is parked."""
    unknown: Literal["skip", "park"] = "skip"
    """An event of a type that the catalogue does not know yet. `skip`: counted, not claimed, so that a replay by a
    later version handles it. `park`: it waits as a dead message until this consumer knows it."""

    def __post_init__(self) -> None:
        if self.kills < 3:
            raise UsageError("kills must be 3 or more: the first death tells nothing of the message, the second little")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much is in hand, and how long an end may take."""

    concurrency: int = 8
    """Transactions at once; the engine's pool must have as many connections, and two more."""
    messages: int = 10_000
    """Messages in hand before Kafka is asked for no more."""
    size: int = 64 * 1024 * 1024
    """Bytes of them; passed by at most what the client has fetched already (`queued.max.messages.kbytes`)."""
    deadline: float = 20.0
    """Seconds that a stop waits for what is at work; then it is cancelled, and comes again."""
    revoke: float = 10.0
    """Seconds that a rebalance waits for what is at work of the partitions that go to another member."""
    commit: float = 1.0
    """Seconds between commits of offsets."""
    claims: timedelta | None = None
    """Claims older than this are forgotten, hour by hour; None: never. Refused at the start where a topic keeps its
    messages as long: one that came again then would take effect twice."""

    def __post_init__(self) -> None:
        if min(self.concurrency, self.messages, self.size) < 1:
            raise UsageError(f"limits must be above zero: {self}")


_CONNECTION = ("bootstrap.", "broker.", "client.", "metadata.", "reconnect.", "sasl.", "security.", "socket.", "ssl.")


def connection(kafka: Mapping[str, Any]) -> dict[str, Any]:
    """Of a consumer's settings those that hold for any client: where Kafka is, and how it is spoken to."""
    return {name: value for name, value in kafka.items() if name.startswith(_CONNECTION)}
