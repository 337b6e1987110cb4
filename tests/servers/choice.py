"""Where a server comes from: a URL in the environment → local parts → Docker → a sentence that says what to do.

OUTBOX_TEST_SERVERS=url|local|docker forces one of them; then a missing server is an error, never a skip.
"""

import os
from collections.abc import Callable
from enum import StrEnum

from tests.servers.errors import ServerUnavailable

FORCED = "OUTBOX_TEST_SERVERS"


class Source(StrEnum):
    """The three origins of a server, in their order of choice."""

    URL = "url"
    LOCAL = "local"
    DOCKER = "docker"


def is_forced() -> bool:
    """Whether a missing server is an error: a choice was forced, or this is CI, where a skip would hide a failure."""
    return bool(os.environ.get(FORCED)) or in_ci()


def in_ci() -> bool:
    """Whether CI is set, as every hosted runner and .ci/run do."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def choose(server: str, *, variable: str, local: Callable[[], str | None], docker: Callable[[], str | None]) -> Source:
    """The first origin that can give `server`; `local` and `docker` return what they lack, None when nothing.

    Raises ServerUnavailable with one sentence per origin, or ValueError when OUTBOX_TEST_SERVERS names none of them.
    """
    checks: dict[Source, Callable[[], str | None]] = {
        Source.URL: lambda: None if os.environ.get(variable) else f"set {variable} to use a running one",
        Source.LOCAL: local,
        Source.DOCKER: docker,
    }
    forced = os.environ.get(FORCED)
    lacking: list[str] = []
    for source in [Source(forced)] if forced else list(Source):
        missing = checks[source]()
        if missing is None:
            return source
        lacking.append(f"{source}: {missing}")
    raise ServerUnavailable(f"No {server} for the tests: " + "; ".join(lacking) + ".")
