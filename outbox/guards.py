"""Guard rails a service can ask for: how many events may wait; a warning where the order of a key is left to chance."""

import inspect
import warnings
from collections.abc import Iterable
from time import monotonic
from typing import Any, NamedTuple

from outbox.errors import BacklogFull
from outbox.message import Message
from outbox.tables import quoted

READ_AGAIN = 1.0
"""Seconds that a reading of the backlog is believed."""

HOLDS_NOTHING = (
    "SELECT pg_current_xact_id_if_assigned() IS NULL"
    " AND NOT EXISTS (SELECT FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory')"
)
"""SQL: true where the transaction has written no row, locked none, and holds no advisory lock.

PostgreSQL gives a transaction its id with the first row that it writes or locks (FOR UPDATE down to FOR KEY SHARE).
"""


class Backlog:
    """Refuses events while `limit` of them or more wait in the outbox of one database.

    What waits is PostgreSQL's own count of live rows (pg_stat_get_live_tuples): no scan, no right on the table. It
    lags by a second of work under load, by ten where writers rest, and begins at 0 after a crash of the database.
    """

    def __init__(self, schema: str, limit: int) -> None:
        self.limit = limit
        table = f"{quoted(schema)}.outbox".replace("'", "''")
        self.query = f"SELECT pg_stat_get_live_tuples(CAST('{table}' AS regclass))"
        """SQL: how many wait."""
        self._waiting = 0
        self._read_at = -READ_AGAIN

    @property
    def is_due(self) -> bool:
        """No reading is younger than a second: read again, with `query`, and `take` it."""
        return monotonic() - self._read_at >= READ_AGAIN

    def due(self) -> str | None:
        """What to read, and `take`, before the next events; None where a reading is believed. Checks that one."""
        self.check()
        return self.query if self.is_due else None

    def take(self, waiting: int) -> None:
        """Keep a reading; BacklogFull where it is at the limit."""
        self._waiting, self._read_at = waiting, monotonic()
        self.check()

    def check(self) -> None:
        """BacklogFull while a reading at the limit is believed. No I/O: once it is due, one transaction may try."""
        if self._waiting >= self.limit and not self.is_due:
            raise BacklogFull(
                f"about {self._waiting:,} events wait in the outbox and max_backlog is {self.limit:,}: no relay is at"
                " work, or it is behind; try again later"
            )


class UnlockedKey(UserWarning):
    """An event with a key, by a transaction that had written and locked nothing before it.

    Two such transactions are published in the order of their INSERTs, whatever each had read before. Turn it into an
    error in tests: `warnings.simplefilter("error", UnlockedKey)`.
    """


class Origin(NamedTuple):
    """The line of the caller's that added an event."""

    file: str
    line: int
    names: dict[str, Any]
    """Of its module: where warnings that were shown are remembered."""


def origin() -> Origin:
    """Of the innermost frame that is not this package's."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__package__") == "outbox":
        frame = frame.f_back
    return Origin(frame.f_code.co_filename, frame.f_lineno, frame.f_globals) if frame else Origin("outbox", 0, {})


def warn_of(added: Iterable[tuple[Message, Origin | None]]) -> None:
    """One UnlockedKey, for the first event with a key, at the line that added it."""
    for message, where in added:
        if message.key is not None and where is not None:
            said = (
                f"{message.type}, key {message.key!r}: its transaction had written and locked nothing before it, so two"
                " such events may be published in any order; lock the aggregate first (SELECT … FOR UPDATE)"
            )
            shown = where.names.setdefault("__warningregistry__", {})
            warnings.warn_explicit(said, UnlockedKey, where.file, where.line, registry=shown)
            return
