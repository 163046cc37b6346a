"""Training by mutual information: the objective of equation 5.2, its extremes, and runs that are stopped."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf
from audit.errors import InvalidModelError, UnknownNameError, UsageError
from audit.random_keys import keyed_generator
from audit.representation.layers import Representation
from audit.training import mutual_information as learning
from audit.training.augmentation import draw_shifts
from audit.training.mutual_information import MITraining, learning_mode, objective, train_representation, worst_case
from audit.training.objectives import Scorer, ScorerShape

THREAT = Linf(0.1)
SMALL = ScorerShape("dot-product", 16, "infonce")
SETTINGS = {
    "threat": THREAT, "pgd": PGD(3, 0.4, random_start=False), "critic": SMALL, "epochs": 2, "batch_size": 16,
    "learning_rate": 1e-3,
}  # fmt: skip


class Encoder(nn.Module):
    """Eight features of 8 x 8 images by a convolution with batch norm; counts its passes in eval mode."""

    def __init__(self, smooth=False):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Tanh() if smooth else nn.ReLU(), nn.Flatten(),
                nn.Linear(64, 8),
            )  # fmt: skip
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


def scorer(shape, dtype=torch.float64, scale=1.0):
    batch, encoder = images(dtype=dtype), Encoder(smooth=True).to(dtype).eval()
    with torch.no_grad():
        features = scale * encoder(batch)
    return Scorer(batch, features, shape, keyed_generator(3)).to(dtype).eval(), batch, features, encoder


def toy(beta, branch="detached"):
    """An encoder, a critic, clean images, and how the worst case is searched, in double precision."""
    critic, batch, _, encoder = scorer(ScorerShape("dot-product", 8))
    batch = 0.2 + 0.6 * batch[:12]
    training = MITraining(**SETTINGS | {"beta": beta, "threat": Linf(0.02), "image_branch": branch})
    return encoder, critic, batch, training


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.7])
def test_the_gradient_of_the_objective_is_that_of_finite_differences_attack_included(beta):
    """The search ends in a corner of the ball, which a small change of the weights does not move: so says Danskin."""
    encoder, critic, clean, training = toy(beta)

    def value():
        moved = worst_case(encoder, critic, clean, training, keyed_generator(0)) if beta else clean
        return objective(encoder, critic, clean, moved, beta)

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


def test_the_objective_is_the_normal_case_less_beta_times_the_vulnerability():
    encoder, critic, clean, training = toy(1.0)
    moved = worst_case(encoder, critic, clean, training, keyed_generator(0))
    normal, worst = (critic(x, encoder(x)) for x in (clean, moved))
    assert float(worst.detach()) < float(normal.detach()) - 1e-3
    for beta in (0.0, 0.3, 1.0, 2.5):
        expected = normal - beta * (normal - worst)
        assert torch.allclose(objective(encoder, critic, clean, moved, beta), expected)


@pytest.mark.parametrize("branch", ["detached", "followed", "cached"])
def test_the_worst_case_is_legal_and_worth_less_than_the_clean_batch(branch):
    encoder, critic, clean, training = toy(1.0, branch)
    moved = worst_case(encoder, critic, clean, training, keyed_generator(0))
    assert float(Linf(0.02).distance(moved, clean).max()) <= 0.02 + 1e-9
    seen = clean if branch == "cached" else moved
    assert float(critic(seen, encoder(moved)).detach()) < float(critic(clean, encoder(clean)).detach())


def test_the_image_branch_is_followed_only_if_asked_to():
    followed, detached, cached = (
        worst_case(*(t := toy(1.0, branch))[:3], t[3], keyed_generator(0))
        for branch in ("followed", "detached", "cached")
    )
    assert not torch.equal(followed, detached)
    assert not torch.equal(cached, followed)


def test_beta_0_never_searches_and_needs_no_threat():
    encoder = Encoder()
    train_representation(encoder, images(), MITraining(**SETTINGS | {"beta": 0.0, "threat": None}))
    assert encoder.searched == 1  # the features that the critic is built on
    searched = Encoder()
    train_representation(searched, images(), MITraining(**SETTINGS))
    assert searched.searched == 1 + 6 * 4  # a step: three gradients and a look at where the last one led


def test_beta_1_is_training_on_the_worst_case_alone_bit_for_bit():
    encoder, batch, training = Encoder().eval(), images(), MITraining(**SETTINGS)
    draws = keyed_generator(0, 104)
    with torch.no_grad():
        critic = Scorer(batch, encoder(batch), SMALL, draws)
    adam = torch.optim.Adam([*encoder.parameters(), *critic.parameters()], 1e-3)
    for epoch in range(2):
        for chosen in torch.randperm(48, generator=keyed_generator(0, 101, epoch)).tensor_split(3):
            encoder.eval(), critic.eval()
            moved = worst_case(encoder, critic, batch[chosen], training, keyed_generator(0))
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
        {"beta": 0.5, "pgd": PGD(2, 0.4), "critic": ScorerShape(width=8)},
    ],
)
@pytest.mark.parametrize("killed", [1, 3, 4])
def test_a_run_killed_at_a_step_and_taken_up_again_ends_in_the_same_bits(tmp_path, monkeypatch, changes, killed):
    undisturbed, path = trained(**changes), tmp_path / "run.pt"
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
    assert same(trained(path, every=2, **changes), undisturbed)


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    first, heard, encoder = trained(path), [], Encoder()
    train_representation(encoder, images(), MITraining(**SETTINGS), lambda *line: heard.append(line), path)
    assert same(weights(encoder), first)
    assert heard == []
    with pytest.raises(UsageError, match="another run"):
        trained(path, beta=0.5)


def test_progress_hears_each_epoch_and_information_rises():
    heard, encoder = [], Encoder()
    settings = SETTINGS | {"beta": 0.0, "epochs": 25, "learning_rate": 5e-3}
    train_representation(encoder, images(), MITraining(**settings), lambda *line: heard.append(line))
    assert [epoch for epoch, _ in heard] == list(range(25))
    assert heard[-1][1] > heard[0][1] + 0.5
    assert not any(part.training for part in encoder.modules())


def test_the_seed_decides_and_the_global_state_stays():
    before = torch.random.get_rng_state()
    assert same(trained(), trained())
    assert not same(trained(), trained(seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_remembered_perturbations_change_what_is_learned_from_the_second_epoch_on():
    assert same(trained(epochs=1, remembered=True), trained(epochs=1))
    assert not same(trained(remembered=True), trained())


def test_a_layer_of_a_classifier_is_fine_tuned_and_frozen_parts_stay_as_they_are():
    model = nn.Sequential(Encoder().body, nn.ReLU(), nn.Linear(8, 3))
    model[0][0].requires_grad_(False)
    model[0][1].requires_grad_(False)
    before = weights(model)
    train_representation(Representation(model, "0"), images(), MITraining(**SETTINGS))
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {"0.4.weight", "0.4.bias"}


def test_frozen_batch_norm_keeps_its_statistics_and_the_rest_learns():
    encoder = Encoder()
    encoder.body[1].requires_grad_(False)
    learning_mode(encoder)
    assert not encoder.body[1].training
    assert encoder.body[0].training


def test_bf16_trains_to_finite_weights_that_differ_from_full_precision():
    mixed = trained(precision="bf16")
    assert all(tensor.isfinite().all() for tensor in mixed.values())
    assert mixed["body.0.weight"].dtype is torch.float32
    assert not same(mixed, trained())


def test_an_encoder_trained_in_bf16_answers_in_full_precision():
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


@pytest.mark.parametrize("shape", [ScorerShape("dot-product", 8), ScorerShape(width=8)])
def test_the_device_follows_the_tensors(shape, monkeypatch):
    """On a device without memory: an operation on two devices raises, and so would one that reads values."""

    def one_gradient(value, clean, threat, *_rest):
        leaf = clean.clone().requires_grad_()
        (slope,) = torch.autograd.grad(value(leaf, torch.arange(len(leaf), device=leaf.device)).value.sum(), leaf)
        moved = threat.project(clean - 0.1 * slope.sign(), clean)
        return SimpleNamespace(images=moved)

    monkeypatch.setattr(learning, "minimise", one_gradient)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _device: False)  # it does not know of this device
    batch, encoder = images(12).to("meta"), Encoder().to("meta").eval()
    with torch.no_grad():
        critic = Scorer(batch, encoder(batch), shape, keyed_generator(3))
    batch = draw_shifts(batch, 1, keyed_generator(4)).apply(batch)
    for branch in learning.IMAGE_BRANCHES:
        training = MITraining(**SETTINGS | {"image_branch": branch})
        moved = worst_case(encoder, critic, batch, training, keyed_generator(0))
        value = objective(encoder, critic, batch, moved, 0.5)
        value.backward()
        assert {moved.device.type, value.device.type, encoder.body[0].weight.grad.device.type} == {"meta"}


@pytest.mark.parametrize("name", ["ref-local", "ref-mean", "dot-product"])
@pytest.mark.parametrize("bound", ["donsker-varadhan", "infonce"])
def test_the_value_does_not_depend_on_the_order_of_the_batch(name, bound):
    critic, batch, features, _ = scorer(ScorerShape(name, 8, bound))
    order = torch.randperm(len(batch), generator=keyed_generator(1))
    assert torch.allclose(critic(batch, features), critic(batch[order], features[order]))
    assert not torch.allclose(critic(batch, features), critic(batch, features[order]))


def test_scaled_features_tell_the_dot_product_critic_the_same():
    one, batch, features, _ = scorer(ScorerShape("dot-product", 8))
    other, _, scaled, _ = scorer(ScorerShape("dot-product", 8), scale=1000.0)
    assert torch.allclose(one(batch, features), other(batch, scaled))


@pytest.mark.parametrize("flip", [False, True])
def test_shifts_are_undone_where_nothing_left_the_frame(flip):
    inner = torch.zeros(6, 2, 8, 8)
    inner[..., 2:6, 2:6] = torch.rand(6, 2, 4, 4, generator=keyed_generator(2))
    shifts = draw_shifts(inner, 2, keyed_generator(4), flip=flip)
    moved = shifts.apply(inner)
    assert not torch.equal(moved, inner)
    assert torch.equal(shifts.undo(moved), inner)
    assert torch.equal(moved.flatten(1).sort().values, inner.flatten(1).sort().values)
    nothing = draw_shifts(inner, 0, keyed_generator(4))
    assert torch.equal(nothing.undo(nothing.apply(inner)), inner)


@pytest.mark.parametrize(
    ("changes", "sentence"),
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
def test_settings_that_mean_nothing_are_refused(changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        MITraining(**{"threat": THREAT} | changes)


def test_critics_that_do_not_exist_are_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'ref-local'"):
        ScorerShape("ref-locl")
    with pytest.raises(UnknownNameError, match="did you mean 'infonce'"):
        ScorerShape(objective="infonec")
    with pytest.raises(UsageError, match="critic width 0"):
        ScorerShape(width=0)


def test_what_cannot_learn_is_refused():
    with pytest.raises(UsageError, match="1 images train no encoder"):
        train_representation(Encoder(), images(1), MITraining(**SETTINGS))
    with pytest.raises(UsageError, match="no parameter of the encoder requires a gradient"):
        train_representation(Encoder().requires_grad_(False), images(), MITraining(**SETTINGS))


def test_an_objective_that_stops_being_finite_is_named():
    class Broken(Encoder):
        def forward(self, images):
            return super().forward(images) * (torch.inf if self.training else 1.0)

    with pytest.raises(InvalidModelError, match="the objective is nan at step 0"):
        train_representation(Broken(), images(), MITraining(**SETTINGS | {"beta": 0.0}))
