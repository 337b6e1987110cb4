"""A member of a consumer group in a process of its own, that may kill itself at a step; and the handle on it.

`mode`: `single` or `batch`. `setting`: STEP:COUNT, at whose COUNT-th passage it dies by SIGKILL. Steps: `claimed` (the
handler begins), `written` (it ends), `committed` (the database has committed the effect, Kafka knows nothing yet),
`told` (Kafka has committed an offset). `number:N`: it dies whenever it handles event N. Its log are lines of JSON.
"""

import asyncio
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any
from uuid import uuid4

import structlog
from sqlalchemy import event as hooks
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from outbox import Event
from outbox.consumer import Consumer, Failures, Limits, Meta
from tests.consumer.stage import PATIENCE, async_engine, catalogue, fast, insert, until

DEATHS = 1_000
"""More than any test causes."""

# --- the process ---


class Failpoint:
    """Dies on purpose."""

    def __init__(self, setting: str) -> None:
        self._step, _, count = setting.partition(":")
        self._count = self._left = int(count or 1)
        self._written = False

    def passed(self, step: str) -> None:
        if step == self._step:
            self._left -= 1
            if self._left <= 0:
                _die()

    def handling(self, events: list[Event]) -> None:
        self._written = True
        if self._step == "number" and any(event.data["number"] == self._count for event in events):
            _die()
        self.passed("claimed")

    def committed(self) -> None:
        """Of commits only those that a handler wrote for."""
        if self._written:
            self._written = False
            self.passed("committed")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def serve(url: str, bootstrap: str, topic: str, mode: str, setting: str, more: dict[str, Any]) -> None:
    failpoint = Failpoint(setting)
    engine = async_engine(url)
    kafka = fast(bootstrap, **more)
    kafka["on_commit"] = lambda error, _: None if error else failpoint.passed("told")
    limits = Limits(commit=0.05, revoke=2.0, concurrency=1 if setting.startswith("committed") else 4)
    # What was at work at three deaths is parked, as it should be. Here that is an event's own fault with `number` only.
    failures = Failures(hold=False, kills=3 if setting.startswith("number") else DEATHS)
    consumer = Consumer(topic, engine, catalogue=catalogue(), kafka=kafka, limits=limits, failures=failures)
    hooks.listen(Session, "after_commit", lambda _: failpoint.committed())

    async def write(events: list[Event], session: AsyncSession) -> None:
        failpoint.handling(events)
        await insert(session, events)
        failpoint.passed("written")

    if mode == "batch":

        @consumer.on_batch(Event, topic=topic, size=20)
        async def note_many(events: list[Event], session: AsyncSession, _: list[Meta]) -> None:
            await write(events, session)
    else:

        @consumer.on(Event, topic=topic)
        async def note(event: Event, session: AsyncSession, _: Meta) -> None:
            await write([event], session)

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, consumer.stop)
    await consumer.run()
    await engine.dispose()


def main(log: str, *arguments: Any) -> None:
    """The process."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper("iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=repr),
        ],
        logger_factory=structlog.PrintLoggerFactory(Path(log).open("a", buffering=1)),  # noqa: SIM115 - lives as long as we
    )
    asyncio.run(serve(*arguments))


# --- the handle on it ---

# A server that has imported everything and forks: a member is there in 50 ms, not in a second of CPU.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.consumer.member"])


class Member:
    """The process, started. `kafka`: settings of its client, with `_` for the dots."""

    def __init__(
        self, folder: Path, url: str, bootstrap: str, topic: str, mode: str = "single", setting: str = "", **kafka: Any
    ) -> None:
        self._log = folder / f"{uuid4()}.log"
        self._log.touch()
        arguments = (str(self._log), url, bootstrap, topic, mode, setting, kafka)
        self._child = _forks.Process(target=main, args=arguments, daemon=True)
        self._child.start()

    @property
    def alive(self) -> bool:
        return self._child.is_alive()

    @property
    def text(self) -> str:
        """Its log."""
        return self._log.read_text()

    async def wait_for_partitions(self) -> None:
        """Until it has any."""
        await until(lambda: '"partitions assigned"' in self.text and '"partitions": [[' in self.text)

    async def wait(self) -> int:
        """Its exit status, once it has ended."""
        await until(lambda: not self.alive, self.text)
        return int(self._child.exitcode or 0)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._child.pid or 0, number)

    def kill(self) -> None:
        self._child.kill()
        self._child.join(PATIENCE)

    async def stop(self) -> None:
        """In order."""
        self.signal(signal.SIGTERM)
        assert await self.wait() == 0, self.text
