"""Dying on purpose, for the crash tests: `OUTBOX_FAILPOINT=commit:3` kills the process when it has done that step for
the third time.

Steps are those of `relay.lane.Step`; a process without the variable pays one attribute look-up a step.
"""

import os
import signal

from relay.errors import ConfigError
from relay.lane import Step

VARIABLE = "OUTBOX_FAILPOINT"


class Failpoint:
    """Kills the process with SIGKILL when a step was done for the n-th time."""

    def __init__(self, setting: str | None) -> None:
        self._step: Step | None = None
        if setting:
            name, _, count = setting.partition(":")
            if name not in [step.value for step in Step] or not (count or "1").isdigit():
                raise ConfigError(
                    f"{VARIABLE} is {setting!r}: use STEP or STEP:COUNT, with STEP one of {', '.join(Step)}"
                )
            self._step, self._left = Step(name), int(count or 1)

    def done(self, step: Step) -> None:
        if step is self._step:
            self._left -= 1
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
