"""The relay's settings: one frozen object, made from the environment and a TOML file, refused at construction when it
contradicts itself."""

import errno
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from relay.errors import ConfigError, KafkaTrouble

PREFIX = "OUTBOX_"
KAFKA_PREFIX = "OUTBOX_KAFKA_"
REGISTRY_PREFIX = "OUTBOX_REGISTRY_"

KAFKA_GUARANTEE: Mapping[str, str] = {
    "transactional.id": "the lane's two producers are fenced by it",
    "enable.idempotence": "a retry would double a record",
    "enable.gapless.guarantee": "it is part of how a lost record is noticed",
    "acks": "a record that only one broker has can be lost",
    "request.required.acks": "a record that only one broker has can be lost",
    "max.in.flight.requests.per.connection": "more than five would break the order of a key",
    "max.in.flight": "more than five would break the order of a key",
    "message.send.max.retries": "a record given up on would tear a batch",
    "retries": "a record given up on would tear a batch",
    "isolation.level": "progress must be read committed",
    "group.id": "progress is kept under the outbox's name",
    "enable.auto.commit": "progress is committed with the events, in their transaction",
    "delivery.report.only.error": "the relay counts on hearing of failures only",
    "partitioner": "keys must land where those of Java producers land (murmur2)",
    "log_level": "the client's log shows connections lost in a transaction",
    "log.connection.close": "the client's log shows connections lost in a transaction",
    "log.queue": "the client's log shows connections lost in a transaction",
}
"""librdkafka settings that the guarantee rests on; each with the reason why it cannot be set."""

KAFKA_DEFAULTS: Mapping[str, str | int | float | bool] = {
    "client.id": "outbox-relay",
    # A flush sends at once, so this only gathers the records of a large batch into fewer requests.
    "linger.ms": 5,
    "batch.size": 1_000_000,
    # Of the platform's own events two thirds of the bytes in the log and on the way, for half a microsecond of the
    # relay's CPU each (docs/benchmarks.md, "Compression").
    "compression.type": "lz4",
    # With librdkafka's default of 100 ms the p99 of a small transaction is 90-120 ms (docs/design.md, "The lane
    # protocol").
    "retry.backoff.ms": 10,
    "socket.nagle.disable": True,
    "queue.buffering.max.messages": 1_000_000,
    "transaction.timeout.ms": 15_000,
    # So long a topic may be unknown to a client before its events are refused: one that was deleted, or made, within
    # these seconds; others are asked about before (relay/destinations.py). By default 30 s: longer than a transaction
    # may take.
    "topic.metadata.propagation.max.ms": 3_000,
    # A client that lost all its brokers would begin anew from bootstrap.servers, and may then wait for ever for the one
    # it has forgotten (https://github.com/confluentinc/librdkafka/issues/5511). The relay begins anew with new clients.
    "metadata.recovery.strategy": "none",
    # What a broker takes by default, which is more than the client's default: the broker shall be the one to refuse.
    "message.max.bytes": 1_048_588,
}

LEAST_TOKEN = 20
"""Characters of the page's token."""

