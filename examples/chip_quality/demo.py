"""`make demo`: the whole way on real servers, with faults, and a comparison of what is there with what must be there.

Four writers work on the inspection service's database (writers.py), and two relays publish its events. The quality
service judges each completed inspection and says so through an outbox of its own; the notification service mails an
alert for each violation; analytics counts all of it. Meanwhile:

    1  the relay that holds the lane is killed with -9 while rows are under way
    2  the relay that holds the lane is stopped (SIGSTOP) for longer than its lease, and wakes up as a zombie
    3  the relay that holds the lane is killed with -9 between Kafka's commit and its own delete of the rows
    4  analytics, quality and notification are killed with -9 while their offsets in Kafka are behind their databases

Then all is stopped in order, and what was committed (ledger.py) is compared with what an independent reader finds in
Kafka, in the consumers' tables and at the mail server (reader.py). Exit status 0: no event lost, doubled, out of order,
altered or published without being committed, every effect taken exactly once, and each fault was one. Anything else is
1.
"""

import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from rich.console import Console
from sqlalchemy import create_engine, make_url
from sqlalchemy.orm import DeclarativeBase

from examples.chip_quality import analytics, inspection, ledger, notification, quality, reader
from examples.chip_quality.mailbox import mail_server
from examples.chip_quality.screen import Check, Screen, print_table
from examples.chip_quality.stage import Cast, Child, Lane, Watch
from outbox.migrate import migrate
from tests.servers import Kafka, Postgres, ServerError, running
from tests.servers.process import make_folder, remove_folder

INSPECTIONS, QUALITY = analytics.TOPICS
TOPICS = [INSPECTIONS, QUALITY, "chip-quality.manufacturing.events"]

TABLES: Mapping[str, Sequence[type[DeclarativeBase]]] = {
    "inspection": (inspection.Base, ledger.Base),
    "quality": (quality.Base, ledger.Base),
    "analytics": (analytics.Base,),
    "notification": (notification.Base,),
}
"""The databases, and whose tables each has."""

EFFECTS: Mapping[str, Sequence[str]] = {
    "quality": ("assessments",),
    "analytics": ("completed", "defect_counts", "yields", "violations"),
    "notification": ("alerts",),
}
"""The consumers' databases, and their tables that are compared."""

PARTITIONS = 3
WRITERS = 4

SLOW_SECONDS = 2.0
"""How long each of the slow transactions, one after the other, keeps its event uncommitted."""

LEASE_SECONDS = 3.0
"""Of the relays; their default, set all the same, because the zombie must sleep for longer."""

WRITE_SECONDS = 16.0
"""The writers write at least so long, and until the last fault is over."""

ATTEMPTS = 5
"""A fault that met nothing under way is none: it is made again, so often at most."""

T = TypeVar("T")


class Failed(Exception):  # noqa: N818 -- named for what happened
    """The demo cannot go on; says why."""


class Late(Failed):
    """What was waited for has not happened."""


