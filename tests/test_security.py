"""Servers that ask who comes: a relay is let in with the settings and the rights of docs/security.md and no others,
says why where it is not, takes up rotated secrets, and says nothing of a payload or a secret."""

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from click.testing import CliRunner
from structlog.testing import capture_logs

from outbox.identity import HERE
from outbox.migrate import migrate
from relay import transaction
from relay.__main__ import main
from relay.config import RelayConfig, load
from relay.errors import ConfigError, DatabaseTrouble, KafkaTrouble, NotLetIn, RelayError
from relay.failpoint import Failpoint
from relay.pace import Backoff
from relay.queries import connect
from relay.supervisor import Relay
from relay.topics import ensure_control_topic
from tests.conftest import started
from tests.guarded import (
    LISTENERS,
    PLAIN_PASSWORD,
    SCRAM_PASSWORD,
    Authority,
    acl,
    allow,
    forbid,
    guarded_folder,
    kafka_settings,
    postgres_settings,
    set_scram_password,
)
from tests.relay_process import ROOT, RelayProcess, Site, check_exactly_once
from tests.roles import ROLES
from tests.servers import Kafka, Postgres, start_all
from tests.test_commands import until
from tests.test_relay import IMPATIENT, QUICK, add

MARK = "MARKED"
"""In each payload and each secret of these tests, and in nothing that is said."""

DATABASE_PASSWORD = "database-MARKED-/@:%-SECRET"


class Guarded:
    """Both servers, and those that may come in."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder)
        self.client = self.authority.issue("relay", "relay")
        self.kafka = Kafka(settings=kafka_settings(self.authority), guarded=LISTENERS)
        self.postgres = Postgres(tls=True, settings=postgres_settings(self.authority))

    def start(self) -> None:
        start_all(self.kafka, self.postgres)

    def close(self) -> None:
        self.kafka.close()
        self.postgres.close()

    def database(self, url: str, host: str = "127.0.0.1", mode: str = "verify-full") -> str:
        """The URL of the relay's user, without a password."""
        place = url.rpartition("@")[2].replace("127.0.0.1", host)
        return f"postgresql://{ROLES.relay}@{place}?sslmode={mode}&sslrootcert={self.authority.certificate}"

    def ways(self) -> dict[str, dict[str, str]]:
        """Settings for Kafka, by the way in."""
        tls = {
            "OUTBOX_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "OUTBOX_KAFKA_SSL_CA_LOCATION": str(self.authority.certificate),
            "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": self.kafka.address("SASL"),
            "OUTBOX_KAFKA_SASL_USERNAME": "relay",
        }
        certificate, key = map(str, self.client)
        return {
            "PLAIN": {
                **tls,
                "OUTBOX_KAFKA_SASL_MECHANISM": "PLAIN",
                "OUTBOX_KAFKA_SASL_PASSWORD": PLAIN_PASSWORD,
            },
            "SCRAM-SHA-512": {
                **tls,
                "OUTBOX_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
                "OUTBOX_KAFKA_SASL_PASSWORD": SCRAM_PASSWORD,
            },
            "mTLS": {
                "OUTBOX_KAFKA_SECURITY_PROTOCOL": "SSL",
                "OUTBOX_KAFKA_SSL_CA_LOCATION": str(self.authority.certificate),
                "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": self.kafka.address("MTLS"),
                "OUTBOX_KAFKA_SSL_CERTIFICATE_LOCATION": certificate,
                "OUTBOX_KAFKA_SSL_KEY_LOCATION": key,
            },
        }


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    with guarded_folder() as folder, closing(started(lambda: Guarded(folder))) as servers:
        set_scram_password(servers.kafka, SCRAM_PASSWORD)
        yield servers


@pytest.fixture(scope="module")
def template(guarded: Guarded) -> str:
    name = f"template_{uuid4().hex[:8]}"
    migrate(guarded.postgres.create_database(name))
    return name


@pytest.fixture
def make_site(guarded: Guarded, template: str) -> Iterator[Callable[..., Site]]:
    """Outboxes whose relays come to the database by TLS and a password. `url`: of the site's owner."""
    sites: list[Site] = []

    def make(**environment: str) -> Site:
        name = f"test_{uuid4().hex[:12]}"
        url = guarded.postgres.create_database(name, template)
        guarded.postgres.execute(
            f"UPDATE outbox.meta SET name = '{name}', uuid = gen_random_uuid(), home = {HERE}", name
        )
        site = Site(url, guarded.kafka.bootstrap, **{"OUTBOX_DATABASE_URL": guarded.database(url), **environment})
        sites.append(site)
        set_database_password(site, DATABASE_PASSWORD)
        return site

    yield make
    for site in sites:
        site.close()