SUBJECT_STRATEGIES = ("TopicNameStrategy", "RecordNameStrategy", "TopicRecordNameStrategy")
"""As Confluent names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    """Every setting of a relay. Durations are seconds, sizes bytes.

    In the environment a field `x` is `OUTBOX_X`; a librdkafka setting `a.b` is `OUTBOX_KAFKA_A_B`, one of the
    registry's client `OUTBOX_REGISTRY_A_B`. In the TOML file fields stand at the top level, and the settings of the two
    clients in the tables `[kafka]` and `[registry]` under their own names. The environment wins. With `_FILE` behind it
    (in TOML `_file`, or `.file` in a table) each of them names a file that holds its value.

    Raises:
        ConfigError: names the setting and the remedy.
    """

    database_url: str = field(repr=False)
    """postgresql:// URL of the service's database. Required."""
    database_password: str | None = field(default=None, repr=False)
    """Password of the URL's user, where the URL holds none: as it is, not percent-encoded."""
    kafka: Mapping[str, str | int | float | bool] = field(repr=False)
    """librdkafka settings; `bootstrap.servers` is required. Those in KAFKA_GUARANTEE are refused."""
    registry: Mapping[str, str | int | float | bool] = field(default_factory=dict, repr=False)
    """Settings of Confluent's registry client: `url`, `basic.auth.user.info`, `ssl.ca.location` and more. Empty: events
    bear Avro's own frame, and no registry is needed. Needs the extra `registry`."""
    registry_auto_register: bool = True
    """False: schemas are only looked up, and an event whose schema is not in the registry is parked."""
    registry_subject_strategy: str = "TopicNameStrategy"
    """Under which subject a schema is: that, RecordNameStrategy or TopicRecordNameStrategy."""
    schema: str = "outbox"
    """SQL schema that holds the outbox's tables."""
    source: str | None = None
    """The CloudEvents source of the events (`ce_source`). None: /outbox/<name of the outbox>."""
    ce_time: bool = False
    """True: the header `ce_time` too. It says what the record's own timestamp says, `created_at` of the row, to readers
    that know CloudEvents only. Costs the relay about 1 µs an event."""
    batch_rows: int = 8_000
    """Events in one Kafka transaction at most. More costs memory and latency, less throughput."""
    batch_bytes: int = 16 * 1024 * 1024
    """Bytes of values in one Kafka transaction at most (one event may exceed it). Bounds the relay's memory."""
    parking: str = "hold"
    """What becomes of later events of a key when one is parked that Kafka refuses: `hold` parks them behind it, so that
    the key's order is kept; `skip` publishes them, and the parked one, when it is retried, comes after them."""
    lease: float = 3.0
    """How long a lane stays with a relay that says nothing. A crashed relay's lanes wait so long; safety does not rest
    on it."""
    poll_shortest: float = 0.0015
    """Wait before the next fetch right after an event. Shorter: less latency, more CPU."""
    poll_longest: float = 0.125
    """Wait between fetches of an idle lane."""
    keepalive: float = 3_600.0
    """An idle lane writes its progress again so often: Kafka forgets offsets (7 days) and transactional ids (7 days)
    that rest."""
    database_timeout: float = 30.0
    """A statement that takes longer is given up, and the lane is taken anew."""
    kafka_timeout: float = 30.0
    """A call to Kafka that takes longer is given up, and the lane is taken anew."""
    drain_timeout: float = 20.0
    """After SIGTERM: how long batches under way may take to finish before the relay leaves all the same."""
    prepared_statements: bool = True
    """False for PgBouncer in transaction mode before 1.21, which cannot keep them."""
    http: str = ""
    """Where probes, metrics and the page are served: `host:port`, or `:port` for this machine only (127.0.0.1). Empty:
    nowhere, for a port that is taken unasked could be the application's beside it."""
    ui_token: str = field(default="", repr=False)
    """Who gives it may see contents, retry, discard and search on the page. Empty: nobody may."""
    ready_needs_kafka: bool = False
    """True: /readyz also asks that Kafka is reached. Not for a sidecar: its application needs no Kafka to be ready."""
    log_level: str = "info"
    """debug (every batch), info (changes of state), warning, error."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Settings that `load` found in files: field, `kafka.…` or `registry.…` → path. Those for the database, Kafka and
    the registry are read again for each new connection, and the page's token when it is asked for, so that a rotated
    secret needs no restart."""

    def __post_init__(self) -> None:
        self._check_database_url()
        self._check_kafka()
        positive = ("batch_rows", "batch_bytes", "lease", "poll_shortest", "poll_longest", "keepalive")
        for name in (*positive, "database_timeout", "kafka_timeout", "drain_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{_named(name)} is {getattr(self, name)}: it must be greater than 0, and finite")
        if self.poll_shortest > self.poll_longest:
            raise ConfigError(
                f"{_named('poll_shortest')} ({self.poll_shortest} s) is longer than "
                f"{_named('poll_longest')} ({self.poll_longest} s)"
            )
        if self.lease < 1:
            raise ConfigError(
                f"{_named('lease')} is {self.lease} s: a lease is renewed three times in its time, 1 s is the least"
            )
        queue = self._kafka_number("queue.buffering.max.messages")
        if queue and self.batch_rows * 2 > queue:  # 0: no limit
            raise ConfigError(
                f"{_named('batch_rows')} is {self.batch_rows}: the Kafka client's queue "
                f"(queue.buffering.max.messages, {queue}) must hold twice that"
            )
        if self.parking not in ("hold", "skip"):
            raise ConfigError(f"{_named('parking')} is {self.parking!r}: use hold or skip")
        self._check_patience()
        self._check_registry()
        if self.http:
            _ = self.http_address
        if self.ui_token and len(self.ui_token) < LEAST_TOKEN:
            raise ConfigError(
                f"{_named('ui_token')} has {len(self.ui_token)} characters: {LEAST_TOKEN} are the least, for it can be "
                "tried without end. `openssl rand -hex 32` makes one"
            )
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError(f"{_named('log_level')} is {self.log_level!r}: use debug, info, warning or error")

    def _check_database_url(self) -> None:
        """No message holds a part of what is no URL: it may be the password."""
        try:
            parts = urlsplit(self.database_url)
            query = parse_qs(parts.query)
        except ValueError:
            raise ConfigError(f"{_named('database_url')} is no URL: {ENCODE}") from None
        if parts.scheme not in ("postgresql", "postgres"):
            raise ConfigError(
                f"{_named('database_url')} starts with {parts.scheme!r}: it must be a postgresql:// URL, such as "
                "postgresql://user@host:5432/database"
            )
        if parts.netloc.count("@") > 1:
            raise ConfigError(f"{_named('database_url')} holds more than one @: {ENCODE}")
        if self.database_password is not None and (":" in parts.netloc.rpartition("@")[0] or "password" in query):
            raise ConfigError(
                f"{_named('database_url')} and {_named('database_password')} both hold a password: remove one"
            )
        for name in ("sslrootcert", "sslcert", "sslkey", "sslcrl"):
            for path in query.get(name, ()):
                if "\0" in path or not os.access(path, os.R_OK):
                    raise ConfigError(f"{name} in {_named('database_url')} names {path}, which cannot be read")

    def _check_kafka(self) -> None:
        if not self.kafka.get("bootstrap.servers"):
            raise ConfigError("bootstrap.servers is not set: set OUTBOX_KAFKA_BOOTSTRAP_SERVERS=host:port[,host:port]")
        for name, reason in KAFKA_GUARANTEE.items():
            if name in self.kafka:
                raise ConfigError(f"the Kafka setting {name} cannot be changed: {reason}. Remove it")

    def _kafka_number(self, name: str) -> int:
        value = self.kafka.get(name, KAFKA_DEFAULTS[name])
        try:
            return int(value)
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"the Kafka setting {name} is {value!r}: it must be a whole number") from error

    def _check_patience(self) -> None:
        """A topic that does not exist must be found out before a transaction, or a call, gives up for lack of time."""
        topic = self._kafka_number("topic.metadata.propagation.max.ms")
        transaction = self._kafka_number("transaction.timeout.ms")
        if topic >= self.transaction_timeout * 1000:
            raise ConfigError(
                f"the Kafka setting topic.metadata.propagation.max.ms ({topic} ms) must be shorter than "
                f"transaction.timeout.ms ({transaction} ms) and {_named('kafka_timeout')} ({self.kafka_timeout:g} s)"
            )

    def _check_registry(self) -> None:
        if self.registry_subject_strategy not in SUBJECT_STRATEGIES:
            raise ConfigError(
                f"{_named('registry_subject_strategy')} is {self.registry_subject_strategy!r}: use one of "
                f"{', '.join(SUBJECT_STRATEGIES)}"
            )
        if self.registry and not self.registry.get("url"):
            raise ConfigError("the schema registry is not named: set OUTBOX_REGISTRY_URL=http://host:port")

    @property
    def http_address(self) -> tuple[str, int]:
        """Host and port to serve probes and metrics at; port 0: any that is free. Only where `http` is set."""
        host, colon, port = self.http.rpartition(":")
        if not colon or not port.isascii() or not port.isdigit() or int(port) > 65_535 or "/" in host:
            raise ConfigError(
                f"{_named('http')} is {self.http!r}: it must be host:port such as 0.0.0.0:9464, or :9464 for 127.0.0.1"
            )
        return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)

    @property
    def transaction_timeout(self) -> float:
        """Seconds a call inside a transaction may wait: by then the broker has aborted it."""
        return min(self.kafka_timeout, self._kafka_number("transaction.timeout.ms") / 1000)

    @property
    def database_from_file(self) -> bool:
        """Who we are for the database stands in a file: what is refused now may be let in soon."""
        return not self.files.keys().isdisjoint(("database_url", "database_password"))

    def database(self) -> tuple[str, str | None]:
        """URL and password for a new connection; None: the URL holds the password, or none is needed.

        Raises:
            OSError: a file cannot be read; names it.
        """
        now = {name: content(path) for name, path in self.files.items() if name.startswith("database_")}
        return now.get("database_url", self.database_url), now.get("database_password", self.database_password)

    def page_token(self) -> str:
        """The page's token as it is now; that of the start, where its file cannot be read."""
        try:
            return content(self.files["ui_token"]) if "ui_token" in self.files else self.ui_token
        except OSError:
            return self.ui_token

    def registry_client(self) -> dict[str, Any]:
        """Settings of Confluent's registry client.

        Raises:
            OSError: a file cannot be read; names it.
        """
        return {**self.registry, **self._from_files("registry.")}

    def _from_files(self, prefix: str) -> dict[str, str]:
        found = {name: path for name, path in self.files.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): content(path) for name, path in found.items()}

    def _kafka_now(self) -> dict[str, Any]:
        try:
            return {**KAFKA_DEFAULTS, **self.kafka, **self._from_files("kafka.")}
        except OSError as error:
            raise KafkaTrouble(f"the file of a Kafka setting cannot be read: {error}") from error

    def producer(self) -> dict[str, Any]:
        """librdkafka settings of a new producer, without its transactional.id.

        Raises:
            KafkaTrouble: a file that holds one of them cannot be read.
        """
        own = self._kafka_now()
        return {
            **own,
            # Otherwise an error that is like the last one is not logged for 30 s, and a connection that was at rest
            # never: then a lost EndTxn would go unnoticed. Four lines more a transaction.
            "debug": f"{own['debug']},broker" if own.get("debug") else "broker",
            "partitioner": "murmur2_random",
            "delivery.report.only.error": True,
            "log.connection.close": True,
        }

    def client(self) -> dict[str, Any]:
        """librdkafka settings that any new client of the cluster takes: addresses, security, sockets.

        Raises:
            KafkaTrouble: as `producer`.
        """
        shared = (
            "reconnect.",
            "connections.",
            "api.version.",
            "enable.sasl.",
            "bootstrap.",
            "metadata.broker.list",
            "metadata.recovery.",
            "security.",
            "sasl.",
            "ssl.",
            "socket.",
            "broker.",
            "client.",
            "enable.ssl.",
        )
        return {name: value for name, value in self._kafka_now().items() if name.startswith(shared)}


