"""What is really there at the end: the topics read from their start by an independent consumer, and the tables."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition
from sqlalchemy import create_engine, make_url, select
from sqlalchemy.orm import Session

from examples.chip_quality.ledger import Entry, Figures, Record
from examples.chip_quality.process import catalogue
from outbox.catalogue import Catalogue


class ReadTimeout(Exception):  # noqa: N818 -- named for what happened
    """A partition's end was not reached."""


def read_entries(database_url: str) -> list[Entry]:
    """The ledger of the service's database: the events that were committed."""
    engine = create_engine(make_url(database_url).set(drivername="postgresql+psycopg"))
    with Session(engine) as session:
        entries = list(session.scalars(select(Entry)))
    engine.dispose()
    return entries


def read_rolled_back(folder: Path) -> set[UUID]:
    """The ids that the writers noted outside the database."""
    return {UUID(line) for file in folder.glob("rolled-back-*") for line in file.read_text().split()}


_EFFECTS = {
    "completed": (1, "SELECT inspection_type, inspections, score_sum FROM completed"),
    "defect_counts": (2, "SELECT defect_type, severity, found FROM defect_counts"),
    "yields": (1, "SELECT batch_id, passed, failed FROM yields"),
    "violations": (2, "SELECT batch_id, level, found FROM violations"),
    "assessments": (1, "SELECT inspection_id, defects, coalesce(score, 0)::numeric FROM assessments"),
    "alerts": (1, "SELECT event_id::text, 1 FROM alerts"),
}
"""By table: how many columns are the key, and the query."""


def read_effects(database_url: str, *tables: str) -> Figures:
    """The rows of a consumer's tables."""
    with psycopg.connect(database_url) as connection:
        return {
            (table, *row[: _EFFECTS[table][0]]): tuple(row[_EFFECTS[table][0] :])
            for table in tables
            for row in connection.execute(_EFFECTS[table][1]).fetchall()
        }


def count_unsure(database_url: str) -> int:
    """Alerts of which it is not known whether their mail went out: their sender was killed on the way."""
    with psycopg.connect(database_url) as connection:
        return int(
            connection.execute("SELECT count(*) FROM alerts WHERE state IN ('SENDING', 'UNSURE')").fetchall()[0][0]
        )


def count_dead(database_url: str) -> int:
    """Messages that a consumer could not handle."""
    with psycopg.connect(database_url) as connection:
        return int(connection.execute("SELECT count(*) FROM outbox.dead_message").fetchall()[0][0])


def read_topics(bootstrap: str, topics: Sequence[str]) -> list[Record]:
    """Every committed record of the topics, each partition in its order, with the event in it decoded."""
    known = catalogue()
    return [_record(message, known) for message in _messages(bootstrap, topics, "read_committed")]


def count_aborted(bootstrap: str, topics: Sequence[str], committed: int) -> int:
    """Records of aborted transactions: in the log, and hidden from every read_committed consumer."""
    return sum(1 for _ in _messages(bootstrap, topics, "read_uncommitted")) - committed


def _record(message: Message, known: Catalogue) -> Record:
    headers = dict(message.headers() or [])
    event = known.decode(message.value() or b"")
    return Record(
        event_id=UUID(_text(headers["ce_id"])),
        value_id=getattr(event, "event_id", None),
        topic=str(message.topic()),
        key=_text(message.key()),
        type=_text(headers["ce_type"]),
        partition=message.partition() or 0,
    )


def _text(value: bytes | str | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""


def _messages(bootstrap: str, topics: Sequence[str], isolation: str, timeout: float = 20.0) -> Iterator[Message]:
    """From the first record to the end that this isolation level can see; raises ReadTimeout after `timeout` s."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": f"demo-reader-{uuid4()}",
            "isolation.level": isolation,
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )
    known = consumer.list_topics(timeout=timeout).topics
    partitions = {(topic, number) for topic in topics for number in known[topic].partitions}
    consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for topic, number in partitions])
    deadline = time.monotonic() + timeout
    try:
        while partitions:
            if time.monotonic() > deadline:
                raise ReadTimeout(f"no end of {sorted(partitions)} within {timeout:g} s ({isolation})")
            for message in consumer.consume(1_000, 0.2):
                if (error := message.error()) is None:
                    yield message
                elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 -- librdkafka's own codes start so
                    partitions.discard((str(message.topic()), message.partition() or 0))
                else:
                    raise KafkaException(error)
    finally:
        consumer.close()
