"""The three doors to the revisions: the same catalogue and mark behind each, and clear refusals in front of them."""

import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.operations import Operations
from click.testing import CliRunner

from outbox import migrate as doors
from outbox.__main__ import main
from outbox.errors import MigrationError, UsageError
from outbox.migrate import HEAD, check_version, current_version, migrate, upgrade_to
from tests.catalogue_of import catalogue_of
from tests.servers import Postgres


@pytest.fixture
def url(postgres: Postgres) -> str:
    """An empty database."""
    name = f"migrations_{uuid4().hex[:12]}"
    postgres.create_database(name)
    return postgres.url(name)


def engine_of(url: str) -> sa.Engine:
    return sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)


def rows(url: str, sql: str) -> list[tuple[object, ...]]:
    with engine_of(url).connect() as connection:
        return [tuple(row) for row in connection.execute(sa.text(sql))]


def run_script(url: str, script: str) -> None:
    """As psql would: the whole script, comments and transaction included, without parameters."""
    connection = engine_of(url).raw_connection()
    try:
        connection.driver_connection.autocommit = True  # type: ignore[union-attr]
        connection.cursor().execute(script)
    finally:
        connection.close()


def by_migrate(url: str, schema: str, lanes: int) -> None:
    migrate(url, schema=schema, lanes=lanes, name="one")


def by_migrate_with_asyncpg(url: str, schema: str, lanes: int) -> None:
    migrate(url.replace("postgresql://", "postgresql+asyncpg://"), schema=schema, lanes=lanes, name="one")


def by_script(url: str, schema: str, lanes: int) -> None:
    run_script(url, doors.sql(schema=schema, lanes=lanes, name="one"))


def host(connection: sa.Connection) -> Operations:
    """A host's migration context, with a naming convention that would rename what is not named outright."""
    convention = {"pk": "host_pk_%(table_name)s", "ck": "host_ck_%(table_name)s_%(constraint_name)s"}
    metadata = sa.MetaData(naming_convention=convention)
    return Operations(MigrationContext.configure(connection, opts={"target_metadata": metadata}))


def by_host(url: str, schema: str, lanes: int) -> None:
    with engine_of(url).begin() as connection:
        upgrade_to(host(connection), "0001", schema=schema, lanes=lanes, name="one")


def by_host_offline(url: str, schema: str, lanes: int) -> None:
    out = io.StringIO()
    context = MigrationContext.configure(
        dialect_name="postgresql", opts={"as_sql": True, "output_buffer": out, "target_metadata": sa.MetaData()}
    )
    upgrade_to(Operations(context), "0001", schema=schema, lanes=lanes, name="one")
    run_script(url, out.getvalue())


@pytest.mark.parametrize("door", [by_migrate_with_asyncpg, by_script, by_host, by_host_offline])
@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("schema", ["outbox", 'Strange "Schema"'])
def test_every_door_leaves_the_same_catalogue(
    url: str, postgres: Postgres, door: Callable[[str, str, int], None], lanes: int, schema: str
) -> None:
    other = postgres.create_database(f"other_{uuid4().hex[:12]}") or ""
    by_migrate(url, schema, lanes)
    door(other, schema, lanes)
    with engine_of(url).connect() as one, engine_of(other).connect() as two:
        assert catalogue_of(one, schema) == catalogue_of(two, schema) != []
        assert current_version(one, schema=schema) == current_version(two, schema=schema) == HEAD
        quoted = '"' + schema.replace('"', '""') + '"'
        for connection in (one, two):
            meta = connection.execute(sa.text(f"SELECT name, uuid, lanes FROM {quoted}.meta")).one()
            assert (meta.name, meta.lanes) == ("one", lanes)
            assert isinstance(meta.uuid, UUID)
            found = connection.execute(sa.text(f"SELECT lane, batch, released, owner FROM {quoted}.lane ORDER BY lane"))
            assert [tuple(row) for row in found] == [(lane, 0, True, None) for lane in range(lanes)]


def test_a_second_run_changes_nothing(url: str) -> None:
    migrate(url)
    before = rows(url, "SELECT uuid, created_at FROM outbox.meta")
    migrate(url)
    by_host_again = engine_of(url)
    with by_host_again.begin() as connection:
        upgrade_to(host(connection), "0001")
    assert rows(url, "SELECT uuid, created_at FROM outbox.meta") == before
    assert rows(url, "SELECT version_num FROM outbox.alembic_version") == [(HEAD,)]


def test_eight_at_once_make_one_outbox(url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(migrate, [url] * 8))
    assert rows(url, "SELECT count(*) FROM outbox.lane") == [(1,)]


def test_two_outboxes_live_in_two_schemas_of_one_database(url: str) -> None:
    migrate(url, schema="orders", name="orders")
    migrate(url, schema="billing", name="billing", lanes=2)
    assert rows(url, "SELECT o.name, b.name FROM orders.meta o, billing.meta b") == [("orders", "billing")]


