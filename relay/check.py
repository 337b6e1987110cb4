"""`relay check`: whether the relay can work with these settings, and which guarantee they give. Reads, and changes
nothing. What was found is judged by functions without I/O."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from relay.cluster import HIDDEN, INTERNAL, Cluster, Topic, look
from relay.config import RelayConfig
from relay.errors import KafkaTrouble
from relay.queries import Meta, Queries
from relay.transaction import control_topic
from relay.views import Views

Level = Literal["ok", "weak", "wrong", "unknown"]

GRANTS: Mapping[str, tuple[str, ...]] = {
    "outbox": ("SELECT", "DELETE"),
    "avro_schema": ("SELECT",),
    "alembic_version": ("SELECT",),
    "meta": ("SELECT",),
    "lane": ("SELECT", "UPDATE"),
    "relay": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "dead_event": ("SELECT", "INSERT", "UPDATE"),
}
"""What `relay run` needs: of outbox/roles.py, whose import would bring SQLAlchemy."""

AUTOVACUUM = {
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "10000",
    "autovacuum_vacuum_cost_delay": "0",
}
"""As the migration sets them on the table `outbox` (outbox/tables.py)."""

DEAD_ROWS = 1_000_000
"""More of them are a sign that vacuum is held back."""

CLOCK_SECONDS = 5.0

REPLICAS, IN_SYNC = 3, 2
"""What survives the loss of any one broker, and goes on without it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    level: Level
    found: str
    remedy: str = ""


async def check(config: RelayConfig, queries: Queries, meta: Meta, views: Views) -> list[Finding]:
    """Everything, in the order in which it is worth mending. A Kafka that is away is a finding."""
    findings = [*of_database(await views.facts(GRANTS), meta), await _pooling(config, queries)]
    topics = await views.topics()
    try:
        cluster = await asyncio.to_thread(look, config, meta.name, topics)
    except KafkaTrouble as error:
        findings.append(Finding("Kafka", "wrong", str(error), "see to the addresses, and to TLS and SASL settings"))
    else:
        findings += of_cluster(cluster, config, meta, topics)
    return findings + await _registry(config)


def is_sound(findings: Sequence[Finding], strict: bool) -> bool:
    """The relay can work and nothing breaks the promise; `strict`: nor limits it."""
    return not any(one.level == "wrong" or (strict and one.level == "weak") for one in findings)


def guarantee(findings: Sequence[Finding]) -> str:
    """What these settings promise, in a sentence."""
    wrong = [one.what for one in findings if one.level == "wrong"]
    weak = [one.what for one in findings if one.level == "weak"]
    unknown = [one.what for one in findings if one.level == "unknown"]
    if wrong:
        return f"No guarantee, or no work at all, before this is mended: {', '.join(wrong)}"
    text = "Each committed event once, in the order of its key, whatever crashes"
    text += f"; but for what is said at: {', '.join(weak)}" if weak else ""
    return text + (f". Not known: {', '.join(unknown)}" if unknown else "")


def document_of(findings: Sequence[Finding]) -> dict[str, Any]:
    """For `--json`."""
    return {"guarantee": guarantee(findings), "findings": [asdict(one) for one in findings]}


# ---- the database ----------------------------------------------------------------------------------------------------


