"""`make torture MINUTES=2 SEED=1`: faults by a schedule, then everything in Kafka and in the consumer's tables compared
with the ledger.

The last line says what was found; exit status 0 when it ends in zeros and every planned kind of fault came about, 1
otherwise. A run that fails leaves its trace and all logs in a folder, whose name it prints.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.chip_quality.stage import Child
from tests.servers import ServerError
from tests.servers.process import make_folder, remove_folder
from tests.torture.checker import Findings, check
from tests.torture.faults import Faults
from tests.torture.schedule import Fault, Kind, schedule
from tests.torture.stage import Failed, Stage, records, staged, wait_until
from tests.torture.trace import Trace
from tests.torture.watch import Watch

FLOW_SECONDS = 90.0
"""So long events may stay away after a fault is over before the run is stuck."""

DRAIN_SECONDS = 90.0
"""So long the relays, and then the consumer, may take for what is left at the end."""

STUCK_SECONDS = 20.0
"""The same in a run that has failed already."""

ATTEMPTS = 3
"""A fault that did not come about is made again, so often at most."""


@dataclass(slots=True)
class Run:
    """One run, up to its end."""

    stage: Stage
    watch: Watch
    console: Console
    made: list[Fault] = field(default_factory=list)
    """The faults that came about."""
    silences: dict[Kind, list[tuple[float, Fault]]] = field(default_factory=lambda: defaultdict(list))
    """For how long no event became visible, from a fault's beginning until events flowed again after it."""
    problems: list[str] = field(default_factory=list)
    """What is wrong beside the findings."""

    def faults(self, planned: Sequence[Fault]) -> None:
        """All of them, in their order; Failed when events do not flow again."""
        self._flow("at the start")
        faults = Faults(self.stage)
        for fault, after in zip(planned, [*planned[1:], None], strict=True):
            time.sleep(fault.gap)
            self._fault(faults, fault)
            if after is None or not after.hasty:
                self._flow(f"after {fault.kind}: {fault.form}")
                if not fault.hasty:
                    self.silences[fault.kind].append((self.watch.silence(faults.begun, time.monotonic()), fault))
            self._look_at_children()

    def _fault(self, faults: Faults, fault: Fault) -> None:
        for attempt in range(ATTEMPTS):
            self.stage.trace.note("fault", attempt=attempt, **asdict(fault))
            came_about = faults.make(fault)
            self.stage.trace.note("fault over", number=fault.number, came_about=came_about)
            if came_about:
                self.made.append(fault)
                break
            self._flow(f"after {fault.kind}: {fault.form}, which did not come about")
        self.console.print(
            f"{fault.number:4} {fault.kind}: {fault.form}{', all of them' * fault.everyone}"
            f"{'' if came_about else ' DID NOT COME ABOUT'} · {self.watch.count:,} visible",
            highlight=False,
        )

    def _flow(self, when: str) -> None:
        """Waits for an event that is said from now on to become visible."""
        if not self.watch.wait_for_event_of(time.time(), FLOW_SECONDS):
            raise Failed(f"no event became visible for {FLOW_SECONDS:g} s {when}. {self.state()}")

    def _look_at_children(self) -> None:
        for child in self.stage.children:
            if not child.alive:
                raise Failed(f"{child.name} has ended by itself; it said last:\n{child.tail(15)}")

    # ---- the end -----------------------------------------------------------------------------------------------------

    def finish(self, patience: float) -> None:
        """Writers finish, relays drain, the consumer follows, all stop; what is stuck becomes a problem.

        `patience`: seconds that the relays, and then the consumer, may take for what is left.
        """
        for writer in self.stage.writers:
            self._stop(writer)
        stage = self.stage
        waiting = "SELECT count(*) FROM outbox.outbox"
        self._drained("the outbox is not empty", lambda: stage.number(waiting) == 0, patience)
        committed = stage.number("SELECT count(*) FROM ledger")
        query = "SELECT count(*) FROM outbox.inbox"
        self._drained("the consumer has not all events", lambda: stage.number(query, "effects") >= committed, patience)
        for child in [*(relay.child for relay in stage.relays), stage.consumer]:
            self._stop(child)

    def _stop(self, child: Child) -> None:
        child.stop()
        if child.status != 0:
            self.problems.append(f"{child.name} did not stop cleanly: exit status {child.status}\n{child.tail(15)}")

    def _drained(self, what: str, ready: Callable[[], bool], patience: float) -> None:
        if not wait_until(ready, patience, 0.2):
            self.problems.append(f"{what} after {patience:g} s without writers. {self.state()}")

    def state(self) -> str:
        """What stands in the database, for whoever looks for what is stuck. The relays log what they are at."""
        for relay in self.stage.relays:
            if relay.child.alive:
                os.kill(relay.child.pid, signal.SIGUSR1)
        queries = {
            "lanes": "SELECT lane, batch, owner, lease_until - now() AS lease, halted FROM outbox.lane",
            "relays": "SELECT id, pid, now() - seen_at AS silent FROM outbox.relay",
            "rows": "SELECT count(*), min(seq), max(seq) FROM outbox.outbox",
            "dead": "SELECT count(*), min(error) FROM outbox.dead_event",
            "prepared": "SELECT gid, prepared FROM pg_prepared_xacts",
        }
        found = []
        for name, query in queries.items():
            try:
                found.append(f"{name}: {self.stage.rows(query)}")
            except Exception as error:  # noqa: BLE001 -- whatever it is, it is part of the state
                found.append(f"{name}: {error}")
        return "; ".join(found)

    def done(self) -> Counter[str]:
        """What the writers say they did."""
        total: Counter[str] = Counter()
        for writer in self.stage.writers:
            lines = [line for line in writer.events() if line.get("event") == "writer finished"]
            total.update({name: count for line in lines for name, count in line.items() if name != "event"})
        return total


