"""A schema registry: whose frame the events bear, what becomes of an event that it refuses, and of all while it is
away."""

import asyncio
import json
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import sqlalchemy as sa
from confluent_kafka.serialization import MessageField, SerializationContext
from structlog.testing import capture_logs

from examples.chip_quality.events import Defect, InspectionEvent, InspectionEventType
from outbox import Catalogue, Outbox, RegistryError, SchemaRefused, UsageError, schemas
from outbox.registry import SUBJECTS, WORDS, SchemaRegistry, settings_from
from relay import config as relay_config
from relay import registry as relay_registry
from relay.config import RelayConfig
from relay.errors import ConfigError
from relay.failpoint import Failpoint
from relay.lane import Lane
from relay.quarantine import Quarantine
from relay.queries import Queries, connect
from relay.registry import Registry
from relay.transaction import Transactions
from relay.worker import Shared, _Cycle
from tests.conftest import MakeTopic
from tests.registry_gate import Gate
from tests.relay_process import Reader, Site, check_exactly_once, id_of
from tests.servers import Kafka, java
from tests.servers import Registry as Server

ROOT = Path(__file__).parents[1]
NOBODY = "http://127.0.0.1:9"
INSERT = "INSERT INTO outbox.outbox (id, type, topic, key, value, fingerprint) VALUES (%s, 't', %s, %s, %s, %s)"
X = {"name": "x", "type": "int"}
Y = {"name": "y", "type": "int"}
Z = {"name": "z", "type": "int", "default": 5}


def order(*fields: dict[str, Any], **changes: Any) -> str:
    """The JSON of a schema."""
    schema = {"type": "record", "name": "Order", "namespace": "shop", "fields": list(fields), **changes}
    return json.dumps(schema, separators=(",", ":"))


def put(url: str, schema: str) -> int:
    """Into avro_schema, as a writer does; its fingerprint."""
    fingerprint = schemas.fingerprint(json.loads(schema))
    with psycopg.connect(url, autocommit=True) as connection:
        sql = (
            "INSERT INTO outbox.avro_schema (fingerprint, subject, schema) VALUES (%s, 's', %s) ON CONFLICT DO NOTHING"
        )
        connection.execute(sql, (fingerprint, schema))
    return fingerprint


def row(topic: str, fingerprint: int | None, seq: int = 1, value: bytes | None = b"\x02") -> tuple[Any, ...]:
    return (seq, str(UUID(int=seq)), "t", topic, "k", value, fingerprint, None, 0)


@asynccontextmanager
async def known(database: str, url: str, **settings: Any) -> AsyncIterator[Registry]:
    """What a relay with these settings knows."""
    kafka = {"bootstrap.servers": "nowhere:1"}
    config = RelayConfig(database_url=database, kafka=kafka, registry={"url": url}, **settings)
    pool = await connect(config, 4)
    try:
        with ThreadPoolExecutor(4) as threads:
            registry = Registry(config, Queries(pool, "outbox"), threads)
            yield registry
            registry.close()
    finally:
        pool.terminate()


@contextmanager
def server(url: str, **settings: str) -> Iterator[SchemaRegistry]:
    """The registry at `url`, as the commands know it."""
    with closing(SchemaRegistry({"url": url, **settings})) as server:
        yield server


@pytest.fixture
def gate(registry: Server) -> Iterator[Gate]:
    with Gate(registry.url) as gate:
        yield gate


@pytest.fixture
def topic_name() -> str:
    """Of a topic that Kafka need not have: a subject of this test's own."""
    return f"test_{uuid4().hex[:12]}"


def is_learned(registry: Registry, rows: list[tuple[Any, ...]]) -> bool:
    return registry.part(rows) == (rows, {})


async def learn(registry: Registry, rows: list[tuple[Any, ...]]) -> None:
    await registry.learn(rows, asyncio.Event())


# ---- ids -------------------------------------------------------------------------------------------------------------


