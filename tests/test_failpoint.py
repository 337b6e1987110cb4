"""A failpoint kills the process at the step that it names, that many times later, and nowhere else."""

import signal
import subprocess
import sys

import pytest

from relay.errors import ConfigError
from relay.failpoint import Failpoint
from relay.lane import Step


@pytest.mark.parametrize("setting", ["nowhere", "commit:", "commit:x", "commit:-1", "commit:1:2", ":3", "COMMIT", " "])
def test_a_step_or_a_count_that_is_none_is_refused_by_name(setting: str) -> None:
    if setting == "commit:":  # no count: the first time
        Failpoint(setting)
        return
    with pytest.raises(ConfigError, match=r"OUTBOX_FAILPOINT is .*: use STEP or STEP:COUNT.*commit"):
        Failpoint(setting)


@pytest.mark.parametrize("setting", [None, ""])
def test_without_a_setting_no_step_kills(setting: str | None) -> None:
    failpoint = Failpoint(setting)
    for step in Step:
        failpoint.done(step)


@pytest.mark.parametrize(("setting", "survived"), [("flush", 0), ("flush:1", 0), ("flush:3", 2)])
def test_the_step_kills_when_it_was_done_for_the_nth_time(setting: str, survived: int) -> None:
    script = (
        "from relay.failpoint import Failpoint, Step\n"
        f"failpoint = Failpoint({setting!r})\n"
        "failpoint.done(Step.COMMIT)\n"
        "while True:\n"
        "    failpoint.done(Step.FLUSH)\n"
        "    print('alive', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.count("alive") == survived
