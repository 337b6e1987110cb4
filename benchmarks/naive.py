"""The relay that people write by hand, as good as it gets: what ours is compared with. At least once.

`SELECT … FOR UPDATE SKIP LOCKED LIMIT 1000`, an idempotent producer, flush, DELETE, commit; 10 ms of sleep when nothing
was there. It gets whatever costs nothing to have: asyncpg with prepared statements, uvloop where it is installed, an
index in the order of publishing, the outbox's own autovacuum options, no callback per record. Its
records are those of our relay: the same frame, the same headers, the same timestamp.

Run as `python -m benchmarks.naive` with OUTBOX_DATABASE_URL and OUTBOX_KAFKA_BOOTSTRAP_SERVERS.
"""

import asyncio
import os
import signal
import sys
from typing import Any

import asyncpg
from confluent_kafka import KafkaException, Producer

READY = "naive relay started"

TABLE = """
CREATE TABLE naive (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id uuid NOT NULL, type text NOT NULL, topic text NOT NULL, key text, value bytea, fingerprint bigint,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_cost_delay = 0,
    autovacuum_vacuum_insert_threshold = -1
)
"""

SELECT = """
SELECT seq, id::text, type, topic, key, value, fingerprint, (extract(epoch FROM created_at) * 1000)::bigint AS created
  FROM naive ORDER BY seq LIMIT 1000 FOR UPDATE SKIP LOCKED
"""

DELETE = "DELETE FROM naive WHERE seq = ANY($1)"

POLL_SECONDS = 0.01

PRODUCER = {
    "enable.idempotence": True,
    "partitioner": "murmur2_random",
    "socket.nagle.disable": True,
    "queue.buffering.max.messages": 1_000_000,
    "delivery.report.only.error": True,
}


class NaiveRelay:
    """One process, one connection, one producer."""

    def __init__(self, database: "asyncpg.Connection[asyncpg.Record]", bootstrap: str) -> None:
        self._database = database
        self._failed: list[Any] = []
        self._producer = Producer({**PRODUCER, "bootstrap.servers": bootstrap, "on_delivery": self._delivered})

    def _delivered(self, error: Any, _message: Any) -> None:
        self._failed.append(error)

    async def run(self, stopping: asyncio.Event) -> None:
        """Publish until `stopping`."""
        while not stopping.is_set():
            if not await self._publish():
                await asyncio.sleep(POLL_SECONDS)

    async def _publish(self) -> int:
        """One batch; how many events it had. A crash between flush and commit doubles it."""
        async with self._database.transaction():
            rows = await self._database.fetch(SELECT)
            if rows:
                self._produce(rows)
                if self._producer.flush(30) or self._failed:
                    raise KafkaException(self._failed[0] if self._failed else "flush: 30 s were not enough")
                await self._database.execute(DELETE, [row[0] for row in rows])
        return len(rows)

    def _produce(self, rows: list[Any]) -> None:
        produce = self._producer.produce
        for _seq, id_, type_, topic, key, value, fingerprint, created in rows:
            headers = [
                ("ce_specversion", b"1.0"),
                ("ce_id", id_),
                ("ce_type", type_),
                ("ce_source", b"/outbox/naive"),
                ("content-type", b"application/avro"),
            ]
            framed = b"\xc3\x01" + fingerprint.to_bytes(8, "little", signed=True) + value
            produce(topic, framed, key, timestamp=created, headers=headers)


async def main() -> None:
    """Runs until SIGTERM."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    database = await asyncpg.connect(os.environ["OUTBOX_DATABASE_URL"])
    relay = NaiveRelay(database, os.environ["OUTBOX_KAFKA_BOOTSTRAP_SERVERS"])
    print(READY, file=sys.stderr, flush=True)
    await relay.run(stopping)
    await database.close()


if __name__ == "__main__":
    try:
        import uvloop
    except ImportError:
        asyncio.run(main())
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
