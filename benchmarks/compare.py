"""`python -m benchmarks.compare REF`: this tree's relay beside that of another commit, in one run, in turns.

A figure of last week says little on a machine that others use as well; a ratio of neighbours does. The other commit's
relay runs out of a worktree of its own, on a database that its own migrations made, with this environment's packages.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from benchmarks.drain import fresh, told, warm
from benchmarks.figures import summary
from benchmarks.latency import FULL, WARMING, one_round
from benchmarks.stage import ROOT, Backlog, Contender, Stage, say

EVENTS = 200_000
SLOWER = 0.9
"""A ratio below it is a regression: rounds of one and the same relay differ by less."""


@contextmanager
def worktree(ref: str) -> Iterator[Path]:
    """The tree of a commit. ClickException where git knows none."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tree"
        done = subprocess.run(
            ["git", "worktree", "add", "--detach", str(path), ref],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise click.ClickException(f"no tree of {ref}: {done.stderr.strip()}")
        try:
            yield path
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(path)], cwd=ROOT, check=False)


def other(stage: Stage, root: Path) -> Contender:
    """The relay of the tree `root`, on a database that its own migrations made."""
    url = stage.postgres.create_database("compare_other")
    subprocess.run([sys.executable, "-m", "outbox", "migrate", url], env={"PYTHONPATH": str(root)}, check=True)
    return Contender("other", "compare_other", "outbox.outbox", ("relay", "run"), "lane taken", root)


def compared(measure: Callable[[Contender], float], ours: Contender, theirs: Contender, rounds: int) -> dict[str, Any]:
    """Rounds in turns: the median of the ratios of neighbours, ours to theirs."""
    pairs = [(measure(ours), measure(theirs)) for _ in range(rounds)]
    ratios = [round(one / two, 3) for one, two in pairs]
    return {
        "ours": round(statistics.median(one for one, _ in pairs), 2),
        "other": round(statistics.median(two for _, two in pairs), 2),
        "ratios": ratios,
        "ratio": statistics.median(ratios),
    }


@click.command()
@click.argument("ref")
@click.option("--rounds", default=7, help="Of each benchmark, each relay.  [default: 7]")
@click.option("--warming", default=6, help="Unmeasured rounds before.  [default: 6]")
@click.option("--events", default=EVENTS, help="In a backlog.  [default: 200,000]")
def main(ref: str, rounds: int, warming: int, events: int) -> None:
    """Drain a backlog and time single events by this tree's relay and by that of REF; one JSON line each.

    Exit code 1 where this tree is more than a tenth slower.
    """
    with worktree(ref) as root, Stage() as stage:
        ours, theirs = stage.relay("compare_ours"), other(stage, root)
        backlog, topic = Backlog((stage.topic("compare"),), events), stage.topic("compare-latency")
        sizes = replace(FULL, seconds=5.0)

        def drained(contender: Contender) -> float:
            found = fresh(stage, contender, backlog)
            say(f"drain: {told(contender, found)}")
            return found.rate

        def promptness(contender: Contender) -> float:
            """Events a second of waiting: as with a rate, more is better."""
            found = summary(one_round(stage, contender, topic, WARMING, sizes).latencies)
            say(f"latency: {contender.name} {found}")
            return 1_000 / found["p50_ms"]

        warm(stage, (ours, theirs), backlog, warming)
        found = {
            "drain": compared(drained, ours, theirs, rounds),
            "latency": compared(promptness, ours, theirs, min(rounds, 3)),
        }
    for name, one in found.items():
        print(json.dumps({"compare": name, "ref": ref, **one}), flush=True)
    raise SystemExit(1 if any(one["ratio"] < SLOWER for one in found.values()) else 0)


if __name__ == "__main__":
    main()
