"""The penultimate layer by the graph of the logits: heads of every make, and networks without one clear last map."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from audit.errors import UsageError
from audit.representation.layers import Representation, describe_layers
from model_zoo.load import SourceSettings, load_model

ROOT = Path(__file__).parents[3]
FOLDER = Path(os.environ.get("RVAUDIT_THIRD_PARTY", ROOT.parent / "shared"))


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block whose 1x1 downsample convolution is the last map but the head's."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.downsample = nn.Conv2d(inputs, outputs, 1)

    def forward(self, maps):
        inner = self.conv2(torch.relu(self.conv1(maps)))
        return torch.relu(inner + self.downsample(maps))


class Body(nn.Module):
    def __init__(self, features=7):
        super().__init__()
        self.conv, self.layer1, self.layer2 = nn.Conv2d(3, 4, 3), Block(4, 5), Block(5, features)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images):
        return self.pool(self.layer2(self.layer1(self.conv(images)))).flatten(1)


class Net(nn.Module):
    """A body and a head of any make."""

    def __init__(self, head):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.head = Body(), head()
        self.eval().requires_grad_(False)

    def forward(self, images):
        return self.head(self.body(images))


class Weights(nn.Module):
    def __init__(self, classes=5, features=7):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, features))


class Cosine(Weights):
    def forward(self, features):
        return 10 * functional.linear(functional.normalize(features), functional.normalize(self.weight))


class Einsum(Weights):
    def forward(self, features):
        return torch.einsum("nd,kd->nk", features, self.weight)


class Matmul(Weights):
    def forward(self, features):
        return (features @ self.weight.T) / 0.07


class Differences(Weights):
    """Squared distances to prototypes, without a matrix product."""

    def forward(self, features):
        return -(features[:, None] - self.weight).square().sum(2)


class Distances(Weights):
    def forward(self, features):
        return -torch.cdist(features, self.weight)


class Masked(nn.Module):
    """Scale, soft cap and a mask of unused classes behind a linear layer."""

    def __init__(self):
        super().__init__()
        self.fc, self.scale = nn.Linear(7, 5), nn.Parameter(torch.tensor(2.0))
        self.register_buffer("unused", torch.tensor([False, False, True, False, False]))

    def forward(self, features):
        return torch.tanh(self.scale * self.fc(features) / 5).masked_fill(self.unused, -1e9)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(7, 5), nn.BatchNorm1d(5)

    def forward(self, features):
        return self.norm(self.fc(features))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.gate = nn.Linear(7, 5), nn.Linear(7, 5)

    def forward(self, features):
        return self.fc(features) * torch.sigmoid(self.gate(features))


class Halves(nn.Module):
    """Two linear layers, each on one half of the features."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 5), nn.Linear(3, 5)

    def forward(self, features):
        left, right = features.split([4, 3], 1)
        return self.left(left) + self.right(right)


class Padded(nn.Module):
    """Five logits among eight, written into a buffer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(7, 5)

    def forward(self, features):
        logits = features.new_full((len(features), 8), -1.0)
        logits[:, 2:7] = self.fc(features)
        return logits


class Rounded(nn.Module):
    """Eight-bit features, which pass no gradient on."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(7, 5)

    def forward(self, features):
        return self.fc((features * 255).round() / 255)


class Residual(nn.Module):
    """A linear layer with a residual connection round it."""

    def __init__(self):
        super().__init__()
        self.mixer = nn.Linear(7, 7)

    def forward(self, features):
        return features + self.mixer(features)


def body_of(network, images):
    return network.body(images)


