"""What Alembic runs for each command: with the settings and connection of `outbox.migrate`, else the environment's.

On the command line (`alembic check`, `alembic revision --rev-id 0002 -m …`) the URL comes from OUTBOX_DATABASE_URL.
"""

import os
from typing import Any

import sqlalchemy as sa
from alembic import context

from outbox.errors import UsageError
from outbox.migrate import Settings, create_schema, settings_from_environment, with_connection
from outbox.tables import tables


def options(settings: Settings) -> dict[str, Any]:
    return {
        "target_metadata": tables(settings.schema, settings.lanes),
        "version_table_schema": settings.schema,
        "include_schemas": True,
        "include_name": lambda name, kind, _parents: kind != "schema" or name == settings.schema,
        "compare_type": True,
        "compare_server_default": True,
        "outbox": settings,
    }


def offline(settings: Settings) -> None:
    # "named": the default of the psycopg dialect would double every percent sign
    context.configure(dialect_name="postgresql", dialect_opts={"paramstyle": "named"}, **options(settings))
    with context.begin_transaction():
        create_schema(context, settings)
        context.run_migrations()


def online(connection: sa.Connection, settings: Settings) -> None:
    context.configure(connection=connection, **options(settings))
    with context.begin_transaction():
        create_schema(context, settings)
        context.run_migrations()


def run() -> None:
    settings = context.config.attributes.get("settings") or settings_from_environment()
    if context.is_offline_mode():
        offline(settings)
    elif (connection := context.config.attributes.get("connection")) is not None:
        online(connection, settings)
    elif url := os.environ.get("OUTBOX_DATABASE_URL"):
        with_connection(url, lambda connection: online(connection, settings))
    else:
        raise UsageError("set OUTBOX_DATABASE_URL, or run `outbox migrate URL`")


run()
