"""The progress of an audit in Python: a line in a notebook or terminal, and a callback for every stage."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape as without_markup
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from audit.adversary.threat import ThreatModel
from audit.run.upkeep.pass_meter import PassMeter
from reports.text import format_eps


class AuditStage(NamedTuple):
    """A stage: its name, the layer ("" for none), the threat model, and the stages done before it.

    `total` is the number of stages of the whole call. `within` is about what share of the stage is done, in [0, 1], and
    `passed` says in words how long the rest of the call takes and how many passes of all are done: 0 and "" as the
    stage begins.
    """

    name: str
    layer: str
    threat: ThreatModel | None
    done: int
    total: int
    within: float = 0.0
    passed: str = ""

    @property
    def share(self) -> float:
        """The share of the stages that are done, in [0, 1]."""
        return (self.done + self.within) / self.total

    @property
    def text(self) -> str:
        """The stage in words, such as `worst case, seed 0, logits, linf 8/255`."""
        place = f"{self.threat.norm} {format_eps(self.threat.eps)}" if self.threat else ""
        return ", ".join(word for word in (self.name, self.layer, place, self.passed) if word)


_BAR = 12  # characters
OnStage = Callable[[AuditStage], object]


def silent(_stage: AuditStage) -> None:
    """Tell nobody of a stage."""


class StageCounter(PassMeter):
    """Counts the stages of a call and the passes within them: tells the begin of each stage, and shows both.

    `expected` is about how many passes each stage takes, in any order.
    """

    def __init__(self, expected: Sequence[float], show: OnStage, on_stage: OnStage = silent) -> None:
        super().__init__(lambda _text: show(self._shown))
        self._total, self._begun, self._later = len(expected), 0, sum(expected)
        self._on_stage = on_stage
        self._current, self._from, self._length = AuditStage("", "", None, 0, self._total), 0.0, 1.0

    def __call__(self, name: str, layer: str, threat: ThreatModel | None, passes: float) -> None:
        """Begin a stage of about so many passes."""
        self._current = AuditStage(name, layer, threat, self._begun, self._total)
        self._begun, self._later = self._begun + 1, max(0.0, self._later - passes)
        self._from, self._length = self._done, max(1.0, passes)
        self._expected = self._done + passes + self._later  # what is done may be more or less than was expected
        self._on_stage(self._current)
        self.stage(self._current.text)

    @property
    def _shown(self) -> AuditStage:
        within = min(0.99, (self._done - self._from) / self._length)
        return self._current._replace(within=within, passed=self.passed)


@contextmanager
def progress_line(total: int, *, shown: bool = True) -> Iterator[OnStage]:
    """Return a callback that shows stage, share done and time left: in a notebook, or on a terminal; else nothing."""
    console = Console(stderr=True)
    if not shown or not (console.is_jupyter or console.is_terminal):
        yield silent
    elif console.is_jupyter:
        yield from _in_notebook(total)
    else:
        yield from _on_terminal(console, total)


def _in_notebook(total: int) -> Iterator[OnStage]:
    from IPython.display import HTML, display

    started, line = time.monotonic(), display(HTML(_bar(0, total, "starting")), display_id=True)

    def show(stage: AuditStage) -> None:
        line.update(HTML(_bar(stage.done + stage.within, stage.total, stage.text)))

    try:
        yield show
    except BaseException as error:
        line.update(HTML(f"stopped by {type(error).__name__}"))
        raise
    line.update(HTML(_bar(total, total, f"{time.monotonic() - started:.0f} s")))


def _bar(done: float, total: int, text: str) -> str:
    return f'<progress value="{done:.3g}" max="{total}"></progress> {int(done)} of {total} stages: {escape(text)}'


def _on_terminal(console: Console, total: int) -> Iterator[OnStage]:
    width = 2 * len(str(total)) + 1
    columns = (BarColumn(_BAR, table_column=Column(width=_BAR)), MofNCompleteColumn(table_column=Column(width=width)))
    text = TextColumn("{task.description}", table_column=Column(no_wrap=True, ratio=1))
    with Progress(*columns, text, console=console, transient=True, expand=True) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda stage: bar.update(
            task, completed=stage.done + stage.within, description=without_markup(stage.text)
        )
