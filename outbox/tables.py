"""Every table of the outbox, as SQLAlchemy MetaData: what the revisions in migrations/ must arrive at.

`tables(schema, lanes)` describes; it creates nothing. The revisions are written out by hand as they were released, and
tests/test_tables.py compares the two in PostgreSQL's own catalogue. PostgreSQL 14 or newer.
"""

from functools import cache
from typing import Any

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    DateTime,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from outbox.errors import MigrationError, UsageError

SCHEMA = "outbox"
"""The SQL schema when none is named."""

MAX_LANES = 1_024
"""A lane is a partition of the control topic and two transactional ids: more than this is a mistake, not a plan."""

MAX_NAME = 200
"""Kafka takes 249 characters in a topic's name; ours carry suffixes such as `.lanes`."""

_NAME_PATTERN = f"^[a-zA-Z0-9._-]{{1,{MAX_NAME}}}$"
_MAX_IDENTIFIER = 63  # bytes; PostgreSQL cuts longer names off without an error
_NOT_OURS = ("public", "information_schema")


def check_schema(schema: str) -> str:
    """The SQL schema's name, if the outbox may have it for its own; UsageError otherwise.

    `public` is refused: a host that uses Alembic keeps its own `alembic_version` there, and ours would overwrite it.
    """
    if schema in _NOT_OURS or schema.startswith("pg_"):
        raise UsageError(
            f"the outbox cannot live in the SQL schema {schema!r}: name one of its own, such as {SCHEMA!r}"
        )
    if not schema or "\0" in schema or len(schema.encode()) > _MAX_IDENTIFIER:
        raise UsageError(f"{schema!r} is no name for a SQL schema: PostgreSQL takes 1 to {_MAX_IDENTIFIER} bytes")
    return schema


def check_lanes(lanes: int) -> int:
    """The number of lanes, if the outbox can have so many; UsageError otherwise."""
    if not 1 <= lanes <= MAX_LANES:
        raise UsageError(f"{lanes} lanes: an outbox has 1 (the default, and the fastest for one relay) to {MAX_LANES}")
    return lanes


def migrate_command(schema: str) -> str:
    """The command that makes or updates the tables of an outbox in this SQL schema."""
    return "outbox migrate URL" if schema == SCHEMA else f"outbox migrate --schema {schema} URL"


def missing_tables(schema: str) -> MigrationError:
    """What to raise where the tables are not there, or not as this code knows them."""
    return MigrationError(f"there is no outbox in the SQL schema {schema!r}: run `{migrate_command(schema)}`")


def quoted(identifier: str) -> str:
    """The identifier as SQL, always in quotes: it may be a reserved word."""
    return '"' + identifier.replace('"', '""') + '"'


def lane_expression(lanes: int) -> str:
    """SQL that gives a row its lane, as PostgreSQL prints it, so that Alembic finds no difference where there is none.

    From the key, so that one lane holds all of a key; from the id where there is no key. `hashtext` and the text of a
    uuid are IMMUTABLE, which a generated column demands. The mask takes the sign away. `mod`, not the percent sign,
    which some drivers and some modes of Alembic double.
    """
    return "0" if lanes == 1 else f"mod((hashtext(COALESCE(key, (id)::text)) & 2147483647), {lanes})"


@cache
def tables(schema: str = SCHEMA, lanes: int = 1) -> MetaData:
    """The MetaData of an outbox in this SQL schema with so many lanes. The same object for the same arguments."""
    metadata = MetaData(schema=check_schema(schema))
    _outbox(metadata, check_lanes(lanes))
    _lane(metadata)
    _relay(metadata)
    _avro_schema(metadata)
    _dead_event(metadata)
    _meta(metadata)
    _inbox(metadata)
    _consumer_partition(metadata)
    _consumer_attempt(metadata)
    _dead_message(metadata)
    return metadata


def _storage(options: dict[str, float]) -> list[tuple[str, Any]]:
    """Storage parameters, set after the CREATE TABLE: SQLAlchemy knows them as an argument of Table from 2.1 only."""
    listed = ", ".join(f"{name} = {value}" for name, value in options.items())
    statement = DDL(f"ALTER TABLE %(fullname)s SET ({listed})")  # type: ignore[no-untyped-call] # SQLAlchemy's gap
    return [("after_create", statement)]


