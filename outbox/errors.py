"""What can go wrong, in one tree: the caller's mistakes apart from the world's failures.

    OutboxError
    ├── UsageError              the caller's mistake; nothing was written
    │   ├── EventError          an event that cannot be written
    │   │   ├── UnknownEventType   no schema in the catalogue has this event type
    │   │   ├── InvalidEvent       a missing, unknown or wrong field; naive datetime; malformed uuid; key not text
    │   │   └── EventTooLarge      the record would be larger than Kafka takes
    │   ├── TransactionError    add() where there is no transaction to join
    │   └── SchemaError         an .avsc that cannot be used
    ├── ConsumerStopped         a consumer has ended, by its policy or because Kafka's client has
    ├── BacklogFull             more events wait than the Outbox was allowed (max_backlog)
    ├── MigrationError          the tables are missing, older, or newer than this code knows
    ├── RegistryError           the schema registry is away, slow, or does not let us in
    │   └── SchemaRefused          the registry will never take this schema as it is, or has no such schema
    └── DecodeError             bytes from Kafka that no known schema reads
        └── InvalidMessage         a message whose event has no usable id

Every message says what happened, to what, and what to do about it. No message holds a whole payload: a wrong value is
shown shortened.
"""

from reprlib import Repr

_repr = Repr()
_repr.maxstring = _repr.maxother = 60


class OutboxError(Exception):
    """Root of the tree: catch it to catch everything that this package raises on purpose."""


class UsageError(OutboxError):
    """The caller's mistake: nothing was written, and the same call will fail again until it is changed."""


class EventError(UsageError):
    """An event that cannot be written. Raised at the call, before anything is sent to the database."""


class UnknownEventType(EventError):  # noqa: N818 - its base says Error, its name says which one
    """No schema of the catalogue has this event type. The message lists the nearest names."""


class InvalidEvent(EventError):  # noqa: N818 - its base says Error, its name says which one
    """The event does not fit its schema. The message names the event type, the field and the remedy."""


class EventTooLarge(EventError):  # noqa: N818 - its base says Error, its name says which one
    """The record, as Kafka counts it, would be larger than `max_bytes`. The message names both sizes and the parts."""


class TransactionError(UsageError):
    """There is no transaction to join: autocommit, a closed session, a savepoint left open at the root commit."""


class SchemaError(UsageError):
    """An .avsc that cannot be used. The message names file, field and remedy for each problem found."""


class BacklogFull(OutboxError):  # noqa: N818 - named for what happened
    """About as many events wait as `max_backlog` allows: no relay is at work, or it is behind. Try again later."""


class MigrationError(OutboxError):
    """The outbox's tables are missing, older or newer than this code; the message names the version and the command."""


class RegistryError(OutboxError):
    """The schema registry did not do what it was asked; the same call may work later. Holds the registry's words."""


class SchemaRefused(RegistryError):  # noqa: N818 - its base says Error, its name says which one
    """The registry refuses a schema for good (incompatible, invalid), or has none that was looked up."""


class ConsumerStopped(OutboxError):  # noqa: N818 - named for what happened
    """A consumer has ended: a message failed for good and the policy is to stop, or Kafka's client gave up."""


class DecodeError(OutboxError):
    """Bytes that no known schema reads; the message says what was found instead of a single-object frame."""


class InvalidMessage(DecodeError):  # noqa: N818 - its base says Error, its name says which one
    """A message without a usable id: no header `ce_id`, or one that is no uuid. Names topic, partition and offset."""


def show(value: object) -> str:
    """A value in a message: its type, and at most about 60 characters of it."""
    return "null" if value is None else f"{type(value).__name__} {_repr.repr(value)}"
