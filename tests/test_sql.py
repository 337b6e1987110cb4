"""Plain SQL is a contract: what docs/sql.md shows is run by psql, by a trigger, by Node, and read back from Kafka."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from tests.conftest import MakeTopic
from tests.relay_process import ROOT, Site, check_exactly_once, headers_of
from tests.roles import ROLES, as_role
from tests.servers import Kafka, ServerUnavailable, cache
from tests.servers.choice import is_forced
from tests.servers.postgres import find_binaries

NODE = Path(__file__).parent / "node"


def program(name: str, *places: Path) -> str:
    """The path of a program of this machine; without it the test is skipped, or fails where nothing may be skipped."""
    found = next((str(place / name) for place in places if (place / name).exists()), None) or shutil.which(name)
    if found is None:
        if is_forced():
            raise ServerUnavailable(f"`{name}` is not installed, and this test needs it")
        pytest.skip(f"install `{name}` to run this test")
    return found


def psql(url: str, script: str) -> None:
    command = [program("psql", *filter(None, [find_binaries()])), "-X", "-q", "-v", "ON_ERROR_STOP=1", url]
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def node(script: Path, *arguments: str) -> None:
    """With the packages that package-lock.json names, installed once for this machine."""
    npm, lock = program("npm"), (NODE / "package-lock.json").read_bytes()

    def install(folder: Path) -> None:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(NODE / name, folder)
        subprocess.run([npm, "ci", "--ignore-scripts", "--silent"], cwd=folder, check=True)

    installed = cache.once(f"node-{hashlib.sha256(lock).hexdigest()[:12]}", install)
    environment = {**os.environ, "NODE_PATH": str(installed / "node_modules")}
    command = [program("node"), str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


# ---- to Kafka and back -----------------------------------------------------------------------------------------------

ORDERS = f"""
CREATE TABLE orders (id int PRIMARY KEY, state text NOT NULL);
INSERT INTO orders VALUES (7, 'NEW'), (8, 'NEW');
GRANT SELECT, UPDATE ON orders TO {ROLES.writer};
GRANT INSERT ON ledger TO {ROLES.writer};
"""

BY_A_WRITER = """
BEGIN;
UPDATE orders SET state = 'SHIPPED' WHERE id = 7;
INSERT INTO outbox.outbox (type, topic, key, value)
VALUES ('shop.NOTED', 'shop.orders', 'note', convert_to('any text €', 'UTF8'));
INSERT INTO outbox.outbox (type, topic, key) VALUES ('shop.FORGOTTEN', 'shop.orders', 'tombstone');
INSERT INTO outbox.outboxevent (aggregatetype, aggregateid, type, payload) VALUES ('Order', '7', 'Renamed', '[1.0, 1]');
COMMIT;
BEGIN;
INSERT INTO outbox.outbox (type, topic, key) VALUES ('shop.LOST', 'shop.orders', 'lost');
ROLLBACK;
"""


@pytest.fixture
def site(database: str, kafka: Kafka) -> Iterator[Site]:
    with Site(database, kafka.bootstrap) as site:
        site.rows(ORDERS)
        yield site


def documented() -> str:
    """Every block of SQL in docs/sql.md, in order."""
    return "\n".join(re.findall(r"^```sql\n(.*?)^```", (ROOT / "docs/sql.md").read_text(), re.MULTILINE | re.DOTALL))


def test_events_of_psql_of_a_trigger_and_of_node_reach_kafka_as_they_were_written(
    site: Site, topic: MakeTopic, kafka: Kafka
) -> None:
    orders, unique = topic(), uuid4().hex[:8]
    by_default = kafka.create_topic(f"outbox.event.Order-{unique}", 1)
    by_prefix = kafka.create_topic(f"test-{unique}.Order-{unique}", 1)

    def own(script: str) -> str:
        """For topics that no other test knows."""
        names = {"'shop.orders'": orders, "'Order'": f"Order-{unique}", "'shop.'": f"test-{unique}."}
        for name, ours in names.items():
            script = script.replace(name, f"'{ours}'")
        return script

    writer = as_role(site.url, ROLES.writer)
    psql(site.url, own(documented()))
    psql(writer, own(BY_A_WRITER))
    node(NODE / "insert.cjs", writer, orders, f"Order-{unique}")

    site.taken()
    sessions = site.rows("SELECT DISTINCT usename FROM pg_stat_activity WHERE datname = current_database()")
    assert (ROLES.relay,) in sessions
    found = [
        (message.topic(), text(message.key()), kind, text(message.value()), own_headers)
        for message in check_exactly_once(site)
        for kind, own_headers in [said_by(headers_of(message))]
    ]
    as_json = {"content-type": "application/json"}
    of_node = {**as_json, "tenant": "acme"}
    assert [one for one in found if one[0] == orders] == [
        (orders, "7", "shop.ORDER_PAID", '{"order": 7}', as_json),
        (orders, "7", "shop.ORDER_SHIPPED", '{"id": 7, "state": "SHIPPED"}', as_json),
        (orders, "note", "shop.NOTED", "any text €", {}),
        (orders, "tombstone", "shop.FORGOTTEN", None, {}),
        (orders, "7", "shop.ORDER_PAID", '{"id": 7, "state": "PAID"}', as_json),
        (orders, "7", "shop.PAID_BY_NODE", '{"order":7}', of_node),
    ]
    assert [one for one in found if one[0] == by_default] == [(by_default, "7", "OrderPaid", '{"order": 7}', as_json)]
    assert [one for one in found if one[0] == by_prefix] == [
        (by_prefix, "7", "Renamed", "[1.0, 1]", as_json),
        (by_prefix, "7", "PaidByNode", '{"euro": "€", "order": 7}', as_json),  # jsonb is taken too, in its own order
    ]
    assert len(found) == 9


def text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()


def said_by(headers: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The event's type, and what is not the relay's of the headers."""
    return headers["ce_type"], {name: value for name, value in headers.items() if not name.startswith("ce_")}


