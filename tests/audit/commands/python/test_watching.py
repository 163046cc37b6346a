"""The progress of an audit: a line in a notebook and on a terminal, and nothing in a pipe."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from audit.adversary.memory.counting import count_passes
from audit.adversary.threat import Linf
from audit.commands.python import watching
from audit.commands.python.watching import AuditStage, StageCounter, progress_line
from audit.run.upkeep import pass_meter

STAGE = AuditStage("worst case, seed 0", "<b>", Linf(8 / 255), 3, 4)
HALF_DONE = STAGE._replace(within=0.5, passed="about 3 min left, 90 of about 100 passes")


class Line:
    """The display of one output cell."""

    def __init__(self) -> None:
        self.pages: list[str] = []

    def update(self, page: Any) -> None:
        self.pages.append(page.data)


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    import IPython.display

    made = Line()

    def display(page: Any, *, display_id: bool) -> Line:
        assert display_id
        made.update(page)
        return made

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(watching, "Console", lambda *, stderr: Console(force_jupyter=True, stderr=stderr))
    return made


def test_a_notebook_shows_stage_and_share_in_one_place(line: Line) -> None:
    with progress_line(4) as show:
        show(STAGE)
        assert line.pages[-1] == (
            '<progress value="3" max="4"></progress> 3 of 4 stages: worst case, seed 0, &lt;b&gt;, linf 8/255'
        )
        show(HALF_DONE)
        assert line.pages[-1] == (
            '<progress value="3.5" max="4"></progress> 3 of 4 stages: worst case, seed 0, &lt;b&gt;, linf 8/255, '
            "about 3 min left, 90 of about 100 passes"
        )
    assert line.pages[0].startswith('<progress value="0" max="4"></progress> 0 of 4 stages: starting')
    assert line.pages[-1].startswith('<progress value="4" max="4"></progress> 4 of 4 stages: ')
    assert len(line.pages) == 4


def test_a_notebook_says_what_stopped_it(line: Line) -> None:
    def fail() -> None:
        with progress_line(4):
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        fail()
    assert line.pages[-1] == "stopped by ValueError"


def test_a_terminal_shows_stage_and_share(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(watching, "Console", lambda *, stderr: Console(file=shown, force_terminal=True, width=80))
    with progress_line(4) as show:
        show(STAGE)
        show(HALF_DONE)
    assert "worst case, seed 0, <b>, linf 8/255" in shown.getvalue()
    assert "3/4" in shown.getvalue()
    assert "about 3 min left" in shown.getvalue()  # of 80 columns the end of the line is cut off


def test_a_pipe_stays_empty(capfd: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        with progress_line(4, shown=shown) as show:
            show(STAGE)
    assert capfd.readouterr() == ("", "")


def test_a_stage_knows_its_share() -> None:
    assert STAGE.share == 0.75
    assert HALF_DONE.share == 0.875
    assert AuditStage("attack", "", None, 0, 4).text == "attack"


def test_passes_move_the_share_within_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(pass_meter, "time", SimpleNamespace(monotonic=lambda: now[0]))
    shown, told = list[AuditStage](), list[AuditStage]()
    counter = StageCounter([300.0, 100.0], shown.append, told.append)
    with counter.counting(400):
        counter("attack", "", Linf(0.1), 300)
        for _ in range(3):
            now[0] += 2
            count_passes(50)
        counter("worst case, seed 0", "logits", Linf(0.1), 100)  # the attack took half of what was expected
        now[0] += 2
        count_passes(75.5)
    assert [(stage.name, stage.done, stage.within) for stage in shown] == [
        ("attack", 0, 0.0), ("attack", 0, 50 / 300), ("attack", 0, 100 / 300), ("attack", 0, 0.5),
        ("worst case, seed 0", 1, 0.0), ("worst case, seed 0", 1, 0.755),
    ]  # fmt: skip
    assert [stage.passed for stage in shown[2:]] == [
        "about 12 s left, 100 of about 400 passes",
        "about 10 s left, 150 of about 400 passes",
        "about 4 s left, 150 of about 250 passes",  # 100 passes to go, 25 a second
        "about 1 s left, 226 of about 250 passes",
    ]
    assert [(stage.name, stage.passed) for stage in told] == [("attack", ""), ("worst case, seed 0", "")]


def test_a_stage_that_takes_longer_than_expected_is_not_shown_as_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_meter, "_EVERY", 0.0)
    shown = list[AuditStage]()
    counter = StageCounter([1.0, 1.0], shown.append)
    with counter.counting(2):
        counter("attack", "", None, 1)
        count_passes(1000)
    assert (shown[-1].done, shown[-1].within) == (0, 0.99)
    assert shown[-1].passed.endswith(" left, 1,000 of about 1,000 passes")