def set_database_password(site: Site, password: str) -> None:
    site.rows(f"ALTER ROLE {ROLES.relay} PASSWORD '{password}'")


@pytest.fixture
def secret(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a file as a container's platform does: whole, at once, with a newline at its end."""

    def write(name: str, content: str) -> Path:
        new = tmp_path / f".{name}"
        new.write_text(content + "\n")
        return new.replace(tmp_path / name)

    return write


def documented(outbox: str, topic: str) -> list[list[str]]:
    """The ACLs of docs/security.md, one `acl …` each, for this outbox and this topic."""
    lines = [line for line in (ROOT / "docs/security.md").read_text().splitlines() if line.startswith("acl --")]
    names = {"orders": outbox, "orders.": f"{outbox}.", "orders.lanes": f"{outbox}.lanes", "inspections": topic}
    return [[names.get(word, word) for word in shlex.split(line)[1:]] for line in lines]


def allowed(guarded: Guarded, site: Site) -> str:
    """A new topic, and for `relay` the rights that the documentation names."""
    topic = guarded.kafka.create_topic(f"{site.name}-events")
    allow(guarded.kafka, [one for line in documented(site.name, topic) for one in acl(line)])
    return topic


# ---- let in ----------------------------------------------------------------------------------------------------------


def test_a_relay_with_the_documented_rights_publishes_by_each_way_in(
    guarded: Guarded, make_site: Callable[..., Site], secret: Callable[[str, str], Path]
) -> None:
    password = str(secret("database", DATABASE_PASSWORD))
    sites = {way: make_site(OUTBOX_DATABASE_PASSWORD_FILE=password, **own) for way, own in guarded.ways().items()}
    for site in sites.values():
        site.seed(allowed(guarded, site), 300)
        site.relay()
    for site in sites.values():
        assert len(check_exactly_once(site)) == 300
        assert silent(site.relays[0])


def silent(relay: RelayProcess) -> bool:
    return MARK not in relay.text and not any(line.get("level") in ("warning", "error") for line in relay.lines)


# ---- not let in ------------------------------------------------------------------------------------------------------

WRONG = {
    "password": ("PLAIN", {"OUTBOX_KAFKA_SASL_PASSWORD": "wrong-MARKED"}, "SASL authentication error"),
    "SCRAM password": ("SCRAM-SHA-512", {"OUTBOX_KAFKA_SASL_PASSWORD": "wrong-MARKED"}, "SASL authentication error"),
    "authority": ("PLAIN", {"OUTBOX_KAFKA_SSL_CA_LOCATION": "stranger"}, "certificate could not be verified"),
    "host": ("PLAIN", {"OUTBOX_KAFKA_BOOTSTRAP_SERVERS": "localhost"}, "certificate"),
    "no certificate": (
        "mTLS",
        {"OUTBOX_KAFKA_SSL_CERTIFICATE_LOCATION": "", "OUTBOX_KAFKA_SSL_KEY_LOCATION": ""},
        "SSL",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_relay_that_kafka_does_not_let_in_says_why_at_once(
    guarded: Guarded, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transaction, "FIRST_LOOK", 0.3)
    way, change, words = WRONG[what]
    settings = {**guarded.ways()[way], **change}
    if what == "authority":
        settings["OUTBOX_KAFKA_SSL_CA_LOCATION"] = str(Authority(guarded.authority.folder, "stranger").certificate)
    if what == "host":
        settings["OUTBOX_KAFKA_BOOTSTRAP_SERVERS"] = guarded.kafka.address("SASL").replace("127.0.0.1", "localhost")
        settings["OUTBOX_KAFKA_BROKER_ADDRESS_FAMILY"] = "v4"
    config = load(
        {"OUTBOX_DATABASE_URL": "postgresql://h/d", **{name: text for name, text in settings.items() if text}}
    )
    began = time.monotonic()
    with pytest.raises(NotLetIn) as caught:
        ensure_control_topic(config, "outbox", 1)
    assert time.monotonic() - began < config.kafka_timeout / 2
    assert words in str(caught.value)
    assert MARK not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "mode", "authority", "error", "words"),
    [
        ("127.0.0.1", "verify-full", "stranger", DatabaseTrouble, "unable to get local issuer certificate"),
        ("localhost", "verify-full", "ca", DatabaseTrouble, "not valid for 'localhost'"),
        ("127.0.0.1", "disable", "ca", ConfigError, "no encryption"),
    ],
)
async def test_a_database_that_is_not_who_it_should_be_is_not_talked_to(
    guarded: Guarded, host: str, mode: str, authority: str, error: type[Exception], words: str
) -> None:
    other = Authority(guarded.authority.folder, "stranger") if authority == "stranger" else guarded.authority
    url = guarded.database(guarded.postgres.url(), host, mode).replace(
        str(guarded.authority.certificate), str(other.certificate)
    )
    config = load({"OUTBOX_DATABASE_URL": url, "OUTBOX_DATABASE_PASSWORD": "x-MARKED", **guarded.ways()["PLAIN"]})
    with pytest.raises(error) as caught:
        await connect(config, 1)
    assert words in str(caught.value)
    assert MARK not in str(caught.value)


# ---- rights ----------------------------------------------------------------------------------------------------------

LACKING = {
    "--topic": ("topic {topic}: rights", "lacks WRITE"),
    "--transactional-id": ("transactional ids", "TRANSACTIONAL_ID_AUTHORIZATION_FAILED"),
    "--group": ("group {name}: rights", "lacks READ"),
    "lanes": ("control topic: rights", "lacks READ"),
}


def check(site: Site, environment: dict[str, str]) -> dict[str, str]:
    """What `relay check` finds to be wrong, and how it says so."""
    clean: dict[str, str | None] = {name: None for name in os.environ if name.startswith("OUTBOX_")}
    result = CliRunner().invoke(main, ["check", "--json"], env={**clean, **environment})
    findings = json.loads(result.stdout)["findings"]
    assert MARK not in result.output
    return {one["what"]: one["found"] for one in findings if one["level"] == "wrong"}


def meet(option: str, config: RelayConfig, name: str) -> None:
    """What a relay does that needs this right; raises its error."""
    if option == "lanes":
        ensure_control_topic(config, name, 1)
    elif option == "--group":
        transaction.peek(config, name, 0)
    elif option == "--transactional-id":
        lane = transaction.Transactions(config, name, 0)
        try:
            lane.fence(0)
        finally:
            lane.discard()


def test_each_right_is_needed_and_relay_check_names_the_one_that_is_missing(
    guarded: Guarded, make_site: Callable[..., Site]
) -> None:
    own = {**guarded.ways()["PLAIN"], "OUTBOX_DATABASE_PASSWORD": DATABASE_PASSWORD}
    site = make_site(**own)
    topic = allowed(guarded, site)
    site.seed(topic, 1)
    environment = {"OUTBOX_DATABASE_URL": guarded.database(site.url), **own}
    config = load({**environment, **QUICK, "OUTBOX_KAFKA_TIMEOUT": "1.1"})
    guarded.kafka.create_topic(f"{site.name}.lanes")
    until(lambda: check(site, environment) == {})
    wrong: dict[str, str] = {}
    for line in documented(site.name, topic):
        option = "lanes" if line[-1].endswith(".lanes") else next(word for word in line if word in LACKING)
        what, found = LACKING[option]
        forbid(guarded.kafka, acl(line))
        wrong[what.format(topic=topic, name=site.name)] = found
        until(lambda: named(check(site, environment), wrong))
        if option != "--topic":  # without that its events are parked: the last test
            with pytest.raises(RelayError, match=r"AUTHORIZATION_FAILED|does not let the relay make its control topic"):
                meet(option, config, site.name)


def named(said: dict[str, str], wrong: dict[str, str]) -> bool:
    """These things are found to be wrong for these reasons, and nothing else is."""
    return said.keys() == wrong.keys() and all(found in said[what] for what, found in wrong.items())


# ---- rotation --------------------------------------------------------------------------------------------------------


def test_a_rotated_password_of_kafka_is_taken_up(
    guarded: Guarded, make_site: Callable[..., Site], secret: Callable[[str, str], Path]
) -> None:
    own = guarded.ways()["SCRAM-SHA-512"]
    del own["OUTBOX_KAFKA_SASL_PASSWORD"]
    file = secret("kafka", "not-yet-MARKED")
    site = make_site(
        OUTBOX_KAFKA_SASL_PASSWORD_FILE=str(file), OUTBOX_DATABASE_PASSWORD=DATABASE_PASSWORD, **own, **IMPATIENT
    )
    topic = allowed(guarded, site)
    site.seed(topic, 100)
    relay = site.relay()
    assert "SASL authentication error" in relay.wait_for("kafka away")["error"]
    secret("kafka", SCRAM_PASSWORD)
    relay.wait_for("kafka back")
    site.wait_until_published()
    try:
        secret("kafka", "rotated-MARKED")
        set_scram_password(guarded.kafka, "rotated-MARKED")  # the broker asks for it within REAUTHENTICATE
        assert "SASL" in relay.wait_for("producers recycled")["reason"]
        site.seed(topic, 100)
        assert len(check_exactly_once(site)) == 200
    finally:
        set_scram_password(guarded.kafka, SCRAM_PASSWORD)
    assert MARK not in relay.text


def test_a_rotated_password_of_the_database_is_taken_up(
    guarded: Guarded, make_site: Callable[..., Site], secret: Callable[[str, str], Path]
) -> None:
    file = secret("database", DATABASE_PASSWORD)
    site = make_site(OUTBOX_DATABASE_PASSWORD_FILE=str(file), **guarded.ways()["mTLS"])
    topic = allowed(guarded, site)
    relay = site.taken()
    set_database_password(site, "rotated-MARKED")
    end_sessions(site)
    until(lambda: any("password authentication failed" in line["error"] for line in relay.said("database away")))
    secret("database", "rotated-MARKED")
    relay.wait_for("database back")
    site.seed(topic, 100)
    assert len(check_exactly_once(site)) == 100
    assert MARK not in relay.text


def end_sessions(site: Site) -> None:
    site.rows(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        f" WHERE datname = current_database() AND usename = '{ROLES.relay}'"
    )


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_nothing_of_an_event_and_no_secret_is_said(
    guarded: Guarded, make_site: Callable[..., Site], capfd: pytest.CaptureFixture[str]
) -> None:
    """At level debug: a batch, a parked event, an error that shows a row, a password that is refused, the page: without
    the token, with a wrong one, and what is logged when somebody has the right one."""
    own = {**guarded.ways()["PLAIN"], "OUTBOX_DATABASE_PASSWORD": DATABASE_PASSWORD, **QUICK}
    site = make_site(OUTBOX_HTTP=":0", OUTBOX_UI_TOKEN=TOKEN, **own)
    topic = allowed(guarded, site)
    marked = {"key": "key-MARKED", "value": b"value-MARKED", "headers": '{"secret": "header-MARKED"}'}
    site.rows("ALTER TABLE outbox.dead_event ADD CONSTRAINT none CHECK (topic <> 'nowhere')")
    add(site, topic, **marked)
    parked = add(site, "nowhere", **marked)
    relay = site.relay()
    assert "violates check constraint" in relay.wait_for("lane in trouble")["error"]
    pages = answers(relay, parked)
    site.rows("ALTER TABLE outbox.dead_event DROP CONSTRAINT none")
    relay.wait_for("events parked")
    pages += answers(relay, parked)
    assert "value-MARKED" in asked(relay, "GET", f"/parked/{parked}", TOKEN)
    assert len(check_exactly_once(site, parked=1)) == 1
    assert "TOPIC_AUTHORIZATION_FAILED" in site.value("SELECT error FROM outbox.dead_event")
    wrong = site.relay(OUTBOX_DATABASE_PASSWORD="wrong-MARKED")
    assert wrong.wait() == 2
    assert "password authentication failed" in wrong.text
    said = [relay.text, wrong.text, capfd.readouterr().out, *pages]
    hidden = b"value-MARKED".hex()
    assert not [text for text in said if MARK in text or hidden in text]


TOKEN = "token-MARKED-0123456789"


def answers(relay: RelayProcess, event: UUID) -> list[str]:
    """What its pages say to whoever has no token."""
    paths = ["/livez", "/readyz", "/metrics", "/status", "/nowhere", "/", "/page.js", "/events", "/token"]
    paths += [f"/parked/{event}", f"/trace/{event}"]
    posts = [f"/parked/{event}/retry", f"/parked/{event}/discard"]
    asking = [("GET", path) for path in paths] + [("POST", path) for path in posts]
    return [asked(relay, method, path, token) for method, path in asking for token in ("", "wrong" * 5)]


def asked(relay: RelayProcess, method: str, path: str, token: str) -> str:
    """The answer; of a stream the first event."""
    port = relay.wait_for("http listening")["port"]
    with closing(HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(method, path, headers={"Authorization": f"Bearer {token}"} if token else {})
        with connection.getresponse() as response:
            if path == "/events":
                return b"".join(iter(response.readline, b"\n")).decode()
            return f"{response.headers}{response.read().decode()}"


async def test_trouble_is_said_once_and_once_more_when_we_are_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else who starts a broker, with the relay's password wrong, would read of the broker that was not there."""
    monkeypatch.setattr(Backoff, "wait", lambda _: 0.0)
    away, refused = KafkaTrouble("nobody answers"), NotLetIn("a password")
    answers: list[Exception | int] = [away, away, refused, away, refused, 42]

    async def call() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    config = RelayConfig(database_url="postgresql://h/d", kafka={"bootstrap.servers": "k:1"})
    with capture_logs() as logs:
        assert await Relay(config, Failpoint(None))._patiently("kafka", call) == 42
    said = [(line["event"], line.get("error")) for line in logs]
    assert said == [("kafka away", "nobody answers"), ("kafka away", "a password"), ("kafka back", None)]
