"""`python -m benchmarks.plots results.jsonl docs/plots`: the pictures of docs/benchmarks.md, as SVG.

The same results give the same bytes with the same matplotlib. Nothing is computed here but MB/s of the naive relay.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import click
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.report import Result, read

STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and read aloud
    "svg.hashsalt": "outbox",  # else the ids differ in each run
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
}
"""Beside matplotlib's own defaults, whatever the user's matplotlibrc says. White below, so that it can be read where a
page is dark."""

NOTHING = {"Date": None, "Creator": None}
"""Metadata that would differ from run to run and from version to version."""

COLOURS = {"relay": "#0072b2", "naive": "#d55e00", "broker": "#e69f00"}
"""Of Okabe and Ito, which people who see fewer colours tell apart, too."""

KIND_COLOURS = ("#0072b2", "#009e73", "#cc79a7")

MISSING = float("nan")
"""A bar or a point that is not there."""


def drain_backlog(result: Result) -> Figure:
    """Drain rate against the length of the backlog."""
    points = _points(result, "backlog")
    figure, (axes,) = _figure("Drain rate by length of the backlog", result)
    lengths = [one["events"] for one in points]
    _contenders(axes, lengths, points)
    _log_x(axes, lengths, "events in the backlog")
    axes.set_ylabel("events/s")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_thousands)
    axes.legend()
    return figure


def drain_payload(result: Result) -> Figure:
    """Drain rate against the payload, in events and in bytes."""
    points = _points(result, "payload")
    figure, (events, megabytes) = _figure("Drain rate by size of the payload", result, 2)
    sizes = [one["bytes"] for one in points]
    _contenders(events, sizes, points)
    _log_y(events, "events/s")
    _contenders(megabytes, sizes, points, lambda rate, one: rate * one["bytes"] / 1e6)
    megabytes.set_ylabel("MB/s of payload")
    megabytes.set_ylim(bottom=0)
    for axes in (events, megabytes):
        _log_x(axes, sizes, "bytes of payload an event")
        axes.legend()
    return figure


def latency_load(result: Result) -> Figure:
    """Latency against load."""
    loads = result["loads"]
    figure, (axes,) = _figure("Latency by load, from commit to a read_committed consumer", result)
    rates = [one["events_per_s"] for one in loads]
    for name in ("relay", "naive"):
        for figure_of, line in (("p50_ms", "-"), ("p95_ms", "--"), ("p99_ms", ":")):
            values = [one[name][figure_of] if name in one else MISSING for one in loads]
            label = f"{name} {figure_of.removesuffix('_ms')}"
            axes.plot(rates, values, line, marker="o", markersize=3, color=COLOURS[name], label=label)
    _log_x(axes, rates, "events/s written")
    _log_y(axes, "latency, ms")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # beside: six lines leave no free place for sure
    return figure


def held_snapshot(result: Result) -> Figure:
    """Drain rate by round while transactions are open, one line a kind."""
    kinds = result["kinds"]
    figure, (axes,) = _figure("Drain rate while transactions stay open: no deleted row can be vacuumed", result)
    for (kind, one), colour in zip(kinds.items(), KIND_COLOURS, strict=False):
        axes.plot(range(1, len(one["rounds"]) + 1), one["rounds"], "-o", markersize=4, color=colour, label=kind)
    axes.set_xlabel(f"round, of {result['events']:,} events")
    axes.set_xticks(range(1, max(len(one["rounds"]) for one in kinds.values()) + 1))
    axes.set_ylabel("events/s")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_thousands)
    axes.legend(title="open transactions")
    return figure


def compression(result: Result) -> Figure:
    """Bytes and CPU an event, by codec, in large and in small transactions."""
    codecs = list(dict.fromkeys(one["codec"] for one in result["codecs"]))
    sizes = list(dict.fromkeys(one["batch_rows"] for one in result["codecs"]))
    found = {(one["codec"], one["batch_rows"]): one for one in result["codecs"]}
    figure, (size, cpu) = _figure("Compression of the platform's own events", result, 2)
    bars, shares = {}, {}
    for rows, fill in zip(sizes, ("", "////"), strict=False):
        of_codec = [found[codec, rows] for codec in codecs]
        label = f"{rows:,} events a transaction"
        bars[label] = ("#0072b2", fill, [one["bytes_per_event"] for one in of_codec])
        for process in ("relay", "broker"):
            spent = [one["cpu_us_per_event"][process] for one in of_codec]
            shares[f"{process}, {rows:,} a transaction"] = (COLOURS[process], fill, spent)
    _bars(size, codecs, bars, "bytes of log an event")
    _bars(cpu, codecs, shares, "CPU, µs an event")
    return figure


PLOTS: Mapping[str, tuple[str, Callable[[Result], Figure]]] = {
    "drain-backlog": ("sweep", drain_backlog),
    "drain-payload": ("sweep", drain_payload),
    "latency-load": ("load", latency_load),
    "held-snapshot": ("held-snapshot", held_snapshot),
    "compression": ("compression", compression),
}
"""Each file, the benchmark that it shows, and how it is drawn."""


def _points(result: Result, what: str) -> list[Result]:
    return [one for one in result["points"] if one["what"] == what]


def _figure(title: str, result: Result, panels: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """With so many axes side by side, and where the figures come from below."""
    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    figure.suptitle(f"{title} (quick sizes: it says nothing)" if result.get("quick") else title, fontsize=11)
    host = result["host"]
    source = f"{host['cores']} cores of {host['cpu']}, commit {result['commit']}, {result['at'][:10]}"
    figure.supxlabel(source, fontsize=7, color="#555555", x=0.99, ha="right")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _contenders(
    axes: Axes,
    x: Sequence[int],
    points: Sequence[Result],
    y: Callable[[float, Result], float] = lambda rate, _: rate,
) -> None:
    """A line of ours and one of the naive relay, where that was measured."""
    for name, column in (("relay", "events_per_s"), ("naive", "naive_events_per_s")):
        values = [MISSING if one[column] is None else y(one[column], one) for one in points]
        axes.plot(x, values, "-o", markersize=4, color=COLOURS[name], label=name)


def _log_x(axes: Axes, values: Sequence[int], label: str) -> None:
    """A logarithmic axis that names what was measured, and nothing in between."""
    axes.set_xscale("log")
    axes.set_xticks(values, labels=[f"{value:,}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def _log_y(axes: Axes, label: str) -> None:
    """A logarithmic axis with 1, 2 and 5 of each power of ten: with tens alone a reader has to guess."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(_thousands)
    axes.set_ylabel(label)


