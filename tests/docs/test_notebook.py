"""The notebook of the documentation: it runs, and its committed outputs are small and of the same kinds."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebooks" / "audit.ipynb"
LARGEST = 300_000


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """Return the kinds of a cell's outputs: streams by their names, others by their media types."""
    return sorted(kind for each in cell.outputs for kind in (each.get("data") or {each.get("name", ""): ""}))


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_committed_outputs_are_small_and_name_no_folder(committed):
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < LARGEST
    nbformat.validate(committed)
    assert [cell.execution_count for cell in code_cells(committed)] == list(range(1, len(code_cells(committed)) + 1))
    for place in (str(Path.home()), str(NOTEBOOK.parents[2]), "site-packages", "Traceback"):
        assert place not in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # of the kernel's client
def test_the_notebook_runs_and_ends_with_figure_1(committed, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.from_dict(committed)
    client = NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()  # raises for a cell that does
    assert "image/png" in kinds(code_cells(notebook)[-1])
    again = nbformat.read(NOTEBOOK, as_version=4)
    assert [kinds(cell) for cell in code_cells(notebook)] == [kinds(cell) for cell in code_cells(again)]
