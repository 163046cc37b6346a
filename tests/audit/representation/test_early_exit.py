"""Early exit: no module after the layer runs, and features and gradients are those of a complete pass."""

import copy
import gc
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from audit.errors import UsageError
from audit.representation.layers import Representation, encode_layers, features_of_layers


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, maps):
        inner = self.relu(self.bn1(self.conv1(maps)))
        joined = self.bn2(self.conv2(inner))
        joined += self.shortcut(maps)
        return self.relu(joined)


class SmallResNet(nn.Module):
    """A ResNet with in-place operations and a module that is called several times."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
            self.layer1 = nn.Sequential(Block(4, 4), Block(4, 6))
            self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 5))

    def forward(self, images):
        maps = self.layer1(self.relu(self.bn1(self.conv1(images))))
        return self.head(maps.mean((2, 3)))


@pytest.fixture
def network():
    return SmallResNet().eval().requires_grad_(False)


@pytest.fixture
def images():
    return torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Events(list):
    """The starts and ends of module calls in forward passes, in order."""

    def __init__(self, model):
        super().__init__()
        self.handles = []
        for name, module in model.named_modules():
            self.handles += [
                module.register_forward_pre_hook(lambda _m, _i, name=name: self.append(("in", name))),
                module.register_forward_hook(lambda _m, _i, _o, name=name: self.append(("out", name))),
            ]

    def until(self, event, call):
        positions = [position for position, each in enumerate(self) if each == event]
        return self[: positions[call] + 1]

    def remove(self):
        for handle in self.handles:
            handle.remove()


def reference(model, path, call, images, is_input=False):
    """The activation recorded by a cloning hook in a complete forward pass."""
    calls, module = [], model.get_submodule(path)
    if is_input:
        handle = module.register_forward_pre_hook(lambda _m, args: calls.append(args[0].clone()))
    else:
        handle = module.register_forward_hook(lambda _m, _i, output: calls.append(output.clone()))
    model(images)
    handle.remove()
    return calls[call].flatten(1)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


LAYERS = {
    "conv1": ("conv1", 0),
    "bn1": ("bn1", 0),
    "relu": ("relu", 0),
    "layer1": ("layer1", 0),
    "layer1.0": ("layer1.0", 0),
    "layer1.0.bn2": ("layer1.0.bn2", 0),
    "layer1.0.shortcut": ("layer1.0.shortcut", 0),
    "layer1.0.relu@0": ("layer1.0.relu", 0),
    "layer1.0.relu@-1": ("layer1.0.relu", 1),
    "layer1.1.relu@-2": ("layer1.1.relu", 0),
    "head.0": ("head.0", 0),
    "head": ("head", 0),
}


@pytest.mark.parametrize("layer", [*LAYERS, "penultimate"])
def test_no_module_runs_after_the_layer_and_values_are_exact(network, images, layer):
    is_input = layer == "penultimate"
    path, call = ("head.2", 0) if is_input else LAYERS[layer]
    found, representation = [], Representation(network, layer)
    for _ in range(3):
        leaf = images.clone().requires_grad_()
        features = representation(leaf)
        found.append((features.detach(), *torch.autograd.grad(features.pow(2).sum(), leaf)))
    leaf = images.clone().requires_grad_()
    wanted = reference(network, path, call, leaf, is_input)
    (slope,) = torch.autograd.grad(wanted.pow(2).sum(), leaf)
    for values, gradient in found:
        assert torch.equal(values, wanted)
        assert torch.equal(gradient, slope)
    assert hooks(network) == 0
    events = Events(network)
    network(images)
    whole = events.until(("in" if is_input else "out", path), call)
    events.clear()
    representation(images)
    assert events == whole
    events.remove()


def test_the_first_call_runs_the_whole_network_and_input_runs_none(network, images):
    events = Events(network)
    Representation(network, "conv1")(images)
    assert events[-1] == ("out", "")
    events.clear()
    Representation(network, "input")(images)
    assert not events


@pytest.mark.parametrize("mode", ["fresh", "used"])
@pytest.mark.parametrize("layer", ["layer1.0.relu@-1", "penultimate"])
def test_deep_copies_and_other_precisions_use_their_own_network(network, images, layer, mode):
    representation = Representation(network, layer)
    if mode == "used":
        representation(images)
    twin = copy.deepcopy(representation).double()
    for _ in range(2):
        wanted = Representation(copy.deepcopy(network).double(), layer)(images.double())
        assert torch.equal(twin(images.double()), wanted)
        assert representation(images).dtype == torch.float32
    assert hooks(network) == hooks(twin) == 0


def test_functional_transforms_are_supported(network, images):
    representation = Representation(network, "layer1.0.relu@0", "mean")
    for _ in range(2):
        rows = torch.func.jacrev(representation)(images[:1])
        leaf = images[:1].clone().requires_grad_()
        for number, feature in enumerate(representation(leaf)[0]):
            torch.testing.assert_close(rows[0, number], torch.autograd.grad(feature, leaf, retain_graph=True)[0])
    each = torch.func.vmap(lambda image: representation(image[None])[0])(images)
    torch.testing.assert_close(each, representation(images))


def test_gradients_of_a_checkpointed_module_are_exact(network, images):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network

        def forward(self, images):
            return checkpoint(self.body, images, use_reentrant=False)

    representation, slopes = Representation(Checkpointed(), "body.layer1.0.bn1"), []
    for _ in range(2):
        leaf = images.clone().requires_grad_()
        slopes += torch.autograd.grad(representation(leaf).pow(2).sum(), leaf)
    assert torch.equal(*slopes)
    assert float(slopes[0].abs().sum()) > 0


class Swallows(nn.Module):
    """Handles exceptions of its body in one of several ways, then overwrites the body's output in place."""

    def __init__(self, how):
        super().__init__()
        self.how, self.body, self.then, self.bodies = how, nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True), 0

    def forward(self, images):
        self.bodies += 1
        try:
            maps = self.body(images)
        except Exception:
            maps = images[:, :2] - 1
        except BaseException as error:
            if self.how == "reraises":
                raise
            if self.how == "replaces":
                raise RuntimeError("the body failed") from error
            maps = images[:, :2] - 1
        return self.then(maps).flatten(1)


