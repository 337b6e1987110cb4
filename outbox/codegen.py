"""`outbox codegen`: .avsc files → one module of typed events, to be checked in.

The same schemas always give the same text, laid out as `ruff format` leaves it, clean under `mypy --strict`. Each
record becomes a frozen, slotted, keyword-only dataclass, each enum a StrEnum; uuid, timestamps and the other logical
types become Python's own. Where the record says what each of its event types has (`events`, outbox/schemas.py), each of
them becomes a constructor that asks for exactly that: a classmethod named as the symbol, in lower case. Nothing is
looked up at run time: the classes do not need the .avsc files.
"""

import difflib
import json
import keyword
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from outbox import schemas
from outbox.errors import SchemaError

REGENERATE = """Do not edit: change the .avsc files and run `outbox codegen SCHEMAS THIS_FILE` again.
`outbox codegen --check` finds a module that is stale.
"""

PLAIN = {"null": "None", "boolean": "bool", "int": "int", "long": "int", "float": "float", "double": "float"}
PLAIN |= {"bytes": "bytes", "fixed": "bytes", "string": "str"}
LOGICAL = {"string-uuid": "UUID", "int-date": "date", "int-time-millis": "time", "long-time-micros": "time"}
LOGICAL |= {"bytes-decimal": "Decimal", "fixed-decimal": "Decimal"}
LOGICAL |= {f"long-{local}timestamp-{unit}": "datetime" for local in ("", "local-") for unit in ("millis", "micros")}
IMPORTS = {
    "Mapping": "collections.abc",
    "Sequence": "collections.abc",
    "dataclass": "dataclasses",
    "field": "dataclasses",
    "date": "datetime",
    "datetime": "datetime",
    "time": "datetime",
    "Decimal": "decimal",
    "StrEnum": "enum",
    "Any": "typing",
    "ClassVar": "typing",
    "Self": "typing",
    "UUID": "uuid",
    "now": "outbox.message",
    "require_aware": "outbox.message",
    "uuid7": "outbox.message",
}
# A field or type of one of these names would hide what the module itself uses.
RESERVED = frozenset(IMPORTS) | {"str", "int", "float", "bool", "bytes", "dict", "list", "classmethod"}
RESERVED |= {"EVENTS", "AVRO_RECORD", "AVRO_FINGERPRINT", "to_avro", "from_avro", "cls"}
MADE = {"list": "[]", "dict": "{}"}
"""What a factory makes, where there is a shorter way to say it."""
WIDTH = 120


def generate(path: str | Path) -> str:
    """The text of the module for the .avsc files under `path`. Raises SchemaError, also for what Python cannot name."""
    files = schemas.load(path)
    module = _Module()
    events = [module.record(schemas.expand(schema), schemas.fingerprint(schema)) for schema in files.values()]
    title = "\n".join(
        textwrap.wrap(f'"""Typed events, made by `outbox codegen` from {", ".join(f.name for f in files)}.', 118)
    )
    listed = f"({events[0]},)" if len(events) == 1 else "(\n" + "".join(f"    {name},\n" for name in events) + ")"
    return f'{title}\n\n{REGENERATE}"""\n\n{module.imports()}\n\n{module.body()}\n\nEVENTS = {listed}\n'


@click.command("codegen")
@click.argument("folder", metavar="SCHEMAS", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--check", is_flag=True, help="Write nothing; exit 1 and show the difference when OUT is stale.")
def codegen(folder: Path, out: Path, *, check: bool) -> None:
    """Turn the .avsc files of SCHEMAS into OUT, one Python module of typed events."""
    try:
        text = generate(folder)
    except SchemaError as error:
        raise click.ClickException(str(error)) from error
    old = out.read_text(encoding="utf-8") if out.exists() else ""
    if not check:
        out.write_text(text, encoding="utf-8")
        click.echo(f"{out}: {'unchanged' if old == text else 'written'}")
    elif old != text:
        click.echo(_difference(old, text, out), nl=False)
        click.echo(f"{out} is stale; run: outbox codegen {folder} {out}", err=True)
        sys.exit(1)


def _difference(old: str, new: str, out: Path, limit: int = 40) -> str:
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), str(out), "generated now", n=1)
    shown = list(lines)
    more = f"… and {len(shown) - limit} lines more\n" if len(shown) > limit else ""
    return "".join(shown[:limit]) + more