ENCODE = "what is special in its user and password must be percent-encoded, such as @ %40, / %2F, # %23"


def content(path: Path) -> str:
    """What a file holds, without the newline at its end.

    Raises:
        OSError: it cannot be read, is empty, or is no text; names it.
    """
    try:
        text = path.read_text("utf-8").rstrip("\r\n")
    except ValueError:  # also of a path that no file can have
        raise OSError(errno.EILSEQ, "not UTF-8", str(path)) from None
    if not text:  # a write that is under way, perhaps
        raise OSError(errno.ENODATA, "empty", str(path))
    return text


MASK = "***"
"""Stands for a secret."""

_SECRET = re.compile(r"passw|secret|token|credential|user\.info|\.pem$|jaas|oauthbearer\.config|\.key$", re.IGNORECASE)
"""Names of settings whose values are not for every eye. Rather one too many."""


def masked(config: RelayConfig) -> dict[str, Any]:
    """Every setting as it is in force, secrets as `***`; `kafka` as the producers have it, `registry` as it was
    given. What came from a file is taken for a secret."""
    shown = {one.name: _masked_setting(one.name, getattr(config, one.name)) for one in fields(config)}
    clients = {"kafka": config.producer(), "registry": config.registry}
    for name, settings in clients.items():
        shown[name] = {
            key: MASK if f"{name}.{key}" in config.files else _masked_setting(key, value)
            for key, value in sorted(settings.items())
        }
    return {**shown, "files": {f"{_named(name)}_FILE": str(path) for name, path in config.files.items()}}


