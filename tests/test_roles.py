"""Each role may do what its part needs, and nothing else. (What it needs: the tests of writer, inbox, queries and relay
run in these roles.)"""

from collections.abc import Iterator

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql

from outbox.__main__ import main
from outbox.errors import UsageError
from outbox.roles import _GRANTS, Roles, grants
from outbox.tables import tables
from tests.roles import ROLES, as_role
from tests.servers import Postgres

# Also what is granted on single columns only.
PRIVILEGES = """
SELECT DISTINCT relname, privilege FROM pg_class c, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE',
                                                                 'REFERENCES', 'TRIGGER']) AS privilege
 WHERE relnamespace = 'outbox'::regnamespace AND relkind IN ('r', 'v')
   AND CASE WHEN privilege IN ('DELETE', 'TRUNCATE', 'TRIGGER') THEN has_table_privilege(%(role)s, c.oid, privilege)
            ELSE has_any_column_privilege(%(role)s, c.oid, privilege) END
"""


def may(database: str, role: str) -> dict[str, set[str]]:
    """What PostgreSQL says of the role: relation → privileges."""
    found: dict[str, set[str]] = {}
    with psycopg.connect(database) as connection:
        for relation, privilege in connection.execute(PRIVILEGES, {"role": role}):
            found.setdefault(relation, set()).add(privilege)
    return found


def test_a_writer_inserts_and_can_do_nothing_else(database: str) -> None:
    assert may(database, ROLES.writer) == {name: {"INSERT"} for name in ("outbox", "outboxevent", "avro_schema")}


def test_a_relay_writes_no_events_and_has_no_part_in_consumers_tables(database: str) -> None:
    found = may(database, ROLES.relay)
    assert found.pop("lane") == {"SELECT", "UPDATE"}
    assert found.pop("outbox") == {"SELECT", "DELETE"}
    assert found.pop("relay") == {"SELECT", "INSERT", "UPDATE", "DELETE"}
    assert found.pop("dead_event") == {"SELECT", "INSERT", "UPDATE"}
    assert found.pop("meta") == {"SELECT", "UPDATE"}
    assert found == {"avro_schema": {"SELECT"}, "alembic_version": {"SELECT"}}
    with psycopg.connect(as_role(database, ROLES.relay)) as connection, refused():
        connection.execute("UPDATE outbox.meta SET uuid = gen_random_uuid()")  # home alone


def test_a_consumer_has_no_part_in_the_outbox(database: str) -> None:
    found = may(database, ROLES.inbox)
    assert {name for name, privileges in found.items() if privileges - {"SELECT"}} == {
        "inbox",
        "consumer_partition",
        "consumer_attempt",
        "dead_message",
    }
    assert found.keys() & {"outbox", "outboxevent", "lane", "meta", "relay", "dead_event"} == set()


def refused() -> pytest.RaisesExc[psycopg.Error]:
    return pytest.raises(psycopg.errors.InsufficientPrivilege)


@pytest.mark.parametrize("role", [ROLES.writer, ROLES.relay, ROLES.inbox])
def test_no_role_makes_anything_in_the_outbox_s_schema(database: str, role: str) -> None:
    with psycopg.connect(as_role(database, role)) as connection, refused():
        connection.execute("CREATE TABLE outbox.mine ()")


def test_every_table_is_decided_on() -> None:
    ours = {table.name for table in tables().tables.values()}
    assert _GRANTS.keys() == ours | {"alembic_version", "outboxevent"}


# --- The command ---


@pytest.fixture
def strange(postgres: Postgres) -> Iterator[Roles]:
    """Names that must be quoted, of roles that are not there before and after."""
    roles = Roles(writer='Wri"ter', relay="re'lay", inbox="in box")
    yield roles
    for role in (roles.writer, roles.relay, roles.inbox):
        postgres.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(role)))


def test_the_script_can_be_repeated_and_names_are_quoted(database: str, strange: Roles) -> None:
    names = ["--writer", strange.writer, "--relay", strange.relay, "--inbox", strange.inbox]
    script = CliRunner().invoke(main, ["sql", "--roles", *names]).stdout
    assert script == grants(strange)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(script)
        connection.execute(script)
        assert may(database, strange.writer) == may(database, ROLES.writer)
        assert may(database, strange.relay) == may(database, ROLES.relay)
        assert may(database, strange.inbox) == may(database, ROLES.inbox)
        connection.execute("DROP SCHEMA outbox CASCADE")  # so that the roles can go


def test_one_role_may_have_every_part(database: str) -> None:
    script = grants(Roles(writer=ROLES.writer, relay=ROLES.writer, inbox=ROLES.writer))
    assert script.count("CREATE ROLE") == 1
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(script)
    assert may(database, ROLES.writer).keys() == _GRANTS.keys()


def test_the_default_names_are_the_documented_ones() -> None:
    script = CliRunner().invoke(main, ["sql", "--roles", "--schema", "shop"]).stdout
    assert 'GRANT INSERT ON "shop".outbox TO "outbox_writer";' in script
    assert {"outbox_writer", "outbox_relay", "outbox_inbox"} == {ROLES.writer, ROLES.relay, ROLES.inbox}


@pytest.mark.parametrize("name", ["", "a$b", "a\0b", "x" * 64])
def test_a_name_that_no_role_can_have_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="role"):
        Roles(writer=name)
