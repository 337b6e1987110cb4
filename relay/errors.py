"""What can go wrong in a relay.

::

    RelayError
    ├── ConfigError        the operator's mistake in a setting; the relay does not start
    ├── ProgressError      progress in Kafka that cannot be read: not written by a relay, or by a newer one
    ├── IllegalStep        a step that the protocol forbids now: a bug of ours, and nothing was done
    ├── LaneHalted         Kafka and the database contradict each other: a person has to look
    └── LaneTrouble        this hold on the lane is over; the next take settles what is in doubt
        ├── LaneLost       another relay has the lane
        ├── TakeAgain      the two readings contradict each other, which a zombie's last step may explain
        ├── Recycle        a connection to Kafka was lost, perhaps with a request under way: new producers are due
        ├── KafkaTrouble   Kafka is away, slow, or refused something that is no event's fault
        │   └── NotLetIn   its certificate or ours, a user or a password is not what the other side wants
        ├── DatabaseTrouble  the same of the database
        ├── EventRefused   Kafka refuses an event for good
        └── Undelivered    records were not delivered, why is not known yet

Nothing in this tree says "not committed": what an exception leaves in doubt is read back from Kafka (docs/design.md,
"The lane protocol").
"""

from collections.abc import Mapping
from dataclasses import dataclass


class RelayError(Exception):
    """Base of all errors of the relay."""


class ConfigError(RelayError):
    """A setting is unknown, missing, or contradicts another. Names the setting and the remedy."""


class ProgressError(RelayError):
    """The progress of a lane in Kafka cannot be read."""


class IllegalStep(RelayError):
    """The protocol forbids this step in this state."""


class LaneHalted(RelayError):
    """The lane must not go on by itself. The text says what was found and what to do."""


class LaneTrouble(RelayError):
    """This hold on the lane is over. Nothing is decided by it: the next take reads what became of the last batches."""


class LaneLost(LaneTrouble):
    """Another relay has the lane, or its lease could not be had."""


class TakeAgain(LaneTrouble):
    """Kafka and the database contradict each other; a zombie's last step may explain it. Seen twice in a row: halt."""


class Recycle(LaneTrouble):
    """A connection to Kafka was lost, perhaps with a request under way (KAFKA-17754): new producers are due."""


class KafkaTrouble(LaneTrouble):
    """Kafka is away, slow, or refused something that is no event's fault."""


class NotLetIn(KafkaTrouble):
    """No connection came to be: Kafka's certificate or ours, the user or the password is not what the other side
    wants."""


class DatabaseTrouble(LaneTrouble):
    """The database is away, slow, or refused a statement."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What Kafka says of an event that it will never take."""

    why: str
    code: str = ""
    """Kafka's name for it, such as MSG_SIZE_TOO_LARGE; none where no record could be made of the event."""


class EventRefused(LaneTrouble):
    """Kafka refuses an event for good: too large, topic unknown or forbidden, record invalid.

    `events`: which ones of the batch, by their place in it. Empty: one of them, it is not known which.
    """

    def __init__(self, words: str, events: Mapping[int, Refusal] | None = None) -> None:
        super().__init__(words)
        self.events = events or {}


class Undelivered(LaneTrouble):
    """Records were not delivered, and the client does not say why unless it is asked for each of them."""
