"""tables.py and the revisions describe the same tables: by Alembic's eye, and by PostgreSQL's own catalogue."""

import warnings
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from hypothesis import given, settings
from hypothesis import strategies as st

from outbox.errors import UsageError
from outbox.migrate import migrate
from outbox.tables import MAX_LANES, lane_expression, tables
from tests.catalogue_of import catalogue_of
from tests.servers import Postgres


def fresh_database(postgres: Postgres) -> str:
    name = f"tables_{uuid4().hex[:12]}"
    postgres.create_database(name)
    return postgres.url(name)


def engine_of(url: str) -> sa.Engine:
    return sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)


@pytest.mark.parametrize("lanes", [1, 4])
def test_the_revisions_arrive_at_the_catalogue_that_tables_py_describes(postgres: Postgres, lanes: int) -> None:
    url = fresh_database(postgres)
    migrate(url, schema="migrated", lanes=lanes)
    with engine_of(url).begin() as connection:
        connection.execute(sa.text("CREATE SCHEMA described"))
        tables("described", lanes).create_all(connection)
        migrated, described = catalogue_of(connection, "migrated"), catalogue_of(connection, "described")
    migrated = [line for line in migrated if "alembic_version" not in line]
    assert migrated == described
    assert any("autovacuum_vacuum_cost_delay=0" in line for line in described), "the storage options are compared too"


@pytest.mark.parametrize("lanes", [1, 3])
def test_alembic_check_finds_no_drift_and_has_nothing_to_warn_of(
    postgres: Postgres, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = fresh_database(postgres)
    migrate(url, lanes=lanes)
    monkeypatch.setenv("OUTBOX_DATABASE_URL", url)
    monkeypatch.setenv("OUTBOX_LANES", str(lanes))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        command.check(Config(toml_file="pyproject.toml"))


def insert(connection: sa.Connection, schema: str, **columns: Any) -> int:
    row = {"id": uuid4(), "type": "t", "topic": "t", "key": None, "value": b""} | columns
    return int(
        connection.execute(
            sa.text(
                f"INSERT INTO {schema}.outbox (id, type, topic, key, value) VALUES (:id, :type, :topic, :key, :value)"
                " RETURNING lane"
            ),
            row,
        ).scalar_one()
    )


def test_a_plain_insert_gets_its_lane_from_its_key_and_without_a_key_from_its_id(postgres: Postgres) -> None:
    url = fresh_database(postgres)
    migrate(url, lanes=4)
    with engine_of(url).begin() as connection:
        by_key = {key: {insert(connection, "outbox", key=key) for _ in range(5)} for key in map(str, range(64))}
        assert all(len(lanes) == 1 for lanes in by_key.values()), "one key, one lane"
        assert set().union(*by_key.values()) == {0, 1, 2, 3}
        assert {insert(connection, "outbox") for _ in range(64)} == {0, 1, 2, 3}


MASK = 0xFFFF_FFFF


def hashtext(text: str) -> int:
    """PostgreSQL's function, from Bob Jenkins' lookup3: unsigned here, signed there."""

    def rotated(value: int, bits: int) -> int:
        value &= MASK
        return value << bits | value >> (32 - bits)

    data = text.encode()
    a = b = c = 0x9E3779B9 + len(data) + 3923095
    whole = len(data) // 12 * 12
    for at in range(0, whole, 12):
        a, b, c = (x + int.from_bytes(data[at + n : at + n + 4], "little") for x, n in ((a, 0), (b, 4), (c, 8)))
        for bits in (4, 6, 8, 16, 19, 4):
            a = (a - c) ^ rotated(c, bits)
            c += b
            a, b, c = b, c, a  # each step is the last one with the letters moved on
    rest = data[whole:]
    a += int.from_bytes(rest[:4], "little")
    b += int.from_bytes(rest[4:8], "little")
    c += int.from_bytes(rest[8:], "little") << 8  # its lowest byte is the length's
    for bits in (14, 11, 25, 16, 4, 14, 24):
        c = (c ^ b) - rotated(b, bits)
        a, b, c = b, c, a
    return b & MASK


@pytest.fixture(scope="module")
def lanes_of(postgres: Postgres) -> Any:
    """Lanes of rows (key, id), by the expression of the generated column."""
    engine = sa.create_engine(
        postgres.url("postgres").replace("postgresql://", "postgresql+psycopg://"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:

        def lanes(rows: list[tuple[str | None, UUID]], count: int) -> list[int]:
            source = "unnest(CAST(:keys AS text[]), CAST(:ids AS uuid[])) AS row (key, id)"
            sql = sa.text(f"SELECT {lane_expression(count)} FROM {source}".replace("::", "\\:\\:"))
            return list(connection.scalars(sql, {"keys": [key for key, _ in rows], "ids": [id_ for _, id_ in rows]}))

        yield lanes
    engine.dispose()


keys = st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(st.lists(st.tuples(keys, st.uuids()), min_size=1), st.integers(2, MAX_LANES))
def test_a_lane_is_the_hash_of_the_key_or_without_one_of_the_id(
    lanes_of: Any, rows: list[tuple[str | None, UUID]], count: int
) -> None:
    assert lanes_of(rows, count) == [
        (hashtext(str(id_) if key is None else key) & 0x7FFF_FFFF) % count for key, id_ in rows
    ]


@settings(max_examples=5)
@given(st.integers(1, MAX_LANES))
def test_all_lanes_are_used_and_about_equally(lanes_of: Any, count: int) -> None:
    rows = [(f"key-{number}", UUID(int=number)) for number in range(count * 100)]
    found = lanes_of(rows, count)
    assert set(found) == set(range(count))
    assert max(found.count(lane) for lane in range(0, count, 97)) < 200


def test_one_lane_is_lane_zero(postgres: Postgres) -> None:
    url = fresh_database(postgres)
    migrate(url)
    with engine_of(url).begin() as connection:
        assert {insert(connection, "outbox", key=str(n)) for n in range(8)} == {0}


@pytest.mark.parametrize("column", ["lane", "seq"])
def test_a_writer_cannot_choose_its_lane_or_its_seq(postgres: Postgres, column: str) -> None:
    url = fresh_database(postgres)
    migrate(url)
    sql = f"INSERT INTO outbox.outbox ({column}, id, type, topic) VALUES (1, gen_random_uuid(), 't', 't')"
    with (
        engine_of(url).connect() as connection,
        pytest.raises(sa.exc.DBAPIError, match="cannot insert a non-DEFAULT value"),
    ):
        connection.execute(sa.text(sql))


def test_meta_holds_one_row(postgres: Postgres) -> None:
    url = fresh_database(postgres)
    migrate(url)
    sql = "INSERT INTO outbox.meta (one, name, uuid, lanes) VALUES ({}, 'again', gen_random_uuid(), 1)"
    for one in ("true", "false"):
        with engine_of(url).connect() as connection, pytest.raises(sa.exc.IntegrityError):
            connection.execute(sa.text(sql.format(one)))


@pytest.mark.parametrize("schema", ["public", "pg_outbox", "information_schema", "", "x" * 64])
def test_the_outbox_is_refused_a_schema_that_is_not_its_own(schema: str) -> None:
    with pytest.raises(UsageError, match="SQL schema"):
        tables(schema)


@pytest.mark.parametrize("lanes", [0, -1, MAX_LANES + 1])
def test_a_number_of_lanes_that_cannot_be_is_refused(lanes: int) -> None:
    with pytest.raises(UsageError, match="lanes"):
        tables("outbox", lanes)