async def test_ids_are_learned_once_and_only_for_rows_that_bear_a_frame(
    database: str, gate: Gate, topic_name: str
) -> None:
    one, two = put(database, order(X)), put(database, order(X, Z))
    rows = [row(topic_name, one, 1), row(topic_name, two, 2), row(topic_name, None, 3), row(topic_name, 7, 4, None)]
    async with known(database, gate.url) as registry:
        assert registry.part(rows) == ([], {})
        await learn(registry, rows)
        assert is_learned(registry, rows)
        assert registry.frames.keys() == {(topic_name, one), (topic_name, two)}
        await learn(registry, rows)
        assert len(gate.seen) == 2
        with server(gate.url) as other:
            id_ = other.look_up(f"{topic_name}-value", order(X))
        assert registry.frames[topic_name, one] == struct.pack(">bI", 0, id_)


async def test_rows_before_one_whose_id_is_not_known_go_ahead(database: str, gate: Gate, topic_name: str) -> None:
    one, two = put(database, order(X)), put(database, order(X, Z))
    rows = [row(topic_name, one, 1), row(topic_name, None, 2), row(topic_name, two, 3), row(topic_name, one, 4)]
    async with known(database, gate.url) as registry:
        await learn(registry, rows[:1])
        assert registry.part(rows) == (rows[:2], {})


async def test_lanes_and_relays_that_need_one_id_at_a_time_get_the_same(
    database: str, gate: Gate, topic_name: str
) -> None:
    rows = [row(topic_name, put(database, order(X)))]
    async with known(database, gate.url) as one, known(database, gate.url) as other:
        await asyncio.gather(*(learn(relay, rows) for relay in (one, one, one, other)))
        assert one.frames == other.frames
        assert len(gate.seen) == 2, "one request a relay"


@pytest.mark.parametrize(
    ("strategy", "subject"),
    [
        ("TopicNameStrategy", "{name}-value"),
        ("RecordNameStrategy", "shop.{name}"),
        ("TopicRecordNameStrategy", "{name}-shop.{name}"),
    ],
)
async def test_the_subject_follows_the_strategy(
    database: str, registry: Server, strategy: str, subject: str, topic_name: str
) -> None:
    text = order(X, name=topic_name)
    rows = [row(topic_name, put(database, text))]
    async with known(database, registry.url, registry_subject_strategy=strategy) as relay:
        await learn(relay, rows)
    with server(registry.url) as other:
        found = other.versions(subject.format(name=topic_name))
    assert [json.loads(one) for one in found.values()] == [json.loads(text)]


def test_relay_and_command_know_the_same_strategies() -> None:
    assert set(relay_config.SUBJECT_STRATEGIES) == set(SUBJECTS)


# ---- refusals --------------------------------------------------------------------------------------------------------


