"""A replay repairs what is missing, rebuilds under a new generation, and changes nothing where it is only asked."""

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from outbox import Event, UsageError
from outbox.__main__ import main
from outbox.consumer import Consumer, Meta
from outbox.consumer.commands import consumer_of
from outbox.consumer.replay import Replay, Selection
from tests.conftest import MakeTopic
from tests.consumer.stage import Effects, catalogue, fast, insert, record, running, send, thing
from tests.servers import Kafka

ROOT = Path(__file__).parents[2]


class Site:
    """A topic of two partitions, consumed to its end: numbers 0 to 99, of keys k0 to k9."""

    def __init__(self, kafka: Kafka, topic: str, engine: AsyncEngine) -> None:
        self.topic = topic
        self.records = [record(thing(number)) for number in range(100)]
        send(kafka.bootstrap, topic, self.records[:50])
        self.middle = datetime.now(UTC)
        send(kafka.bootstrap, topic, self.records[50:])
        self.consumer = Consumer(topic, engine, catalogue=catalogue(), kafka=fast(kafka.bootstrap))
        self.replayed: list[bool] = []

        @self.consumer.on(Event, topic=topic)
        async def note(event: Event, session: AsyncSession, meta: Meta) -> None:
            self.replayed.append(meta.replay)
            await insert(session, [event])

    async def replay(self, *, generation: str | None = None, **options: Any) -> tuple[int, int]:
        """How many were read and chosen, and how many of those were known."""
        selection = {name: options.pop(name) for name in ("since", "offsets", "key") if name in options}
        chosen = Selection(topic=self.topic, **selection)
        report = await Replay(self.consumer, chosen, generation=generation, **options).run()
        assert report.read == report.total
        return report.chosen, report.known


@pytest.fixture
async def site(kafka: Kafka, topic: MakeTopic, engine: AsyncEngine, effects: Effects) -> Site:
    found = Site(kafka, topic(2), engine)
    async with running(found.consumer):
        await effects.until(100)
    return found


async def test_what_was_seen_is_skipped_and_what_is_missing_is_repaired(site: Site, effects: Effects) -> None:
    assert await site.replay() == (100, 100)
    lost = [site.records[number] for number in (3, 13, 77)]
    effects.execute("DELETE FROM outbox.inbox WHERE event_id = ANY(%s)", [one.id for one in lost])
    effects.execute("DELETE FROM effect WHERE event_id = ANY(%s)", [one.id for one in lost])
    assert await site.replay(key="k3") == (10, 8)
    assert await site.replay() == (100, 99)
    assert await site.replay() == (100, 100)
    assert sorted(number for _, number in effects.rows()) == list(range(100))
    assert site.replayed == [False] * 100 + [True] * 3


async def test_under_a_new_generation_everything_takes_effect_again_in_order(site: Site, effects: Effects) -> None:
    assert await site.replay(generation="2") == (100, 0)
    assert effects.by_key() == {f"k{n}": list(range(n, 100, 10)) * 2 for n in range(10)}
    assert await site.replay(generation="2") == (100, 100)


async def test_a_selection_begins_at_a_time_or_at_offsets(site: Site) -> None:
    assert await site.replay(since=site.middle, dry_run=True) == (50, 50)
    assert await site.replay(since=datetime.now(UTC) + timedelta(days=1), dry_run=True) == (0, 0)
    ends, _ = await site.replay(offsets={0: 0}, dry_run=True)
    rest, _ = await site.replay(offsets={0: 10, 1: 0}, dry_run=True)
    assert rest == 100 - 10
    assert 10 < ends < 100


async def test_a_dry_run_counts_and_changes_nothing(site: Site, effects: Effects) -> None:
    assert await site.replay(generation="3", dry_run=True) == (100, 0)
    assert effects.rows("SELECT count(*) FROM outbox.inbox WHERE consumer LIKE '%@3'") == [(0,)]
    assert len(effects.rows()) == 100


async def test_a_rate_is_kept(site: Site) -> None:
    start = datetime.now(UTC)
    assert await site.replay(rate=200, dry_run=True) == (100, 100)
    assert datetime.now(UTC) - start > timedelta(seconds=100 / 200 * 0.9)


