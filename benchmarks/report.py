"""`python -m benchmarks.report results.jsonl`: the tables of docs/benchmarks.md, out of what `make bench` prints.

Of several lines of one benchmark the last counts. Nothing is computed here that the line does not say.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import click

from benchmarks.sweep import flat

Result = Mapping[str, Any]
"""A line of `python -m benchmarks`."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure of a benchmark, and what it should be: at most or at least so much."""

    bench: str
    figure: str
    value: Callable[[Result], Any]
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""

    def row(self, results: Mapping[str, Result]) -> list[str]:
        """The figure, what was measured, the goal, and whether it was met."""
        bounds = f"≥ {self.at_least:,g}" if self.at_least is not None else f"≤ {self.at_most:,g}"
        if self.bench not in results:
            return [self.figure, "not measured", bounds + self.unit, ""]
        found = self.value(results[self.bench])
        if found is None:
            return [self.figure, "cannot be read here", bounds + self.unit, ""]
        low = self.at_least is not None and found < self.at_least
        high = self.at_most is not None and found > self.at_most
        return [self.figure, f"{found:,}{self.unit}", bounds + self.unit, "missed" if low or high else "met"]


def _flaws(result: Result) -> int:
    return int(result["lost"] + result["doubled"] + result["reordered"] + result["strangers"])


def _latency(load: int, name: str) -> Callable[[Result], Any]:
    return lambda result: result["loads"][load]["relay"][name]


def _by_asyncpg(result: Result) -> Any:
    return result["ways"]["asyncpg"]["us_per_event_of_100"]


def _last_to_first(result: Result) -> Any:
    return result["kinds"]["snapshot"]["last_to_first"]


def _consumed(way: str) -> Callable[[Result], Any]:
    return lambda result: result["ways"][way]["events_per_s"]


def _longest_backlogs_memory(result: Result) -> Any:
    known = [one["peak_mb"] for one in result["points"] if one["what"] == "backlog" and one["peak_mb"] is not None]
    return max(known, default=None)


def _two_relays(result: Result) -> Any:
    """Two relays on two lanes, to one on one."""
    rates = {one["value"]: one["events_per_s"] for one in result["points"] if one["what"] == "lanes, relays"}
    return round(rates["2, 2"] / rates["1, 1"], 2)


def _cores(load: int) -> Callable[[Result], Any]:
    return lambda result: result["loads"][load]["relay"]["cores"]["relay"]


# By benchmark, in the order of the tables below.
GOALS = (
    Goal("relay", "relay: events a second", lambda one: one["events_per_s"], at_least=140_000),
    Goal("relay", "relay: its CPU an event", lambda one: one["relay_cpu_us_per_event"], at_most=4.5, unit=" µs"),
    Goal("relay", "relay: times the naive one", lambda one: one["ratio_to_naive"], at_least=2),
    Goal("relay", "relay: lost, doubled, reordered", _flaws, at_most=0),
    Goal("relay", "relay: peak memory", lambda one: one["relay_peak_mb"], at_most=80, unit=" MB"),
    Goal("latency", "latency at 100/s: p50", _latency(0, "p50_ms"), at_most=5, unit=" ms"),
    Goal("latency", "latency at 100/s: p99", _latency(0, "p99_ms"), at_most=10, unit=" ms"),
    Goal("latency", "latency at 100/s: the relay's CPU", _cores(0), at_most=0.15, unit=" cores"),
    Goal("latency", "latency at 2,000/s: p50", _latency(1, "p50_ms"), at_most=7, unit=" ms"),
    Goal("latency", "latency at 2,000/s: p95", _latency(1, "p95_ms"), at_most=11, unit=" ms"),
    Goal("latency", "latency at 2,000/s: p99", _latency(1, "p99_ms"), at_most=15, unit=" ms"),
    Goal("held-snapshot", "held snapshot: last round to first", _last_to_first, at_least=0.8),
    Goal("write", "write: one event adds, at most", lambda one: one["added_percent"], at_most=30, unit=" %"),
    Goal("write", "write: each of 100 events, at most", lambda one: one["us_per_event_of_100"], at_most=25, unit=" µs"),
    Goal("write", "write: each of 100 by asyncpg", _by_asyncpg, at_most=12, unit=" µs"),
    Goal("inbox", "inbox: events a second, at least", lambda one: one["events_per_s"], at_least=60_000),
    Goal("consumer", "consumer: events a second in batches", _consumed("batches"), at_least=30_000),
    Goal("consumer", "consumer: one by one, 8 keys at once", _consumed("one by one, 8 at once"), at_least=1_200),
    Goal("idle", "idle: a relay", lambda one: one["percent_of_a_core"]["relay"], at_most=0.5, unit=" % of a core"),
    Goal("sweep", "backlogs of 10k to 5M: slowest to fastest", lambda one: flat(one["points"]), at_least=0.9),
    Goal("sweep", "backlogs of 10k to 5M: peak memory", _longest_backlogs_memory, at_most=80, unit=" MB"),
    Goal("sweep", "two relays on two lanes to one on one", _two_relays, at_least=1),
    Goal("sustained", "10,000/s for ten minutes, 20 writers: p95", _latency(0, "p95_ms"), at_most=30, unit=" ms"),
)


