"""What a change of a schema breaks: which field of which record keeps which reader from which writer's events.

    unreadable(reader, writer)             what the reader cannot read, field by field
    check(new, earlier, level)             the same for a schema and its earlier versions, as the level asks
    differences(old, new)                  what was changed, for people

The verdicts are those of the `avro` package (the extra `check`); here they are followed down to the field. Two changes
that it lets pass are breaks all the same: another logical type (the bytes fit, the moment or the amount is another),
and another namespace of an enum or a fixed (Java's reader asks for the same full name).

Source: Avro specification 1.12, "Schema Resolution".
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from outbox.errors import SchemaError, UsageError
from outbox.schemas import Schema
from outbox.versions import Level, Version

try:
    from avro.compatibility import ReaderWriterCompatibilityChecker, SchemaCompatibilityType, lookup_writer_field
    from avro.errors import AvroException
    from avro.schema import (
        ArraySchema,
        EnumSchema,
        FixedSchema,
        MapSchema,
        NamedSchema,
        RecordSchema,
        UnionSchema,
        parse,
    )
    from avro.schema import Schema as Type
except ImportError as error:
    raise UsageError(f"schemas are compared with the extra: pip install 'kafka-outbox[check]' ({error})") from None


@dataclass(frozen=True, slots=True)
class Break:
    """One thing that a reader cannot read."""

    where: str
    """The record's full name and the path of the field."""
    what: str
    reader: str = "the reader"
    writer: str = "the writer"

    def __str__(self) -> str:
        return f"{self.where}: {self.what} (reader: {self.reader}, writer: {self.writer})"


def check(new: Version, earlier: Sequence[Version], level: Level) -> Iterator[Break]:
    """What a new version breaks. `earlier`: oldest first. Raises SchemaError where a version is no Avro schema."""
    for old in earlier if level.is_transitive else earlier[-1:]:
        pairs = [(new, old)] if level.is_backward else []
        pairs += [(old, new)] if level.is_forward else []
        for reader, writer in pairs:
            yield from _between(reader, writer)


def _between(reader: Version, writer: Version) -> list[Break]:
    try:
        found = unreadable(reader.schema, writer.schema)
    except SchemaError as error:
        raise SchemaError(f"between {reader.label} and {writer.label}: {error}") from error
    return [replace(one, reader=reader.label, writer=writer.label) for one in found]


def unreadable(reader: Schema, writer: Schema) -> list[Break]:
    """What `reader` cannot read, or would misread, of what `writer` may write; empty when it reads all of it."""
    ours, theirs = _parsed(reader), _parsed(writer)
    found = list(_Comparison().types(ours, theirs, _name(ours)))
    if not found and (why := _incompatible(ours, theirs)):
        return [Break(_name(ours), why)]
    return found


def _parsed(schema: Schema) -> Type:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it knows fewer logical types than the specification
            return parse(json.dumps(schema))
    except AvroException as error:
        raise SchemaError(f"{schema.get('name')}: not an Avro schema: {error}") from error


def _incompatible(reader: Type, writer: Type) -> str | None:
    """Why `reader` cannot read `writer`, in the checker's words; None when it can."""
    checker: Any = ReaderWriterCompatibilityChecker
    result = checker().get_compatibility(reader, writer)
    return None if result.compatibility is SchemaCompatibilityType.compatible else "; ".join(sorted(result.messages))


