"""Terminal output: a progress bar with finished cells, stage and remaining time, and tables."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
)
from rich.table import Column, Table
from rich.text import Text

from audit.records import AuditRecord
from reports.text import format_eps

_BAR = 12  # characters
_FIRST_LINE, _LINES_EVERY = 10.0, 30.0  # seconds, into a pipe


class Display:
    """A progress bar on standard error, so that standard output holds results only."""

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        # a narrow terminal cuts off the end: what is done and the time left come first
        columns = (
            BarColumn(_BAR, table_column=Column(width=_BAR)),
            MofNCompleteColumn(table_column=Column(width=2 * len(str(total)) + 1)),
            TextColumn("{task.description}", markup=True, table_column=Column(no_wrap=True, ratio=1)),
        )
        self._progress = Progress(*columns, console=self._console, transient=True, disable=not self._live, expand=True)
        self._task = self._progress.add_task("starting", total=total)
        self._total, self._finished, self._known = total, 0, 0
        self._began = time.monotonic()
        self._next_line = self._began + _FIRST_LINE

    @property
    def _live(self) -> bool:
        return self._console.is_terminal and not self._console.quiet

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, name: str, stage: str) -> None:
        """Show the stage of a cell."""
        shown = f"{plain(name)}: {stage}"
        left = self._left(self._finished - self._known, self._total - self._known)
        shown = f"{left} left in all; {shown}" if left else shown
        self._progress.update(self._task, description=escape(shown))
        self._line(shown)

    def step(self, epoch: int, loss: float) -> None:
        """Show the completed epochs and the loss of a training run."""
        self.channel(f"epoch {epoch + 1}, loss {loss:.3f}", epoch + 1)

    def channel(self, name: str, done: int) -> None:
        """Show a step of the work by name, and the number of completed steps."""
        shown = plain(name)
        if " left" not in shown and (left := self._left(done, self._total)):
            shown += f", {left} left"
        self._progress.update(self._task, completed=done, description=escape(shown))
        self._line(shown, done)

    def _left(self, done: int, total: int) -> str:
        """Return in words how long the rest of the work takes at the pace so far; nothing before the first part."""
        from audit.run.upkeep.progress import in_words

        return in_words((time.monotonic() - self._began) * (total - done) / done) if 0 < done < total else ""

    def _line(self, text: str, done: int | None = None) -> None:
        """Print what is being done on a line every half minute, if there is no terminal for the bar."""
        now = time.monotonic()
        if self._live or now < self._next_line:
            return
        self._next_line = now + _LINES_EVERY
        count = self._finished if done is None else done
        self._console.print(escape(f"[{count}/{self._total}] {text}"), soft_wrap=True)

    def done(self, record: AuditRecord, known: bool) -> None:
        """Count a finished cell, and print a line for it if there is no terminal for the bar."""
        self._finished, self._known = self._finished + 1, self._known + known
        self._progress.advance(self._task)
        if known and not self._live:
            return
        outcome = "already done" if known else f"{record.seconds or 0:.1f} s"
        if not record.valid:
            outcome = "failed"  # the command prints the reason once, at the end
        cell = f"{plain(record.model)}, {plain(record.layer)}, eps {format_eps(record.eps)}, {record.estimator}"
        self._console.print(escape(f"[{self._finished}/{self._total}] {cell}: {outcome}"), soft_wrap=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on standard output; into a pipe no column is truncated."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(str(cell))) for cell in row))
    console = Console(highlight=False)
    Console(highlight=False, width=console.width if console.is_terminal else 200).print(table)


def print_facts(facts: Mapping[str, object]) -> None:
    """Print names and values on one line."""
    click.echo(", ".join(plain(f"{name} {value}") for name, value in facts.items()))


def plain(text: str) -> str:
    """Return text with control characters replaced by `?`: names come from files and must not control the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
