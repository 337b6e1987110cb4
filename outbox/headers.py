"""The Kafka headers of an event: bound to a context, checked where they are given, and the trace that is under way.

An event has, where two of them say the same name the later one:

    the trace ─► context(…), the inner one over the outer ─► add(…, headers=…) ─► its own (Event.headers)

Names that begin with `ce_` are attributes of CloudEvents. The relay says `ce_id`, `ce_source`, `ce_type`,
`ce_specversion`, `ce_time` and `content-type`; extensions are the caller's: 1 or more of a-z 0-9, a value of one
character at least and none of them a control character. The trace is no such extension: `traceparent` is the header
that OpenTelemetry's instrumentations of Kafka's clients look for, and CloudEvents leaves it to them.

Sources: CloudEvents 1.0.2 (Naming Conventions, Type System), its Kafka Protocol Binding 1.0.2 (3.2.3), its Correlation
and Distributed Tracing extensions; W3C Trace Context.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from uuid import UUID

from outbox.errors import UsageError, show

Headers = Mapping[str, str]

NONE: Headers = MappingProxyType({})

SAID_BY_THE_RELAY = frozenset({"content-type", "ce_id", "ce_source", "ce_type", "ce_specversion", "ce_time"})

_EXTENSION = re.compile(r"ce_[a-z0-9]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_bound: ContextVar[Headers] = ContextVar("outbox.headers", default=NONE)


@contextmanager
def context(
    *,
    correlation_id: str | UUID | None = None,
    causation_id: str | UUID | None = None,
    tenant: str | None = None,
    **headers: str,
) -> Iterator[None]:
    """Every event that is added in the block carries these headers, whichever Outbox adds it.

    Bound to the running task or thread (a contextvar): what asyncio starts in the block inherits them, another thread
    does not (`asyncio.to_thread` does). Blocks nest: the inner one says what it names anew and keeps the rest.

    Args:
        correlation_id: of all that follows from one request: header `ce_correlationid`.
        causation_id: the id of the event that this one answers: header `ce_causationid`.
        tenant: header `ce_tenant`.
        headers: by their names in Kafka; `**{"x-request-id": …}` for a name that is none in Python.

    Raises UsageError for a header that cannot be carried, before the block begins.
    """
    ids = {"ce_correlationid": correlation_id, "ce_causationid": causation_id, "ce_tenant": tenant}
    named = {name: str(value) if isinstance(value, UUID) else value for name, value in ids.items() if value is not None}
    token = _bound.set({**_bound.get(), **checked({**named, **headers})})
    try:
        yield
    finally:
        _bound.reset(token)


def current(own: Headers | None = None) -> Headers:
    """The headers of a call: trace, context, and its own. UsageError where one of its own cannot be carried."""
    bound, trace = _bound.get(), _trace()
    found = {**trace, **bound} if trace and bound else trace or bound
    return {**found, **checked(own)} if own else found


def checked(headers: Headers) -> Headers:
    """The headers, if Kafka, PostgreSQL and CloudEvents can carry them; UsageError otherwise."""
    for name, value in headers.items():
        if problem := fault(name, value):
            raise UsageError(problem)
    return headers


def fault(name: object, value: object) -> str | None:
    """What is wrong with a header, in words; None where nothing is."""
    if not isinstance(name, str) or not isinstance(value, str):
        return f"header {name!r} is {show(value)}; names and values of headers are text (str)"
    if not name:
        return "a header has no name; give it one"
    if not is_storable(name) or not is_storable(value):
        return f"header {name!r}: {show(value)} holds a NUL or a lone surrogate; PostgreSQL's text cannot"
    folded = name.lower()  # readers of CloudEvents do not tell ce_id from CE_ID
    if folded in SAID_BY_THE_RELAY:
        return f"header {name} is set by the relay; choose another name"
    if folded.startswith("ce_"):
        if not _EXTENSION.fullmatch(name):
            return f"header {name!r} is no attribute of CloudEvents: ce_ and then a-z and 0-9 only"
        if not value or _CONTROL.search(value):
            return f"header {name}: {show(value)} is no value of CloudEvents: some text, without control characters"
    return None


def is_storable(text: str) -> bool:
    """False for what UTF-8 or a PostgreSQL text cannot hold."""
    return "\0" not in text and (text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text))


def _trace() -> Headers:
    """W3C trace context of the current span. Without an import: a process that traces has made it."""
    trace = sys.modules.get("opentelemetry.trace")
    span = trace.get_current_span().get_span_context() if trace else None
    if span is None or not span.is_valid:
        return NONE
    headers = {"traceparent": f"00-{span.trace_id:032x}-{span.span_id:016x}-{int(span.trace_flags):02x}"}
    if span.trace_state:
        headers["tracestate"] = span.trace_state.to_header()
    return headers
