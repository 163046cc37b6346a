import csv
import io
import subprocess
import sys

import pytest

from audit.errors import EnvironmentFault, IntegrityError
from audit.records import AuditRecord, write_calibration
from reports.publish import are_current, digest_of_inputs, mark_current, write_reports

HEAVY = ("torch", "torchvision", "numpy", "pandas", "matplotlib", "seaborn", "scipy", "rich", "jinja2")


def test_everything_is_written_and_a_rebuild_gives_the_same_bytes(mixed_zoo, write_run):
    folder = write_run(mixed_zoo)
    paths = write_reports(folder)
    assert [str(path.relative_to(folder)) for path in paths] == [
        "leaderboard.csv",
        "leaderboard.parquet",
        "columns.csv",
        "figures/figure1.png",
        "figures/figure1.svg",
        "figures/figure2.png",
        "figures/figure2.svg",
        "report.html",
    ]
    before = [path.read_bytes() for path in paths]
    assert all(before)
    assert [path.read_bytes() for path in write_reports(folder)] == before
    assert not [path for path in folder.rglob(".*") if path.is_file()]


def test_figures_come_and_go_with_what_they_show(suite, calibrated, write_run):
    folder = write_run(suite(models=3, estimators=["sandwich", "mine-infonce"]))
    stored = write_calibration(folder, "key", calibrated())
    paths = write_reports(folder)
    drawn = {path.name for path in paths if path.suffix == ".svg"}
    assert drawn == {"figure1.svg", "figure2.svg", "agreement.svg", "calibration.svg"}
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_reports(folder)] == before
    stored.unlink()
    assert not [path for path in write_reports(folder) if path.stem == "calibration"]
    assert not (folder / "figures" / "calibration.svg").exists()


def test_the_promised_columns_are_there_and_filled(zoo, write_run):
    folder = write_run(zoo)
    write_reports(folder)
    rows = list(csv.DictReader(io.StringIO((folder / "leaderboard.csv").read_text())))
    promised = (
        "model, source, training, dataset, layer, norm, eps, seeds, images, normal_nats, normal_nats_se, worst_nats, "
        "worst_nats_se, rv, rv_se, adversarial_accuracy_bound, fano_accuracy_bound, quantity, ranks, "
        "natural_accuracy, adversarial_accuracy, adversarial_gap, flags, weights_sha256"
    )
    assert set(promised.split(", ")) <= set(rows[0])
    assert all(value for row in rows for value in row.values())


def test_a_run_in_which_everything_failed_still_has_a_report(zoo, write_run):
    kept = ("cell_id", "model", "source", "family", "training", "trained_eps", "dataset", "layer", "norm", "eps")
    how = ("weights_sha256", "estimator", "attack", "seeds", "images")
    failed = [
        AuditRecord(**{name: getattr(record, name) for name in kept + how}, status="failed", reason="no disk")
        for record in zoo[:2]
    ]
    page = write_reports(write_run(failed))[-1].read_text()
    assert "2 audits of 2 models: 0 ranked, 0 contradicted, 2 failed." in page


def test_a_folder_without_records_is_an_error(tmp_path):
    with pytest.raises(EnvironmentFault, match="holds no records"):
        write_reports(tmp_path)


def test_a_broken_record_is_an_error(zoo, write_run):
    folder = write_run(zoo[:1])
    (folder / "cells" / "x.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"x\.json is not a record"):
        write_reports(folder)


@pytest.mark.parametrize(
    ("module", "forbidden"), [("reports.publish", ("torch", "torchvision")), ("reports", HEAVY), ("reports.cli", HEAVY)]
)
def test_imports_stay_light(module, forbidden):
    code = f"import sys, {module}; print([name for name in {forbidden!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reports_are_current_until_what_they_show_changes(zoo, write_run, calibrated, monkeypatch):
    folder = write_run(zoo)

    def write() -> None:
        digest = digest_of_inputs(folder)
        assert not are_current(folder, digest)
        write_reports(folder)
        mark_current(folder, digest)
        assert are_current(folder, digest_of_inputs(folder))

    write()
    (folder / "timing.json").write_text("{}")  # not shown
    assert are_current(folder, digest_of_inputs(folder))
    (folder / "report.html").unlink()
    write()
    write_calibration(folder, "key", calibrated())
    write()
    record = next((folder / "cells").glob("*.json"))
    record.write_text(record.read_text() + "\n")
    write()
    record.unlink()
    write()
    monkeypatch.setattr("reports.publish.version", lambda _: "another")
    write()