class _Comparison:
    """Walks a reader's and a writer's type side by side, down to what makes the checker say no."""

    def __init__(self) -> None:
        self._open: set[tuple[int, int]] = set()
        """The pairs that are being looked at: a type may hold itself."""

    def types(self, reader: Type, writer: Type, where: str) -> Iterator[Break]:
        pair = (id(reader), id(writer))
        if pair in self._open:
            return
        self._open.add(pair)
        if isinstance(reader, RecordSchema) and isinstance(writer, RecordSchema):
            yield from self._records(reader, writer, where)
        elif isinstance(reader, ArraySchema) and isinstance(writer, ArraySchema):
            yield from self.types(reader.items, writer.items, f"{where}[]")
        elif isinstance(reader, MapSchema) and isinstance(writer, MapSchema):
            yield from self.types(reader.values, writer.values, f"{where}[]")
        elif isinstance(reader, UnionSchema) or isinstance(writer, UnionSchema):
            for branch in _branches(writer):
                yield from self._branch(_branches(reader), branch, where)
        else:
            yield from _leaves(reader, writer, where)
        self._open.remove(pair)

    def _records(self, reader: RecordSchema, writer: RecordSchema, where: str) -> Iterator[Break]:
        if _incompatible_names(reader, writer):
            yield Break(where, _renamed(reader, writer))
        for field in reader.fields:
            place = f"{where}.{field.name}"
            written = lookup_writer_field(writer, field)
            if written is not None:
                yield from self.types(field.type, written.type, place)
            elif not field.has_default:
                yield Break(place, "the writer has no such field, and the reader's has no default; give it one")

    def _branch(self, readers: Sequence[Type], writer: Type, where: str) -> Iterator[Break]:
        """A branch of the writer's union, or its only type, for the branches of the reader's."""
        alike = [reader for reader in readers if _is_alike(reader, writer)] or (readers if len(readers) == 1 else ())
        if alike:
            yield from self.types(alike[0], writer, where)
        elif all(_incompatible(reader, writer) for reader in readers):
            yield Break(where, f"the writer's may be {_name(writer)}, the reader's only {_names(readers)}")


def _leaves(reader: Type, writer: Type, where: str) -> Iterator[Break]:
    """Types without parts."""
    ours, theirs = _logical(reader), _logical(writer)
    if isinstance(reader, NamedSchema) and isinstance(writer, NamedSchema) and _is_renamed(reader, writer):
        yield Break(where, _renamed(reader, writer))
    elif not _incompatible(reader, writer):
        if ours and theirs and ours != theirs:
            yield Break(where, f"the reader takes what is {theirs} for {ours}; add a field instead")
    elif isinstance(reader, EnumSchema) and isinstance(writer, EnumSchema):
        extra = ", ".join(symbol for symbol in writer.symbols if symbol not in reader.symbols)
        yield Break(where, f"the reader's enum has no {extra}, and no default; give the enum a default")
    elif isinstance(reader, FixedSchema) and isinstance(writer, FixedSchema):
        yield Break(where, f"the reader's has {reader.size} bytes, the writer's {writer.size}")
    else:
        yield Break(where, f"the reader's {_name(reader)} cannot read the writer's {_name(writer)}")


def _is_renamed(reader: NamedSchema, writer: NamedSchema) -> bool:
    return bool(reader.type == writer.type and reader.fullname != writer.fullname) and not _has_alias(reader, writer)


def _has_alias(reader: NamedSchema, writer: NamedSchema) -> bool:
    aliases = reader.props.get("aliases")
    return isinstance(aliases, list) and writer.fullname in aliases


def _incompatible_names(reader: NamedSchema, writer: NamedSchema) -> bool:
    """Records are matched by their names without the namespace."""
    return reader.name != writer.name and not _has_alias(reader, writer)


def _renamed(reader: NamedSchema, writer: NamedSchema) -> str:
    return (
        f"the reader's {reader.type} is {reader.fullname}, the writer's {writer.fullname}; keep the name, or give the"
        f' reader\'s "aliases": ["{writer.fullname}"]'
    )


def _is_alike(reader: Type, writer: Type) -> bool:
    """Whether a reader's branch is the one for a writer's: of the same type and, where it has one, name."""
    if isinstance(reader, NamedSchema) and isinstance(writer, NamedSchema):
        return reader.type == writer.type and not _incompatible_names(reader, writer)
    return bool(reader.type == writer.type)


def _branches(schema: Type) -> Sequence[Type]:
    return schema.schemas if isinstance(schema, UnionSchema) else (schema,)


def _logical(schema: Type) -> str:
    """The logical type, and the scale of a decimal: what a number means."""
    kind = schema.props.get("logicalType")
    if kind == "decimal":
        return f"decimal of scale {schema.props.get('scale', 0)}"
    return str(kind or "")


