"""Pictures of what audits cost: the numbers they state, and that they fit the rows that the benchmark writes."""

import argparse
import csv
import importlib.util
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from audit.adversary.fused import fused_copy
from audit.config.benchmark import BenchmarkConfig
from reports.figures.speed_figure import along, draw, reached, scaling_figure, search_figure, slope

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def chosen(scaling):
    axes, estimators = list(scaling.COUNTS), list(scaling.ESTIMATORS)
    return argparse.Namespace(
        data="parquet:images.parquet", checkpoints=Path("checkpoints"), images=200, axes=axes, estimators=estimators
    )


@pytest.fixture(scope="module")
def rows(scaling, chosen):
    """Rows as the benchmark makes them, of an audit that costs 1 and .25 for each layer, radius and seed more."""
    made = []
    for case in scaling.cases(chosen):
        more = case.layers + case.eps + case.seeds - 3
        passes = 150 * case.images * case.models * (1 + 0.25 * more)
        nats = dict.fromkeys(("normal_nats", "worst_nats", "worst_nats_se"), 1.0)
        cost = {"torch": "2", "passes_claimed": 1.1 * passes, "passes_counted": passes, "forwards": passes,
                "backwards": passes, "cpu_seconds": 0.002 * passes, "bare_pass_ms": 2.0, "peak_before_mib": 600,
                "peak_mib": 700 + case.images, **nats}  # fmt: skip
        base = next((row for row in made if row["estimator"] == case.estimator and row["axis"] == "base"), None)
        made.append(scaling.row(case, cost, base))
    return pd.DataFrame(made)


@pytest.fixture(scope="module")
def curves():
    """Ours ends at 1 nat after 100 passes, best response at 2 after 2,000."""
    shared = {"eps": "8/255", "seed": 0, "images": 600, "batch": 128, "drift": 0.0}
    made = []
    for method, end, unit in (("search-40", 1.0, 100), ("best-response", 2.0, 1000)):
        for step in range(1, 9):
            nats = end + (0 if step * unit >= (100 if method != "best-response" else 2000) else 1)
            made.append({"method": method, **shared, "step": step, "passes": step * unit, "nats": nats,
                         "smoothed": nats, "converged": end, "reached": nats == end})  # fmt: skip
    return pd.DataFrame(made)


@pytest.fixture(scope="module")
def epochs():
    networks, parts = ("resnet20", "resnet2b", "cnn-a-adv"), ("search-collapse", "search-round", "mean-shift")
    return pd.DataFrame([{"network": n, "part": p, "ratio": 1.0 + 0.1 * len(p)} for n in networks for p in parts])


def test_slope_is_the_power_that_cost_grows_with():
    counts = pd.Series([100, 200, 400, 800])
    assert slope(counts, 7.0 * counts) == pytest.approx(1)
    assert slope(counts, 0.1 * counts**2) == pytest.approx(2)


def test_a_curve_is_the_base_case_and_those_with_more_of_one_thing(rows):
    found = along(rows, "sandwich", "layers")
    assert found["layers"].tolist() == [1, 2, 4, 8]
    assert found["ratio_counted"].tolist() == [1, 1.25, 1.75, 2.75]
    assert set(found["estimator"]) == {"sandwich"}
    assert along(rows, "sandwich", "images")["images"].tolist() == [100, 200, 400, 800]


def test_panels_state_costs_limits_and_slopes(rows):
    dear = rows.assign(ratio_cpu=rows["ratio_cpu"].where(rows["axis"] != "eps", 2.5))
    said = [text.get_text().replace("\n", " ") for ax in scaling_figure(dear).axes for text in ax.texts]
    layers, eps, _, images, models, memory = (next(text for text in said if key in text) for key in (
        "Limit: 3 times for 8", "Limit: 2 times for 4", "Limit: 3 times for 5", "slope 1.00", "Slopes", "Resident",
    ))  # fmt: skip
    assert "sandwich: 2.75 times the passes, 2.75 times the CPU time for 8." in layers
    assert "sandwich: 1.75 times the passes, 2.50 times the CPU time for 4." in eps
    assert images == models == "sandwich: slope 1.00 (passes), 1.00 (CPU time). Slopes of logarithms: 1 is linear."
    assert "peak" in memory


