"""The outbox's tables, made and kept up to date: one set of revisions, three doors to it.

    migrate(url)                     `outbox migrate URL`: for a deployment's own step
    upgrade_to(op, "0001")           one line in a revision of the host's own Alembic history
    sql()                            `outbox sql`: a script for psql

All three leave the same catalogue and the same mark in `<schema>.alembic_version`, so that they may be mixed. The
outbox has a SQL schema and a version table of its own: the host's `alembic upgrade head` and its autogenerate never see
them.

Needs the extra `migrations` (Alembic), except for HEAD, `current_version` and `check_version`, which the relay uses.
"""

import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from outbox.errors import MigrationError, UsageError
from outbox.tables import MAX_NAME, SCHEMA, check_lanes, check_schema, migrate_command, missing_tables, quoted

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.operations import Operations

HEAD = "0001"
"""The revision that this code needs. Revision ids sort as text in the order of their release."""

OLDEST_POSTGRESQL = 140_000  # server_version_num of 14.0

_NAME = re.compile(rf"[a-zA-Z0-9._-]{{1,{MAX_NAME}}}")
_VERSION_TABLE = "alembic_version"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a revision may depend on. Refuses at construction what PostgreSQL or Kafka would refuse later."""

    schema: str = SCHEMA
    """The SQL schema that holds the outbox and nothing else."""
    name: str | None = None
    """From which the Kafka group, control topic and transactional ids are built. None: the database's name."""
    lanes: int = 1
    """How many relays could ever work at once; one lane is the fastest for one relay."""

    def __post_init__(self) -> None:
        check_schema(self.schema)
        check_lanes(self.lanes)
        if self.name is not None:
            check_name(self.name)

    @property
    def quoted_schema(self) -> str:
        return quoted(self.schema)

    @property
    def sql_name(self) -> str:
        """The name as a SQL expression. A checked name holds no quote."""
        return "current_database()" if self.name is None else f"'{self.name}'"


def check_name(name: str) -> str:
    """The outbox's name, if Kafka topics may be named after it; UsageError otherwise."""
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise UsageError(
            f"{name!r} cannot be an outbox's name: Kafka topics and transactional ids are built from it, so it may have"
            f" 1 to {MAX_NAME} of the characters a-z A-Z 0-9 . _ - (give another one with --name)"
        )
    return name


# --- What version is there ---


def current_version(connection: sa.Connection, *, schema: str = SCHEMA) -> str | None:
    """The revision that the tables are at; None where there are no tables."""
    table = f"{quoted(schema)}.{_VERSION_TABLE}"
    if connection.scalar(sa.text("SELECT to_regclass(:table)"), {"table": table}) is None:
        return None
    version: str | None = connection.scalar(sa.text(f"SELECT version_num FROM {table}"))  # noqa: S608 - quoted above
    return version


def check_version(version: str | None, *, schema: str = SCHEMA) -> None:
    """Nothing, if this code can work with tables at `version`; MigrationError, with the remedy, otherwise."""
    if version is None:
        raise missing_tables(schema)
    _refuse_newer(version, schema)
    if version < HEAD:
        raise MigrationError(
            f"the outbox in the SQL schema {schema!r} is at version {version}, this code needs {HEAD}:"
            f" run `{migrate_command(schema)}`"
        )


def _refuse_newer(version: str | None, schema: str) -> None:
    if version is not None and version > HEAD:
        raise MigrationError(
            f"the outbox in the SQL schema {schema!r} is at version {version}, newer than {HEAD}, the newest that this"
            " code knows: upgrade the package kafka-outbox (a downgrade of the tables does not exist)"
        )


# --- The three doors ---


def migrate(url: str, *, schema: str = SCHEMA, name: str | None = None, lanes: int | None = None) -> None:
    """Bring the tables to HEAD, in one transaction; nothing happens where they are there already.

    `url`: `postgresql://…` as libpq takes it (through psycopg where it is installed, else asyncpg), or a SQLAlchemy URL
    that names its driver. Several may run at once: the others wait, then find nothing to do. It blocks: from a running
    event loop call `await asyncio.to_thread(migrate, url)`.

    Raises UsageError for a name, schema or number of lanes that cannot be; MigrationError where the database cannot be
    reached, is too old, refuses a statement, holds a newer version, or an outbox of another name or number of lanes.
    """
    settings = Settings(schema=schema, name=name, lanes=1 if lanes is None else lanes)
    config = _config(settings)

    def upgrade(connection: sa.Connection) -> None:
        _lock(connection, settings)
        version = current_version(connection, schema=schema)
        _refuse_newer(version, schema)
        if version is None:
            _check_ground(connection, settings)
        else:
            _check_identity(connection, settings, lanes)
        config.attributes["connection"] = connection
        _alembic("command").upgrade(config, HEAD)

    with_connection(url, upgrade)


