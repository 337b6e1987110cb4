"""The command `relay`. Exit codes: 0 stopped as asked, 2 the settings or the outbox's tables are wrong, 128 + n left at
once."""

import asyncio
import gc
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import click
import structlog

from relay.config import load
from relay.errors import ConfigError
from relay.failpoint import VARIABLE, Failpoint
from relay.supervisor import Relay

EXIT_CONFIG = 2

GC_THRESHOLD = 100_000
"""Objects made before the garbage collector looks for cycles. Python's 700 has it walk every batch a dozen times: 15 %
of the relay's CPU under a backlog. A batch makes no cycles; reference counts free it."""


@click.group()
@click.version_option(package_name="kafka-outbox")
def main() -> None:
    """Publish the events of an outbox to Kafka: exactly once, in the order of each key."""


@main.command()
@click.option(
    "--config", type=click.Path(path_type=Path), help="TOML file with settings; the environment goes above it."
)
def run(config: Path | None) -> None:
    """Run the relay until SIGTERM.

    \b
    OUTBOX_DATABASE_URL=postgresql://localhost/orders OUTBOX_KAFKA_BOOTSTRAP_SERVERS=localhost:9092 relay run
    """
    try:
        settings = load(path=config)
        _configure_logging(settings.log_level)
        gc.set_threshold(GC_THRESHOLD)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_run(Relay(settings, Failpoint(os.environ.get(VARIABLE)))))
    except ConfigError as error:
        click.echo(f"relay: {error}", err=True)
        sys.exit(EXIT_CONFIG)
    sys.stderr.flush()
    os._exit(0)  # a call to Kafka that was abandoned may still hold a thread


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed (the extra `uvloop`): a fetch costs less CPU."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _run(relay: Relay) -> None:
    relay.handle_signals()
    await relay.run()


def _configure_logging(level: str) -> None:
    """Lines for people on a terminal, JSON elsewhere. On stderr."""
    logging.getLogger("asyncpg").addHandler(logging.NullHandler())  # what it logs is raised as well, and logged by us
    logging.getLogger("asyncpg").propagate = False
    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


if __name__ == "__main__":
    main()