def _masked_setting(name: str, value: Any) -> Any:
    if value and _SECRET.search(name):
        return MASK
    return _masked_url(value) if isinstance(value, str) and "://" in value else value


def _pairs(query: str) -> Iterator[tuple[str, str, str]]:
    return (pair.partition("=") for pair in query.split("&"))


def _masked_url(url: str) -> str:
    """The URL without its password, and without the secrets in its query; all hidden where the two are not plain to
    tell apart."""
    scheme, colon, rest = url.partition("://")
    authority, slash, tail = rest.partition("/")
    if "?" in authority or "#" in authority or "@" in tail:
        return f"{scheme}{colon}{MASK}"
    user, at, host = authority.rpartition("@")
    name, has_password, _ = user.partition(":")
    path, question, query = tail.partition("?")
    pairs = [
        f"{key}={MASK}" if _SECRET.search(key) else f"{key}{equals}{value}" for key, equals, value in _pairs(query)
    ]
    return f"{scheme}{colon}{name}{has_password and ':' + MASK}{at}{host}{slash}{path}{question}{'&'.join(pairs)}"


def load(environ: Mapping[str, str] = os.environ, path: Path | None = None) -> RelayConfig:
    """The settings from a TOML file (`path`, or OUTBOX_CONFIG) and, above it, the environment.

    Raises:
        ConfigError: names the setting, where it stands, and the remedy.
    """
    if path is None and (named := environ.get(PREFIX + "CONFIG")):
        path = Path(named)
    settings = _from_file(path) if path else {}
    kafka, registry = dict(settings.pop("kafka", {})), dict(settings.pop("registry", {}))
    for name, text in environ.items():
        is_field = name[len(PREFIX) :].lower().removesuffix("_file") in _field_names()
        if name.startswith(KAFKA_PREFIX) and not is_field:
            kafka[name[len(KAFKA_PREFIX) :].lower().replace("_", ".")] = text
        elif name.startswith(REGISTRY_PREFIX) and not is_field:
            registry[name[len(REGISTRY_PREFIX) :].lower().replace("_", ".")] = text
        elif name.startswith(PREFIX) and name not in _NOT_SETTINGS and not name.startswith(_TEST_PREFIX):
            settings[_known(name[len(PREFIX) :].lower(), name)] = text
    files = {
        **_filled(settings, "_file"),
        **_filled(kafka, ".file", "kafka."),
        **_filled(registry, ".file", "registry."),
    }
    if "database_url" not in settings:
        raise ConfigError("the database is not named: set OUTBOX_DATABASE_URL=postgresql://user@host:5432/database")
    typed = {name: _typed(name, value) for name, value in settings.items()}
    return RelayConfig(kafka=_log_level_restored(kafka), registry=registry, files=files, **typed)


