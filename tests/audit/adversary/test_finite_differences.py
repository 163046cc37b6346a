"""Finite differences: closed forms, legality, independence of the batch, and strength compared with Square."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.external import AutoAttack
from audit.adversary.finite_differences import FiniteDifferences, _directions
from audit.adversary.label_attack import AUDIT, LabelAttack, margin
from audit.adversary.threat import THREATS, threat_model
from audit.errors import UsageError
from audit.random_keys import keyed_generator
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import SourceSettings, load_model

ROOT = Path(__file__).parents[3]
THIRD_PARTY = Path(os.environ.get("RVAUDIT_THIRD_PARTY", ROOT.parent / "shared"))

NORMS = pytest.mark.parametrize("norm", sorted(THREATS))
DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}


class Oracle(nn.Module):
    """Two classes separated by a plane, with a known distance in every norm."""

    def __init__(self, shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, generator=keyed_generator(1)))

    def forward(self, images):
        score = ((images - 0.5) * self.weight).flatten(1).sum(1)
        return torch.stack([score, -score], 1)

    def images_at(self, distance, norm, count=6):
        weight = self.weight.detach()
        images = 0.45 + 0.1 * torch.rand(count, *weight.shape, generator=keyed_generator(2))
        score = self(images).detach()[:, 0]
        wanted = score.sign() * distance * torch.linalg.vector_norm(weight.flatten(), DUAL[norm])
        return images + ((wanted - score) / weight.square().sum()).view(-1, 1, 1, 1) * weight, (score < 0).long()


@NORMS
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 7), (2, 5, 3)])
def test_a_linear_boundary_in_few_pixels_is_reached_in_one_move_and_never_undercut(norm, shape):
    oracle, size = Oracle(shape), shape[0] * shape[1] * shape[2]
    distance = {"linf": 0.01, "l2": 0.1, "l1": 0.3}[norm]
    images, labels = oracle.images_at(distance, norm)
    reached = FiniteDifferences(size + 2).search(oracle, images, labels, threat_model(norm, 1.001 * distance))
    assert (reached.margins <= 0).all()
    assert reached.forwards == len(images) * (size + 2)
    held = FiniteDifferences().search(oracle, images, labels, threat_model(norm, 0.99 * distance))
    assert (held.margins > 0).all()


@pytest.fixture(scope="module")
def digits():
    found = load_images("digits", ImageRequest(count=60))
    network = load_model("bundled:digits-vgg-robust").network
    return network, found.images, found.labels


BALLS = pytest.mark.parametrize(("norm", "eps"), [("linf", 0.2), ("l2", 0.8), ("l1", 3.0)])


@BALLS
def test_images_are_legal_and_neither_gradients_nor_generators_change(digits, norm, eps):
    network, images, labels = digits
    threat, before = threat_model(norm, eps), torch.random.get_rng_state()
    found = FiniteDifferences(150).search(network, images, labels, threat)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.grad is None for p in network.parameters())
    assert (threat.distance(found.images, images) <= eps + 1e-6).all()
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    with torch.no_grad():
        clean, moved = (margin(network(each), labels) for each in (images, found.images))
    torch.testing.assert_close(moved, found.margins, atol=1e-4, rtol=1e-4)
    assert (moved <= clean + 1e-4).all()
    assert found.forwards <= 150 * len(images)


@NORMS
def test_queries_are_limited_and_results_independent_of_the_batch_size(norm):
    seen = 0

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(0.1 * torch.randn(3, 192, generator=keyed_generator(4)))

        def forward(self, images):
            nonlocal seen
            seen += len(images)
            return (images.flatten(1) @ self.weight.T).sin() + images.flatten(1)[:, :3]

    network, images = Small(), torch.rand(20, 3, 8, 8, generator=keyed_generator(5))
    labels = network(images).argmax(1)
    threat = threat_model(norm, {"linf": 0.02, "l2": 0.2, "l1": 1.0}[norm])
    runs = []
    for batch_size in (1, 7, 64):
        seen = 0
        runs.append(FiniteDifferences(100, batch_size).search(network, images, labels, threat))
        assert seen == runs[-1].forwards <= 100 * 20
    assert 0 < int((runs[0].margins <= 0).sum()) < 20
    for run in runs[1:]:
        assert run.forwards == runs[0].forwards
        assert torch.equal(run.margins > 0, runs[0].margins > 0)
        torch.testing.assert_close(run.images, runs[0].images, atol=1e-3, rtol=0)
    alone = FiniteDifferences(100).search(network, images[3:4], labels[3:4], threat)
    torch.testing.assert_close(alone.images, runs[0].images[3:4], atol=1e-3, rtol=0)


@NORMS
def test_directions_are_orthonormal_where_there_are_more_pixels_than_queries(norm):
    found = torch.cat(list(_directions((3, 9, 6), threat_model(norm, 0.1), 100))).flatten(1)
    assert len(found) == 162
    torch.testing.assert_close(found @ found.T, torch.eye(162), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.8), ("l1", 1.0)])
def test_it_is_stronger_than_square_with_equal_queries(digits, norm, eps):
    network, images, labels = digits
    threat = threat_model(norm, eps)
    ours = measure_accuracy(network, images, labels, threat, LabelAttack(queries=300), 0).robust
    # two stages, because Square by itself is refused outside l-inf
    square = AutoAttack(("square", "square"), 300)(network, images, labels, threat, 0)
    assert int(ours.sum()) < int((margin(network(square.images).detach(), labels) > 0).sum())


@pytest.mark.third_party
@pytest.mark.skipif(not THIRD_PARTY.is_dir(), reason=f"no third-party files in {THIRD_PARTY}")
def test_it_is_as_strong_as_square_in_l2_on_a_third_party_network():
    """On images that no setting was chosen on."""
    arch = f"{ROOT}/tests/third_party_nets.py:resnet2b&num_classes=10"
    scale = "mean=.4914,.4822,.4465&std=.2471,.2435,.2616"
    ref = f"file:{THIRD_PARTY}/checkpoints/resnet2b.pth?arch={arch}&{scale}"
    network = load_model(ref, SourceSettings(trust_code=True, offline=True)).network
    found = load_images(f"parquet:{THIRD_PARTY}/data/cifar10-test-a.parquet", ImageRequest(count=150))
    images, labels, threat = found.images[110:], found.labels[110:], threat_model("l2", 0.5)
    ours = FiniteDifferences(300).search(network, images, labels, threat)
    square = AutoAttack(("square", "square"), 300)(network, images, labels, threat, 0)
    theirs = margin(network(square.images).detach(), labels) > 0
    assert int((ours.margins > 0).sum()) <= int(theirs.sum())


def test_names_and_versions_depend_on_the_norm():
    assert AUDIT.gradient_free_name("linf") == "square-300"
    assert AUDIT.gradient_free_name("l1") == AUDIT.gradient_free_name("l2") == "differences-300"
    assert AUDIT.name == AUDIT.name_in("linf")
    assert "+noise-100+differences-300" in AUDIT.name_in("l2")
    assert AUDIT.version_in("linf") == AUDIT.version + 1  # its stages stop where images are out of reach
    assert AUDIT.version_in("l2") == AUDIT.version + 3
    assert AUDIT.version_in("l1") == AUDIT.version + 4
    assert LabelAttack(AUDIT.stages).version_in("l2") == AUDIT.version
    assert LabelAttack(AUDIT.stages).version_in("l1") == AUDIT.version + 1
    assert LabelAttack(queries=9).version_in("l1") == AUDIT.version + 1


def test_misclassified_images_take_one_pass_and_no_images_none(digits):
    network, images, labels = digits
    wrong = FiniteDifferences().search(network, images[:3], (labels[:3] + 1) % 10, threat_model("l2", 0.5))
    assert torch.equal(wrong.images, images[:3])
    assert wrong.forwards == 3
    assert FiniteDifferences().search(network, images[:0], labels[:0], threat_model("l2", 0.5)).forwards == 0


def test_nan_outputs_around_an_image_give_finite_candidates(digits):
    network, images, _ = digits

    class NanAround(nn.Module):
        def forward(self, batch):
            logits = network(batch)
            return torch.where(batch[:, :1, 0, 0] == 0, logits, logits * torch.nan)

    images = images[:5].clone()
    images[:, 0, 0, 0] = 0
    found = FiniteDifferences(70).search(NanAround(), images, network(images).argmax(1), threat_model("l2", 0.5))
    assert found.images.isfinite().all()


def test_counts_below_one_are_refused():
    with pytest.raises(UsageError, match="queries 0 of a search by differences"):
        FiniteDifferences(0)
    with pytest.raises(UsageError, match="batch_size 0"):
        FiniteDifferences(3, 0)
