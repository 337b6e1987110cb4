"""Which faults, in which order, after which pauses, at whose expense. Values, and nothing but the seed decides them.

A run goes through rounds. A round is every kind of fault once or more, shuffled; the forms of a kind take turns in a
shuffled order of their own, so that each comes before one comes again. A longer run begins with the same faults.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain, repeat

STEPS = ("lease", "fence", "progress", "reconcile", "fetch", "produce", "flush", "offsets", "commit", "delete")
"""The numbered steps at which a relay can die (OUTBOX_FAILPOINT)."""

TAKING = STEPS[:4]
"""Those that a relay does once for each take of a lane."""

CONSUMER_STEPS = ("read", "claimed", "written", "committed", "acknowledged")
"""The steps at which the consumer can die (consumer.py)."""

LEASE = 3.0
"""Seconds, of the relays: the default, set all the same, because what is frozen must sleep for longer."""


class Kind(StrEnum):
    """What is done, and to whom."""

    RELAY_KILLED = "relay killed -9"
    RELAY_STEP = "relay killed at a step"
    RELAY_FROZEN = "relay frozen past its lease"
    RELAY_STOPPED = "relay stopped cleanly"
    CLOCK = "relay's clock jumps"
    LEASE_TAMPERED = "lease tampered with"
    DATABASE_CRASHED = "database stopped at once"
    DATABASE_LINK = "relay-database connections"
    BROKER_KILLED = "broker killed -9"
    BROKERS_DOWN = "all brokers down"
    BROKER_LINK = "relay-broker connections"
    CONSUMER_KILLED = "consumer killed at a step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault, as planned."""

    number: int
    kind: Kind
    form: str
    """Which of its kind."""
    gap: float
    """Seconds to wait before it, after events flow again."""
    hasty: bool
    """It does not wait until events flow again after the fault before."""
    seconds: float
    """How long it lasts, where it lasts."""
    count: int
    """At which passage of its step, for those at a step."""
    everyone: bool
    """All relays are its victims, not only the owner of the lane."""


_LINK_FORMS = ("cut", "delayed", "held", "held, then cut", "answers held, then cut")

FORMS: Mapping[Kind, Sequence[str]] = {
    Kind.RELAY_KILLED: ("owner", "standby"),
    Kind.RELAY_STEP: STEPS,
    Kind.RELAY_FROZEN: ("owner",),
    Kind.RELAY_STOPPED: ("owner",),
    Kind.CLOCK: ("forward", "back"),
    Kind.LEASE_TAMPERED: ("owner null", "owner unknown", "until long ago", "until far ahead"),
    Kind.DATABASE_CRASHED: ("immediate",),
    Kind.DATABASE_LINK: _LINK_FORMS,
    Kind.BROKER_KILLED: ("transaction coordinator", "partition leader", "group coordinator"),
    Kind.BROKERS_DOWN: ("stopped", "killed"),
    Kind.BROKER_LINK: _LINK_FORMS,
    Kind.CONSUMER_KILLED: CONSUMER_STEPS,
}
"""The forms of each kind."""

_TIMES = {Kind.RELAY_STEP: 3, Kind.LEASE_TAMPERED: 2, Kind.DATABASE_LINK: 2, Kind.BROKER_LINK: 2}
"""How often a round has a kind; once where nothing is said."""

_REACHING = (Kind.RELAY_KILLED, Kind.RELAY_FROZEN, Kind.DATABASE_LINK, Kind.BROKER_LINK)
"""Those that may have all relays for victims."""

_COST: Mapping[Kind, float] = {
    Kind.RELAY_KILLED: 6,
    Kind.RELAY_STEP: 9,
    Kind.RELAY_FROZEN: 9,
    Kind.RELAY_STOPPED: 4,
    Kind.CLOCK: 2,
    Kind.LEASE_TAMPERED: 2,
    Kind.DATABASE_CRASHED: 6,
    Kind.DATABASE_LINK: 8,
    Kind.BROKER_KILLED: 12,
    Kind.BROKERS_DOWN: 24,
    Kind.BROKER_LINK: 8,
    Kind.CONSUMER_KILLED: 4,
}
"""Seconds that one takes until events flow again, as measured on two busy cores: by it a run is filled, whatever the
machine."""


def schedule(seed: int, minutes: float) -> list[Fault]:
    """The faults of a run of about `minutes`, all of which are made; every kind once at least, whatever the length."""
    planned: list[Fault] = []
    left = minutes * 60
    for fault in _endless(seed):
        left -= _COST[fault.kind] + fault.gap
        if left < 0 and {one.kind for one in planned} == set(Kind):
            break
        planned.append(fault)
    return planned


def _endless(seed: int) -> Iterator[Fault]:
    dice = random.Random(seed)
    decks = {kind: _deck(random.Random(f"{seed} {kind}"), FORMS[kind]) for kind in Kind}
    for number, kind in enumerate(chain.from_iterable(_round(dice) for _ in repeat(None)), 1):
        yield _fault(dice, number, kind, next(decks[kind]))


def _round(dice: random.Random) -> list[Kind]:
    """Every kind once first, so that a short run has them all."""
    kinds = list(Kind)
    dice.shuffle(kinds)
    more = [kind for kind in Kind for _ in range(_TIMES.get(kind, 1) - 1)]
    dice.shuffle(more)
    return kinds + more


def _deck(dice: random.Random, forms: Sequence[str]) -> Iterator[str]:
    while True:
        yield from dice.sample(forms, len(forms))


def _fault(dice: random.Random, number: int, kind: Kind, form: str) -> Fault:
    """Draws the same number of times whatever the kind, so that one kind's needs do not move all that follows."""
    gap, haste, length, passage, reach = (dice.random() for _ in range(5))
    return Fault(
        number=number,
        kind=kind,
        form=form,
        gap=round(0.3 + 1.7 * gap, 3),
        hasty=haste < 0.15,
        seconds=round(_shortest(kind) + 4 * length, 3),
        count=1 if form in TAKING else 1 + int(passage * 30),
        everyone=reach < 0.4 and kind in _REACHING,
    )


def _shortest(kind: Kind) -> float:
    return LEASE * 1.2 if kind is Kind.RELAY_FROZEN else 0.3 if kind is Kind.DATABASE_CRASHED else 1.0
