"""Who may do what to an outbox: a role for writers, one for the relay, one for consumers; as SQL, for a person to run.

Each has what its part of this package needs, and nothing else (docs/sql.md, "Roles"). The owner of the tables, who
migrates, renames and resolves what is dead, needs no role here.
"""

from dataclasses import dataclass, fields

from outbox.errors import UsageError
from outbox.tables import SCHEMA, check_schema, quoted

_MAX_IDENTIFIER = 63  # bytes; PostgreSQL cuts longer names off without an error


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Their names. UsageError at construction for one that no role can have."""

    writer: str = "outbox_writer"
    """Of services that write events."""
    relay: str = "outbox_relay"
    inbox: str = "outbox_inbox"
    """Of services that consume events; of those that do both, beside `writer`."""

    def __post_init__(self) -> None:
        for part in fields(self):
            _check(getattr(self, part.name))


# Privileges on each relation, as GRANT has them. Every table stands here: whoever makes a new one decides who may.
_GRANTS: dict[str, dict[str, str]] = {
    "outbox": {"writer": "INSERT", "relay": "SELECT, DELETE"},  # an identity's sequence asks for no privilege
    "outboxevent": {"writer": "INSERT"},
    # ON CONFLICT DO NOTHING without a target reads nothing.
    "avro_schema": {"writer": "INSERT", "relay": "SELECT", "inbox": "SELECT"},
    "alembic_version": {"relay": "SELECT"},
    "meta": {"relay": "SELECT, UPDATE (home)"},  # home: `relay resolve --adopt`
    "lane": {"relay": "SELECT, UPDATE"},
    "relay": {"relay": "SELECT, INSERT, UPDATE, DELETE"},
    "dead_event": {"relay": "SELECT, INSERT, UPDATE"},
    "inbox": {"inbox": "SELECT, INSERT, DELETE, UPDATE (processed_at)"},  # a purge locks what it deletes
    "consumer_partition": {"inbox": "SELECT, INSERT, UPDATE"},
    "consumer_attempt": {"inbox": "SELECT, INSERT, UPDATE, DELETE"},
    "dead_message": {"inbox": "SELECT, INSERT, UPDATE, DELETE"},
}


def grants(roles: Roles | None = None, *, schema: str = SCHEMA) -> str:
    """A script for psql, one transaction: makes the roles that are not there (without a login), grants each its part.

    For a database whose tables are there. Safe to repeat, and to be repeated after a migration. It takes nothing away.
    """
    roles = roles or Roles()
    s = quoted(check_schema(schema))
    names = {part.name: getattr(roles, part.name) for part in fields(roles)}
    lines = [
        "-- The roles of an outbox. They have no login: GRANT them to the users of services, relays and consumers.",
        "BEGIN;",
        *(_made(name) for name in dict.fromkeys(names.values())),
        *(f"GRANT USAGE ON SCHEMA {s} TO {quoted(name)};" for name in dict.fromkeys(names.values())),
    ]
    for relation, parts in _GRANTS.items():
        lines += [f"GRANT {what} ON {s}.{relation} TO {quoted(names[part])};" for part, what in parts.items()]
    return "\n".join([*lines, "COMMIT;", ""])


def _made(role: str) -> str:
    """Looks first: where the roles are there, the right to make roles is not needed."""
    literal = role.replace("'", "''")
    return (
        f"DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{literal}') THEN"
        f" CREATE ROLE {quoted(role)}; END IF; END $$;"
    )


def _check(role: str) -> None:
    if not role or "\0" in role or "$" in role or len(role.encode()) > _MAX_IDENTIFIER:
        raise UsageError(f"{role!r} cannot be a role here: give 1 to {_MAX_IDENTIFIER} bytes, without $ and NUL")
