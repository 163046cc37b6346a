"""Batches are as large as saved activations fit a budget, and results do not depend on their size."""

import threading
from dataclasses import replace
from importlib import import_module
from typing import NamedTuple

import pytest
import torch
from torch import nn

from audit.adversary.external_adapter import PassCounter
from audit.adversary.label_attack import LabelAttack, Stage
from audit.adversary.memory import batch_size
from audit.adversary.memory.batch_size import budget_of, fitting_batch, fitting_batches, saved_bytes
from audit.adversary.memory.limit import allowed, fixed_batches
from audit.adversary.passes import Batches, MeanOfDraws
from audit.adversary.pgd import PGD
from audit.adversary.robustness import TargetModel, evaluate_robustness
from audit.adversary.threat import Linf
from audit.commands.options import SourceOptions
from audit.commands.resolve import run_options
from audit.config.settings import AuditSettings
from audit.errors import UsageError
from audit.information.sandwich import Sandwich
from audit.run.layer_audit import LayerAudit
from audit.run.loading import RunOptions, batches_for
from audit.run.sanity_checks import sanity_checks
from model_zoo.catalogue import bundled_names
from model_zoo.load import load_model

KIB = 1 << 10


@pytest.fixture
def small_budget(monkeypatch):
    """A budget of 192 KiB, so that tests need little memory."""
    monkeypatch.setattr(batch_size, "CPU_BUDGET", 192 * KIB)


