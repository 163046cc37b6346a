"""Training by mutual information: the objective of equation 5.2, the worst-case search, and resuming."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf
from audit.errors import InvalidModelError, UnknownNameError, UsageError
from audit.random_keys import keyed_generator
from audit.representation.layers import Representation
from audit.training import mutual_information
from audit.training.augmentation import draw_shifts
from audit.training.mutual_information import (
    MITraining,
    find_worst_case,
    mi_objective,
    set_training_mode,
    train_representation,
)
from audit.training.objectives import ObjectiveSettings, VariationalObjective

THREAT = Linf(0.1)
SMALL = ObjectiveSettings("dot-product", 16, "infonce")
SETTINGS = {
    "threat": THREAT,
    "pgd": PGD(3, 0.4, random_start=False),
    "critic": SMALL,
    "epochs": 2,
    "batch_size": 16,
    "learning_rate": 1e-3,
}


class Encoder(nn.Module):
    """Eight features of 8 x 8 images by a convolution with batch norm; counts its passes in eval mode."""

    def __init__(self, smooth=False):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Conv2d(1, 4, 3, 2, 1),
                nn.BatchNorm2d(4),
                nn.Tanh() if smooth else nn.ReLU(),
                nn.Flatten(),
                nn.Linear(64, 8),
            )
        self.searched = 0

    def forward(self, images):
        self.searched += not self.training
        return self.body(images)


def images(count=48, dtype=torch.float32):
    return torch.rand(count, 1, 8, 8, generator=keyed_generator(7)).to(dtype)


def weights(encoder):
    return {name: tensor.clone() for name, tensor in encoder.state_dict().items()}


def trained(path=None, **changes):
    encoder = Encoder()
    train_representation(encoder, images(), MITraining(**SETTINGS | changes), checkpoint_path=path)
    return weights(encoder)


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def build_objective(settings, dtype=torch.float64, scale=1.0):
    batch, encoder = images(dtype=dtype), Encoder(smooth=True).to(dtype).eval()
    with torch.no_grad():
        features = scale * encoder(batch)
    return (
        VariationalObjective(batch, features, settings, keyed_generator(3)).to(dtype).eval(),
        batch,
        features,
        encoder,
    )


def toy(beta, branch="detached"):
    """An encoder, a critic, clean images and training settings, in double precision."""
    critic, batch, _, encoder = build_objective(ObjectiveSettings("dot-product", 8))
    batch = 0.2 + 0.6 * batch[:12]
    training = MITraining(**SETTINGS | {"beta": beta, "threat": Linf(0.02), "image_branch": branch})
    return encoder, critic, batch, training


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.7])
def test_the_gradient_of_the_objective_matches_finite_differences_through_the_search(beta):
    """Danskin's theorem: the search ends in a corner of the ball, which small changes of the weights do not move."""
    encoder, critic, clean, training = toy(beta)

    def value():
        moved = find_worst_case(encoder, critic, clean, training, keyed_generator(0)) if beta else clean
        return mi_objective(encoder, critic, clean, moved, beta)

    for weight in (encoder.body[0].weight, encoder.body[4].weight, critic.critic.of_feature.embed.weight):
        (gradient,) = torch.autograd.grad(value(), weight)
        direction = torch.randn(weight.shape, generator=keyed_generator(5), dtype=weight.dtype)
        step, found = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(sign * step * direction)
            found.append(float(value().detach()))
            with torch.no_grad():
                weight.sub_(sign * step * direction)
        numerical = (found[0] - found[1]) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(numerical, rel=1e-4, abs=1e-8)
        assert abs(numerical) > 1e-5


def test_the_objective_is_the_normal_case_minus_beta_times_the_vulnerability():
    encoder, critic, clean, training = toy(1.0)
    moved = find_worst_case(encoder, critic, clean, training, keyed_generator(0))
    normal, worst = (critic(x, encoder(x)) for x in (clean, moved))
    assert float(worst.detach()) < float(normal.detach()) - 1e-3
    for beta in (0.0, 0.3, 1.0, 2.5):
        expected = normal - beta * (normal - worst)
        assert torch.allclose(mi_objective(encoder, critic, clean, moved, beta), expected)


@pytest.mark.parametrize("branch", ["detached", "followed", "cached"])
def test_the_worst_case_is_legal_and_has_a_smaller_value_than_the_clean_batch(branch):
    encoder, critic, clean, training = toy(1.0, branch)
    moved = find_worst_case(encoder, critic, clean, training, keyed_generator(0))
    assert float(Linf(0.02).distance(moved, clean).max()) <= 0.02 + 1e-9
    seen = clean if branch == "cached" else moved
    assert float(critic(seen, encoder(moved)).detach()) < float(critic(clean, encoder(clean)).detach())


def test_image_branches_lead_to_different_worst_cases():
    followed, detached, cached = (
        find_worst_case(*(t := toy(1.0, branch))[:3], t[3], keyed_generator(0))
        for branch in ("followed", "detached", "cached")
    )
    assert not torch.equal(followed, detached)
    assert not torch.equal(cached, followed)


