"""Requests to Kafka that arrive late: after the client gave them up with their connection, and tried again.

The client believes that a request was lost, repeats it on another connection and goes on; then the first one arrives.
A late EndTxn ends whatever transaction its id then has open (KAFKA-17754). The relay as it is shipped runs as a
process, through a proxy that makes each kind of request late, at each moment at which that could do harm. Where
recycling is switched off (by a patch of the test's own, put into the process), the harm is seen.
"""

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from relay import worker
from relay.config import RelayConfig
from relay.errors import KafkaTrouble
from relay.transaction import peek
from tests.conftest import MakeDatabase, started
from tests.kafka_proxy import Api, KafkaProxy, Trap
from tests.relay_process import Reader, RelayProcess, Site, check_exactly_once, compare, id_of, patched
from tests.servers import Kafka

pytestmark = pytest.mark.crash

FENCED = {47, 90}
"""INVALID_PRODUCER_EPOCH, PRODUCER_FENCED."""

NOT_ONGOING = 48
"""INVALID_TXN_STATE: the broker asked the coordinator, and the transaction had ended (KIP-890)."""

PARTITIONS = 4
"""Of the topic: so many Produce requests has a batch."""

ROWS = 60
"""Of a batch."""


@pytest.fixture(scope="module")
def broker() -> Iterator[Kafka]:
    server = started(lambda: Kafka(doors=1))
    yield server
    server.close()


@pytest.fixture(scope="module")
def proxy(broker: Kafka) -> Iterator[KafkaProxy]:
    with KafkaProxy(broker.doors[0][0]) as proxy:
        yield proxy


@pytest.fixture
def line(make_database: MakeDatabase, broker: Kafka, proxy: KafkaProxy) -> "Iterator[Line]":
    with Site(make_database(), proxy.bootstrap, OUTBOX_LEASE="1") as site:
        yield Line(site, proxy, broker.create_topic(f"{site.name}-events", PARTITIONS))
    proxy.clear()


