"""Which events of a lane are parked: those that Kafka refuses for good, and later ones of their key (docs/design.md,
"Poison"). No I/O."""

from collections.abc import Mapping, Sequence
from typing import Any

WORDS = 1_000
"""Characters of an error that are kept with a parked event: a registry may answer with a whole schema, or a page."""


class Quarantine:
    """Finds the event that Kafka refuses by taking fewer rows until it stands alone. Lives as long as the lane's
    worker.

    Kafka's errors name a batch, not an event, so the batch is cut to an eighth after each refusal; it grows again by
    doubling.
    """

    def __init__(self, rows: int) -> None:
        self._most = rows
        self.rows = rows
        """How many rows the next batch may take."""
        self.closely = False
        """Whether the client should be asked about each record, which costs, or only about failed batches."""
        self._condemned: dict[int, str] = {}
        self._held: set[tuple[str, str]] = set()

    @property
    def idle(self) -> bool:
        """Nothing is to be parked: the rows need not be looked at."""
        return not self._condemned and not self._held

    def hold(self, keys: set[tuple[str, str]]) -> None:
        """Set the (topic, key) pairs whose events wait behind a parked one."""
        self._held = keys

    def refused(self, seqs: Sequence[int], words: str, events: Mapping[int, str]) -> None:
        """Kafka refused the batch of `seqs` because of those `events` of it, by place, or one of them when empty."""
        self.closely = True
        if events:
            self.condemn({seqs[place]: why for place, why in events.items()})
        elif len(seqs) == 1:
            self.condemn({seqs[0]: words})
        else:
            self.rows = max(1, len(seqs) // 8)

    def condemn(self, events: Mapping[int, str]) -> None:
        """Park these (seq → why): what is said of them is final, and was said before they were handed to Kafka."""
        self._condemned.update((seq, _short(why)) for seq, why in events.items())

    def published(self) -> None:
        """A batch went through."""
        self.closely = self.rows < self._most
        self.rows = min(self._most, self.rows * 2)

    def sort(self, rows: Sequence[Any]) -> tuple[list[Any], dict[int, str]]:
        """Part rows (seq first, topic and key at 3 and 4) into those to publish and those to park (seq → error)."""
        publish, parked = [], {}
        for row in rows:
            seq, topic, key = row[0], row[3], row[4]
            if seq in self._condemned:
                parked[seq] = self._condemned[seq]
                if key is not None:
                    self._held.add((topic, key))
            elif (topic, key) in self._held:
                parked[seq] = "held: an earlier event of its key is parked"
            else:
                publish.append(row)
        return publish, parked

    def parked(self, seqs: Sequence[int]) -> None:
        """The rows are in dead_event now."""
        for seq in seqs:
            self._condemned.pop(seq, None)


def _short(words: str) -> str:
    return words if len(words) <= WORDS else f"{words[: WORDS - 2]} …"
