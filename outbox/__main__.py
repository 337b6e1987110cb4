"""The command `outbox`: what a deployment and a developer need. The relay has a command of its own."""

import sys
from collections.abc import Callable
from typing import Any

import click

from outbox.codegen import codegen
from outbox.consumer.commands import consume, dead, inbox, replay
from outbox.errors import OutboxError
from outbox.roles import Roles, grants
from outbox.schemas_commands import schemas_group
from outbox.tables import SCHEMA


class _Group(click.Group):
    """Says what our own errors say, and exits with 1: a traceback would hide the sentence."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OutboxError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """The transactional outbox: its tables, its schemas, its typed events."""


_schema = click.option(
    "--schema", default=SCHEMA, show_default=True, envvar="OUTBOX_SCHEMA", help="The SQL schema, the outbox's own."
)
_name = click.option(
    "--name", help="The outbox's name; Kafka's group, topic and ids are built from it.  [default: the database's name]"
)


def _role(part: str, does: str) -> Callable[[Any], Any]:
    default = getattr(Roles, part)
    return click.option(f"--{part}", metavar="ROLE", default=default, show_default=True, help=f"Who {does}: a role.")


@main.command()
@click.argument("url", envvar="OUTBOX_DATABASE_URL", required=False)
@click.option("--sql", "as_sql", is_flag=True, help="Print the SQL instead, for an empty database; connects to none.")
@_name
@click.option("--lanes", type=int, help="How many relays could ever work at once.  [default: 1]")
@_schema
def migrate(url: str | None, as_sql: bool, name: str | None, lanes: int | None, schema: str) -> None:
    """Create the outbox's tables at URL, or bring them up to date; safe to repeat.

    URL: postgresql://user:password@host/database, or the variable OUTBOX_DATABASE_URL.

    \b
    Example:
      outbox migrate postgresql://postgres@localhost/shop --name shop
    """
    from outbox import migrate as door  # late: it is the command, not the group, that may need Alembic

    if as_sql:
        click.echo(door.sql(schema=schema, name=name, lanes=lanes or 1), nl=False)
        return
    if url is None:
        raise click.UsageError("no database: give its URL, or set OUTBOX_DATABASE_URL")
    door.migrate(url, schema=schema, name=name, lanes=lanes)
    click.echo(f"the outbox in the SQL schema {schema} is at version {door.HEAD}", err=True)


@main.command()
@_name
@click.option("--lanes", type=int, default=1, show_default=True, help="How many relays could ever work at once.")
@_schema
@click.option("--roles", is_flag=True, help="Print the grants of the three roles below instead.")
@_role("writer", "writes events")
@_role("relay", "publishes them")
@_role("inbox", "consumes events")
def sql(name: str | None, lanes: int, schema: str, roles: bool, writer: str, relay: str, inbox: str) -> None:
    """Print the SQL that creates the outbox's tables, one transaction; connects to no database.

    With --roles: the SQL that makes the roles which are missing, and grants each what it needs; safe to repeat, after
    each migration.

    \b
    Examples:
      outbox sql --name shop | psql -v ON_ERROR_STOP=1 shop
      outbox sql --roles | psql -v ON_ERROR_STOP=1 shop
    """
    from outbox import migrate as door

    if roles:
        click.echo(grants(Roles(writer=writer, relay=relay, inbox=inbox), schema=schema), nl=False)
        return
    click.echo(door.sql(schema=schema, name=name, lanes=lanes), nl=False)


@main.command()
@click.argument("name")
@click.argument("url", envvar="OUTBOX_DATABASE_URL", required=False)
@click.option(
    "--events",
    type=click.Choice(["publish", "discard"]),
    help="What becomes of the events that wait: a copy's are the original's.",
)
@_schema
def rename(name: str, url: str | None, events: Any, schema: str) -> None:
    """Give the outbox at URL a new NAME: a copy then lives beside its original.

    Stop its relays first. Consumers see no difference but the header ce_source; the group, the control topic and the
    transactional ids of the old name are left in Kafka.

    \b
    Example:
      outbox rename shop-staging postgresql://postgres@localhost/shop_staging --events discard
    """
    from outbox import identity

    if url is None:
        raise click.UsageError("no database: give its URL, or set OUTBOX_DATABASE_URL")
    waiting = identity.rename(url, name, schema=schema, events=events)
    click.echo(f"the outbox in the SQL schema {schema} is {name} now; {waiting} events wait", err=True)


for _command in (codegen, schemas_group, consume, replay, inbox, dead):
    main.add_command(_command)


if __name__ == "__main__":
    sys.exit(main())
