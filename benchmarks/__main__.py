"""`python -m benchmarks [--only relay,latency,…] [--quick]`: a JSON line a benchmark on stdout, progress on stderr."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from benchmarks import budget, compression, consumer, drain, idle, inbox, latency, sweep, transaction, write
from benchmarks.stage import Stage, say


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark with its sizes: the real ones, and small ones to see that it works."""

    run: Callable[[Stage, Any], dict[str, Any]]
    full: Any
    quick: Any


# In the order in which they run: those without Kafka first, while no broker takes its share of the machine.
BENCHMARKS: Mapping[str, Benchmark] = {
    "write": Benchmark(write.write, write.FULL, write.QUICK),
    "inbox": Benchmark(inbox.inbox, inbox.FULL, inbox.QUICK),
    "consumer": Benchmark(consumer.consumer, consumer.FULL, consumer.QUICK),
    "relay": Benchmark(drain.relay, drain.RELAY, drain.RELAY_QUICK),
    "latency": Benchmark(latency.latency, latency.FULL, latency.QUICK),
    "transaction": Benchmark(transaction.transaction, transaction.FULL, transaction.QUICK),
    "held-snapshot": Benchmark(drain.held_snapshot, drain.HELD, drain.HELD_QUICK),
    "idle": Benchmark(idle.idle, idle.FULL, idle.QUICK),
    "budget": Benchmark(budget.budget, budget.FULL, budget.QUICK),
    "compression": Benchmark(compression.compression, compression.FULL, compression.QUICK),
    "load": Benchmark(latency.latency, latency.LOAD, latency.LOAD_QUICK),
    "sweep": Benchmark(sweep.sweep, sweep.FULL, sweep.QUICK),
    "sustained": Benchmark(latency.latency, latency.SUSTAINED, latency.SUSTAINED_QUICK),
}

LONG = ("budget", "compression", "load", "sweep", "sustained")
"""A quarter of an hour and more: only when asked for."""


def chosen(text: str) -> list[str]:
    """The benchmarks that `text` names, by commas (empty: all but LONG), in their order. UsageError for others."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise click.UsageError(f"no benchmark {', '.join(unknown)}. There are: {', '.join(BENCHMARKS)}")
    return [name for name in BENCHMARKS if name in names or (not names and name not in LONG)]


def flaws(found: Any) -> int:
    """Events of our relay that were lost, doubled, out of order or never written, anywhere in a result."""
    if isinstance(found, list):
        return sum(flaws(one) for one in found)
    if not isinstance(found, dict):
        return 0
    own: int = sum(found.get(name, 0) for name in ("lost", "doubled", "reordered", "strangers"))
    return own + sum(flaws(one) for name, one in found.items() if name != "naive")


@click.command()
@click.option("--only", default=lambda: os.environ.get("ONLY", ""), help=f"Some of: {', '.join(BENCHMARKS)}.")
@click.option("--quick", is_flag=True, help="Small sizes, to see that it works. The figures say nothing.")
def main(only: str, quick: bool) -> None:
    """Measure on real servers (PostgreSQL with fsync, one Kafka broker), each benchmark's figures as one JSON line.

    Exit code 1 when an event of our relay was lost, doubled or out of order: then no figure counts.
    """
    flawed = 0
    with Stage() as stage:
        for name in chosen(only):
            say(f"— {name}{' (quick: the figures say nothing)' if quick else ''}")
            benchmark = BENCHMARKS[name]
            found = benchmark.run(stage, benchmark.quick if quick else benchmark.full)
            flawed += flaws(found)
            print(
                json.dumps({"bench": name, **({"quick": True} if quick else {}), **found, **stage.description()}),
                flush=True,
            )
    raise SystemExit(1 if flawed else 0)


if __name__ == "__main__":
    main()