def sql(*, schema: str = SCHEMA, name: str | None = None, lanes: int = 1) -> str:
    """The whole of the DDL as a script for psql, in one transaction; needs no database. For an empty database only."""
    out = io.StringIO()
    config = _config(Settings(schema=schema, name=name, lanes=lanes), output=out)
    _alembic("command").upgrade(config, HEAD, sql=True)
    return out.getvalue()


def upgrade_to(
    op: "Operations | Any", revision: str = HEAD, *, schema: str = SCHEMA, name: str | None = None, lanes: int = 1
) -> None:
    """Bring the tables to `revision` inside the host's own revision and transaction, and stamp our version table.

        def upgrade() -> None:
            upgrade_to(op, "0001")

    Name the revision rather than HEAD, so that the host's history stays what it was. Where the tables are at `revision`
    or beyond, nothing happens. Offline (`alembic upgrade --sql`) it writes everything from the beginning.
    """
    settings = Settings(schema=schema, name=name, lanes=lanes)
    context = op.get_context()
    version = None if context.as_sql else current_version(op.get_bind(), schema=schema)
    _refuse_newer(version, schema)
    scripts = _alembic("script").ScriptDirectory.from_config(_config(settings))
    known = [script.revision for script in scripts.walk_revisions()]
    if revision not in known:
        raise UsageError(
            f"no revision {revision!r} of the outbox is known: this version of kafka-outbox has {sorted(known)}"
        )
    if version is not None and version >= revision:
        return
    if version is None:
        _make_ground(op, settings)
    for script in reversed(list(scripts.iterate_revisions(revision, version))):
        for statement in script.module.statements(settings):
            op.execute(statement)
    for statement in _stamp(settings, version, revision):
        op.execute(statement)


# --- What env.py and the revisions use ---


def settings_of(op: Any) -> Settings:
    """The settings that env.py gave to the migration context under way."""
    settings: Settings = op.get_context().opts["outbox"]
    return settings


def create_schema(operations: Any, settings: Settings) -> None:
    """Make the SQL schema, unless it is there already: the right to make schemas is then not needed."""
    context = operations.get_context()
    if context.as_sql or not sa.inspect(context.bind).has_schema(settings.schema):
        operations.execute(f"CREATE SCHEMA IF NOT EXISTS {settings.quoted_schema}")


def with_connection(url: str, work: Callable[[sa.Connection], None], *, task: str = "migrated") -> None:
    """Do `work` in one transaction on a fresh connection; commits. What goes wrong there is a MigrationError.

    `task`: what the database could not be, then.
    """
    target = _target(url)
    try:
        if target.get_driver_name() == "asyncpg":
            import asyncio

            asyncio.run(_with_async_connection(target, url, work))
        else:
            _with_sync_connection(target, url, work)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the URL's driver {target.drivername!r} cannot be used: {error.name} is not installed"
        ) from error
    except (sa.exc.SQLAlchemyError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).strip()
        raise MigrationError(f"the database {target.render_as_string()} could not be {task}: {reason}") from error


# --- Parts ---


def _make_ground(op: Any, settings: Settings) -> None:
    """The schema and the version table, name for name as Alembic makes it behind the other doors."""
    create_schema(op, settings)
    op.execute(
        f"CREATE TABLE {settings.quoted_schema}.{_VERSION_TABLE}"
        " (version_num varchar(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
    )


def _alembic(module: str) -> Any:
    try:
        import alembic.command
        import alembic.config
        import alembic.script
    except ImportError as error:
        raise MigrationError("migrations need Alembic: pip install 'kafka-outbox[migrations]'") from error
    return getattr(alembic, module)


def _folder() -> Path:
    """A checkout's migrations/, or the wheel's outbox/_migrations."""
    here = Path(__file__).parent
    shipped = here / "_migrations"
    return shipped if shipped.is_dir() else here.parent / "migrations"