@dataclass(slots=True)
class Play:
    """The faults, one after the other, while the writers write. Each leaves a line that says what it met."""

    cast: Cast
    watch: Watch
    screen: Screen
    faults: list[Check] = field(default_factory=list)
    _shown: float = 0.0

    def run(self) -> None:
        """From the first event to the end of the last process; raises Failed when something does not come about."""
        begun = time.monotonic()
        self._until(lambda: self.watch.lane().batch > 5 and self.watch.counted() > 100, 30, "events flow")
        self.screen.say("events flow from the service's tables to those of analytics")
        self._fault("the lane's owner killed -9: rows under way", self._kill_owner)
        self._fault("the lane's owner asleep past its lease: rows under way", self._stop_owner)
        self._fault("the lane's owner killed -9 after Kafka's commit: batches", self._kill_between)
        for consumer in (self.cast.analytics, self.cast.quality, self.cast.notification):
            self._fault(f"{consumer.name} killed -9: events that came again", partial(self._kill_consumer, consumer))
        self._until(lambda: time.monotonic() - begun > WRITE_SECONDS, WRITE_SECONDS + 1, "time passes")
        self._finish()

    # ---- faults ------------------------------------------------------------------------------------------------------

    def _fault(self, what: str, make: Callable[[], int]) -> None:
        """`make` gives the size of what it met; nothing: it is made again."""
        met = 0
        for _ in range(ATTEMPTS):
            if met := make():
                break
        self.faults.append(Check(what, f"{met:,}", met > 0))

    def _kill_owner(self) -> int:
        relay, owner, under_way = self._owner_at_work()
        relay.kill()
        left, after = under_way & self.watch.front(), self.watch.lane()
        successor, seconds = self._taken_over(after)
        relay.start()
        self.screen.say(
            f"{relay.name}, which held the lane, killed -9 at batch {after.batch:,} with {len(left)} rows under way;"
            f" {successor.name} took over {seconds:.1f} s later; {relay.name} started again"
        )
        return len(left) if after.owner == owner.owner else 0

    def _stop_owner(self) -> int:
        relay, owner, under_way = self._owner_at_work()
        with relay.asleep() as log_size:
            begun = time.monotonic()
            left, after = under_way & self.watch.front(), self.watch.lane()
            successor, _ = self._taken_over(after)
            self._until(lambda: time.monotonic() - begun > LEASE_SECONDS * 1.5, 10, "the lease is long over")
            slept, now = time.monotonic() - begun, self.watch.lane()
        self._until(lambda: _said(relay, "lane lost", log_size), 15, f"{relay.name} sees that it has lost the lane")
        self.screen.say(
            f"{relay.name}, which held the lane, asleep for {slept:.1f} s (lease {LEASE_SECONDS:g} s) with {len(left)}"
            f" rows under way; {successor.name} took over; the zombie woke up and gave up"
        )
        return len(left) if after.owner == owner.owner != now.owner else 0

    def _kill_between(self) -> int:
        """No kill from outside meets this moment for sure, so the relay does it to itself (relay/failpoint.py).

        The other relay is started again with the order to die, and the one that holds the lane hands it over.
        """
        relay, _, _ = self._owner_at_work()
        doomed = next(other for other in self.cast.relays if other is not relay)
        _stop_cleanly(doomed)
        doomed.start(OUTBOX_FAILPOINT="commit:10")
        doomed.may_end = True
        self._until(lambda: _said(doomed, "relay started"), 10, f"{doomed.name} starts")
        _stop_cleanly(relay)
        self._until(doomed.has_ended, 20, f"{doomed.name} takes the lane over and dies")
        after, status = self.watch.lane(), doomed.status
        relay.start()
        successor, _ = self._taken_over(after)
        doomed.start()
        taken = self._until(lambda: _said(successor, "lane taken"), 10, f"{successor.name} says what it found")
        found = taken[-1]["batch"]
        self.screen.say(
            f"{doomed.name}, to which {relay.name} handed the lane over, killed -9 between Kafka's commit and its"
            f" delete; {successor.name} found batch {after.batch:,} in the database and {found:,} in Kafka"
        )
        return int(found - after.batch) if status == -signal.SIGKILL else 0

    def _kill_consumer(self, consumer: Child) -> int:
        before = self.watch.counted(consumer.name)
        self._until(lambda: self.watch.counted(consumer.name) > before, 10, f"{consumer.name} is at work", pause=0.002)
        consumer.kill()
        counted = self.watch.counted(consumer.name)
        consumer.start()
        self._until(lambda: self.watch.counted(consumer.name) > counted + 50, 15, f"{consumer.name} goes on")
        far = self._until(lambda: _far(consumer), 15, f"{consumer.name} says how far it is")
        again = int(far["duplicates"])
        self.screen.say(
            f"{consumer.name} killed -9 after {counted:,} events, started again; {again} events came to it again"
        )
        return again

    def _owner_at_work(self) -> tuple[Child, Lane, set[int]]:
        """The relay that holds the lane, and the rows that wait before it."""

        def look() -> tuple[Child, Lane, set[int]] | None:
            lane, front = self.watch.lane(), self.watch.front()
            relay = self.cast.relay_with(lane.pid)
            return (relay, lane, front) if relay and front else None

        moving = self.watch.lane().batch
        self._until(lambda: self.watch.lane().batch > moving, 10, "the lane's owner publishes")
        return self._until(look, 10, "the lane has an owner and rows", pause=0.001)

    def _taken_over(self, before: Lane) -> tuple[Child, float]:
        """The other relay that holds the lane and has finished a batch, and the seconds that this took."""

        def look() -> Child | None:
            lane = self.watch.lane()
            moved = lane.owner not in (None, before.owner) and lane.batch > before.batch
            return self.cast.relay_with(lane.pid) if moved else None

        begun = time.monotonic()
        return self._until(look, 20, "another relay takes the lane and publishes"), time.monotonic() - begun

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Stops the writers, lets everything be published and counted, stops the rest. What is late is found lost."""
        _stop(self.cast.writers)
        self.screen.say("the writers have stopped")
        inspected = self.watch.committed([INSPECTIONS])
        try:
            self._until(
                lambda: self.watch.counted("quality") >= inspected, 10, f"quality has seen {inspected:,} events"
            )
            self._until(lambda: self.watch.waiting() == 0, 10, "the outboxes are empty")
            judged = self.watch.committed([QUALITY])
            every = inspected + judged
            self._until(lambda: self.watch.counted() >= every, 10, f"analytics has counted {every:,} events")
            self._until(lambda: self.watch.counted("notification") >= judged, 10, f"notification has seen {judged:,}")
            self._until(lambda: self.watch.due() == 0, 10, "the alerts are mailed")
        except Late as late:
            self.screen.say(str(late))
        others = [child for child in self.cast.all if child not in self.cast.writers]
        _stop(others)
        self.screen.show(self.watch.figures(self.cast))
        self.screen.say("the relays and the consumers have stopped")

    def _until(self, condition: Callable[[], T | None], seconds: float, what: str, pause: float = 0.02) -> T:
        """What `condition` gives once it is something; raises Late after `seconds`, Failed when a process has ended."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            self._look_after()
            if time.monotonic() > deadline:
                raise Late(f"not within {seconds:g} s: {what}")
            time.sleep(pause)
        return found

    def _look_after(self) -> None:
        if time.monotonic() - self._shown > 0.25:
            self._shown = time.monotonic()
            self.screen.show(self.watch.figures(self.cast))
        for child in self.cast.all:
            if child.status is None and not child.alive and not child.may_end:
                raise Failed(f"{child.name} has ended by itself; it said last:\n{child.tail(15)}")


