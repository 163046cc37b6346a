"""Training of classifiers: updates, augmentation, adversarial training and resuming."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import two_losses
from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf
from audit.errors import UnknownNameError, UsageError
from audit.random_keys import Purpose, keyed_generator
from audit.training import classifiers
from audit.training.classifiers import ClassifierTraining, StepSchedule, train_classifier


@pytest.fixture
def toy():
    """Two classes of 6x6 images: a bright left or a bright right half, in noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(160) % 2
    images = 0.4 * torch.rand(160, 1, 6, 6, generator=generator)
    images[labels == 0, :, :, :3] += 0.5
    images[labels == 1, :, :, 3:] += 0.5
    return images, labels


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
        )


def trained(toy, **settings):
    net = network()
    train_classifier(net, *toy, ClassifierTraining(**{"epochs": 3, "batch_size": 32, **settings}))
    return net


def test_a_separable_problem_is_learned(toy):
    net, received = network(), []
    train_classifier(net, *toy, ClassifierTraining(epochs=3, batch_size=32), lambda *line: received.append(line))
    assert float((net(toy[0]).argmax(1) == toy[1]).float().mean()) >= 0.99
    assert [epoch for epoch, _ in received] == [0, 1, 2]
    assert received[-1][1] < received[0][1]


@pytest.mark.parametrize("threat", [None, Linf(0.1)])
def test_the_network_is_left_in_eval_mode(toy, threat):
    net = trained(toy, epochs=1, threat=threat, pgd=PGD(2, 0.5))
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("threat", [None, Linf(0.1)])
def test_weights_are_deterministic_given_the_seed(toy, threat):
    settings = {"epochs": 2, "threat": threat, "pgd": PGD(2, 0.5)}
    before = torch.random.get_rng_state()
    first, again, other = (trained(toy, seed=s, **settings).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_adversarial_training_raises_adversarial_accuracy(toy):
    images, labels = toy
    threat = Linf(0.2)
    plain = trained(toy, epochs=6, shift=0)
    robust = trained(toy, epochs=6, shift=0, threat=threat, pgd=PGD(4, 0.5))
    attack = two_losses(PGD(5))
    values = [measure_accuracy(net, images, labels, threat, attack, 0).adversarial.value for net in (plain, robust)]
    assert values[1] >= max(0.9, values[0])


def test_the_attack_does_not_update_the_batch_statistics(toy):
    seen = []

    class Spy(nn.BatchNorm2d):
        def forward(self, images):
            seen.append(self.training)
            return super().forward(images)

    net = nn.Sequential(Spy(1), nn.Flatten(), nn.Linear(36, 2))
    images, labels = toy
    train_classifier(
        net, images[:8], labels[:8], ClassifierTraining(epochs=1, batch_size=8, threat=Linf(0.1), pgd=PGD(3))
    )
    assert seen.count(True) == 1
    assert seen.count(False) > 3
    assert int(net[0].num_batches_tracked) == 1


def test_images_are_not_modified_and_may_be_fewer_than_a_batch(toy):
    images, labels = toy[0][:5].clone(), toy[1][:5]
    kept = images.clone()
    train_classifier(network(), images, labels, ClassifierTraining(epochs=1, batch_size=64, shift=2))
    assert torch.equal(images, kept)


def test_sgd_follows_the_textbook_update_with_a_step_schedule(toy):
    images, labels = toy[0][:64], toy[1][:64]
    settings = ClassifierTraining(
        epochs=4, batch_size=64, learning_rate=0.1, weight_decay=5e-4, shift=0, steps=StepSchedule(2, 0.1, 0.9)
    )
    net, reference = network(), network()
    train_classifier(net, images, labels, settings)
    velocity = [torch.zeros_like(weight) for weight in reference.parameters()]
    generator = torch.Generator().manual_seed(0)
    for rate in (0.1, 0.1, 0.01, 0.01):
        order = torch.randperm(64, generator=generator)  # one batch holds all images, so their order does not matter
        loss = nn.functional.cross_entropy(reference(images[order]), labels[order])
        slopes = torch.autograd.grad(loss, list(reference.parameters()))
        with torch.no_grad():
            for weight, slope, speed in zip(reference.parameters(), slopes, velocity, strict=True):
                speed.mul_(0.9).add_(slope + 5e-4 * weight)
                weight.sub_(rate * speed)
    for found, expected in zip(net.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


def test_images_are_flipped_independently(toy):
    seen = []

    class Spy(nn.Module):
        def forward(self, images):
            seen.append(images.detach())
            return images

    images = toy[0][:64]
    net = nn.Sequential(Spy(), nn.Flatten(), nn.Linear(36, 2))
    train_classifier(net, images, toy[1][:64], ClassifierTraining(epochs=1, batch_size=64, shift=0, flip=True))
    kept, mirrored = ({row.numpy().tobytes() for row in each} for each in (images, images.flip(3).contiguous()))
    was = [(row.numpy().tobytes() in kept, row.numpy().tobytes() in mirrored) for row in seen[0]]
    assert all(one != other for one, other in was)
    assert 10 < sum(one for one, _ in was) < 54


class _Killed(Exception):
    pass


@pytest.mark.parametrize(
    "changes",
    [{}, {"threat": Linf(0.1), "pgd": PGD(2, 0.5)}, {"steps": StepSchedule(1), "flip": True, "learning_rate": 0.05}],
)
def test_a_killed_and_resumed_run_gives_the_same_weights(toy, tmp_path, monkeypatch, changes):
    settings, path = ClassifierTraining(**{"epochs": 3, "batch_size": 32} | changes), tmp_path / "run.pt"
    uninterrupted, steps, net = trained(toy, **changes).state_dict(), [], network()
    with monkeypatch.context() as patch:

        def failing(module, batch, labels, training, generator):
            steps.append(None)
            if len(steps) == 8:  # the third step of the second epoch
                raise _Killed
            return original(module, batch, labels, training, generator)

        original = classifiers._loss
        patch.setattr(classifiers, "_loss", failing)
        with pytest.raises(_Killed):
            train_classifier(net, *toy, settings, checkpoint_path=path)
    received, again = [], network()
    train_classifier(again, *toy, settings, lambda epoch, _loss: received.append(epoch), path)
    assert received == [1, 2]
    assert all(torch.equal(tensor, uninterrupted[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(UsageError, match="another run"):
        train_classifier(network(), *toy, ClassifierTraining(epochs=4, batch_size=32), checkpoint_path=path)


@pytest.mark.parametrize("threat", [None, Linf(0.1)])
def test_bf16_training_keeps_weights_and_outputs_in_float32(toy, threat):
    settings = {"epochs": 1, "threat": threat, "pgd": PGD(1, 0.5)}
    mixed, full = trained(toy, precision="bf16", **settings), trained(toy, **settings)
    assert all(tensor.isfinite().all() for tensor in mixed.state_dict().values())
    assert {weight.dtype for weight in mixed.parameters()} == {torch.float32}
    assert mixed(toy[0]).dtype is torch.float32
    assert not torch.equal(mixed[0].weight, full[0].weight)


def test_illegal_settings_are_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'bf16'"):
        ClassifierTraining(precision="bf61")
    for changes, message in (
        ({"every": 0}, "schedule every 0 must be at least 1"),
        ({"factor": 0.0}, "schedule factor 0.0 must be above 0"),
        ({"momentum": 1.0}, r"schedule momentum 1\.0 must be at least 0 and below 1"),
    ):
        with pytest.raises(UsageError, match=message):
            StepSchedule(**changes)


def tilted(scale=1.0):
    """Return a linear classifier without batch statistics."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    with torch.no_grad():
        net[1].weight.copy_(scale * torch.randn(2, 36, generator=torch.Generator().manual_seed(3)))
        net[1].bias.zero_()
    return net


def test_trades_is_the_clean_loss_and_beta_times_the_divergence(toy):
    images, labels = toy[0][:32], toy[1][:32]
    net, threat = tilted(), Linf(0.1)
    settings = ClassifierTraining(method="trades", threat=threat, pgd=PGD(5, 0.5), beta=3.0)

    def generator():
        return torch.Generator().manual_seed(4)

    moved = classifiers._attacked(net, images, labels, settings, generator())
    assert float(threat.distance(moved, images).max()) <= threat.eps + 1e-6
    clean, other = net(images).log_softmax(1), net(moved).log_softmax(1)
    divergence = F.kl_div(other, clean, reduction="batchmean", log_target=True)
    expected = F.cross_entropy(net(images), labels) + 3.0 * divergence
    assert torch.allclose(classifiers._loss(net, images, labels, settings, generator()), expected, rtol=1e-5)
    at_random = net(threat.random_start(images, generator())).log_softmax(1)
    assert divergence > F.kl_div(at_random, clean, reduction="batchmean", log_target=True)


def test_noise_is_a_random_point_of_the_ball_without_a_search(toy):
    seen = []

    class Watched(nn.Sequential):
        def forward(self, images):
            seen.append(images.detach().clone())
            return super().forward(images)

    net, (images, labels) = Watched(*tilted()), (toy[0][:32], toy[1][:32])
    settings = ClassifierTraining(epochs=1, batch_size=32, shift=0, method="noise", threat=Linf(0.1))
    train_classifier(net, images, labels, settings)
    (moved,) = seen  # one pass
    order = torch.randperm(32, generator=keyed_generator(0, Purpose.CLASSIFIER_TRAINING))
    changes = (moved - images[order]).abs()
    assert float(changes.max()) <= 0.1 + 1e-6
    assert float(changes.mean()) > 0.02


def test_the_method_is_part_of_the_identity_where_it_matters():
    base = {"threat": Linf(0.1)}
    adversarial = ClassifierTraining(**base).identity()
    assert not {"method", "beta"} & set(adversarial)  # checkpoints of earlier versions stay valid
    trades, noise = (ClassifierTraining(**base, method=name).identity() for name in ("trades", "noise"))
    assert trades == adversarial | {"method": "trades", "beta": 6.0}
    assert noise == adversarial | {"method": "noise"}
    with pytest.raises(UnknownNameError, match="did you mean 'trades'"):
        ClassifierTraining(method="trade")
    with pytest.raises(UsageError, match="beta -1"):
        ClassifierTraining(method="trades", beta=-1)
