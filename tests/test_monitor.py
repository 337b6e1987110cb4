"""The monitor: what counts as alive and ready, what is known, and what the numbers say."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from relay import monitor, views
from relay.config import RelayConfig
from relay.metrics import SAMPLES, Metrics
from relay.monitor import LaneState, Monitor
from relay.queries import connect
from relay.views import Views
from tests.conftest import MakeDatabase, MakeTopic
from tests.relay_process import RelayProcess, Site, check_exactly_once
from tests.servers import Kafka

CONFIG: dict[str, Any] = {
    "database_url": "postgresql://nowhere/x",
    "kafka": {"bootstrap.servers": "nowhere:1", "topic.metadata.propagation.max.ms": 100},
    "database_timeout": 1.0,
    "kafka_timeout": 1.0,
}
PATIENCE = monitor.STEPS + monitor.LOOP_SECONDS


def made(*lanes: LaneState, **settings: Any) -> Monitor:
    return Monitor(RelayConfig(**{**CONFIG, **settings}), "1", lambda: list(lanes))


# ---- is it alive, is it ready ----------------------------------------------------------------------------------------


async def test_a_loop_that_does_not_turn_hangs_and_one_that_turns_again_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(monitor, "LOOP_SECONDS", 0.1)
    monkeypatch.setattr(monitor, "BEAT_SECONDS", 0.01)
    watched = made()
    time.sleep(0.2)  # noqa: ASYNC251 -- it is what shall be noticed
    [reason] = watched.hangs()
    assert "event loop" in reason
    await asyncio.sleep(0.05)
    assert watched.hangs() == []


async def test_a_worker_that_outstays_its_timeouts_hangs_and_is_named() -> None:
    now = time.monotonic()
    assert made(LaneState(7, taken=True, turned_at=now - PATIENCE + 5)).hangs() == []
    [reason] = made(LaneState(7, taken=True, turned_at=now - PATIENCE - 5)).hangs()
    assert "lane 7" in reason


async def test_a_worker_that_may_wait_for_ever_does_not_hang() -> None:
    assert made(LaneState(0, taken=True)).hangs() == []


async def test_a_supervisor_that_does_not_go_on_hangs_unless_the_relay_is_about_to_end() -> None:
    watched = made()
    watched.supervisor_at -= PATIENCE + 5
    [reason] = watched.hangs()
    assert "supervisor" in reason
    watched.stopping = True
    assert watched.hangs() == []


async def test_ready_is_who_found_the_outbox_s_tables_right_whatever_became_of_kafka() -> None:
    watched = made(LaneState(0, taken=False, error="KafkaTrouble: away"))
    watched.away = "database away: no route"
    [reason] = watched.lacks()
    assert "no route" in reason
    watched.outbox = "orders"
    assert watched.lacks() == []
    watched.stopping = True
    assert watched.lacks() == ["stopping"]


async def test_where_kafka_is_asked_for_its_trouble_counts() -> None:
    lanes = [LaneState(0, taken=True, error="KafkaTrouble: was away")]
    watched = Monitor(RelayConfig(**CONFIG, ready_needs_kafka=True), "1", lambda: lanes)
    watched.outbox = "orders"
    assert "Kafka was not reached" in watched.lacks()[0]
    watched.kafka_reached = True
    assert watched.lacks() == [], "the trouble is over: the lane is taken"
    lanes[0] = LaneState(0, taken=False, error="KafkaTrouble: is away")
    assert "is away" in watched.lacks()[0]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def samples(text: bytes) -> dict[tuple[str, str], float]:
    """By name and the one label that is not the outbox's name, which all of ours have."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            assert sample.labels.pop("outbox", None) or not sample.name.startswith("outbox")
            found[sample.name, "".join(sample.labels.values())] = sample.value
    return found


def row(topic: str, created: float) -> tuple[Any, ...]:
    return (1, str(UUID(int=1)), "t", topic, "k", b"v", None, None, created * 1000)


async def test_before_the_outbox_is_known_nothing_is_said_of_it() -> None:
    answer = await made()._metrics()
    assert {name for name, _ in samples(answer.body) if name.startswith("outbox")} == set()


