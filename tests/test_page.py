"""The page: who may see and do what, what it says, and that every control of it works in a browser."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
import structlog
from click.testing import CliRunner
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from examples.chip_quality.events import InspectionEvent
from outbox import Catalogue
from relay import page
from relay.__main__ import main
from relay.config import RelayConfig, load, masked
from relay.errors import ConfigError
from relay.http import Server
from relay.monitor import Monitor
from relay.supervisor import Relay
from tests.browser import ARGUMENTS, chromium
from tests.conftest import MakeDatabase, MakeTopic
from tests.relay_process import PATIENCE, ROOT, RelayProcess, Site, check_exactly_once
from tests.roles import ROLES
from tests.servers import Kafka, ServerUnavailable
from tests.servers.choice import is_forced
from tests.test_commands import until
from tests.test_relay import add

TOKEN = "a-token-of-the-tests-0123456789"
EVENT = "01937f0c-5c5d-7e6b-8f0a-3f6d2c1b0a99"
GUARDED = (
    ("GET", f"/parked/{EVENT}"),
    ("POST", f"/parked/{EVENT}/retry"),
    ("POST", f"/parked/{EVENT}/discard"),
    ("GET", f"/trace/{EVENT}"),
)

# ---- who may ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that a page has run, which are not run here."""
    ran: list[tuple[str, ...]] = []

    async def run(_: page.Page, *arguments: str) -> dict[str, Any]:
        ran.append(arguments)
        return {"exit_code": 0, "document": {}}

    monkeypatch.setattr(page.Page, "_run", run)
    return ran


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Starts a server of a page; its URL."""
    servers = []
    ports: list[int] = []
    monkeypatch.setattr("relay.http.log.info", lambda _, **fields: ports.append(fields["port"]))

    async def monitor(config: RelayConfig) -> Monitor:
        return Monitor(config, "1", list)

    def serve(token: str = TOKEN) -> str:
        config = RelayConfig(database_url="postgresql://h/d", kafka={"bootstrap.servers": "k:1"}, ui_token=token)
        server = Server("127.0.0.1", 0, page.Page(config, asyncio.run(monitor(config))).routes())
        server.start()
        servers.append(server)
        deadline = time.monotonic() + 30
        while len(ports) < len(servers):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return f"http://127.0.0.1:{ports[-1]}"

    yield serve
    for server in servers:
        server.stop()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        bearer(TOKEN[:-1]),
        bearer(TOKEN + "x"),
        bearer(TOKEN.upper()),
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        {"Cookie": f"token={TOKEN}"},
        {"Authorization": "Bearer tök€n".encode()},
    ],
)
def test_without_the_right_token_what_needs_it_is_refused_and_nothing_is_run(
    serving: Callable[..., str], ran: list[Any], headers: dict[str, Any]
) -> None:
    url = serving()
    for method, path in GUARDED:
        answer = httpx.request(method, url + path, headers=headers)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), path
    assert httpx.get(f"{url}/token", headers=headers).json() == {"right": False}
    assert ran == []


def test_where_no_token_is_set_none_is_right(serving: Callable[..., str], ran: list[Any]) -> None:
    url = serving(token="")
    for method, path in GUARDED:
        for headers in ({}, {"Authorization": "Bearer"}, bearer(TOKEN)):
            answer = httpx.request(method, url + path, headers=headers)
            assert answer.status_code == 403
            assert "OUTBOX_UI_TOKEN" in answer.text
    assert httpx.get(f"{url}/token", headers={"Authorization": "Bearer"}).json() == {"right": False}
    assert ran == []


def test_the_right_token_runs_the_command_of_the_same_name(serving: Callable[..., str], ran: list[Any]) -> None:
    url = serving()
    for method, path in GUARDED:
        assert httpx.request(method, f"{url}{path}?topic=--help", headers=bearer(TOKEN)).status_code == 200
    assert httpx.get(f"{url}/token", headers=bearer(TOKEN)).json() == {"right": True}
    assert ran == [
        ("dead", "show", "--content", EVENT),
        ("dead", "retry", "--json", EVENT),
        ("dead", "discard", "--yes", "--json", EVENT),
        ("trace", "--json", "--topic=--help", EVENT),
    ]


def test_a_token_s_file_is_read_anew_and_its_last_content_stays_while_it_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    environment = {"OUTBOX_DATABASE_URL": "postgresql://h/d", "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": "k:1"}
    config = load({**environment, "OUTBOX_UI_TOKEN_FILE": str(file)})
    assert config.page_token() == TOKEN
    file.write_text("another-" + TOKEN)
    assert config.page_token() == "another-" + TOKEN
    file.unlink()
    assert config.page_token() == TOKEN


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", f"/parked/{EVENT}/discard", 405),  # a link, an image
        ("OPTIONS", f"/parked/{EVENT}/discard", 405),  # another site's browser asks whether it may
        ("POST", f"/parked/{EVENT}", 405),
        ("POST", "/parked/all/retry", 404),
        ("POST", "/parked/--all/discard", 404),
        ("POST", f"/parked/{EVENT}/retry/--all", 404),
        ("GET", "/ui/page.js", 404),
        ("GET", "/../page.py", 404),
    ],
)
def test_other_methods_and_paths_are_refused_whatever_the_token(
    serving: Callable[..., str], ran: list[Any], method: str, path: str, status: int
) -> None:
    answer = httpx.request(method, serving() + path, headers={**bearer(TOKEN), "Origin": "https://evil.example"})
    assert answer.status_code == status
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert ran == []


@pytest.mark.parametrize("path", ["/", "/events", "/token", f"/trace/{EVENT}"])
def test_a_site_whose_name_points_here_is_told_nothing(serving: Callable[..., str], ran: list[Any], path: str) -> None:
    answer = httpx.get(serving() + path, headers={"Host": "evil.example:9464", **bearer(TOKEN)})
    assert answer.status_code == 421
    assert ran == []


@pytest.mark.parametrize("path", sorted(page.FILES))
def test_every_file_forbids_a_browser_whatever_is_not_the_page_s_own(serving: Callable[..., str], path: str) -> None:
    answer = httpx.get(serving() + path)
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "http://" not in answer.text.replace("http://www.w3.org/", "")
    assert "https://" not in answer.text
    assert "innerHTML" not in answer.text


def test_more_pages_than_leave_room_for_the_probes_are_refused(
    serving: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "STREAMS", 1)
    url = serving()
    with httpx.stream("GET", f"{url}/events") as first:
        lines = first.iter_lines()  # kept: with it the stream would be closed
        assert next(lines) == "retry: 2000"
        assert httpx.get(f"{url}/events").status_code == 503
        assert httpx.get(f"{url}/").status_code == 200


async def test_a_command_that_takes_too_long_is_ended_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "COMMAND_SECONDS", 0.05)
    config = RelayConfig(database_url="postgresql://h/d", kafka={"bootstrap.servers": "k:1"}, ui_token=TOKEN)
    said = await page.Page(config, Monitor(config, "1", list))._run("trace", "--json", EVENT)
    assert said["exit_code"] == -signal.SIGKILL
    assert f"relay trace --json {EVENT}" in said["error"]


def test_a_token_is_masked_and_one_that_can_be_guessed_is_refused() -> None:
    settings: dict[str, Any] = {"database_url": "postgresql://h/d", "kafka": {"bootstrap.servers": "k:1"}}
    config = RelayConfig(**settings, ui_token=TOKEN)
    assert masked(config)["ui_token"] == "***"
    assert TOKEN not in repr(config)
    assert masked(RelayConfig(**settings))["ui_token"] == ""
    with pytest.raises(ConfigError, match="OUTBOX_UI_TOKEN has 6 characters: 20 are the least") as refused:
        RelayConfig(**settings, ui_token="secret")
    assert "secret" not in str(refused.value)


def test_what_a_relay_runs_for_its_page_has_the_settings_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "relay.toml"
    file.write_text('database_url = "postgresql://h/d"\n[kafka]\n"bootstrap.servers" = "k:1"\n')
    seen = []

    async def run(_: Relay) -> None:
        seen.append(os.environ["OUTBOX_CONFIG"])
        raise ConfigError("as far as this")

    monkeypatch.setenv("OUTBOX_CONFIG", "")  # is put back
    monkeypatch.setattr(Relay, "run", run)
    monkeypatch.setattr("gc.set_threshold", lambda _: None)
    result = CliRunner().invoke(main, ["run", "--config", str(file)])
    structlog.reset_defaults()
    assert "as far as this" in result.output
    assert seen == [str(file)]


# ---- on real servers -------------------------------------------------------------------------------------------------


@pytest.fixture
def site(make_database: MakeDatabase, kafka: Kafka) -> Iterator[Site]:
    with Site(make_database(2), kafka.bootstrap, OUTBOX_HTTP="127.0.0.1:0", OUTBOX_UI_TOKEN=TOKEN) as site:
        yield site


def address(relay: RelayProcess) -> str:
    return f"http://127.0.0.1:{relay.wait_for('http listening')['port']}"


def told(url: str, so: Callable[[dict[str, Any], list[Any]], bool]) -> tuple[dict[str, Any], list[Any], str]:
    """The state and the parked events of a stream as soon as they are `so`, and all that was sent until then."""
    heard: dict[str, Any] = {"state": {"database": {}}, "parked": []}
    text, name = "", ""
    with httpx.stream("GET", f"{url}/events", timeout=PATIENCE) as stream:
        for line in stream.iter_lines():
            text += line + "\n"
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                heard[name] = json.loads(value)
                if so(heard["state"], heard["parked"]):
                    return heard["state"], heard["parked"], text
    raise AssertionError(text)


def poison(site: Site, topic: str, key: str, **columns: Any) -> UUID:
    """An event that Kafka cannot take, for no record can bear its moment."""
    return add(site, topic, key=key, created_at="1960-01-01", **columns)


def inspection(site: Site, topic: str, key: str) -> UUID:
    """The same of an Avro event."""
    event = InspectionEvent.inspection_completed(
        inspection_id=key, batch_id="B-17", chip_id="C-4", inspection_type="VISUAL", status="DONE", quality_score=97.5
    )
    catalogue = Catalogue.from_folder(ROOT / "schemas")
    message = catalogue.encode(event)
    assert message.fingerprint is not None
    site.rows(
        "INSERT INTO outbox.avro_schema (fingerprint, subject, schema) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
        message.fingerprint,
        catalogue.subject(message.fingerprint),
        catalogue.schema_json(message.fingerprint),
    )
    columns = {"id": message.id, "type": message.type, "value": message.value, "fingerprint": message.fingerprint}
    return poison(site, topic, key, **columns)


def test_whoever_looks_sees_what_is_so_and_no_key_and_no_content(site: Site, topic: MakeTopic) -> None:
    name = topic()
    relay = site.taken()
    url = address(relay)
    first = poison(site, name, "a-secret-key", value=b"a-secret-value", headers='{"h": "a-secret-header"}')
    with psycopg.connect(site.url, application_name="a report") as writer:
        writer.execute("INSERT INTO outbox.outbox (type, topic) VALUES ('t', %s)", [name])
        state, listed, text = told(url, lambda state, listed: bool(listed and state["database"]["writers"]))
        [holder] = state["database"]["writers"]
        assert (holder["application"], holder["pid"]) == ("a report", writer.info.backend_pid)
    assert [event["id"] for event in listed] == [str(first)]
    assert [lane["pid"] for lane in state["database"]["lanes"]] == [relay.pid, relay.pid]
    assert state["this"]["pid"] == relay.pid
    assert state["database"]["may_change_parked"] is False, "a relay's role need not"
    for method, path in GUARDED:
        text += httpx.request(method, url + path).text
    assert "a-secret" not in text
    assert TOKEN not in text + relay.text
    shown = httpx.get(f"{url}/parked/{first}", headers=bearer(TOKEN), timeout=PATIENCE).json()["document"]
    assert shown["key"] == "a-secret-key"
    assert shown["content"] == {"format": "text", "data": "a-secret-value"}
    assert "a-secret" not in relay.text


def test_a_relay_s_user_is_told_which_grant_it_lacks_and_with_it_may(site: Site, topic: MakeTopic) -> None:
    name = topic()
    relay = site.taken()
    url = address(relay)
    first = poison(site, name, "k")
    told(url, lambda _, listed: bool(listed))

    def ask(what: str) -> dict[str, Any]:
        answer = httpx.post(f"{url}/parked/{first}/{what}", headers=bearer(TOKEN), timeout=PATIENCE)
        return dict(answer.json())

    refused = ask("retry")
    assert refused["exit_code"] == 2
    assert "permission denied" in refused["error"]
    site.rows(f"GRANT INSERT ON outbox.outbox TO {ROLES.relay}")
    site.rows(f"GRANT DELETE ON outbox.dead_event TO {ROLES.relay}")
    site.rows(f"GRANT ALL ON ledger TO {ROLES.relay}")  # the tests' own, whose trigger notes what is written
    site.rows("UPDATE outbox.dead_event SET created_at = now()")
    told(url, lambda state, _: bool(state["database"].get("may_change_parked")))
    assert ask("retry") == {"exit_code": 0, "document": {"events": 1}}
    relay.wait_for("command run for the page", command=f"dead retry {first}", exit_code=0)
    gone = ask("discard")
    assert (gone["exit_code"], gone["document"]) == (1, {"events": 0})
    assert len(check_exactly_once(site)) == 1


def test_while_the_database_is_away_the_page_says_so(site: Site) -> None:
    relay = site.relay(OUTBOX_DATABASE_URL="postgresql://relay@127.0.0.1:1/x")
    relay.wait_for("database away")
    state, _, _ = told(address(relay), lambda state, _: bool(state.get("away", "").startswith("database away")))
    assert state["database"] == {}
    assert relay.stop() == 0


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def browser() -> Iterator[Browser]:
    try:
        path = chromium()
    except ServerUnavailable as error:
        if is_forced():
            raise
        pytest.skip(str(error))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a page of a relay; fails the test where the browser has anything to complain of."""
    complaints: list[str] = []

    def noted(message: ConsoleMessage) -> None:
        complaints.append(f"{message.type}: {message.text}")

    def open_(url: str, **settings: Any) -> Page:
        opened = browser.new_context(**settings).new_page()
        opened.set_default_timeout(PATIENCE * 1000)
        opened.on("console", noted)
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on("requestfailed", lambda request: complaints.append(f"{request.url}: {request.failure}"))
        opened.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error('policy', e.violatedDirective))"
        )
        opened.goto(url)
        return opened

    expect.set_options(timeout=PATIENCE * 1000)
    yield open_
    away = ("/events: net::ERR", "net::ERR_CONNECTION_REFUSED", "net::ERR_INCOMPLETE_CHUNKED_ENCODING")  # we did that
    assert [one for one in complaints if not any(words in one for words in away)] == []


