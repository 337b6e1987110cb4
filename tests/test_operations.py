"""The page for operators (docs/operations.md) names every setting, metric, log event and command that there is."""

import re
from collections.abc import Iterator
from dataclasses import fields

import click
import pytest

from relay.__main__ import main
from relay.config import CLIENTS, RelayConfig
from relay.metrics import ENDS
from relay.monitor import Monitor
from relay.views import Backlog, Waiting
from tests.relay_process import ROOT

PAGE = (ROOT / "docs" / "operations.md").read_text()
SOURCES = [path.read_text() for path in (ROOT / "relay").glob("*.py")]


@pytest.mark.parametrize(
    "name", [one.name.upper() for one in fields(RelayConfig) if one.name not in (*CLIENTS, "files")]
)
def test_every_setting_is_there(name: str) -> None:
    assert f"OUTBOX_{name}" in PAGE


async def test_every_metric_is_there() -> None:
    config = RelayConfig(database_url="postgresql://h/d", kafka={"bootstrap.servers": "k:1"})
    monitor = Monitor(config, "1", list)
    monitor.outbox = "orders"
    backlog = Backlog((Waiting(0, 1, True, 1.0, None),), 0, 0.0)
    names = [family.name for family in monitor._families(backlog)]
    assert len(names) > 14
    assert [name for name in names if not re.search(rf"`{name}(_total)?[`{{]", PAGE)] == []
    assert all(f"`{reason}`" in PAGE for reason in ENDS)


def test_every_log_event_is_there() -> None:
    calls = r"""log\.(?:debug|info|warning|error|exception)\(\s*f?"([^"]+)\""""
    events = {event for source in SOURCES for event in re.findall(calls, source)}
    events |= {"lane in trouble", "lane still in trouble"}
    events -= {"{what} away", "{what} back", "registry back"}
    assert len(events) > 20
    assert [event for event in sorted(events) if f"`{event}`" not in PAGE] == []


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


@pytest.mark.parametrize(("name", "command"), [*commands(main, "relay")])
def test_every_command_is_there_and_its_help_has_an_example(name: str, command: click.Command) -> None:
    assert f"`{' '.join(name.split()[:2])}" in PAGE
    assert name.split()[-1] in PAGE
    assert f"  {name}" in (command.help or "") or "relay run" in (command.help or "")
