"""Which events of a lane are parked: those that Kafka refuses for good, and later ones of their key (docs/design.md,
"Poison"). No I/O."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any

WORDS = 1_000
"""Characters of an error that are kept with a parked event: a registry may answer with a whole schema, or a page."""

SEARCH_ROWS = 500
"""Rows in a batch whose records travel one by one: about a tenth of a second on one machine."""

PACKING = 16_384
"""Bytes of records that travel together while it is found out which one is too large, so that such a one travels alone.
It is what Java's producers send together."""

PACKING_LEAST = 1_000


class Search(IntEnum):
    """How closely the relay looks for what Kafka refuses."""

    NONE = 0
    LARGE = 1
    """Records as large as PACKING travel alone, and each one's fate is asked for."""
    EACH = 2
    """All do."""


class Quarantine:
    """Decides what is parked, and leads the search for what Kafka refuses. Lives as long as the lane's worker.

    An error of Kafka's names a batch, not an event, and may be said of many records for one's sake. So after a refused
    batch large records travel alone until one is named; and all of them, where that is not enough. Where none is
    refused alone until the batch has passed, they were too many together, and fewer travel together from then on.
    """

    def __init__(self, rows: int, *, holds: bool = True) -> None:
        """`holds`: later events of a parked one's key are parked too, behind it."""
        self._most = rows
        self._holds = holds
        self.search = Search.NONE
        self._until = 0
        self._named = False
        self.suspects: frozenset[str] = frozenset()
        """Topics of the batch that was refused last."""
        self.packing: int | None = None
        """Bytes of records that may travel together; None: as the settings have it."""
        self._condemned: dict[int, str] = {}
        self._held: set[tuple[str, str]] = set()

    @property
    def idle(self) -> bool:
        """Nothing is to be parked: the rows need not be looked at."""
        return not self._condemned and not self._held

    def hold(self, keys: set[tuple[str, str]]) -> None:
        """Set the (topic, key) pairs whose events wait behind a parked one."""
        self._held = keys if self._holds else set()

    def condemn(self, events: Mapping[int, str]) -> None:
        """Park these (seq → why): what is said of them is final."""
        self._condemned.update((seq, _short(why)) for seq, why in events.items())

    def sort(self, rows: Sequence[Any]) -> tuple[list[Any], dict[int, str]]:
        """Part rows (seq first, topic and key at 3 and 4) into those to publish and those to park (seq → error)."""
        publish, parked = [], {}
        for row in rows:
            seq, topic, key = row[0], row[3], row[4]
            if seq in self._condemned:
                parked[seq] = self._condemned[seq]
                if self._holds and key is not None:
                    self._held.add((topic, key))
            elif (topic, key) in self._held:
                parked[seq] = "held: an earlier event of its key is parked"
            else:
                publish.append(row)
        return publish, parked

    def parked(self, seqs: Iterable[int]) -> None:
        """The rows are in dead_event now."""
        for seq in seqs:
            self._condemned.pop(seq, None)

    # ---- the search --------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """How many rows the next batch may take."""
        return min(self._most, SEARCH_ROWS) if self.search is Search.EACH else self._most

    def refused(self, until: int, topics: Collection[str]) -> None:
        """Kafka refused a batch with events of these `topics`, whose last seq is `until`."""
        self.search, self._until = Search.LARGE, until
        self.suspects = frozenset(topics)

    def named(self, events: Mapping[int, str]) -> None:
        """Kafka refused these events (seq → why), and named them. The first time they are taken for all there are."""
        self.condemn(events)
        if not self._named:
            self.search = Search.NONE
        self._named = True

    def unnamed(self) -> None:
        """Kafka refused records that travelled together."""
        self.search = Search.EACH

    def acquit(self) -> None:
        """The cause was found, and it was no single event."""
        self.search = Search.NONE

    def passed(self, last: int) -> None:
        """A batch up to the seq `last` went through, parked events included."""
        if last < self._until:
            return
        if self.search is not Search.NONE and not self._named:
            least = (self.packing or PACKING) // 8 if self.search is Search.EACH else PACKING
            self.packing = max(PACKING_LEAST, min(self.packing or PACKING, least))
        self.search, self._named = Search.NONE, False


def _short(words: str) -> str:
    return words if len(words) <= WORDS else f"{words[: WORDS - 2]} …"
