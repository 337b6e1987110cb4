"""`relay check`: each thing that breaks or limits the promise is found, by its name and with a remedy."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest

from outbox import roles
from relay.check import GRANTS, Finding, guarantee, is_sound, of_cluster, of_database
from relay.cluster import HIDDEN, INTERNAL, Cluster, Topic
from relay.config import RelayConfig
from relay.queries import Meta

CONFIG = RelayConfig(database_url="postgresql://h/d", kafka={"bootstrap.servers": "k:1"})
META = Meta("orders", UUID(int=1), 1)
SAFE = {"min.insync.replicas": "2", "unclean.leader.election.enable": "false"}
ALL = frozenset({"READ", "WRITE", "DESCRIBE"})
SOUND = Topic(1, 3, SAFE, ALL)
CLUSTER = Cluster(
    brokers=3,
    topics=dict.fromkeys(["orders", "orders.lanes", *INTERNAL], SOUND),
    settings={
        "offsets.retention.minutes": "10080",
        "transactional.id.expiration.ms": "604800000",
        "transaction.partition.verification.enable": "true",
    },
    group=ALL,
)
FACTS: dict[str, Any] = {
    "version": "18.0",
    "standby": False,
    "fsync": "on",
    "full_page_writes": "on",
    "autovacuum": "on",
    "cache": 1,
    "options": {
        "autovacuum_vacuum_scale_factor": "0",
        "autovacuum_vacuum_threshold": "10000",
        "autovacuum_vacuum_cost_delay": "0",
    },
    "dead_rows": 0,
    "clock_offset": 0.0,
    "planner": [],
    "synchronous_commit": [("this user", "on")],
    "missing_grants": [],
}


def not_ok(findings: Any) -> list[tuple[str, str]]:
    return [(one.what, one.level) for one in findings if one.level != "ok"]


def of(cluster: Cluster) -> list[tuple[str, str]]:
    return not_ok(of_cluster(cluster, CONFIG, META, ["orders"]))


def without(name: str) -> Mapping[str, Topic]:
    return {topic: value for topic, value in CLUSTER.topics.items() if topic != name}


def with_orders(topic: Topic) -> Cluster:
    return replace(CLUSTER, topics={**CLUSTER.topics, "orders": topic})


def test_a_sound_database_and_cluster_are_sound_in_every_point() -> None:
    assert not_ok(of_database(FACTS, META)) == []
    assert of(CLUSTER) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"standby": True}, ("standby", "wrong")),
        ({"cache": 50}, ("sequence cache", "wrong")),
        ({"missing_grants": [("outbox", "DELETE")]}, ("grants", "wrong")),
        ({"fsync": "off"}, ("durability", "weak")),
        ({"full_page_writes": "off"}, ("durability", "weak")),
        ({"synchronous_commit": [("this user", "on"), ("role app", "off")]}, ("synchronous_commit", "weak")),
        ({"autovacuum": "off"}, ("autovacuum", "weak")),
        ({"options": {**FACTS["options"], "autovacuum_enabled": "false"}}, ("autovacuum", "weak")),
        ({"planner": ["enable_seqscan = off"]}, ("planner", "weak")),
        ({"options": {}}, ("autovacuum", "weak")),
        ({"dead_rows": 5_000_000}, ("dead rows", "weak")),
        ({"clock_offset": -60.0}, ("clock", "weak")),
    ],
)
def test_what_is_amiss_in_the_database_is_named(change: dict[str, Any], found: tuple[str, str]) -> None:
    assert not_ok(of_database({**FACTS, **change}, META)) == [found]


def test_a_copy_is_named() -> None:
    assert not_ok(of_database(FACTS, replace(META, copied=True))) == [("home", "wrong")]


@pytest.mark.parametrize(
    ("cluster", "found"),
    [
        (replace(CLUSTER, transactional="refused"), ("transactional ids", "wrong")),
        (replace(CLUSTER, group=frozenset({"DESCRIBE"})), ("group orders: rights", "wrong")),
        (replace(CLUSTER, group=frozenset()), ("group orders: rights", "wrong")),
        (replace(CLUSTER, group=None), ("group orders: rights", "unknown")),
        (replace(CLUSTER, topics=without("orders")), ("topic orders", "wrong")),
        (with_orders(HIDDEN), ("topic orders: rights", "wrong")),
        (replace(CLUSTER, topics={**CLUSTER.topics, "orders.lanes": HIDDEN}), ("control topic: rights", "wrong")),
        (replace(CLUSTER, topics={**CLUSTER.topics, **dict.fromkeys(INTERNAL, HIDDEN)}), None),
        (replace(CLUSTER, topics=without("orders.lanes")), ("control topic", "unknown")),
        (replace(CLUSTER, settings={}), ("brokers' settings", "unknown")),
        (
            replace(CLUSTER, settings={**CLUSTER.settings, "offsets.retention.minutes": "60"}),
            ("progress is kept", "wrong"),
        ),
        (
            replace(CLUSTER, settings={**CLUSTER.settings, "transaction.partition.verification.enable": "false"}),
            ("transactions are verified", "weak"),
        ),
        (with_orders(replace(SOUND, allowed=frozenset({"READ"}))), ("topic orders: rights", "wrong")),
        (with_orders(replace(SOUND, replicas=1)), ("topic orders: copies", "weak")),
        (with_orders(replace(SOUND, settings={**SAFE, "min.insync.replicas": "1"})), ("topic orders: copies", "weak")),
        (
            with_orders(replace(SOUND, settings={**SAFE, "unclean.leader.election.enable": "true"})),
            ("topic orders: copies", "weak"),
        ),
        (with_orders(replace(SOUND, settings={})), ("topic orders: copies", "unknown")),
    ],
)
def test_what_is_amiss_in_kafka_is_named(cluster: Cluster, found: tuple[str, str] | None) -> None:
    assert of(cluster) == ([found] if found else [])


def test_the_sentence_says_what_is_promised_and_the_code_whether_the_relay_can_work() -> None:
    fine, weak, wrong = Finding("a", "ok", ""), Finding("b", "weak", ""), Finding("c", "wrong", "")
    assert (guarantee([fine])[:20], is_sound([fine], strict=True)) == ("Each committed event", True)
    assert guarantee([fine, weak]).endswith("but for what is said at: b")
    assert (is_sound([weak], strict=False), is_sound([weak], strict=True)) == (True, False)
    assert (guarantee([weak, wrong])[:12], is_sound([wrong], strict=False)) == ("No guarantee", False)


def test_the_grants_that_are_asked_for_are_those_that_the_role_gets() -> None:
    """`relay resolve --adopt` alone needs the UPDATE of meta."""
    given = {
        table: tuple(parts["relay"].removesuffix(", UPDATE (home)").split(", "))
        for table, parts in roles._GRANTS.items()
        if "relay" in parts
    }
    assert given == GRANTS
