"""`budget`: where the CPU of a drained event goes, step by step, beside the least that the step could take.

First a relay that is at work drains backlogs: the CPU of the threads of relay and broker, the statements in the
database (pg_stat_statements), and what py-spy sees the event loop's thread do. Then each part alone
(benchmarks/bounds.py).
"""

import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from benchmarks import bounds, machine
from benchmarks.drain import while_running
from benchmarks.figures import difference
from benchmarks.reader import Reader
from benchmarks.stage import Backlog, Contender, Stage, say
from tests.servers.process import make_folder, remove_folder


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    events: int = 200_000
    rounds: int = 5
    warming: int = 8
    profiled: int = 1_000_000
    """Events that are drained while py-spy looks on."""


FULL = Sizes()
QUICK = Sizes(events=10_000, rounds=1, warming=1, profiled=50_000)


def budget(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    """The relay at work, then each step alone."""
    contender, topic = stage.relay("budget"), stage.topic("budget")
    backlog = Backlog((topic,), sizes.events)
    stage.track(contender)
    with stage.running(contender) as process:
        for _ in range(sizes.warming):
            while_running(stage, contender, backlog, process)
            stage.vacuum(contender)
        work = _work(stage, contender, backlog, process.pid, sizes.rounds)
        say(f"budget: at work: {work}")
        profile = _profile(stage, contender, Backlog((topic,), sizes.profiled), process.pid)
    say(f"budget: the event loop's thread: {profile}")
    return {"events": sizes.events, **work, "profile": profile, "steps": bounds.steps(stage, contender, backlog)}


# ---- at work ---------------------------------------------------------------------------------------------------------


def _work(stage: Stage, contender: Contender, backlog: Backlog, pid: int, rounds: int) -> dict[str, Any]:
    """CPU by process, thread and statement, over all rounds, from the commit that brings a backlog to its last event at
    the reader."""
    pids = stage.pids(relay=pid)
    cpu: dict[str, float] = defaultdict(float)
    threads: dict[str, dict[str, float]] = {name: defaultdict(float) for name in ("relay", "broker")}
    written = drained = 0
    rates = []
    stage.postgres.execute("SELECT pg_stat_statements_reset()", contender.database)
    for _ in range(rounds):
        stage.vacuum(contender)
        with Reader(stage, backlog) as reader, psycopg.connect(stage.postgres.url(contender.database)) as writer:
            at = stage.wal()
            writer.execute(backlog.insert(contender))
            before, then, start = machine.readings(pids), _threads(pids), stage.wal()
            writer.commit()
            reader.done()
            spent, now, end = difference(before, machine.readings(pids)), _threads(pids), stage.wal()
            reading = reader.reading()
        written, drained = written + start - at, drained + end - start
        rates.append(reading.rate)
        for name, seconds in {**spent, "reader": reading.cpu}.items():
            cpu[name] += seconds or 0.0
        for name, groups in threads.items():
            for group, seconds in now[name].items():
                groups[group] += seconds - then[name].get(group, 0.0)
    events = backlog.events * rounds
    return {
        "events_per_s": round(statistics.median(rates)),
        "cpu_us_per_event": _each(cpu, events),
        "threads_us_per_event": {name: _each(groups, events) for name, groups in threads.items()},
        "statements": _statements(stage, contender, events),
        "wal_bytes_per_event": {"written": round(written / events), "drained": round(drained / events)},
    }


def _each(seconds: Mapping[str, float], events: int) -> dict[str, float]:
    """µs an event, the most first, without what rounds to nothing."""
    found = {name: round(spent / events * 1e6, 2) for name, spent in sorted(seconds.items(), key=lambda one: -one[1])}
    return {name: us for name, us in found.items() if us >= 0.01}


def _threads(pids: dict[str, int | None]) -> dict[str, dict[str, float]]:
    """CPU seconds of the threads of relay and broker, by what they are."""
    return {
        "relay": _grouped(pids["relay"], _of_relay),
        "broker": _grouped(pids["broker"], lambda name, _: name.rstrip("-0123456789")),
    }


def _of_relay(name: str, first: bool) -> str:
    if name.startswith("rdk:"):
        return "librdkafka: the broker's connection" if name.startswith("rdk:broker") else "librdkafka: its main thread"
    return "event loop" if first else "threads that wait for Kafka"


def _grouped(pid: int | None, group: Callable[[str, bool], str]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for number, name, seconds in machine.threads(pid):
        found[group(name, number == pid)] += seconds
    return found


STATEMENTS = {"fetch": "LIMIT CASE", "delete": "WITH own AS", "who holds the table": "FROM pg_locks"}
"""A part of each of the cycle's statements."""


def _statements(stage: Stage, contender: Contender, events: int) -> list[dict[str, Any]]:
    """Of the cycle, as pg_stat_statements counted them. Their time holds that of sending the rows."""
    found = []
    for name, part in STATEMENTS.items():
        [(calls, ms, wal)] = stage.postgres.execute(
            "SELECT coalesce(sum(calls), 0)::bigint, coalesce(sum(total_exec_time), 0), coalesce(sum(wal_bytes), 0)"
            f" FROM pg_stat_statements WHERE query LIKE '%{part}%' AND query NOT LIKE '%pg_stat_statements%'",
            contender.database,
        )
        found.append(
            {
                "statement": name,
                "calls_per_1000_events": round(calls / events * 1000, 2),
                "us_per_event": round(ms / events * 1000, 2),
                "wal_bytes_per_event": round(wal / events),
            }
        )
    return found


# ---- what the event loop's thread does -------------------------------------------------------------------------------

PARTS = {
    "produce: librdkafka": ("rd_kafka_producev", "rd_kafka_header"),
    "produce: confluent-kafka, from Python to C": ("Producer_produce", "cimpl"),
    "produce: the record in Python": ("Records.produce",),
    "rows from the database: asyncpg": ("asyncpg/", "asyncpg.protocol", "data_received", "protocol.c"),
    "cut and progress": ("_Cycle._cut",),
    "topics asked about": ("Destinations.part",),
    "metrics": ("Metrics.batch",),
    "the rest of the cycle": ("relay/worker.py",),
}
"""Of a stack the first of these that has one of its frames."""


def _profile(stage: Stage, contender: Contender, backlog: Backlog, pid: int) -> dict[str, float] | None:
    """Percent of the samples of the event loop's thread, by part; None where py-spy may not look (it needs ptrace)."""
    folder = make_folder("profile")
    raw = folder / "stacks.txt"
    command = [
        str(Path(sys.executable).parent / "py-spy"),
        "record",
        "--pid",
        str(pid),
        "--native",
        "--threads",
        "--rate",
        "500",
        "--duration",
        "60",
    ]
    try:
        with Reader(stage, backlog) as reader, psycopg.connect(stage.postgres.url(contender.database)) as writer:
            writer.execute(backlog.insert(contender))
            spy = subprocess.Popen(
                [*command, "--format", "raw", "--output", str(raw)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            time.sleep(1.0)  # it reads the symbols first
            writer.commit()
            reader.done()
            spy.send_signal(signal.SIGINT)
            _, said = spy.communicate(timeout=30)
            reader.reading()
        if not raw.exists():
            say(f"budget: no profile: {said.decode().strip()}")
            return None
        return shares(raw.read_text().splitlines())
    finally:
        remove_folder(folder)


def shares(stacks: Sequence[str]) -> dict[str, float]:
    """Percent of the event loop's samples by part. `stacks`: lines of py-spy's raw format, which are frames with `;`
    between them, a blank, a count."""
    found: Counter[str] = Counter()
    for line in stacks:
        stack, _, count = line.rpartition(" ")
        if "MainThread" in stack.partition(";")[0]:
            found[_part(stack)] += int(count)
    total = found.total()
    return {name: round(count / total * 100, 1) for name, count in found.most_common()}


def _part(stack: str) -> str:
    return next((part for part, frames in PARTS.items() if any(frame in stack for frame in frames)), "event loop")