def _bars(axes: Axes, groups: Sequence[str], series: Mapping[str, tuple[str, str, Sequence[Any]]], label: str) -> None:
    """Bars of all series side by side in each group: colour, hatch and values. None: not measured."""
    width = 0.8 / len(series)
    for number, (name, (colour, hatch, values)) in enumerate(series.items()):
        places = [group + (number - (len(series) - 1) / 2) * width for group in range(len(groups))]
        heights = [MISSING if value is None else value for value in values]
        axes.bar(places, heights, width, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=name)
    axes.set_xticks(range(len(groups)), labels=groups)
    axes.set_xlabel("codec")
    axes.set_ylabel(label)
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.3)  # room for the legend
    axes.legend(fontsize=8)


_thousands = FuncFormatter(lambda value, _: f"{value:,g}")


@click.command()
@click.argument("lines", type=click.File(encoding="utf-8"))
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(lines: TextIO, folder: Path) -> None:
    """Draw LINES, a file of `python -m benchmarks` output, into FOLDER: an SVG a plot.

    A plot whose benchmark is not among the results is left out.
    """
    results = read(lines)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (bench, draw) in PLOTS.items():
        if bench not in results:
            click.echo(f"{name}.svg is left out: there is no line of the benchmark {bench}", err=True)
            continue
        with matplotlib.style.context(STYLE, after_reset=True):
            draw(results[bench]).savefig(folder / f"{name}.svg", format="svg", metadata=NOTHING)
        click.echo(folder / f"{name}.svg")


if __name__ == "__main__":
    main()