@dataclass(frozen=True, slots=True)
class _Field:
    """One field of a dataclass."""

    name: str
    avro: str
    type: str
    given: str
    """The type without null, for an event that needs the field."""
    default: str
    """A literal; "" where there is none."""
    factory: str
    """Makes the default that is no literal; "" where there is none."""
    doc: str
    aware: bool
    to_avro: str
    from_avro: str

    @property
    def assigned(self) -> str:
        """What stands behind the annotation in the class."""
        if self.factory:
            return f" = field(default_factory={self.factory})"
        return f" = {self.default}" if self.default else ""

    @property
    def optional(self) -> str:
        """The parameter of a constructor that may be left out."""
        if self.factory:
            return f"{self.name}: {self.type.removesuffix(' | None')} | None = None"
        return f"{self.name}: {self.type}{self.assigned}"

    @property
    def passed(self) -> str:
        """The argument that makes of that parameter the field."""
        if not self.factory:
            return f"{self.name}={self.name},"
        return f"{self.name}={MADE.get(self.factory, f'{self.factory}()')} if {self.name} is None else {self.name},"


@dataclass(slots=True)
class _Module:
    """The classes met so far, each after those it needs, and the names they use."""

    classes: dict[str, str] = field(default_factory=dict)
    definitions: dict[str, Any] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def body(self) -> str:
        return "\n\n".join(self.classes.values())

    def imports(self) -> str:
        lines: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self.used, key=lambda name: (name != name.upper(), name)):
            lines[IMPORTS[name]].append(name)
        made = [f"from {module} import {', '.join(names)}\n" for module, names in sorted(lines.items())]
        ours = [line for line in made if line.startswith("from outbox")]
        return "".join([*(line for line in made if line not in ours), *(["\n"] if ours else []), *ours])

    def use(self, *names: str) -> None:
        self.used.update(names)

    def record(self, schema: Mapping[str, Any], event_fingerprint: int | None = None) -> str:
        """The class of a record, with all that it needs; its name."""
        name = self.claim(schema)
        if name in self.classes:
            return name
        envelope = event_fingerprint is not None
        members = [self.field(member, envelope=envelope) for member in schema["fields"]]
        if len({member.name for member in members}) < len(members):
            raise SchemaError(f"{schema['name']}: two fields would have the same name in Python; rename one")
        self.use("dataclass", "Any", "Mapping", "Self")
        self.classes[name] = "\n".join(self.record_lines(name, schema, members, event_fingerprint)) + "\n"
        return name

    def record_lines(
        self, name: str, schema: Mapping[str, Any], members: list[_Field], event_fingerprint: int | None
    ) -> Iterator[str]:
        yield "@dataclass(frozen=True, slots=True, kw_only=True)"
        yield f"class {name}:"
        yield from _doc(schema.get("doc") or f"{schema['name']}.")
        yield ""
        if event_fingerprint is not None:
            self.use("ClassVar")
            yield f'    AVRO_RECORD: ClassVar[str] = "{schema["name"]}"'
            yield f"    AVRO_FINGERPRINT: ClassVar[int] = {event_fingerprint}"
            yield ""
        for member in members:
            yield f"    {member.name}: {member.type}{member.assigned}"
            if member.doc:
                yield from _doc(member.doc)
        if any(member.aware for member in members):
            self.use("require_aware")
            yield ""
            yield "    def __post_init__(self) -> None:"
        for member in members:
            if member.aware:
                yield f'        require_aware(self.{member.name}, "{name}", "{member.avro}")'
        yield ""
        yield "    def to_avro(self) -> dict[str, Any]:"
        yield '        """The fields as Avro names them."""'
        yield "        return {"
        yield from (f'            "{member.avro}": {member.to_avro},' for member in members)
        yield "        }"
        yield ""
        yield "    @classmethod"
        yield "    def from_avro(cls, data: Mapping[str, Any]) -> Self:"
        yield '        """Out of the fields that Avro\'s reader gives."""'
        yield "        return cls("
        yield from (f"            {member.name}={member.from_avro}," for member in members)
        yield "        )"
        if event_fingerprint is not None:
            yield from self.constructors(schema, members)

    def constructors(self, schema: Mapping[str, Any], members: list[_Field]) -> Iterator[str]:
        """One for each event type that the schema says the fields of."""
        taken = {member.name for member in members}
        for symbol, said in schema.get("events", {}).items():
            name = _field_name(symbol.lower())
            if name in taken:
                raise SchemaError(f"{schema['name']}: {symbol}'s constructor {name} would hide a field or another one")
            taken.add(name)
            yield ""
            yield "    @classmethod"
            yield f"    def {name}("
            yield from self.constructor(schema, symbol, said, members)

    def constructor(
        self, schema: Mapping[str, Any], symbol: str, said: Mapping[str, Any], members: list[_Field]
    ) -> Iterator[str]:
        """Asks for what an event of this type needs, and takes nothing that makes no sense for it."""
        fields = schemas.fields(dict(schema))
        sets = {"event_type": symbol, **said.get("sets", {})}
        needed = [member for member in members if _is_needed(fields[member.avro], said) and member.avro not in sets]
        optional = [member for member in members if member.avro in said.get("takes", ())]
        optional += [member for member in members if schemas.is_envelope(fields[member.avro])]
        yield "        cls,"
        yield "        *,"
        yield from (f"        {member.name}: {member.given}," for member in needed)
        yield from (f"        {member.optional}," for member in optional)
        yield "    ) -> Self:"
        yield from _doc(said.get("doc") or f"A new {symbol}.", indent=8)
        yield "        return cls("
        for member in members:
            if member.avro in sets:
                value = sets[member.avro]
                constant = self.literal(value, schemas.branch_of(fields[member.avro]["type"], value))
                yield f"            {member.name}={constant},"
            elif member in needed:
                yield f"            {member.name}={member.name},"
            elif member in optional:
                yield from _wrapped(f"            {member.passed}")
        yield "        )"

    def field(self, member: Mapping[str, Any], *, envelope: bool) -> _Field:
        name = str(member["name"])
        python = _field_name(name)
        kind = self.type(member["type"])
        factory = self.factory(member, kind, envelope=envelope)
        return _Field(
            name=python,
            avro=name,
            type=kind,
            given=self.type(_without_null(member["type"])),
            default="" if factory or "default" not in member else self.literal(member["default"], member["type"]),
            factory=factory,
            doc=str(member.get("doc", "")),
            aware=_is_timestamp(member["type"]),
            to_avro=self.convert(member["type"], f"self.{python}", out=True),
            from_avro=self.convert(member["type"], f'data["{name}"]', out=False),
        )

    def type(self, schema: Any) -> str:
        """The Python type of an Avro type, as an annotation."""
        if isinstance(schema, list):
            kinds = list(dict.fromkeys(self.type(branch) for branch in schema))
            return " | ".join(sorted(kinds, key=lambda kind: kind == "None"))
        kind = _kind(schema)
        if kind == "array":
            self.use("Sequence")
            return f"Sequence[{self.type(schema['items'])}]"
        if kind == "map":
            self.use("Mapping")
            return f"Mapping[str, {self.type(schema['values'])}]"
        if kind == "record":
            return self.record(schema)
        if kind == "enum":
            return self.enum(schema)
        name = LOGICAL.get(f"{kind}-{schema.get('logicalType')}") if isinstance(schema, dict) else None
        self.use(*([name] if name else []))
        return name or PLAIN[kind]

    def enum(self, schema: Mapping[str, Any]) -> str:
        name = self.claim(schema)
        if name not in self.classes:
            self.use("StrEnum")
            members = [f'    {_symbol(symbol)} = "{symbol}"' for symbol in schema["symbols"]]
            doc = [*_doc(schema["doc"]), ""] if schema.get("doc") else []
            self.classes[name] = "\n".join([f"class {name}(StrEnum):", *doc, *members]) + "\n"
        return name

    def claim(self, schema: Mapping[str, Any]) -> str:
        """The class name of a named type. SchemaError where two types, or a type and the module, want one name."""
        full = schema["name"]
        name = _class_name(schema)
        if name in RESERVED or keyword.iskeyword(name):
            raise SchemaError(f"{full}: the module needs the name {name} itself; rename the type in the .avsc")
        other = self.definitions.setdefault(name, schema)
        if other["name"] != full:
            raise SchemaError(f"{full}: its class would have the name of {other['name']}'s; rename one of the types")
        if other != schema:
            raise SchemaError(f"{full} is defined twice, and differently; define it alike or rename one")
        return name

    def factory(self, member: Mapping[str, Any], kind: str, *, envelope: bool) -> str:
        """What makes a default that is no literal: envelope fields make themselves, lists and maps are made new."""
        factory = _envelope(member) if envelope else ""
        if not factory and "default" in member and kind.startswith(("Sequence", "Mapping")):
            factory = {"[]": "list", "{}": "dict"}.get(json.dumps(member["default"]), "")
        if factory:
            self.use("field", *({factory} & set(IMPORTS)))
        return factory

    def literal(self, value: Any, schema: Any) -> str:
        """A default that is one plain value; another (a record, a filled list) has to be given by the caller."""
        schema = schema[0] if isinstance(schema, list) else schema
        kind = self.type(schema)
        if value is None or (kind in ("bool", "int") and isinstance(value, int)):
            return str(value)
        if kind == "float":
            return repr(float(value))
        if kind == "str":
            return _quoted(value)
        if _kind(schema) == "enum":
            return f"{kind}.{_symbol(value)}"
        return ""

    def convert(self, schema: Any, value: str, *, out: bool) -> str:
        """The expression between a Python value and what Avro's writer takes (`out`) or its reader gives."""
        if isinstance(schema, list):
            return self.convert_union(schema, value, out=out)
        kind = _kind(schema)
        if kind == "array" and (inner := self.convert(schema["items"], "item", out=out)) != "item":
            return f"[{inner} for item in {value}]"
        if kind == "map" and (inner := self.convert(schema["values"], "item", out=out)) != "item":
            return f"{{key: {inner} for key, item in {value}.items()}}"
        if kind == "record":
            return f"{value}.to_avro()" if out else f"{_class_name(schema)}.from_avro({value})"
        if kind == "enum" and not out:
            return f"{_class_name(schema)}({value})"
        return value

    def convert_union(self, branches: list[Any], value: str, *, out: bool) -> str:
        rest = [branch for branch in branches if branch != "null"]
        inner = [self.convert(branch, value, out=out) for branch in rest]
        if all(text == value for text in inner):
            return value
        if len(rest) > 1:
            raise SchemaError(
                f"a union of several types with a record or an enum ({value}) has no typed form here; split it"
            )
        return inner[0] if len(branches) == 1 else f"None if {value} is None else {inner[0]}"