def _stop(children: Sequence[Child]) -> None:
    """All at once: a relay that stops alone hands its lane to the other."""
    with ThreadPoolExecutor(len(children)) as pool:
        list(pool.map(Child.stop, children))


def _stop_cleanly(child: Child) -> None:
    child.stop()
    if child.status != 0:
        raise Failed(f"{child.name} was to stop in order and ended with status {child.status}; {child.tail(15)}")


def _said(relay: Child, event: str, since: int | None = None) -> list[dict[str, Any]]:
    """The lines of a relay's log with this event."""
    return [line for line in relay.events(since) if line.get("event") == event]


def _far(consumer: Child) -> dict[str, Any] | None:
    """Its last word, once it is at what it has not seen before: what came again came first."""
    return next((line for line in reversed(_said(consumer, "progress")) if line["new"] >= 50), None)


# ---- before and after the play ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where the play is given: the databases by name, Kafka, the mail server, a folder for the logs."""

    urls: Mapping[str, str]
    bootstrap: str
    mail: str
    folder: Path


def prepare(postgres: Postgres, kafka: Kafka, mail: str, folder: Path) -> Place:
    """Databases, tables and topics."""
    urls = {name: postgres.create_database(name) for name in TABLES}
    for name, url in urls.items():
        migrate(url)
        engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
        for base in TABLES[name]:
            base.metadata.create_all(engine)
        engine.dispose()
    for topic in TOPICS:
        kafka.create_topic(topic, PARTITIONS)
    return Place(urls, kafka.bootstrap, mail, folder)


def engage(place: Place) -> Cast:
    """The processes, not started yet."""
    relay = {"OUTBOX_KAFKA_BOOTSTRAP_SERVERS": place.bootstrap, "OUTBOX_LEASE": str(LEASE_SECONDS)}
    kafka = {"KAFKA_BOOTSTRAP_SERVERS": place.bootstrap}
    service, quality = ({"OUTBOX_DATABASE_URL": place.urls[name]} for name in ("inspection", "quality"))
    counting = {**kafka, "ANALYTICS_DATABASE_URL": place.urls["analytics"]}
    mailing = {**kafka, "NOTIFICATION_DATABASE_URL": place.urls["notification"], "SMTP_SERVER": place.mail}

    def child(name: str, module: str, environment: dict[str, str], *arguments: str | Path) -> Child:
        return Child(name, module, *arguments, folder=place.folder, environment=environment)

    def writer(number: int) -> Child:
        slow = SLOW_SECONDS if number == 1 else 0
        file = place.folder / f"rolled-back-{number}"
        options = ("--seed", str(number), "--slow", str(slow))
        return child(f"writer-{number}", "examples.chip_quality.writers", service, file, *options)

    return Cast(
        writers=[writer(number) for number in range(1, WRITERS + 1)],
        relays=[child(f"relay-{letter}", "relay", {**relay, **service}, "run") for letter in "ab"],
        quality=child("quality", "examples.chip_quality.kept_quality", {**kafka, **quality}),
        quality_relay=child("relay-quality", "relay", {**relay, **quality}, "run"),
        analytics=child("analytics", "examples.chip_quality.analytics", counting),
        notification=child("notification", "examples.chip_quality.notification", mailing),
    )


