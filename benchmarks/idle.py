"""`idle`: what a relay costs that has nothing to do, and what its standby costs."""

import time
from dataclasses import dataclass
from typing import Any

from benchmarks import machine
from benchmarks.figures import difference
from benchmarks.stage import Stage, say


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long is measured."""

    seconds: float = 20.0
    settling: float = 5.0
    """Before: polling slows down within a second of silence, and the broker has to forget the start."""


FULL = Sizes()
QUICK = Sizes(seconds=5.0, settling=2.0)


def idle(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    """Percent of one core, of a relay that holds an empty lane and of another that waits for it."""
    contender = stage.relay("idle")
    with stage.running(contender) as relay, stage.running(contender, ready="relay started") as standby:
        time.sleep(sizes.settling)
        pids = stage.pids(relay=relay.pid, standby=standby.pid)
        before, start = machine.readings(pids), time.monotonic()
        time.sleep(sizes.seconds)
        spent, wall = difference(before, machine.readings(pids)), time.monotonic() - start
        memory = {"relay": machine.peak_mb(relay.pid), "standby": machine.peak_mb(standby.pid)}
    percent = {name: None if one is None else round(one / wall * 100, 2) for name, one in spent.items()}
    say(f"idle: percent of a core {percent}, peak MB {memory}")
    return {"seconds": round(wall, 1), "percent_of_a_core": percent, "peak_mb": memory, "cpu_s": spent}