def _smaller(result: Result) -> dict[str, float]:
    """By how many percent each codec makes the log smaller, in large transactions; without those that are unknown."""
    most = max(one["batch_rows"] for one in result["codecs"])
    sizes = {one["codec"]: one["bytes_per_event"] for one in result["codecs"] if one["batch_rows"] == most}
    plain = sizes.pop("none")
    return {codec: round((1 - size / plain) * 100, 1) for codec, size in sizes.items() if plain and size}


def _every_codec(result: Result) -> str:
    return ", ".join(f"{codec} {percent} %" for codec, percent in _smaller(result).items())


def _percent(share: float | None, cores: int = 1) -> float | None:
    return None if share is None else round(share / cores * 100, 1)


OFFERED = 0.999
"""What counts as all of it: the last commit of `sustained` returns a moment after its turn."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What the platform once said of itself, and the figure that it is held against.

    A range is met from its lower end, "~" up to a tenth above it.
    """

    text: str
    goal: Goal
    """`figure` says where from."""
    told: Callable[[Result], str] | None = None
    """What was measured, where it is more than the one figure."""

    def row(self, results: Mapping[str, Result]) -> list[str]:
        """The claim, what was measured, where from, and whether it was met."""
        where, measured, _, verdict = self.goal.row(results)
        if verdict and self.told:
            measured = self.told(results[self.goal.bench])
        return [self.text, measured, f"`{self.goal.bench}`: {where}", verdict]


CLAIMS = (
    Claim(
        "≥ 10,000 messages/s",
        Goal(
            "sustained",
            "written and relayed, 10,000/s offered by 20 writers",
            lambda one: one["loads"][0]["relay"]["achieved_events_per_s"],
            at_least=10_000 * OFFERED,
            unit="/s",
        ),
    ),
    Claim(
        "< 100 ms p95 end to end",
        Goal("sustained", "p95 from commit to consumer at this load", _latency(0, "p95_ms"), at_most=100, unit=" ms"),
    ),
    Claim(
        "< 10 ms p99 in the writer",
        Goal(
            "write",
            "p99 of a transaction with one event by `session_psycopg`",
            lambda one: one["ways"]["session_psycopg"]["with_one_p99_ms"],
            at_most=10,
            unit=" ms",
        ),
    ),
    Claim(
        "60–70 % smaller by compression",
        Goal(
            "compression",
            "bytes of log, in large transactions; lz4 is judged",
            lambda one: _smaller(one).get("lz4"),
            at_least=60,
        ),
        _every_codec,
    ),
    Claim(
        "~50 MB a process",
        Goal("idle", "peak of an idle relay", lambda one: one["peak_mb"]["relay"], at_most=55, unit=" MB"),
    ),
    Claim(
        "~50 MB a process",
        Goal("relay", "peak of a relay that drains", lambda one: one["relay_peak_mb"], at_most=55, unit=" MB"),
    ),
    Claim(
        "< 5 % of the CPU under normal load",
        Goal("latency", "the relay at 100/s, of one core", lambda one: _percent(_cores(0)(one)), at_most=5, unit=" %"),
    ),
    Claim(
        "< 5 % of the CPU under normal load",
        Goal(
            "latency",
            "the relay at 100/s, of this machine",
            lambda one: _percent(_cores(0)(one), one["host"]["cores"]),
            at_most=5,
            unit=" %",
        ),
    ),
)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report(results: Mapping[str, Result]) -> str:
    """All tables, in markdown. `results`: the lines by their `bench`."""
    parts = [_surroundings(results), table(("figure", "measured", "goal", ""), [goal.row(results) for goal in GOALS])]
    claims = table(("claim", "measured", "where from", ""), [claim.row(results) for claim in CLAIMS])
    parts.append(f"What the platform once claimed:\n\n{claims}")
    details = {
        "relay": _relay,
        "latency": _loads,
        "transaction": _transaction,
        "held-snapshot": _held,
        "write": _write,
        "inbox": _inbox,
        "consumer": _consumer,
        "idle": _idle,
        "budget": _budget,
        "compression": _compression,
        "load": _loads,
        "sweep": _sweep,
        "sustained": _loads,
    }
    parts += [detail(results[name]) for name, detail in details.items() if name in results]
    return "\n".join(parts)


