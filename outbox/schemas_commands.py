"""`outbox schemas`: lint, check, diff, sync, register.

Exit codes of all: 0 as it should be; 1 something was found, or refused; 2 the call is wrong; 3 the registry or the
database is away.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import click

from outbox import schemas, versions
from outbox.errors import MigrationError, OutboxError, RegistryError, SchemaError, SchemaRefused, UsageError
from outbox.registry import SUBJECTS, SchemaRegistry, settings_from
from outbox.tables import SCHEMA, quoted
from outbox.versions import Level, Version

_PUT = """INSERT INTO {schema}.avro_schema AS s (fingerprint, subject, schema) VALUES (:fingerprint, :subject, :text)
ON CONFLICT (fingerprint) DO UPDATE SET subject = excluded.subject, schema = excluded.schema
 WHERE (s.subject, s.schema) <> (excluded.subject, excluded.schema)
RETURNING xmax = 0 AS new"""
"""The fingerprint knows nothing of defaults, docs and logical types: the text is that of the last deployment."""


class _Failure(click.ClickException):
    """One of our errors, with its exit code."""

    def __init__(self, error: OutboxError) -> None:
        super().__init__(str(error))
        away = isinstance(error, RegistryError | MigrationError)
        self.exit_code = 1 if isinstance(error, SchemaError) else 3 if away else 2  # type: ignore[misc] # click reads it


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OutboxError as error:
            raise _Failure(error) from error


@click.group("schemas", cls=_Group)
def schemas_group() -> None:
    """The .avsc files of a service: check them, compare them, hand them on.

    \b
    Exit codes:
      0  as it should be
      1  something was found, or the registry refuses a schema
      2  the call is wrong: an option, a setting, a folder, a commit
      3  the registry or the database is away: try again
    """


_folder = click.argument("path", metavar="SCHEMAS", type=click.Path(path_type=Path))
_registry = click.option(
    "--registry",
    "url",
    metavar="URL",
    help="The registry; more settings: OUTBOX_REGISTRY_….  [default: OUTBOX_REGISTRY_URL]",
)
_strategy = click.option(
    "--strategy",
    type=click.Choice(list(SUBJECTS)),
    default="TopicNameStrategy",
    show_default=True,
    envvar="OUTBOX_REGISTRY_SUBJECT_STRATEGY",
    help="Which subject of the registry a schema belongs to.",
)


def _against(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which earlier versions are meant."""
    options = (
        click.option("--git", metavar="REF", help="The files as they are in this commit: origin/main."),
        click.option("--folder", "folders", metavar="DIR", type=click.Path(path_type=Path), multiple=True,
                     help="The files of this folder; may be given again, the oldest first."),
        _registry,
        _strategy,
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@schemas_group.command("lint")
@_folder
def lint(path: Path) -> None:
    """Name what makes the .avsc files under SCHEMAS unusable, misleading to readers, or hard to change later."""
    problems = schemas.lint(path) or schemas.advice(path)
    for problem in problems:
        click.echo(str(problem))
    if problems:
        sys.exit(1)
    click.echo(f"{path}: no problems")


@schemas_group.command("check")
@_folder
@click.option(
    "--level",
    type=click.Choice(list(Level)),
    default=Level.BACKWARD,
    show_default=True,
    help="BACKWARD: the new reads the old one's events. FORWARD: the old reads the new one's. FULL: both.",
)
@_against
def check(path: Path, level: str, **against: Any) -> None:
    """Say which readers the .avsc files under SCHEMAS break, compared with earlier versions of them.

    Earlier: in a commit (--git), in folders (--folder), or in a registry (--registry). With a level that is TRANSITIVE:
    all versions of the registry, all folders, all commits before that one; else the last of them.

    \b
    In the CI of a service:
      outbox schemas check schemas/ --git origin/main --level FULL_TRANSITIVE
    """
    from outbox.evolution import check as breaks

    found = [
        one
        for file, schema, earlier in _earlier(path, every=Level(level).is_transitive, **against)
        for one in breaks(Version(str(file), schema), earlier, Level(level))
    ]
    for one in found:
        click.echo(str(one))
    if found:
        sys.exit(1)
    click.echo(f"{path}: nothing is broken ({level})")


@schemas_group.command("diff")
@_folder
@_against
def diff(path: Path, **against: Any) -> None:
    """Show what was changed in the .avsc files under SCHEMAS since the last version of each."""
    from outbox.evolution import differences

    for file, schema, earlier in _earlier(path, every=False, **against):
        if earlier and (lines := differences(earlier[-1].schema, schema)):
            click.echo("\n  ".join([f"{earlier[-1].label} → {file}", *lines]))


@schemas_group.command("register")
@_folder
@_registry
@_strategy
def register(path: Path, url: str | None, strategy: str) -> None:
    """Put the .avsc files under SCHEMAS into a registry, each as a version of its subject; safe to repeat.

    Before the first event of a new version is written: then the registry refuses it here, not at the relay.
    """
    refused = False
    with _opened(url) as registry:
        for file, schema in schemas.load(path).items():
            subject = _subject(strategy, schema)
            try:
                click.echo(f"{file}: id {registry.register(subject, schemas.text(schema))} in {subject}")
            except SchemaRefused as error:
                click.echo(f"{file}: {subject} refuses it: {error}")
                refused = True
    if refused:
        sys.exit(1)


@schemas_group.command("sync")
@_folder
@click.argument("database", metavar="URL", envvar="OUTBOX_DATABASE_URL")
@click.option(
    "--schema", default=SCHEMA, show_default=True, envvar="OUTBOX_SCHEMA", help="The SQL schema, the outbox's own."
)
def sync(path: Path, database: str, schema: str) -> None:
    """Put the .avsc files under SCHEMAS into the table avro_schema of the database at URL; safe to repeat.

    A service's writers do so by themselves, with their first event. Needed where events are written by plain SQL, and
    after a change of defaults or docs alone.
    """
    import sqlalchemy as sa

    from outbox.migrate import check_version, current_version, with_connection

    rows: list[dict[str, Any]] = [
        {
            "fingerprint": schemas.fingerprint(one),
            "subject": _subject("TopicNameStrategy", one),
            "text": schemas.text(one),
        }
        for one in schemas.load(path).values()
    ]
    rows.sort(key=lambda row: row["fingerprint"])  # as the writers do: no two wait for each other in a circle
    written: list[bool] = []

    def put(connection: sa.Connection) -> None:
        check_version(current_version(connection, schema=schema), schema=schema)
        for row in rows:
            written.extend(connection.scalars(sa.text(_PUT.format(schema=quoted(schema))), row))

    with_connection(database, put)
    click.echo(f"{len(rows)} schemas: {written.count(True)} are new, {written.count(False)} have another text now")


# --- What the commands share ---


def _subject(strategy: str, schema: schemas.Schema) -> str:
    return SUBJECTS[strategy](schema["topic"], schemas.full_name(schema))


@contextmanager
def _opened(url: str | None) -> Iterator[SchemaRegistry]:
    settings = settings_from(os.environ)
    if url:
        settings["url"] = url
    if not settings.get("url"):
        raise UsageError("no registry: give --registry URL, or set OUTBOX_REGISTRY_URL")
    with closing(SchemaRegistry(settings)) as registry:
        yield registry


def _earlier(
    path: Path, *, every: bool, git: str | None, folders: tuple[Path, ...], url: str | None, strategy: str
) -> Iterator[tuple[Path, schemas.Schema, list[Version]]]:
    """Each schema of now with its earlier versions, oldest first. Says which have none, and which are not there now."""
    if sum(map(bool, (git, folders, url))) > 1:
        raise UsageError("one thing to compare with, please: --git, --folder or --registry")
    now = schemas.load(path)
    if git or folders:
        found = versions.in_git(path, git, all_before=every) if git else versions.in_folders(folders)
        gone = {
            schemas.full_name(one.schema): one.label
            for one in found
            if not any(versions.is_same(schema, one.schema) for schema in now.values())
        }
        for label in gone.values():
            click.echo(f"{label}: has no successor in {path}", err=True)
        earlier = {file: versions.own(schema, found) for file, schema in now.items()}
    else:
        with _opened(url) as registry:
            earlier = {file: versions.in_registry(registry, _subject(strategy, one)) for file, one in now.items()}
    for file, schema in now.items():
        if not earlier[file]:
            click.echo(f"{file}: has no earlier version", err=True)
        yield file, schema, earlier[file]