class Line:
    """A relay between a database and the proxy. Batch n bears the number n, and the events of one `seed`."""

    def __init__(self, site: Site, proxy: KafkaProxy, topic: str) -> None:
        self.site = site
        self.proxy = proxy
        self.topic = topic

    @property
    def next(self) -> int:
        """The number of the next batch."""
        return int(self.site.value("SELECT batch FROM outbox.lane")) + 1

    def id_of(self, batch: int) -> str:
        """The transactional id that publishes it."""
        return f"{self.site.name}.0.{batch % 2}"

    def seed(self) -> None:
        self.site.seed(self.topic, ROWS)

    def publish(self, relay: RelayProcess) -> None:
        """One batch, to its end."""
        number = self.next
        self.seed()
        relay.wait_for("batch published", batch=number)

    def lose(self, relay: RelayProcess, api: Api) -> Trap:
        """One batch, of which such a request is lost at first; the client's second one passes."""
        lost = self.proxy.lose(api, self.id_of(self.next))
        self.publish(relay)
        lost.wait()
        return lost

    def half(self, batch: int) -> Trap:
        """The next events are half written: what comes after them waits."""
        stalled = self.proxy.stall(Api.PRODUCE, self.id_of(batch), skip=PARTITIONS // 2)
        self.seed()
        stalled.wait()
        return stalled


# ---- the hazard is there ---------------------------------------------------------------------------------------------

NO_RECYCLING = """
import relay.transaction
relay.transaction.Watch.suspicious = property(lambda self: None, lambda self, line: None)
"""


@pytest.fixture
def no_recycling(tmp_path: Path) -> dict[str, str]:
    """Environment of a relay that does not see what its client logs."""
    return patched(tmp_path, NO_RECYCLING)


def test_without_recycling_a_late_end_of_a_transaction_tears_a_batch_and_doubles_it(
    line: Line, no_recycling: dict[str, str]
) -> None:
    relay = line.site.taken(0, **no_recycling)
    late = line.lose(relay, Api.END_TXN)
    line.publish(relay)
    with Reader(line.site.bootstrap, [line.topic]) as reader:
        reader.until(lambda found: len(found) == 2 * ROWS)
        stalled = line.half(line.next)
        assert late.deliver() == 0
        torn = {id_of(message) for message in reader.until(bool) + reader.to_end()}
    assert len(torn) < ROWS, "half a batch is visible, and nobody committed it"
    stalled.release()
    line.site.settle()
    with Reader(line.site.bootstrap, [line.topic]) as reader:
        assert compare(line.site, reader.to_end()).doubled == torn
    assert not relay.said("producers recycled")


def test_without_recycling_late_progress_takes_the_place_of_newer(line: Line, no_recycling: dict[str, str]) -> None:
    """A relay that would now crash would leave a lane that contradicts itself."""
    relay = line.site.taken(0, **no_recycling)
    late = line.lose(relay, Api.TXN_OFFSET_COMMIT)
    line.publish(relay)
    batch = line.next
    stalled = line.proxy.stall(Api.END_TXN, line.id_of(batch))
    line.seed()
    stalled.wait()
    assert late.deliver() == 0
    stalled.release()
    relay.wait_for("batch published", batch=batch)
    relay.kill()
    line.site.relay().wait_for("lane halted")


# ---- the relay as shipped --------------------------------------------------------------------------------------------

KINDS = [Api.PRODUCE, Api.ADD_PARTITIONS_TO_TXN, Api.ADD_OFFSETS_TO_TXN, Api.TXN_OFFSET_COMMIT, Api.END_TXN]


def check_late(api: Api, code: int) -> None:
    """What the broker says to the late request. A late Produce is known by its sequence number before its epoch."""
    assert code in FENCED or (api == Api.PRODUCE and code == 0), f"{api.name}: {code}"


@pytest.mark.parametrize("api", KINDS, ids=lambda api: api.name)
def test_a_late_request_does_no_harm(line: Line, api: Api) -> None:
    """In one life of a relay: while nothing is under way, in the next batch, in the next one of its own id, and while
    the id is fenced."""
    relay = line.site.taken()
    line.publish(relay)
    takes = 1
    for moment in ("idle", "next batch", "next batch of its id", "fence"):
        fence = line.proxy.stall(Api.INIT_PRODUCER_ID, line.id_of(line.next)) if moment == "fence" else None
        late = line.lose(relay, api)
        takes += 1
        if fence is not None:
            fence.wait()
            assert late.deliver() in (0, NOT_ONGOING)  # it is still its own id's, and refused or without effect
            fence.release()
        relay.wait_for("lane taken", takes)
        if moment == "next batch of its id":
            line.publish(relay)
        stalled = line.half(line.next) if moment.startswith("next") else None
        if fence is None:
            check_late(api, late.deliver())
        if stalled is not None:
            stalled.release()
            line.site.wait_until_published()
    check_exactly_once(line.site)
    assert len(relay.said("producers recycled")) == takes - 1, relay.text
    assert len(relay.said("lane taken")) == takes, relay.text


@pytest.mark.parametrize("api", KINDS, ids=lambda api: api.name)
def test_a_late_request_that_overtakes_its_repetition_does_no_harm(line: Line, api: Api) -> None:
    relay = line.site.taken()
    late = line.proxy.lose(api, line.id_of(line.next))
    again = line.proxy.stall(api, line.id_of(line.next))
    line.seed()
    late.wait()
    again.wait()
    assert late.deliver() == 0
    again.release()
    relay.wait_for("producers recycled")
    check_exactly_once(line.site)


@pytest.mark.parametrize("moment", ["idle", "half a batch"])
def test_a_late_fence_takes_the_id_from_its_owner_who_takes_it_back(line: Line, moment: str) -> None:
    late = line.proxy.lose(Api.INIT_PRODUCER_ID, f"{line.site.name}.0.0")
    relay = line.site.taken()
    line.publish(relay)
    line.publish(relay)
    assert line.next % 2 == 0
    stalled = line.half(line.next) if moment == "half a batch" else None
    assert late.deliver() in (0, 51)  # 51: it aborts a transaction first
    if stalled is not None:
        stalled.release()
    else:
        line.seed()
    relay.wait_for("lane taken", 2)
    check_exactly_once(line.site)


@pytest.mark.parametrize("api", KINDS, ids=lambda api: api.name)
def test_what_a_dead_relay_sent_arrives_after_its_successor_came(line: Line, api: Api) -> None:
    first = line.site.taken()
    line.publish(first)
    late = line.proxy.lose(api, line.id_of(line.next))
    again = line.proxy.stall(api, line.id_of(line.next))
    line.seed()
    late.wait()
    again.wait()
    assert line.site.value("SELECT count(*) FROM outbox.outbox") == ROWS, "none goes before the commit is answered"
    first.kill()
    line.site.taken()
    check_late(api, late.deliver())
    check_exactly_once(line.site)


def test_the_end_of_a_dead_relays_transaction_that_arrives_before_its_successor_counts(line: Line) -> None:
    first = line.site.taken()
    line.publish(first)
    batch = line.next
    late = line.proxy.lose(Api.END_TXN, line.id_of(batch))
    again = line.proxy.stall(Api.END_TXN, line.id_of(batch))
    line.seed()
    late.wait()
    again.wait()
    first.kill()
    assert late.deliver() == 0
    second = line.site.taken()
    assert second.said("lane taken")[0]["batch"] == batch, "the batch was committed, so its rows go"
    check_exactly_once(line.site)


def test_a_batch_that_the_former_owner_commits_while_its_lane_is_taken_is_finished(line: Line) -> None:
    """Why the progress is read after the fence: the former owner wakes up between the two, in the midst of a batch."""
    former = line.site.taken(OUTBOX_LEASE="1")
    line.publish(former)
    batch = line.next
    progress = line.proxy.stall(Api.TXN_OFFSET_COMMIT, line.id_of(batch))
    line.seed()
    progress.wait()
    former.signal(signal.SIGSTOP)
    fence = line.proxy.stall(Api.INIT_PRODUCER_ID, line.id_of(batch))
    successor = line.site.relay()
    fence.wait()
    with psycopg.connect(line.site.url) as holder, Reader(line.site.bootstrap, [line.topic]) as reader:
        holder.execute("SELECT * FROM outbox.lane FOR UPDATE")  # so that the former owner's delete waits
        progress.release()
        former.signal(signal.SIGCONT)
        reader.until(lambda found: len(found) == 2 * ROWS)
        former.kill()
        holder.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
    fence.release()
    assert successor.wait_for("lane taken")["batch"] == batch
    check_exactly_once(line.site)


# ---- how a transaction is sent ---------------------------------------------------------------------------------------


def test_events_come_before_their_progress_and_the_two_ids_take_turns(line: Line) -> None:
    relay = line.site.taken()
    line.proxy.clear()
    ids = [line.id_of(line.next + number) for number in range(3)]
    for _ in ids:
        line.publish(relay)
    sent = [(request.api, request.transactional_id) for request in line.proxy.seen]
    assert [id_ for api, id_ in sent if api == Api.END_TXN] == ids
    kinds = [api for api, _ in groupby(api for api, id_ in sent if id_ == ids[1])]
    assert kinds[-3:] == [Api.ADD_OFFSETS_TO_TXN, Api.TXN_OFFSET_COMMIT, Api.END_TXN], "all else comes before"
    assert Api.PRODUCE in kinds
    check_exactly_once(line.site)


def test_a_lane_at_rest_writes_the_same_progress_again_with_both_ids(line: Line) -> None:
    config = RelayConfig(database_url=line.site.url, kafka={"bootstrap.servers": line.site.bootstrap})
    relay = line.site.taken(OUTBOX_KEEPALIVE="0.2")
    line.publish(relay)
    before = peek(config, line.site.name, 0)
    assert before is not None
    assert before.runs
    line.proxy.clear()
    relay.wait_for("progress kept alive", len(relay.said("progress kept alive")) + 2)
    kept = {request.transactional_id for request in line.proxy.seen if request.api == Api.TXN_OFFSET_COMMIT}
    assert kept == {line.id_of(0), line.id_of(1)}
    assert peek(config, line.site.name, 0) == before


# ---- what the client does not say ------------------------------------------------------------------------------------


def test_a_connection_lost_again_and_again_is_noticed_each_time(line: Line) -> None:
    """The client does not log an error that is like the last one and comes within 30 s; but for its debug log."""
    relay = line.site.taken()
    for _ in range(4):  # two batches of each id, each between losses that do not matter
        line.publish(relay)
        line.proxy.cut(Api.END_TXN)
    takes = len(relay.said("lane taken"))
    late = line.lose(relay, Api.END_TXN)
    relay.wait_for("lane taken", takes + 1)
    line.publish(relay)
    stalled = line.half(line.next)
    check_late(Api.END_TXN, late.deliver())
    stalled.release()
    check_exactly_once(line.site)


def test_losses_while_the_id_is_fenced_do_not_hide_the_one_that_matters(line: Line) -> None:
    """Those are forgotten when the fence has returned. The third like error of a connection is not in the client's
    ordinary log."""
    even = line.id_of(2)
    fences = [line.proxy.lose(Api.INIT_PRODUCER_ID, even) for _ in range(2)]
    relay = line.site.taken()
    assert all(fence.caught for fence in fences)
    while line.next % 2:
        line.publish(relay)
    late = line.lose(relay, Api.END_TXN)
    relay.wait_for("lane taken", 2)
    line.publish(relay)
    stalled = line.half(line.next)
    check_late(Api.END_TXN, late.deliver())
    stalled.release()
    check_exactly_once(line.site)


def test_a_relay_that_lost_all_its_connections_goes_on(line: Line) -> None:
    """The client may wait for ever for a broker that it has forgotten (librdkafka 5511, and 5456: whatever the
    timeout)."""
    relay = line.site.taken()
    for _ in range(3):
        line.publish(relay)
        line.proxy.cut()
    line.publish(relay)
    stalled = line.half(line.next)
    line.proxy.cut()
    stalled.release()
    check_exactly_once(line.site)


async def test_a_call_that_never_returns_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "GRACE", 0.01)
    kafka: Any = {"bootstrap.servers": "nowhere:1", "topic.metadata.propagation.max.ms": 1}
    config = RelayConfig(database_url="postgresql://nowhere", kafka=kafka, kafka_timeout=0.01)
    anything: Any = None
    gate = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        shared = worker.Shared(config, uuid4(), anything, anything, threads, anything)
        with pytest.raises(KafkaTrouble, match="did not return"):
            await shared.thread(gate.wait)
        assert await shared.thread(lambda: 42) == 42
        gate.set()
