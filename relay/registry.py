"""Confluent's frame in place of Avro's own: 0, the schema's id in a registry, the Avro bytes (docs/schemas.md, "With a
schema registry").

Ids are learned before the Kafka transaction of the batch that needs them, once for each topic and fingerprint; from
then on a batch costs one look into a dict for each event. While the registry is away nothing is parked: what it has
told before goes on, and an event whose id is not known waits, with those behind it in its lane.

Source: https://docs.confluent.io/platform/current/schema-registry/fundamentals/serdes-develop/index.html#wire-format
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import structlog

from outbox.errors import RegistryError, SchemaRefused, UsageError
from outbox.registry import SUBJECTS, SchemaRegistry
from outbox.schemas import full_name
from relay.config import RelayConfig
from relay.errors import ConfigError
from relay.pace import Backoff
from relay.queries import Queries

log = structlog.get_logger("relay")

REFUSAL_SECONDS = 10.0
"""So long a refusal is remembered; then the registry is asked again, for a person may have seen to it."""

AGAIN = 0.2
"""Seconds after which a refusal is asked for once more: two who register a subject at one moment may be told of a
conflict."""

CALL_SECONDS = 60.0
"""A call that has not returned by then is given up, with its thread. The client's timeouts are those of its steps."""

Key = tuple[str, int]
"""Topic and fingerprint."""


class Registry:
    """What a relay knows of the registry; its lanes share it."""

    def __init__(self, config: RelayConfig, queries: Queries, threads: Executor) -> None:
        """Raises ConfigError where the client does not take the settings."""
        self._config = config
        self._settings: Mapping[str, Any] = config.registry
        try:
            self._registry = _opened(self._settings)
        except UsageError as error:
            raise ConfigError(str(error)) from error
        self._subject = SUBJECTS[config.registry_subject_strategy]
        self._url = config.registry["url"]
        self._queries = queries
        self._threads = threads
        self.frames: dict[Key, bytes] = {}
        """What stands before the Avro bytes of an event."""
        self._refused: dict[Key, tuple[str, float]] = {}
        self._asking = asyncio.Lock()
        self._backoff: Backoff | None = None
        """Of the trouble that there is now."""

    def close(self) -> None:
        """Close the connections. Not to be used afterwards."""
        self._registry.close()

    def part(self, rows: list[Any]) -> tuple[list[Any], dict[int, str]]:
        """The rows before the first one whose id has to be learned, and those of them that are to be parked (seq →
        why)."""
        unknown = {(row[3], row[6]) for row in rows} - self.frames.keys()
        refused: dict[int, str] = {}
        for place, row in enumerate(rows if unknown else ()):
            key = (row[3], row[6])
            if key not in unknown or _is_bare(row):
                continue
            why = self._refusal(key)
            if why is None:
                return rows[:place], refused
            refused[row[0]] = why
        return rows, refused

    async def learn(self, rows: Sequence[Any], stopping: asyncio.Event) -> None:
        """Ask for all that `part` lacks, until it is answered, however long the registry is away; or until
        `stopping`."""
        learning = asyncio.ensure_future(self._learn({(row[3], row[6]) for row in rows if not _is_bare(row)}))
        stopped = asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait((learning, stopped), return_when=asyncio.FIRST_COMPLETED)
            if learning.done():
                learning.result()
        finally:
            learning.cancel()
            stopped.cancel()

    async def _learn(self, keys: set[Key]) -> None:
        for key in sorted(keys, key=str):
            while self._is_open(key):
                async with self._asking:  # one lane asks, and waits out the trouble, before the next one does
                    if self._is_open(key):
                        await self._try(key)

    def _is_open(self, key: Key) -> bool:
        return key not in self.frames and self._refusal(key) is None

    def _refusal(self, key: Key) -> str | None:
        why, since = self._refused.get(key, (None, 0.0))
        return why if time.monotonic() - since < REFUSAL_SECONDS else None

    async def _try(self, key: Key) -> None:
        try:
            self.frames[key] = b"\0" + (await self._id(*key)).to_bytes(4, "big")
        except SchemaRefused as error:
            self._refuse(key, f"no id in the schema registry: {error}")
        except RegistryError as error:
            if self._backoff is None:
                log.warning("registry away", url=self._url, error=str(error))
                self._backoff = Backoff()
            await asyncio.sleep(self._backoff.wait())
            return
        if self._backoff is not None:
            log.info("registry back", url=self._url)
            self._backoff = None

    def _refuse(self, key: Key, why: str) -> None:
        if self._refused.get(key, ("", 0.0))[0] != why:
            log.warning("schema refused", topic=key[0], fingerprint=key[1], error=why)
        self._refused[key] = (why, time.monotonic())

    async def _id(self, topic: str, fingerprint: int) -> int:
        schema = await self._queries.avro_schema(fingerprint)
        if schema is None:
            raise SchemaRefused(f"avro_schema does not hold {fingerprint}: run `outbox schemas sync`")
        try:
            subject = self._subject(topic, full_name(json.loads(schema)))
        except (ValueError, KeyError, TypeError) as error:
            raise SchemaRefused(f"what avro_schema holds as {fingerprint} is no record: {error!r}") from error
        try:
            return await self._call(subject, schema)
        except SchemaRefused:
            await asyncio.sleep(AGAIN)
            return await self._call(subject, schema)

    async def _call(self, subject: str, schema: str) -> int:
        call = asyncio.get_running_loop().run_in_executor(self._threads, self._ask, subject, schema)
        try:
            return await asyncio.wait_for(call, CALL_SECONDS)
        except TimeoutError:
            raise RegistryError(f"no answer within {CALL_SECONDS:g} s") from None

    def _ask(self, subject: str, schema: str) -> int:
        registry = self._current()
        ask = registry.register if self._config.registry_auto_register else registry.look_up
        return ask(subject, schema)

    def _current(self) -> SchemaRegistry:
        """The client; a new one where the files of its settings hold something else than when it was made."""
        try:
            settings = self._config.registry_client()
            if settings != self._settings:
                self._registry, former = _opened(settings), self._registry
                self._settings = settings
                former.close()
        except (OSError, UsageError) as error:
            raise RegistryError(str(error)) from error
        return self._registry


def _opened(settings: Mapping[str, Any]) -> SchemaRegistry:
    return SchemaRegistry({"max.retries": 0, **settings})


def _is_bare(row: Any) -> bool:
    """A row whose value gets no frame: raw bytes, or a tombstone."""
    return row[5] is None or row[6] is None
