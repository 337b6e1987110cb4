"""Transactional outbox and inbox: events from a database transaction into Kafka, exactly once and in key order."""

from outbox.aggregate import RecordsEvents
from outbox.catalogue import Catalogue, TypedEvent
from outbox.errors import (
    BacklogFull,
    ConsumerStopped,
    DecodeError,
    EventError,
    EventTooLarge,
    InvalidEvent,
    InvalidMessage,
    MigrationError,
    OutboxError,
    RegistryError,
    SchemaError,
    SchemaRefused,
    TransactionError,
    UnknownEventType,
    UsageError,
)
from outbox.guards import UnlockedKey
from outbox.headers import context
from outbox.inbox import Inbox
from outbox.message import Event, Message, uuid7
from outbox.writer import Outbox

__all__ = [
    "BacklogFull",
    "Catalogue",
    "ConsumerStopped",
    "DecodeError",
    "Event",
    "EventError",
    "EventTooLarge",
    "Inbox",
    "InvalidEvent",
    "InvalidMessage",
    "Message",
    "MigrationError",
    "Outbox",
    "OutboxError",
    "RecordsEvents",
    "RegistryError",
    "SchemaError",
    "SchemaRefused",
    "TransactionError",
    "TypedEvent",
    "UnknownEventType",
    "UnlockedKey",
    "UsageError",
    "context",
    "uuid7",
]
