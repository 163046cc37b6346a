"""Warm starts: their order, and that they change no results of other cells."""

import json
from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import nn

from audit.adversary.label_attack import two_losses
from audit.adversary.pgd import PGD
from audit.adversary.threat import threat_model
from audit.config.settings import AuditSettings
from audit.config.yaml_source import read_config
from audit.errors import InvalidModelError
from audit.information.label_information import LabelInformation
from audit.information.probing.settings import PanelSettings, ProbeTraining
from audit.information.sandwich import Sandwich
from audit.records import RecordStore
from audit.run.cell import Cell, expand, search_groups, sources, warm_start_path, with_warm_starts
from audit.run.cell_runner import CellRunner
from audit.run.layer_audit import LayerAudit
from audit.run.loading import RunOptions
from audit.run.run_loop import run
from audit.run.warm_starts import runs_before

SETTINGS = AuditSettings(Sandwich(steps=2, start_steps=1, annealing_steps=2, draws=1), seeds=(0,))


def cell(layer="logits", eps=0.1, ref="bundled:one", norm="linf", settings=SETTINGS):
    return Cell(ref, None, "digits", 60, layer, threat_model(norm, eps), settings)


def followed(cells):
    return [each.after and (each.after.layer, each.after.threat.eps) for each in with_warm_starts(cells)]


def test_warm_starts_come_from_smaller_radii_and_later_layers():
    cells = [
        cell(layer, eps) for layer in ("block.2", "input", "logits", "block.10", "penultimate") for eps in (0.2, 0.1)
    ]
    wanted = {
        ("logits", 0.1): None,
        ("penultimate", 0.1): ("logits", 0.1),
        ("block.10", 0.1): ("penultimate", 0.1),
        ("block.2", 0.1): ("block.10", 0.1),
        ("input", 0.1): ("block.2", 0.1),
    }
    wanted |= {(layer, 0.2): (layer, 0.1) for layer, _ in wanted}
    assert followed(cells) == [wanted[each.layer, each.threat.eps] for each in cells]
    assert [replace(each, after=None) for each in with_warm_starts(cells)] == cells


def test_a_stage_comes_after_its_parts():
    assert followed([cell("layer3.0.conv1"), cell("layer3"), cell("layer3.1")]) == [
        ("layer3.1", 0.1), None, ("layer3", 0.1)
    ]  # fmt: skip


def test_models_norms_estimators_and_radius_zero_have_no_warm_starts():
    other = replace(SETTINGS, estimator=Sandwich(steps=3))
    cells = [cell(), cell(ref="bundled:two"), cell(norm="l2"), cell(settings=other), cell(eps=0.0), cell(eps=0.2)]
    assert followed(cells) == [None, None, None, None, None, ("logits", 0.1)]


def test_groups_hold_every_cell_once_after_its_predecessor():
    cells = [cell(layer, eps) for eps in (0.3, 0.1, 0.2) for layer in ("a", "logits", "b")]
    (group,) = search_groups(cells)
    assert sorted(group) == list(range(9))
    done = []
    for each in (with_warm_starts(cells)[number] for number in group):
        assert each.after is None or replace(each.after, after=None) in done
        done.append(replace(each, after=None))


def test_the_warm_start_path_holds_all_predecessors():
    last = with_warm_starts([cell("logits", 0.1), cell("a", 0.1), cell("a", 0.2)])[2]
    assert warm_start_path(last) == [["logits", 0.1], ["a", 0.1]]
    assert warm_start_path(cell()) == []


LABELS = AuditSettings(
    LabelInformation(
        ProbeTraining(folds=2, hidden=4, steps=10),
        PanelSettings(trees=5, boosts=2),
        rounds=1,
        steps=2,
        relative_step=1.0,
    ),
    two_losses(PGD(2, 0.5)),
    seeds=(0,),
)


