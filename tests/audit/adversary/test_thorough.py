"""Thorough searches in l2 and l1: no image is left that a plain loop of 100 steps breaks."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import AUDIT, TIERS, LabelAttack, ThoroughStage, margin_objective
from audit.adversary.pgd import PGD
from audit.adversary.threat import L1, L2, Linf, start_at_any_distance, threat_model
from audit.config.yaml_source import read_config
from audit.random_keys import keyed_generator
from audit.run.cell import expand
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import SourceSettings, load_model

ROOT = Path(__file__).parents[3]
FOLDER = Path(os.environ.get("RVAUDIT_THIRD_PARTY", ROOT.parent / "shared"))


def onto_the_l1_ball(rows, eps):
    sizes = rows.abs().sort(1, descending=True).values
    excess = sizes.cumsum(1) - eps
    last = (sizes * torch.arange(1, rows.shape[1] + 1) > excess).sum(1, keepdim=True)
    threshold = (excess.gather(1, last - 1) / last).clamp_min(0)
    return rows.sign() * (rows.abs() - threshold).clamp_min(0)


def plain_pgd(network, images, labels, norm, eps, loss, share):
    """Which images 100 steps of `share` of the radius from a random start break, in plain torch."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(images.shape, generator=generator).flatten(1)
    delta = delta / delta.norm(dim=1, p=2 if norm == "l2" else 1, keepdim=True)
    delta = delta * eps * torch.rand(len(images), 1, generator=generator)
    moved, broken = (images + delta.view_as(images)).clamp(0, 1), torch.zeros_like(labels, dtype=torch.bool)
    for step in range(101):
        pixels = moved.detach().requires_grad_()
        logits = network(pixels)
        broken |= logits.argmax(1) != labels
        if step == 100:
            return broken
        others = logits.scatter(1, labels[:, None], -1e9).amax(1)
        margins = (others - logits.gather(1, labels[:, None])[:, 0]).sum()
        value = F.cross_entropy(logits, labels, reduction="sum") if loss == "cross-entropy" else margins
        (gradient,) = torch.autograd.grad(value, pixels)
        rows = gradient.flatten(1)
        if norm == "l2":
            direction = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-20)
        else:
            at_end = ((gradient > 0) & (pixels >= 1)) | ((gradient < 0) & (pixels <= 0))
            rows = rows.masked_fill(at_end.flatten(1), 0.0)
            chosen = rows.abs().topk(max(1, rows.shape[1] // 100), 1).indices
            direction = torch.zeros_like(rows).scatter(1, chosen, rows.gather(1, chosen).sign() / chosen.shape[1])
        delta = (moved - images).flatten(1) + share * eps * direction
        if norm == "l2":
            delta = delta * (eps / delta.norm(dim=1, keepdim=True).clamp_min(1e-20)).clamp_max(1)
        else:
            delta = onto_the_l1_ball(delta, eps)
        moved = (images + delta.view_as(images)).clamp(0, 1)
    return broken


def plainly_broken(network, images, labels, norm, eps):
    runs = [
        plain_pgd(network, images, labels, norm, eps, loss, share)
        for loss in ("cross-entropy", "margin")
        for share in (0.1, 0.025)
    ]
    return torch.stack(runs).any(0)


# images that the attack left before these stages were added, beside others
LEFT = {
    ("digits-vgg-robust", "l2", 0.5): [66, 83, 137],
    ("digits-vgg-robust", "l2", 0.8): [51, 79, 98],
    ("digits-resnet-robust", "l2", 0.5): [40, 44, 61, 69],
    ("digits-resnet-robust", "l2", 0.8): [24, 64, 90, 121],
    ("digits-resnet-robust", "l1", 2.0): [38, 74],
}


@pytest.mark.parametrize(("name", "norm", "eps"), LEFT)
def test_no_image_is_left_that_a_plain_loop_breaks(name, norm, eps):
    index = torch.tensor([*LEFT[name, norm, eps], *range(12)])
    digits, network = load_images("digits", ImageRequest(count=150)), load_model(f"bundled:{name}").network
    images, labels = digits.images[index], digits.labels[index]
    plain = plainly_broken(network, images, labels, norm, eps)
    found = measure_accuracy(network, images, labels, threat_model(norm, eps), AUDIT, 0)
    assert int(plain[:-12].sum()) > 0
    assert not (plain & found.robust).any()
    assert (threat_model(norm, eps).distance(found.outcome.images, images) <= eps + 1e-6).all()


LEFT_BY_DESCENTS = {
    ("marabou-medium", "l2", 0.5): [31],
    ("marabou-medium", "l1", 4.0): [28, 51, 78],
    ("resnet20", "l1", 4.0): [31, 72, 124],
    ("resnet56", "l1", 4.0): [15, 31, 72, 124, 137, 140, 171],
    ("cnn-a-adv", "l2", 0.25): [184],
    ("cnn-a-mix4", "l2", 0.5): [26],
    ("cnn-a-mix4", "l1", 12.0): [141],
    ("mnist-cnn-a-adv", "l2", 2.0): [46, 146, 160],
    ("mnist-cnn-a-adv", "l1", 10.0): [101, 192],
    ("mnist-cnn-a-certified", "l2", 2.0): [119],
    ("mnist-conv-small", "l2", 1.0): [15],
    ("mnist-conv-small", "l2", 2.0): [54, 84, 194],
    ("mnist-conv-small", "l1", 5.0): [46],
}
# images that AutoAttack breaks, and that only walks along the boundary find
BEHIND = {
    ("mnist-cnn-a-adv", "l2", 2.0): [4, 5, 14],
    ("mnist-cnn-a-certified", "l2", 2.0): [0, 23, 35],
    ("mnist-cnn-a-certified", "l1", 5.0): [5, 13, 29],
    ("cnn-a-wide", "l1", 12.0): [28, 36],
}


@pytest.mark.third_party
@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no third-party files in {FOLDER} (see RVAUDIT_THIRD_PARTY)")
@pytest.mark.parametrize(
    ("name", "norm", "eps", "left"),
    [(*place, left) for each in (LEFT_BY_DESCENTS, BEHIND) for place, left in each.items()],
)
def test_images_of_third_party_networks_that_were_left(name, norm, eps, left, tmp_path):
    nets, text = "tests/third_party_nets.py", (ROOT / "tests" / "third_party.yaml").read_text()
    (tmp_path / "b.yaml").write_text(text.replace("../shared", str(FOLDER)).replace(nets, str(ROOT / nets)))
    (cell, *_) = [cell for cell in expand(read_config(tmp_path / "b.yaml")) if f"&name={name}&" in cell.ref]
    data = load_images(cell.dataset, ImageRequest(count=200))
    network = load_model(cell.ref, SourceSettings(trust_code=True, offline=True)).network
    images, labels = data.images[left], data.labels[left]
    found = measure_accuracy(network, images, labels, threat_model(norm, eps), AUDIT, 0)
    assert not found.robust.any()


def test_only_attacks_with_queries_in_l2_and_l1_search_thoroughly():
    descents = ["margin-60x3-outside", "ce-60x2-outside", "targeted-40x4-outside", "margin-100x4-inside"]
    assert [stage.name for stage in AUDIT.thorough_in("l2")] == [*descents, "margin-40x24-boundary"]
    more = [stage.name for stage in AUDIT.thorough_in("l1")]
    assert more == [*descents, "ce-50x16-boundary"]
    assert (
        AUDIT.thorough_in("linf") == TIERS["smoke"].thorough_in("l2") == LabelAttack(queries=5).thorough_in("l2") == ()
    )
    # after the gradient-free attack, whose check needs what gradients without random starts leave
    names = TIERS["leaderboard"].names_in("l1")
    assert names[len(AUDIT.stages) :] == ("noise-100", "differences-300", *more, "autoattack-standard")
    assert len(set(names)) == len(names)
    # versions enter the ids of cells: those of other norms and attacks are what they were
    assert [AUDIT.version_in(norm) for norm in ("linf", "l2", "l1")] == [3, 5, 6]
    assert [TIERS["smoke"].version_in(norm) for norm in ("linf", "l2", "l1")] == [2, 2, 3]


@pytest.mark.parametrize(("threat", "power"), [(L2(0.5), 2), (L1(2.0), 1), (Linf(0.1), torch.inf)])
def test_starts_lie_at_all_distances(threat, power):
    clean = torch.full((400, 1, 6, 6), 0.5)
    starts = start_at_any_distance(threat, clean, keyed_generator(5))
    shares = (starts - clean).flatten(1).norm(dim=1, p=power) / threat.eps
    assert float(shares.max()) <= 1 + 1e-6
    shares = shares / shares.max()
    quantiles = torch.quantile(shares, torch.tensor([0.25, 0.5, 0.75]))
    assert ((quantiles - torch.tensor([0.25, 0.5, 0.75])).abs() < 0.08).all()
    assert torch.equal(starts, start_at_any_distance(threat, clean, keyed_generator(5)))


@pytest.mark.parametrize("threat", [L2(0.6), L1(2.0)])
@pytest.mark.parametrize("balls", [(), ((3.0, 0.3), (1.5, 0.3))])
@pytest.mark.parametrize("random_start", [True, False])
def test_thorough_stages_do_not_depend_on_the_batch_size(threat, balls, random_start):
    digits = load_images("digits", ImageRequest(count=20))
    objective = margin_objective(load_model("bundled:digits-vgg-robust").network, digits.labels)
    runs = []
    for batch_size in (3, 20):
        pgd = PGD(12, 0.1, random_start, restarts=2, batch_size=batch_size)
        runs.append(
            ThoroughStage("margin", pgd, balls=balls).search(
                lambda _: objective, digits.images, threat, keyed_generator(1)
            )
        )
    one, other = runs
    torch.testing.assert_close(one.images, other.images, rtol=0, atol=1e-5)
    assert torch.equal(one.done, other.done)
    assert one.passes == other.passes <= 20 * 2 * 12
    assert (threat.distance(one.images, digits.images) <= threat.eps + 1e-6).all()
    clean = objective(digits.images, torch.arange(20)).value
    assert (one.value <= clean + 1e-6).all()


def test_stage_settings_are_those_of_the_base_class():
    assert replace(AUDIT.thorough_in("l2")[-2], pgd=PGD(7)).name == "margin-7-inside"
    assert replace(AUDIT.thorough_in("l2")[-1], pgd=PGD(7)).name == "margin-7-boundary"
    assert AUDIT.name_in("l2").startswith("ce-10+margin-10+margin-40x2+targeted-20x3+noise-100+differences-300+")
