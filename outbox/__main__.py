"""The command `outbox`: what a deployment and a developer need. The relay has a command of its own."""

import sys
from typing import Any

import click

from outbox.codegen import codegen, lint
from outbox.errors import OutboxError
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
def sql(name: str | None, lanes: int, schema: str) -> None:
    """Print the SQL that creates the outbox's tables, one transaction; connects to no database.

    \b
    Example:
      outbox sql --name shop | psql -v ON_ERROR_STOP=1 shop
    """
    from outbox import migrate as door

    click.echo(door.sql(schema=schema, name=name, lanes=lanes), nl=False)


@main.group("schemas")
def schemas_group() -> None:
    """The .avsc files of a service."""


schemas_group.add_command(lint)
main.add_command(codegen)


if __name__ == "__main__":
    sys.exit(main())
