"""The consumer: takes effect of each event once, by the inbox; its effects stand in tables of its own.

    python -m tests.torture.consumer                     TORTURE_EFFECTS_URL, TORTURE_BOOTSTRAP

An effect is a row with the event's place among those of its key, and a counter of the key. Steps, at which
`OUTBOX_TEST_CONSUMER_FAILPOINT=<step>:<n>` kills it at the n-th passage: read, claimed, written, committed,
acknowledged.
"""

import os
import signal
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from outbox.inbox import Inbox, id_of
from tests.torture.writers import TOPICS

NAME = "torture"
"""The group in Kafka, and the consumer in the inbox."""

FAILPOINT = "OUTBOX_TEST_CONSUMER_FAILPOINT"
BATCH = 500
ACKNOWLEDGE_SECONDS = 0.5

TABLES = """
CREATE TABLE effect (topic text, key text, place bigint, event_id uuid NOT NULL, PRIMARY KEY (topic, key, place));
CREATE TABLE counter (topic text, key text, events bigint NOT NULL, PRIMARY KEY (topic, key));
"""
NO_KEY = "-"
"""How these tables write that there is no key; others begin with '='."""


def key_text(key: bytes | str | None) -> str:
    """The key as these tables have it."""
    return NO_KEY if key is None else "=" + (key.decode() if isinstance(key, bytes) else key)


class Failpoint:
    """Dies on purpose."""

    def __init__(self, setting: str) -> None:
        self._step, _, count = setting.partition(":")
        self._left = int(count or 1)

    def done(self, step: str) -> None:
        if step == self._step:
            self._left -= 1
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


class Effects:
    """Takes effect in the database; waits for one that is away, with the same messages in hand."""

    def __init__(self, url: str, failpoint: Failpoint) -> None:
        self._engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"), pool_pre_ping=True)
        self._inbox = Inbox(NAME)
        self._failpoint = failpoint

    def take(self, messages: Sequence[Message]) -> None:
        """Committed when this returns."""
        while True:
            try:
                return self._take_once(messages)
            except SQLAlchemyError as error:
                print(f"database away: {type(error).__name__}", flush=True)
                time.sleep(0.3)

    def _take_once(self, messages: Sequence[Message]) -> None:
        with Session(self._engine) as session:
            fresh = self._inbox.claim(session, messages)
            self._failpoint.done("claimed")
            if fresh:
                self._write(session, fresh)
            self._failpoint.done("written")
            session.commit()
        self._failpoint.done("committed")

    def _write(self, session: Session, messages: Sequence[Message]) -> None:
        by_key: dict[tuple[str, str], list[Message]] = defaultdict(list)
        for message in messages:
            by_key[message.topic() or "", key_text(message.key())].append(message)
        rows: list[dict[str, Any]] = []
        for (topic, key), added in sorted(by_key.items()):
            counter = text(
                "INSERT INTO counter VALUES (:topic, :key, :added)"
                " ON CONFLICT (topic, key) DO UPDATE SET events = counter.events + :added RETURNING events"
            )
            events = session.execute(counter, {"topic": topic, "key": key, "added": len(added)}).scalar_one()
            rows += [
                {"topic": topic, "key": key, "place": place, "event_id": id_of(message)}
                for place, message in enumerate(added, events - len(added) + 1)
            ]
        session.execute(text("INSERT INTO effect VALUES (:topic, :key, :place, :event_id)"), rows)


def make_consumer(bootstrap: str) -> Consumer:
    """Reads committed events; a restarted one gets its partitions back at once."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": NAME,
            "group.instance.id": f"{NAME}-1",
            "session.timeout.ms": 6000,
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "reconnect.backoff.max.ms": 500,
            "log_level": 0,
        }
    )
    consumer.subscribe(list(TOPICS))
    return consumer


def main() -> None:
    """The process: works until SIGTERM."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    failpoint = Failpoint(os.environ.get(FAILPOINT, ""))
    effects = Effects(os.environ["TORTURE_EFFECTS_URL"], failpoint)
    consumer = make_consumer(os.environ["TORTURE_BOOTSTRAP"])
    print("consumer started", flush=True)
    acknowledged = time.monotonic()
    while not stopping:
        try:
            messages = [message for message in consumer.consume(BATCH, 0.1) if not _failed(message)]
        except KafkaException as error:  # the client has ended for good, and begins anew as a new process would
            print(f"kafka: {error}", flush=True)
            consumer.close()
            consumer = make_consumer(os.environ["TORTURE_BOOTSTRAP"])
            continue
        if messages:
            failpoint.done("read")
            effects.take(messages)
        if messages and time.monotonic() - acknowledged > ACKNOWLEDGE_SECONDS:
            acknowledged = time.monotonic()
            if _acknowledge(consumer):
                failpoint.done("acknowledged")
    consumer.close()


def _failed(message: Message) -> bool:
    """An error of the client that passes by itself; a fatal one is raised.

    Such as the fencing of a static member by its own former membership, which a killed coordinator finds again.
    """
    error = message.error()
    if error is None:
        return False
    if error.code() == KafkaError._FATAL:  # `fatal()` is false for it
        raise KafkaException(error)
    print(f"kafka: {error.str()}", flush=True)
    return True


def _acknowledge(consumer: Consumer) -> bool:
    try:
        consumer.commit(asynchronous=False)
    except KafkaException as error:  # what is not acknowledged comes again, and the inbox knows it
        print(f"not acknowledged: {error}", flush=True)
        return False
    return True


if __name__ == "__main__":
    main()
