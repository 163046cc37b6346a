"""The progress of an audit: a line in a notebook and on a terminal, and nothing in a pipe."""

import io
from typing import Any

import pytest
from rich.console import Console

from audit.adversary.threat import Linf
from audit.commands.python import watching
from audit.commands.python.watching import AuditStage, progress_line

STAGE = AuditStage("worst case, seed 0", "<b>", Linf(8 / 255), 3, 4)


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
    assert line.pages[0].startswith('<progress value="0" max="4"></progress> 0 of 4 stages: starting')
    assert line.pages[-1].startswith('<progress value="4" max="4"></progress> 4 of 4 stages: ')
    assert len(line.pages) == 3


def test_a_notebook_says_what_stopped_it(line: Line) -> None:
    def fail() -> None:
        with progress_line(4):
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        fail()
    assert line.pages[-1] == "stopped by ValueError"


def test_a_terminal_shows_stage_and_share(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(watching, "Console", lambda *, stderr: Console(file=shown, force_terminal=True, width=120))
    with progress_line(4) as show:
        show(STAGE)
    assert "worst case, seed 0, <b>, linf 8/255" in shown.getvalue()
    assert "3/4" in shown.getvalue()


def test_a_pipe_stays_empty(capfd: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        with progress_line(4, shown=shown) as show:
            show(STAGE)
    assert capfd.readouterr() == ("", "")


def test_a_stage_knows_its_share() -> None:
    assert STAGE.share == 0.75
    assert AuditStage("attack", "", None, 0, 4).text == "attack"
