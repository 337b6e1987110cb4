"""The commands for people and scripts: `relay check | status | dead | lanes | trace | config`.

Each takes the relay's own settings. `--json`: one document on stdout and nothing else there. Exit codes, unless a
command's help says otherwise: 0 done, 1 it is not as it should be, 2 the settings or a grant are wrong, 3 Kafka or the
database is away, or a lane could not be had: try again.
"""

import asyncio
import base64
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import click
import structlog

from relay.check import Finding, check, document_of, guarantee, is_sound
from relay.config import RelayConfig, load, masked
from relay.dead import Change, change_parked
from relay.errors import ConfigError, LaneHalted, LaneTrouble
from relay.failpoint import VARIABLE, Failpoint
from relay.queries import REFUSED, TROUBLE, Meta, Queries, connect, words_of
from relay.status import is_well, status, tables_of
from relay.supervisor import opened
from relay.trace import text_of, trace
from relay.transaction import check_settings
from relay.views import Chosen, Views

EXIT_UNWELL, EXIT_CONFIG, EXIT_TROUBLE = 1, 2, 3

WATCH_SECONDS = 2.0
"""Between two looks of `status --watch`."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Desk:
    """What a command works with."""

    config: RelayConfig
    queries: Queries
    meta: Meta
    views: Views


def _asked(path: Path | None, work: Callable[[Desk], Awaitable[T]]) -> T:
    """What `work` gives, with the database open; our errors end the command in a sentence."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        return asyncio.run(_at_desk(load(path=path), work))
    except ConfigError as error:
        click.echo(f"relay: {error}", err=True)
        sys.exit(EXIT_CONFIG)
    except (LaneHalted, LaneTrouble, *TROUBLE) as error:
        click.echo(f"relay: {words_of(error)}", err=True)
        sys.exit(EXIT_TROUBLE)


async def _at_desk(config: RelayConfig, work: Callable[[Desk], Awaitable[T]]) -> T:
    check_settings(config)
    pool = await connect(config, 4)
    try:
        queries = Queries(pool, config.schema)
        meta = await opened(queries, config.schema)
        return await work(Desk(config, queries, meta, Views(pool, config.schema)))
    except REFUSED as error:
        raise ConfigError(f"the database refuses: {words_of(error)}") from error
    finally:
        pool.terminate()


_config = click.option(
    "--config", type=click.Path(path_type=Path), help="TOML file with settings; the environment goes above it."
)
_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


# ---- output ----------------------------------------------------------------------------------------------------------


def _echo_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2, default=_as_json))


def _as_json(value: Any) -> Any:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _echo_table(title: str, rows: list[tuple[str, ...]]) -> None:
    """With rich where stdout is a terminal and rich is installed; else columns apart by spaces, for `awk`."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(*rows[0], title=title, title_justify="left")
            for row in rows[1:]:
                table.add_row(*row)
            Console(markup=False, emoji=False).print(table)
            return
    click.echo(title)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


# ---- check -----------------------------------------------------------------------------------------------------------


@click.command("check")
@click.option("--strict", is_flag=True, help="Exit code 1 also for what limits the guarantee: a single replica.")
@_json
@_config
def check_command(strict: bool, as_json: bool, config: Path | None) -> None:
    """Find out whether the relay can work, which guarantee you have, and what to change.

    Looks at the tables, grants, sequence, durability and vacuum of the database, at a pooler before it, at the topics
    that events name, their copies and this user's rights on them, at the brokers' settings, the registry, and the
    database's clock. Nothing is changed; a producer is opened under an id of its own (<outbox>.check).

    
    Example:
      relay check --strict --json | jq -r .guarantee

    
    Exit codes:
      0  the relay can work
      1  something must be mended first
      2  the settings are wrong, or the outbox's tables are missing
      3  the database is away
    """
    findings = _asked(config, lambda desk: check(desk.config, desk.queries, desk.meta, desk.views))
    if as_json:
        _echo_json(document_of(findings))
    else:
        _echo_table(guarantee(findings), [("", "what", "found", "remedy"), *map(_finding, findings)])
    sys.exit(0 if is_sound(findings, strict) else EXIT_UNWELL)


def _finding(one: Finding) -> tuple[str, ...]:
    return one.level, one.what, one.found, one.remedy


# ---- status ----------------------------------------------------------------------------------------------------------


@click.command("status")
@_json
@click.option("--watch", is_flag=True, help=f"Look again every {WATCH_SECONDS:g} s; with --json a line each.")
@_config
def status_command(as_json: bool, watch: bool, config: Path | None) -> None:
    """Show the lanes, who owns them, what waits, and what holds the floor back.

    Floor lag and last error are known to the relay only: with its OUTBOX_HTTP the one beside this command is asked.

    \b
    Example:
      relay status --json | jq '.lanes[].oldest_seconds'

    \b
    Exit codes:
      0  each lane is published by a live relay
      1  a lane is halted, or nobody publishes it
      2  the settings or a grant are wrong
      3  the database is away
    """
    if watch:
        with suppress(KeyboardInterrupt):  # before the first look
            _asked(config, lambda desk: _watch(desk, as_json))
        return
    document = _asked(config, _look)
    if as_json:
        _echo_json(document)
    else:
        _show_status(document)
    sys.exit(0 if is_well(document) else EXIT_UNWELL)


async def _look(desk: Desk) -> dict[str, Any]:
    return await status(desk.config, desk.meta, desk.views)


async def _watch(desk: Desk, as_json: bool) -> None:
    """Until Ctrl-C. By a handler, not by a cancellation: a query that is under way may swallow that one."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stopped.set)
    while not stopped.is_set():
        try:
            document = await _look(desk)
        except TROUBLE as error:
            click.echo(f"relay: {words_of(error)}", err=True)
        else:
            if as_json:
                click.echo(json.dumps({"at": time.time(), **document}))
            else:
                click.clear()
                _show_status(document)
        with suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), WATCH_SECONDS)