def _moment(name: str, default: str = "now()") -> Column[Any]:
    return Column(name, DateTime(timezone=True), nullable=False, server_default=text(default))


def _record() -> list[Column[Any]]:
    """What becomes the Kafka record; the same in `outbox` and in `dead_event`, where it waits to be retried."""
    return [
        Column("type", Text, nullable=False),  # the header ce_type
        Column("topic", Text, nullable=False),
        Column("key", Text),  # null: no order is kept
        Column("value", LargeBinary),  # null: a tombstone
        Column("fingerprint", BigInteger),  # Avro CRC-64, signed; null: `value` is raw bytes
        Column("headers", JSONB),  # the event's own, text to text
    ]


def _outbox(metadata: MetaData, lanes: int) -> None:
    """A row that is there is not yet published; published means deleted.

    Plain INSERTs of any language are a contract (docs/sql.md): `type` and `topic` are all that they must name.
    """
    Table(
        "outbox",
        metadata,
        # The database computes the lane, so that no writer can put a key's events into two of them.
        Column("lane", SmallInteger, Computed(lane_expression(lanes), persisted=True), nullable=False),
        # CACHE 1: with a cached block of numbers a later transaction would write a lower seq than an earlier one.
        Column("seq", BigInteger, Identity(always=True, cache=1), nullable=False),
        # Not unique here: an index more would cost each write; readers use the inbox.
        Column("id", Uuid, nullable=False, server_default=text("gen_random_uuid()")),
        *_record(),
        # clock_timestamp(): the moment of the event, not of its transaction's start.
        _moment("created_at", "clock_timestamp()"),
        # The one access path: a lane in seq order. Deletes go by it too.
        PrimaryKeyConstraint("lane", "seq"),
        # What Kafka could not carry is refused at the INSERT, not parked behind its back; 1 µs for a row with headers.
        # The JSON null is what some mappers write for "none". strict: the lax mode would look into arrays.
        CheckConstraint(
            "jsonb_typeof(headers) IN ('object', 'null')"
            """ AND NOT headers @? 'strict $.* ? (@.type() != "string" && @.type() != "null")'""",
            name="outbox_headers_are_texts",
        ),
        # Said twice, a header would be one thing to this reader and another to that.
        CheckConstraint(
            "NOT headers ?| ARRAY['ce_specversion', 'ce_id', 'ce_type', 'ce_source', 'ce_time']"
            " AND (fingerprint IS NULL OR NOT headers ? 'content-type')",
            name="outbox_headers_not_the_relays",
        ),
        listeners=_outboxevent()
        + _storage(
            {
                # Every row dies young. By count, not by share of a size that swings between nothing and a backlog …
                "autovacuum_vacuum_scale_factor": 0,
                "autovacuum_vacuum_threshold": 10_000,
                # … at full speed, for dead rows come as fast as live ones …
                "autovacuum_vacuum_cost_delay": 0,
                # … and never for inserts alone: freezing a backlog that is about to be deleted is work for nothing.
                "autovacuum_vacuum_insert_threshold": -1,
            }
        ),
    )


TOPIC_PREFIX = "outbox.event."
"""What stands before `aggregatetype` in a topic's name: the default of Debezium's outbox event router."""