def _kind(schema: Any) -> str:
    return str(schema["type"] if isinstance(schema, dict) else schema)


def _class_name(schema: Mapping[str, Any]) -> str:
    return str(schema["name"]).rpartition(".")[2]


def _is_timestamp(schema: Any) -> bool:
    """True for what has to be an aware datetime."""
    if isinstance(schema, list):
        return any(_is_timestamp(branch) for branch in schema)
    return isinstance(schema, dict) and schema.get("logicalType") in ("timestamp-millis", "timestamp-micros")


def _envelope(member: Mapping[str, Any]) -> str:
    """The factory of a field that every event has and the catalogue fills in; "" for another."""
    if not schemas.is_envelope(dict(member)):
        return ""
    return {"event_id": "uuid7", "timestamp": "now", "metadata": "dict"}[member["name"]]


def _is_needed(member: Mapping[str, Any], said: Mapping[str, Any]) -> bool:
    """True for a field that its event type needs: it has no default, or `needs` names it."""
    if schemas.is_envelope(dict(member)):
        return False
    return "default" not in member or member["name"] in said.get("needs", ())


def _without_null(schema: Any) -> Any:
    """The type of a field that is there. A type that is null and nothing else stays."""
    rest = [branch for branch in schema if branch != "null"] if isinstance(schema, list) else []
    return rest or schema