@pytest.mark.parametrize(("how", "passes"), [("reraises", [1, 1, 1]), ("replaces", [1, 2, 1]), ("swallows", [1, 2, 1])])
def test_a_network_that_catches_exceptions_is_run_to_its_end(images, how, passes):
    network = Swallows(how).requires_grad_(False)
    network.body.weight.fill_(1.0)
    network.body.bias.fill_(-1.0)
    representation, wanted = Representation(network, "body"), network.body(images).flatten(1)
    assert float(wanted.min()) < 0
    for count in passes:
        network.bodies = 0
        assert torch.equal(representation(images), wanted)
        assert network.bodies == count
        assert hooks(network) == 0


class Repeats(nn.Module):
    """Calls its layer `times` times."""

    def __init__(self, times):
        super().__init__()
        self.times, self.layer = times, nn.Linear(2, 2)

    def forward(self, images):
        vectors = images.flatten(1)
        for _ in range(self.times):
            vectors = self.layer(vectors)
        return vectors


@pytest.mark.parametrize(
    ("layer", "times", "message"),
    [("layer@2", 1, "selects call 2, but a forward pass has only 1"), ("layer@-1", 0, "'layer@-1' is never called")],
)
def test_a_call_that_no_longer_happens_is_an_error(layer, times, message):
    network, images = Repeats(3), torch.rand(2, 1, 1, 2)
    representation = Representation(network, layer)
    last = representation(images)
    assert torch.equal(representation(images), last)
    network.times = times
    with pytest.raises(UsageError, match=message):
        representation(images)
    network.times = 3
    assert torch.equal(representation(images), last)
    assert hooks(network) == 0


def test_a_last_call_that_moves_is_located_again():
    network, images = Repeats(3), torch.rand(2, 1, 1, 2)
    representation = Representation(network, "layer@-1")
    representation(images)
    network.times = 2
    for _ in range(2):
        assert torch.equal(representation(images), network(images))


def test_training_and_evaluation_mode_are_located_separately():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.more = nn.Linear(2, 3), nn.Linear(3, 3)

        def forward(self, images):
            answer = self.head(images.flatten(1))
            return self.more(answer) if self.training else answer

    network, images = Auxiliary(), torch.rand(4, 1, 1, 2)
    representation = Representation(network, "penultimate")
    for training in (True, False, True, False):
        network.train(training)
        assert representation(images).shape == (4, 3 if training else 2)


