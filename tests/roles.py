"""The roles that an outbox knows, in a test's database, with a login: `outbox sql --roles` as a deployment runs it."""

import os
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql

from outbox.roles import Roles, _made, grants
from tests.servers.postgres import URL_VARIABLE

ROLES = Roles()

SERVICE = "outbox_test_service"
"""The user of a service that consumes and writes: it has the roles, as docs/sql.md says, and is none of them."""

OWNER = urlsplit(os.environ.get(URL_VARIABLE, "")).username or "postgres"
"""The user of the tests' servers, whom the tables belong to."""


def grant_roles(url: str) -> None:
    """Give each role its part in the database at `url`, and let it log in with that URL's password, if it has one."""
    password = urlsplit(url).password
    login = sql.SQL("ALTER ROLE {} LOGIN PASSWORD {}")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(grants())
        connection.execute(_made(SERVICE))
        connection.execute(f"GRANT {ROLES.writer}, {ROLES.inbox} TO {SERVICE}")
        for role in (ROLES.writer, ROLES.relay, ROLES.inbox, SERVICE):
            connection.execute(login.format(sql.Identifier(role), sql.Literal(password)))


def as_role(url: str, role: str) -> str:
    """The URL with another user."""
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    password = f":{parts.password}" if parts.password else ""
    return urlunsplit(parts._replace(netloc=f"{role}{password}@{place}"))
