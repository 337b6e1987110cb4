"""`relay status`: the outbox as its database knows it, and what the relay beside this command adds (`OUTBOX_HTTP`)."""

import asyncio
import json
from collections.abc import Iterable, Mapping
from http.client import HTTPConnection, HTTPException
from typing import Any

from relay.config import RelayConfig
from relay.queries import Meta
from relay.views import Views

LOCAL_SECONDS = 2.0
"""The relay beside us answers within so long, or is not there."""

ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 -- asked for, not listened at
"""Where a relay is found that listens at every address."""


async def status(config: RelayConfig, meta: Meta, views: Views) -> dict[str, Any]:
    """One document for people and scripts."""
    local = await asyncio.to_thread(_local, config)
    beside = local["lanes"] if local and local["outbox"] == meta.name else []
    return {
        "outbox": meta.name,
        "uuid": str(meta.uuid),
        "copied": meta.copied,
        **await look(views, beside),
        "relay_beside": local and {name: local[name] for name in ("version", "away", "live", "ready")},
    }


async def look(
    views: Views, beside: Iterable[Mapping[str, Any]], floors: Mapping[int, int] | None = None
) -> dict[str, Any]:
    """What the database knows, and of the lanes `beside` what a relay says of its own. `floors`: theirs, to look at
    less."""
    own = {lane["lane"]: lane for lane in beside}
    backlog = await views.backlog(floors, every=True)
    waiting = {lane.lane: lane for lane in backlog.lanes}
    lanes = [
        {
            **lane,
            "pending": waiting[lane["lane"]].events,
            "pending_is_exact": waiting[lane["lane"]].exact,
            "oldest_seconds": waiting[lane["lane"]].oldest,
            "floor_lag": own.get(lane["lane"], {}).get("floor_lag"),
            "last_error": own.get(lane["lane"], {}).get("error"),
        }
        for lane in await views.lanes()
        if lane["lane"] in waiting
    ]
    return {
        "lanes": lanes,
        "relays": await views.relays(),
        "writers": await views.writers(),
        "parked": backlog.parked,
        "clock_offset_seconds": backlog.clock_offset,
    }


def is_well(document: dict[str, Any]) -> bool:
    """Every lane is published by a relay whose lease is good."""
    return all(lane["halted"] is None and (lane["lease_seconds"] or 0) > 0 for lane in document["lanes"])


def _local(config: RelayConfig) -> Any:
    """What the relay at our own `OUTBOX_HTTP` says; None: there is none, or it does not answer."""
    if not config.http or config.http_address[1] == 0:
        return None
    host, port = config.http_address
    connection = HTTPConnection(ANY_ADDRESS.get(host, host), port, timeout=LOCAL_SECONDS)
    try:
        connection.request("GET", "/status")
        return json.loads(connection.getresponse().read(1_000_000))
    except (OSError, HTTPException, ValueError):
        return None
    finally:
        connection.close()


# ---- for people ------------------------------------------------------------------------------------------------------

Rows = list[tuple[str, ...]]


def tables_of(document: dict[str, Any]) -> list[tuple[str, Rows]]:
    """Titles and rows, the first row the columns' names."""
    lanes: Rows = [("lane", "owner", "batch", "pending", "oldest", "floor lag", "state")]
    lanes += [_lane(lane) for lane in document["lanes"]]
    relays: Rows = [("relay", "host", "pid", "version", "up", "last seen")]
    relays += [
        (one["id"], one["host"], str(one["pid"]), one["version"], age(one["up_seconds"]), age(one["silent_seconds"]))
        for one in document["relays"]
    ]
    writers: Rows = [("pid", "user", "application", "state", "open for")]
    writers += [_writer(one) for one in document["writers"]]
    copied = " · this database is a copy" if document["copied"] else ""
    return [
        (f"outbox {document['outbox']} · {document['parked']} events parked{copied}", lanes),
        ("relays", relays),
        ("open transactions that write to the outbox: the floor waits for them", writers),
    ]


def _lane(lane: dict[str, Any]) -> tuple[str, ...]:
    owner = "nobody" if (lane["lease_seconds"] or 0) <= 0 else f"{lane['host'] or lane['owner']} ({lane['pid'] or '?'})"
    halted, error = lane["halted"], lane["last_error"]
    return (
        str(lane["lane"]),
        owner,
        str(lane["batch"]),
        ("" if lane["pending_is_exact"] else "about ") + f"{lane['pending']:,}",
        "?" if lane["oldest_seconds"] is None else age(lane["oldest_seconds"]) if lane["pending"] else "-",
        "?" if lane["floor_lag"] is None else f"{lane['floor_lag']:,}",
        f"HALTED: {halted}" if halted else f"last error: {error}" if error else "ok" if owner != "nobody" else "waits",
    )


def _writer(writer: dict[str, Any]) -> tuple[str, ...]:
    if writer["prepared"] is not None:
        return "-", "-", "-", f"prepared {writer['prepared']}", age(writer["seconds"])
    hidden = "not visible: GRANT pg_read_all_stats"
    seconds = hidden if writer["seconds"] is None else age(writer["seconds"])
    return str(writer["pid"]), writer["user"] or "?", writer["application"] or "-", writer["state"] or "?", seconds


def age(seconds: float) -> str:
    """A duration for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3_600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3_600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"