def _outboxevent() -> list[tuple[str, Any]]:
    """The view `outboxevent`: the columns of Debezium's outbox table, for services that write those (docs/sql.md).

    It can be inserted into, and nothing else: it selects from no table, so that PostgreSQL refuses the DELETE which
    Debezium's users put behind the INSERT. `payload` is json, not jsonb: the record gets the text as it was written.
    The topics' prefix is the trigger's argument, and stands nowhere else.
    """
    route = """CREATE FUNCTION %(schema)s.route_outboxevent() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        NEW.id := coalesce(NEW.id, gen_random_uuid());
        INSERT INTO %(schema)s.outbox (id, type, topic, key, value, headers)
        VALUES (NEW.id, NEW.type, TG_ARGV[0] || NEW.aggregatetype, NEW.aggregateid,
                convert_to(NEW.payload::text, 'UTF8'),
                CASE WHEN NEW.payload IS NULL THEN NEW.headers
                     ELSE '{"content-type": "application/json"}' || coalesce(NEW.headers, '{}') END);
        RETURN NEW;
    END $$"""
    view = """CREATE VIEW %(schema)s.outboxevent AS
    SELECT NULL::uuid AS id, NULL::text AS aggregatetype, NULL::text AS aggregateid, NULL::text AS type,
           NULL::json AS payload, NULL::jsonb AS headers
     WHERE false"""
    trigger = f"""CREATE TRIGGER route INSTEAD OF INSERT ON %(schema)s.outboxevent
    FOR EACH ROW EXECUTE FUNCTION %(schema)s.route_outboxevent('{TOPIC_PREFIX}')"""
    return [("after_create", DDL(sql)) for sql in (route, view, trigger)]  # type: ignore[no-untyped-call] # as above


def _lane(metadata: MetaData) -> None:
    """The state of each lane as the database knows it (docs/design.md, The lane protocol). Rows 0 … lanes - 1, and
    those of lanes that were given up (`relay lanes`), whose batches are numbered on should they come back."""
    Table(
        "lane",
        metadata,
        Column("lane", SmallInteger, primary_key=True, autoincrement=False),
        Column("batch", BigInteger, nullable=False, server_default=text("0")),  # the last batch whose rows were deleted
        # Starts true: "Kafka knows no progress" is right only before the first start and after a clean release.
        Column("released", Boolean, nullable=False, server_default=text("true")),
        Column("owner", Uuid),  # the relay that holds the lease; no foreign key: a lease outlives its relay's row
        Column("lease_until", DateTime(timezone=True)),  # by the database's clock; liveness only, never safety
        Column("halted", Text),  # the reason, until a person decides
        # Updated once a batch: room on the page for the new versions (HOT), so no index entry and little to vacuum.
        listeners=_storage(
            {
                "fillfactor": 10,
                "autovacuum_vacuum_scale_factor": 0,
                "autovacuum_vacuum_threshold": 1_000,
                "autovacuum_vacuum_cost_delay": 0,
            }
        ),
    )


def _relay(metadata: MetaData) -> None:
    """The live relays: what the fair share of lanes is counted from, and what status shows."""
    Table(
        "relay",
        metadata,
        Column("id", Uuid, primary_key=True),
        Column("host", Text, nullable=False),
        Column("pid", Integer, nullable=False),
        Column("version", Text, nullable=False),
        _moment("started_at"),
        _moment("seen_at"),
        # seen_at is written about once a second; no index on it, so that those updates stay on their page.
        listeners=_storage({"fillfactor": 50}),
    )


def _avro_schema(metadata: MetaData) -> None:
    """The writer's schema of every fingerprint in `outbox`. No foreign key: it would lock a row here for each event."""
    Table(
        "avro_schema",
        metadata,
        Column("fingerprint", BigInteger, primary_key=True, autoincrement=False),
        Column("subject", Text, nullable=False),  # <topic>-value
        # Text, not jsonb: jsonb reorders the members, and a registry's id belongs to the text.
        Column("schema", Text, nullable=False),
        _moment("created_at"),
    )


def _dead_event(metadata: MetaData) -> None:
    """Events that Kafka refused for good, and those of their key that wait behind them (docs/design.md, Poison)."""
    Table(
        "dead_event",
        metadata,
        Column("id", Uuid, primary_key=True),
        Column("lane", SmallInteger, nullable=False),  # a plain number here: where the event was
        Column("seq", BigInteger, nullable=False),
        *_record(),
        Column("created_at", DateTime(timezone=True), nullable=False),  # the event's, so without a default
        Column("error", Text, nullable=False),
        Column("attempts", Integer, nullable=False),
        _moment("died_at"),
    )


