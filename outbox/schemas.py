"""The .avsc files: reading them, and refusing what Avro's readers would misunderstand without a word.

One file is one record is one Kafka topic. Beside what Avro asks for, the record carries properties of ours, which
Avro's canonical form ignores: `topic`; `key`, the name of the string field that becomes the Kafka key (or none); and
`events` (or none), which says of each symbol of the enum `event_type` what an event of that type has:

    "events": {
        "ORDERED": {"doc": "A customer ordered.", "needs": ["total"], "takes": ["note"]},
        "CANCELLED": {"sets": {"open": false}}
    }

Every event has the fields without a default. `needs`: fields with one that this event has too, and not as null;
`takes`: fields that it may have; `sets`: fields whose value is the same for each event of the type. No others make
sense for it. `outbox codegen` makes a constructor of each.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeGuard, cast

from fastavro.schema import expand_schema, parse_schema, to_parsing_canonical_form
from fastavro.schema import fingerprint as fastavro_fingerprint

from outbox.errors import SchemaError

Schema = dict[str, Any]

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
TOPIC = re.compile(r"(?!\.{1,2}$)[a-zA-Z0-9._-]{1,249}")
NAMED = ("record", "enum", "fixed")
PLAIN = frozenset({"null", "boolean", "int", "long", "float", "double", "bytes", "string"})
CONSTANTS: Mapping[str, tuple[type, ...]] = {
    "null": (type(None),),
    "boolean": (bool,),
    **dict.fromkeys(("int", "long"), (int,)),
    **dict.fromkeys(("float", "double"), (int, float)),
    "string": (str,),
}
"""What JSON says of a plain type: in `events.…sets`."""

# https://avro.apache.org/docs/1.12.0/specification/#logical-types
LOGICAL_TYPES: Mapping[str, frozenset[str]] = {
    "uuid": frozenset({"string", "fixed"}),
    "decimal": frozenset({"bytes", "fixed"}),
    "big-decimal": frozenset({"bytes"}),
    "date": frozenset({"int"}),
    "time-millis": frozenset({"int"}),
    "time-micros": frozenset({"long"}),
    **{
        f"{local}timestamp-{unit}": frozenset({"long"})
        for local in ("", "local-")
        for unit in ("millis", "micros", "nanos")
    },
    "duration": frozenset({"fixed"}),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that makes an .avsc unusable: where it is, and what to do about it."""

    file: Path
    where: str
    """The field or type, "" for the file as a whole."""
    text: str
    line: int | None = None
    """Only where the file is no JSON at all."""

    def __str__(self) -> str:
        place = str(self.file) if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.where, self.text) if part)


def load(path: str | Path) -> dict[Path, Schema]:
    """The record of every .avsc under `path` (a folder, or one file), by file, in the order of their names.

    Raises SchemaError with every problem that `lint` finds.
    """
    if problems := lint(path):
        raise SchemaError("\n".join(str(problem) for problem in problems))
    return {file: json.loads(file.read_bytes()) for file in _files(Path(path))}


def lint(path: str | Path) -> list[Problem]:
    """Every problem of the .avsc files under `path`; an empty list says that a catalogue can be made of them."""
    files = _files(Path(path))
    if not files:
        return [Problem(Path(path), "", "no .avsc file here; give the folder that holds the schemas")]
    problems: list[Problem] = []
    schemas: dict[Path, Schema] = {}
    for file in files:
        schema = _parse_json(file)
        if isinstance(schema, Problem):
            problems.append(schema)
            continue
        found = [Problem(file, where, text) for where, text in check(schema)]
        problems += found
        if not found:
            schemas[file] = schema
    return problems + list(_duplicates(schemas))


def advice(path: str | Path) -> list[Problem]:
    """What makes schemas that have no problem hard to change later: fields that readers could not do without."""
    found = []
    for file, schema in load(path).items():
        for place, field in _members(schema, full_name(schema)):
            found += [Problem(file, place, text) for text in _advice(field)]
    return found


def text(schema: Schema) -> str:
    """The JSON of a schema as it is kept in avro_schema and given to a registry."""
    return json.dumps(schema, separators=(",", ":"), ensure_ascii=False)


def fingerprint(schema: Schema) -> int:
    """Avro's CRC-64 (Rabin) of the parsing canonical form, as a signed 64-bit integer.

    Canonical form leaves out logical types, defaults, docs and aliases: schemas that differ in nothing else share it.
    https://avro.apache.org/docs/1.12.0/specification/#schema-fingerprints
    """
    crc = fastavro_fingerprint(to_parsing_canonical_form(schema), "CRC-64-AVRO")
    return int.from_bytes(bytes.fromhex(crc), "little", signed=True)


def full_name(schema: Schema) -> str:
    """Namespace and name of a record."""
    name = str(schema["name"])
    space = schema.get("namespace")
    return name if "." in name or not space else f"{space}.{name}"


