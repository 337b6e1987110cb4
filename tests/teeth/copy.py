"""A copy of the working tree, in which the code is broken and the tests are run. The tree itself is never touched."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import cache_from_source
from pathlib import Path
from xml.etree import ElementTree

from tests.teeth.mutations import Mutation

ROOT = Path(__file__).parents[2]

PARTS = ("outbox", "relay", "migrations", "schemas", "tests", "pyproject.toml")
"""What the tests that are run need of the tree."""

MINUTES = 4
"""A run of pytest that takes longer has said nothing: it is ended, and nothing is concluded from it."""


class MutationError(Exception):
    """A mutation that cannot be made: its words are not there just once, or what comes of it is no Python."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one run of pytest says."""

    passed: bool
    """All tests were run, and passed."""
    failure: str | None
    """The first test that failed, as file::test."""
    text: str
    """pytest's own words."""
    seconds: float


def mutated(source: str, mutation: Mutation) -> str:
    """The source as the mutation leaves it. Raises MutationError: then the code has changed, and so must the mutation
    be."""
    for old, new in mutation.edits:
        if (count := source.count(old)) != 1:
            raise MutationError(f"{mutation.name}: {mutation.file} has these words {count} times, not once:\n{old}")
        source = source.replace(old, new)
    try:
        compile(source, mutation.file, "exec")
    except SyntaxError as error:
        raise MutationError(f"{mutation.name}: no Python any more, {error}") from error
    return source


class Copy:
    """A copy of the tree at `folder`."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        """`environment`: of the tests, beside what CI means to them: a skip is a failure, and hypothesis draws the
        same examples each time."""
        self._folder = folder
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
        self._environment = {**inherited, **environment, "CI": "true"}
        for part in PARTS:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / part, folder / part)
        self._check_imports()

    def _check_imports(self) -> None:
        """What the tests import is the copy, not the tree that is installed."""
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import outbox, relay, tests; print(outbox.__path__, relay.__path__, tests.__path__)",
            ],
            cwd=self._folder,
            env=self._environment,
            check=False,
            capture_output=True,
            text=True,
        )
        if done.stdout.count(str(self._folder)) != 3:
            raise MutationError(f"the tests do not import the copy at {self._folder}: {done.stdout}{done.stderr}")

    @contextmanager
    def broken(self, mutation: Mutation) -> Iterator[None]:
        """The mutation, for as long as the block lasts."""
        path = self._folder / mutation.file
        sound = path.read_text()
        self._write(path, mutated(sound, mutation))
        try:
            yield
        finally:
            self._write(path, sound)

    def _write(self, path: Path, source: str) -> None:
        """With no bytecode left: it counts as fresh for a file of the same size and second."""
        path.write_text(source)
        Path(cache_from_source(str(path))).unlink(missing_ok=True)

    def run(self, tests: Sequence[str], without: Sequence[str] = ()) -> Result:
        """pytest on these tests, up to the first failure. `without`: names that their environment is to lack."""
        report = self._folder / "report.xml"
        report.unlink(missing_ok=True)
        began = time.monotonic()
        # In the order given, and without a limit for a test: that a busy machine is slow is no failure.
        options = ["-q", "-x", "-p", "no:randomly", "-p", "no:cacheprovider", "--timeout=0", f"--junitxml={report}"]
        status, text = _ended(
            [sys.executable, "-m", "pytest", *options, *tests],
            self._folder,
            {name: value for name, value in self._environment.items() if name not in without},
        )
        xml = report.read_text() if report.exists() else None
        return Result(status == 0, failure_of(status, xml), text, time.monotonic() - began)


def failure_of(status: int | None, report: str | None) -> str | None:
    """The first test that failed, by pytest's exit status (None: it was ended) and its report in JUnit's XML.

    None where no test failed: also when none could be run (a test file that cannot be imported, a fixture that cannot
    be made), for that says nothing about what the tests notice.
    """
    if status != 1 or report is None:
        return None
    for case in ElementTree.fromstring(report).iter("testcase"):  # noqa: S314 -- pytest has just written it
        if case.find("failure") is not None:
            return f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
    return None


def _ended(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> tuple[int | None, str]:
    """Exit status and output of the command, which is ended with all that it has started when it takes too long."""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            text, _ = child.communicate(timeout=MINUTES * 60)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            return None, f"did not end within {MINUTES} minutes"
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
        return child.returncode, text