def test_layers_go_forward_where_later_ones_count():
    cells = [cell(layer, eps, settings=LABELS) for eps in (0.2, 0.1, 0.0) for layer in ("logits", "block", "input")]
    (group,) = search_groups(cells)
    linked = with_warm_starts(cells)
    ordered = [linked[number] for number in group]
    assert [(each.layer, each.threat.eps) for each in ordered] == [
        (layer, eps) for layer in ("input", "block", "logits") for eps in (0.0, 0.1, 0.2)
    ]
    assert {each.layer: each.later for each in linked} == {
        "input": ("block", "logits"),
        "block": ("logits",),
        "logits": (),
    }
    told = {
        (each.layer, each.threat.eps): [(source.layer, source.threat.eps) for source in sources(each)]
        for each in linked
        if each.threat.eps
    }
    assert told == {
        ("input", 0.1): [],
        ("input", 0.2): [("input", 0.1)],
        ("block", 0.1): [("input", 0.1)],
        ("block", 0.2): [("block", 0.1), ("input", 0.2)],
        ("logits", 0.1): [("block", 0.1)],
        ("logits", 0.2): [("logits", 0.1), ("block", 0.2)],
    }
    paths = {(each.layer, each.threat.eps): warm_start_path(each) for each in linked if each.layer == "logits"}
    assert paths["logits", 0.0] == []
    assert paths["logits", 0.1] == [["input", 0.1], ["block", 0.1]]  # a larger radius decides nothing of it
    assert len(paths["logits", 0.2]) == 5


def test_one_layer_alone_has_the_cells_it_always_had():
    cells = [cell(eps=eps, settings=LABELS) for eps in (0.1, 0.2)]
    first, second = with_warm_starts(cells)
    assert (first, second) == (cells[0], replace(cells[1], after=cells[0]))


def test_neither_worst_case_nor_bound_rises_towards_later_layers(tmp_path):
    cells = [
        replace(cell(layer, 0.2, "bundled:digits-vgg-robust-quarter", settings=LABELS), images=200)
        for layer in ("penultimate", "logits")
    ]
    inner, last = run(with_warm_starts(cells), tmp_path)
    assert (inner.valid, last.valid) == (True, True), (inner.reason, last.reason)
    assert (inner.layer, last.layer) == ("penultimate", "logits")
    assert last.normal_nats <= inner.normal_nats
    assert last.worst_nats <= inner.worst_nats
    assert last.fano_accuracy_bound <= inner.fano_accuracy_bound
    assert inner.details["identity"]["later"] == ["logits"]
    assert last.details["identity"]["after"] == [["penultimate", 0.2]]
    assert "at logits" in inner.details["per_seed"][0]["worst_parts"]
    assert [row[0] for row in last.details["per_seed"][0]["worst_by_images"]] == [50, 100, 200]