def _meta(metadata: MetaData) -> None:
    """Who this outbox is. The uuid travels in Kafka's progress: a restored or swapped database is noticed by it."""
    Table(
        "meta",
        metadata,
        Column("one", Boolean, primary_key=True, server_default=text("true")),  # with its check: one row at most
        Column("name", Text, nullable=False),  # group, control topic and transactional ids are built from it
        Column("uuid", Uuid, nullable=False),
        Column(
            "lanes", SmallInteger, nullable=False
        ),  # must agree with outbox.lane's expression and the rows of `lane`
        # The database that this outbox was made in, or moved to (outbox/identity.py: HERE). A copy lies elsewhere.
        Column("home", Text, nullable=False),
        _moment("created_at"),
        CheckConstraint("one", name="meta_one_row"),
        CheckConstraint(
            f"name ~ '{_NAME_PATTERN}' AND name <> '.' AND name <> '..'", name="meta_name_is_legal_in_kafka"
        ),
        CheckConstraint(f"lanes >= 1 AND lanes <= {MAX_LANES}", name="meta_lanes_in_range"),
    )


def _inbox(metadata: MetaData) -> None:
    """Which events a consumer has taken effect of."""
    Table(
        "inbox",
        metadata,
        Column("consumer", Text, nullable=False),
        Column("event_id", Uuid, nullable=False),
        _moment("processed_at"),
        PrimaryKeyConstraint("consumer", "event_id"),
        # Grows without dying, then dies in bulk (Inbox.purge). By count: a share of a large table would come too late.
        listeners=_storage({"autovacuum_vacuum_scale_factor": 0, "autovacuum_vacuum_threshold": 50_000}),
    )


def _consumer_partition(metadata: MetaData) -> None:
    """The partitions that members of a consumer have taken: one that was not left clean may hold what killed one."""
    Table(
        "consumer_partition",
        metadata,
        Column("consumer", Text, nullable=False),
        Column("topic", Text, nullable=False),
        Column("partition", Integer, nullable=False),
        Column("clean", Boolean, nullable=False),  # false from when it is taken until it is left with nothing at work
        PrimaryKeyConstraint("consumer", "topic", "partition"),
    )


def _consumer_attempt(metadata: MetaData) -> None:
    """Events whose handling was begun, kept after a death only: which of them was at work at the next one?"""
    Table(
        "consumer_attempt",
        metadata,
        Column("consumer", Text, nullable=False),
        Column("event_id", Uuid, nullable=False),
        Column("attempts", Integer, nullable=False),  # begun so many times, and never ended
        PrimaryKeyConstraint("consumer", "event_id"),
    )


def _dead_message(metadata: MetaData) -> None:
    """Messages that a consumer could not handle, as Kafka had them, and those of their key that wait behind them.

    Each is claimed in the inbox: no redelivery handles it. Its row is what is owed (docs/consuming.md, Dead messages).
    """
    Table(
        "dead_message",
        metadata,
        Column("consumer", Text, nullable=False),
        Column("event_id", Uuid, nullable=False),  # of a message without one: made from where it stood
        Column("seq", BigInteger, Identity(always=True), nullable=False),  # the order of a key
        Column("topic", Text, nullable=False),
        Column("partition", Integer, nullable=False),
        Column("position", BigInteger, nullable=False),  # its offset, which SQL has as a reserved word
        Column("sent_at", DateTime(timezone=True)),  # Kafka's timestamp
        Column("key", LargeBinary),
        Column("key_digest", LargeBinary),  # 16 bytes: a key may be longer than an index takes; null: no key
        Column("value", LargeBinary),
        Column("headers", JSONB, nullable=False),  # [[name, base64 or null], …]: names repeat, values are bytes
        Column("reason", Text, nullable=False),  # failed, undecodable, unknown, killed, held, trying
        Column("error", Text, nullable=False),
        Column("stack", Text),
        Column("attempts", Integer, nullable=False),
        _moment("died_at"),
        Column("retry_at", DateTime(timezone=True)),  # a person wants it tried again
        Column("published_at", DateTime(timezone=True)),  # to the dead letter topic
        PrimaryKeyConstraint("consumer", "event_id"),
        # Which keys are held, and what comes first of each.
        Index("dead_message_key", "consumer", "topic", "key_digest", "seq"),
    )
