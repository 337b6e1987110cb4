"""The commands of `outbox` that are about consumers: consume, replay, inbox, dead.

APP names the user's Consumer as `module:attribute`, as uvicorn names an application; the module is looked for in the
current directory first.
"""

import asyncio
import gc
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox.consumer.dead import DeadMessages
from outbox.consumer.replay import Replay, Report, Selection
from outbox.consumer.runtime import Consumer
from outbox.consumer.store import DeadMessage, decoded
from outbox.errors import UsageError
from outbox.inbox import Inbox
from outbox.migrate import with_connection
from outbox.tables import SCHEMA, tables

GC_THRESHOLD = 100_000
"""Objects made before the garbage collector looks for cycles. Python's 700 has it walk what is in hand all the time."""

_app = click.argument("app")


def consumer_of(app: str) -> Consumer:
    """The Consumer that `module:attribute` names; UsageError where there is none."""
    module, _, attribute = app.partition(":")
    if not attribute:
        raise UsageError(f"{app!r} names no consumer: write module:attribute, such as analytics.main:consumer")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the module is there, and something that it imports is not
        raise UsageError(f"there is no module {error.name!r}; the current directory is {Path.cwd()}") from error
    except AttributeError:
        raise UsageError(f"the module {module} has no {attribute!r}") from None
    if not isinstance(found, Consumer):
        raise UsageError(f"{app} is no Consumer but a {type(found).__name__}")
    return found