class Backwards(nn.Module):
    """The first layer by name is computed last."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.b = nn.Linear(4, 4)

    def forward(self, images):
        return self.a(self.b(images.flatten(1)))


@pytest.mark.parametrize(
    ("layer", "later", "wanted"),
    [("b", "a", True), ("a", "b", False), ("b", "b", True), ("b", "penultimate", True), ("a", "penultimate", False),
     ("penultimate", "a", True), ("penultimate", "b", False), ("input", "b", True), ("b", "input", False),
     ("a", "logits", True), ("logits", "a", False), ("b@0", "b@1", False)],
)  # fmt: skip
def test_the_order_of_layers_in_a_forward_pass(layer, later, wanted):
    network = Backwards()
    assert runs_before(network, layer, later, torch.rand(2, 1, 2, 2)) == wanted
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


YAML = """
name: ladder
dataset: digits
images: 60
models: [bundled:digits-vgg-standard]
layers: [penultimate, logits]
threats: [{norm: linf, eps: [0.2, 0.1]}]
estimators: [{name: sandwich, steps: 4, start_steps: 2, draws: 1, quantisers: [2], annealing_steps: 4}]
attack: smoke
seeds: [0, 1]
"""


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    file = tmp_path_factory.mktemp("yaml") / "benchmark.yaml"
    file.write_text(YAML)
    return expand(read_config(file))


@pytest.fixture(scope="module")
def finished(ladder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder")
    return ladder, folder, run(ladder, folder)


def test_worst_case_information_falls_with_the_radius(finished):
    cells, _, records = finished
    found = {(each.layer, each.threat.eps): record for each, record in zip(cells, records, strict=True)}
    assert all(record.valid for record in records)
    for layer in ("logits", "penultimate"):
        small, large = found[layer, 0.1], found[layer, 0.2]
        assert large.worst_nats <= small.worst_nats + 3 * large.worst_nats_se
    cold = found["logits", 0.1]
    for key, record in found.items():
        assert ("after" in record.details["identity"]) == (key != ("logits", 0.1))
        assert record.passes < cold.passes or key == ("logits", 0.1)


def test_cells_computed_alone_equal_those_of_a_group(finished, tmp_path):
    cells, folder, records = finished
    number = next(n for n, each in enumerate(cells) if (each.layer, each.threat.eps) == ("penultimate", 0.2))
    (alone,) = run([cells[number]], tmp_path)
    kept = json.loads(RecordStore(folder).path(records[number].cell_id).read_text())
    assert alone.cell_id == kept["cell_id"]
    assert (alone.worst_nats, alone.normal_nats, alone.passes) == (
        kept["worst_nats"],
        kept["normal_nats"],
        kept["passes"],
    )


def test_a_cell_whose_predecessor_fails_is_searched_from_scratch(ladder, monkeypatch, tmp_path):
    cells = [each for each in ladder if each.threat.eps == 0.1]
    real, calls = LayerAudit.searched, count()

    def failing(self, threat, starts, cache):
        if self.representation.layer == "logits":
            next(calls)
            raise InvalidModelError("planted")
        assert not starts.by_seed
        return real(self, threat, starts, cache)

    monkeypatch.setattr(LayerAudit, "searched", failing)
    records = {record.layer: record for record in run(cells, tmp_path)}
    assert next(calls) == 2  # its own record, and the warm start of the next cell
    assert not records["logits"].valid
    assert records["penultimate"].valid


def test_search_results_are_dropped_after_their_last_use(ladder, tmp_path):
    cells, held = ladder, []
    runner = CellRunner(RunOptions(), tmp_path)
    runner.begin_group(cells)
    for number in search_groups(cells)[0]:
        runner.record(cells[number], RecordStore(tmp_path))
        held.append(len(runner._searches))
    # logits at .1 is followed by logits at .2 and penultimate at .1, which penultimate at .2 follows
    assert held == [1, 1, 1, 0]


DEEP = YAML.replace("eps: [0.2, 0.1]", "eps: [0.02, 0.1, 0.3]")


@pytest.mark.parametrize("kept", [2, 5])
def test_a_chain_of_warm_starts_resumes_to_the_same_numbers(kept, tmp_path):
    (tmp_path / "deep.yaml").write_text(DEEP)
    cells = expand(read_config(tmp_path / "deep.yaml"))
    numbers = [(r.cell_id, r.worst_nats, r.normal_nats, r.passes) for r in run(cells, tmp_path / "run")]
    store = RecordStore(tmp_path / "run")
    for number in search_groups(cells)[0][kept:]:  # their predecessors are searched again
        store.path(numbers[number][0]).unlink()
    assert [(r.cell_id, r.worst_nats, r.normal_nats, r.passes) for r in run(cells, tmp_path / "run")] == numbers


def test_an_unknown_layer_fails_alone(tmp_path):
    (tmp_path / "typo.yaml").write_text(YAML.replace("[penultimate, logits]", "[stages.0, zzz]"))
    records = run(expand(read_config(tmp_path / "typo.yaml")), tmp_path / "run")
    assert {record.layer for record in records if record.valid} == {"stages.0"}
    assert all("unknown layer 'zzz'" in record.reason for record in records if not record.valid)
