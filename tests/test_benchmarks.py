"""The benchmarks' own arithmetic: a figure is worth what its computation is worth. Nothing is timed here."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import machine
from benchmarks.__main__ import BENCHMARKS, LONG, chosen, flaws
from benchmarks.budget import shares
from benchmarks.figures import (
    Mark,
    Tally,
    added,
    arrival_times,
    difference,
    key_of,
    percentile,
    steady_rate,
    summary,
    tally,
)
from benchmarks.report import CLAIMS, GOALS, main, report
from benchmarks.sweep import flat


def arrivals(*numbers: int) -> list[tuple[int, bytes]]:
    return [(number, key_of(number)) for number in numbers]


@pytest.mark.parametrize(("share", "expected"), [(0, 1), (0.5, 50), (0.95, 95), (0.99, 99), (0.991, 100), (1, 100)])
def test_percentile_is_the_nearest_rank(share: float, expected: float) -> None:
    assert percentile(range(100, 0, -1), share) == expected


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_percentile_is_the_smallest_measured_value_that_the_share_does_not_exceed(
    values: list[float], share: float
) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) <= share * len(values)


def test_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="of 0 values"):
        percentile([], 0.5)


def test_summary_is_in_milliseconds() -> None:
    assert summary([0.001, 0.002]) == {"p50_ms": 1.0, "p95_ms": 2.0, "p99_ms": 2.0, "max_ms": 2.0}


def test_whatever_comes_once_in_the_order_of_its_key_is_flawless() -> None:
    assert tally(4, arrivals(3, 1, 4, 2)).flawless  # four keys: their order among each other says nothing


def test_lost_events_are_counted() -> None:
    assert tally(4, arrivals(1, 4)) == Tally(lost=2, doubled=0, reordered=0, strangers=0)


def test_repeats_are_doubled_and_not_reordered() -> None:
    assert tally(1_001, arrivals(*range(1, 1_002), 1, 1)) == Tally(lost=0, doubled=2, reordered=0, strangers=0)


def test_an_event_behind_a_later_one_of_its_key_is_reordered() -> None:
    assert tally(1_001, arrivals(*range(2, 1_002), 1)).reordered == 1
    assert tally(3_001, arrivals(3_001, 1, 1_001, 2_001)).reordered == 3


def test_what_was_never_written_is_a_stranger() -> None:
    assert tally(2, [(1, key_of(1)), (2, b"key-1"), (3, key_of(3)), (0, key_of(0))]) == Tally(1, 0, 0, 3)


@given(st.integers(1, 50), st.data())
def test_every_arrival_is_counted_once(count: int, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(-2, count + 2)))
    found = tally(count, arrivals(*numbers))
    assert count - found.lost + found.doubled + found.strangers == len(numbers)


def test_tallies_add_up() -> None:
    assert added([Tally(1, 2, 3, 4), Tally(10, 20, 30, 40)]) == Tally(11, 22, 33, 44)


def test_steady_rate_leaves_out_the_first_chunk_and_what_came_behind_the_last_event() -> None:
    marks = [Mark(100, 1_000_000_000), Mark(600, 2_000_000_000), Mark(1_100, 3_000_000_000), Mark(1_101, 9_000_000_000)]
    assert steady_rate(1_100, marks) == 500


def test_steady_rate_of_less_than_two_chunks_is_nothing() -> None:
    assert steady_rate(10, []) == steady_rate(10, [Mark(10, 1)]) == 0


def test_steady_rate_counts_what_came_when_some_were_lost() -> None:
    assert steady_rate(1_000, [Mark(100, 0), Mark(600, 1_000_000_000)]) == 500


def test_an_event_arrives_with_the_first_chunk_that_brings_it() -> None:
    assert arrival_times([7, 8, 7, 9], [Mark(2, 10), Mark(4, 20)]) == {7: 10, 8: 10, 9: 20}


def test_cpu_of_a_process_that_cannot_be_read_is_unknown() -> None:
    assert difference({"relay": 1.0, "broker": None, "gone": 1.0}, {"relay": 1.5, "broker": 2.0}) == {
        "relay": 0.5,
        "broker": None,
        "gone": None,
    }
    assert machine.cpu_seconds(None) is None


def test_only_chooses_benchmarks_and_refuses_unknown_names() -> None:
    assert chosen("latency, relay") == ["relay", "latency"]
    assert chosen("") == [name for name in BENCHMARKS if name not in LONG]
    with pytest.raises(Exception, match=r"no benchmark layency\. There are: write"):
        chosen("layency,relay")


def test_flaws_of_ours_are_found_anywhere_and_those_of_the_naive_relay_are_not_ours() -> None:
    ours, naive = asdict(Tally(1, 0, 0, 0)), asdict(Tally(0, 5, 0, 0))
    assert flaws({"lost": 0, "naive": naive}) == 0
    assert flaws({"loads": [{"relay": ours, "naive": naive}, {"relay": ours}]}) == 2


HELD = {
    "events_per_s": 150_000,
    "rounds": [200_000, 100_000],
    "relay_cpu_us_per_event": 4.5,
    "cpu_s": {"relay": 0.5, "broker": None, "database": 0.3, "reader": 0.1},
    "relay_peak_mb": 80.5,
    "lost": 0,
    "doubled": 0,
    "reordered": 0,
    "strangers": 0,
    "last_to_first": 0.5,
    "table_mb": 12.5,
}

RESULTS: list[dict[str, Any]] = [
    {
        "bench": "held-snapshot",
        "events": 1_000,
        "kinds": {"snapshot": HELD, "long writer": {**HELD, "last_to_first": 0.9}},
        "host": {"cores": 2, "cpu": "Z80", "memory_gb": 1, "system": "CP/M", "load": 0.1},
        "versions": {"python": "3.11"},
        "settings": {"fsync": "on"},
        "commit": "abc",
        "at": "2026-01-01",
    }
]


def test_the_report_names_every_goal_and_what_was_missed() -> None:
    text = report({result["bench"]: result for result in RESULTS})
    assert "| held snapshot: last round to first | 0.5 | ≥ 0.8 | missed |" in text
    assert text.count("not measured") == len(GOALS) - 1 + len(CLAIMS)
    found = "150,000 | 200,000 100,000 | 4.5 | 0.5, None, 0.3, 0.1 | 80.5 | 0, 0, 0"
    assert f"| snapshot | {found} | 0.5 | 12.5 |" in text
    assert f"| long writer | {found} | 0.9 | 12.5 |" in text


def load(relays_cores: float | None, **figures: float) -> dict[str, Any]:
    return {"relay": {**figures, "cores": {"relay": relays_cores}}}


def test_goals_of_latency_and_of_the_sweep_say_what_was_missed() -> None:
    low, high = load(0.16, p50_ms=5.0, p99_ms=10.1), load(0.4, p50_ms=7.1, p95_ms=11.0, p99_ms=15.0)
    backlogs = [{"what": "backlog", "events_per_s": 100_000, "peak_mb": peak} for peak in (70.5, None, 80.1)]
    lanes = [
        {"what": "lanes, relays", "value": value, "events_per_s": rate, "peak_mb": None}
        for value, rate in (("1, 1", 100_000), ("2, 1", 1), ("2, 2", 99_000))
    ]
    results: dict[str, dict[str, Any]] = {"latency": {"loads": [low, high]}, "sweep": {"points": [*backlogs, *lanes]}}
    assert [goal.row(results) for goal in GOALS if goal.bench in results] == [
        ["latency at 100/s: p50", "5.0 ms", "≤ 5 ms", "met"],
        ["latency at 100/s: p99", "10.1 ms", "≤ 10 ms", "missed"],
        ["latency at 100/s: the relay's CPU", "0.16 cores", "≤ 0.15 cores", "missed"],
        ["latency at 2,000/s: p50", "7.1 ms", "≤ 7 ms", "missed"],
        ["latency at 2,000/s: p95", "11.0 ms", "≤ 11 ms", "met"],
        ["latency at 2,000/s: p99", "15.0 ms", "≤ 15 ms", "met"],
        ["backlogs of 10k to 5M: slowest to fastest", "1.0", "≥ 0.9", "met"],
        ["backlogs of 10k to 5M: peak memory", "80.1 MB", "≤ 80 MB", "missed"],
        ["two relays on two lanes to one on one", "0.99", "≥ 1", "missed"],
    ]


def codecs(**sizes: float | None) -> list[dict[str, Any]]:
    return [
        {"codec": codec, "batch_rows": rows, "bytes_per_event": size}
        for rows in (8_000, 100)
        for codec, size in sizes.items()
    ]


def test_each_claim_of_the_platform_is_measured_with_its_source_and_judged() -> None:
    results: dict[str, dict[str, Any]] = {
        "sustained": {"loads": [load(0.9, p95_ms=25.5, achieved_events_per_s=9_999.5)]},
        "write": {"ways": {"session_psycopg": {"with_one_p99_ms": 10.5}}},
        "compression": {"codecs": codecs(none=400.0, lz4=140.0, zstd=100.0, gzip=None)},
        "idle": {"peak_mb": {"relay": 53.6}},
        "relay": {"relay_peak_mb": 83.3},
        "latency": {"loads": [load(0.06)], "host": {"cores": 2}},
    }
    large = "`compression`: bytes of log, in large transactions; lz4 is judged"
    assert [claim.row(results) for claim in CLAIMS] == [
        [
            "≥ 10,000 messages/s",
            "9,999.5/s",
            "`sustained`: written and relayed, 10,000/s offered by 20 writers",
            "met",
        ],
        ["< 100 ms p95 end to end", "25.5 ms", "`sustained`: p95 from commit to consumer at this load", "met"],
        [
            "< 10 ms p99 in the writer",
            "10.5 ms",
            "`write`: p99 of a transaction with one event by `session_psycopg`",
            "missed",
        ],
        ["60–70 % smaller by compression", "lz4 65.0 %, zstd 75.0 %", large, "met"],
        ["~50 MB a process", "53.6 MB", "`idle`: peak of an idle relay", "met"],
        ["~50 MB a process", "83.3 MB", "`relay`: peak of a relay that drains", "missed"],
        ["< 5 % of the CPU under normal load", "6.0 %", "`latency`: the relay at 100/s, of one core", "missed"],
        ["< 5 % of the CPU under normal load", "3.0 %", "`latency`: the relay at 100/s, of this machine", "met"],
    ]


def test_a_claim_is_not_judged_where_its_figure_cannot_be_read() -> None:
    latency = {"loads": [load(None)], "host": {"cores": 2}}
    results: dict[str, dict[str, Any]] = {"compression": {"codecs": codecs(none=None, lz4=None)}, "latency": latency}
    rows = [claim.row(results) for claim in CLAIMS if claim.goal.bench in results]
    assert [(row[1], row[3]) for row in rows] == [("cannot be read here", "")] * 3


def test_the_report_shows_each_way_to_write_and_where_its_time_goes() -> None:
    way = {
        "without_ms": 1.0,
        "with_one_ms": 1.5,
        "with_one_p99_ms": 9.5,
        "added_percent": 50.0,
        "added_us": 500.0,
        "with_100_ms": 4.0,
        "us_per_event_of_100": 30.0,
        "events_per_s": 25_000,
    }
    step = {"step": "INSERT", "events": 100, "us": 9.5, "bound": "a round trip", "bound_us": 1.5}
    write = {
        **RESULTS[0],
        "bench": "write",
        "transactions": 400,
        "added_percent": 50.0,
        "us_per_event_of_100": 30.0,
        "ways": {"asyncpg": way, "session_psycopg": way},
        "steps": [step],
    }
    text = report({"write": write})
    assert "| < 10 ms p99 in the writer | 9.5 ms | `write`: p99 of a transaction with one event by" in text
    assert "| write: each of 100 by asyncpg | 30.0 µs | ≤ 12 µs | missed |" in text
    assert "| `asyncpg` | 1.0 | 1.5 | 50.0 | 500.0 | 4.0 | 30.0 | 25,000 |" in text
    assert "| INSERT, of 100 event(s) | 9.5 | a round trip | 1.5 |" in text


def test_the_report_shows_what_a_consumer_takes_in_batches_and_one_by_one() -> None:
    way = {"events_per_s": 31_000, "rounds": [30_000, 31_000], "cpu_s": {"consumer": 4.5, "broker": None}, "lost": 0}
    one = {**way, "events_per_s": 900}
    consumer = {**RESULTS[0], "bench": "consumer", "batch": 500, "ways": {"batches": way, "one by one, 8 at once": one}}
    text = report({"consumer": consumer})
    assert "| consumer: events a second in batches | 31,000 | ≥ 30,000 | met |" in text
    assert "| consumer: one by one, 8 keys at once | 900 | ≥ 1,200 | missed |" in text
    assert "| batches | 31,000 | 30,000 31,000 | consumer 4.5, broker None | 0 |" in text


def test_samples_of_the_event_loops_thread_are_told_apart_by_the_first_part_that_has_one_of_their_frames() -> None:
    cycle = "thread (7): MainThread;run (relay/__main__.py:9);_Cycle._produce (relay/worker.py:1)"
    assert shares(
        [
            f"{cycle};Records.produce (relay/record.py:2) 2",
            f"{cycle};Records.produce (relay/record.py:2);Producer_produce (cimpl.so);rd_kafka_producev (rd.so) 1",
            f"{cycle};Records.produce (relay/record.py:2);Producer_produce (cimpl.so) 4",
            "thread (7): MainThread;run (relay/__main__.py:9);uv_run (core.c) 1",
            "thread (8): kafka_0;rd_kafka_flush (librdkafka.so) 100",
        ]
    ) == {
        "produce: confluent-kafka, from Python to C": 50.0,
        "produce: the record in Python": 25.0,
        "produce: librdkafka": 12.5,
        "event loop": 12.5,
    }


def test_the_report_shows_the_budget_of_an_event_step_by_step() -> None:
    budget = {
        **RESULTS[0],
        "bench": "budget",
        "events_per_s": 150_000,
        "cpu_us_per_event": {"relay": 4.5, "database": 3.0},
        "wal_bytes_per_event": {"written": 450, "drained": 60},
        "threads_us_per_event": {"relay": {"event loop": 2.5, "librdkafka": 2.0}},
        "statements": [
            {"statement": "fetch", "calls_per_1000_events": 0.13, "us_per_event": 1.5, "wal_bytes_per_event": 0}
        ],
        "profile": None,
        "steps": [
            {"step": "a bare COPY", "server": "database", "here_us_per_event": 0.5, "server_us_per_event": 1.25},
            {"step": "records", "server": None, "here_us_per_event": 0.4, "server_us_per_event": None},
        ],
    }
    text = report({"budget": budget})
    assert "CPU, µs an event: relay 4.5, database 3. WAL, bytes an event: 450 by the writer's INSERT, 60" in text
    assert "| relay | event loop 2.5, librdkafka 2 |" in text
    assert "| fetch | 0.13 | 1.5 | 0 |" in text
    assert "| a bare COPY | 0.5 | 1.25 | database |" in text
    assert "| records | 0.4 |  |  |" in text
    assert "by py-spy" not in text
    assert "by py-spy: event loop 25 %." in report({"budget": {**budget, "profile": {"event loop": 25.0}}})


def test_threads_of_this_process_are_seen_with_their_cpu() -> None:
    seen = {number: seconds for number, _, seconds in machine.threads(os.getpid())}
    assert seen[os.getpid()] > 0 if sys.platform == "linux" else not seen
    assert machine.threads(None) == []


def test_backlogs_are_flat_by_the_slowest_length_to_the_fastest() -> None:
    points = [{"what": "backlog", "events_per_s": rate} for rate in (100_000, 80_000, 90_000)]
    assert flat([*points, {"what": "keys", "events_per_s": 1}]) == 0.8


def test_the_report_reads_a_file_of_lines(tmp_path: Path) -> None:
    lines = tmp_path / "results.jsonl"
    lines.write_text("\n".join(json.dumps(result) for result in RESULTS))
    done = CliRunner().invoke(main, [str(lines)])
    assert done.exit_code == 0
    assert "Z80" in done.output
    lines.write_text("nothing\n")
    assert "no JSON line" in CliRunner().invoke(main, [str(lines)]).output
