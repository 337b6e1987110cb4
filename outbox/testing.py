"""For the tests of services: which events does a session emit? A pytest plugin, which loads itself.

    event = assert_emitted(session, InspectionEvent, inspection_id="i-1")
    refute_emitted(session, QualityEvent, pass_fail=False)
    events = pending(session)

Emitted is what waits in the outbox as this session sees it: the rows of the table, and what the session has added and
not written yet. So they say the same before the commit and after it, and inside an outer transaction that is rolled
back. For an AsyncSession: the same names with `_async`, awaited.

Each flushes the session first, as a query would (unless `autoflush` is off): events of flush hooks and of RecordsEvents
count. Reading needs SELECT on the table, which the writer's role has not: tests connect as the tables' owner.
"""

import inspect
import json
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields as fields_of
from typing import Any, NamedTuple, TypeVar, overload

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from outbox.catalogue import Catalogue, TypedEvent
from outbox.errors import UsageError, show
from outbox.message import Event, Message
from outbox.tables import missing_tables, quoted
from outbox.transaction import AnySession, session_of
from outbox.writer import Outbox, living, unwritten

Emitted = Event | TypedEvent | Message
"""Of the class that a catalogue knows (`Catalogue.from_folder(…, events=events)`), else an Event, with key, topic and
headers as in the row. A row that is not Avro: an Event if its value is a JSON object, else its Message."""

AnySync = Session | scoped_session[Any]
AnyAsync = AsyncSession | async_scoped_session[Any]
E = TypeVar("E", bound=TypedEvent)
T = TypeVar("T")

SHOWN = 20
"""Events listed by a failure."""


def pending(session: AnySync, /) -> list[Emitted]:
    """The events that wait, in their order: those of the table, then those that the session has not written yet."""
    return [one.event for one in _emitted(session)]


@overload
def assert_emitted(session: AnySync, kind: type[E], /, **fields: Any) -> E: ...
@overload
def assert_emitted(session: AnySync, kind: str, /, **fields: Any) -> Emitted: ...
def assert_emitted(session: AnySync, kind: type[Any] | str, /, **fields: Any) -> Any:
    """The first event of that kind (a class, or an event type) whose fields equal those given.

    Raises AssertionError, with a list of what was emitted, where there is none; TypeError for a field that the class
    has not.
    """
    __tracebackhide__ = True
    emitted = _emitted(session)
    found = _matching(emitted, kind, fields)
    if not found:
        raise AssertionError(f"no {_described(kind, fields)} was emitted. {_listed(emitted, kind, fields)}")
    return found[0]


def refute_emitted(session: AnySync, kind: type[TypedEvent] | str, /, **fields: Any) -> None:
    """No event of that kind has these fields. Raises as `assert_emitted`, where there is one."""
    __tracebackhide__ = True
    emitted = _emitted(session)
    if _matching(emitted, kind, fields):
        raise AssertionError(f"{_described(kind, fields)} was emitted. {_listed(emitted, kind, fields)}")


def pending_async(session: AnyAsync, /) -> Coroutine[Any, Any, list[Emitted]]:
    """As `pending`, for an AsyncSession."""
    return _later(session, pending)


@overload
def assert_emitted_async(session: AnyAsync, kind: type[E], /, **fields: Any) -> Coroutine[Any, Any, E]: ...
@overload
def assert_emitted_async(session: AnyAsync, kind: str, /, **fields: Any) -> Coroutine[Any, Any, Emitted]: ...
def assert_emitted_async(session: AnyAsync, kind: Any, /, **fields: Any) -> Coroutine[Any, Any, Any]:
    """As `assert_emitted`, for an AsyncSession."""
    return _later(session, lambda inner: assert_emitted(inner, kind, **fields))


def refute_emitted_async(
    session: AnyAsync, kind: type[TypedEvent] | str, /, **fields: Any
) -> Coroutine[Any, Any, None]:
    """As `refute_emitted`, for an AsyncSession."""
    return _later(session, lambda inner: refute_emitted(inner, kind, **fields))


# --- What waits ---


class _Row(NamedTuple):
    message: Message
    event: Emitted


def _emitted(session: AnySession) -> list[_Row]:
    if isinstance(session, AsyncSession | async_scoped_session):
        raise UsageError("this is an AsyncSession: await the function whose name ends in _async")
    target = session_of(session)
    if target.in_transaction() and target.autoflush:
        target.flush()
    outboxes = living()
    if not outboxes:
        raise UsageError("there is no Outbox in this process: keep the service's own until the test is over")
    catalogues = [outbox.catalogue for outbox in outboxes]
    messages = [*_written(target, outboxes), *unwritten(target)]
    return [_Row(message, _event(message, catalogues)) for message in messages]


def _written(session: Session, outboxes: list[Outbox]) -> list[Message]:
    """The rows that the session sees. One Outbox's table must be there; others may have theirs in another database."""
    found: list[list[Message]] = []
    for outbox, connection in _places(session, outboxes):
        table = f"{quoted(outbox.schema)}.outbox"
        if connection.scalar(sa.text("SELECT to_regclass(:table)"), {"table": table}) is not None:
            columns = outbox.table.c
            query = sa.select(*(columns[name] for name in Message._fields)).order_by(columns.seq)
            found.append([Message(*row) for row in connection.execute(query)])
    if not found:
        raise missing_tables(outboxes[0].schema)
    return [message for messages in found for message in messages]