def _name(schema: Type) -> str:
    """A type in one word."""
    return str(schema.fullname if isinstance(schema, NamedSchema) else schema.type)


def _names(schemas: Sequence[Type]) -> str:
    return " or ".join(_name(schema) for schema in schemas)


# --- Differences, for people ---


STRUCTURE = frozenset({"type", "name", "namespace", "fields", "symbols", "size"})
"""What is compared part by part. All else is a property: default, doc, aliases, our own."""

LONGEST = 60
"""Characters of a property that are shown."""


def differences(old: Schema, new: Schema) -> list[str]:
    """What was changed, a line each: `+` is new, `-` is gone, `~` is another one; docs and our own properties too."""
    before, after = _parsed(old), _parsed(new)
    return list(_Difference().types(before, after, _name(before)))


class _Difference:
    """Walks an old and a new type side by side."""

    def __init__(self) -> None:
        self._open: set[tuple[int, int]] = set()

    def types(self, old: Type, new: Type, where: str) -> Iterator[str]:
        pair = (id(old), id(new))
        if pair in self._open:
            return
        self._open.add(pair)
        if isinstance(old, ArraySchema) and isinstance(new, ArraySchema):
            yield from self.types(old.items, new.items, f"{where}[]")
        elif isinstance(old, MapSchema) and isinstance(new, MapSchema):
            yield from self.types(old.values, new.values, f"{where}[]")
        else:
            yield from self._others(old, new, where)
        self._open.remove(pair)

    def _others(self, old: Type, new: Type, where: str) -> Iterator[str]:
        if _spelled(old) != _spelled(new):
            yield f"~ {where}: {_spelled(old)} → {_spelled(new)}"
        if isinstance(old, RecordSchema) and isinstance(new, RecordSchema):
            yield from _properties(old.props, new.props, where)
            yield from self._fields(old, new, where)
        elif isinstance(old, EnumSchema) and isinstance(new, EnumSchema):
            yield from _properties(old.props, new.props, where)
            yield from (f"+ {where}: symbol {one}" for one in new.symbols if one not in old.symbols)
            yield from (f"- {where}: symbol {one}" for one in old.symbols if one not in new.symbols)
        else:
            named = {_name(branch): branch for branch in _branches(old) if isinstance(branch, NamedSchema)}
            for branch in _branches(new):
                if _name(branch) in named:
                    yield from self.types(named[_name(branch)], branch, where)

    def _fields(self, old: RecordSchema, new: RecordSchema, where: str) -> Iterator[str]:
        kept = set()
        for field in new.fields:
            place = f"{where}.{field.name}"
            before = lookup_writer_field(old, field)
            if before is None:
                default = f" = {json.dumps(field.default)}" if field.has_default else ""
                yield f"+ {place}: {_spelled(field.type)}{default}"
                continue
            kept.add(before.name)
            if before.name != field.name:
                yield f"~ {place}: was {before.name}"
            yield from _properties(before.props, field.props, place)
            yield from self.types(before.type, field.type, place)
        yield from (f"- {where}.{one.name}: {_spelled(one.type)}" for one in old.fields if one.name not in kept)


def _properties(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> Iterator[str]:
    for name in sorted((old.keys() | new.keys()) - STRUCTURE):
        before, after = (_shown(props, name) for props in (old, new))
        if before != after:
            changed = f"{before} → {after}" if len(before + after) <= LONGEST else "changed"
            yield f"~ {where}: {name} {changed}"


def _shown(props: Mapping[str, Any], name: str) -> str:
    return json.dumps(props[name], ensure_ascii=False) if name in props else "none"


def _spelled(schema: Type) -> str:
    """A type in one line."""
    if isinstance(schema, UnionSchema):
        return " | ".join(_spelled(branch) for branch in schema.schemas)
    if isinstance(schema, ArraySchema):
        return f"array<{_spelled(schema.items)}>"
    if isinstance(schema, MapSchema):
        return f"map<{_spelled(schema.values)}>"
    size = f" ({schema.size} bytes)" if isinstance(schema, FixedSchema) else ""
    return f"{_name(schema)}{size}{f' ({_logical(schema)})' if _logical(schema) else ''}"
