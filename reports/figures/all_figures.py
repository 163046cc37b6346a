"""Write every figure of a run; the same records give the same bytes."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from audit.records import CalibrationRow
from audit.storage import write_atomically
from reports.figures.agreement_figure import agreement_figure
from reports.figures.calibration_figure import calibration_figure
from reports.figures.gap_figure import figure1
from reports.figures.information_figure import figure2
from reports.figures.style import paper_style

__all__ = ["agreement_figure", "calibration_figure", "figure1", "figure2", "figure_bytes", "save_figures"]

_DPI = 300
_LARGEST = 32_000  # pixels a side: under what PNG readers and the renderer take


def save_figures(frame: pd.DataFrame, folder: Path, calibration: Sequence[CalibrationRow] = ()) -> list[Path]:
    """Write every figure that is not empty as PNG and SVG into `folder`/figures and return the paths.

    figure1 and figure2 always; agreement with two estimators or more; calibration where an estimator was calibrated.
    An older file of a figure that is not there any more is removed.
    """
    drawn = {
        "figure1": figure1(frame),
        "figure2": figure2(frame),
        "agreement": agreement_figure(frame),
        "calibration": calibration_figure(calibration),
    }
    paths = []
    for name, figure in drawn.items():
        for suffix in ("png", "svg"):
            path = Path(folder) / "figures" / f"{name}.{suffix}"
            if figure is None:
                path.unlink(missing_ok=True)
            else:
                write_atomically(path, figure_bytes(figure, suffix))
                paths.append(path)
    return paths


def figure_bytes(figure: Figure, suffix: str) -> bytes:
    """Return a figure as a file of type `suffix` (png or svg), the same bytes every time."""
    buffer = BytesIO()
    undated = {"Date": None, "Creator": None} if suffix == "svg" else {"Software": None}
    dpi = min(_DPI, _LARGEST / max(figure.get_size_inches()))
    with paper_style():
        figure.savefig(buffer, format=suffix, metadata=undated, dpi=dpi)
    return buffer.getvalue()