def table(run: Run) -> Table:
    """The longest unavailability for each kind of fault."""
    shown = Table("fault", "came about", "median s", "longest s", "the longest was")
    for kind in Kind:
        found = run.silences.get(kind, [])
        made = sum(fault.kind is kind for fault in run.made)
        if not found:
            shown.add_row(kind, str(made), "", "", "")
            continue
        longest, fault = max(found, key=lambda pair: pair[0])
        median = statistics.median(seconds for seconds, _ in found)
        shown.add_row(kind, str(made), f"{median:.1f}", f"{longest:.1f}", fault.form + ", all" * fault.everyone)
    return shown


def judge(run: Run, planned: Sequence[Fault], findings: Findings, committed: int) -> list[str]:
    """Why the run failed; empty when it did not."""
    wrong = list(run.problems)
    came = {fault.kind for fault in run.made}
    wrong += [f"no {kind!s} came about" for kind in dict.fromkeys(one.kind for one in planned) if kind not in came]
    if committed == 0:
        wrong.append("nothing was committed")
    for what in ("rolled back", "savepoints rolled back", "prepared, COMMIT", "prepared, ROLLBACK", "slow", "bursts"):
        if not run.done()[what]:
            wrong.append(f"no writer did: {what}")
    for name in ("lost", "doubled", "reordered", "phantom", "effects"):
        if found := getattr(findings, name):
            wrong.append(f"{name}: {', '.join(map(str, found[:10]))}")
    return wrong


def play(console: Console, folder: Path, trace: Trace, options: argparse.Namespace) -> bool:
    """Everything; whether all is right."""
    planned = [one for one in schedule(options.seed, options.minutes) if options.only in f"{one.kind}: {one.form}"]
    trace.note("planned", seed=options.seed, minutes=options.minutes, lanes=options.lanes, faults=len(planned))
    console.print(f"seed {options.seed}: {len(planned)} faults in about {options.minutes:g} minutes", highlight=False)
    with staged(folder, trace, options.seed, options.lanes) as stage, Watch(stage.kafka.bootstrap) as watch:
        run = Run(stage, watch, console)
        begun = time.monotonic()
        try:
            run.faults(planned)
        except Failed as failed:
            run.problems.append(str(failed))
        run.finish(STUCK_SECONDS if run.problems else DRAIN_SECONDS)
        try:
            entries = stage.entries()
            findings = check(entries, records(stage.kafka.bootstrap, DRAIN_SECONDS), stage.effects())
            wrong = judge(run, planned, findings, len(entries))
        finally:
            _keep_server_logs(stage)
        console.print(table(run))
        console.print(f"writers: {json.dumps(run.done())}", highlight=False, soft_wrap=True)
        console.print(f"{time.monotonic() - begun:.0f} s", highlight=False)
        for line in wrong:
            trace.note("wrong", what=line)
            console.print(f"[bold red]WRONG[/] {line}", highlight=False, soft_wrap=True)
        console.print(
            f"faults {len(run.made)} · committed {len(entries)} · {findings}", highlight=False, soft_wrap=True
        )
    return not wrong


def _keep_server_logs(stage: Stage) -> None:
    for path in [stage.postgres.log, *stage.kafka.logs]:
        shutil.copy(path, stage.folder / f"{path.parent.name}-{path.name}")


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--only", default="", help="faults whose name holds this text, such as 'relay killed'")
    parser.add_argument("--keep", action="store_true", help="keep the trace and all logs of a run that is right, too")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    folder = make_folder("torture")
    trace = Trace(folder / "trace.jsonl")
    right = False
    try:
        right = play(console, folder, trace, options)
    except KeyboardInterrupt:
        console.print("stopped; nothing was compared")
        return 130
    except (Failed, ServerError) as error:
        console.print(f"[bold red]The run failed:[/] {error}", highlight=False, soft_wrap=True)
    finally:
        trace.close()
        if options.keep or not right:
            kept = Path(tempfile.mkdtemp(prefix=f"kafka-outbox-torture-{options.seed}-"))
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            print(f"The trace (trace.jsonl) and all logs are in {kept}", file=sys.stderr, flush=True)
        remove_folder(folder)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
