"""What a consumer counts, in this process; `collector` shows it to prometheus_client (the extra `metrics`).

Names: `outbox_consumer_…`, base units (seconds, bytes), counters end in `_total`. Every one has the label `consumer`.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds."""


class Histogram:
    """Durations, as Prometheus wants them: how many were at most so long."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds

    def cumulated(self) -> list[tuple[str, float]]:
        """Upper bound and count, as HistogramMetricFamily takes them."""
        bounds, so_far, pairs = [*map(str, BUCKETS), "+Inf"], 0, []
        for bound, count in zip(bounds, self.counts, strict=True):
            so_far += count
            pairs.append((bound, float(so_far)))
        return pairs


class Metrics:
    """Counters by topic, (topic, reason) or (topic, partition). Written by the consumer's loop, read by anyone."""

    def __init__(self, consumer: str) -> None:
        self.consumer = consumer
        self.received: Counter[str] = Counter()
        """Messages that Kafka delivered."""
        self.processed: Counter[str] = Counter()
        """Events whose effect was committed."""
        self.duplicates: Counter[str] = Counter()
        """Events that the inbox knew."""
        self.skipped: Counter[tuple[str, str]] = Counter()
        """Messages that are nobody's: an unknown type, no handler for it, a tombstone."""
        self.retries: Counter[str] = Counter()
        """Attempts after the first one, of a handler that had failed."""
        self.dead: Counter[tuple[str, str]] = Counter()
        """Messages that became dead ones, by reason."""
        self.trouble: Counter[str] = Counter()
        """Times that the database, Kafka or the registry was in the way; nothing is parked for it."""
        self.handler: dict[str, Histogram] = {}
        """Seconds of each call of a handler."""
        self.lag: dict[tuple[str, int], int] = {}
        """Messages between what is done and the end, of the partitions that are ours."""
        self.oldest_ms: dict[tuple[str, int], int] = {}
        """Kafka's timestamp of the oldest message in hand."""
        self.in_hand: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """Messages and bytes."""

    def took(self, topic: str, seconds: float) -> None:
        """A handler's call has ended, well or not."""
        found = self.handler.get(topic)
        if found is None:
            found = self.handler[topic] = Histogram()
        found.observe(seconds)


class _Collector:
    """Metric families, made at each scrape."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Any]:
        """For prometheus_client's registry."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        own, name = self._metrics, self._metrics.consumer
        counters: list[tuple[str, str, Counter[Any], list[str]]] = [
            ("received", "Messages that Kafka delivered", own.received, ["topic"]),
            ("processed", "Events whose effect was committed", own.processed, ["topic"]),
            ("duplicates", "Events that the inbox knew", own.duplicates, ["topic"]),
            ("skipped", "Messages that are nobody's", own.skipped, ["topic", "reason"]),
            ("retries", "Attempts after a handler had failed", own.retries, ["topic"]),
            ("dead_messages", "Messages that became dead ones", own.dead, ["topic", "reason"]),
            ("trouble", "Times that another server was in the way", own.trouble, ["server"]),
        ]
        for suffix, text, values, labels in counters:
            family = CounterMetricFamily(f"outbox_consumer_{suffix}", text, labels=["consumer", *labels])
            for key, value in list(values.items()):
                family.add_metric([name, *_labels(key)], value)
            yield family
        now = time.time()
        ages = {place: max(0.0, now - sent / 1000) for place, sent in list(own.oldest_ms.items())}
        gauges: list[tuple[str, str, dict[Any, Any], list[str]]] = [
            ("lag", "Messages between what is done and the end", dict(own.lag), ["topic", "partition"]),
            ("oldest_unprocessed_age_seconds", "Age of the oldest message in hand", ages, ["topic", "partition"]),
            ("in_hand_messages", "Messages in hand", {(): own.in_hand()[0]}, []),
            ("in_hand_bytes", "Bytes in hand", {(): own.in_hand()[1]}, []),
        ]
        for suffix, text, found, labels in gauges:
            gauge = GaugeMetricFamily(f"outbox_consumer_{suffix}", text, labels=["consumer", *labels])
            for key, value in found.items():
                gauge.add_metric([name, *_labels(key)], value)
            yield gauge
        times = HistogramMetricFamily(
            "outbox_consumer_handler_seconds", "Seconds of a handler's call", labels=["consumer", "topic"]
        )
        for topic, histogram in list(own.handler.items()):
            times.add_metric([name, topic], histogram.cumulated(), histogram.total)
        yield times


def collector(metrics: Metrics) -> Any:
    """For `prometheus_client.REGISTRY.register`. Each scrape reads the counters; nothing is paid in between."""
    return _Collector(metrics)


def _labels(key: Any) -> list[str]:
    return [str(part) for part in key] if isinstance(key, tuple) else [str(key)]