def _filled(settings: dict[str, Any], suffix: str, prefix: str = "") -> dict[str, Path]:
    """Put in the place of each setting that names a file what that holds. Returned: which ones, and the paths."""
    files = {}
    for name in [name for name in settings if name.endswith(suffix) and name not in KAFKA_FILES]:
        path, plain = settings.pop(name), name.removesuffix(suffix)
        variable = _named(prefix + plain)
        if plain in settings:
            raise ConfigError(f"{variable} and {variable}_FILE are both set: remove one")
        if not isinstance(path, str):
            raise ConfigError(f"{variable}_FILE must be the path of a file, in quotes")
        try:
            settings[plain] = content(Path(path))
        except OSError as error:
            raise ConfigError(f"{variable}_FILE names {path}, which cannot be read: {error.strerror}") from error
        files[prefix + plain] = Path(path)
    return files


CLIENTS: Mapping[str, str] = {"kafka": '"linger.ms" = 5', "registry": '"basic.auth.user.info" = "user:password"'}
"""The fields that hold settings of a client under its own names; each with an example in TOML."""

KAFKA_FILES = frozenset(
    {
        "sasl.oauthbearer.assertion.file",
        "sasl.oauthbearer.assertion.jwt.template.file",
        "sasl.oauthbearer.assertion.private.key.file",
    }
)
"""librdkafka's own settings whose names end so: the client reads these files itself."""

