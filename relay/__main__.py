"""The command `relay`. Exit codes of `run`: 0 stopped as asked, 2 the settings or the outbox's tables are wrong,
128 + n left at once. Those of the other commands stand in their help."""

import asyncio
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import structlog

from relay.commands import (
    check_command,
    config_command,
    dead_group,
    lanes_command,
    status_command,
    trace_command,
)
from relay.config import RelayConfig, load
from relay.errors import ConfigError, LaneTrouble
from relay.failpoint import VARIABLE, Failpoint
from relay.queries import REFUSED, TROUBLE, Queries, connect, words_of
from relay.resolve import Choice, LanePlan, Resolver, text_of
from relay.supervisor import Relay, opened
from relay.transaction import check_settings

EXIT_BLOCKED, EXIT_CONFIG, EXIT_TROUBLE = 1, 2, 3

RESOLVE_SECONDS = 600.0
"""A statement of `resolve` may take so long: it reads, or deletes, all that waits in a lane."""

GC_THRESHOLD = 100_000
"""Objects made before the garbage collector looks for cycles. Python's 700 has it walk every batch a dozen times: 15 %
of the relay's CPU under a backlog. A batch makes no cycles; reference counts free it."""


@click.group()
@click.version_option(package_name="kafka-outbox")
def main() -> None:
    """Publish the events of an outbox to Kafka: exactly once, in the order of each key."""


for command in (check_command, status_command, dead_group, lanes_command, trace_command, config_command):
    main.add_command(command)


@main.command()
@click.option(
    "--config", type=click.Path(path_type=Path), help="TOML file with settings; the environment goes above it."
)
def run(config: Path | None) -> None:
    """Run the relay until SIGTERM. SIGUSR1: log level debug; SIGUSR2: back to OUTBOX_LOG_LEVEL.

    \b
    OUTBOX_DATABASE_URL=postgresql://localhost/orders OUTBOX_KAFKA_BOOTSTRAP_SERVERS=localhost:9092 relay run
    """
    try:
        settings = load(path=config)
        _configure_logging(settings.log_level)
        if config is not None:
            os.environ["OUTBOX_CONFIG"] = str(config)  # for the commands that the page runs
        gc.set_threshold(GC_THRESHOLD)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_run(Relay(settings, Failpoint(os.environ.get(VARIABLE))), settings.log_level))
    except ConfigError as error:
        click.echo(f"relay: {error}", err=True)
        sys.exit(EXIT_CONFIG)
    sys.stderr.flush()
    os._exit(0)  # a call to Kafka that was abandoned may still hold a thread


@main.command()
@click.option("--plan/--apply", "plan_only", default=True, help="Say what would be done (the default), or do it.")
@click.option("--lane", "lanes", type=int, multiple=True, help="Only this lane; may be given again.  [default: all]")
@click.option("--adopt", is_flag=True, help="This database takes over the outbox's name, and is its home from now on.")
@click.option("--accept-unknown", is_flag=True, help="Publish also events that Kafka may have had: perhaps twice.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, with every event.")
@click.option(
    "--config", type=click.Path(path_type=Path), help="TOML file with settings; the environment goes above it."
)
def resolve(
    plan_only: bool, lanes: tuple[int, ...], adopt: bool, accept_unknown: bool, as_json: bool, config: Path | None
) -> None:
    """Find out what halted lanes have published, and let them go on.

    Reads back from Kafka which of the events that wait in the database are there. With --apply those are deleted, and
    the lane goes on: each event is in Kafka exactly once, whatever was restored or replaced. The relays may run
    meanwhile; lanes that are not halted are left alone. What to look at first: docs/operations.md, "A halted lane".

    \b
    Example:
      relay resolve && relay resolve --apply

    \b
    Exit codes:
      0  --apply: all these lanes go on; --plan: they would
      1  a lane stays halted: its plan says which decision of yours it needs
      2  the settings are wrong, or the database is a copy (see --adopt)
      3  Kafka or the database is away, or the lane changed meanwhile; nothing is half done: try again
    """
    try:
        settings = load(path=config)
        resolved = asyncio.run(_resolve(settings, Choice(adopt, accept_unknown), lanes, apply=not plan_only))
    except ConfigError as error:
        click.echo(f"relay: {error}", err=True)
        sys.exit(EXIT_CONFIG)
    except (LaneTrouble, *TROUBLE) as error:
        click.echo(f"relay: {words_of(error)}", err=True)
        sys.exit(EXIT_TROUBLE)
    if as_json:
        click.echo(json.dumps({"lanes": [plan.document() for plan in resolved]}, indent=2))
    else:
        click.echo("\n\n".join(map(text_of, resolved)) or "no such lane is halted")
    sys.exit(EXIT_BLOCKED if any(plan.blocked for plan in resolved) else 0)


async def _resolve(settings: RelayConfig, choice: Choice, lanes: tuple[int, ...], *, apply: bool) -> list[LanePlan]:
    check_settings(settings)
    pool = await connect(replace(settings, database_timeout=max(RESOLVE_SECONDS, settings.database_timeout)), 2)
    try:
        queries = Queries(pool, settings.schema)
        return await Resolver(settings, queries, await opened(queries, settings.schema), choice).run(lanes, apply)
    except REFUSED as error:
        raise ConfigError(f"the database refuses: {words_of(error)}") from error
    finally:
        pool.terminate()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed (the extra `uvloop`): a fetch costs less CPU."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _run(relay: Relay, level: str) -> None:
    relay.handle_signals()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, _change_level, "debug")
    loop.add_signal_handler(signal.SIGUSR2, _change_level, level)
    await relay.run()


def _change_level(level: str) -> None:
    structlog.configure(wrapper_class=_filter("info"))  # so that it is said, whatever the level was and will be
    structlog.get_logger("relay").info("log level changed", to=level)
    structlog.configure(wrapper_class=_filter(level))


def _filter(level: str) -> type[Any]:
    return structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()])


def _configure_logging(level: str) -> None:
    """Lines for people on a terminal, JSON elsewhere. On stderr."""
    logging.getLogger("asyncpg").addHandler(logging.NullHandler())  # what it logs is raised as well, and logged by us
    logging.getLogger("asyncpg").propagate = False
    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            # Without its default's local variables, which may be a payload.
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
            if terminal
            else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=_filter(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


if __name__ == "__main__":
    main()
