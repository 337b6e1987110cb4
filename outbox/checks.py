"""What fastavro's strict writer lets pass and must not be written; and which field it was that does not fit.

fastavro (1.13) writes 1.5 as 1, 2**40 as an int, any object as a boolean, any text as a uuid, and a naive datetime as
the machine's local time. `compile_check` makes of a schema one function that looks at such types only; those that
fastavro checks itself cost nothing. `faults` walks an event that one of the two refused, and says where and why.

Both take an expanded schema (`schemas.expand`): every named type written out where it is used.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from difflib import get_close_matches
from io import BytesIO
from math import inf
from typing import Any
from uuid import UUID

from fastavro import schemaless_writer

from outbox.errors import SchemaError, show

Check = Callable[[Any], bool]
"""True: as far as fastavro does not see itself, the value may be written. False, or any exception: it may not."""

_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_TEXTS = (str, bytes, bytearray, memoryview)  # sequences, but no lists
_MAX_FLOAT = (2 - 2**-23) * 2.0**127  # of 32 bits


def _is(kind: type) -> Check:
    return lambda value: isinstance(value, kind)


def _whole(bits: int) -> Check:
    end = 1 << bits - 1
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and -end <= value < end


def _real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Sequence) and not isinstance(value, _TEXTS))


_AWARE = ("an aware datetime, such as datetime.now(UTC)", lambda it: isinstance(it, datetime) and it.tzinfo is not None)
_NAIVE = ("a naive datetime: the schema says local time", lambda it: isinstance(it, datetime) and it.tzinfo is None)

# Type, or type-logicalType → what to give, and the check where fastavro's writer has none.
_TYPES: Mapping[str, tuple[str, Check | None]] = {
    "null": ("null", lambda value: value is None),
    "boolean": ("True or False", _is(bool)),
    "int": ("a whole number (int) of 32 bits", _whole(32)),
    "long": ("a whole number (int) of 64 bits", _whole(64)),
    "float": ("a number (float) of 32 bits", lambda value: _real(value) and not _MAX_FLOAT < abs(value) < inf),
    "double": ("a number (float)", _real),
    "bytes": ("bytes", None),
    "string": ("text (str)", None),
    "enum": ("one of: {symbols}", None),
    "fixed": ("exactly {size} bytes", None),
    "array": ("a list", _list),
    "map": ("a mapping of text to values (a dict)", _is(Mapping)),
    "record": ("an object with named fields (a dict)", _is(Mapping)),
    "string-uuid": (
        "a UUID, or its text as 8-4-4-4-12 hexadecimal digits",
        lambda it: isinstance(it, UUID) or (isinstance(it, str) and _UUID.fullmatch(it) is not None),
    ),
    **dict.fromkeys(("long-timestamp-millis", "long-timestamp-micros"), _AWARE),
    **dict.fromkeys(("long-local-timestamp-millis", "long-local-timestamp-micros"), _NAIVE),
    **dict.fromkeys(("int-time-millis", "long-time-micros"), ("a time", _is(time))),
    **dict.fromkeys(("bytes-decimal", "fixed-decimal"), ("a Decimal", _is(Decimal))),
    "int-date": ("a date", lambda value: isinstance(value, date) and not isinstance(value, datetime)),
}


def compile_check(schema: Any) -> Check | None:
    """The check of one type; None where fastavro's strict writer needs no help. SchemaError for a misfit default."""
    kind = _kind(schema)
    if kind == "union":
        return _union_check(schema)
    if kind == "record":
        return _record_check(schema)
    if kind == "array":
        item = compile_check(schema["items"])
        return (lambda value: _list(value) and all(map(item, value))) if item else _list
    if kind == "map":
        inner = compile_check(schema["values"])
        return inner and (lambda value: all(map(inner, value.values())))
    return _expected(schema)[1]