def test_the_name_is_the_database_s_when_none_is_given(url: str) -> None:
    migrate(url)
    assert rows(url, "SELECT name = current_database() FROM outbox.meta") == [(True,)]


def test_a_host_s_version_table_is_left_alone(url: str) -> None:
    with engine_of(url).begin() as connection:
        connection.execute(sa.text("CREATE TABLE alembic_version (version_num varchar(32) NOT NULL)"))
        connection.execute(sa.text("INSERT INTO alembic_version VALUES ('ae1027a6acf')"))
    migrate(url)
    assert rows(url, "SELECT version_num FROM public.alembic_version") == [("ae1027a6acf",)]


def test_a_role_without_the_right_to_make_schemas_migrates_into_one_made_for_it(url: str) -> None:
    role = f"role_{uuid4().hex[:12]}"
    with engine_of(url).begin() as connection:
        connection.execute(sa.text(f"CREATE ROLE {role} LOGIN"))
        connection.execute(sa.text(f"CREATE SCHEMA outbox AUTHORIZATION {role}"))
    by_role = sa.make_url(url).set(username=role, password=None).render_as_string()
    try:
        migrate(by_role)
        assert rows(url, "SELECT version_num FROM outbox.alembic_version") == [(HEAD,)]
    finally:
        with engine_of(url).begin() as connection:
            connection.execute(sa.text("DROP SCHEMA outbox CASCADE"))
            connection.execute(sa.text(f"DROP ROLE {role}"))


SECOND = """
from alembic import op
from outbox.migrate import settings_of
revision, down_revision, branch_labels, depends_on = "0002", "0001", None, None
def upgrade():
    for statement in statements(settings_of(op)):
        op.execute(statement)
def statements(settings):
    return [f"ALTER TABLE {settings.quoted_schema}.relay ADD COLUMN note text"]
"""


