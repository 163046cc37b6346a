"""Every measurement on a second device: no device is mixed with another, and the numbers are the CPU's.

No GPU is needed: `foreign_device.py` emulates one, and the first tests here show that it refuses what a GPU refuses.
"""

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.fused import fused_copy
from audit.adversary.gradient_checks import quick_checks
from audit.adversary.label_attack import TIERS, LabelAttack, Stage, margin_objective
from audit.adversary.minimum_norm import DDN, CarliniWagner, carlini_wagner, ddn
from audit.adversary.pgd import PGD, minimise, shrinking_ball_search
from audit.adversary.threat import L1, L2, Linf
from audit.attribution.saliency import SaliencySettings, layer_saliency
from audit.certificate.certificate import certify
from audit.certificate.collision_search import SearchEffort
from audit.certificate.dual_precision import DualPrecisionLayer
from audit.certificate.settings import CertificateSettings
from audit.config.settings import AuditSettings
from audit.information.estimator import EstimatorInputs
from audit.information.label_entropy import LabelEntropy
from audit.information.label_information import LabelInformation
from audit.information.mine import Mine
from audit.information.probing.settings import PanelSettings, ProbeTraining
from audit.information.released.estimator import Reference
from audit.information.sandwich import Sandwich
from audit.information.settings import CriticShape, CriticTraining, WorstCaseSearch
from audit.random_keys import keyed_generator
from audit.representation.layers import Representation
from audit.run.network_audit import audit_network
from audit.training.classifiers import ClassifierTraining, train_classifier
from audit.training.heads import (
    HeadFitSettings,
    HeadTraining,
    ValidationSet,
    fit_head,
    train_adversarial_head,
    train_standard_heads,
)
from audit.training.mutual_information import MITraining, train_representation
from audit.training.objectives import ObjectiveSettings

_SPEC = spec_from_file_location("foreign_device", Path(__file__).with_name("foreign_device.py"))
foreign = module_from_spec(_SPEC)
_SPEC.loader.exec_module(foreign)

CPU = torch.device("cpu")
IMAGES = torch.rand(60, 1, 8, 8, generator=keyed_generator(1))
BALLS = [Linf(0.05), L2(0.1), L1(0.3)]


def network(place=CPU):
    """A convolutional network with batch norm for four classes, weights drawn from a key."""
    layers = (nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    made, draws = nn.Sequential(*layers), keyed_generator(2)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draws) * (0.5 if weight.dim() > 1 else 0.1) + 0.05)
        made[1].running_var.copy_(0.5 + torch.rand(4, generator=draws))
        made[4].bias.sub_(made.eval()(IMAGES).mean(0))  # all four classes are named
    return made.to(place)


with torch.no_grad():
    LABELS = network()(IMAGES).argmax(1)
LABELS[:6] = (LABELS[:6] + 1) % 4


def plain(result):
    """The tensors and values of a result, of whatever nesting, on the CPU."""
    leaves = []
    for leaf in tree_leaves(result):
        if is_dataclass(leaf):
            leaves += plain([getattr(leaf, field.name) for field in fields(leaf)])
        elif isinstance(leaf, Mapping):
            leaves += plain(dict(leaf))
        else:
            leaves.append(foreign.home(leaf))
    return leaves


def on_both(work):
    """Do some work on the CPU and on the device: the results must agree. Return the device's."""
    here = plain(work(CPU))
    with foreign.foreign_device() as device:
        there = plain(work(device.device))
    assert len(here) == len(there) > 0
    for ours, theirs in zip(here, there, strict=True):
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(theirs, ours, equal_nan=True)
        elif isinstance(ours, float):
            assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5, nan_ok=True)
        else:
            assert theirs == ours
    return there


