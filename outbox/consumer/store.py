"""What a consumer keeps in its database beside the inbox: partitions not left clean, attempts begun, dead messages.

Each function is a statement or two in the caller's transaction, on a Session; under asyncio through `run_sync`.
"""

import base64
import traceback
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from typing import Any, Literal, cast
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from outbox.consumer.meta import Headers, Meta
from outbox.tables import SCHEMA, quoted, tables
from outbox.transaction import explained

Reason = Literal["failed", "undecodable", "unknown", "killed", "held", "trying"]
"""Why a message is dead. `held`: another one of its key is, before it. `trying`: a retry is under way, or was when the
process died."""

MAX_ERROR = 2_000
MAX_STACK = 16_000
"""Characters kept of what an exception says, and of its traceback: its end, where the cause stands."""

Key = tuple[str, bytes]
"""Topic and key of messages whose order is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadMessage:
    """A row of dead_message."""

    consumer: str
    event_id: str
    topic: str
    partition: int
    position: int
    sent_at: datetime | None
    key: bytes | None
    value: bytes | None
    headers: list[list[str | None]]
    reason: Reason
    error: str
    stack: str | None
    attempts: int
    died_at: datetime
    retry_at: datetime | None

    def meta(self) -> Meta:
        """As it was delivered."""
        sent = None if self.sent_at is None else round(self.sent_at.timestamp() * 1000)
        headers = decoded(self.headers)
        meta = Meta(self.topic, self.partition, self.position, self.key, self.value, headers, sent)
        meta.event_id, meta.type, meta.attempt = self.event_id, meta.header("ce_type"), self.attempts
        return meta


@dataclass(frozen=True, slots=True)
class Death:
    """Why a message becomes a dead one."""

    reason: Reason
    error: str
    stack: str | None = None
    attempts: int = 0

    @classmethod
    def of(cls, reason: Reason, error: BaseException, attempts: int) -> "Death":
        """With what the exception says, and where it was raised; both cut."""
        said = f"{type(error).__name__}: {error}"
        stack = "".join(traceback.format_exception(error))
        return cls(reason, _text(said[:MAX_ERROR]), _text(stack[-MAX_STACK:]), attempts)


_BEGIN = """INSERT INTO {schema}.consumer_attempt AS had (consumer, event_id, attempts)
SELECT DISTINCT :consumer, id, 1 FROM unnest(CAST(string_to_array(:ids, ' ') AS uuid[])) AS event (id) ORDER BY id
ON CONFLICT (consumer, event_id) DO UPDATE SET attempts = had.attempts + 1"""


class Store:
    """The tables of one consumer (its inbox's name) in a SQL schema."""

    def __init__(self, consumer: str, *, schema: str = SCHEMA) -> None:
        self.consumer = consumer
        self._schema = schema
        found = tables(schema).tables
        self._partition = found[f"{schema}.consumer_partition"]
        self._attempt = found[f"{schema}.consumer_attempt"]
        self._dead = found[f"{schema}.dead_message"]
        self._inbox = found[f"{schema}.inbox"]
        self._avro_schema = found[f"{schema}.avro_schema"]
        self._begin = sa.text(_BEGIN.format(schema=quoted(schema)))

    # --- partitions and attempts ---

    def open(self, session: Session, topic: str, partition: int) -> bool:
        """Take a partition; whether its last owner left it clean, or there was none. Not clean from now on."""
        where = {"consumer": self.consumer, "topic": topic, "partition": partition}
        with explained(self._schema):
            clean = session.scalar(sa.select(self._partition.c.clean).filter_by(**where))
            taken = insert(self._partition).values(**where, clean=False)
            session.execute(taken.on_conflict_do_update(index_elements=list(where), set_={"clean": False}))
        return clean is None or bool(clean)

    def leave(self, session: Session, places: Iterable[tuple[str, int]]) -> None:
        """These partitions are left with nothing at work."""
        table = self._partition
        for topic, partition in sorted(places):
            where = {"consumer": self.consumer, "topic": topic, "partition": partition}
            session.execute(sa.update(table).filter_by(**where).values(clean=True))

    def attempts(self, session: Session) -> dict[str, int]:
        """Events that were begun before a death and have not ended since."""
        query = sa.select(self._attempt.c.event_id, self._attempt.c.attempts).filter_by(consumer=self.consumer)
        return {str(event_id): attempts for event_id, attempts in session.execute(query)}

    def begin(self, session: Session, ids: Iterable[str]) -> None:
        """One more attempt at each of these events is about to begin."""
        session.execute(self._begin, {"consumer": self.consumer, "ids": " ".join(ids)})

    def end(self, session: Session, ids: Iterable[str]) -> None:
        """The attempts at these events have ended, without a death."""
        table = self._attempt
        session.execute(sa.delete(table).filter_by(consumer=self.consumer).where(table.c.event_id.in_(_uuids(ids))))

    # --- dead messages ---

    def park(self, session: Session, messages: Sequence[tuple[Meta, Death]]) -> None:
        """Keep these messages, in the order given. Claim them in the same transaction."""
        session.execute(sa.insert(self._dead), [self._row(meta, death) for meta, death in messages])

    def held_keys(self, session: Session, topic: str) -> set[Key]:
        """The keys of a topic that have a dead message."""
        dead = self._dead.c
        query = (
            sa.select(dead.key).distinct().filter_by(consumer=self.consumer, topic=topic).where(dead.key.is_not(None))
        )
        return {(topic, bytes(key)) for key in session.scalars(query)}

    def still_held(self, session: Session, keys: Collection[Key]) -> set[Key]:
        """Those of these keys that have a dead message now."""
        dead = self._dead.c
        digests = {digest(key): (topic, key) for topic, key in keys}
        topics = {topic for topic, _ in keys}
        query = (
            sa.select(dead.topic, dead.key_digest)
            .distinct()
            .filter_by(consumer=self.consumer)
            .where(dead.topic.in_(topics), dead.key_digest.in_(list(digests)))
        )
        found = {(topic, digests[bytes(key_digest)][1]) for topic, key_digest in session.execute(query)}
        return found & set(keys)

    def keys_of(self, session: Session, ids: Collection[str]) -> set[Key]:
        """The keys of those of these events that are dead."""
        dead = self._dead.c
        query = (
            sa.select(dead.topic, dead.key)
            .filter_by(consumer=self.consumer)
            .where(dead.event_id.in_(_uuids(ids)), dead.key.is_not(None))
        )
        return {(topic, bytes(key)) for topic, key in session.execute(query)}

    def take_due(self, session: Session) -> DeadMessage | None:
        """One that is to be tried now, marked as tried; None: there is none. Commit before it is tried.

        Due is what a person wants tried, and a held one that has nothing before it any more. If the process dies over
        it, it is due no more.
        """
        dead, before = self._dead, self._dead.alias("before")
        first = ~sa.exists().where(
            before.c.consumer == dead.c.consumer,
            before.c.topic == dead.c.topic,
            before.c.key_digest == dead.c.key_digest,
            before.c.seq < dead.c.seq,
        )
        due = (
            sa.select(dead.c.event_id)
            .filter_by(consumer=self.consumer)
            .where(sa.or_(dead.c.retry_at <= sa.func.now(), sa.and_(dead.c.reason == "held", first)))
            .order_by(dead.c.seq)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        event_id = session.scalar(due)
        if event_id is None:
            return None
        taken = (
            sa.update(dead)
            .filter_by(consumer=self.consumer, event_id=event_id)
            .values(reason="trying", retry_at=None, attempts=dead.c.attempts + 1)
            .returning(*self._columns())
        )
        return dead_message(session.execute(taken).mappings().one())

    def settle(self, session: Session, event_id: str) -> bool:
        """Its effect is in this transaction: it is dead no more. False: it was discarded, or is another's."""
        gone = sa.delete(self._dead).filter_by(consumer=self.consumer, event_id=UUID(event_id), reason="trying")
        return bool(cast("sa.CursorResult[Any]", session.execute(gone)).rowcount)

    def failed_again(self, session: Session, event_id: str, death: Death) -> None:
        """The retry has failed: it waits for a person again."""
        session.execute(
            sa.update(self._dead)
            .filter_by(consumer=self.consumer, event_id=UUID(event_id))
            .values(reason=death.reason, error=death.error, stack=death.stack, died_at=sa.func.now(), published_at=None)
        )

    def unpublished(
        self, session: Session, topic: str, partitions: Collection[int], limit: int = 100
    ) -> list[DeadMessage]:
        """Dead messages of these partitions that the dead letter topic does not have yet; none that are only held."""
        query = (
            sa.select(*self._columns())
            .filter_by(consumer=self.consumer, topic=topic, published_at=None)
            .where(self._dead.c.partition.in_(partitions), self._dead.c.reason.not_in(["held", "trying"]))
            .order_by(self._dead.c.seq)
            .limit(limit)
        )
        return [dead_message(row) for row in session.execute(query).mappings()]

    def published(self, session: Session, ids: Collection[str]) -> None:
        """The dead letter topic has these."""
        session.execute(
            sa.update(self._dead)
            .filter_by(consumer=self.consumer)
            .where(self._dead.c.event_id.in_(_uuids(ids)))
            .values(published_at=sa.func.now())
        )

    # --- schemas of writers ---

    def avro_schema(self, session: Session, fingerprint: int) -> str | None:
        """The schema of that fingerprint, where this database's avro_schema has it."""
        found: str | None = session.scalar(sa.select(self._avro_schema.c.schema).filter_by(fingerprint=fingerprint))
        return found

    def _columns(self) -> list[sa.ColumnElement[Any]]:
        return [self._dead.c[name] for name in DeadMessage.__slots__]

    def _row(self, meta: Meta, death: Death) -> dict[str, Any]:
        return {
            "consumer": self.consumer,
            "event_id": meta.id,
            "topic": meta.topic,
            "partition": meta.partition,
            "position": meta.offset,
            "sent_at": meta.timestamp,
            "key": meta.key,
            "key_digest": None if meta.key is None else digest(meta.key),
            "value": meta.value,
            "headers": encoded(meta.headers),
            "reason": death.reason,
            "error": death.error,
            "stack": death.stack,
            "attempts": death.attempts,
        }


def digest(key: bytes) -> bytes:
    """What stands for a key in the index: 16 bytes, for a key may be longer than an index takes."""
    return blake2b(key, digest_size=16).digest()


def encoded(headers: Headers) -> list[list[str | None]]:
    """Headers as JSON: names repeat and keep their order, values are any bytes."""
    return [[_text(name), None if value is None else base64.b64encode(value).decode()] for name, value in headers]


def decoded(headers: Iterable[Sequence[str | None]]) -> Headers:
    """The headers that `encoded` was given."""
    return [(name or "", None if value is None else base64.b64decode(value)) for name, value in headers]


def _uuids(ids: Iterable[str]) -> list[UUID]:
    return [UUID(event_id) for event_id in sorted(ids)]


def _text(text: str) -> str:
    """What a text column of PostgreSQL takes."""
    return text.replace("\0", "�").encode(errors="replace").decode()


def dead_message(row: sa.RowMapping) -> DeadMessage:
    """The row of a query for the columns that DeadMessage names."""
    fields: dict[str, Any] = {**row, "event_id": str(row["event_id"])}
    return DeadMessage(**fields)
