"""The benchmarks' plots, of results that were never measured."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from click.testing import CliRunner, Result

from benchmarks.plots import PLOTS, main

FROM = {"host": {"cores": 2, "cpu": "Z80"}, "commit": "abc", "at": "2026-01-01T00:00:00+00:00"}


def point(what: str, events: int, size: int, rate: int, naive: int | None) -> dict[str, Any]:
    return {"what": what, "events": events, "bytes": size, "events_per_s": rate, "naive_events_per_s": naive}


def latencies(factor: float) -> dict[str, float]:
    return {"p50_ms": 5 * factor, "p95_ms": 7 * factor, "p99_ms": 15 * factor}


def codec(name: str, rows: int, size: float | None, relay: float | None) -> dict[str, Any]:
    spent = {"relay": relay, "broker": None, "database": 3.0}
    return {"codec": name, "batch_rows": rows, "bytes_per_event": size, "cpu_us_per_event": spent}


SWEEP = {
    "bench": "sweep",
    "points": [
        point("backlog", 10_000, 200, 140_000, 80_000),
        point("backlog", 1_000_000, 200, 150_000, None),
        point("payload", 100_000, 100, 160_000, 90_000),
        point("payload", 2_000, 100_000, 2_000, 1_500),
        point("keys", 100_000, 200, 1, 1),
    ],
    **FROM,
}
LOAD = {
    "bench": "load",
    "loads": [
        {"events_per_s": 500, "relay": latencies(1), "naive": latencies(2)},
        {"events_per_s": 20_000, "relay": latencies(30)},
    ],
    **FROM,
}
HELD = {
    "bench": "held-snapshot",
    "events": 1_000,
    "kinds": {"snapshot": {"rounds": [200_000, 190_000]}, "both": {"rounds": [180_000, 170_000]}},
    "quick": True,
    **FROM,
}
COMPRESSION = {
    "bench": "compression",
    "codecs": [
        codec("none", 8_000, 402.5, 5.0),
        codec("lz4", 8_000, 180.0, 5.5),
        codec("none", 100, 480.0, None),
        codec("lz4", 100, None, 6.0),
    ],
    **FROM,
}


def drawn(folder: Path, *results: dict[str, Any]) -> Result:
    lines = folder.parent / "results.jsonl"
    lines.write_text("\n".join(json.dumps(result) for result in results))
    return CliRunner().invoke(main, [str(lines), str(folder)], catch_exceptions=False)


def texts(svg: Path) -> set[str]:
    return {element.text or "" for element in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")}  # noqa: S314 - our own file


def test_the_plots_say_what_they_show_and_in_which_units(tmp_path: Path) -> None:
    assert drawn(tmp_path / "plots", SWEEP, LOAD, HELD, COMPRESSION).exit_code == 0
    said = {name: texts(tmp_path / "plots" / f"{name}.svg") for name in PLOTS}
    source = "2 cores of Z80, commit abc, 2026-01-01"
    assert all(source in one for one in said.values())
    assert said["drain-backlog"] >= {
        *("Drain rate by length of the backlog", "events in the backlog", "events/s", "relay", "naive"),
        *("10,000", "1,000,000"),
    }
    assert said["drain-payload"] >= {"bytes of payload an event", "events/s", "MB/s of payload", "100", "100,000"}
    assert said["latency-load"] >= {"events/s written", "latency, ms", "relay p50", "naive p99", "500", "20,000"}
    assert said["held-snapshot"] >= {"round, of 1,000 events", "events/s", "snapshot", "both"}
    assert any("quick sizes: it says nothing" in text for text in said["held-snapshot"])
    assert said["compression"] >= {
        *("codec", "bytes of log an event", "CPU, µs an event", "none", "lz4"),
        *("8,000 events a transaction", "relay, 8,000 a transaction", "broker, 100 a transaction"),
    }


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        drawn(tmp_path / folder, SWEEP, LOAD, HELD, COMPRESSION)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert set(one) == {f"{name}.svg" for name in PLOTS}


def test_a_plot_whose_benchmark_was_not_run_is_left_out_and_said(tmp_path: Path) -> None:
    done = drawn(tmp_path / "plots", HELD)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["held-snapshot.svg"]
    assert done.stdout == f"{tmp_path / 'plots' / 'held-snapshot.svg'}\n"
    assert "drain-payload.svg is left out: there is no line of the benchmark sweep" in done.stderr
    assert "latency-load.svg is left out: there is no line of the benchmark load" in done.stderr