def of_database(facts: Mapping[str, Any], meta: Meta) -> Iterator[Finding]:
    """`facts`: as `Views.facts`."""
    yield Finding("tables", "ok", f"outbox {meta.name}, {meta.lanes} lane(s), PostgreSQL {facts['version']}")
    if meta.copied:
        yield Finding("home", "wrong", "this database is a copy", "`outbox rename`, or `relay resolve --apply --adopt`")
    if facts["standby"]:
        yield Finding("standby", "wrong", "the server is a standby: it takes no writes", "use the primary's address")
    missing = [f"{privilege} on {table}" for table, privilege in facts["missing_grants"]]
    yield _judged(
        "grants", not missing, "wrong", ", ".join(missing) or "all that `relay run` needs", "`outbox sql --roles`"
    )
    yield _judged(
        "sequence cache",
        facts["cache"] == 1,
        "wrong",
        f"CACHE {facts['cache']}",
        "ALTER TABLE … ALTER COLUMN seq SET CACHE 1: else a later transaction has a lower seq than an earlier one",
    )
    unsafe = [f"{name} = off" for name in ("fsync", "full_page_writes") if facts[name] == "off"]
    yield _judged(
        "durability", not unsafe, "weak", ", ".join(unsafe) or "fsync is on", "a crash loses what was committed"
    )
    asynchronous = [who for who, value in facts["synchronous_commit"] if value == "off"]
    yield _judged(
        "synchronous_commit",
        not asynchronous,
        "weak",
        f"off for {', '.join(asynchronous)}" if asynchronous else "on",
        "set it to on for whoever writes events: else a crash loses transactions whose events may be in Kafka",
    )
    yield from _vacuum(facts)
    yield _judged(
        "planner",
        not facts["planner"],
        "weak",
        f"a pooler keeps out the relay's settings {', '.join(facts['planner'])}"
        if facts["planner"]
        else "as it should",
        "ALTER ROLE (the relay's) SET each of them: else a large backlog may be read whole, at each fetch",
    )
    offset = facts["clock_offset"]
    yield _judged("clock", abs(offset) <= CLOCK_SECONDS, "weak", f"the database's is {offset:+.3f} s off ours", "NTP")


def _vacuum(facts: Mapping[str, Any]) -> Iterator[Finding]:
    options = facts["options"]
    changed = [f"{name} = {options.get(name)}" for name, value in AUTOVACUUM.items() if options.get(name) != value]
    off = facts["autovacuum"] == "off" or options.get("autovacuum_enabled") in ("false", "off")
    found = "off" if off else f"not as the migration set it: {', '.join(changed)}" if changed else "on, and quick"
    yield _judged("autovacuum", not off and not changed, "weak", found, "fetches pass dead rows, and slow down")
    yield _judged(
        "dead rows",
        facts["dead_rows"] < DEAD_ROWS,
        "weak",
        f"{facts['dead_rows']:,}",
        "vacuum is held back: look for long transactions, prepared ones, and replication slots at rest",
    )


async def _pooling(config: RelayConfig, queries: Queries) -> Finding:
    """A transaction pooler gives a client another server connection while someone else holds the last one."""
    who = "SELECT pg_backend_pid()"
    async with queries.connection() as one, queries.connection() as other:
        before = await one.fetchval(who)
        async with other.transaction():
            await other.fetchval(who)
            after = await one.fetchval(who)
    if before == after:
        return Finding("pooler", "ok", "none is seen, or it keeps sessions")
    prepared = "with" if config.prepared_statements else "without"
    return Finding("pooler", "ok", f"one that shares connections by transaction; {prepared} prepared statements")


def _judged(what: str, good: bool, otherwise: Level, found: str, remedy: str) -> Finding:
    return Finding(what, "ok", found) if good else Finding(what, otherwise, found, remedy)


# ---- Kafka -----------------------------------------------------------------------------------------------------------


def of_cluster(cluster: Cluster, config: RelayConfig, meta: Meta, topics: Sequence[str]) -> Iterator[Finding]:
    """`topics`: those that events of this outbox name."""
    yield Finding("Kafka", "ok", f"{cluster.brokers} broker(s)")
    yield _judged(
        "transactional ids",
        cluster.transactional is None,
        "wrong",
        cluster.transactional or f"{meta.name}.… can be opened",
        f"allow Write and Describe on transactional ids that begin with {meta.name}. ; a timeout refused: lower "
        "transaction.timeout.ms, or raise the brokers' transaction.max.timeout.ms",
    )
    yield _allowed(f"group {meta.name}", cluster.group, {"READ"})
    control = cluster.topics.get(control_topic(meta.name))
    if control is None:
        yield Finding(
            "control topic", "unknown", f"{control_topic(meta.name)} is not there: the relay makes it at its start"
        )
    else:
        yield _allowed("control topic", control.allowed, {"READ"})
    yield from _retention(cluster.settings, config)
    for name in INTERNAL:
        topic = cluster.topics.get(name, HIDDEN)
        if topic is not HIDDEN:
            yield _kept(name, topic)
    yield from _of_topics(cluster, topics)