async def test_what_the_registry_refuses_is_parked_with_its_words_until_it_is_asked_again(
    database: str, gate: Gate, topic_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(gate.url) as other:
        other.register(f"{topic_name}-value", order(X))
    good, bad = put(database, order(X)), put(database, order(X, Y))
    rows = [row(topic_name, bad, 1), row(topic_name, good, 2), row(topic_name, bad, 3, None)]
    async with known(database, gate.url) as registry:
        with capture_logs() as logs:
            await learn(registry, rows)
            ready, refused = registry.part(rows)
            assert ready == rows
            assert refused.keys() == {1}, "a tombstone needs no schema"
            assert "Incompatible" in refused[1]
            asked = len(gate.seen)
            await learn(registry, rows)
            assert len(gate.seen) == asked, "it is remembered"
            monkeypatch.setattr(relay_registry, "REFUSAL_SECONDS", 0.0)
            assert registry.part(rows) == ([], {})
            gate.answers += [(409, {"error_code": 409, "message": "no"})] * 2
            monkeypatch.setattr(relay_registry, "REFUSAL_SECONDS", 60.0)
            registry._refused.clear()
            await learn(registry, rows)
        assert [line["event"] for line in logs] == ["schema refused"] * 2


async def test_a_conflict_of_two_who_register_at_once_is_no_refusal(database: str, gate: Gate, topic_name: str) -> None:
    rows = [row(topic_name, put(database, order(X)))]
    gate.answers.append((409, {"error_code": 409, "message": "somebody else was first"}))
    async with known(database, gate.url) as registry:
        await learn(registry, rows)
        assert is_learned(registry, rows)


async def test_schemas_are_only_looked_up_by_setting(database: str, registry: Server, topic_name: str) -> None:
    there, absent = put(database, order(X)), put(database, order(X, Z))
    rows = [row(topic_name, there, 1), row(topic_name, absent, 2)]
    with server(registry.url) as other:
        other.register(f"{topic_name}-value", order(X))
        async with known(database, registry.url, registry_auto_register=False) as relay:
            await learn(relay, rows)
            ready, refused = relay.part(rows)
        assert len(other.versions(f"{topic_name}-value")) == 1
    assert ready == rows
    assert refused.keys() == {2}
    assert "40403" in refused[2]


@pytest.mark.parametrize("schema", ["no json", '"string"', '{"type": "record"}', '{"type": "record", "name": "A"}'])
async def test_what_is_no_schema_is_refused_and_names_its_fingerprint(
    database: str, registry: Server, topic_name: str, schema: str
) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("INSERT INTO outbox.avro_schema VALUES (-5, 's', %s)", (schema,))
    rows = [row(topic_name, -5, 1), row(topic_name, 6, 2)]
    async with known(database, registry.url) as relay:
        await learn(relay, rows)
        ready, refused = relay.part(rows)
    assert ready == rows
    assert "no id in the schema registry: " in refused[1]
    assert refused[2].endswith("avro_schema does not hold 6: run `outbox schemas sync`")


# ---- trouble ---------------------------------------------------------------------------------------------------------


async def test_a_registry_that_is_away_is_asked_again_and_said_once(database: str, gate: Gate, topic_name: str) -> None:
    rows = [row(topic_name, put(database, order(X)))]
    gate.answers += [
        (500, {"error_code": 50001, "message": "store"}),
        (404, {}),
        (401, {}),
        (422, {"error_code": 42205}),
    ]
    async with known(database, gate.url) as registry:
        with capture_logs() as logs:
            await learn(registry, rows)
        assert is_learned(registry, rows)
    assert [line["event"] for line in logs] == ["registry away", "registry back"]
    assert logs[0]["url"] == gate.url
    assert "store (HTTP 500, code 50001)" in logs[0]["error"]


async def test_a_rotated_password_is_taken_up_while_the_old_one_is_refused(
    database: str, registry: Server, topic_name: str, tmp_path: Path
) -> None:
    rows = [row(topic_name, put(database, order(X)))]
    info = tmp_path / "info"
    info.write_text("relay:old\n")
    files = {"registry.basic.auth.user.info": info}
    with Gate(registry.url, user="relay", password="new") as gate:
        async with known(database, gate.url, files=files) as relay:
            with capture_logs() as logs:
                learning = asyncio.create_task(learn(relay, rows))
                while not logs:  # noqa: ASYNC110 -- capture_logs has no event
                    await asyncio.sleep(0.01)
                info.write_text("relay:new\n")
                await learning
            assert is_learned(relay, rows)
    assert [line["event"] for line in logs] == ["registry away", "registry back"]
    assert "HTTP 401" in logs[0]["error"]


async def test_what_is_said_of_an_answer_is_no_longer_than_a_person_reads(
    database: str, gate: Gate, topic_name: str
) -> None:
    gate.answers += [(500, {"error_code": 50001, "message": "x" * 100_000})]
    rows = [row(topic_name, put(database, order(X)))]
    async with known(database, gate.url) as registry:
        with capture_logs() as logs:
            await learn(registry, rows)
    assert WORDS <= len(logs[0]["error"]) < WORDS + 100


def test_settings_may_stand_in_files(tmp_path: Path) -> None:
    file = tmp_path / "info"
    file.write_text("me:hunter2\n")
    own = {"OUTBOX_REGISTRY_URL": "http://r", "OUTBOX_REGISTRY_BASIC_AUTH_USER_INFO_FILE": str(file)}
    assert settings_from({**own, "OUTBOX_REGISTRY_AUTO_REGISTER_FILE": "of the relay", "OUTBOX_DATABASE_URL": ""}) == {
        "url": "http://r",
        "basic.auth.user.info": "me:hunter2",
    }
    with pytest.raises(UsageError, match="are both set"):
        settings_from({**own, "OUTBOX_REGISTRY_BASIC_AUTH_USER_INFO": "me:hunter3"})
    file.unlink()
    with pytest.raises(UsageError, match="OUTBOX_REGISTRY_BASIC_AUTH_USER_INFO_FILE names"):
        settings_from(own)


async def test_a_lane_that_stops_waits_no_longer(database: str, topic_name: str) -> None:
    rows = [row(topic_name, put(database, order(X)))]
    stopping = asyncio.Event()
    async with known(database, NOBODY) as registry:
        asyncio.get_running_loop().call_later(0.2, stopping.set)
        await asyncio.wait_for(registry.learn(rows, stopping), 5)
        assert registry.part(rows) == ([], {})


async def test_a_fetch_whose_rows_wait_for_their_ids_does_not_move_the_floor(database: str, topic_name: str) -> None:
    """A row that committed late would be left below it, and lost."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(INSERT, (uuid4(), topic_name, "k", b"\x02\x04", put(database, order(X))))
    stopping = asyncio.Event()
    stopping.set()
    async with known(database, NOBODY) as registry:
        queries = registry._queries
        config = RelayConfig(database_url=database, kafka={"bootstrap.servers": "nowhere:1"})
        shared = Shared(config, uuid4(), await queries.meta(), queries, registry._threads, Failpoint(None), registry)
        async with queries.connection() as db:
            kafka = Transactions(config, "none", 0)
            cycle = _Cycle(shared, 0, kafka, db, db, Lane(0), "", Quarantine(100), stopping)
            cycle.floor.fetched(10, complete=True)
            cycle.floor.read([])  # nobody writes: the next fetch that brings all there is moves the floor to 10
            assert await cycle._fetch() is None
            assert cycle.floor.value == 0
            kafka.discard()


async def test_a_call_that_does_not_return_blocks_nothing_and_is_given_up(
    database: str, topic_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, called, calls = asyncio.get_running_loop(), asyncio.Event(), []

    def slow(subject: str, schema: str) -> int:
        calls.append(subject)
        loop.call_soon_threadsafe(called.set)
        time.sleep(0.5 if len(calls) == 1 else 0)
        return 300

    rows = [row(topic_name, put(database, order(X)))]
    monkeypatch.setattr(relay_registry, "CALL_SECONDS", 0.2)
    async with known(database, NOBODY) as registry:
        monkeypatch.setattr(registry, "_ask", slow)
        learning = asyncio.create_task(learn(registry, rows))
        await called.wait()
        before = time.monotonic()
        await asyncio.sleep(0.01)
        assert time.monotonic() - before < 0.2, "the event loop goes on"
        await learning
        assert registry.frames[topic_name, rows[0][6]] == b"\0\0\0\x01\x2c"
    assert calls == [f"{topic_name}-value"] * 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "ftp://x"}, "Invalid url ftp://x"),
        ({"url": "http://user:secret@x"}, "set basic.auth.user.info"),
        ({"url": "http://x", "no.such.thing": "1"}, "no.such.thing"),
        ({"url": "http://x", "basic.auth.user.info": "secret"}, "basic.auth.user.info must be"),
        ({"url": "http://x", "ssl.ca.location": "/no/such/file"}, "No such file"),
        ({"url": "http://x", "timeout": "soon"}, "timeout is 'soon': it must be a number"),
    ],
)
def test_settings_that_cannot_be_are_refused_and_no_secret_is_said(settings: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError) as error:
        SchemaRegistry(settings)
    assert said in str(error.value)
    assert "secret" not in str(error.value)
    config = RelayConfig(database_url="postgresql://x", kafka={"bootstrap.servers": "x"}, registry=settings)
    with pytest.raises(ConfigError, match=r"registry|schema registry"):
        Registry(config, None, None)  # type: ignore[arg-type] # it does not come so far as to use them
    assert "secret" not in repr(config)


def test_what_a_wrong_path_answers_is_trouble_and_no_refusal(registry: Server) -> None:
    with server(f"{registry.url}9") as other:
        for call in (other.register, other.look_up):
            with pytest.raises(RegistryError) as error:
                call("s", order(X))
            assert not isinstance(error.value, SchemaRefused)


# ---- the way end to end ----------------------------------------------------------------------------------------------


@pytest.fixture
def site(database: str, kafka: Kafka) -> Iterator[Site]:
    with Site(database, kafka.bootstrap) as site:
        yield site


def add(site: Site, topic: str, fingerprint: int, key: str = "k") -> str:
    """The id of an event in a transaction of its own."""
    id_ = uuid4()
    site.rows(INSERT, id_, topic, key, b"\x02\x04", fingerprint)
    return str(id_)


def inspections(count: int) -> list[InspectionEvent]:
    defect = Defect(defect_type="Kratzer", severity="gering", confidence=0.5, location="Ecke Süd")
    return [
        InspectionEvent(
            event_type=InspectionEventType.DEFECT_DETECTED,
            inspection_id=f"i-{number}",
            batch_id="b",
            chip_id="c",
            inspection_type="visual",
            status="done",
            quality_score=number / 7,
            defects=[defect] * number,
            metadata={"number": str(number)},
        )
        for number in range(count)
    ]


def test_typed_events_are_read_back_by_confluents_deserializer_and_by_java(
    site: Site, registry: Server, topic: MakeTopic
) -> None:
    name = topic()
    schema = json.loads((ROOT / "schemas/inspection.avsc").read_text())
    outbox = Outbox(Catalogue([{**schema, "topic": name}]))
    events = inspections(5)
    engine = sa.create_engine(site.url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(outbox.insert(*events))
    engine.dispose()
    site.taken(OUTBOX_REGISTRY_URL=registry.url)
    messages = check_exactly_once(site)
    values = [message.value() or b"" for message in messages]
    with server(registry.url) as other:
        from confluent_kafka.schema_registry.avro import AvroDeserializer  # late: its imports warn

        read: Any = AvroDeserializer(other._client, from_dict=lambda data, _: InspectionEvent.from_avro(data))
        context = SerializationContext(name, MessageField.VALUE)
        assert [read(value, context) for value in values] == events
        id_ = other.look_up(f"{name}-value", outbox.catalogue.schema_json(InspectionEvent.AVRO_FINGERPRINT))
    assert {value[:5] for value in values} == {struct.pack(">bI", 0, id_)}
    found = read_by_java(site.bootstrap, registry, name, len(events))
    assert [one["inspection_id"] for one in found] == [f"i-{number}" for number in range(5)]
    assert found[1]["defects"][0]["location"] == "Ecke Süd"


def read_by_java(bootstrap: str, registry: Server, topic: str, count: int) -> list[dict[str, Any]]:
    """What the console consumer of Kafka prints of the records that Apicurio's own deserializer reads."""
    jars = java.jars(
        "kafka-console-4.3.1-apicurio-3.1.7",
        ("org.apache.kafka:kafka-tools:4.3.1", "io.apicurio:apicurio-registry-avro-serde-kafka:3.1.7!"),
        hint="128 jars, 53 MB, once",
    )
    found = java.find(21)
    assert found is not None
    properties = {
        "value.deserializer": "io.apicurio.registry.serde.avro.AvroKafkaDeserializer",
        "value.deserializer.apicurio.registry.url": registry.url.replace("ccompat/v7", "registry/v3"),
    }
    done = subprocess.run(
        [
            *(
                found.launcher,
                java.BRIEF,
                "-cp",
                java.class_path(jars),
                "org.apache.kafka.tools.consumer.ConsoleConsumer",
            ),
            *("--bootstrap-server", bootstrap, "--topic", topic, "--from-beginning"),
            *("--isolation-level", "read_committed", "--max-messages", str(count), "--timeout-ms", "60000"),
            *(part for pair in properties.items() for part in ("--formatter-property", "=".join(pair))),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == count, done.stdout + done.stderr
    return [json.loads(line) for line in lines]


def test_what_the_registry_refuses_is_parked_with_what_follows_it_and_the_rest_goes_on(
    site: Site, registry: Server, topic: MakeTopic
) -> None:
    name, other = topic(), topic()
    with server(registry.url) as other_door:
        other_door.register(f"{name}-value", order(X))
    good, bad = put(site.url, order(X)), put(site.url, order(X, Y))
    sound = [add(site, name, good, "sound")]
    add(site, name, bad, "poison")
    add(site, name, good, "poison")
    sound += [add(site, other, bad, "poison"), add(site, name, good, "sound")]
    add(site, name, 7, "unknown")
    relay = site.taken(OUTBOX_REGISTRY_URL=registry.url)
    messages = check_exactly_once(site, parked=3)
    assert {id_of(message) for message in messages} == set(sound), "the same schema is good under another subject"
    words = dict(site.rows("SELECT key || attempts || row_number() OVER (ORDER BY seq), error FROM outbox.dead_event"))
    assert "Incompatible" in words["poison11"]
    assert words["poison12"] == "held: an earlier event of its key is parked"
    assert "avro_schema does not hold 7" in words["unknown13"]
    assert not relay.said("lane in trouble")


def test_while_the_registry_is_away_known_schemas_go_on_and_nothing_is_parked_or_put_out_of_order(
    site: Site, gate: Gate, topic: MakeTopic
) -> None:
    name = topic()
    one, two = put(site.url, order(X)), put(site.url, order(X, Z))
    relay = site.taken(OUTBOX_REGISTRY_URL=gate.url)
    add(site, name, one)
    site.wait_until_published()
    gate.shut = True
    ahead = add(site, name, one)
    behind = [add(site, name, two), add(site, name, one)]
    relay.wait_for("registry away")
    with Reader(site.bootstrap, [name]) as reader:
        found = reader.until(lambda found: len(found) >= 2)
    assert id_of(found[-1]) == ahead
    gate.wait_until_turned_away(4)
    assert site.rows("SELECT id::text FROM outbox.outbox ORDER BY seq") == [(id_,) for id_ in behind]
    gate.shut = False
    assert len(check_exactly_once(site)) == 4
    events = [line.get("event") for line in relay.lines]
    assert [events.count(event) for event in ("registry away", "registry back", "lane taken")] == [1, 1, 1]


def test_a_relay_is_let_in_by_its_password_behind_tls_and_says_no_secret(
    site: Site, registry: Server, topic: MakeTopic
) -> None:
    name = topic()
    add(site, name, put(site.url, order(X)))
    with Gate(registry.url, user="relay", password="hunter2", tls=True) as gate:
        settings = {"OUTBOX_REGISTRY_URL": gate.url, "OUTBOX_REGISTRY_BASIC_AUTH_USER_INFO": "relay:hunter2"}
        stranger = site.relay(**settings)
        assert "CERTIFICATE_VERIFY_FAILED" in stranger.wait_for("registry away")["error"]
        assert stranger.stop() == 0
        settings["OUTBOX_REGISTRY_SSL_CA_LOCATION"] = str(gate.ca)
        wrong = site.relay(**{**settings, "OUTBOX_REGISTRY_BASIC_AUTH_USER_INFO": "relay:hunter3"})
        assert "HTTP 401" in wrong.wait_for("registry away")["error"]
        assert wrong.stop() == 0
        right = site.taken(**settings)
        assert len(check_exactly_once(site)) == 1
    for relay in (stranger, wrong, right):
        assert "hunter" not in relay.text
        assert "Traceback" not in relay.text
