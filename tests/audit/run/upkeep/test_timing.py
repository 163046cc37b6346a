"""Where the time of a run went: records and the work around them."""

from audit.records import AuditRecord
from audit.run.upkeep.timing import StageTotal, stage_totals, store_seconds, timed


def record(cell_id, **timing):
    return AuditRecord(
        cell_id=cell_id, model="m", source="s", family="f", training="t", trained_eps=0.0, dataset="d", layer="logits",
        norm="linf", eps=0.1, weights_sha256="0", estimator="e", attack="a", seeds=1, images=50, timing=timing,
    )  # fmt: skip


def test_costs_are_summed_over_records(tmp_path):
    one = record("1", attack={"seconds": 2.0, "passed": 30.0, "needed": 28.0}, loading={"seconds": 1.0})
    two = record("2", attack={"seconds": 4.0, "passed": 10.0, "needed": None})
    store_seconds(tmp_path, "figures", 5.0)
    store_seconds(tmp_path, "figures", 3.0)
    with timed(tmp_path, "page"):
        pass
    *of_records, figures, page = stage_totals(tmp_path, [one, two, record("3")])
    assert of_records == [StageTotal("attack", 6.0, 40.0, 28.0, 2), StageTotal("loading", 1.0, 0.0, None, 1)]
    assert figures == StageTotal("figures", 3.0)
    assert page.stage == "page"
    assert page.seconds >= 0


def test_a_damaged_file_of_seconds_is_ignored(tmp_path):
    for text in ("{", "[1]", '{"figures": "long"}'):
        (tmp_path / "timing.json").write_text(text)
        assert stage_totals(tmp_path, []) == []
    store_seconds(tmp_path, "page", 1.0)
    assert stage_totals(tmp_path, []) == [StageTotal("page", 1.0)]


def test_timing_is_no_result():
    one, other = record("1", attack={"seconds": 1.0}), record("1", attack={"seconds": 2.0})
    assert one == other
    assert AuditRecord.from_dict(one.to_dict()).timing == one.timing
    old = one.to_dict()
    del old["timing"]
    assert AuditRecord.from_dict(old) == one