def _wrapped(line: str) -> Iterator[str]:
    """`x=a if b else c,` as `ruff format` lays it out where it is too long for a line."""
    if len(line) <= WIDTH:
        yield line
        return
    start, end = line.split(" if ")
    condition, end = end.split(" else ")
    indent = " " * (len(line) - len(line.lstrip()))
    yield from (start, f"{indent}if {condition}", f"{indent}else {end}")


def _doc(text: str, indent: int = 4) -> Iterator[str]:
    """A docstring, so far in, wrapped."""
    clean = " ".join(str(text).split()).replace("\\", "\\\\").replace('"""', "'''")
    lines = textwrap.wrap(clean, WIDTH - indent - 10) or ["."]
    lines[0] = f" {lines[0]}" if lines[0].startswith('"') else lines[0]
    start = " " * indent
    if len(lines) == 1:
        yield f'{start}"""{lines[0]} """' if lines[0].endswith('"') else f'{start}"""{lines[0]}"""'
        return
    yield f'{start}"""{lines[0]}'
    yield from (f"{start}{line}" for line in lines[1:])
    yield f'{start}"""'


def _quoted(text: str) -> str:
    """A string literal, in the quotes that need fewer backslashes."""
    double = json.dumps(text, ensure_ascii=False)
    if text.count('"') <= text.count("'"):
        return double
    return "'" + double[1:-1].replace('\\"', '"').replace("'", "\\'") + "'"


def _field_name(name: str) -> str:
    """A field's name in Python: one that is a keyword, used by the module, or mangled gets an underscore at its end."""
    if keyword.iskeyword(name) or name in RESERVED or name.startswith("__"):
        return f"{name.lstrip('_')}_"
    return name


def _symbol(symbol: str) -> str:
    """A symbol's name in Python: str's methods and the enum's machinery keep theirs."""
    if (
        keyword.iskeyword(symbol)
        or hasattr(str, symbol)
        or symbol in ("name", "value", "mro")
        or symbol.startswith("_")
    ):
        return f"{symbol.strip('_')}_"
    return symbol
