"""How each fault is made. A fault returns whether it came about: an owner that could not be found is no fault."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from examples.chip_quality.stage import Child
from tests.torture.consumer import FAILPOINT, NAME
from tests.torture.proxy import Gate
from tests.torture.relay import set_clock
from tests.torture.schedule import Fault, Kind
from tests.torture.stage import BROKERS, Failed, Relay, Stage, wait_until

PATIENCE = 30.0
"""Seconds that something may take to come about on a busy machine."""

RELAY_FAILPOINT = "OUTBOX_FAILPOINT"
TAMPERING = {
    "owner null": "owner = NULL",
    "owner unknown": "owner = gen_random_uuid()",
    "until long ago": "lease_until = now() - interval '1 hour'",
    "until far ahead": "lease_until = now() + interval '20 s'",
}
"""What a hand may do to a lane's row. Not farther ahead: when its owner dies as well, nobody takes the lane until then,
and that is as it should be."""


class Faults:
    """Makes faults on a stage. `begun` is when the last one began (time.monotonic)."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.begun = 0.0
        self._make: dict[Kind, Callable[[Fault], bool]] = {
            Kind.RELAY_KILLED: self._kill_relay,
            Kind.RELAY_STEP: self._kill_relay_at_step,
            Kind.RELAY_FROZEN: self._freeze,
            Kind.RELAY_STOPPED: self._stop_relay,
            Kind.CLOCK: self._move_clock,
            Kind.LEASE_TAMPERED: self._tamper,
            Kind.DATABASE_CRASHED: self._crash_database,
            Kind.DATABASE_LINK: self._trouble_database_link,
            Kind.BROKER_KILLED: self._kill_broker,
            Kind.BROKERS_DOWN: self._take_brokers_down,
            Kind.BROKER_LINK: self._trouble_broker_link,
            Kind.CONSUMER_KILLED: self._kill_consumer,
        }

    def make(self, fault: Fault) -> bool:
        """Make it, and mend what does not mend itself. Whether it came about."""
        self._begin()
        return self._make[fault.kind](fault)

    def _begin(self) -> None:
        self.begun = time.monotonic()

    # ---- relays ------------------------------------------------------------------------------------------------------

    def _owner(self) -> Relay:
        """The relay that has the lane; waits for one."""
        found: list[Relay] = []

        def find() -> bool:
            owner = self._stage.owner()
            found[:] = [owner] if owner else []
            return bool(found)

        if not wait_until(find, PATIENCE):
            raise Failed(f"no relay has the lane, and none took it within {PATIENCE:g} s")
        self._begin()
        return found[0]

    def _victims(self, fault: Fault) -> Sequence[Relay]:
        owner = self._owner()
        return self._stage.relays if fault.everyone else [owner]

    def _others(self, relay: Relay) -> list[Relay]:
        """In a fixed order, so that the seed decides among them."""
        place = self._stage.relays.index(relay)
        return [*self._stage.relays[place + 1 :], *self._stage.relays[:place]]

    def _kill_relay(self, fault: Fault) -> bool:
        owner = self._owner()
        victims = [owner] if fault.form == "owner" else self._others(owner)[:1]
        if fault.everyone:
            victims = list(self._stage.relays)
        for victim in victims:
            victim.child.kill()
        time.sleep(fault.seconds if len(victims) == 1 else 0)
        for victim in victims:
            victim.child.start()
        return True

    def _kill_relay_at_step(self, fault: Fault) -> bool:
        """One that is about to die there has to become the owner: the others are away until it is."""
        owner = self._owner()
        victim, third = self._others(owner)
        third.child.stop()
        victim.child.stop()
        victim.child.start(**{RELAY_FAILPOINT: f"{fault.form}:{fault.count}"})
        ready = wait_until(lambda: victim.child.said('"relay started"'), PATIENCE)
        self._begin()
        if fault.count % 2:
            owner.child.stop()
        else:
            owner.child.kill()
        wait_until(lambda: not victim.child.alive or self._stage.owner() is victim, PATIENCE, 0.005)
        owner.child.start()
        third.child.start()
        died = wait_until(lambda: not victim.child.alive, PATIENCE, 0.005)
        if died:
            self._begin()
        victim.child.kill()
        came_about = ready and died and victim.child.status == -signal.SIGKILL
        victim.child.start()
        return came_about

    def _freeze(self, fault: Fault) -> bool:
        """The owner, for longer than its lease; when it wakes up, another has the lane."""
        victims = self._victims(fault)
        with _asleep([victim.child for victim in victims]):
            time.sleep(fault.seconds)
            return len(victims) > 1 or self._stage.owner() not in (None, victims[0])

    def _stop_relay(self, fault: Fault) -> bool:
        owner = self._owner()
        owner.child.stop()
        time.sleep(fault.seconds)
        status = owner.child.status
        owner.child.start()
        if status != 0:
            raise Failed(f"{owner.child.name} did not stop cleanly: exit status {status}")
        return True

    def _move_clock(self, fault: Fault) -> bool:
        owner = self._owner()
        ahead = float(owner.clock.read_text()) + (60 + 60 * fault.seconds) * (1 if fault.form == "forward" else -1)
        size = owner.child.log.stat().st_size
        set_clock(owner.clock, ahead)
        return wait_until(lambda: b"clock jumped" in owner.child.log.read_bytes()[size:], PATIENCE)

    # ---- the database ------------------------------------------------------------------------------------------------

    def _tamper(self, fault: Fault) -> bool:
        self._owner()
        return bool(self._stage.rows(f"UPDATE outbox.lane SET {TAMPERING[fault.form]} RETURNING lane"))

    def _crash_database(self, fault: Fault) -> bool:
        self._stage.postgres.immediate()
        time.sleep(fault.seconds)
        self._stage.postgres.start()
        return True

    def _trouble_database_link(self, fault: Fault) -> bool:
        return _trouble([relay.database for relay in self._victims(fault)], fault)

    # ---- Kafka -------------------------------------------------------------------------------------------------------

    def _kill_broker(self, fault: Fault) -> bool:
        broker = self._broker(fault)
        self._begin()
        self._stage.kafka.kill(broker)
        time.sleep(fault.seconds)
        self._stage.kafka.start(broker)
        return True

    def _broker(self, fault: Fault) -> int:
        """The number of the broker that has the role."""
        match fault.form:
            case "transaction coordinator":
                return self._leader("__transaction_state", f"service.0.{fault.count % 2}")
            case "group coordinator":
                return self._leader("__consumer_offsets", "service" if fault.count % 2 else NAME)
            case _:
                return self._leader("chip-quality.inspection.events", None, fault.count)

    def _leader(self, topic: str, name: str | None, number: int = 0) -> int:
        """Who leads the partition that `name` falls into (as brokers hash ids of groups and transactions)."""
        found = -1

        def find() -> bool:
            nonlocal found
            parts = self._stage.kafka.admin().list_topics(topic, timeout=10).topics[topic].partitions
            found = parts[(number if name is None else java_hash(name)) % len(parts)].leader
            return found >= 0

        if not wait_until(find, PATIENCE):
            raise Failed(f"a partition of {topic} has no leader for {PATIENCE:g} s")
        return found

    def _take_brokers_down(self, fault: Fault) -> bool:
        if fault.form == "stopped":
            self._stage.kafka.stop()
        else:
            self._stage.kafka.kill()
        time.sleep(fault.seconds)
        self._stage.kafka.start()
        return True

    def _trouble_broker_link(self, fault: Fault) -> bool:
        """Of all brokers, or of one of those that the victims are connected to."""
        victims = self._victims(fault)
        gates = [[relay.brokers[number] for relay in victims] for number in range(BROKERS)]
        if fault.count % 2 == 0:
            connected = [some for some in gates if any(gate.links for gate in some)]
            gates = connected[fault.count // 2 % (len(connected) or 1) :][:1]
        return _trouble([gate for some in gates for gate in some], fault)

    # ---- the consumer ------------------------------------------------------------------------------------------------

    def _kill_consumer(self, fault: Fault) -> bool:
        """Killed at once, and again at its step when it has come back."""
        consumer = self._stage.consumer
        consumer.kill()
        consumer.start(**{FAILPOINT: f"{fault.form}:{1 + fault.count % 5}"})
        died = wait_until(lambda: not consumer.alive, PATIENCE)
        consumer.kill()
        came_about = died and consumer.status == -signal.SIGKILL
        consumer.start()
        return came_about


@contextmanager
def _asleep(children: Sequence[Child]) -> Iterator[None]:
    for child in children:
        os.kill(child.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for child in children:
            os.kill(child.pid, signal.SIGCONT)


def _trouble(gates: Sequence[Gate], fault: Fault) -> bool:
    """Whether any connection was there to be troubled."""
    links = sum(gate.links for gate in gates)
    match fault.form:
        case "delayed":
            _each(gates, lambda gate: gate.delay(0.05 * (1 + fault.count % 8)))
        case "held" | "held, then cut":
            _each(gates, lambda gate: gate.hold())
        case "answers held, then cut":
            _each(gates, lambda gate: gate.hold(requests=False))
        case "cut":  # again and again: a single one seldom meets a commit
            for _ in range(fault.count % 10):
                _each(gates, Gate.cut)
                time.sleep(fault.seconds / 10)
    if fault.form != "cut":
        time.sleep(fault.seconds * 2)
    if "cut" in fault.form:
        _each(gates, Gate.cut)
    _each(gates, Gate.heal)
    return links > 0


def _each(gates: Sequence[Gate], do: Callable[[Gate], object]) -> None:
    for gate in gates:
        do(gate)


def java_hash(text: str) -> int:
    """`Utils.abs(text.hashCode())`, by which brokers choose the partition of a group or a transactional id."""
    number = 0
    for character in text:
        number = (31 * number + ord(character)) & 0xFFFF_FFFF
    return number & 0x7FFF_FFFF