def test_every_control_does_what_it_says(site: Site, topic: MakeTopic, opened: Callable[..., Page]) -> None:
    name = topic()
    relay = site.taken(OUTBOX_DATABASE_URL=site.url)
    published = add(site, name)
    avro = inspection(site, name, "chip-1")
    add(site, name, key="chip-1", value=b'{"follows": true}', created_at="1961-01-01")  # held behind it
    other = poison(site, name, "other", value=b"\xff\x00")
    view = opened(address(relay))

    expect(view.locator("#live")).to_have_text("live")
    expect(view.locator("#lanes tr")).to_have_count(2)
    expect(view.locator("#lanes tr").first).to_contain_text("this relay")
    expect(view.locator("#parked li")).to_have_count(3)
    expect(view.locator("#verdict")).to_contain_text("3 events are parked")
    expect(view.locator("#rate-chart path.line")).not_to_have_count(0)

    def item(id_: UUID) -> Any:
        return view.locator("#parked li").filter(has_text=str(id_))

    # What needs the token asks for it, and goes on once it is given.
    item(avro).get_by_role("button", name="Content").click()
    view.get_by_role("button", name="Cancel").click()
    item(avro).get_by_role("button", name="Content").click()
    view.get_by_label("Token", exact=True).fill("not-the-token-of-this-relay")
    view.get_by_label("Token", exact=True).press("Enter")
    expect(view.get_by_role("alert")).to_have_text("That is not this relay's token.")
    view.get_by_label("Token", exact=True).fill(TOKEN)
    view.locator("#unlock").get_by_role("button", name="Unlock").click()
    expect(item(avro).locator("pre")).to_contain_text('"quality_score": 97.5')
    expect(item(avro).locator("pre")).to_contain_text("key chip-1")
    item(avro).get_by_role("button", name="Hide").click()
    expect(item(avro).locator("pre")).to_be_hidden()

    # Discard asks first, and takes one only.
    item(other).get_by_role("button", name="Discard").click()
    view.get_by_role("button", name="Keep it").click()
    item(other).get_by_role("button", name="Discard").click()
    view.keyboard.press("Escape")
    expect(view.locator("#sure")).to_be_hidden()
    assert site.value("SELECT count(*) FROM outbox.dead_event") == 3
    item(other).get_by_role("button", name="Discard").click()
    view.locator("#sure").get_by_role("button", name="Discard").click()
    expect(item(other)).to_have_count(0)
    assert site.value("SELECT count(*) FROM outbox.dead_event") == 2

    # What can be published by now is.
    site.rows("UPDATE outbox.dead_event SET created_at = now()")
    item(avro).get_by_role("button", name="Retry").click()
    expect(view.locator("#parked li")).to_have_count(0)
    expect(view.locator("#verdict")).to_have_text("All 2 lanes are published.")

    until(lambda: site.value("SELECT count(*) FROM outbox.outbox") == 0)  # else their topic would be known

    def find(id_: UUID, in_topic: str) -> Any:
        view.get_by_role("textbox", name="Id").fill(str(id_))
        view.get_by_role("textbox", name="Topic").fill(in_topic)
        view.get_by_role("button", name="Find").click()
        return expect(view.locator("#found"))

    find(published, name).to_contain_text(f"In Kafka: topic {name}, partition 0, offset ")
    find(published, "").to_contain_text("Not found: not in the outbox, not parked, not in the topics chip-quality")

    with psycopg.connect(site.url, application_name="nightly report") as writer:
        waiting = uuid4()
        writer.execute("INSERT INTO outbox.outbox (id, type, topic) VALUES (%s, 't', %s)", [waiting, name])
        expect(view.locator("#writers")).to_contain_text("nightly report")

    view.get_by_role("button", name="Lock").click()
    expect(view.locator("#found")).to_be_empty()
    view.get_by_role("button", name="Unlock").click()
    view.get_by_role("button", name="Cancel").click()
    assert relay.stop() == 0
    expect(view.locator("#verdict")).to_contain_text("Not connected to the relay")
    relay = site.taken(OUTBOX_DATABASE_URL=site.url, OUTBOX_HTTP=address(relay).removeprefix("http://"))
    expect(view.locator("#verdict")).to_have_text("All 2 lanes are published.")
    view.reload()
    expect(view.get_by_role("button", name="Unlock")).to_be_visible()
    view.context.close()
    site.rows("DELETE FROM ledger WHERE id = %s", other)
    check_exactly_once(site)


def test_on_a_phone_in_the_dark_and_by_keyboard(site: Site, topic: MakeTopic, opened: Callable[..., Page]) -> None:
    inspection(site, topic(), "a-key")
    relay = site.taken(OUTBOX_UI_TOKEN="")
    view = opened(address(relay), viewport={"width": 360, "height": 740}, color_scheme="dark")
    expect(view.locator("#parked li")).to_have_count(1)
    expect(view.locator("#parked-hint")).to_contain_text("OUTBOX_UI_TOKEN")
    expect(view.get_by_role("button")).to_have_count(0)  # none that could not work
    width, ground = view.evaluate(
        "[document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor]"
    )
    assert width == 360
    assert ground == "rgb(14, 19, 26)"
    locked = opened(address(site.relay()))
    expect(locked.get_by_role("button", name="Unlock")).to_be_visible()
    locked.keyboard.press("Tab")
    locked.keyboard.press("Enter")
    expect(locked.get_by_label("Token", exact=True)).to_be_focused()
    locked.keyboard.type(TOKEN)
    locked.keyboard.press("Enter")
    expect(locked.get_by_role("button", name="Lock", exact=True)).to_be_visible()
