"""The safe floor: the seq below which a fetch need not look again (docs/design.md, "The safe floor"). No I/O.

A row can commit late with a low seq, so the highest seq seen is no floor. The rule:

    Let F be the highest seq seen, then read who holds the outbox table for writing. When all of them are gone, and one
    more fetch was made, the floor may become F.

A writer takes the table's lock before it takes a seq. So whoever has a seq below F and is not visible yet is among
those holders, and what it commits is seen by the next fetch.
"""

from collections.abc import Collection

PREPARED = "-1/"
"""How `pg_locks.virtualtransaction` starts for a prepared transaction with a new name. PREPARE TRANSACTION keeps the
writer's name since PostgreSQL 14.1 (seen on 15); older servers, and every restart, replace it by -1/<xid>."""


class Floor:
    """The floor of one hold on a lane. Starts at 0: a take knows nothing of what the relay before saw."""

    def __init__(self) -> None:
        self.value = 0
        """Every row of the lane with a seq up to this one has been fetched, rolled back, or was never there."""
        self.top = 0
        """The highest seq seen."""
        self._candidate = 0
        self._blockers: set[str] | None = None

    @property
    def lag(self) -> int:
        """How far the floor is behind the highest seq seen. An index scan passes the dead rows in between."""
        return self.top - self.value

    def fetched(self, last: int, complete: bool) -> None:
        """Note a fetch of `seq > value`.

        Args:
            last: the highest seq it returned, 0 when it returned none.
            complete: it returned all there was. When False it was cut off (rows, bytes) and looked only as far as
            `last`.
        """
        if self._blockers is not None and not self._blockers and (complete or last >= self._candidate):
            self.value = self._candidate
            self._blockers = None
        self.top = max(self.top, last)

    def due(self) -> bool:
        """Whether a reading of the holders can move the floor."""
        return self._blockers != set() and (self._blockers is not None or self.top > self.value)

    def read(self, holders: Collection[str]) -> None:
        """Note a reading of the holders, made after the fetch that was noted last."""
        now = set(holders)
        if self._blockers is None:
            self._candidate, self._blockers = self.top, now
            return
        gone = self._blockers - now
        self._blockers &= now
        if any(not name.startswith(PREPARED) for name in gone):
            # one that is gone may have become a prepared transaction: wait for all of those that are there now
            self._blockers |= {name for name in now if name.startswith(PREPARED)}
