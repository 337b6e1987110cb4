"""Who an outbox is: its name, its uuid, and the database that it lives in.

A copy of a database (CREATE DATABASE … TEMPLATE, a dump restored elsewhere) holds the same name and uuid. `meta.home`
tells it from the original: a relay refuses a database that is not the outbox's home, before it touches Kafka. `rename`
makes a copy an outbox of its own; `relay resolve --apply --adopt` makes this database the outbox's home.
"""

from typing import Any, Literal

import sqlalchemy as sa

from outbox.errors import UsageError
from outbox.migrate import check_name, check_version, current_version, with_connection
from outbox.tables import SCHEMA, check_schema, quoted

HERE = (
    "(SELECT concat(system_identifier, '/', oid) FROM pg_control_system(), pg_database"
    " WHERE datname = current_database())"
)
"""SQL: the database that one is connected to, as `meta.home` names it.

A promoted standby and a restore of the whole server keep it; CREATE DATABASE, pg_restore and pg_upgrade do not. A copy
of the whole server's files keeps it too: such a one is told from the original by the batch only.
"""

Events = Literal["publish", "discard"]


def rename(url: str, name: str, *, schema: str = SCHEMA, events: Events | None = None) -> int:
    """Give the outbox at `url` this name and a new uuid, and make that database its home; in one transaction.

    For a copy that shall live beside its original, and for a database whose outbox bears another one's name. Under the
    new name Kafka knows nothing of it: every lane begins anew, halted ones too.

    Args:
        events: what becomes of the events that wait in the outbox (and of the parked ones). `discard`: they are the
            original's. `publish`: under the new name, whether they were published under the old one or not. None: there
            are none, or they cannot have been published: this is no copy and each lane was left by a clean stop.

    Returned: how many events wait now. Raises UsageError where a relay is at work, or `events` must be said;
    MigrationError as `migrate`.
    """
    check_name(name)
    check_schema(schema)
    waiting = 0

    def work(connection: sa.Connection) -> None:
        nonlocal waiting
        check_version(current_version(connection, schema=schema), schema=schema)
        waiting = _rename(connection, quoted(schema), name, events)

    with_connection(url, work)
    return waiting


def _rename(connection: sa.Connection, s: str, name: str, events: Events | None) -> int:
    def run(statement: str) -> sa.CursorResult[Any]:
        return connection.execute(sa.text(statement), {"name": name})

    lanes = run(f"SELECT released, lease_until > clock_timestamp() AS held FROM {s}.lane FOR UPDATE").all()  # noqa: S608 - quoted
    if any(lane.held for lane in lanes):
        raise UsageError("a relay is at work on this outbox: stop it first, or wait until its lease has run out")
    if events == "discard":
        run(f"DELETE FROM {s}.outbox")  # noqa: S608 - quoted
        run(f"DELETE FROM {s}.dead_event")  # noqa: S608 - quoted
    count = int(run(f"SELECT count(*) FROM {s}.outbox").scalar_one())  # noqa: S608 - quoted
    copied = bool(run(f"SELECT home <> {HERE} FROM {s}.meta").scalar_one())  # noqa: S608 - quoted
    if count and events is None and (copied or not all(lane.released for lane in lanes)):
        whose = "this database is a copy, so they are the original's" if copied else "the last relay did not stop clean"
        raise UsageError(
            f"{count} events wait in the outbox, and they may be published already ({whose}): say --events discard, or "
            "--events publish to have them published under the new name"
        )
    run(f"UPDATE {s}.meta SET name = :name, uuid = gen_random_uuid(), home = {HERE}")  # noqa: S608 - quoted
    # The batch stays: a relay that was thought dead finds its number, not a new beginning.
    run(f"UPDATE {s}.lane SET released = true, owner = NULL, lease_until = NULL, halted = NULL")  # noqa: S608 - quoted
    return count
