"""What the example's consumers have in common as processes: catalogue, engine, log, and an end in order."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import structlog
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase

from examples.chip_quality import events
from outbox.catalogue import Catalogue
from outbox.consumer import Consumer

log = structlog.get_logger("chip_quality")

SCHEMAS = Path(__file__).parents[2] / "schemas"

TELL_SECONDS = 0.5
"""Between two lines of the log that say how far a consumer is."""


def catalogue() -> Catalogue:
    """The platform's events, decoded into their classes."""
    return Catalogue.from_folder(SCHEMAS, events=events)


def engine_for(url: str) -> AsyncEngine:
    """An engine over asyncpg for a `postgresql://` URL."""
    return create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"))


def kafka(name: str, bootstrap: str) -> dict[str, str]:
    """Settings of a consumer's client."""
    # A restarted instance gets its partitions back at once; without it they wait for the dead one's session.
    return {"bootstrap.servers": bootstrap, "group.instance.id": os.environ.get("CONSUMER_INSTANCE", f"{name}-1")}


async def run(consumer: Consumer, tables: type[DeclarativeBase], *beside: Callable[[], Awaitable[None]]) -> None:
    """Consume until SIGTERM or SIGINT, with what runs `beside` in the same process until it is cancelled."""
    if not isinstance(consumer.engine, AsyncEngine):
        raise TypeError("the examples' consumers have an AsyncEngine")
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, consumer.stop)
    async with consumer.engine.begin() as connection:
        await connection.run_sync(tables.metadata.create_all)  # an example's shortcut; a service has migrations
    log.info("consumer started", consumer=consumer.name, topics=sorted(consumer.topics))
    tasks = [asyncio.ensure_future(one()) for one in (lambda: _tell(consumer), *beside)]
    for task in tasks:
        task.add_done_callback(lambda _: consumer.stop())  # none of them ends by itself but with an error
    try:
        await consumer.run()
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        tell(consumer)
        await consumer.engine.dispose()
    log.info("consumer stopped", consumer=consumer.name)


async def _tell(consumer: Consumer) -> None:
    while True:
        await asyncio.sleep(TELL_SECONDS)
        tell(consumer)


def tell(consumer: Consumer) -> None:
    """One line: what came, what took effect, what had taken effect before."""
    metrics = consumer.metrics
    log.info(
        "progress",
        received=metrics.received.total(),
        new=metrics.processed.total(),
        duplicates=metrics.duplicates.total(),
        dead=metrics.dead.total(),
    )


def configure_log() -> None:
    """JSON lines on stderr."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