def verdict(place: Place, cast: Cast, mails: Counter[str], seconds: float) -> tuple[list[Check], list[str]]:
    """The lines of the table but for the faults, and a few examples of whatever is wrong. `mails`: by their key."""
    entries = [entry for name in ("inspection", "quality") for entry in reader.read_entries(place.urls[name])]
    rolled_back = reader.read_rolled_back(place.folder)
    records = reader.read_topics(place.bootstrap, TOPICS)
    aborted = reader.count_aborted(place.bootstrap, TOPICS, len(records))
    expected = ledger.effects(entries)
    found = {row: value for name, tables in EFFECTS.items() for row, value in _effects(place, name, tables).items()}
    findings = ledger.compare(entries, records, rolled_back)
    findings.effects = ledger.compare_effects(expected, found)
    unclean = [child for child in cast.all if child.status != 0]
    dead = sum(reader.count_dead(place.urls[name]) for name in EFFECTS)
    alerts, unsure = {row[1] for row in expected if row[0] == "alerts"}, reader.count_unsure(place.urls["notification"])
    missing = len(alerts - mails.keys())
    wrong_mails = len(mails.keys() - alerts) + sum(times - 1 for times in mails.values()) + max(0, missing - unsure)
    checks = [
        Check("events committed (the ledger)", f"{len(entries):,}", len(entries) > 0),
        Check("events rolled back", f"{len(rolled_back):,}", len(rolled_back) > 0),
        Check("events in Kafka (read_committed, from the start)", f"{len(records):,}", len(records) == len(entries)),
        Check("records of aborted transactions, which no reader sees", f"{aborted:,}"),
        *(Check(what, f"{len(ids):,}", not ids) for what, ids in _kinds(findings)),
        Check("rows in the tables of the three consumers", f"{len(found):,}", len(found) > 0),
        Check("of which wrong", f"{len(findings.effects):,}", not findings.effects),
        Check("messages that no handler could take", f"{dead:,}", dead == 0),
        Check("alerts mailed", f"{len(mails):,}", len(mails) > 0),
        Check("mailed twice, for nothing, or not at all", f"{wrong_mails:,}", wrong_mails == 0),
        Check("alerts whose sender was killed while it sent", f"{unsure:,}"),
        Check("processes that did not stop cleanly", str(len(unclean)), not unclean),
        Check("seconds", f"{seconds:.1f}"),
    ]
    details = [f"{what}: {', '.join(map(str, ids[:5]))}" for what, ids in _kinds(findings) if ids]
    details += [f"wrong effect: {line}" for line in findings.effects[:5]]
    details += [f"{child.name} ended with status {child.status}" for child in unclean]
    return checks, details


def _effects(place: Place, name: str, tables: Sequence[str]) -> ledger.Figures:
    return reader.read_effects(place.urls[name], *tables)


def _kinds(findings: ledger.Findings) -> list[tuple[str, list[UUID]]]:
    return [
        ("lost", findings.lost),
        ("doubled", findings.doubled),
        ("out of order", findings.out_of_order),
        ("published, never committed", findings.never_committed),
        ("altered", findings.altered),
    ]


def play(console: Console, stack: ExitStack, folder: Path) -> bool:
    """Everything; whether all is right. What it started is ended by `stack`."""
    console.print("Starting PostgreSQL and Kafka (the first time, their parts are downloaded) …")
    postgres, kafka = Postgres(fsync=True), Kafka()
    begun = time.monotonic()
    stack.enter_context(running(postgres, kafka))
    console.print(f"… ready after {time.monotonic() - begun:.1f} s")
    screen = stack.enter_context(Screen(console))
    mails = stack.enter_context(mail_server())
    place = prepare(postgres, kafka, mails.address, folder)
    cast = engage(place)
    watch = Watch(place.urls)
    stack.callback(watch.close)
    for child in cast.all:
        stack.callback(child.kill)
        child.start()
    acts = Play(cast, watch, screen)
    acts.run()
    checks, details = verdict(place, cast, mails.received, screen.seconds)
    screen.close()
    checks[-1:-1] = acts.faults
    print_table(console, checks, details)
    return all(check.right is not False for check in checks)


def main() -> int:
    """The exit status: 0 all right, 1 not, 130 interrupted. Leaves nothing behind but the logs of a failure."""
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    folder = make_folder("demo")
    right = False
    try:
        with ExitStack() as stack:
            right = play(console, stack, folder)
    except KeyboardInterrupt:
        console.print("stopped; nothing was compared")
        right = True
        return 130
    except (Failed, reader.ReadTimeout, ServerError) as error:
        console.print(f"[bold red]The demo failed:[/] {error}", highlight=False, soft_wrap=True)
    finally:
        if not right:
            console.print(f"The logs are in {_keep(folder)}", soft_wrap=True)
        remove_folder(folder)
    return 0 if right else 1


def _keep(folder: Path) -> Path:
    return Path(shutil.copytree(folder, Path(tempfile.mkdtemp(prefix="kafka-outbox-demo-failed-")), dirs_exist_ok=True))


if __name__ == "__main__":
    sys.exit(main())
