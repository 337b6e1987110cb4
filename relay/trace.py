"""`relay trace`: where an event is. In the outbox, parked, or in Kafka, at which topic, partition and offset."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from relay.config import RelayConfig
from relay.queries import Meta
from relay.topics import read_back
from relay.views import Views

MARGIN_MS = 3_600_000
"""A topic is read from the moment of the event's id less an hour: clocks differ."""


async def trace(
    config: RelayConfig, meta: Meta, views: Views, id_: UUID, topics: Sequence[str], since: float | None
) -> dict[str, Any]:
    """Where the event is: {"event", "found": "outbox" | "parked" | "kafka" | None, …}.

    `topics`: where to look in Kafka; none: those that this outbox knows. `since`: ms since 1970 from when on; None:
    from the moment in a version 7 id, else from the start.

    Raises:
        ConfigError, KafkaTrouble: as `relay.topics.read_back`.
    """
    if (row := await views.waiting_at(id_)) is not None:
        return {"event": str(id_), "found": "outbox", **row}
    if (parked := await views.parked_event(id_)) is not None:
        shown = ("lane", "seq", "type", "topic", "key", "created_at", "died_at", "attempts", "error", "of_its_key")
        return {"event": str(id_), "found": "parked", **{name: parked[name] for name in shown}}
    start = int(moment_of(id_) if since is None else since)
    asked = list(topics) or await views.topics()
    found = await asyncio.to_thread(read_back, config, meta.name, dict.fromkeys(asked, start), {str(id_)})
    looked = {"topics": asked, "since_ms": start, "missing": list(found.missing), "gaps": found.gaps}
    place = found.places.get(str(id_))
    if place is None:
        return {"event": str(id_), "found": None, **looked}
    at = {"topic": place.topic, "partition": place.partition, "offset": place.offset}
    return {"event": str(id_), "found": "kafka", **at}


def moment_of(id_: UUID) -> float:
    """Ms since 1970 from when on the event may be in a topic: of an id of version 7 (RFC 9562) its own moment less an
    hour; 0 for others, and for one of the future."""
    moment = (id_.int >> 80) - MARGIN_MS if id_.version == 7 else 0
    return moment if 0 < moment < time.time() * 1000 else 0


def text_of(document: dict[str, Any]) -> str:
    """A line or two for people."""
    id_, found = document["event"], document["found"]
    if found == "outbox":
        return f"{id_} waits in the outbox: topic {document['topic']}, lane {document['lane']}, seq {document['seq']}"
    if found == "parked":
        return f"{id_} is parked since {document['died_at']}: {document['error']}"
    if found == "kafka":
        return f"{id_} is in Kafka: topic {document['topic']} [{document['partition']}] @ {document['offset']}"
    lines = [f"{id_} was not found: not in the outbox, not parked, not in {', '.join(document['topics']) or 'a topic'}"]
    lines += [f"topic {topic}: Kafka does not have it, or does not show it" for topic in document["missing"]]
    lines += [f"topic {topic}: {why}" for topic, why in document["gaps"].items()]
    return "\n".join(lines)