async def test_what_is_not_known_is_left_out_and_not_said_to_be_0() -> None:
    watched = made(LaneState(0, taken=True, batch=3, floor=10, floor_lag=4))
    watched.outbox = "orders"
    found = samples((await watched._metrics()).body)
    assert found["outbox_relay_lanes_owned", ""] == 1
    assert found["outbox_relay_floor_lag", "0"] == 4
    assert found["outbox_relay_holds_ended_total", "recycled"] == 0, "a counter is there from the start"
    assert not [name for name, _ in found if "pending" in name or "parked" in name or "clock" in name]


async def test_a_batch_is_counted_by_topic_size_and_time() -> None:
    watched = made()
    watched.outbox = "orders"
    watched.metrics.batch([row("a", time.time() - 3), row("b", time.time() - 3), row("a", time.time() - 3)], 0.015)
    watched.metrics.batch([], 0.001)
    watched.metrics.reconciled(5)
    found = samples((await watched._metrics()).body)
    assert found["outbox_relay_published_events_total", "a"] == 2
    assert found["outbox_relay_published_events_total", "b"] == 1
    assert (found["outbox_relay_batch_events_count", ""], found["outbox_relay_batch_events_sum", ""]) == (2, 3)
    assert found["outbox_relay_transaction_seconds_bucket", "0.02"] == 2
    assert found["outbox_relay_transaction_seconds_bucket", "0.01"] == 1
    assert found["outbox_relay_publish_delay_seconds_bucket", "2.0"] == 0
    assert found["outbox_relay_publish_delay_seconds_bucket", "5.0"] == 3
    assert found["outbox_relay_publish_delay_seconds_bucket", "+Inf"] == 3
    assert (found["outbox_relay_reconciled_batches_total", ""], found["outbox_relay_reconciled_events_total", ""]) == (
        1,
        5,
    )


@pytest.mark.parametrize("count", [1, SAMPLES - 1, SAMPLES, SAMPLES + 1, 1_000, 8_000])
def test_each_event_has_its_delay_counted_once_however_large_the_batch(count: int) -> None:
    metrics = Metrics()
    metrics.clock_offset = 100.0
    metrics.batch([row("a", time.time() + 99)] * count, 0.1)
    assert metrics.delays.cumulated()[-1] == ("+Inf", count)
    assert metrics.delays.total == pytest.approx(count, rel=0.2), "by the database's clock"


def test_an_event_of_the_future_was_not_published_before_it_was_made() -> None:
    metrics = Metrics()
    metrics.batch([row("a", time.time() + 3600)], 0.1)
    assert metrics.delays.total == 0


# ---- on real servers -------------------------------------------------------------------------------------------------


@pytest.fixture
def site(make_database: MakeDatabase, kafka: Kafka) -> Iterator[Site]:
    with Site(make_database(2), kafka.bootstrap, OUTBOX_HTTP="127.0.0.1:0") as site:
        yield site


def get(relay: RelayProcess, path: str) -> httpx.Response:
    port = relay.wait_for("http listening")["port"]
    return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=30)