class Watched(nn.Module):
    """A small classifier that notes the size of every batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
        self.sizes = []

    def forward(self, images):
        self.sizes.append(len(images))
        return self.body(images)


class Heavy(Watched):
    """A classifier that saves a given number of bytes of activations for each image."""

    def __init__(self, size):
        super().__init__()
        self.values = size // 4

    def forward(self, images):
        ballast = images.flatten(1)[:, :1].expand(-1, self.values).exp()  # exp saves its result
        return super().forward(images) + ballast.mean(1, keepdim=True)


def images_of(count, side=4):
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("frozen", [True, False])
def test_saved_bytes_are_those_of_the_activations(frozen):
    network = Watched().requires_grad_(not frozen)
    # the convolution saves its input of 16 floats, ReLU its result of 32; weights are not counted
    assert saved_bytes(network.eval(), images_of(1)) == 4 * (16 + 32)
    assert saved_bytes(network, images_of(3)) == 3 * 4 * (16 + 32)
    assert all(each.requires_grad is not frozen for each in network.parameters())


def test_saved_bytes_of_a_mean_over_draws_are_those_of_all_draws():
    class Noisy(Watched):
        def forward(self, images):
            return super().forward(images + torch.rand_like(images))

    before = torch.get_rng_state()
    one, all_draws = saved_bytes(Noisy(), images_of(1)), saved_bytes(MeanOfDraws(Noisy()), images_of(1))
    torch.manual_seed(3)  # as Noisy() did last
    Watched()
    assert 19 * one <= all_draws <= 21 * one
    torch.set_rng_state(before)
    network = Noisy()
    drawn = torch.get_rng_state()
    saved_bytes(network, images_of(1))
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.usefixtures("small_budget")
@pytest.mark.parametrize(("needed", "expected"), [(80 * KIB, 2), (400 * KIB, 1), (24 * KIB, 7), (KIB // 2, 279)])
def test_a_batch_is_as_large_as_the_budget_allows(needed, expected):
    assert fitting_batch(Heavy(needed).eval(), images_of(2)) == expected


@pytest.mark.parametrize("name", [name for name in bundled_names() if "digits" in name])
def test_networks_of_digits_are_not_limited(name):
    assert fitting_batch(load_model(f"bundled:{name}").network, torch.rand(1, 1, 8, 8)) >= 256


def test_a_network_that_cannot_be_run_is_not_limited():
    assert fitting_batch(nn.Sequential(nn.Conv2d(3, 2, 1)), images_of(1)) == batch_size._LARGEST


def test_batches_of_large_images_stay_small_for_a_network_that_saves_nothing():
    assert fitting_batch(nn.Flatten(), torch.rand(1, 3, 224, 224)) == (8 << 20) // (4 * 3 * 224 * 224)


def test_the_activations_of_a_network_are_measured_once_for_each_shape():
    network = Heavy(KIB)
    for images in (images_of(2), images_of(5), images_of(2, side=4)):
        fitting_batch(network, images)
    assert network.sizes == [1]


@pytest.mark.usefixtures("small_budget")
def test_limits_nest_end_and_hold_for_one_thread():
    seen = []
    with fitting_batches(Heavy(24 * KIB), images_of(1)):
        assert (allowed(256), allowed(5), Batches(64).size, Batches(64, exactly=True).size) == (7, 5, 7, 64)
        with fitting_batches(Heavy(KIB), images_of(1)):
            assert allowed(256) == 7
        with pytest.raises(ZeroDivisionError), fitting_batches(Heavy(80 * KIB), images_of(1)):
            _ = allowed(256) / (allowed(256) - 2)
        with fixed_batches(9), fitting_batches(Heavy(80 * KIB), images_of(1)):
            assert (allowed(256), allowed(4)) == (9, 9)
        thread = threading.Thread(target=lambda: seen.append(allowed(256)))
        thread.start()
        thread.join()
        assert allowed(256) == 7
    assert (allowed(256), seen) == (256, [256])


@pytest.mark.parametrize("size", [0, -3])
def test_a_fixed_size_below_one_is_refused(size):
    with pytest.raises(UsageError, match=f"batch size {size} must be at least 1"), fixed_batches(size):
        pass


@pytest.mark.usefixtures("small_budget")
@pytest.mark.parametrize("options", [RunOptions(batch_size=6), RunOptions()])
def test_searches_and_estimators_keep_to_the_size(options):
    network, images = Heavy(24 * KIB).eval(), images_of(20)
    labels = torch.arange(20) % 4
    attack = LabelAttack((Stage("ce", PGD(2)),), noise=1)
    with batches_for(network, images, options):
        evaluate_robustness(TargetModel(network, images, labels), Linf(0.1), attack, 0)
        LayerAudit(network, images, labels, "logits", settings()).under(Linf(0.1))
    assert max(network.sizes) == (options.batch_size or 7)


def settings():
    return replace(AuditSettings(Sandwich(steps=3, start_steps=2, quantisers=(2,), annealing_steps=3)), seeds=(0,))


def test_results_do_not_depend_on_the_batch_but_for_rounding():
    network, images = Watched().double().eval(), images_of(40).double()
    with torch.no_grad():
        labels = network(images).argmax(1)
    found = []
    for size in (1, 7, 256):
        with fixed_batches(size):
            attack = LabelAttack((Stage("ce", PGD(4, restarts=2)), Stage("margin", PGD(4))), noise=3)
            robust = evaluate_robustness(TargetModel(network, images, labels), Linf(0.2), attack, 0).accuracy
            layer = LayerAudit(network, images, labels, "logits", settings()).under(Linf(0.2))
        found.append((robust, layer.per_seed[0]))
    (first, vulnerable), *others = found
    assert 0 < int(first.robust.sum()) < 40
    assert max(network.sizes) >= 40
    for robust, case in others:
        assert (robust.passes, robust.forwards) == (first.passes, first.forwards)
        assert torch.equal(robust.robust, first.robust)
        assert torch.allclose(robust.outcome.margin, first.outcome.margin, atol=1e-9)
        assert torch.allclose(case.adversarial, vulnerable.adversarial, atol=1e-9)
        assert case.worst.nats == pytest.approx(vulnerable.worst.nats, abs=1e-9)


def test_attacks_of_other_packages_are_passed_in_parts():
    network, images = Watched().eval(), images_of(20)
    values, gradients = [], []
    for size in (3, 256):
        network.sizes.clear()
        counter, leaf = PassCounter(network), images.clone().requires_grad_()
        with fixed_batches(size):
            logits = counter(leaf)
            gradients += torch.autograd.grad(logits.square().sum(), leaf)
            with torch.no_grad():
                assert torch.allclose(counter(images), logits, atol=1e-6)
        values.append(logits.detach())
        assert (max(network.sizes), counter.forwards, counter.backwards) == (min(size, 20), 40, 20)
    assert torch.allclose(*values, atol=1e-6)
    assert torch.allclose(*gradients, atol=1e-5)


@pytest.mark.parametrize("command", ["audit", "attack", "certify", "features"])
def test_the_option_sets_the_batch(command):
    parameters = {
        each.name: each for each in import_module(f"audit.commands.{command}").__dict__[f"{command}_command"].params
    }
    assert "--batch-size" in parameters["batch_size"].opts
    assert run_options(SourceOptions(batch_size=5)).batch_size == 5


class AmongOthers(Watched):
    """A network whose outputs depend on the other images of the batch."""

    def forward(self, images):
        return super().forward(images - images.mean(0, keepdim=True))


@pytest.mark.parametrize("size", [1, 2, 256])
def test_a_network_that_mixes_the_images_of_a_batch_is_found_in_batches_of_any_size(size):
    network, images = AmongOthers().eval(), images_of(64)
    labels = torch.arange(64) % 4
    with fixed_batches(size):
        checks = {check.id: check for check in sanity_checks(network, images, labels)}
        labels = torch.cat([network(part) for part in images.split(min(50, size))]).argmax(1)
        attack = LabelAttack((Stage("ce", PGD(1)),))
        robust = evaluate_robustness(TargetModel(network, images, labels), Linf(0.1), attack, 0)
    assert checks["batch_independence"].passed is False
    assert {check.id: check.passed for check in robust.checks}["determinism"] is False


class OnGPU(NamedTuple):
    """What is asked of images on a GPU before any pass."""

    device: torch.device
    count: int = 7

    def __len__(self):
        return self.count


def test_a_gpu_gives_a_share_of_what_is_free_or_only_kept_and_batches_grow_to_it(monkeypatch):
    gpu = torch.device("cuda")
    figures = {"mem_get_info": (100 << 20, 1 << 34), "memory_reserved": 60 << 20, "memory_allocated": 20 << 20}
    for name, found in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, found=found: found)
    assert budget_of(gpu) == int(0.4 * (140 << 20))
    assert budget_of(torch.device("cpu")) == batch_size.CPU_BUDGET
    monkeypatch.setattr(batch_size, "fitting_batch", lambda _network, _images: 700)
    with fitting_batches(Watched(), OnGPU(gpu)):
        assert allowed(256) == 700
    with fitting_batches(Watched(), OnGPU(torch.device("cpu"))):
        assert allowed(256) == 256
    with fixed_batches(3), fitting_batches(Watched(), OnGPU(gpu)):
        assert allowed(256) == 3
