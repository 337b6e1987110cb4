"""Messages as rows: the INSERTs into outbox and avro_schema, as SQL and parameters for a driver.

One statement for two rows and for ten thousand, so that it is prepared once: a parameter is a column, an array. asyncpg
takes lists, and sends them in PostgreSQL's binary form. For every other driver the arrays are written here, as the text
that PostgreSQL reads (https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO): psycopg would look at each
element of a list by itself, 17 µs a row instead of 10. (One JSON document with json_to_recordset takes 13, multi-row
VALUES and insertmanyvalues more. COPY in binary takes 7, but two round trips, and out of SQLAlchemy's sight.) A single
row is plain VALUES: 35 µs less than arrays of one.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from outbox.message import Message
from outbox.tables import quoted

# Headers by way of text: users of asyncpg set codecs for jsonb.
_ROW = """INSERT INTO {schema}.outbox (id, type, topic, key, value, fingerprint, headers)
VALUES (CAST({} AS uuid), CAST({} AS text), CAST({} AS text), CAST({} AS text), CAST({} AS bytea),
        CAST({} AS bigint), CAST(CAST({} AS text) AS jsonb))"""

_ROWS = """INSERT INTO {schema}.outbox (id, type, topic, key, value, fingerprint, headers)
SELECT id, type, topic, key, value, fingerprint, CAST(headers AS jsonb)
FROM unnest(CAST({} AS uuid[]), CAST({} AS text[]), CAST({} AS text[]), CAST({} AS text[]),
            CAST({} AS bytea[]), CAST({} AS bigint[]), CAST({} AS text[]))
    WITH ORDINALITY AS e (id, type, topic, key, value, fingerprint, headers, n)
ORDER BY n"""

# Sorted, so that two first writers of several schemas cannot wait for each other in a circle.
_SCHEMAS = """INSERT INTO {schema}.avro_schema (fingerprint, subject, schema)
SELECT fingerprint, subject, schema
FROM unnest(CAST({} AS bigint[]), CAST({} AS text[]), CAST({} AS text[])) AS s (fingerprint, subject, schema)
ORDER BY fingerprint
ON CONFLICT DO NOTHING"""

_WITH_SCHEMAS = f"WITH schemas AS ({_SCHEMAS})\n"

_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode

Query = tuple[str, tuple[Any, ...]]
"""SQL and its parameters."""


class StoredSchema(NamedTuple):
    """A row of avro_schema."""

    fingerprint: int
    subject: str
    schema: str


Element = Callable[[Any], str]
"""Writes a value that is not null as an element of an array."""


def _text(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _bytea(value: bytes) -> str:
    return '"\\\\x' + value.hex() + '"'


def _uuid(value: UUID) -> str:
    return value.hex


_OF_MESSAGE: tuple[Element, ...] = (_uuid, _text, _text, _text, _bytea, str, _text)
_OF_SCHEMA: tuple[Element, ...] = (str, _text, _text)


class Driver(NamedTuple):
    """How a driver wants its parameters."""

    placeholder: str
    """`{}` is its number."""
    percent: str
    """A percent sign in the statement."""
    array: Callable[[Element, Iterable[Any]], Any]


def _written(element: Element, column: Iterable[Any]) -> str:
    return "{" + ",".join(["NULL" if value is None else element(value) for value in column]) + "}"


ASYNCPG = Driver("${}", "%", lambda _, column: column)
OTHERS = Driver("%s", "%%", _written)


class Inserts:
    """The INSERTs of one outbox for one driver."""

    def __init__(self, schema: str, driver: Driver) -> None:
        """`schema`: the SQL schema."""

        name = quoted(schema).replace("%", driver.percent)

        def sql(template: str, count: int) -> str:
            return template.format(*map(driver.placeholder.format, range(1, count + 1)), schema=name)

        self._array = driver.array
        self._row, self._rows, self._schemas = sql(_ROW, 7), sql(_ROWS, 7), sql(_SCHEMAS, 3)
        self._row_with_schemas, self._rows_with_schemas = sql(_WITH_SCHEMAS + _ROW, 10), sql(_WITH_SCHEMAS + _ROWS, 10)

    def events(self, messages: Sequence[Message]) -> Query:
        """Of these messages, in their order."""
        return self._row if len(messages) == 1 else self._rows, self._of_messages(messages)

    def schemas(self, *schemas: StoredSchema) -> Query:
        """Of those that are not there yet; its rowcount says how many were not."""
        return self._schemas, self._arrays(_OF_SCHEMA, schemas)

    def events_with_schemas(self, messages: Sequence[Message], schemas: Sequence[StoredSchema]) -> Query:
        """Both in one statement."""
        sql = self._row_with_schemas if len(messages) == 1 else self._rows_with_schemas
        return sql, self._arrays(_OF_SCHEMA, schemas) + self._of_messages(messages)

    def _of_messages(self, messages: Sequence[Message]) -> tuple[Any, ...]:
        rows = [one if one.headers is None else (*one[:-1], _json(one.headers)) for one in messages]
        return rows[0] if len(rows) == 1 else self._arrays(_OF_MESSAGE, rows)

    def _arrays(self, elements: Sequence[Element], rows: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
        columns: Iterable[Sequence[Any]] = zip(*rows, strict=True) if rows else [()] * len(elements)
        return tuple(map(self._array, elements, columns))