# ---- what the database says ------------------------------------------------------------------------------------------


@pytest.fixture
def rows(database: str) -> Iterator["Rows"]:
    with psycopg.connect(as_role(database, ROLES.writer)) as writer, psycopg.connect(database) as owner:
        yield Rows(writer, owner)


class Rows:
    """Statements of a writer, and what the owner of the tables then finds."""

    def __init__(self, writer: psycopg.Connection[Any], owner: psycopg.Connection[Any]) -> None:
        self.writer = writer
        self.owner = owner

    def after(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        self.writer.execute(statement, parameters or None)
        self.writer.commit()
        query = "SELECT type, topic, key, value, fingerprint, headers FROM outbox.outbox ORDER BY seq"
        return self.owner.execute(query).fetchall()


def test_a_type_and_a_topic_are_enough(rows: Rows) -> None:
    found = rows.after("INSERT INTO outbox.outbox (type, topic) VALUES ('a', 't'), ('b', 't')")
    assert found == [("a", "t", None, None, None, None), ("b", "t", None, None, None, None)]
    [(ids, late)] = rows.owner.execute(
        "SELECT count(DISTINCT id), max(clock_timestamp() - created_at) < interval '1 min' FROM outbox.outbox"
    )
    assert (ids, late) == (2, True)


@pytest.mark.parametrize("left_out", ["type", "topic"])
def test_neither_of_them_may_be_left_out(rows: Rows, left_out: str) -> None:
    named = {"type": "topic", "topic": "type"}[left_out]
    with pytest.raises(psycopg.errors.NotNullViolation, match=left_out):
        rows.after(f"INSERT INTO outbox.outbox ({named}) VALUES ('x')")


HEADERS = "INSERT INTO outbox.outbox (type, topic, headers) VALUES ('a', 't', %s)"


@pytest.mark.parametrize("headers", [None, "null", "{}", '{"a": "b", "c": null}'])
def test_headers_are_texts_by_name(rows: Rows, headers: str | None) -> None:
    assert rows.after(HEADERS, headers)[0][5] == (None if headers is None else json.loads(headers))


@pytest.mark.parametrize(
    "headers",
    [
        "[]",
        '"a"',
        "1",
        "true",
        '{"a": 1}',
        '{"a": {"b": "c"}}',
        '{"a": ["b"]}',
        '{"a": "b", "c": false}',
        '[{"a": "b"}]',
    ],
)
def test_headers_that_kafka_cannot_carry_are_refused(rows: Rows, headers: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="outbox_headers_are_texts"):
        rows.after(HEADERS, headers)


@pytest.mark.parametrize("name", ["ce_specversion", "ce_id", "ce_type", "ce_source", "ce_time", "content-type"])
def test_the_relay_s_own_headers_are_refused_and_others_of_cloudevents_are_not(rows: Rows, name: str) -> None:
    insert = "INSERT INTO outbox.outbox (type, topic, fingerprint, value, headers) VALUES ('a', 't', 1, '', %s)"
    rows.after(insert, '{"ce_subject": "x", "ce_tenant": "acme"}')
    with pytest.raises(psycopg.errors.CheckViolation, match="outbox_headers_not_the_relays"):
        rows.after(insert, json.dumps({name: "x", "other": "y"}))


# ---- Debezium's columns ----------------------------------------------------------------------------------------------


def test_rows_of_debezium_s_columns_keep_their_order_and_their_text(rows: Rows) -> None:
    found = rows.after("""
        INSERT INTO outbox.outboxevent (aggregatetype, aggregateid, type, payload, headers)
        VALUES ('Order', '1', 'A', '{"b":1,  "a":1.0}', NULL),
               ('Order', '1', 'B', NULL, NULL),
               ('User', NULL, 'C', '"x"', '{"content-type": "application/vnd.api+json", "tenant": "acme"}')
    """)
    assert found == [
        ("A", "outbox.event.Order", "1", b'{"b":1,  "a":1.0}', None, {"content-type": "application/json"}),
        ("B", "outbox.event.Order", "1", None, None, None),
        ("C", "outbox.event.User", None, b'"x"', None, {"content-type": "application/vnd.api+json", "tenant": "acme"}),
    ]


def test_the_id_of_the_view_is_the_event_s_and_may_be_left_out(rows: Rows) -> None:
    given = uuid4()
    insert = "INSERT INTO outbox.outboxevent ({}) VALUES ({})"
    rows.after(insert.format("id, aggregatetype, type", f"'{given}', 'Order', 'A'"))
    rows.after(insert.format("aggregatetype, type", "'Order', 'A'"))
    (first,), (second,) = rows.owner.execute("SELECT id FROM outbox.outbox ORDER BY seq").fetchall()
    assert first == given != second


def test_an_aggregatetype_is_needed_and_a_payload_must_be_json(rows: Rows) -> None:
    with pytest.raises(psycopg.errors.NotNullViolation, match="topic"):
        rows.after("INSERT INTO outbox.outboxevent (type) VALUES ('A')")
    rows.writer.rollback()
    with pytest.raises(psycopg.errors.InvalidTextRepresentation, match="json"):
        rows.after("INSERT INTO outbox.outboxevent (aggregatetype, type, payload) VALUES ('Order', 'A', '{order: 7}')")


@pytest.mark.parametrize("statement", ["DELETE FROM outbox.outboxevent", "UPDATE outbox.outboxevent SET type = 'B'"])
def test_the_delete_behind_the_insert_is_refused_to_everyone(rows: Rows, statement: str) -> None:
    rows.after("INSERT INTO outbox.outboxevent (aggregatetype, type) VALUES ('Order', 'A')")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="outboxevent"):
        rows.owner.execute(statement)