_NOT_SETTINGS = {"OUTBOX_CONFIG", "OUTBOX_FAILPOINT"}
_TEST_PREFIX = "OUTBOX_TEST_"


def _log_level_restored(kafka: dict[str, Any]) -> dict[str, Any]:
    """The two librdkafka names with an underscore keep it."""
    for spelled, name in (("log.level", "log_level"), ("plugin.library.paths", "plugin.library.paths")):
        if spelled in kafka:
            kafka[name] = kafka.pop(spelled)
    return kafka


def _from_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            settings = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"the settings file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # TOMLDecodeError, or bytes that are no UTF-8
        raise ConfigError(f"the settings file {path} is no TOML: {error}") from error
    for table, example in CLIENTS.items():
        found = settings.get(table, {})
        if not isinstance(found, dict) or any(isinstance(value, dict | list) for value in found.values()):
            raise ConfigError(
                f"{path}: [{table}] must be a table of the client's settings, quoted where they hold dots: {example}"
            )
    return {name if name in CLIENTS else _known(name, f"{name} in {path}"): value for name, value in settings.items()}


def _field_names() -> list[str]:
    return [f.name for f in fields(RelayConfig) if f.name not in (*CLIENTS, "files")]


def _known(name: str, where: str) -> str:
    names = _field_names()
    if name.removesuffix("_file") in names:
        return name
    near = get_close_matches(name, names, 1)
    hint = f"Did you mean {_named(near[0])}?" if near else f"Known: {', '.join(_named(n) for n in names)}"
    raise ConfigError(f"unknown setting {where}. {hint}")


def _typed(name: str, value: Any) -> Any:
    """The value as its field's type; text comes from the environment, other types from TOML."""
    kind = next(f.type for f in fields(RelayConfig) if f.name == name)
    if kind is bool:
        words = {
            "true": True,
            "1": True,
            "yes": True,
            "on": True,
            "false": False,
            "0": False,
            "no": False,
            "off": False,
        }
        if str(value).lower() not in words:
            raise ConfigError(f"{_named(name)} is {value!r}: use true or false")
        return words[str(value).lower()]
    if kind in (int, float):
        try:
            return kind(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{_named(name)} is {value!r}: it must be a number") from error
    if not isinstance(value, str):
        raise ConfigError(f"{_named(name)} must be text, in quotes")  # it may be a password
    return value


def _named(name: str) -> str:
    """The variable of a setting; of a client's one with the table's name before it."""
    return PREFIX + name.upper().replace(".", "_")