def _surroundings(results: Mapping[str, Result]) -> str:
    """Machine, versions and settings, of the last line."""
    last = list(results.values())[-1]
    host, versions = last["host"], {}
    for result in results.values():
        versions.update(result["versions"])
    lines = [
        f"- {host['cores']} cores of {host['cpu']}, {host['memory_gb']} GB, {host['system']}",
        "- " + ", ".join(f"{name} {found}" for name, found in versions.items()),
        "- PostgreSQL: " + ", ".join(f"{name} {found}" for name, found in last["settings"].items()),
        f"- commit {last['commit']}, {last['at']}, load before each: "
        + ", ".join(f"{name} {result['host']['load']}" for name, result in results.items()),
    ]
    if any(result.get("quick") for result in results.values()):
        lines.insert(0, "**Quick sizes: these figures say nothing.**\n")
    return "\n".join(lines) + "\n"


def _relay(result: Result) -> str:
    rows = [_drained(name, one) for name, one in (("relay", result), ("naive", result["naive"]))]
    ratios = " ".join(map(str, result["ratios"]))
    return f"A backlog of {result['events']:,} events; ours to the naive one, round by round: {ratios}\n\n" + table(
        DRAINED, rows
    )


DRAINED = (
    "",
    "events/s, median",
    "all rounds",
    "relay's CPU, µs an event",
    "CPU s a round: relay, broker, database, reader",
    "peak MB",
    "lost, doubled, reordered",
)


def _drained(name: str, one: Result) -> list[str]:
    return [
        name,
        f"{one['events_per_s']:,}",
        " ".join(f"{rate:,}" for rate in one["rounds"]),
        str(one["relay_cpu_us_per_event"]),
        ", ".join(str(one["cpu_s"][process]) for process in ("relay", "broker", "database", "reader")),
        str(one["relay_peak_mb"]),
        f"{one['lost']}, {one['doubled']}, {one['reordered']}",
    ]


def _loads(result: Result) -> str:
    processes = ("relay", "broker", "database", "writer", "reader")
    rows = [
        [
            f"{load['events_per_s']:,}/s, {load['events_per_transaction']} a transaction",
            name,
            *(str(load[name][figure]) for figure in ("p50_ms", "p95_ms", "p99_ms", "max_ms")),
            ", ".join(str(load[name]["cores"][process]) for process in processes),
        ]
        for load in result["loads"]
        for name in ("relay", "naive")
        if name in load
    ]
    head = ("load", "", "p50 ms", "p95", "p99", "max", f"cores: {', '.join(processes)}")
    return f"Latency, {result['seconds']:g} s of each load:\n\n" + table(head, rows)


def _sweep(result: Result) -> str:
    names = ("what", "value", "events_per_s", "mb_per_s", "relay_cpu_us_per_event", "wal_bytes_per_event", "peak_mb")
    rows = [
        [
            *(_text(one[name]) for name in (*names, "ratio_to_naive")),
            f"{one['lost']}, {one['doubled']}, {one['reordered']}",
        ]
        for one in result["points"]
    ]
    head = (
        "",
        "",
        "events/s",
        "MB/s",
        "relay's CPU, µs an event",
        "WAL, bytes an event",
        "peak MB",
        "times the naive one",
    )
    return f"One thing different from a backlog of {result['events']:,} events:\n\n" + table(
        (*head, "lost, doubled, reordered"), rows
    )


def _budget(result: Result) -> str:
    wal = result["wal_bytes_per_event"]
    cpu = f"CPU, µs an event: {_shares(result['cpu_us_per_event'])}"
    logged = f"WAL, bytes an event: {wal['written']} by the writer's INSERT, {wal['drained']} by the relay"
    threads = [[process, _shares(groups)] for process, groups in result["threads_us_per_event"].items()]
    parts = [
        f"A relay at work, {result['events_per_s']:,} events/s. {cpu}. {logged}.\n",
        table(("of the CPU of", "µs an event, by thread"), threads),
    ]
    statements = [
        [
            one["statement"],
            *(str(one[name]) for name in ("calls_per_1000_events", "us_per_event", "wal_bytes_per_event")),
        ]
        for one in result["statements"]
    ]
    parts.append(table(("statement", "calls, of 1,000 events", "µs an event", "WAL, bytes an event"), statements))
    if result["profile"]:
        parts.append("The event loop's thread, by py-spy: " + _shares(result["profile"], " %") + ".\n")
    steps = [
        [one["step"], str(one["here_us_per_event"]), _text(one["server_us_per_event"]), one["server"] or ""]
        for one in result["steps"]
    ]
    parts.append(table(("each step alone", "µs an event", "in the server", ""), steps))
    return "\n".join(parts)


