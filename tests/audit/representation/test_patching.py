"""Whether a layer determines the logits: never where a path leads round it, with or without a gradient."""

import pytest
import torch
from torch import nn

from audit.representation.layers import Representation


@pytest.fixture
def images():
    return torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block with one activation module that is called twice, as in torchvision's ResNets."""

    def __init__(self, skip):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.relu, self.skip = nn.ReLU(inplace=True), skip

    def forward(self, maps):
        inner = self.relu(self.conv1(maps))
        inner = self.conv2(inner)
        inner += self.skip(maps)
        return self.relu(inner)


class Net(nn.Module):
    def __init__(self, skip=lambda maps: maps):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem, self.block, self.head = nn.Conv2d(3, 3, 1), Block(skip), nn.Linear(3, 4)
        self.eval().requires_grad_(False)

    def forward(self, images):
        return self.head(self.block(self.stem(images)).mean((2, 3)))


SKIPS = {
    "identity": lambda maps: maps,
    "rounded": lambda maps: (maps * 8).round() / 8,
    "sign": torch.sign,
    "detached": lambda maps: maps.detach(),
    "without grad": torch.no_grad()(lambda maps: maps * 2),
    "by index": lambda maps: torch.zeros_like(maps) + maps.flatten(1).argmax(1).view(-1, 1, 1, 1),
}
INSIDE = ["block.conv1", "block.conv2", "block.relu@0", "block.relu@-2"]
ROUND = ["stem", "block", "block.relu@1", "block.relu@-1", "head", "input", "penultimate", "logits"]


@pytest.mark.parametrize("layer", [*INSIDE, *ROUND])
@pytest.mark.parametrize("skip", SKIPS)
def test_the_inside_of_a_residual_block_does_not_determine_the_logits(skip, layer, images):
    network = Net(SKIPS[skip])
    representation = Representation(network, layer)
    assert representation.determines_logits(images) is (layer in ROUND)
    assert (representation.encode(images).log_probs.shape[1] == 4) is (layer in ROUND)
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


class Branches(nn.Module):
    """A gate and a branch: neither determines the logits alone; both are parts of one tuple before."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.split, self.gate, self.branch, self.head = Split(), nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)
        self.eval().requires_grad_(False)

    def forward(self, images):
        left, right = self.split(images.mean((2, 3)))
        return self.head(torch.sigmoid(self.gate(left)) * self.branch(right))


class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, 12)

    def forward(self, means):
        return self.map(means).chunk(2, 1)


@pytest.mark.parametrize(
    ("layer", "determines"),
    [("split.map", True), ("split#0", False), ("split#-1", False), ("gate", False), ("branch", False), ("head", True)],
)
def test_one_of_two_branches_does_not_determine_the_logits(layer, determines, images):
    assert Representation(Branches(), layer).determines_logits(images) is determines


class Noisy(nn.Module):
    """Noise before and after the layer, drawn anew in every pass."""

    def __init__(self, skips):
        super().__init__()
        self.body, self.head, self.skips = nn.Linear(108, 6), nn.Linear(6, 3), skips

    def forward(self, images):
        pixels = images.flatten(1)
        features = self.body(pixels + 0.1 * torch.randn_like(pixels))
        logits = self.head(features) + 0.1 * torch.randn(len(images), 3)
        return logits + pixels[:, :3].round() if self.skips else logits


@pytest.mark.parametrize("skips", [False, True])
def test_random_networks_are_judged_with_the_same_noise_and_leave_the_generators_alone(skips, images):
    network = Noisy(skips).eval()
    state = torch.random.get_rng_state()
    network.skips, found = skips, Representation(network, "body")
    found.point(images)
    torch.random.set_rng_state(state)
    assert found.determines_logits(images) is not skips


def test_a_network_in_training_mode_keeps_its_buffers(images):
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3)).train()
    assert Representation(network, "0").determines_logits(images)
    assert int(network[1].num_batches_tracked) == 2  # one pass locates the layer, one follows the gradient