@pytest.fixture
def next_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, the code is one revision further."""

    def release() -> None:
        folder = Path(shutil.copytree("migrations", tmp_path / "migrations"))
        (folder / "versions" / "0002_more.py").write_text(SECOND)
        monkeypatch.setattr(doors, "_folder", lambda: folder)
        monkeypatch.setattr(doors, "HEAD", "0002")

    return release


@pytest.mark.parametrize("first", [by_migrate, by_host])
@pytest.mark.parametrize("then", ["migrate", "host"])
def test_the_next_revision_follows_through_any_door(
    url: str, next_release: Callable[[], None], first: Callable[[str, str, int], None], then: str
) -> None:
    first(url, "outbox", 1)
    next_release()
    with pytest.raises(MigrationError, match="version 0001, this code needs 0002"):
        check_version("0001")
    if then == "migrate":
        migrate(url)
    else:
        with engine_of(url).begin() as connection:
            upgrade_to(host(connection), "0001")  # of the host's older revision: nothing to do
            upgrade_to(host(connection), "0002")
            upgrade_to(host(connection), "0001")  # a database that was migrated by hand in between
    assert rows(url, "SELECT version_num FROM outbox.alembic_version") == [("0002",)]
    assert rows(url, "SELECT note FROM outbox.relay") == []


def test_the_template_of_a_new_revision_renders(postgres: Postgres, tmp_path: Path) -> None:
    shutil.copytree("migrations", tmp_path / "migrations")
    config = Config()
    config.set_main_option("script_location", str(tmp_path / "migrations"))
    command.revision(config, message="more", rev_id="0002")
    (made,) = (tmp_path / "migrations" / "versions").glob("0002*.py")
    compile(made.read_text(), made, "exec")


# --- Refusals ---


def test_a_newer_version_is_refused_by_every_door_and_named(url: str) -> None:
    migrate(url)
    with engine_of(url).begin() as connection:
        connection.execute(sa.text("UPDATE outbox.alembic_version SET version_num = '0042'"))
    message = f"0042.*newer than {HEAD}.*upgrade the package"
    with pytest.raises(MigrationError, match=message):
        migrate(url)
    with engine_of(url).begin() as connection, pytest.raises(MigrationError, match=message):
        upgrade_to(host(connection), "0001")
    with pytest.raises(MigrationError, match=message):
        check_version("0042")


def test_missing_and_older_tables_are_named_with_the_command(url: str) -> None:
    with engine_of(url).connect() as connection:
        assert current_version(connection) is None
    with pytest.raises(
        MigrationError, match="no outbox in the SQL schema 'shop': run `outbox migrate --schema shop URL`"
    ):
        check_version(None, schema="shop")
    with pytest.raises(MigrationError, match=f"version 0000, this code needs {HEAD}: run `outbox migrate URL`"):
        check_version("0000")
    check_version(HEAD)


@pytest.mark.parametrize(("what", "asked"), [("name", {"name": "other"}), ("lanes", {"lanes": 2})])
def test_another_name_or_number_of_lanes_is_no_silent_no_op(url: str, what: str, asked: dict[str, object]) -> None:
    migrate(url, name="first")
    with pytest.raises(MigrationError, match=rf"has the {what} .* \(leave --{what} out"):
        migrate(url, **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a b", "ümlaut", "", "x" * 201, ".", "..", "a/b", "o'clock", "new\nline", "end\n"])
def test_a_name_that_kafka_would_refuse_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="Kafka topics"):
        doors.sql(name=name)


def test_a_database_s_name_that_kafka_would_refuse_asks_for_another(postgres: Postgres) -> None:
    name = f"not+legal+{uuid4().hex[:8]}"
    postgres.create_database(name)
    url = postgres.url(name)
    with pytest.raises(UsageError, match="--name"):
        migrate(url)
    with pytest.raises(psycopg.errors.CheckViolation, match="meta_name_is_legal_in_kafka"):
        run_script(url, doors.sql())
    migrate(url, name="legal")


def test_an_unknown_revision_is_refused(url: str) -> None:
    with engine_of(url).begin() as connection, pytest.raises(UsageError, match=r"no revision '0099'.*\['0001'\]"):
        upgrade_to(host(connection), "0099")


@pytest.mark.parametrize("driver", ["postgresql", "postgresql+psycopg", "postgresql+asyncpg"])
def test_an_unreachable_server_is_named_without_its_password(driver: str) -> None:
    with pytest.raises(MigrationError, match=r"127\.0\.0\.1:1/nothing could not be migrated") as refused:
        migrate(f"{driver}://someone:secret@127.0.0.1:1/nothing")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "bad", ["mysql://localhost/shop", "localhost/shop", "postgresql+psycopg2cffi://localhost/shop"]
)
def test_a_url_that_cannot_be_used_says_why(bad: str) -> None:
    with pytest.raises(UsageError, match=r"URL"):
        migrate(bad)


def test_a_missing_database_is_a_migration_error_with_both_drivers(postgres: Postgres) -> None:
    for driver in ("psycopg", "asyncpg"):
        with pytest.raises(MigrationError, match='database "not_there" does not exist'):
            migrate(postgres.url("not_there").replace("postgresql://", f"postgresql+{driver}://"))


def test_without_psycopg_a_plain_url_goes_through_asyncpg(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "_driver", lambda: "asyncpg")
    migrate(url)
    assert rows(url, "SELECT version_num FROM outbox.alembic_version") == [(HEAD,)]


def test_a_failed_migration_leaves_nothing(url: str) -> None:
    with engine_of(url).begin() as connection:
        connection.execute(sa.text("CREATE SCHEMA outbox"))
        connection.execute(sa.text("CREATE TABLE outbox.inbox (mine int)"))
    with pytest.raises(MigrationError, match="already exists"):
        migrate(url)
    assert rows(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'outbox'") == [("inbox",)]


# --- The command ---


def test_the_command_migrates_and_says_so(url: str) -> None:
    result = CliRunner().invoke(main, ["migrate", "--name", "shop", "--lanes", "2", "--schema", "shop_outbox", url])
    assert result.exit_code == 0, result.output
    assert f"at version {HEAD}" in result.stderr
    assert rows(url, "SELECT name, lanes FROM shop_outbox.meta") == [("shop", 2)]


def test_the_command_takes_the_url_from_the_environment(url: str) -> None:
    assert CliRunner().invoke(main, ["migrate"], env={"OUTBOX_DATABASE_URL": url}).exit_code == 0
    assert rows(url, "SELECT version_num FROM outbox.alembic_version") == [(HEAD,)]


def test_both_commands_print_the_same_sql() -> None:
    one = CliRunner().invoke(main, ["migrate", "--sql", "--name", "shop"])
    two = CliRunner().invoke(main, ["sql", "--name", "shop"])
    assert one.stdout == two.stdout
    assert one.stdout.startswith("BEGIN;")
    assert one.stdout.rstrip().endswith("COMMIT;")


def test_the_command_says_what_is_wrong_in_a_sentence() -> None:
    result = CliRunner().invoke(main, ["sql", "--name", "a b"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: 'a b' cannot be an outbox's name")
    assert CliRunner().invoke(main, ["migrate"], env={"OUTBOX_DATABASE_URL": ""}).exit_code == 2


def test_without_alembic_the_command_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "alembic.command", None)
    result = CliRunner().invoke(main, ["sql"])
    assert result.exit_code == 1
    assert "kafka-outbox[migrations]" in result.stderr


def test_the_module_runs_without_importing_alembic() -> None:
    code = "import sys, outbox.migrate, outbox.__main__; sys.exit('alembic' in sys.modules or 'asyncpg' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parent.parent).returncode == 0