def event_types(schema: Schema) -> dict[str, str]:
    """Event type → enum symbol; one entry whose symbol is "" for a record without an `event_type` enum."""
    name = full_name(schema)
    field = fields(schema).get("event_type")
    if field is None or not _is_enum(field["type"]):
        return {name: ""}
    space = name.rpartition(".")[0]
    return {f"{space}.{symbol}": symbol for symbol in field["type"]["symbols"]}


def fields(schema: Schema) -> dict[str, Schema]:
    """A record's fields by name."""
    return {field["name"]: field for field in schema["fields"]}


def is_envelope(field: Schema) -> bool:
    """True for the fields that the catalogue fills in where an event leaves them out, so that no caller need give them.

    `event_id` (uuid), `timestamp` (timestamp-millis or -micros), and `metadata`, a map that is empty by default.
    """
    name, kind = field["name"], field["type"]
    logical = kind.get("logicalType") if isinstance(kind, dict) else None
    if name == "metadata":
        return isinstance(kind, dict) and kind["type"] == "map" and not field.get("default")
    return (name, logical) in (
        ("event_id", "uuid"),
        ("timestamp", "timestamp-millis"),
        ("timestamp", "timestamp-micros"),
    )


def branch_of(schema: Any, value: Any) -> Any:
    """The type of a union, or the type itself, that takes this value of `sets`; None where no plain type does.

    Plain: null, boolean, numbers, text and enums, without a logical type. `schema` is expanded.
    """
    for branch in schema if isinstance(schema, list) else [schema]:
        if isinstance(branch, dict) and branch["type"] == "enum":
            if value in branch["symbols"]:
                return branch
        elif isinstance(branch, str) and type(value) in CONSTANTS.get(branch, ()):
            return branch
    return None


def check(schema: Any) -> Iterator[tuple[str, str]]:
    """(where, problem) for each thing wrong with one schema by itself."""
    if not isinstance(schema, dict) or schema.get("type") != "record":
        yield "", "an event's schema is one record at the top level"
        return
    problems = [*_check_topic(schema), *_check_type(schema, str(schema.get("name", "")))]
    yield from problems
    if problems:
        return
    try:
        parse_schema(schema)
    except Exception as error:  # noqa: BLE001 - fastavro's parser also fails with KeyError, TypeError and the like
        yield full_name(schema), f"{type(error).__name__}: {error}"
        return
    yield from _unbounded(expand_schema(schema), full_name(schema))
    yield from _check_key(schema)
    yield from _check_event_id(schema)
    yield from _check_events(schema)


def expand(schema: Schema) -> Any:
    """The schema with every named type written out where it is used. SchemaError for what `_unbounded` finds."""
    expanded = expand_schema(schema)
    for where, problem in _unbounded(expanded, full_name(schema)):
        raise SchemaError(f"{where}: {problem}")
    return expanded


def _unbounded(schema: Any, where: str) -> Iterator[tuple[str, str]]:
    """(where, problem) for each type of an expanded schema that a few bytes can use to end the reading process.

    fastavro's C code has no limit of depth (a type that holds itself overflows the stack, in writing too), and takes
    the count of an array at its word. Every other value takes at least as many bytes as it has parts.
    """
    if isinstance(schema, list):
        for branch in schema:
            yield from _unbounded(branch, where)
    elif not isinstance(schema, dict):
        if schema not in PLAIN:
            yield where, f"{schema} holds itself, to any depth; hold a list of its parts instead"
    elif schema["type"] == "record":
        for field in schema["fields"]:
            yield from _unbounded(field["type"], f"{where}.{field['name']}")
    elif schema["type"] in ("array", "map"):
        inner = schema.get("items", schema.get("values"))
        if schema["type"] == "array" and _takes_no_bytes(inner):
            yield f"{where}[]", "the items take no bytes, so that any number of them can be claimed; store the number"
        yield from _unbounded(inner, f"{where}[]")


