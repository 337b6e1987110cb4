"""Which lanes a relay should take, and which it should hand over: a fair share, by what the database says. No I/O."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from relay.queries import LaneRow


@dataclass(frozen=True, slots=True)
class Plan:
    """Lanes to take now, and held ones to hand over."""

    take: tuple[int, ...]
    give: tuple[int, ...]


def plan(lanes: Sequence[LaneRow], holding: Collection[int], relays: int, waited: float, patience: float) -> Plan:
    """What to do now.

    Args:
        lanes: all lanes, as read just now.
        holding: the lanes that this relay holds or is taking.
        relays: the live relays, this one included.
        waited: seconds since which some lane is free although this relay has its share.
        patience: after so many seconds such a lane is taken all the same: whoever it is for does not come.

    A share is the number of lanes that are not halted, divided by the relays, rounded up: nobody gives up a lane while
    nobody lacks one.
    """
    share = -(-sum(lane.halted is None for lane in lanes) // max(1, relays))
    free = [lane.lane for lane in lanes if lane.free and lane.halted is None and lane.lane not in holding]
    room = len(free) if waited > patience else max(0, share - len(holding))
    surplus = max(0, len(holding) - share)
    give = sorted(holding)[len(holding) - surplus :]
    return Plan(tuple(free[:room]), tuple(give))