def scraped(relay: RelayProcess) -> dict[tuple[str, str], float]:
    response = get(relay, "/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return samples(response.content)


def test_what_a_relay_publishes_parks_and_leaves_waiting_is_in_its_metrics(site: Site, topic: MakeTopic) -> None:
    name = topic()
    site.seed(name, 500)
    site.rows("INSERT INTO outbox.outbox (type, topic, key, created_at) VALUES ('t', %s, 'poison', '1960-01-01')", name)
    relay = site.taken()
    relay.wait_for("events parked")
    site.wait_until_published()
    deadline = time.monotonic() + 10  # what waits was looked at when the relay started, and is again after 3 s
    while (found := scraped(relay))["outbox_relay_parked_events", ""] == 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found["outbox_relay_published_events_total", name] == 500
    assert found["outbox_relay_batch_events_sum", ""] == 500
    assert found["outbox_relay_publish_delay_seconds_count", ""] == 500
    assert 0 < found["outbox_relay_transaction_seconds_sum", ""] < 60
    assert found["outbox_relay_lanes_owned", ""] == 2
    assert found["outbox_relay_parked_events", ""] == 1
    assert [found["outbox_relay_pending_events", lane] for lane in "01"] == [0, 0]
    assert [found["outbox_relay_oldest_pending_age_seconds", lane] for lane in "01"] == [0, 0]
    assert abs(found["outbox_relay_clock_offset_seconds", ""]) < 1
    assert found["outbox_relay_holds_ended_total", "refused"] > 0
    assert found["process_resident_memory_bytes", ""] > 0
    assert get(relay, "/livez").text == get(relay, "/readyz").text == "ok\n"
    standby = site.relay()
    standby.wait_for("relay started")
    assert scraped(standby)["outbox_relay_lanes_owned", ""] == 0
    assert ("outbox_relay_pending_events", "0") not in scraped(standby), "whoever owns a lane says what waits in it"
    check_exactly_once(site, parked=1)


def test_a_relay_whose_port_is_taken_says_so_and_publishes(site: Site, topic: MakeTopic) -> None:
    site.seed(topic(), 10)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        relay = site.taken(OUTBOX_HTTP=f":{taken.getsockname()[1]}")
        relay.wait_for("http not listening")
        assert len(check_exactly_once(site)) == 10


def test_while_the_database_is_away_a_relay_is_alive_and_not_ready(site: Site) -> None:
    relay = site.relay(OUTBOX_DATABASE_URL="postgresql://relay@127.0.0.1:1/x")
    relay.wait_for("database away")
    assert get(relay, "/livez").status_code == 200
    response = get(relay, "/readyz")
    assert response.status_code == 503
    assert "database away" in response.text
    assert relay.stop() == 0


@pytest_asyncio.fixture
async def looking(site: Site) -> AsyncIterator[Views]:
    pool = await connect(RelayConfig(database_url=site.relay_url, kafka={"bootstrap.servers": "nowhere"}), 2)
    yield Views(pool, "outbox")
    pool.terminate()


async def test_the_backlog_is_counted_while_it_is_small_and_estimated_when_it_is_large(
    site: Site, looking: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [(lane.events, lane.oldest) for lane in (await looking.backlog()).lanes] == [(0, 0), (0, 0)]
    site.seed("t", 1_000)
    few = (await looking.backlog()).lanes
    assert (sum(lane.events for lane in few), [lane.exact for lane in few]) == (1_000, [True, True])
    assert all(lane.oldest is not None and 0 < lane.oldest < 60 for lane in few)
    monkeypatch.setattr(views, "EXACT", 100)
    many = (await looking.backlog()).lanes
    assert [lane.exact for lane in many] == [False, False]
    assert all(400 <= lane.events <= 600 for lane in many), "half of the live rows, or of the span of the seqs"


async def test_a_lane_that_nobody_publishes_is_counted_by_everyone_and_one_above_its_floor_only(
    site: Site, looking: Views
) -> None:
    site.seed("t", 100)
    site.rows("UPDATE outbox.lane SET owner = gen_random_uuid(), lease_until = 'infinity' WHERE lane = 0")
    site.rows("UPDATE outbox.lane SET halted = 'why' WHERE lane = 1")
    [free] = (await looking.backlog({})).lanes
    assert (free.lane, free.halted, free.exact) == (1, "why", True)
    top = site.value("SELECT max(seq) FROM outbox.outbox WHERE lane = 0")
    owned, _ = (await looking.backlog({0: top - 1})).lanes
    assert (owned.lane, owned.events) == (0, 1)


async def test_a_look_that_takes_too_long_is_given_up_and_known_to_nobody(
    site: Site, looking: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "LOOK_SECONDS", 0.2)
    watched = made()
    watched.opened("orders", looking)
    with psycopg.connect(site.url) as holder:
        holder.execute("LOCK TABLE outbox.outbox")
        assert await watched.measure() is None
        holder.rollback()
    watched._measured_at = float("-inf")
    assert await watched.measure() is not None
