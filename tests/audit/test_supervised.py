import pytest
import torch
from torch import nn

from audit.accuracy import measure_accuracy
from audit.attacks import two_losses
from audit.pgd import PGD
from audit.supervised import ClassifierTraining, train_classifier
from audit.threat import Linf


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


def test_a_separable_toy_is_learned(toy):
    net, heard = network(), []
    train_classifier(net, *toy, ClassifierTraining(epochs=3, batch_size=32), lambda *line: heard.append(line))
    assert float((net(toy[0]).argmax(1) == toy[1]).float().mean()) >= 0.99
    assert [epoch for epoch, _ in heard] == [0, 1, 2]
    assert heard[-1][1] < heard[0][1]


@pytest.mark.parametrize("threat", [None, Linf(0.1)])
def test_the_network_is_left_in_eval_mode(toy, threat):
    net = trained(toy, epochs=1, threat=threat, pgd=PGD(2, 0.5))
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("threat", [None, Linf(0.1)])
def test_the_seed_decides_the_weights(toy, threat):
    settings = {"epochs": 2, "threat": threat, "pgd": PGD(2, 0.5)}
    before = torch.random.get_rng_state()
    first, again, other = (trained(toy, seed=s, **settings).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_adversarial_training_helps_against_its_threat(toy):
    images, labels = toy
    threat = Linf(0.2)
    plain = trained(toy, epochs=6, shift=0)
    robust = trained(toy, epochs=6, shift=0, threat=threat, pgd=PGD(4, 0.5))
    attack = two_losses(PGD(5))
    values = [measure_accuracy(net, images, labels, threat, attack, 0).adversarial.value for net in (plain, robust)]
    assert values[1] >= max(0.9, values[0])


def test_the_attack_does_not_move_the_batch_statistics(toy):
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


def test_images_come_back_unchanged_and_fewer_than_a_batch_is_enough(toy):
    images, labels = toy[0][:5].clone(), toy[1][:5]
    kept = images.clone()
    train_classifier(network(), images, labels, ClassifierTraining(epochs=1, batch_size=64, shift=2))
    assert torch.equal(images, kept)