def _of_topics(cluster: Cluster, topics: Sequence[str]) -> Iterator[Finding]:
    for name in topics:
        topic = cluster.topics.get(name)
        if topic is None:
            yield Finding(f"topic {name}", "wrong", "not there, or not shown", "make it, or its events are parked")
            continue
        yield _allowed(f"topic {name}", topic.allowed, {"WRITE"})
        if topic is not HIDDEN:
            yield _kept(name, topic)
    if not topics:
        yield Finding("topics", "unknown", "no event has named one yet, and no schema is synced")


def _allowed(what: str, operations: frozenset[str] | None, needed: set[str]) -> Finding:
    if operations is None:
        return Finding(f"{what}: rights", "unknown", "Kafka does not say, or it is not there yet")
    missing = sorted(needed - operations)
    return _judged(
        f"{what}: rights",
        not missing,
        "wrong",
        f"lacks {', '.join(missing)}" if missing else ", ".join(sorted(needed)),
        "add an ACL for this user",
    )


def _kept(name: str, topic: Topic) -> Finding:
    """Whether what a topic has acknowledged survives the loss of a broker."""
    what = f"topic {name}: copies"
    settings = topic.settings
    found = f"{topic.replicas} replica(s)"
    if not settings:
        return Finding(
            what, "unknown" if topic.replicas >= REPLICAS else "weak", found, "its settings are not shown to us"
        )
    found += f", min.insync.replicas {settings['min.insync.replicas']}"
    unclean = settings["unclean.leader.election.enable"] == "true"
    found += ", unclean leader election" if unclean else ""
    good = topic.replicas >= REPLICAS and int(settings["min.insync.replicas"]) >= IN_SYNC and not unclean
    return _judged(
        what,
        good,
        "weak",
        found,
        f"{REPLICAS} replicas, min.insync.replicas {IN_SYNC} and no unclean leader election: else a broker takes "
        "acknowledged records with it",
    )


def _retention(settings: Mapping[str, str], config: RelayConfig) -> Iterator[Finding]:
    if not settings:
        yield Finding("brokers' settings", "unknown", "not shown to this user")
        return
    forget = {
        "offsets.retention.minutes": int(settings["offsets.retention.minutes"]) * 60.0,
        "transactional.id.expiration.ms": int(settings["transactional.id.expiration.ms"]) / 1000,
    }
    short = [name for name, seconds in forget.items() if seconds < 2 * config.keepalive]
    yield _judged(
        "progress is kept",
        not short,
        "wrong",
        f"{', '.join(short)}: shorter than twice OUTBOX_KEEPALIVE" if short else "longer than OUTBOX_KEEPALIVE",
        "raise them, or lower OUTBOX_KEEPALIVE: a lane whose progress Kafka forgot halts",
    )
    verified = settings.get("transaction.partition.verification.enable", "not known to this broker")
    yield _judged(
        "transactions are verified",
        verified == "true",
        "weak",
        f"transaction.partition.verification.enable: {verified}",
        "leave it on: without it a request that comes late may be taken (docs/proof.md, KAFKA-17754)",
    )


# ---- the registry ----------------------------------------------------------------------------------------------------


async def _registry(config: RelayConfig) -> list[Finding]:
    if not config.registry:
        return []
    from outbox.errors import RegistryError, UsageError  # late: it brings SQLAlchemy
    from outbox.registry import SchemaRegistry

    def ask() -> None:
        registry = SchemaRegistry({"max.retries": 0, **config.registry_client()})
        try:
            registry.versions("relay-check")
        finally:
            registry.close()

    try:
        await asyncio.to_thread(ask)
    except (RegistryError, UsageError, OSError) as error:
        return [Finding("registry", "wrong", str(error), "see to its URL and credentials: events wait for their ids")]
    return [Finding("registry", "ok", f"{config.registry['url']} answers")]