HEADS = {
    "linear": (lambda: nn.Linear(7, 5), body_of),
    "cosine": (Cosine, body_of),
    "einsum": (Einsum, body_of),
    "matmul": (Matmul, body_of),
    "differences": (Differences, body_of),
    "distances": (Distances, body_of),
    "masked": (Masked, body_of),
    "normed": (Normed, body_of),
    "gated": (Gated, body_of),
    "residual": (Residual, body_of),
    "halves": (Halves, body_of),
    "padded": (Padded, body_of),
    "rounded": (Rounded, lambda net, images: (net.body(images) * 255).round() / 255),
    "two layers": (
        lambda: nn.Sequential(nn.Linear(7, 6), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(6, 5)),
        lambda net, images: torch.relu(net.head[0](net.body(images))),
    ),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_penultimate_features_are_what_the_last_map_is_applied_to(head, grad, images):
    network, (_, wanted) = Net(HEADS[head][0]), HEADS[head]
    representation = Representation(network, "penultimate")
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            assert torch.equal(representation(images), wanted(network, images))
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


class ZeroShot(nn.Module):
    """An image tower and the embeddings of class names, compared by a function of the network itself."""

    def __init__(self, tower_maps):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.visual = nn.Sequential(Body(9), nn.Linear(9, 6)) if tower_maps else Body(6)
            self.register_buffer("text", functional.normalize(torch.randn(4, 6)))
            self.scale = nn.Parameter(torch.tensor(3.0))
        self.eval()

    def forward(self, images):
        found = self.visual(images)
        return self.scale.exp() * (found / found.norm(dim=1, keepdim=True)) @ self.text.T


@pytest.mark.parametrize("tower_maps", [True, False])
def test_the_features_of_a_zero_shot_classifier_are_the_image_embeddings(tower_maps, images):
    network = ZeroShot(tower_maps)
    assert torch.equal(Representation(network, "penultimate")(images), network.visual(images))


class Functional(nn.Module):
    """A network that applies the weights of its head itself."""

    def __init__(self):
        super().__init__()
        self.body, self.weight = Body(), nn.Parameter(torch.randn(5, 7))

    def forward(self, images):
        return functional.linear(torch.relu_(self.body(images)), self.weight)


class Auxiliary(nn.Module):
    """A second head that runs last, and a third on an earlier layer, neither of which the logits are computed from."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Body(), nn.Linear(7, 5)
        self.rotation, self.early, self.seen = nn.Linear(7, 4), nn.Linear(3, 2), []

    def forward(self, images):
        features = self.body(images)
        logits = self.head(torch.relu(features))
        self.seen = [self.rotation(features), self.early(images.mean((2, 3))), self.rotation(features * 2)]
        return logits


class SharedHead(nn.Module):
    """One linear layer called for two views, of which the first gives the logits."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Body(), nn.Linear(7, 5)

    def forward(self, images):
        logits, _ = self.head(self.body(images)), self.head(self.body(images.flip(3)))
        return logits


@pytest.mark.parametrize("network", [Functional(), Auxiliary(), SharedHead()], ids=lambda net: type(net).__name__)
def test_neither_order_of_execution_nor_kind_of_module_decides(network, images):
    network.eval()
    found = Representation(network, "penultimate")
    for _ in range(2):
        features, wanted = found(images), network.body(images)
        assert torch.equal(features, torch.relu(wanted) if isinstance(network, Auxiliary) else wanted.relu())
        assert features.shape == (4, 7)


class Distilled(nn.Module):
    """The mean of two heads on two tokens."""

    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = Body(8), nn.Linear(4, 5), nn.Linear(4, 5)
        self.norm = nn.LayerNorm(4)

    def forward(self, images):
        tokens = self.norm(self.body(images).view(-1, 2, 4)).relu()
        return (self.first(tokens[:, 0]) + self.second(tokens[:, 1].clone())) / 2


def test_two_heads_on_parts_of_one_layer_take_the_layer(images):
    network = Distilled().eval()
    found = Representation(network, "penultimate")(images)
    assert torch.equal(found, network.norm(network.body(images).view(-1, 2, 4)).flatten(1))


class Hidden(nn.Module):
    """Two maps in one module, with nothing between them that a hook could read."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 7)), nn.Parameter(torch.randn(5, 6))

    def forward(self, features):
        return functional.linear(functional.linear(features, self.first).relu(), self.second)


class Ensemble(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.members = nn.ModuleList([nn.Sequential(Body(), nn.Linear(7, 5)) for _ in range(2)])

    def forward(self, images):
        maps = self.stem(images)
        return sum(member(maps) for member in self.members)


REFUSED = {
    "hidden": (lambda: Net(Hidden), "body"),
    "ensemble": (Ensemble, "stem"),
    "bare convolution": (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()), None),
    "no weights": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), None),
    "no dependence": (lambda: Constant(), None),
}


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, images):
        self.fc(images.mean((2, 3)))
        return torch.ones(len(images), 5)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_without_one_last_map_the_layer_is_refused_with_candidates(case, wrapped, images):
    build, candidate = REFUSED[case]
    network = Wrapper(build()) if wrapped else build()
    with pytest.raises(UsageError, match="needs a model whose forward ends in a linear layer") as caught:
        Representation(network.eval(), "penultimate")(images)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    if candidate is None:
        assert message.endswith("name a module instead")
    else:
        named = message.partition("such as ")[2].split(" or ")
        assert candidate in named
        for name in named:
            assert Representation(network, name).determines_logits(images)
    assert {row.name: row.calls for row in describe_layers(network, images)}["penultimate"] == 0


class Wrapper(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images * 2 - 1)


class Calls(nn.Module):
    """A network that is called in an unusual way."""

    def __init__(self, network, call):
        super().__init__()
        self.inner, self.call = network, call

    def forward(self, images):
        return self.call(self.inner, images)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows, self.head = nn.LSTM(24, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, images):
        states, _ = self.rows(images.transpose(1, 2).flatten(2))
        return self.head(states[:, -1])


def small():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 7), nn.ReLU(), nn.Linear(7, 5))


def parametrised(norm):
    network = small()
    norm(network[5])
    return network


def in_bfloat16(network, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return network(images)


def attention():
    layer = nn.TransformerEncoderLayer(64, 4, 32, batch_first=True)
    return nn.Sequential(nn.Flatten(2), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(192, 5))


UNUSUAL = {
    "weight norm": (lambda: parametrised(nn.utils.parametrizations.weight_norm), "5"),
    "spectral norm": (lambda: parametrised(nn.utils.parametrizations.spectral_norm), "5"),
    "data parallel": (lambda: nn.DataParallel(small()), "module.5"),
    "channels last": (lambda: small().to(memory_format=torch.channels_last), "5"),
    "autocast": (lambda: Calls(small(), in_bfloat16), "inner.5"),
    "half": (lambda: Calls(small().bfloat16(), lambda net, images: net(images.bfloat16()).float()), "inner.5"),
    "checkpoint": (lambda: Calls(small(), lambda *args: checkpoint(*args, use_reentrant=False)), "inner.5"),
    "reentrant checkpoint": (lambda: Calls(small(), lambda *args: checkpoint(*args, use_reentrant=True)), "inner.5"),
    "resized inside": (lambda: Calls(small(), lambda net, x: net(functional.interpolate(x, size=8))), "inner.5"),
    "recurrent": (Recurrent, "head"),
    "attention": (attention, "3"),
}


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", UNUSUAL)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of a reentrant checkpoint
def test_unusual_networks_have_their_last_linear_layers_input(case, grad, images):
    build, head = UNUSUAL[case]
    network, seen = build().eval(), []
    with grad():
        handle = network.get_submodule(head).register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
        network(images)
        handle.remove()
        representation = Representation(network, "penultimate")
        for _ in range(2):
            torch.testing.assert_close(representation(images), seen[0].flatten(1), check_dtype=False)
        assert representation.point(images).module == head


@pytest.mark.parametrize("head", ["linear", "cosine", "two layers"])
def test_a_pass_under_torch_func_locates_the_layer_too(head, images):
    network = Net(HEADS[head][0])
    rows = torch.func.jacrev(Representation(network, "penultimate"))(images[:1])
    leaf = images[:1].clone().requires_grad_()
    for number, feature in enumerate(HEADS[head][1](network, leaf)[0]):
        wanted = torch.autograd.grad(feature, leaf, retain_graph=True)[0]
        torch.testing.assert_close(rows[0, number], wanted)


def test_training_passes_run_once_and_consume_the_same_random_numbers(images):
    network = Net(HEADS["two layers"][0]).train()
    torch.manual_seed(3)
    wanted = torch.nn.functional.dropout(torch.relu(network.head[0](network.body(images))), 0.5, training=True)
    after = torch.rand(())
    torch.manual_seed(3)
    passes = []
    network.register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(Representation(network, "penultimate")(images), wanted)
    assert torch.equal(torch.rand(()), after)
    assert len(passes) == 1


def test_a_value_that_was_overwritten_later_is_read_in_a_second_pass(images):
    class Overwritten(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = Body(), nn.Linear(7, 5)

        def forward(self, images):
            features = self.body(images)
            logits = self.head(features)
            features.zero_()
            return logits

    network = Overwritten().requires_grad_(False)
    for _ in range(2):
        assert torch.equal(Representation(network, "penultimate")(images), network.body(images))


@pytest.mark.third_party
@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no third-party files in {FOLDER} (see RVAUDIT_THIRD_PARTY)")
@pytest.mark.parametrize(
    ("file", "factory", "head", "features"),
    [
        ("resnet2b.pth", "resnet2b", "linear2", 100),
        ("resnet20-12fca82f.th", "resnet20", "linear", 64),
        ("cifar_cnn_a_adv.model", "cnn_a", "7", 100),
    ],
)
@pytest.mark.parametrize("make", [Cosine, Einsum, Differences])
def test_real_networks_with_another_head_keep_their_features(file, factory, head, features, make):
    nets = ROOT / "tests" / "third_party_nets.py"
    ref = f"file:{FOLDER / 'checkpoints' / file}?arch={nets}:{factory}&num_classes=10"
    network = load_model(ref, SourceSettings(trust_code=True, offline=True)).network
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = Representation(network, "penultimate")(images)
    inner = network.network if hasattr(network, "network") else network
    assert torch.equal(getattr(inner, head)(wanted), network(images))
    setattr(inner, head, make(10, features))
    found = Representation(network, "penultimate")(images)
    assert found.shape == (2, features)
    assert torch.equal(found, wanted)
