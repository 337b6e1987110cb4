"""The demo's quality service: what its verdicts say is also entered in the ledger, in the same transaction."""

import asyncio
import os
from collections.abc import Iterable

from sqlalchemy.ext.asyncio import AsyncSession

from examples.chip_quality import process, quality
from examples.chip_quality.events import QualityEvent
from examples.chip_quality.ledger import entry_of


def _enter(session: AsyncSession, said: Iterable[QualityEvent]) -> None:
    session.add_all(entry_of(event) for event in said)


if __name__ == "__main__":
    process.configure_log()
    engine = process.engine_for(os.environ["OUTBOX_DATABASE_URL"])
    consumer = quality.make_consumer(engine, os.environ["KAFKA_BOOTSTRAP_SERVERS"], _enter)
    asyncio.run(process.run(consumer, quality.Base))
