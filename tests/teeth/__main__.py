"""`make teeth`: each mutation in a copy of the tree, one at a time, and the tests that must notice it.

First the tests pass on the sound copy, else the rest would say nothing. A mutation is killed when a test fails, and not
when something else goes wrong. The last line is `survivors N of M`; exit status 0 when N is 0.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.servers import Kafka, Postgres, running
from tests.servers.kafka import URL_VARIABLE as KAFKA
from tests.servers.postgres import URL_VARIABLE as POSTGRES
from tests.teeth.copy import ROOT, Copy, MutationError, Result, mutated
from tests.teeth.mutations import HAZARDS, MUTATIONS, Mutation

PATIENCE = "10"
"""Seconds that a test waits for what never comes, instead of the 60 that a busy machine may need. On the sound copy the
same must be enough."""


LONG_EXAMPLE = 80
"""Characters. A test's example that is longer is not shown with its name."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A mutation, and what the tests made of it."""

    mutation: Mutation
    result: Result

    @property
    def killer(self) -> str:
        """The test that failed, as it is shown."""
        if self.result.failure is None:
            return "SURVIVED"
        shown = self.result.failure.removeprefix("tests/").replace(".py::", ": ", 1)
        test, _, example = shown.partition("[")
        return shown if len(example) < LONG_EXAMPLE else test


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.teeth", description=__doc__)
    parser.add_argument("--only", help="names of mutations, with commas between them", default="")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/proof.md")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left behind
    try:
        chosen = _chosen(options.only)
        tried = _tried(chosen)
    except MutationError as error:
        print(error, file=sys.stderr)
        return 2
    survivors = [one for one in tried if one.result.failure is None]
    if options.markdown:
        print("\n".join(markdown(tried)))
    print(f"survivors {len(survivors)} of {len(tried)}")
    return 1 if survivors else 0


def _chosen(only: str) -> list[Mutation]:
    names = [name for name in only.split(",") if name]
    if unknown := set(names) - {mutation.name for mutation in MUTATIONS}:
        raise MutationError(f"no mutation is called {', '.join(sorted(unknown))}")
    return [mutation for mutation in MUTATIONS if not names or mutation.name in names]


def _tried(chosen: Sequence[Mutation]) -> list[Tried]:
    """Every mutation, on the same servers. Raises MutationError when one cannot be made, or the sound copy does not
    pass."""
    for mutation in chosen:
        mutated((ROOT / mutation.file).read_text(), mutation)
    postgres, kafka = Postgres(), Kafka()
    with tempfile.TemporaryDirectory(prefix="kafka-outbox-teeth-") as folder, running(postgres, kafka):
        environment = {POSTGRES: postgres.url(), KAFKA: kafka.bootstrap, "OUTBOX_TEST_PATIENCE": PATIENCE}
        copy = Copy(Path(folder), environment)
        _check_sound(copy, chosen)
        tried = []
        for mutation in chosen:
            with copy.broken(mutation):
                tried.append(Tried(mutation, run(copy, mutation.tests)))
            _say(tried[-1])
        return tried


def _check_sound(copy: Copy, chosen: Sequence[Mutation]) -> None:
    tests = dict.fromkeys(test for mutation in chosen for test in mutation.tests)
    for own_broker in (True, False):
        group = [test for test in tests if _starts_a_broker(test) is own_broker]
        if not group:
            continue
        result = run(copy, group)
        if not result.passed:
            raise MutationError(f"the tests do not pass on the sound copy:\n{result.text}")
        print(f"sound: {len(group)} selections of tests pass ({result.seconds:.0f} s)", flush=True)


def run(copy: Copy, tests: Sequence[str]) -> Result:
    """The tests on the copy as it is now."""
    return copy.run(tests, without=[KAFKA] if any(map(_starts_a_broker, tests)) else [])


def _starts_a_broker(test: str) -> bool:
    return test.startswith(HAZARDS)


def _say(one: Tried) -> None:
    print(f"{one.mutation.name}: {one.mutation.breaks}")
    print(f"{one.result.seconds:5.0f} s  {one.killer}", flush=True)
    if one.result.failure is None:
        print(one.result.text, flush=True)


def markdown(tried: Sequence[Tried]) -> list[str]:
    """The table of docs/proof.md."""
    rows = [f"| `{one.mutation.name}` | {one.mutation.breaks} | {one.killer} |" for one in tried]
    return ["| mutation | what is broken | the first test that fails |", "|---|---|---|", *rows]


if __name__ == "__main__":
    sys.exit(main())