def _show_status(document: dict[str, Any]) -> None:
    for title, rows in tables_of(document):
        if len(rows) > 1:
            _echo_table(title, rows)


# ---- dead ------------------------------------------------------------------------------------------------------------


@click.group("dead")
def dead_group() -> None:
    """Parked events: those that Kafka refused for good, and later ones of their key, held behind them."""


def _chooser(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--error", metavar="WORDS", help="Only those whose error has these words."),
        click.option("--key", help="Only those of this key."),
        click.option("--topic", help="Only those of this topic."),
    ):
        command = option(command)
    return command


@dead_group.command("list")
@_chooser
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Most that are shown.")
@_json
@_config
def list_command(
    topic: str | None, key: str | None, error: str | None, limit: int, as_json: bool, config: Path | None
) -> None:
    """List parked events, without their contents.

    \b
    Example:
      relay dead list --topic orders
    """
    chosen = Chosen(None, topic, key, error)
    found = _asked(config, lambda desk: desk.views.parked(chosen, limit))
    if as_json:
        _echo_json(found)
        return
    columns = ("id", "topic", "key", "bytes", "died_at", "attempts", "error")
    rows = [tuple("-" if one[name] is None else str(one[name]) for name in columns) for one in found]
    more = " (there may be more)" if len(found) == limit else ""
    _echo_table(f"{len(found)} parked events{more}", [columns, *rows])


@dead_group.command("show")
@click.argument("event_id", type=click.UUID)
@click.option("--value", "with_value", is_flag=True, help="Also the event's value, in base64.")
@click.option("--content", "with_content", is_flag=True, help="Also what the value says, if it can be decoded.")
@_config
def show_command(event_id: UUID, with_value: bool, with_content: bool, config: Path | None) -> None:
    """Show one parked event as JSON.

    \b
    Example:
      relay dead show 01937f0c-5c5d-7e6b-8f0a-3f6d2c1b0a99 --content

    Exit code 1: it is not parked.
    """
    found = _asked(config, lambda desk: _parked(desk, event_id, with_content))
    if found is None:
        click.echo(f"relay: {event_id} is not parked", err=True)
        sys.exit(EXIT_UNWELL)
    value = found.pop("value")
    found["bytes"] = None if value is None else len(value)
    _echo_json({**found, "value": value} if with_value else found)


async def _parked(desk: Desk, event_id: UUID, with_content: bool) -> dict[str, Any] | None:
    found = await desk.views.parked_event(event_id)
    if found is None or not with_content:
        return found
    from relay.content import content  # late: it brings Avro

    fingerprint = None if found["fingerprint"] is None else int(found["fingerprint"])
    schema = None if fingerprint is None else await desk.queries.avro_schema(fingerprint)
    return {**found, "content": content(found["value"], fingerprint, schema)}


@dead_group.command("retry")
@click.argument("event_ids", type=click.UUID, nargs=-1)
@_chooser
@click.option("--all", "every", is_flag=True, help="All of them.")
@_json
@_config
def retry_command(every: bool, as_json: bool, config: Path | None, **choice: Any) -> None:
    """Put parked events back into the outbox, to be published.

    With each goes all that is parked of its key: the order of the key is kept, also towards what is written meanwhile.
    What still cannot be published is parked again. The lane pauses for about a second; writers do not.

    Needs a user who may write to all tables of the outbox, such as their owner.

    \b
    Examples:
      relay dead retry 01937f0c-5c5d-7e6b-8f0a-3f6d2c1b0a99
      relay dead retry --topic orders
    """
    done = _changed(config, _chosen(every, **choice), lambda views: views.retry)
    _say_changed(done, "put back into the outbox", as_json)


