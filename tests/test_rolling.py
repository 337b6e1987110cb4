"""A rolling deployment: the old and the new version of a service write at once, the old and the new relay run at once,
and old and new consumers read all of it.

Of the relay there is one version yet, so old and new are two deployments of it: the old one puts Avro's own frame on
the events, the new one that of a schema registry. The old one is killed while both are at work.
"""

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from outbox import Catalogue, Outbox
from outbox.__main__ import main
from outbox.codegen import generate
from outbox.consumer import Consumer, Meta
from tests.conftest import MakeDatabase, MakeTopic
from tests.consumer.stage import async_engine, fast, running, until
from tests.relay_process import Site, check_exactly_once, id_of
from tests.servers import Kafka, Registry

KEYS = [f"order-{number}" for number in range(7)]


def schema(topic: str, *fields: dict[str, Any], symbols: list[str]) -> dict[str, Any]:
    status = {"type": "enum", "name": "Status", "symbols": symbols, "default": "UNKNOWN"}
    return {
        "type": "record",
        "name": "OrderEvent",
        "namespace": "shop",
        "topic": topic,
        "key": "order_id",
        "fields": [
            {"name": "event_id", "type": {"type": "string", "logicalType": "uuid"}},
            {"name": "order_id", "type": "string"},
            {"name": "status", "type": status},
            *fields,
        ],
    }


@dataclass(frozen=True)
class Version:
    """A service as it is deployed: its .avsc files and the module made of them."""

    folder: Path
    module: ModuleType

    @property
    def catalogue(self) -> Catalogue:
        return Catalogue.from_folder(self.folder, events=self.module)


@pytest.fixture
def versions(tmp_path: Path, topic: MakeTopic, monkeypatch: pytest.MonkeyPatch) -> tuple[Version, Version]:
    """The new version has a symbol and a field more, and a field less."""
    name = topic(3)
    coupon = {"name": "coupon", "type": ["null", "string"], "default": None}
    currency = {"name": "currency", "type": "string", "default": "EUR"}
    made = []
    for label, found in (
        ("old", schema(name, coupon, symbols=["UNKNOWN", "PLACED"])),
        ("new", schema(name, currency, symbols=["UNKNOWN", "PLACED", "RETURNED"])),
    ):
        folder = tmp_path / label
        folder.mkdir()
        (folder / "order.avsc").write_text(json.dumps(found))
        module = ModuleType(f"events_of_{label}")
        monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
        exec(generate(folder), module.__dict__)  # noqa: S102 - what codegen has just made
        made.append(Version(folder, module))
    return made[0], made[1]


class Service(threading.Thread):
    """Writes an event every few milliseconds, of an order that it locks, until it is told to stop."""

    def __init__(self, url: str, version: Version, **fields: Any) -> None:
        super().__init__(daemon=True)
        self.written: set[str] = set()
        """Ids of committed events."""
        self._engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
        self._outbox = Outbox(version.catalogue)
        self._event = version.module.OrderEvent
        self._fields = fields
        self._stopping = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stopping.wait(0.004):
            key = KEYS[len(self.written) % len(KEYS)]
            with Session(self._engine) as session, session.begin():
                session.execute(sa.text("SELECT FROM orders WHERE id = :id FOR UPDATE"), {"id": key})
                [id_] = self._outbox.add(session, self._event(order_id=key, **self._fields))
            self.written.add(str(id_))

    def stop(self) -> None:
        self._stopping.set()
        self.join()
        self._engine.dispose()


@pytest.fixture
def site(make_database: MakeDatabase, kafka: Kafka) -> Iterator[Site]:
    with Site(make_database(2), kafka.bootstrap, OUTBOX_LEASE="1") as site:
        site.rows("CREATE TABLE orders (id text PRIMARY KEY)")
        site.rows("INSERT INTO orders SELECT unnest(%s::text[])", KEYS)
        yield site


def command(*arguments: object) -> None:
    done = CliRunner().invoke(main, ["schemas", *map(str, arguments)])
    assert done.exit_code == 0, done.output


def read(database: str, kafka: Kafka, registry: Registry, label: str, version: Version, count: int) -> dict[str, Any]:
    """What a consumer of this version makes of all `count` events, by id."""
    seen: dict[str, Any] = {}

    async def consume() -> None:
        engine = async_engine(database)
        consumer = Consumer(
            label, engine, catalogue=version.catalogue, kafka=fast(kafka.bootstrap), registry=registry.url
        )

        @consumer.on_batch(version.module.OrderEvent)
        async def note(events: list[Any], _: AsyncSession, metas: list[Meta]) -> None:
            seen.update((str(meta.id), event) for meta, event in zip(metas, events, strict=True))

        async with running(consumer):
            await until(lambda: len(seen) >= count)
        await engine.dispose()

    asyncio.run(consume())
    return seen


def test_old_and_new_services_relays_and_consumers_work_side_by_side(
    versions: tuple[Version, Version], site: Site, make_database: MakeDatabase, kafka: Kafka, registry: Registry
) -> None:
    old, new = versions
    readers = make_database()  # of the consumers' service
    command("check", new.folder, "--folder", old.folder, "--level", "FULL")
    for version in versions:
        command("register", version.folder, "--registry", registry.url)
        command("sync", version.folder, readers)
    old_relay = site.relay()
    for lane in range(2):
        old_relay.wait_for("lane taken", lane=lane)
    old_service = Service(site.url, old, status="PLACED", coupon="TENTH")
    old_relay.wait_for("batch published", count=3)

    new_relay = site.relay(OUTBOX_REGISTRY_URL=registry.url, OUTBOX_REGISTRY_AUTO_REGISTER="false")
    new_service = Service(site.url, new, status="RETURNED", currency="CHF")
    new_relay.wait_for("lane taken")
    new_relay.wait_for("batch published", count=10)
    old_relay.wait_for("batch published", count=len(old_relay.said("batch published")) + 5)
    old_relay.kill()
    new_relay.wait_for("lane taken", count=2)
    new_relay.wait_for("batch published", count=len(new_relay.said("batch published")) + 10)
    old_service.stop()
    new_service.stop()

    messages = check_exactly_once(site)
    assert len(messages) == len(old_service.written) + len(new_service.written)
    by_old, by_new = old_service.written, new_service.written
    frames = {((message.value() or b"")[:1], id_of(message) in by_new) for message in messages}
    assert frames == {(frame, who) for frame in (b"\xc3", b"\0") for who in (True, False)}, "each service, each relay"

    seen = read(readers, kafka, registry, "old", old, len(messages))
    assert {(seen[id_].status, seen[id_].coupon) for id_ in by_old} == {("PLACED", "TENTH")}
    assert {(seen[id_].status, seen[id_].coupon) for id_ in by_new} == {("UNKNOWN", None)}
    seen = read(readers, kafka, registry, "new", new, len(messages))
    assert {(seen[id_].status, seen[id_].currency) for id_ in by_old} == {("PLACED", "EUR")}
    assert {(seen[id_].status, seen[id_].currency) for id_ in by_new} == {("RETURNED", "CHF")}