def _config(settings: Settings, output: io.StringIO | None = None) -> "Config":
    """Alembic's configuration, without a file."""
    config: Config = _alembic("config").Config(output_buffer=output)
    config.set_main_option("script_location", str(_folder()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["settings"] = settings
    return config


def _stamp(settings: Settings, version: str | None, revision: str) -> list[str]:
    table = f"{settings.quoted_schema}.{_VERSION_TABLE}"
    if version is None:
        return [f"INSERT INTO {table} (version_num) VALUES ('{revision}')"]  # noqa: S608 - our own revision ids
    return [f"UPDATE {table} SET version_num = '{revision}'"]  # noqa: S608 - the same


def _lock(connection: sa.Connection, settings: Settings) -> None:
    """One migration of this schema at a time; the lock ends with the transaction, so PgBouncer may stand between."""
    connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext(:what))"), {"what": f"migrate {settings.schema}"})


def _check_ground(connection: sa.Connection, settings: Settings) -> None:
    """Before the first table: is the server new enough, and the name that the outbox would take a legal one?"""
    if int(connection.scalar(sa.text("SHOW server_version_num")) or 0) < OLDEST_POSTGRESQL:
        found = connection.scalar(sa.text("SHOW server_version"))
        raise MigrationError(f"the server is PostgreSQL {found}: the outbox needs 14 or newer")
    if settings.name is None:
        check_name(str(connection.scalar(sa.text("SELECT current_database()"))))


def _check_identity(connection: sa.Connection, settings: Settings, lanes: int | None) -> None:
    """A name or a number of lanes that was asked for and is not what is there would otherwise pass in silence."""
    found = connection.execute(sa.text(f"SELECT name, lanes FROM {settings.quoted_schema}.meta")).one()  # noqa: S608 - quoted
    for what, wanted, there in (("name", settings.name, found.name), ("lanes", lanes, found.lanes)):
        if wanted is not None and wanted != there:
            raise MigrationError(
                f"the outbox in the SQL schema {settings.schema!r} has the {what} {there!r}, not {wanted!r}:"
                f" a migration does not change it (leave --{what} out)"
            )


def _target(url: str) -> sa.URL:
    """The SQLAlchemy URL of what was given. A libpq URL goes to the driver as it is; then this is for messages."""
    if _is_libpq(url):
        return sa.make_url(_without_hosts(url)).set(drivername=f"postgresql+{_driver()}")
    try:
        target = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise UsageError("the database's URL cannot be read: postgresql://user:password@host:port/database") from error
    if target.get_backend_name() != "postgresql":
        raise UsageError(f"the outbox's tables need PostgreSQL 14 or newer, the URL says {target.get_backend_name()!r}")
    return target


def _without_hosts(url: str) -> str:
    """A libpq URL may name several hosts, which SQLAlchemy's cannot: keep the first."""
    return re.sub(r"^(\w+://(?:[^@/]*@)?[^,/?]*),[^/?]*", r"\1", url)


def _driver() -> str:
    from importlib.util import find_spec

    for driver in ("psycopg", "asyncpg"):
        if find_spec(driver):
            return driver
    raise MigrationError("no driver for PostgreSQL is installed: pip install 'kafka-outbox[migrations]', or psycopg")


def _is_libpq(url: str) -> bool:
    return url.startswith(("postgresql://", "postgres://"))


def _with_sync_connection(target: sa.URL, url: str, work: Callable[[sa.Connection], None]) -> None:
    options: dict[str, Any] = {"poolclass": sa.NullPool}
    if _is_libpq(url):
        import psycopg

        options["creator"] = lambda: psycopg.connect(url)
    engine = sa.create_engine(target, **options)
    with engine.begin() as connection:
        work(connection)


async def _with_async_connection(target: sa.URL, url: str, work: Callable[[sa.Connection], None]) -> None:
    import asyncpg
    from sqlalchemy.ext.asyncio import create_async_engine

    options: dict[str, Any] = {"poolclass": sa.NullPool}
    if _is_libpq(url):
        options["async_creator"] = lambda: asyncpg.connect(url)
    engine = create_async_engine(target, **options)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(work)
    except asyncpg.PostgresError as error:  # raised bare while connecting: SQLAlchemy wraps what comes after
        raise OSError(str(error)) from error


def settings_from_environment() -> Settings:
    """For `alembic …` on the command line while working on the revisions: OUTBOX_SCHEMA, OUTBOX_NAME, OUTBOX_LANES."""
    return Settings(
        schema=os.environ.get("OUTBOX_SCHEMA", SCHEMA),
        name=os.environ.get("OUTBOX_NAME"),
        lanes=int(os.environ.get("OUTBOX_LANES", "1")),
    )