async def test_batches_are_replayed_as_batches(
    kafka: Kafka, topic: MakeTopic, engine: AsyncEngine, effects: Effects
) -> None:
    name = topic(1)
    send(kafka.bootstrap, name, [record(thing(number)) for number in range(100)])
    consumer = Consumer(name, engine, catalogue=catalogue(), kafka=fast(kafka.bootstrap))
    sizes: list[int] = []

    @consumer.on_batch(Event, topic=name, size=40)
    async def note(events: list[Event], session: AsyncSession, _: list[Meta]) -> None:
        sizes.append(len(events))
        await insert(session, events)

    report = await Replay(consumer, Selection(topic=name)).run()
    assert (report.chosen, report.known) == (100, 0)
    assert max(sizes) == 40
    assert [number for _, number in effects.rows()] == list(range(100))


def test_a_selection_that_says_nothing_clear_is_refused() -> None:
    with pytest.raises(UsageError, match="not at both"):
        Selection(topic="t", since=datetime.now(UTC), offsets={0: 1})
    with pytest.raises(UsageError, match="no time zone"):
        Selection(topic="t", since=datetime(2026, 1, 1))  # noqa: DTZ001 - that is the mistake


async def test_a_topic_that_no_handler_is_for_is_refused(engine: AsyncEngine) -> None:
    consumer = Consumer("c", engine, catalogue=catalogue(), kafka={"bootstrap.servers": "nowhere"})
    with pytest.raises(UsageError, match="no handler of t"):
        Replay(consumer, Selection(topic="t"))


# --- the commands ---

APP = """
import os
from outbox import Event
from outbox.consumer import Consumer
from tests.consumer.stage import async_engine, catalogue, fast, insert

topic = os.environ["APP_TOPIC"]
consumer = Consumer(
    topic, async_engine(os.environ["APP_URL"]), catalogue=catalogue(), kafka=fast(os.environ["APP_KAFKA"])
)

@consumer.on(Event, topic=topic)
async def note(event, session, meta):
    await insert(session, [event])
"""


async def test_consume_runs_an_app_until_sigterm_and_replay_reads_into_it(
    kafka: Kafka, topic: MakeTopic, database: str, effects: Effects, tmp_path: Path
) -> None:
    name = topic(1)
    send(kafka.bootstrap, name, [record(thing(number)) for number in range(10)])
    (tmp_path / "app.py").write_text(APP)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "APP_TOPIC": name,
        "APP_URL": database,
        "APP_KAFKA": kafka.bootstrap,
    }
    command = [sys.executable, "-m", "outbox", "consume", "app:consumer"]
    with subprocess.Popen(  # noqa: ASYNC220 - nothing else runs in this loop
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    ) as child:
        await effects.until(10)
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate(timeout=30)
    assert child.returncode == 0, said
    again = [sys.executable, "-m", "outbox", "replay", "app:consumer", "--topic", name, "--generation", "2"]
    done = subprocess.run(again, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)  # noqa: ASYNC221 - as above
    assert done.stdout == "10 messages; 0 seen before; 10 taken\n", done.stderr
    assert len(effects.rows()) == 20


@pytest.mark.parametrize(
    ("app", "said"),
    [
        ("nothing", "names no consumer"),
        ("no_such_module:consumer", "there is no module 'no_such_module'"),
        ("tests.consumer.stage:nobody", "has no 'nobody'"),
        ("tests.consumer.stage:TYPE", "is no Consumer but a str"),
    ],
)
def test_an_app_that_is_no_consumer_is_refused(app: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        consumer_of(app)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--since", "yesterday"], "no moment"),
        (["--offset", "x:1"], "PARTITION:OFFSET"),
        (["--rate", "0"], "not in the range"),
    ],
)
def test_options_that_cannot_be_read_are_refused(options: list[str], said: str) -> None:
    done = CliRunner().invoke(main, ["replay", "tests.consumer.stage:TYPE", "--topic", "t", *options])
    assert done.exit_code != 0
    assert said in done.output