def _takes_no_bytes(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return bool(schema == "null")
    if schema["type"] == "record":
        return all(_takes_no_bytes(field["type"]) for field in schema["fields"])
    return schema["type"] == "null" or schema.get("size") == 0


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(path.glob("*.avsc"))


def _parse_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        return Problem(file, "", f"column {error.colno}: not JSON: {error.msg}", error.lineno)
    except UnicodeDecodeError as error:
        return Problem(file, "", f"not UTF-8: {error}; save the file as UTF-8")


def _check_topic(schema: Schema) -> Iterator[tuple[str, str]]:
    topic = schema.get("topic")
    if topic is None:
        yield "topic", 'missing; name the Kafka topic beside the record\'s name: "topic": "orders.events"'
    elif not isinstance(topic, str) or not TOPIC.fullmatch(topic):
        yield "topic", f"{topic!r} is no Kafka topic name: 1 to 249 of a-z A-Z 0-9 . _ -"
    if not schema.get("namespace") and "." not in str(schema.get("name", "")):
        yield "namespace", 'missing; an event\'s type is <namespace>.<name>: "namespace": "com.example.orders"'


def _check_key(schema: Schema) -> Iterator[tuple[str, str]]:
    key = schema.get("key")
    if key is None:
        return
    field = fields(schema).get(key) if isinstance(key, str) else None
    if field is None:
        yield "key", f"{key!r} is no field of the record; name one of its string fields, or leave the key out"
    elif _base(field["type"]) != "string":
        yield "key", f"field {key} is no string; Kafka keys are text here: name a field of type string"


def _check_event_id(schema: Schema) -> Iterator[tuple[str, str]]:
    field = fields(schema).get("event_id")
    if field is not None and field["type"] != {"type": "string", "logicalType": "uuid"}:
        yield "event_id", 'is the id of the row and must be {"type": "string", "logicalType": "uuid"}'


def _check_events(schema: Schema) -> Iterator[tuple[str, str]]:
    """What the record says of its event types: each of them, known fields only, nothing that contradicts the fields."""
    events = schema.get("events")
    if events is None:
        return
    kind = fields(schema).get("event_type", {}).get("type")
    if not isinstance(events, dict) or not _is_enum(kind):
        yield "events", "an object from each symbol of the enum in the field event_type to what such an event has"
        return
    members = fields(cast("Schema", expand_schema(schema)))
    for symbol in kind["symbols"]:
        if symbol not in events:
            yield "events", f'nothing is said of {symbol}; add "{symbol}": {{}}, or what it needs, takes and sets'
    for symbol, said in events.items():
        where = f"events.{symbol}"
        if symbol not in kind["symbols"]:
            near = get_close_matches(symbol, kind["symbols"], n=1)
            yield where, f"no symbol of event_type; {f'did you mean {near[0]}?' if near else 'remove it'}"
        elif not _is_account(said):
            yield where, 'an object of "doc" (text), "needs" and "takes" (lists of fields) and "sets" (field to value)'
        else:
            yield from _check_account(said, members, where)


def _is_account(said: Any) -> bool:
    """The shape of what is said of one event type."""
    if not isinstance(said, dict) or not said.keys() <= {"doc", "needs", "takes", "sets"}:
        return False
    lists = [*_list_of(said, "needs"), *_list_of(said, "takes")]
    return (
        isinstance(said.get("doc", ""), str)
        and isinstance(said.get("sets", {}), dict)
        and all(isinstance(name, str) for name in lists)
    )


def _list_of(said: Schema, what: str) -> list[Any]:
    found = said.get(what, [])
    return found if isinstance(found, list) else [None]


def _check_account(said: Schema, members: Mapping[str, Schema], where: str) -> Iterator[tuple[str, str]]:
    names = [*said.get("needs", ()), *said.get("takes", ()), *said.get("sets", ())]
    for name in dict.fromkeys(names):
        member = members.get(name)
        if member is None:
            near = get_close_matches(name, members, n=1)
            yield where, f"{name} is no field; {f'did you mean {near[0]}?' if near else 'remove it'}"
        elif name == "event_type" or is_envelope(member):
            yield where, f"{name} is filled in for every event; remove it"
        elif names.count(name) > 1:
            yield where, f"{name} is named twice; name it once, under needs, takes or sets"
        elif name in said.get("takes", ()) and "default" not in member:
            yield where, f"{name} has no default, so every event needs it; remove it, or give the field a default"
        elif name in said.get("sets", {}) and branch_of(member["type"], said["sets"][name]) is None:
            yield where, f"{name} cannot be set to {json.dumps(said['sets'][name])}: the field's type does not take it"


def _check_type(schema: Any, where: str) -> Iterator[tuple[str, str]]:
    """Walk one type: names, unions, and logical types that no reader would see."""
    if isinstance(schema, list):
        yield from _check_union(schema, where)
        for branch in schema:
            yield from _check_type(branch, where)
        return
    if not isinstance(schema, dict):
        return
    base = schema.get("type")
    if isinstance(base, dict | list) and "logicalType" not in schema:
        yield from _check_type(base, where)
        return
    yield from _check_logical(schema, where)
    if base == "enum" and not isinstance(schema.get("symbols"), list):
        yield where, "an enum has a list of symbols"
    if base in NAMED:
        yield from _check_names(schema, where)
    if base == "error":
        yield where, "error is for the messages of Avro's RPC; write record"
    if base == "record":
        yield from _check_fields(schema, where)
    yield from _check_type(schema.get("items"), f"{where}[]")
    yield from _check_type(schema.get("values"), f"{where}[]")


def _check_union(schema: list[Any], where: str) -> Iterator[tuple[str, str]]:
    """https://avro.apache.org/docs/1.12.0/specification/#unions"""
    if any(isinstance(branch, list) for branch in schema):
        yield where, "a union in a union; write one union of all the types"
    kinds = [_base(branch) for branch in schema if not (isinstance(branch, dict) and branch.get("type") in NAMED)]
    for kind in dict.fromkeys(kind for kind in kinds if isinstance(kind, str) and kinds.count(kind) > 1):
        yield where, f"{kind} stands twice in one union, so that no reader can tell which one is meant; remove one"


def _check_logical(schema: Schema, where: str) -> Iterator[tuple[str, str]]:
    if "logicalType" not in schema:
        return
    logical, base = schema["logicalType"], schema.get("type")
    bases = LOGICAL_TYPES.get(logical) if isinstance(logical, str) else None
    if bases is None:
        near = get_close_matches(str(logical), LOGICAL_TYPES, n=2)
        yield (
            where,
            f"unknown logicalType {logical!r}, readers ignore it; did you mean {' or '.join(near or ['none'])}?",
        )
    elif not isinstance(base, str) or base not in bases:
        yield (
            where,
            f"logicalType {logical} on {base!r} is ignored by readers; it belongs on {' or '.join(sorted(bases))}",
        )
    elif logical == "decimal" and not isinstance(schema.get("precision"), int):
        yield where, 'a decimal without its precision is ignored by readers; add "precision", and "scale" if it has one'


def _check_names(schema: Schema, where: str) -> Iterator[tuple[str, str]]:
    parts = f"{schema['namespace']}.{schema.get('name')}" if schema.get("namespace") else str(schema.get("name"))
    names = [*parts.split("."), *_list(schema, "symbols")]
    for name in [*names, *(part for alias in _list(schema, "aliases") for part in str(alias).split("."))]:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            yield where, f"{name!r} is no Avro name: letters, digits and _, not a digit first"
    if schema.get("name") in PLAIN:
        yield where, f"{schema['name']} is the name of one of Avro's own types; rename yours"


def _check_fields(schema: Schema, where: str) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    members = schema.get("fields")
    if not isinstance(members, list):
        yield where, "a record has a list of fields"
        return
    for field in members:
        if not isinstance(field, dict) or not isinstance(field.get("name"), str):
            yield where, "each field is an object with a name and a type"
            continue
        name = field["name"]
        place = f"{where}.{name}"
        for one in (name, *_list(field, "aliases")):
            if not isinstance(one, str) or not NAME.fullmatch(one):
                yield place, f"{one!r} is no Avro name: letters, digits and _, not a digit first"
        if name in seen:
            yield place, "second field of this name; remove or rename one"
        seen.add(name)
        if "logicalType" in field:
            inside = json.dumps({"type": field.get("type"), "logicalType": field["logicalType"]})
            yield place, f'logicalType stands beside the type, where readers ignore it; write "type": {inside}'
        yield from _check_type(field.get("type"), place)


def _members(schema: Any, where: str) -> Iterator[tuple[str, Schema]]:
    """Every field of every record in a schema without a problem, by its place."""
    if isinstance(schema, list):
        for branch in schema:
            yield from _members(branch, where)
    elif isinstance(schema, dict):
        for field in schema.get("fields", ()):
            place = f"{where}.{field['name']}"
            yield place, field
            yield from _members(field["type"], place)
        for inner, place in (("type", where), ("items", f"{where}[]"), ("values", f"{where}[]")):
            yield from _members(schema.get(inner), place)


def _advice(field: Schema) -> Iterator[str]:
    kind = field["type"]
    if not isinstance(kind, list) or "null" not in kind:
        return
    if "default" not in field:
        yield 'may be null and has no default, so that no reader can do without it; put null first and "default": null'
    elif field["default"] is None and kind[0] != "null":
        yield "its default is null, which is not the first type of its union: readers before Avro 1.12 refuse that"


def _duplicates(schemas: Mapping[Path, Schema]) -> Iterator[Problem]:
    """Records, topics and event types that two files claim."""
    owners: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for file, schema in schemas.items():
        names = {("record", full_name(schema)), ("topic", schema["topic"])}
        names |= {("event type", name) for name in event_types(schema) if name != full_name(schema)}
        for what in names:
            owners[what].append(file)
    for (kind, name), files in sorted(owners.items()):
        for file in files[1:]:
            yield Problem(file, kind, f"{name} is already in {files[0]}; rename one of them")


def _list(schema: Schema, what: str) -> list[Any]:
    found = schema.get(what)
    return found if isinstance(found, list) else []


def _base(schema: Any) -> Any:
    return schema.get("type") if isinstance(schema, dict) else schema


def _is_enum(schema: Any) -> TypeGuard[Schema]:
    return isinstance(schema, dict) and schema.get("type") == "enum"
