"""Members that are killed, frozen and stopped under load: each event takes effect once, in the order of its key."""

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeTopic
from tests.consumer.member import Member
from tests.consumer.stage import Effects, record, send, thing, until
from tests.roles import ROLES, as_role
from tests.servers import Kafka

pytestmark = pytest.mark.crash

STEPS = ("claimed", "written", "committed", "told")
Start = Callable[..., Member]


@pytest.fixture
def site(kafka: Kafka, topic: MakeTopic, database: str, tmp_path: Path) -> Iterator[tuple[str, Start]]:
    """A topic of four partitions, and what starts members of its group."""
    name, started = topic(4), []

    def start(mode: str = "single", setting: str = "", **more: Any) -> Member:
        started.append(Member(tmp_path, as_role(database, ROLES.inbox), kafka.bootstrap, name, mode, setting, **more))
        return started[-1]

    yield name, start
    for member in started:
        member.kill()


def check(effects: Effects, count: int) -> None:
    found = effects.by_key()
    assert found == {f"k{n}": list(range(n, count, 10)) for n in range(10)}


@pytest.mark.parametrize("mode", ["single", "batch"])
async def test_a_member_killed_between_each_pair_of_steps_loses_and_doubles_nothing(
    mode: str, site: tuple[str, Start], kafka: Kafka, effects: Effects
) -> None:
    topic, start = site
    survivor = start(mode)
    await survivor.wait_for_partitions()
    sent = 0
    for step in STEPS:
        victim = start(mode, f"{step}:2")
        await victim.wait_for_partitions()
        records = [record(thing(number)) for number in range(sent, sent + 200)]
        send(kafka.bootstrap, topic, records)
        sent += len(records)
        assert await victim.wait() == -signal.SIGKILL, victim.text
    await effects.until(sent)
    check(effects, sent)
    await survivor.stop()
    check(effects, sent)


async def test_a_message_that_kills_the_process_is_found_and_set_aside(
    site: tuple[str, Start], kafka: Kafka, effects: Effects
) -> None:
    """The member is static, so that each restart has its partitions at once."""
    topic, start = site
    send(kafka.bootstrap, topic, [record(thing(number)) for number in range(100)])
    deaths = 0
    while True:
        member = start("single", "number:33", group_instance_id=f"{topic}-1")
        await until(lambda: not member.alive or _parked(effects) == 1)  # noqa: B023 - awaited here
        if member.alive:
            break
        assert await member.wait() == -signal.SIGKILL
        deaths += 1
    await effects.until(99)
    assert deaths == 3
    assert effects.rows("SELECT reason, event_id IN (SELECT event_id FROM outbox.inbox) FROM outbox.dead_message") == [
        ("killed", True)
    ]
    assert sorted(number for _, number in effects.rows()) == [number for number in range(100) if number != 33]
    await member.stop()
    assert effects.rows("SELECT count(*) FROM outbox.consumer_attempt") == [(0,)]
    assert effects.rows("SELECT DISTINCT clean FROM outbox.consumer_partition") == [(True,)]


def _parked(effects: Effects) -> int:
    return int(effects.rows("SELECT count(*) FROM outbox.dead_message")[0][0])


@contextmanager
def writing(bootstrap: str, topic: str) -> Iterator[list[int]]:
    """Events and repeats of them, as long as the block lasts; how many there are."""
    count, stop, chance = [0], threading.Event(), random.Random(1)  # noqa: S311 - dice, no secret

    def write() -> None:
        while not stop.wait(0.05):
            records = [record(thing(number)) for number in range(count[0], count[0] + 30)]
            send(bootstrap, topic, records + chance.sample(records, 5))
            count[0] += len(records)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()


@pytest.mark.timeout(90)
async def test_torture_kills_freezes_and_stops_at_random_leave_each_event_with_one_effect(
    site: tuple[str, Start], kafka: Kafka, effects: Effects
) -> None:
    """About 12 s. A frozen member is thrown out of the group, and wakes up with transactions and messages in hand."""
    topic, start = site
    chance = random.Random(7)  # noqa: S311 - dice, no secret
    modes = ["single", "batch"]
    members = [start(modes[n % 2]) for n in range(3)]
    await members[0].wait_for_partitions()
    frozen = 0
    with writing(kafka.bootstrap, topic) as count:
        end = time.monotonic() + 11
        while time.monotonic() < end:
            place = chance.randrange(len(members))
            victim, fault = members[place], chance.choice(["kill", "freeze", "stop"])
            if fault == "freeze":
                victim.signal(signal.SIGSTOP)
                await until_passed(chance.uniform(1.2, 1.8))  # the session's timeout is 1 s
                victim.signal(signal.SIGCONT)
                frozen += 1
            elif fault == "kill":
                victim.kill()
                members[place] = start(chance.choice(modes))
            else:
                await victim.wait_for_partitions()  # it hears the signal from then on
                await victim.stop()
                members[place] = start(chance.choice(modes))
            await until_passed(chance.uniform(0.2, 0.8))
    assert frozen
    assert all(member.alive for member in members), "\n".join(member.text[-3000:] for member in members)
    await effects.until(count[0])
    check(effects, count[0])
    for member in members:
        await member.stop()
    check(effects, count[0])
    assert _parked(effects) == 0


async def until_passed(seconds: float) -> None:
    """The one thing that is waited for by the clock: faults have a length."""
    import asyncio

    await asyncio.sleep(seconds)