def _places(session: Session, outboxes: list[Outbox]) -> Iterator[tuple[Outbox, sa.Connection]]:
    """Each table of these outboxes that the session would write to, once."""
    seen = set()
    for outbox in outboxes:
        clause = sa.insert(outbox.table)
        try:
            bind = session.get_bind(clause=clause)
        except sa.exc.UnboundExecutionError:
            continue
        if (bind, outbox.schema) in seen:
            continue
        seen.add((bind, outbox.schema))
        with _connection(session, bind, clause) as connection:
            yield outbox, connection


@contextmanager
def _connection(session: Session, bind: sa.Engine | sa.Connection, clause: Any) -> Iterator[sa.Connection]:
    """A session without a transaction is left so: one that the test does not know of would hold locks."""
    if session.in_transaction():
        yield session.connection(bind_arguments={"clause": clause})
    elif isinstance(bind, sa.Connection):
        yield bind
    else:
        with bind.connect() as connection:
            yield connection


def _event(message: Message, catalogues: list[Catalogue]) -> Emitted:
    if message.fingerprint is None:
        data = _json_object(message.value)
        return message if data is None else _untyped(message, data)
    if message.value is None:
        return message
    frame = b"\xc3\x01" + message.fingerprint.to_bytes(8, "little", signed=True)
    event: Emitted = message
    for catalogue in catalogues:
        if message.fingerprint in catalogue.fingerprints:
            event = catalogue.decode(frame + message.value)
            if not isinstance(event, Event):
                return event
    return _untyped(message, event.data) if isinstance(event, Event) else event


def _json_object(value: bytes | None) -> dict[str, Any] | None:
    try:
        data = json.loads(value or b"")
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


def _untyped(message: Message, data: Mapping[str, Any]) -> Event:
    headers = message.headers or {}
    return Event(message.type, data, key=message.key, id=message.id, topic=message.topic, headers=headers)


# --- Which of them ---

_MISSING = object()


def _matching(emitted: list[_Row], kind: type[Any] | str, fields: Mapping[str, Any]) -> list[Any]:
    _check_fields(kind, fields)
    events = [event for row in emitted if (event := _as(row, kind)) is not None]
    return [event for event in events if all(_field(event, name) == value for name, value in fields.items())]


def _check_fields(kind: type[Any] | str, fields: Mapping[str, Any]) -> None:
    """A name that is misspelt would match nothing, and a refutation would pass."""
    if isinstance(kind, str):
        return
    known = [field.name for field in fields_of(kind)]
    for name in fields:
        if name not in known:
            raise TypeError(f"{kind.__name__} has no field {name!r}; it has {', '.join(known)}")


def _as(row: _Row, kind: type[Any] | str) -> Any:
    """The event as that kind; None where it is none."""
    if isinstance(kind, str):
        return row.event if row.message.type == kind else None
    if row.message.fingerprint != kind.AVRO_FINGERPRINT or isinstance(row.event, Message | kind):
        return row.event if isinstance(row.event, kind) else None
    return kind.from_avro(row.event.data if isinstance(row.event, Event) else row.event.to_avro())


def _field(event: Any, name: str) -> Any:
    return event.data.get(name, _MISSING) if isinstance(event, Event) else getattr(event, name, _MISSING)


# --- What a failure says ---


def _described(kind: type[Any] | str, fields: Mapping[str, Any]) -> str:
    name = kind if isinstance(kind, str) else kind.__name__
    given = ", ".join(f"{field}={value!r}" for field, value in fields.items())
    return f"{name} with {given}" if given else name


def _listed(emitted: list[_Row], kind: type[Any] | str, fields: Mapping[str, Any]) -> str:
    if not emitted:
        return "Nothing was."
    lines = [f"  {number}. {_line(row, kind, fields)}" for number, row in enumerate(emitted[:SHOWN], 1)]
    more = [f"  … and {len(emitted) - SHOWN} more"] if len(emitted) > SHOWN else []
    return "\n".join(["Emitted were:", *lines, *more])


def _line(row: _Row, kind: type[Any] | str, fields: Mapping[str, Any]) -> str:
    """Type and key; of an event of the kind asked for, the fields asked for too."""
    event = _as(row, kind)
    found = {} if event is None else {name: _field(event, name) for name in fields}
    said = ", ".join(f"{name}={'(none)' if value is _MISSING else show(value)}" for name, value in found.items())
    return f"{row.message.type}, key {row.message.key!r}" + (f": {said}" if said else "")


# --- Under asyncio, and the plugin ---

_calls: list[Coroutine[Any, Any, Any]] | None = None
"""The calls that the test at work was given to await; None outside of a test."""


def _later(session: AnyAsync, check: Callable[[Session], T]) -> Coroutine[Any, Any, T]:
    plain = session() if isinstance(session, async_scoped_session) else session
    call = plain.run_sync(check)
    if _calls is not None:
        _calls.append(call)
    return call


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    """A check that a test forgot to await has checked nothing: the test fails. Python itself would only warn."""
    global _calls
    before, _calls = _calls, []
    try:
        result = yield
    finally:
        forgotten = [call for call in _calls if inspect.getcoroutinestate(call) == inspect.CORO_CREATED]
        _calls = before
        for call in forgotten:
            call.close()
    if forgotten:
        pytest.fail(f"{len(forgotten)} checks of outbox.testing were not awaited: they have checked nothing", False)
    return result
