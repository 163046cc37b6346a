"""The progress of an audit in Python: a line in a notebook or terminal, and a callback for every stage."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape as without_markup
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from audit.adversary.threat import ThreatModel
from reports.text import format_eps


class AuditStage(NamedTuple):
    """A stage that begins: its name, the layer ("" for none), the threat model, and the stages done before it.

    `total` is the number of stages of the whole call.
    """

    name: str
    layer: str
    threat: ThreatModel | None
    done: int
    total: int

    @property
    def share(self) -> float:
        """The share of the stages that are done, in [0, 1]."""
        return self.done / self.total

    @property
    def text(self) -> str:
        """The stage in words, such as `worst case, seed 0, logits, linf 8/255`."""
        place = f"{self.threat.norm} {format_eps(self.threat.eps)}" if self.threat else ""
        return ", ".join(word for word in (self.name, self.layer, place) if word)


OnStage = Callable[[AuditStage], object]


def _silent(_stage: AuditStage) -> None:
    return


@contextmanager
def progress_line(total: int, *, shown: bool = True) -> Iterator[OnStage]:
    """Return a callback that shows stage and share done: in a notebook, or on a terminal; elsewhere nothing."""
    console = Console(stderr=True)
    if not shown or not (console.is_jupyter or console.is_terminal):
        yield _silent
    elif console.is_jupyter:
        yield from _in_notebook(total)
    else:
        yield from _on_terminal(console, total)


def _in_notebook(total: int) -> Iterator[OnStage]:
    from IPython.display import HTML, display

    started, line = time.monotonic(), display(HTML(_bar(0, total, "starting")), display_id=True)

    def show(stage: AuditStage) -> None:
        line.update(HTML(_bar(stage.done, stage.total, stage.text)))

    try:
        yield show
    except BaseException as error:
        line.update(HTML(f"stopped by {type(error).__name__}"))
        raise
    line.update(HTML(_bar(total, total, f"{time.monotonic() - started:.0f} s")))


def _bar(done: int, total: int, text: str) -> str:
    return f'<progress value="{done}" max="{total}"></progress> {done} of {total} stages: {escape(text)}'


def _on_terminal(console: Console, total: int) -> Iterator[OnStage]:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("stages,"), TimeElapsedColumn(), TextColumn("elapsed:"))
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda stage: bar.update(task, completed=stage.done, description=without_markup(stage.text))
