"""What `import outbox` offers is a promise: a name comes and goes by a change of this file, not by accident."""

import outbox

NAMES = {
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
}


def test_the_public_names_are_these() -> None:
    assert set(outbox.__all__) == NAMES
    assert list(outbox.__all__) == sorted(outbox.__all__), "sorted, so that a change is one line"
    assert all(hasattr(outbox, name) for name in NAMES)


def test_every_error_is_public_and_an_outbox_error() -> None:
    errors = [getattr(outbox, name) for name in NAMES if isinstance(getattr(outbox, name), type)]
    errors = [one for one in errors if issubclass(one, Exception) and not issubclass(one, Warning)]
    assert all(issubclass(one, outbox.OutboxError) for one in errors)
    defined = {
        name for name, one in vars(outbox.errors).items() if isinstance(one, type) and issubclass(one, Exception)
    }
    assert defined <= NAMES