def test_representations_may_be_nested(network, images):
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.head = inner, nn.Linear(144, 2)

        def forward(self, images):
            return self.head(self.inner(images))

    outer = Outer(Representation(network, "layer1.0"))
    wanted = reference(network, "bn1", 0, images), reference(network, "layer1.0", 0, images)
    for _ in range(3):
        assert torch.equal(Representation(outer, "inner.model.bn1")(images), wanted[0])
        assert torch.equal(Representation(outer, "penultimate")(images), wanted[1])
    within = Representation(outer, "inner.model.bn1")
    for _ in range(3):
        assert torch.equal(within(images), wanted[0])
    assert hooks(outer) == 0


def test_an_error_of_the_network_is_raised(network, images):
    representation = Representation(network, "layer1")
    representation(images)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="channels"):
            representation(images[:, :2])
        assert hooks(network) == 0


def test_an_early_exit_frees_all_activations(network, images):
    activations = []
    handle = network.bn1.register_forward_hook(lambda _m, _i, output: activations.append(weakref.ref(output)))
    representation = Representation(network, "layer1.0.conv1")
    representation(images)
    gc.disable()
    try:
        representation(images)
        assert [each() for each in activations] == [None, None]
    finally:
        gc.enable()
        handle.remove()


def test_features_without_log_probabilities_exit_early(network, images):
    inner, body = Representation(network, "layer1.0.conv2"), Representation(network, "layer1.0")
    for each in (inner, body):
        each.encode(images)
        features, log_probs = each.encode_features(images)
        assert log_probs.shape == (4, 0)
        assert torch.equal(features, each(images))
    assert torch.equal(body.encode(images).log_probs, network(images).log_softmax(1))
    events = Events(network)
    assert inner.encode(images).log_probs.shape == (4, 0)
    assert events[-1] == ("out", "layer1.0.conv2")
    events.clear()
    body.encode(images)
    assert events[-1] == ("out", "")
    assert Counter(events)["out", ""] == 1
    events.remove()


@pytest.mark.parametrize("reduce", ["flatten", "mean"])
def test_several_layers_share_one_pass(network, images, reduce):
    layers = ["penultimate", *LAYERS, "input", "logits", "bn1"]
    events = Events(network)
    found = features_of_layers(network, layers, images, 3, reduce)
    events.remove()
    assert Counter(events)["out", ""] == 2  # one pass for each of two batches
    assert list(found) == list(dict.fromkeys(layers))
    for layer, features in found.items():
        one = Representation(network, layer, reduce)
        assert torch.equal(features, torch.cat([one(batch) for batch in images.split(3)]))
        assert not features.requires_grad
    assert hooks(network) == 0


def test_several_layers_exit_early_at_the_last_of_them(network, images):
    events = Events(network)
    features_of_layers(network, ["layer1.0", "layer1.0.relu@1", "bn1"], images, 1)
    events.remove()
    ends = [place for place, each in enumerate(events) if each == ("in", "")]
    assert ("out", "") in events[: ends[1]]
    for start, end in zip(ends[1:], [*ends[2:], len(events)], strict=True):
        assert events[start:end][-1] == ("out", "layer1.0")


def test_several_layers_equal_those_encoded_one_by_one(network, images):
    encoders = [Representation(network, layer) for layer in ("input", "bn1", "layer1.0.conv1", "head", "logits")]
    parts = list(encode_layers(encoders, images, 3))
    for part, batch in zip(parts, images.split(3), strict=True):
        for each in encoders:
            wanted = Representation(network, each.layer).encode(batch)
            assert torch.equal(part[each.layer].features, wanted.features)
            assert torch.equal(part[each.layer].log_probs, wanted.log_probs)
    assert [part["head"].log_probs.shape[1] for part in parts] == [5, 5]
    assert [part["layer1.0.conv1"].log_probs.shape[1] for part in parts] == [0, 0]
    assert not list(encode_layers([], images, 3))


def test_illegal_sets_of_layers_are_refused(network, images):
    with pytest.raises(UsageError, match="batch size 0 of the images to encode must be at least 1"):
        features_of_layers(network, ["bn1"], images, 0)
    with pytest.raises(UsageError, match="must belong to one model"):
        list(encode_layers([Representation(model, "bn1") for model in (network, SmallResNet())], images, 2))
    with pytest.raises(UsageError, match="layer 'bn1' occurs twice"):
        list(encode_layers([Representation(network, "bn1"), Representation(network, "bn1", "mean")], images, 2))
    with pytest.raises(UsageError, match="called 2 times in a forward pass"):
        features_of_layers(network, ["bn1", "layer1.0.relu"], images, 2)
    assert hooks(network) == 0