def _record_check(schema: Mapping[str, Any]) -> Check | None:
    checks = {field["name"]: compile_check(field["type"]) for field in schema["fields"]}
    plan = [(name, check) for name, check in checks.items() if check]
    for field in schema["fields"]:
        for path, problem in faults(_in_json(field["type"]), field["default"]) if "default" in field else ():
            raise SchemaError(f"{schema['name']}: the default of field {field['name']}{path} {problem}")

    def record(value: Any) -> bool:
        for name, check in plan:  # noqa: SIM110 - a generator takes half a microsecond more
            if name in value and not check(value[name]):
                return False
        return True

    return record if plan else None


def _union_check(branches: list[Any]) -> Check | None:
    checks = [compile_check(branch) for branch in branches if branch != "null"]
    if only := checks[0] if len(checks) == 1 else None:
        return lambda value: value is None or only(value)
    return (lambda value: not any(faults(branches, value))) if any(checks) else None


def faults(schema: Any, value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, problem) for all that is wrong with a value. A union's value must fit one of its types."""
    kind = _kind(schema)
    if kind == "record" and isinstance(value, Mapping):
        yield from _record_faults(schema, value, f"{path}." if path else "")
    elif kind == "array" and _list(value):
        for index, item in enumerate(value):
            yield from faults(schema["items"], item, f"{path}[{index}]")
    elif kind == "map" and isinstance(value, Mapping):
        for name, item in value.items():
            yield from faults("string", name, f"{path}[key {name!r}]")
            yield from faults(schema["values"], item, f"{path}[{name!r}]")
    elif kind == "union" and len(schema) == 2 and "null" in schema:
        yield from () if value is None else faults(schema[schema[0] == "null"], value, path)
    elif kind != "union":
        yield from _plain_faults(schema, value, path)
    elif all(any(faults(branch, value)) for branch in schema):
        yield path, f"is {show(value)}; give {' or '.join(_expected(branch)[0] for branch in schema)}"


def _record_faults(schema: Mapping[str, Any], value: Mapping[Any, Any], start: str) -> Iterator[tuple[str, str]]:
    fields = {field["name"]: field for field in schema["fields"]}
    for name, field in fields.items():
        if name in value:
            yield from faults(field["type"], value[name], f"{start}{name}")
        elif "default" not in field:
            yield f"{start}{name}", "is missing and has no default; give it"
    for name in value.keys() - fields.keys():
        near = get_close_matches(str(name), fields, n=1)
        yield f"{start}{name}", f"is not in the schema; {f'did you mean {near[0]}?' if near else 'remove it'}"


def _plain_faults(schema: Any, value: Any, path: str) -> Iterator[tuple[str, str]]:
    wanted, check = _expected(schema)
    try:
        if check and not check(value):
            yield path, f"is {show(value)}; give {wanted}"
        else:
            schemaless_writer(BytesIO(), schema, value)
    except Exception as error:  # noqa: BLE001 - fastavro raises whatever its C code meets; what it said is passed on
        yield path, f"is {show(value)}; give {wanted} ({error})"


def _in_json(schema: Any) -> Any:
    """The type that a default has in the schema's JSON, which knows no logical types, and bytes as text."""
    if isinstance(schema, list):
        return [_in_json(part) for part in schema]
    if not isinstance(schema, dict) or schema.get("type") == "fixed":
        return "string" if schema == "bytes" or isinstance(schema, dict) else schema
    inner = ("type", "items", "values", "fields")
    return {key: _in_json(value) if key in inner else value for key, value in schema.items() if key != "logicalType"}


def _kind(schema: Any) -> str:
    return "union" if isinstance(schema, list) else str(schema["type"] if isinstance(schema, dict) else schema)


def _expected(schema: Any) -> tuple[str, Check | None]:
    if not isinstance(schema, dict):
        return _TYPES[schema]
    wanted, check = _TYPES.get(f"{schema['type']}-{schema.get('logicalType')}") or _TYPES[schema["type"]]
    return wanted.format(symbols=", ".join(schema.get("symbols", ())), size=schema.get("size")), check