def test_beta_0_never_searches_and_needs_no_threat():
    encoder = Encoder()
    train_representation(encoder, images(), MITraining(**SETTINGS | {"beta": 0.0, "threat": None}))
    assert encoder.searched == 1  # the features that the critic is initialised with
    searched = Encoder()
    train_representation(searched, images(), MITraining(**SETTINGS))
    assert searched.searched == 1 + 6 * 4  # a step: three gradients and an evaluation of the last iterate


def test_beta_1_equals_training_on_the_worst_case_alone():
    encoder, batch, training = Encoder().eval(), images(), MITraining(**SETTINGS)
    draws = keyed_generator(0, 104)
    with torch.no_grad():
        critic = VariationalObjective(batch, encoder(batch), SMALL, draws)
    adam = torch.optim.Adam([*encoder.parameters(), *critic.parameters()], 1e-3)
    for epoch in range(2):
        for chosen in torch.randperm(48, generator=keyed_generator(0, 101, epoch)).tensor_split(3):
            encoder.eval(), critic.eval()
            moved = find_worst_case(encoder, critic, batch[chosen], training, keyed_generator(0))
            encoder.train(), critic.train()
            adam.zero_grad()
            (-critic(moved, encoder(moved))).backward()
            adam.step()
    assert same(weights(encoder), trained())
    assert not same(weights(encoder), trained(beta=0.999))


class _Killed(Exception):
    pass


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"remembered": True, "shift": 1, "flip": True},
        {"beta": 0.5, "pgd": PGD(2, 0.4), "critic": ObjectiveSettings(width=8)},
    ],
)
@pytest.mark.parametrize("killed", [1, 3, 4])
def test_a_killed_and_resumed_run_gives_the_same_weights(tmp_path, monkeypatch, changes, killed):
    uninterrupted, path = trained(**changes), tmp_path / "run.pt"
    with monkeypatch.context() as patch:
        taken, step = [], torch.optim.Adam.step

        def stepping(self, *arguments, **named):
            if len(taken) == killed:
                raise _Killed
            taken.append(None)
            return step(self, *arguments, **named)

        patch.setattr(torch.optim.Adam, "step", stepping)
        with pytest.raises(_Killed):
            trained(path, every=2, **changes)
    assert path.exists() == (killed > 1)
    assert same(trained(path, every=2, **changes), uninterrupted)


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    first, received, encoder = trained(path), [], Encoder()
    train_representation(encoder, images(), MITraining(**SETTINGS), lambda *line: received.append(line), path)
    assert same(weights(encoder), first)
    assert received == []
    with pytest.raises(UsageError, match="another run"):
        trained(path, beta=0.5)


def test_progress_receives_each_epoch_and_information_rises():
    received, encoder = [], Encoder()
    settings = SETTINGS | {"beta": 0.0, "epochs": 25, "learning_rate": 5e-3}
    train_representation(encoder, images(), MITraining(**settings), lambda *line: received.append(line))
    assert [epoch for epoch, _ in received] == list(range(25))
    assert received[-1][1] > received[0][1] + 0.5
    assert not any(part.training for part in encoder.modules())


