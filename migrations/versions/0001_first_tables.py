"""The first tables: the outbox, its lanes and relays, schemas, dead events, the inbox, what consumers keep.

SQL as it was released, apart from the schema's name, the outbox's name and the number of lanes. outbox/tables.py says
why each column is what it is. A released revision is never edited.
"""

import re

from alembic import op

from outbox.migrate import Settings, settings_of

revision = "0001"
down_revision = None
branch_labels = ("outbox",)
depends_on = None

TABLES = """
CREATE TABLE {schema}.outbox (
    lane        smallint    GENERATED ALWAYS AS ({lane}) STORED NOT NULL,
    seq         bigint      GENERATED ALWAYS AS IDENTITY (CACHE 1),
    id          uuid        NOT NULL DEFAULT gen_random_uuid(),
    type        text        NOT NULL,
    topic       text        NOT NULL,
    key         text,
    value       bytea,
    fingerprint bigint,
    headers     jsonb,
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (lane, seq),
    CONSTRAINT outbox_headers_are_texts
        CHECK (jsonb_typeof(headers) IN ('object', 'null')
               AND NOT headers @? 'strict $.* ? (@.type() != "string" && @.type() != "null")'),
    CONSTRAINT outbox_headers_not_the_relays
        CHECK (NOT headers ?| ARRAY['ce_specversion', 'ce_id', 'ce_type', 'ce_source', 'ce_time']
               AND (fingerprint IS NULL OR NOT headers ? 'content-type'))
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 10000,
    autovacuum_vacuum_cost_delay = 0,
    autovacuum_vacuum_insert_threshold = -1
);
CREATE FUNCTION {schema}.route_outboxevent() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        NEW.id := coalesce(NEW.id, gen_random_uuid());
        INSERT INTO {schema}.outbox (id, type, topic, key, value, headers)
        VALUES (NEW.id, NEW.type, TG_ARGV[0] || NEW.aggregatetype, NEW.aggregateid,
                convert_to(NEW.payload::text, 'UTF8'),
                CASE WHEN NEW.payload IS NULL THEN NEW.headers
                     ELSE '{{"content-type": "application/json"}}' || coalesce(NEW.headers, '{{}}') END);
        RETURN NEW;
    END $$;
CREATE VIEW {schema}.outboxevent AS
    SELECT NULL::uuid AS id, NULL::text AS aggregatetype, NULL::text AS aggregateid, NULL::text AS type,
           NULL::json AS payload, NULL::jsonb AS headers
     WHERE false;
CREATE TRIGGER route INSTEAD OF INSERT ON {schema}.outboxevent
    FOR EACH ROW EXECUTE FUNCTION {schema}.route_outboxevent('outbox.event.');
CREATE TABLE {schema}.lane (
    lane        smallint PRIMARY KEY,
    batch       bigint   NOT NULL DEFAULT 0,
    released    boolean  NOT NULL DEFAULT true,
    owner       uuid,
    lease_until timestamptz,
    halted      text
) WITH (
    fillfactor = 10,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0
);
CREATE TABLE {schema}.relay (
    id         uuid        PRIMARY KEY,
    host       text        NOT NULL,
    pid        integer     NOT NULL,
    version    text        NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    seen_at    timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);
CREATE TABLE {schema}.avro_schema (
    fingerprint bigint      PRIMARY KEY,
    subject     text        NOT NULL,
    schema      text        NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE {schema}.dead_event (
    id          uuid        PRIMARY KEY,
    lane        smallint    NOT NULL,
    seq         bigint      NOT NULL,
    type        text        NOT NULL,
    topic       text        NOT NULL,
    key         text,
    value       bytea,
    fingerprint bigint,
    headers     jsonb,
    created_at  timestamptz NOT NULL,
    error       text        NOT NULL,
    attempts    integer     NOT NULL,
    died_at     timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE {schema}.meta (
    one        boolean     DEFAULT true PRIMARY KEY,
    name       text        NOT NULL,
    uuid       uuid        NOT NULL,
    lanes      smallint    NOT NULL,
    home       text        NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT meta_one_row CHECK (one),
    CONSTRAINT meta_name_is_legal_in_kafka
        CHECK (name ~ '^[a-zA-Z0-9._-]{{1,200}}$' AND name <> '.' AND name <> '..'),
    CONSTRAINT meta_lanes_in_range CHECK (lanes >= 1 AND lanes <= 1024)
);
CREATE TABLE {schema}.inbox (
    consumer     text        NOT NULL,
    event_id     uuid        NOT NULL,
    processed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, event_id)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 50000);
CREATE TABLE {schema}.consumer_partition (
    consumer  text    NOT NULL,
    topic     text    NOT NULL,
    partition integer NOT NULL,
    clean     boolean NOT NULL,
    PRIMARY KEY (consumer, topic, partition)
);
CREATE TABLE {schema}.consumer_attempt (
    consumer text    NOT NULL,
    event_id uuid    NOT NULL,
    attempts integer NOT NULL,
    PRIMARY KEY (consumer, event_id)
);
CREATE TABLE {schema}.dead_message (
    consumer     text        NOT NULL,
    event_id     uuid        NOT NULL,
    seq          bigint      GENERATED ALWAYS AS IDENTITY,
    topic        text        NOT NULL,
    partition    integer     NOT NULL,
    position     bigint      NOT NULL,
    sent_at      timestamptz,
    key          bytea,
    key_digest   bytea,
    value        bytea,
    headers      jsonb       NOT NULL,
    reason       text        NOT NULL,
    error        text        NOT NULL,
    stack        text,
    attempts     integer     NOT NULL,
    died_at      timestamptz NOT NULL DEFAULT now(),
    retry_at     timestamptz,
    published_at timestamptz,
    PRIMARY KEY (consumer, event_id)
);
CREATE INDEX dead_message_key ON {schema}.dead_message (consumer, topic, key_digest, seq);
INSERT INTO {schema}.lane (lane) SELECT generate_series(0, {lanes} - 1);
INSERT INTO {schema}.meta (name, uuid, lanes, home)
SELECT {name}, gen_random_uuid(), {lanes}, concat(system_identifier, '/', oid)
  FROM pg_control_system(), pg_database WHERE datname = current_database();
"""

LANE_OF_ONE = "0"
LANE_OF_KEY = "mod(hashtext(coalesce(key, id::text)) & 2147483647, {lanes})"


def upgrade() -> None:
    for statement in statements(settings_of(op)):
        op.execute(statement)


def statements(settings: Settings) -> list[str]:
    """The revision's SQL, one statement an item: asyncpg prepares one at a time."""
    lane = LANE_OF_ONE if settings.lanes == 1 else LANE_OF_KEY.format(lanes=settings.lanes)
    sql = TABLES.format(schema=settings.quoted_schema, lane=lane, lanes=settings.lanes, name=settings.sql_name)
    return [statement.strip() for statement in re.split(r";\n(?! )", sql) if statement.strip()]  # a body is indented


def downgrade() -> None:
    raise NotImplementedError(
        "a downgrade would drop committed events; to remove an empty outbox: DROP SCHEMA … CASCADE"
    )
