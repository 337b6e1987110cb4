"""The audit service: every user event in a table that only grows, chained by hashes.

Each entry's hash covers the one before, so that whoever changes, removes or inserts an entry must change all later
ones; keep the last hash elsewhere (print it, sign it) and `verify` against it. A trigger refuses UPDATE, DELETE and
TRUNCATE; an owner of the table can drop the trigger, and the chain shows it.

The chain has one end, so entries are made one after the other: the handler locks the end (`audit_head`) first.

    export AUDIT_DATABASE_URL=postgresql://postgres@localhost/audit KAFKA_BOOTSTRAP_SERVERS=localhost:9092
    outbox migrate $AUDIT_DATABASE_URL && python -m examples.chip_quality.audit
    python -m examples.chip_quality.audit verify
"""

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import DDL, BigInteger, LargeBinary, event, select
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.chip_quality import process
from examples.chip_quality.events import UserEvent
from outbox.consumer import Consumer, Meta

NAME = "audit"
"""The consumer group in Kafka, and the consumer in the inbox."""

GENESIS = bytes(32)
"""What stands before the first entry."""


class Base(DeclarativeBase):
    """The service's own tables."""


class Entry(Base):
    """One user event, as it was said."""

    __tablename__ = "audit_log"

    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    """1, 2, 3 …: a gap is an entry that was removed."""
    event_id: Mapped[UUID] = mapped_column(unique=True)
    said: Mapped[dict[str, Any]] = mapped_column(JSONB)
    hash: Mapped[bytes] = mapped_column(LargeBinary)
    """SHA-256 of the entry before's hash, this one's number and what was said."""


class Head(Base):
    """The end of the chain: one row, whose lock is the right to append."""

    __tablename__ = "audit_head"

    one: Mapped[bool] = mapped_column(primary_key=True, default=True)
    number: Mapped[int] = mapped_column(BigInteger, default=0)
    hash: Mapped[bytes] = mapped_column(LargeBinary, default=GENESIS)


_GROWS_ONLY = (
    """
    CREATE OR REPLACE FUNCTION audit_log_grows_only() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'audit_log only grows: %% is refused', TG_OP; END $$
    """,
    """
    CREATE OR REPLACE TRIGGER grows_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION audit_log_grows_only()
    """,
)
for _statement in _GROWS_ONLY:
    event.listen(Entry.__table__, "after_create", DDL(_statement))  # type: ignore[no-untyped-call]  # SQLAlchemy's DDL has no types


def make_consumer(engine: AsyncEngine, bootstrap: str) -> Consumer:
    """The service's consumer. In batches: the end of the chain is locked once for each."""
    consumer = Consumer(NAME, engine, catalogue=process.catalogue(), kafka=process.kafka(NAME, bootstrap))

    @consumer.on_batch(UserEvent)
    async def append(events: list[UserEvent], session: AsyncSession, _: list[Meta]) -> None:
        await session.execute(insert(Head).values(one=True, number=0, hash=GENESIS).on_conflict_do_nothing())
        head = await session.get_one(Head, True, with_for_update=True)
        for happened in events:
            said = text_of(happened)
            head.number += 1
            head.hash = chained(head.hash, head.number, said)
            session.add(Entry(number=head.number, event_id=happened.event_id, said=said, hash=head.hash))

    return consumer


def text_of(happened: UserEvent) -> dict[str, Any]:
    """The event in JSON's types."""
    return {name: _plain(value) for name, value in happened.to_avro().items()}


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else str(value) if isinstance(value, UUID) else value


def chained(before: bytes, number: int, said: dict[str, Any]) -> bytes:
    """The hash of an entry behind the one whose hash is `before`."""
    text = json.dumps([number, said], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(before + text.encode()).digest()


class Broken(Exception):  # noqa: N818 -- named for what happened
    """The chain is not what was written; says where."""


async def verify(session: AsyncSession) -> tuple[int, bytes]:
    """How many entries there are, and the last one's hash, once each of them was found to be right. Raises Broken."""
    number, last = 0, GENESIS
    async for entry in _entries(session):
        number += 1
        if entry.number != number:
            raise Broken(f"entry {number} is missing: the next one is {entry.number}")
        last = chained(last, number, entry.said)
        if entry.hash != last:
            raise Broken(f"entry {number} is not what was written, or an entry before it was changed with its hash")
    head = await session.get(Head, True)
    if head is not None and (head.number, head.hash) != (number, last):
        raise Broken(f"the chain ends at entry {number}, and {head.number} were written")
    return number, last


async def _entries(session: AsyncSession) -> AsyncIterator[Entry]:
    found = await session.stream_scalars(select(Entry).order_by(Entry.number).execution_options(yield_per=1_000))
    async for entry in found:
        yield entry


async def _verify(url: str) -> int:
    engine = process.engine_for(url)
    try:
        async with AsyncSession(engine) as session:
            number, last = await verify(session)
    except Broken as error:
        print(error)
        return 1
    finally:
        await engine.dispose()
    print(f"{number:,} entries, the last hash {last.hex()}")
    return 0


def main() -> int:
    """The process, or `verify`: exit status 1 where the chain is broken."""
    url = os.environ["AUDIT_DATABASE_URL"]
    if sys.argv[1:] == ["verify"]:
        return asyncio.run(_verify(url))
    process.configure_log()
    asyncio.run(process.run(make_consumer(process.engine_for(url), os.environ["KAFKA_BOOTSTRAP_SERVERS"]), Base))
    return 0


if __name__ == "__main__":
    sys.exit(main())