def test_training_is_deterministic_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    assert same(trained(), trained())
    assert not same(trained(), trained(seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_remembered_perturbations_take_effect_in_the_second_epoch():
    assert same(trained(epochs=1, remembered=True), trained(epochs=1))
    assert not same(trained(remembered=True), trained())


def test_a_layer_of_a_classifier_is_fine_tuned_and_frozen_modules_are_unchanged():
    model = nn.Sequential(Encoder().body, nn.ReLU(), nn.Linear(8, 3))
    model[0][0].requires_grad_(False)
    model[0][1].requires_grad_(False)
    before = weights(model)
    train_representation(Representation(model, "0"), images(), MITraining(**SETTINGS))
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {"0.4.weight", "0.4.bias"}


def test_frozen_batch_norm_stays_in_eval_mode():
    encoder = Encoder()
    encoder.body[1].requires_grad_(False)
    set_training_mode(encoder)
    assert not encoder.body[1].training
    assert encoder.body[0].training


def test_bf16_trains_to_finite_weights_that_differ_from_full_precision():
    mixed = trained(precision="bf16")
    assert all(tensor.isfinite().all() for tensor in mixed.values())
    assert mixed["body.0.weight"].dtype is torch.float32
    assert not same(mixed, trained())


def test_an_encoder_trained_in_bf16_computes_in_float32():
    encoder, seen = Encoder(), []
    encoder.body[4].register_forward_hook(lambda _module, _given, out: seen.append(out.dtype))
    train_representation(encoder, images(), MITraining(**SETTINGS | {"precision": "bf16"}))
    assert torch.bfloat16 in seen
    seen.clear()
    plain = Encoder().eval()
    plain.load_state_dict(encoder.state_dict())
    assert torch.equal(encoder(images()), plain(images()))
    assert set(seen) == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("settings", [ObjectiveSettings("dot-product", 8), ObjectiveSettings(width=8)])
def test_the_device_follows_the_tensors(settings, monkeypatch):
    """On the meta device: operations across devices raise, and so do operations that read values."""

    def one_gradient(value, clean, threat, *_rest):
        leaf = clean.clone().requires_grad_()
        (slope,) = torch.autograd.grad(value(leaf, torch.arange(len(leaf), device=leaf.device)).value.sum(), leaf)
        moved = threat.project(clean - 0.1 * slope.sign(), clean)
        return SimpleNamespace(images=moved)

    monkeypatch.setattr(mutual_information, "minimise", one_gradient)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _device: False)  # it does not support the meta device
    batch, encoder = images(12).to("meta"), Encoder().to("meta").eval()
    with torch.no_grad():
        critic = VariationalObjective(batch, encoder(batch), settings, keyed_generator(3))
    batch = draw_shifts(batch, 1, keyed_generator(4)).apply(batch)
    for branch in mutual_information.IMAGE_BRANCHES:
        training = MITraining(**SETTINGS | {"image_branch": branch})
        moved = find_worst_case(encoder, critic, batch, training, keyed_generator(0))
        value = mi_objective(encoder, critic, batch, moved, 0.5)
        value.backward()
        assert {moved.device.type, value.device.type, encoder.body[0].weight.grad.device.type} == {"meta"}


@pytest.mark.parametrize("name", ["ref-local", "ref-mean", "dot-product"])
@pytest.mark.parametrize("bound", ["donsker-varadhan", "infonce"])
def test_the_value_does_not_depend_on_the_order_of_the_batch(name, bound):
    critic, batch, features, _ = build_objective(ObjectiveSettings(name, 8, bound))
    order = torch.randperm(len(batch), generator=keyed_generator(1))
    assert torch.allclose(critic(batch, features), critic(batch[order], features[order]))
    assert not torch.allclose(critic(batch, features), critic(batch, features[order]))


def test_the_dot_product_critic_is_invariant_to_the_scale_of_features():
    one, batch, features, _ = build_objective(ObjectiveSettings("dot-product", 8))
    other, _, scaled, _ = build_objective(ObjectiveSettings("dot-product", 8), scale=1000.0)
    assert torch.allclose(one(batch, features), other(batch, scaled))


@pytest.mark.parametrize("flip", [False, True])
def test_shifts_are_undone_if_no_pixel_left_the_frame(flip):
    inner = torch.zeros(6, 2, 8, 8)
    inner[..., 2:6, 2:6] = torch.rand(6, 2, 4, 4, generator=keyed_generator(2))
    shifts = draw_shifts(inner, 2, keyed_generator(4), flip=flip)
    moved = shifts.apply(inner)
    assert not torch.equal(moved, inner)
    assert torch.equal(shifts.undo(moved), inner)
    assert torch.equal(moved.flatten(1).sort().values, inner.flatten(1).sort().values)
    identity = draw_shifts(inner, 0, keyed_generator(4))
    assert torch.equal(identity.undo(identity.apply(inner)), inner)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": -0.1}, "beta -0.1 must be at least 0"),
        ({"threat": None}, r"beta 1\.0 needs a threat model"),
        ({"learning_rate": 0.0}, "learning_rate 0.0 must be above 0"),
        ({"batch_size": 1}, "batch_size 1 must be at least 2"),
        ({"epochs": 0}, "epochs 0 must be at least 1"),
        ({"precision": "bf61"}, "unknown precision 'bf61'; did you mean 'bf16'"),
        ({"image_branch": "cache"}, "did you mean 'cached'"),
    ],
)
def test_illegal_settings_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        MITraining(**{"threat": THREAT} | changes)


def test_illegal_critics_are_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'ref-local'"):
        ObjectiveSettings("ref-locl")
    with pytest.raises(UnknownNameError, match="did you mean 'infonce'"):
        ObjectiveSettings(objective="infonec")
    with pytest.raises(UsageError, match="critic width 0"):
        ObjectiveSettings(width=0)


def test_encoders_that_cannot_be_trained_are_refused():
    with pytest.raises(UsageError, match="an encoder cannot be trained on 1 images"):
        train_representation(Encoder(), images(1), MITraining(**SETTINGS))
    with pytest.raises(UsageError, match="no parameter of the encoder requires a gradient"):
        train_representation(Encoder().requires_grad_(False), images(), MITraining(**SETTINGS))


def test_a_non_finite_objective_is_an_error():
    class Broken(Encoder):
        def forward(self, images):
            return super().forward(images) * (torch.inf if self.training else 1.0)

    with pytest.raises(InvalidModelError, match="the objective is nan at step 0"):
        train_representation(Broken(), images(), MITraining(**SETTINGS | {"beta": 0.0}))