def _shares(found: Mapping[str, float], unit: str = "") -> str:
    return ", ".join(f"{name} {value:g}{unit}" for name, value in found.items())


def _compression(result: Result) -> str:
    rows = [
        [
            one["codec"],
            _text(one["batch_rows"]),
            _text(one["bytes_per_event"]),
            *(_text(one["cpu_us_per_event"][name]) for name in ("relay", "broker", "database")),
        ]
        for one in result["codecs"]
    ]
    head = ("codec", "events a transaction", "bytes of log an event", "CPU, µs an event: relay", "broker", "database")
    return f"The platform's own events, {result['events']:,} of them:\n\n" + table(head, rows)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _held(result: Result) -> str:
    rows = [
        [*_drained(kind, one), _text(one["last_to_first"]), _text(one["table_mb"])]
        for kind, one in result["kinds"].items()
    ]
    head = (*DRAINED, "last round to first", "table at the end, MB")
    return f"Rounds of {result['events']:,} events while sessions sit in their transactions:\n\n" + table(head, rows)


def _write(result: Result) -> str:
    columns = {
        "without, ms": "without_ms",
        "with an event, ms": "with_one_ms",
        "added %": "added_percent",
        "added µs": "added_us",
        "with 100, ms": "with_100_ms",
        "µs an event of 100": "us_per_event_of_100",
        "events/s": "events_per_s",
    }
    ways = [[f"`{way}`", *(f"{one[name]:,}" for name in columns.values())] for way, one in result["ways"].items()]
    steps = [
        [f"{one['step']}, of {one['events']} event(s)", str(one["us"]), one["bound"], str(one["bound_us"])]
        for one in result["steps"]
    ]
    medians = f"Medians of {result['transactions']} transactions of each kind:\n\n"
    return (
        medians
        + table(("a transaction by", *columns), ways)
        + "\nWhere the time of a write goes, each step alone:\n\n"
        + table(("step", "µs an event", "beside", "µs"), steps)
    )


def _consumer(result: Result) -> str:
    rows = [
        [
            way,
            f"{one['events_per_s']:,}",
            " ".join(f"{rate:,}" for rate in one["rounds"]),
            ", ".join(f"{process} {seconds}" for process, seconds in one["cpu_s"].items()),
            str(one["lost"]),
        ]
        for way, one in result["ways"].items()
    ]
    head = ("handler", "events/s, median", "all rounds", "CPU s of that round", "lost")
    return f"Consumer, a row an event, batches of {result['batch']}:\n\n" + table(head, rows)


def _inbox(result: Result) -> str:
    rows = [
        [
            f"`{way}`",
            f"{one['events_per_s']:,}",
            f"{one['known_events_per_s']:,}",
            ", ".join(f"{process} {seconds}" for process, seconds in one["cpu_s"].items()),
        ]
        for way, one in result["ways"].items()
    ]
    head = ("claims by", "new events/s", "known events/s", "CPU s")
    return f"Inbox, {result['events']:,} events in batches of {result['batch']}:\n\n" + table(head, rows)


def _transaction(result: Result) -> str:
    rows = [
        (step, *(f"{one[name]:g}" for name in ("p50_ms", "p95_ms", "p99_ms", "max_ms")))
        for step, one in result["steps"].items()
    ]
    return f"A bare Kafka transaction, {result['transactions']:,} of them, ms:\n\n" + table(
        ("step", "p50", "p95", "p99", "longest"), rows
    )


def _idle(result: Result) -> str:
    shares = ", ".join(f"{name} {percent} %" for name, percent in result["percent_of_a_core"].items())
    memory = ", ".join(f"{name} {peak} MB" for name, peak in result["peak_mb"].items())
    return f"Idle for {result['seconds']:g} s, of a core: {shares}. Peak memory: {memory}.\n"


def read(lines: Iterable[str]) -> dict[str, Result]:
    """The results in the output of `python -m benchmarks`, by their `bench`. UsageError where there is none."""
    found = [json.loads(line) for line in lines if line.startswith("{")]
    if not found:
        raise click.UsageError("there is no JSON line in it: python -m benchmarks > results.jsonl")
    return {result["bench"]: result for result in found}


@click.command()
@click.argument("lines", type=click.File(encoding="utf-8"), default="-")
def main(lines: TextIO) -> None:
    """Print the tables of LINES, a file of `python -m benchmarks` output (default: stdin)."""
    click.echo(report(read(lines)), nl=False)


if __name__ == "__main__":
    main()