# what a GPU refuses, by the name of the fault
FAULTS = {
    "a CPU tensor beside one of the device": lambda there: there + torch.ones(3),
    "a CPU tensor written from the device": lambda there: torch.ones(3).add_(there),
    "a single number written from the device": lambda there: torch.ones(()).add_(there[0]),
    "a single number in what is not elementwise": lambda there: torch.stack([there[0], torch.ones(())]),
    "a network of the CPU on images of the device": lambda there: network()(IMAGES.to(there.device)),
    "an index of the device into a CPU tensor": lambda there: torch.ones(3)[torch.arange(2, device=there.device)],
    "values of the CPU written by index": lambda there: there.__setitem__(torch.arange(2), torch.ones(2)),
    "a generator of the CPU": lambda there: torch.rand(3, device=there.device, generator=keyed_generator(1)),
    "the device's own generator": lambda there: torch.rand_like(there),
    "a NumPy array": lambda there: there.numpy(),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_emulated_device_refuses_what_a_gpu_refuses(name):
    with pytest.raises(foreign.DeviceFault), foreign.foreign_device() as device:
        FAULTS[name](torch.zeros(3, device=device.device))


def test_a_fault_that_somebody_catches_still_shows():
    def caught():
        with foreign.foreign_device() as device:
            try:
                FAULTS["a CPU tensor beside one of the device"](torch.zeros(3, device=device.device))
            except RuntimeError:
                return

    with pytest.raises(foreign.DeviceFault, match="two devices"):
        caught()


def test_the_emulated_device_allows_what_a_gpu_allows():
    def work(place):
        values = torch.arange(6.0, device=place)
        values[torch.tensor([0, 2])] = torch.tensor(9.0)
        values[values > 8] += torch.tensor(1.0)
        made = [torch.tensor([1.0, 2.0], device=place), values.new_tensor([3.0]), network(place)(IMAGES.to(place))]
        return [values * torch.tensor(2.0), values[torch.tensor([1, 2])], values.tolist(), float(values.sum()), *made]

    on_both(work)


def test_copies_and_waits_are_written_down():
    with foreign.foreign_device() as device:
        values = torch.ones(3).to(device.device)
        float(values.sum()), values[values > 0], values.cpu()
    assert [crossing.to_host for crossing in device.crossings] == [False, True, True, True]


def test_copies_in_double_precision_hold_their_own_values():
    on_both(lambda place: copy.deepcopy(network(place)).double()(IMAGES.to(place).double()))


@pytest.mark.parametrize("threat", BALLS, ids=lambda threat: threat.norm)
def test_a_search(threat):
    def work(place):
        objective = margin_objective(network(place), LABELS.to(place))
        pgd = PGD(10, 0.25, restarts=2, batch_size=40)
        return shrinking_ball_search(objective, IMAGES.to(place), threat, pgd, keyed_generator(3))

    found = on_both(work)
    assert 0 < found[2].sum() < len(IMAGES)


@pytest.mark.parametrize("threat", BALLS, ids=lambda threat: threat.norm)
def test_the_label_attack(threat):
    # outside of l-inf the gradient-free search is ours; Square is another package's
    attack = replace(TIERS["audit"], noise=3, queries=0 if threat.norm == "linf" else 20)
    cheap = tuple(replace(stage, pgd=replace(stage.pgd, steps=4)) for stage in attack.stages)

    def work(place):
        subject = (network(place), IMAGES.to(place), LABELS.to(place))
        return measure_accuracy(*subject, threat, replace(attack, stages=cheap), 0)

    assert 0 < on_both(work)[4] < 1


def test_the_fast_copy_is_made_on_the_device_too():
    def work(place):
        original = network(place)
        made = fused_copy(original, IMAGES.to(place))
        assert made is not original
        return made(IMAGES.to(place))

    on_both(work)


def test_the_checks_of_an_attack():
    on_both(lambda place: quick_checks(network(place), IMAGES.to(place), LABELS.to(place), Linf(0.05), 0))


TRAINING = CriticTraining(steps=4, every=2, batch_size=30)
ESTIMATORS = {
    "sandwich": Sandwich(steps=4, start_steps=3, quantisers=(2,)),
    "label-level": LabelEntropy(steps=4),
    "label-information": LabelInformation(
        ProbeTraining(folds=2, steps=5), PanelSettings(trees=5, boosts=2), rounds=2, steps=3
    ),
    "mine": Mine(TRAINING, WorstCaseSearch(collapse_steps=2, rounds=2, critic_steps=1)),
    "mine, every pair": Mine(
        replace(TRAINING, shape=CriticShape("concatenated", width=16)), WorstCaseSearch(1, 1, critic_steps=1)
    ),
    "reference": Reference(width=16, steps=4, every=2, batch_size=20, search_steps=2),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator(name):
    layer = "2" if name in ("sandwich", "label-information", "reference") else "logits"

    def work(place):
        subject = EstimatorInputs(Representation(network(place), layer).encode, IMAGES.to(place), LABELS.to(place))
        found = ESTIMATORS[name].vulnerability(subject, Linf(0.05), 0)
        objective = ESTIMATORS[name].objective(subject)
        index = torch.arange(len(IMAGES), device=place)
        return found, None if objective is None else objective(subject.images, index)

    on_both(work)


def test_heads():
    def work(place):
        layer, images, labels = nn.Sequential(*network(place)[:4]), IMAGES.to(place), LABELS.to(place)
        training = HeadTraining(ProbeTraining(steps=5), epochs=1, batch_size=30, pgd=PGD(2, 0.5))
        heads = train_standard_heads(layer, images, labels, 4, training)
        heads["alf"] = train_adversarial_head(heads["slf"], images, labels, Linf(0.05), training)
        fit = HeadFitSettings(4, "mlp", Linf(0.05), PGD(2, 0.5), epochs=2, batch_size=30, hidden=8)
        fitted = fit_head(layer, images, labels, fit, {"these": ValidationSet(images, labels, Linf(0.05))})
        return [head(images) for head in (*heads.values(), fitted.last, fitted.best["these"].network)]

    on_both(work)


@pytest.mark.parametrize("critic", ["ref-local", "dot-product"])
@pytest.mark.parametrize("branch", ["detached", "cached"])
def test_training_a_representation(critic, branch):
    training = MITraining(
        0.5, Linf(0.05), PGD(2, 0.5), ObjectiveSettings(critic, width=8), branch, remembered=True,
        epochs=1, batch_size=30, shift=1, flip=True,
    )  # fmt: skip

    def work(place):
        encoder, heard = network(place), []
        train_representation(encoder, IMAGES.to(place), training, lambda _epoch, nats: heard.append(nats))
        return encoder(IMAGES.to(place)), heard

    on_both(work)


def test_training_a_classifier():
    training = ClassifierTraining(epochs=1, batch_size=30, threat=Linf(0.05), pgd=PGD(2, 0.5), flip=True)

    def work(place):
        learner = network(place)
        train_classifier(learner, IMAGES.to(place), LABELS.to(place), training)
        return learner(IMAGES.to(place))

    on_both(work)


def test_a_certificate():
    effort = SearchEffort(sign_steps=2, pair_steps=2, newton_steps=2, hubs=1, neighbours=2)

    def work(place):
        layer = DualPrecisionLayer.of(Representation(network(place), "logits"))
        return certify(layer, IMAGES[:8].to(place), LABELS[:8].to(place), Linf(0.2), CertificateSettings(effort=effort))

    on_both(work)


def test_the_nearest_images():
    def work(place):
        subject = (network(place), IMAGES.to(place), LABELS.to(place))
        return ddn(*subject, DDN(steps=5)), carlini_wagner(*subject, CarliniWagner(steps=4, searches=2))

    on_both(work)


def test_saliency_maps():
    on_both(lambda place: layer_saliency(network(place), IMAGES.to(place), SaliencySettings(draws=2)))


def test_a_whole_audit():
    attack = LabelAttack((Stage("ce", PGD(3, 0.5)), Stage("targeted", PGD(3, 0.5), 2)), noise=2)
    settings = AuditSettings(ESTIMATORS["sandwich"], attack, seeds=(0,))

    def work(place):
        record = audit_network(network(place), IMAGES.to(place), LABELS.to(place), "logits", Linf(0.05), settings)
        return replace(record, seconds=0.0, timing={})

    on_both(work)


def waits_of(steps):
    with foreign.foreign_device() as device:
        subject = (network(device.device), LABELS.to(device.device), IMAGES.to(device.device))
        device.crossings.clear()
        minimise(margin_objective(*subject[:2]), subject[2], Linf(0.01), PGD(steps, 0.25), keyed_generator(3))
    return device.waits(), sum(not crossing.to_host for crossing in device.crossings)


WAITS = 5  # a step of a search: each stops a GPU until the CPU has heard of it; four, and more where images are done


def test_a_step_of_a_search_waits_for_the_device_a_few_times_and_copies_nothing_to_it():
    (short, copies), (long, more_copies) = waits_of(4), waits_of(12)
    per_step = (long - short).total() / 8
    assert per_step <= WAITS, long - short
    assert copies == more_copies