def test_limits_and_the_naive_line_stand_in_their_panels(rows):
    for ax, (count, most) in zip(scaling_figure(rows).axes[:3], ((8, 3), (4, 2), (5, 3)), strict=True):
        drawn = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in ax.lines]
        assert [(count, most)] in drawn
        assert [(0, 0), (count, count)] in drawn


def test_a_curve_is_settled_where_it_stays_near_its_end(curves):
    assert reached(curves[curves["method"] == "search-40"]) == 100
    assert reached(curves[curves["method"] == "best-response"]) == 2000
    assert reached(curves.assign(reached=False)) != reached(curves.assign(reached=False))  # NaN


def test_the_search_picture_states_the_ratio_and_the_epochs_limit(curves, epochs):
    figure = search_figure(curves, epochs)
    said = " ".join(text.get_text().replace("\n", " ") for ax in figure.axes for text in ax.texts)
    assert "Ours by best response's: 0.050." in said
    assert "Limit: 1.25." in said
    assert figure.axes[0].get_xscale() == "log"
    assert len(figure.axes[1].patches) == 9
    assert any(list(line.get_ydata()) == [1.25, 1.25] for line in figure.axes[1].lines)
    assert len(search_figure(pd.DataFrame(), epochs).axes) == 1
    (unsettled,) = search_figure(curves.assign(reached=False), pd.DataFrame()).axes
    assert "response never; search-40 never." in unsettled.texts[0].get_text().replace("\n", " ")


def test_pictures_are_drawn_beside_the_docs_from_the_benchmarks(rows, curves, epochs, tmp_path, monkeypatch):
    monkeypatch.setattr("reports.figures.all_figures._DPI", 40)  # what is drawn is the same
    folder, source = tmp_path / "docs" / "figures", tmp_path / "benchmarks" / "results"
    assert draw(folder) == []
    source.mkdir(parents=True)
    epochs.to_csv(source / "epoch.csv", index=False)
    curves.to_csv(source / "convergence.csv", index=False)
    rows.to_csv(source / "scaling.csv", index=False)
    drawn = draw(folder)
    assert drawn == [folder / "speed-scaling.png", folder / "speed-search.png"]
    first = drawn[1].read_bytes()
    (source / "scaling.csv").unlink()
    assert draw(folder) == drawn[1:]
    assert drawn[1].read_bytes() == first


def test_cases_are_legal_benchmarks_that_all_hold_the_base_cell(scaling, chosen):
    listed = list(scaling.cases(chosen))
    assert len(set(listed)) == len(listed)
    for case in listed:
        config = BenchmarkConfig.model_validate(scaling.benchmark(case, chosen))
        planned = list(config.planned())
        assert len(planned) == case.layers * case.eps * case.models
        assert len({each.model.ref for each in planned}) == case.models
        assert any(each.layer == "logits" and each.eps == 8 / 255 for each in planned)
        assert len(config.seeds) == case.seeds


def test_cases_that_have_a_row_are_known(scaling, chosen, rows, tmp_path):
    path = tmp_path / "scaling.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, scaling.FIELDS)
        table.writeheader()
        table.writerows(rows.to_dict(orient="records"))
    assert set(scaling.known(path)) == set(scaling.cases(chosen))
    assert scaling.known(tmp_path / "other.csv") == {}


def test_the_counter_sees_copies_of_a_network_and_what_goes_back(scaling):
    counter = scaling.Counter()
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).eval()
    load = counter.watching(lambda *_: argparse.Namespace(network=network.requires_grad_(False)))
    images = torch.rand(5, 3, 8, 8)
    folded = fused_copy(load("ref").network, images)
    assert folded is not network  # the copy was made, and compared with the network
    before = counter.forwards, counter.backwards
    leaf = images.clone().requires_grad_()
    torch.autograd.grad(folded(leaf).sum(), leaf)
    network(images)
    assert (counter.forwards - before[0], counter.backwards - before[1]) == (10, 5)
