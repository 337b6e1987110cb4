"""RecordsEvents: events recorded on a mapped object, handed to the outbox by the flush that writes the object.

A recorded event is a change of its object like any other. It is flushed with the object's other changes and merged with
them. It is gone when they are: by `expire`, `refresh`, or a rollback that takes the object back to what the database
has. It stays on the object where they do: by `expunge`, and by a rollback that makes a new object transient again.

    record() ─► _recorded, an attribute without a column ─► before_insert, before_update, before_delete ─► writer.put

The attribute is a query_expression() that nobody queries: SQLAlchemy keeps, merges and expires it, takes the object for
changed by it, and never writes it. So no session is hooked; one without such objects meets nothing of this.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy import event
from sqlalchemy.orm import Mapper, object_session, query_expression

from outbox.catalogue import TypedEvent
from outbox.errors import UsageError
from outbox.guards import Origin, origin
from outbox.message import Event, Message
from outbox.writer import Fate, Outbox, put

_numbers = count()


@dataclass(slots=True, eq=False)
class _Recorded:
    """One event, on its object and on what that one was merged into: they share its fate."""

    event: Event | TypedEvent
    message: Message
    outbox: Outbox
    where: Origin | None
    fate: Fate | None = None
    number: int = field(default_factory=lambda: next(_numbers))
    """Orders the events of several objects that one flush writes."""

    @property
    def waits(self) -> bool:
        """Not handed over, or in a transaction or savepoint that was not committed."""
        return self.fate is None or self.fate.committed is False

    @property
    def is_committed(self) -> bool:
        return self.fate is not None and self.fate.committed is True


class _Events(tuple[_Recorded, ...]):
    """The value of the attribute."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type[tuple[Any, ...]], tuple[()]]:
        if any(one.waits for one in self):
            raise UsageError("an object with recorded events cannot be pickled, they would be lost: flush it first")
        return (tuple, ())


class RecordsEvents:
    """A mixin for mapped classes: what `self.record(event)` took is committed with the flush that writes the object.

        class Inspection(RecordsEvents, Base):
            __outbox__ = outbox

            def complete(self, score: float) -> None:
                self.status, self.quality_score = "COMPLETED", score
                self.record(InspectionEvent.inspection_completed(…, quality_score=score))

    The events of one flush keep the order of the calls, over all its objects. An event alone is a change too: where the
    class counts versions (`version_id_col`), it is the next one. Statements that write rows past the unit of work (bulk
    inserts, `update()`) hand nothing over.
    """

    __outbox__: ClassVar[Outbox]
    """Encodes the events and writes them. On the class, or on one of its bases."""
    if TYPE_CHECKING:
        _recorded: _Events

    def record(self, *events: Event | TypedEvent, headers: Mapping[str, str] | None = None) -> None:
        """Record events, to be committed with the next flush that writes this object. `headers` as in `Outbox.add`.

        Raises what `Outbox.add` raises for an event, and then none of the call's is recorded; UsageError where the
        class has no `__outbox__`.
        """
        outbox: Outbox | None = getattr(type(self), "__outbox__", None)
        if outbox is None:
            name = type(self).__name__
            raise UsageError(f"{name} does not know its outbox: set {name}.__outbox__ = Outbox(…), or that of its base")
        where = origin() if outbox.warn_unlocked else None
        messages = outbox.encode(*events, headers=headers)
        self._recorded = _Events(
            _Recorded(event, message, outbox, where) for event, message in zip(events, messages, strict=True)
        )

    @property
    def recorded_events(self) -> tuple[Event | TypedEvent, ...]:
        """The events that no flush has taken yet: for tests of the class without a database."""
        return tuple(one.event for one in _waiting_on(self))


def _waiting_on(target: object) -> Iterator[_Recorded]:
    """Past the attribute's descriptor, which would ask the database for what is expired."""
    return (one for one in target.__dict__.get("_recorded") or () if one.waits)


@event.listens_for(RecordsEvents, "after_mapper_constructed", propagate=True)
def _add_attribute(mapper: Mapper[Any], _class: type[Any]) -> None:
    """Not declared on the mixin: a mapped dataclass takes no attribute from a class that is none."""
    if not mapper.has_property("_recorded"):
        mapper.add_property("_recorded", query_expression())


@event.listens_for(RecordsEvents, "attribute_instrument", propagate=True)
def _join_what_is_set(_class: type[Any], key: str, attribute: Any) -> None:
    """What is recorded, and what is merged into the object, joins what it has; what is committed can go."""
    if key != "_recorded":
        return

    def joined(target: Any, value: Any, _old: Any, _initiator: Any) -> _Events:
        old = target.__dict__.get("_recorded") or ()
        return _Events(one for one in dict.fromkeys((*old, *(value or ()))) if not one.is_committed)

    event.listen(attribute, "set", joined, retval=True)


@event.listens_for(RecordsEvents, "before_insert", propagate=True)
@event.listens_for(RecordsEvents, "before_update", propagate=True)
@event.listens_for(RecordsEvents, "before_delete", propagate=True)
def _hand_over(_mapper: Any, _connection: Any, target: RecordsEvents) -> None:
    """The first object of a flush with events hands over those of all, in the order in which they were recorded."""
    session = object_session(target)
    if session is None or next(_waiting_on(target), None) is None:
        return
    written = [*session.new, *session.dirty, *session.deleted]
    waiting = {one.number: one for other in written if isinstance(other, RecordsEvents) for one in _waiting_on(other)}
    for _, one in sorted(waiting.items()):
        one.fate = Fate()
        put(session, one.outbox, [one.message], one.where, one.fate)
