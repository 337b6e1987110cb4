"""Settings: each wrong one is refused at construction, with its name and the remedy; nothing is ignored in silence."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.config import KAFKA_DEFAULTS, KAFKA_GUARANTEE, MASK, RelayConfig, load, masked
from relay.errors import ConfigError, KafkaTrouble

URL = "postgresql://relay:secret@db:5432/orders"
LEAST = {"OUTBOX_DATABASE_URL": URL, "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": "broker:9092"}
FIELDS = [f for f in fields(RelayConfig) if f.name != "kafka"]
NUMBERS = [f.name for f in FIELDS if f.type in (int, float)]


def refusal(environment: dict[str, str], path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(environment, path)
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "relay.toml"
        path.write_text(text)
        return path

    return write


def test_the_two_addresses_are_enough() -> None:
    config = load(LEAST)
    assert config.database_url == URL
    assert config.kafka == {"bootstrap.servers": "broker:9092"}
    assert config.batch_rows == 8_000


def test_what_a_program_prints_of_its_settings_holds_no_password() -> None:
    config = load({**LEAST, "OUTBOX_KAFKA_SASL_PASSWORD": "hunter2"})
    assert "secret" not in repr(config)
    assert "hunter2" not in repr(config)


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("OUTBOX_BATCH_ROWS", "100", 100),
        ("OUTBOX_BATCH_BYTES", "1000", 1000),
        ("OUTBOX_LEASE", "4.5", 4.5),
        ("OUTBOX_KAFKA_TIMEOUT", "40", 40.0),  # ours, although it looks like the client's
        ("OUTBOX_PREPARED_STATEMENTS", "off", False),
        ("OUTBOX_PREPARED_STATEMENTS", "TRUE", True),
        ("OUTBOX_SOURCE", "/orders", "/orders"),
        ("OUTBOX_SCHEMA", "box", "box"),
        ("OUTBOX_LOG_LEVEL", "debug", "debug"),
    ],
)
def test_a_field_is_read_from_the_environment_in_its_type(name: str, value: str, read: object) -> None:
    config = load({**LEAST, name: value})
    assert getattr(config, name.removeprefix("OUTBOX_").lower()) == read
    assert list(config.kafka) == ["bootstrap.servers"]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf", "many", "", "1e", "0x10"])
def test_a_number_that_cannot_be_is_refused_by_name(name: str, value: str) -> None:
    variable = f"OUTBOX_{name.upper()}"
    assert variable in refusal({**LEAST, variable: value})


@pytest.mark.parametrize("value", ["maybe", "", "2", "None"])
def test_a_truth_that_is_none_is_refused_by_name(value: str) -> None:
    assert "OUTBOX_PREPARED_STATEMENTS" in refusal({**LEAST, "OUTBOX_PREPARED_STATEMENTS": value})


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"OUTBOX_DATABASE_URL": ""}, ["OUTBOX_DATABASE_URL", "postgresql://"]),
        ({"OUTBOX_DATABASE_URL": "mysql://db/orders"}, ["OUTBOX_DATABASE_URL", "'mysql'", "postgresql://"]),
        ({"OUTBOX_DATABASE_URL": "db:5432"}, ["OUTBOX_DATABASE_URL", "postgresql://"]),
        ({"OUTBOX_DATABASE_URL": "postgresql://[db/orders"}, ["OUTBOX_DATABASE_URL"]),
        ({"OUTBOX_KAFKA_BOOTSTRAP_SERVERS": ""}, ["OUTBOX_KAFKA_BOOTSTRAP_SERVERS"]),
        ({"OUTBOX_LOG_LEVEL": "verbose"}, ["OUTBOX_LOG_LEVEL", "debug"]),
        ({"OUTBOX_LEASE": "0.5"}, ["OUTBOX_LEASE", "1 s"]),
        ({"OUTBOX_POLL_SHORTEST": "1"}, ["OUTBOX_POLL_SHORTEST", "OUTBOX_POLL_LONGEST"]),
        ({"OUTBOX_BATCH_ROWS": "600000"}, ["OUTBOX_BATCH_ROWS", "queue.buffering.max.messages"]),
        ({"OUTBOX_KAFKA_QUEUE_BUFFERING_MAX_MESSAGES": "100"}, ["OUTBOX_BATCH_ROWS", "queue.buffering.max.messages"]),
        ({"OUTBOX_KAFKA_QUEUE_BUFFERING_MAX_MESSAGES": "many"}, ["queue.buffering.max.messages", "number"]),
        ({"OUTBOX_KAFKA_TOPIC_METADATA_PROPAGATION_MAX_MS": "30000"}, ["propagation", "transaction.timeout.ms"]),
        ({"OUTBOX_KAFKA_TRANSACTION_TIMEOUT_MS": "2000"}, ["propagation", "transaction.timeout.ms"]),
        ({"OUTBOX_KAFKA_TIMEOUT": "3"}, ["OUTBOX_KAFKA_TIMEOUT", "topic.metadata.propagation.max.ms"]),
    ],
)
def test_a_wrong_or_contradictory_setting_is_refused_with_its_name(
    environment: dict[str, str], words: list[str]
) -> None:
    text = refusal({**LEAST, **environment})
    for word in words:
        assert word in text


def test_a_missing_address_says_what_to_set() -> None:
    assert "set OUTBOX_DATABASE_URL=" in refusal({})
    assert "set OUTBOX_KAFKA_BOOTSTRAP_SERVERS=" in refusal({"OUTBOX_DATABASE_URL": URL})


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("OUTBOX_BATCH_ROW", "OUTBOX_BATCH_ROWS"),
        ("OUTBOX_DATABASE", "OUTBOX_DATABASE_URL"),
        ("OUTBOX_SCHEMAS", "OUTBOX_SCHEMA"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_near_one(wrong: str, near: str) -> None:
    text = refusal({**LEAST, wrong: "1"})
    assert f"unknown setting {wrong}" in text
    assert f"Did you mean {near}?" in text


def test_an_unknown_setting_like_none_is_refused_with_the_known_ones() -> None:
    text = refusal({**LEAST, "OUTBOX_XYZZY": "1"})
    assert "OUTBOX_XYZZY" in text
    assert "OUTBOX_BATCH_ROWS" in text


def test_the_settings_that_the_guarantee_rests_on_are_these() -> None:
    """Named once more: a line that is lost from the table would be refused, and tested, no longer."""
    assert set(KAFKA_GUARANTEE) == {
        "transactional.id",
        "enable.idempotence",
        "enable.gapless.guarantee",
        "acks",
        "request.required.acks",
        "max.in.flight.requests.per.connection",
        "max.in.flight",
        "message.send.max.retries",
        "retries",
        "isolation.level",
        "group.id",
        "enable.auto.commit",
        "delivery.report.only.error",
        "partitioner",
        "log_level",
        "log.connection.close",
        "log.queue",
    }


@pytest.mark.parametrize("name", KAFKA_GUARANTEE)
def test_what_the_guarantee_rests_on_is_refused_by_name_from_the_environment(name: str) -> None:
    text = refusal({**LEAST, "OUTBOX_KAFKA_" + name.replace(".", "_").upper(): "1"})
    assert name in text
    assert KAFKA_GUARANTEE[name] in text


@pytest.mark.parametrize("name", KAFKA_GUARANTEE)
def test_what_the_guarantee_rests_on_is_refused_by_name_from_the_file(name: str, write: Any) -> None:
    assert name in refusal(LEAST, write(f'[kafka]\n"{name}" = "1"\n'))


def test_any_other_setting_of_the_client_passes_through() -> None:
    config = load({**LEAST, "OUTBOX_KAFKA_LINGER_MS": "7", "OUTBOX_KAFKA_SSL_CA_LOCATION": "/ca"})
    assert config.producer()["linger.ms"] == "7"
    assert config.producer()["ssl.ca.location"] == "/ca"
    assert config.producer()["retry.backoff.ms"] == KAFKA_DEFAULTS["retry.backoff.ms"]
    assert config.client()["ssl.ca.location"] == "/ca"
    assert "linger.ms" not in config.client()


def test_the_environment_stands_above_the_file(write: Any) -> None:
    path = write(
        f'database_url = "{URL}"\nbatch_rows = 10\nlease = 5\n[kafka]\n"bootstrap.servers" = "a:1"\n"linger.ms" = 3\n'
    )
    config = load({"OUTBOX_BATCH_ROWS": "20", "OUTBOX_KAFKA_LINGER_MS": "4"}, path)
    assert (config.batch_rows, config.lease) == (20, 5.0)
    assert config.kafka == {"bootstrap.servers": "a:1", "linger.ms": "4"}


def test_settings_of_the_registry_s_client_are_taken_as_they_are_and_ours_are_not_among_them(write: Any) -> None:
    path = write(
        'registry_auto_register = false\n[registry]\nurl = "http://a"\n"basic.auth.user.info" = "me:hunter2"\n'
    )
    config = load({**LEAST, "OUTBOX_REGISTRY_URL": "http://b", "OUTBOX_REGISTRY_SSL_CA_LOCATION": "/ca"}, path)
    assert config.registry == {"url": "http://b", "ssl.ca.location": "/ca", "basic.auth.user.info": "me:hunter2"}
    assert not config.registry_auto_register
    assert "hunter2" not in repr(config)
    assert load({**LEAST, "OUTBOX_REGISTRY_SUBJECT_STRATEGY": "RecordNameStrategy"}).registry == {}


def test_a_registry_without_a_name_and_a_strategy_of_nobody_are_refused() -> None:
    assert "OUTBOX_REGISTRY_URL" in refusal({**LEAST, "OUTBOX_REGISTRY_SSL_CA_LOCATION": "/ca"})
    text = refusal({**LEAST, "OUTBOX_REGISTRY_SUBJECT_STRATEGY": "Topic"})
    assert "'Topic'" in text
    assert "TopicNameStrategy" in text


def test_the_file_may_be_named_in_the_environment(write: Any) -> None:
    path = write("batch_rows = 10\n")
    assert load({**LEAST, "OUTBOX_CONFIG": str(path)}).batch_rows == 10


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_row = 1", ["batch_row in", "OUTBOX_BATCH_ROWS"]),
        ("batch_rows = ", ["no TOML"]),
        ("batch_rows = [1]", ["OUTBOX_BATCH_ROWS", "number"]),
        ("source = 1", ["OUTBOX_SOURCE", "text"]),
        ("kafka = 1", ["[kafka]"]),
        ("[kafka]\nlinger.ms = 1", ["[kafka]", "quoted"]),
        ("[registry]\nssl.ca.location = 'x'", ["[registry]", "quoted", '"basic.auth.user.info"']),
        ("lease = nan", ["OUTBOX_LEASE"]),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_place(text: str, words: list[str], write: Any) -> None:
    refused = refusal(LEAST, write(text))
    for word in words:
        assert word in refused


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "relay.toml"
    path.write_bytes(b'source = "\xff"\n')
    assert "relay.toml is no TOML" in refusal(LEAST, path)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    assert "nowhere.toml" in refusal(LEAST, tmp_path / "nowhere.toml")
    assert str(tmp_path) in refusal(LEAST, tmp_path)


def test_settings_of_the_tests_and_of_others_are_not_ours() -> None:
    load({**LEAST, "OUTBOX_TEST_SERVERS": "local", "OUTBOX_FAILPOINT": "commit", "PATH": "/bin", "KAFKA_ACKS": "0"})


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
names = st.sampled_from([f.name.upper() for f in FIELDS] + ["KAFKA_ACKS", "KAFKA_LINGER_MS", "KAFKA_", "KAFKA"]) | texts


@given(st.dictionaries(names.map("OUTBOX_{}".format).filter("OUTBOX_CONFIG".__ne__), texts))
@example({"OUTBOX_DATABASE_URL": "postgresql://[", "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": "a"})
@example({"OUTBOX_BATCH_ROWS": "1_000", "OUTBOX_LEASE": "1e3"})
def test_any_environment_is_read_or_refused_with_a_sentence(environment: dict[str, str]) -> None:
    with suppress(ConfigError):
        config = load({**LEAST, **environment})
        config.producer()
        config.client()


toml_values: st.SearchStrategy[Any] = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | texts,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.from_regex("[a-z]{1,5}", fullmatch=True), part),
)


@given(value=toml_values, field=st.sampled_from([f.name for f in fields(RelayConfig)]))
def test_any_value_in_a_file_is_read_or_refused_with_a_sentence(
    value: Any, field: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("config") / "relay.toml"
    path.write_text(f"{field} = {_toml(value)}\n")
    with suppress(ConfigError):
        load(LEAST, path)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(character):08x}" for character in value) + '"'
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(part)}" for name, part in value.items()) + "}"
    return repr(value)


# ---- secrets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Callable[[str, str], str]:
    def write(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        return str(tmp_path / name)

    return write


Secret = Callable[[str, str], str]


def test_any_setting_may_stand_in_a_file_without_the_newline_at_its_end(secret: Secret, write: Any) -> None:
    own = {
        "OUTBOX_DATABASE_URL_FILE": secret("url", URL + "\r\n"),
        "OUTBOX_KAFKA_BOOTSTRAP_SERVERS_FILE": secret("brokers", "broker:9092\n"),
        "OUTBOX_BATCH_ROWS_FILE": secret("rows", "10"),
        "OUTBOX_REGISTRY_URL": "http://r",
        "OUTBOX_REGISTRY_BASIC_AUTH_USER_INFO_FILE": secret("info", " me:hunter2 \n\n"),
        # librdkafka's own: it reads the file itself
        "OUTBOX_KAFKA_SASL_OAUTHBEARER_ASSERTION_PRIVATE_KEY_FILE": "/key",
    }
    path = write(f'[kafka]\n"sasl.password.file" = "{secret("password", "hunter3")}"\n')
    config = load(own, path)
    assert config.database() == (URL, None)
    assert config.batch_rows == 10
    assert config.client()["bootstrap.servers"] == "broker:9092"
    assert config.registry_client() == {"url": "http://r", "basic.auth.user.info": " me:hunter2 "}
    assert config.kafka["sasl.oauthbearer.assertion.private.key.file"] == "/key"
    assert config.producer()["sasl.password"] == "hunter3"
    assert "hunter" not in repr(config)
    shown = masked(config)
    assert "hunter" not in str(shown)
    assert shown["kafka"]["bootstrap.servers"] == MASK
    assert shown["files"]["OUTBOX_DATABASE_URL_FILE"] == own["OUTBOX_DATABASE_URL_FILE"]


def test_a_file_is_read_again_for_each_new_connection(secret: Secret) -> None:
    own = {
        **LEAST,
        "OUTBOX_DATABASE_URL": "postgresql://relay@db/orders",
        "OUTBOX_DATABASE_PASSWORD_FILE": secret("database", "one"),
        "OUTBOX_KAFKA_SASL_PASSWORD_FILE": secret("kafka", "one"),
    }
    config = load(own)
    assert config.database()[1] == config.producer()["sasl.password"] == config.client()["sasl.password"] == "one"
    secret("database", "two\n")
    secret("kafka", "two\n")
    assert config.database()[1] == config.producer()["sasl.password"] == config.client()["sasl.password"] == "two"
    path = secret("kafka", "")  # a write that is under way
    with pytest.raises(KafkaTrouble, match=path):
        config.producer()
    Path(own["OUTBOX_DATABASE_PASSWORD_FILE"]).unlink()
    with pytest.raises(OSError, match=own["OUTBOX_DATABASE_PASSWORD_FILE"]):
        config.database()


def test_a_secret_that_is_set_twice_or_cannot_be_read_is_refused_by_name(secret: Secret, tmp_path: Path) -> None:
    path = secret("password", "hunter2")
    own = {**LEAST, "OUTBOX_KAFKA_SASL_PASSWORD_FILE": path}
    assert "OUTBOX_KAFKA_SASL_PASSWORD and OUTBOX_KAFKA_SASL_PASSWORD_FILE" in refusal(
        {**own, "OUTBOX_KAFKA_SASL_PASSWORD": "hunter3"}
    )
    both = refusal({**LEAST, "OUTBOX_DATABASE_PASSWORD": "hunter2"})
    assert "OUTBOX_DATABASE_URL and OUTBOX_DATABASE_PASSWORD" in both
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for wrong in (str(tmp_path / "nowhere"), str(tmp_path), secret("empty", "\n"), str(tmp_path / "bytes")):
        text = refusal({**LEAST, "OUTBOX_KAFKA_SASL_PASSWORD_FILE": wrong})
        assert f"OUTBOX_KAFKA_SASL_PASSWORD_FILE names {wrong}, which cannot be read" in text
    assert "unknown setting OUTBOX_DATABASE_PASSWRD_FILE" in refusal({**LEAST, "OUTBOX_DATABASE_PASSWRD_FILE": path})


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://relay:hunter2\u2100@db/orders",  # urlsplit would quote it
        "postgresql://relay:hunter@2@db/orders",
        "postgresql://[hunter2/orders",
    ],
)
def test_a_url_that_is_none_is_refused_without_a_word_of_it(url: str) -> None:
    text = refusal({**LEAST, "OUTBOX_DATABASE_URL": url})
    assert "percent-encoded" in text
    assert "hunter" not in text


def test_a_password_in_a_file_of_settings_that_is_no_text_is_not_shown(write: Any) -> None:
    assert "4711" not in refusal(LEAST, write("database_password = 4711\n"))


@pytest.mark.parametrize("name", ["sslrootcert", "sslcert", "sslkey", "sslcrl"])
def test_a_certificate_that_cannot_be_read_is_refused_by_its_path(name: str) -> None:
    text = refusal({**LEAST, "OUTBOX_DATABASE_URL": f"{URL}?sslmode=verify-full&{name}=/nowhere/ca.pem"})
    assert f"{name} in OUTBOX_DATABASE_URL names /nowhere/ca.pem" in text