def _run(work: Any) -> Any:
    """In a loop of its own: uvloop's where it is installed (the extra `uvloop`)."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    try:
        import uvloop
    except ImportError:
        pass
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)


@click.command()
@_app
@click.option("--metrics-port", type=int, help="Serve Prometheus metrics at this port (the extra `metrics`).")
def consume(app: str, metrics_port: int | None) -> None:
    """Run the consumer APP until SIGTERM, which ends it in order.

    \b
    Example:
      outbox consume analytics.main:consumer --metrics-port 9100
    """
    consumer = consumer_of(app)
    if metrics_port is not None:
        _serve_metrics(consumer, metrics_port)
    gc.set_threshold(GC_THRESHOLD)
    _run(_consume(consumer))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a `def` handler that has outlived the deadline cannot be cancelled, and would hold its thread


async def _consume(consumer: Consumer) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, consumer.stop)
    await consumer.run()


def _serve_metrics(consumer: Consumer, port: int) -> None:
    try:
        from prometheus_client import REGISTRY, start_http_server
    except ImportError:
        raise UsageError("--metrics-port needs the extra: pip install 'kafka-outbox[metrics]'") from None
    from outbox.consumer.metrics import collector

    REGISTRY.register(collector(consumer.metrics))
    start_http_server(port)


@click.command()
@_app
@click.option("--topic", required=True)
@click.option("--since", help="Messages sent at this moment or later: 2026-11-24T08:00Z.")
@click.option("--offset", "offsets", multiple=True, help="PARTITION:OFFSET to begin at; may be given again.")
@click.option("--key", help="The messages of this key only.")
@click.option("--generation", help="Under an inbox of its own, in which nothing was seen yet: a rebuilt read model.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Events a second, at most.")
@click.option("--dry-run", is_flag=True, help="Count what would be read, and what is seen already; change nothing.")
def replay(
    app: str,
    topic: str,
    since: str | None,
    offsets: tuple[str, ...],
    key: str | None,
    generation: str | None,
    rate: float | None,
    dry_run: bool,
) -> None:
    """Read the history of a topic into the consumer APP again; its group does not notice.

    What its inbox has seen is skipped. With --generation nothing has been seen: every event takes effect (again).
    Handlers are told by `meta.replay`.

    \b
    Examples:
      outbox replay analytics.main:consumer --topic quality.events --since 2026-11-24T00:00Z
      outbox replay analytics.main:consumer --topic quality.events --generation 2
    """
    selection = Selection(topic=topic, since=_moment(since), offsets=dict(map(_offset, offsets)), key=key)
    consumer = consumer_of(app)
    with click.progressbar(length=0, label=topic, file=sys.stderr, show_pos=True) as bar:

        def progress(report: Report) -> None:
            bar.length = report.total
            bar.update(report.read - bar.pos)

        report: Report = _run(
            Replay(consumer, selection, generation=generation, dry_run=dry_run, rate=rate, progress=progress).run()
        )
    done = "would take effect" if dry_run else "taken"
    click.echo(f"{report.chosen:,} messages; {report.known:,} seen before; {report.chosen - report.known:,} {done}")


def _moment(text: str | None) -> datetime | None:
    try:
        return None if text is None else datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"--since {text!r} is no moment: write 2026-11-24T08:00Z") from None


def _offset(text: str) -> tuple[int, int]:
    partition, _, offset = text.partition(":")
    if not (partition.isdigit() and offset.isdigit()):
        raise UsageError(f"--offset {text!r} is not PARTITION:OFFSET, such as 0:1200")
    return int(partition), int(offset)


# --- claims ---


@click.group()
def inbox() -> None:
    """The claims of consumers: the events that have taken effect.

    \b
    Examples:
      outbox inbox list --url postgresql://localhost/analytics
      outbox inbox purge analytics --older-than 30 --url postgresql://localhost/analytics
    """


_url = click.option("--url", envvar="OUTBOX_DATABASE_URL", required=True, help="The consumer's database.")
_sql_schema = click.option("--schema", default=SCHEMA, show_default=True, envvar="OUTBOX_SCHEMA")


@inbox.command("list")
@_url
@_sql_schema
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def list_claims(url: str, schema: str, as_json: bool) -> None:
    """List the consumers, how many claims each has, and the oldest and the latest of them. Reads the whole table."""
    rows: list[Any] = []
    table = tables(schema).tables[f"{schema}.inbox"].c
    query = (
        sa.select(table.consumer, sa.func.count(), sa.func.min(table.processed_at), sa.func.max(table.processed_at))
        .group_by(table.consumer)
        .order_by(table.consumer)
    )
    with_connection(url, lambda connection: rows.extend(connection.execute(query)), task="asked")
    if as_json:
        names = ("consumer", "claims", "oldest", "latest")
        click.echo(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=2, default=str))
        return
    for consumer, claims, oldest, latest in rows:
        click.echo(f"{consumer}  {claims:,}  {oldest.isoformat()}  {latest.isoformat()}")
    if not rows:
        click.echo("no event was claimed", err=True)


@inbox.command("purge")
@click.argument("consumer")
@click.option("--older-than", type=click.FloatRange(0, min_open=True), required=True, help="Days.")
@_url
@_sql_schema
def purge_claims(consumer: str, older_than: float, url: str, schema: str) -> None:
    """Forget the claims of CONSUMER that were made more than --older-than days ago.

    An event that Kafka delivers again after its claim was forgotten takes effect twice: keep claims for longer than the
    topics keep events. A Consumer with Limits(claims=…) does this by itself, and checks that.
    """
    forgotten, claims, age = 0, Inbox(consumer, schema=schema), timedelta(days=older_than)

    def purge(connection: sa.Connection) -> None:
        nonlocal forgotten
        with Session(connection) as session:
            count = claims.purge(session, age)
            session.commit()
        forgotten += count

    while True:
        before = forgotten
        with_connection(url, purge, task="asked")
        if forgotten == before:
            break
    click.echo(f"{forgotten:,} claims forgotten", err=True)


# --- dead messages ---


@click.group()
def dead() -> None:
    """Dead messages: what consumers could not handle, and what is held behind it.

    Not to be mistaken for the dead events of an outbox, which Kafka refused.
    """


def _options(command: Callable[..., None]) -> Callable[..., None]:
    url = click.option("--url", envvar="OUTBOX_DATABASE_URL", required=True, help="The consumer's database.")
    consumer = click.option("--consumer", help="Of this consumer only.")
    schema = click.option("--schema", default=SCHEMA, show_default=True, envvar="OUTBOX_SCHEMA")
    return url(consumer(schema(command)))


def _with(url: str, schema: str, consumer: str | None, work: Callable[[DeadMessages], Any]) -> Any:
    found: list[Any] = []

    def run(connection: sa.Connection) -> None:
        found.append(work(DeadMessages(connection, schema=schema, consumer=consumer)))

    with_connection(url, run, task="asked")
    return found[0]


@dead.command("list")
@_options
@click.option("--limit", type=int, default=100, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def list_(url: str, consumer: str | None, schema: str, limit: int, as_json: bool) -> None:
    """List dead messages, the oldest first."""
    messages: list[DeadMessage] = _with(url, schema, consumer, lambda dead: dead.listed(limit))
    if as_json:
        click.echo(json.dumps([_document(message) for message in messages], indent=2))
        return
    for message in messages:
        place = f"{message.topic} [{message.partition}] {message.position}"
        asked = ", to be retried" if message.retry_at else ""
        click.echo(f"{message.event_id}  {message.consumer}  {place}  {message.reason}{asked}: {message.error[:100]}")
    if not messages:
        click.echo("no message is dead", err=True)


@dead.command()
@click.argument("event_id")
@_options
@click.option("--bytes", "as_bytes", is_flag=True, help="The value, as Kafka had it, on stdout.")
def show(event_id: str, url: str, consumer: str | None, schema: str, as_bytes: bool) -> None:
    """Show all that is known of one dead message, as JSON."""
    message: DeadMessage = _with(url, schema, consumer, lambda dead: dead.one(event_id))
    if as_bytes:
        click.echo(message.value or b"", nl=False)
        return
    click.echo(json.dumps(_document(message), indent=2))


@dead.command()
@click.argument("event_ids", nargs=-1)
@_options
@click.option("--all", "everything", is_flag=True, help="All that are not only held.")
def retry(event_ids: tuple[str, ...], url: str, consumer: str | None, schema: str, everything: bool) -> None:
    """Have dead messages tried again, by the consumer at work; those held behind them follow."""
    _one_of(event_ids, everything)
    count = _with(url, schema, consumer, lambda dead: dead.retry(event_ids))
    click.echo(f"{count} to be tried again by the consumer at work", err=True)


@dead.command()
@click.argument("event_ids", nargs=-1)
@_options
@click.option("--all", "everything", is_flag=True, help="All, the held ones too.")
def discard(event_ids: tuple[str, ...], url: str, consumer: str | None, schema: str, everything: bool) -> None:
    """Give dead messages up for good: they never take effect. Those held behind them are tried then."""
    _one_of(event_ids, everything)
    count = _with(url, schema, consumer, lambda dead: dead.discard(event_ids))
    click.echo(f"{count} discarded", err=True)


def _one_of(event_ids: tuple[str, ...], everything: bool) -> None:
    if bool(event_ids) == everything:
        raise click.UsageError("name messages by their ids, or say --all")


def _document(message: DeadMessage) -> dict[str, Any]:
    def text(value: bytes | None) -> str | None:
        return None if value is None else value.decode(errors="backslashreplace")

    return {
        "event_id": message.event_id,
        "consumer": message.consumer,
        "topic": message.topic,
        "partition": message.partition,
        "offset": message.position,
        "sent_at": message.sent_at and message.sent_at.isoformat(),
        "key": text(message.key),
        "value": text(message.value),
        "headers": [[name, text(value)] for name, value in decoded(message.headers)],
        "reason": message.reason,
        "attempts": message.attempts,
        "died_at": message.died_at.isoformat(),
        "retry_at": message.retry_at and message.retry_at.isoformat(),
        "error": message.error,
        "stack": message.stack,
    }