@dead_group.command("discard")
@click.argument("event_ids", type=click.UUID, nargs=-1)
@_chooser
@click.option("--all", "every", is_flag=True, help="All of them.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_json
@_config
def discard_command(every: bool, yes: bool, as_json: bool, config: Path | None, **choice: Any) -> None:
    """Delete parked events for good: nobody will ever see them.

    Others of their key stay parked; `retry` publishes them then.

    \b
    Example:
      relay dead discard 01937f0c-5c5d-7e6b-8f0a-3f6d2c1b0a99
      relay dead retry --topic orders --key 4711
    """
    chosen = _chosen(every, **choice)
    if not yes:
        lanes = _asked(config, lambda desk: desk.views.parked_lanes(chosen))
        click.confirm(f"Delete {sum(lanes.values())} events for good?", abort=True, err=True)
    done = _changed(config, chosen, lambda views: views.discard)
    _say_changed(done, "deleted", as_json)


def _chosen(every: bool, event_ids: tuple[UUID, ...], topic: str | None, key: str | None, error: str | None) -> Chosen:
    if not (every or event_ids or topic or key or error):
        raise click.UsageError("which ones? Give ids, --topic, --key, --error or --all")
    return Chosen(event_ids or None, topic, key, error)


def _changed(config: Path | None, chosen: Chosen, change: Callable[[Views], Change]) -> int:
    async def work(desk: Desk) -> int:
        lanes = await desk.views.parked_lanes(chosen)
        return await change_parked(desk.config, desk.queries, desk.meta, lanes, change(desk.views), chosen)

    return _asked(config, work)


def _say_changed(events: int, what: str, as_json: bool) -> None:
    """Exit code 1 where there was nothing to do: a script has named what is not there."""
    if as_json:
        _echo_json({"events": events})
    else:
        click.echo(f"{events} events {what}" if events else "no parked event answers to that")
    sys.exit(0 if events else EXIT_UNWELL)


# ---- lanes -----------------------------------------------------------------------------------------------------------


@click.command("lanes")
@click.argument("lanes", type=int, metavar="N")
@click.option(
    "--patience", type=click.FloatRange(0), default=60.0, show_default=True, help="Seconds for which it is tried."
)
@_json
@_config
def lanes_command(lanes: int, patience: float, as_json: bool, config: Path | None) -> None:
    """Give the outbox N lanes: so many relays can work at once.

    Writers and relays go on: writers wait for less than a second, and publishing pauses for a few. Each event is
    published once and in the order of its key, whatever crashes meanwhile. Where many events wait, or a writer's
    transaction stays open, it is tried again; --patience says for how long.

    Run it with the settings of the relays, for it publishes a batch of each lane itself; but as the tables' owner
    (OUTBOX_DATABASE_URL). Needs PostgreSQL 17.

    \b
    Example:
      relay lanes 4 --json | jq .waited_seconds

    \b
    Exit codes:
      0  there are N lanes
      1  there are as many as before: what stood in the way is said
      2  the settings, the user or the server cannot do it
      3  Kafka or the database is away, or a lane is halted (`relay resolve` comes first)
    """
    from relay.lanes import NotNow, change_lanes  # brings SQLAlchemy, which the relay does without

    async def work(desk: Desk) -> Any:
        failpoint = Failpoint(os.environ.get(VARIABLE))
        try:
            return await change_lanes(desk.config, desk.queries, desk.views, lanes, patience, failpoint)
        except NotNow as error:
            return error

    done = _asked(config, work)
    if isinstance(done, NotNow):
        click.echo(f"relay: {done}", err=True)
        sys.exit(EXIT_UNWELL)
    if as_json:
        _echo_json({"before": done.before, "after": done.after, "tries": done.tries, "waited_seconds": done.waited})
    elif done.tries:
        click.echo(f"{done.before} lanes before, {done.after} now; writers waited for {done.waited:.2f} s at most")
    else:
        click.echo(f"there are {done.after} lanes already")


# ---- trace, config ---------------------------------------------------------------------------------------------------


@click.command("trace")
@click.argument("event_id", type=click.UUID)
@click.option("--topic", "topics", multiple=True, help="Where to look in Kafka; may be given again.")
@click.option("--since", type=click.DateTime(), help="From this moment on, UTC.  [default: that of the id, or all]")
@_json
@_config
def trace_command(event_id: UUID, topics: tuple[str, ...], since: Any, as_json: bool, config: Path | None) -> None:
    """Find an event: in the outbox, parked, or at which topic, partition and offset.

    Reads the topics that this outbox knows (of its schemas, of parked and waiting events), committed records only, from
    the moment in the id on (version 7), else from the start: name a --topic or a moment where they are large. The user
    of these settings must be allowed to read them.

    \b
    Example:
      relay trace 01937f0c-5c5d-7e6b-8f0a-3f6d2c1b0a99 --topic orders

    Exit code 1: it was found nowhere.
    """
    moment = None if since is None else since.replace(tzinfo=UTC).timestamp() * 1000
    found = _asked(config, lambda desk: trace(desk.config, desk.meta, desk.views, event_id, topics, moment))
    if as_json:
        _echo_json(found)
    else:
        click.echo(text_of(found))
    sys.exit(0 if found["found"] else EXIT_UNWELL)


@click.command("config")
@_config
def config_command(config: Path | None) -> None:
    """Print the settings that are in force, as JSON, secrets masked; connects to nothing.

    `kafka` holds what a producer of the relay is given.

    \b
    Example:
      relay config | jq .kafka
    """
    try:
        _echo_json(masked(load(path=config)))
    except ConfigError as error:
        click.echo(f"relay: {error}", err=True)
        sys.exit(EXIT_CONFIG)
