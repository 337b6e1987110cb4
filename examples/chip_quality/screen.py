"""What the demo shows: figures that move on a terminal, plain lines elsewhere, and the table at the end."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 2.0
"""Between two lines of figures where there is no terminal."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The moment's numbers, read from the databases."""

    committed: int
    waiting: int
    counted: int
    batch: int
    owner: str


@dataclass(frozen=True, slots=True)
class Check:
    """A line of the final table. `right` is None where the figure is only told."""

    what: str
    figure: str
    right: bool | None = None


class Screen:
    """Figures and happenings while the demo runs. A context manager: it gives the terminal back at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=8, transient=False) if console.is_terminal else None
        self._said: list[str] = []
        self._figures: Figures | None = None
        self._started = time.monotonic()
        self._printed = 0.0

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """The terminal is free for other output; safe to repeat."""
        if self._live:
            self._live.stop()

    @property
    def seconds(self) -> float:
        """Since this screen was made."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """Something happened."""
        line = f"{self.seconds:5.1f} s  {text}"
        self._said.append(line)
        if self._live:
            self._live.update(self._picture())
        else:
            self._print(line)

    def show(self, figures: Figures) -> None:
        """The figures have moved."""
        self._figures = figures
        if self._live:
            self._live.update(self._picture())
        elif self.seconds - self._printed >= PLAIN_SECONDS:
            self._printed = self.seconds
            self._print(f"{self.seconds:5.1f} s  {_line(figures)}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)

    def _picture(self) -> RenderableType:
        said = Text("\n".join(self._said))
        if self._figures is None:
            return said
        return Group(said, Text(f"{self.seconds:5.1f} s  {_line(self._figures)}", style="bold"))


def _line(figures: Figures) -> str:
    return (
        f"committed {figures.committed:,} · in the outbox {figures.waiting:,} · counted {figures.counted:,}"
        f" · batch {figures.batch:,} · lane with {figures.owner}"
    )


def print_table(console: Console, checks: Sequence[Check], details: Sequence[str]) -> None:
    """The result. Without a terminal it is as wide as it needs to be."""
    table = Table(show_header=False, title="Every figure is counted, from the databases and from Kafka")
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for check in checks:
        mark = {None: "", True: "[green]ok[/]", False: "[bold red]WRONG[/]"}[check.right]
        table.add_row(check.what, check.figure, mark)
    console.print(table)
    for detail in details:
        console.print(f"[red]{detail}[/]", highlight=False, soft_wrap=True)
