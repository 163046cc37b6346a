"""Layer names, hooks on stock models, reductions and the descriptions of layers."""

import warnings
from importlib import import_module

import pytest
import torch
from torch import nn

from audit.errors import UnknownNameError, UsageError
from audit.representation.layers import PSEUDO_LAYERS, Representation, describe_layers, find_module, layer_names

RELU_NAMES = [f"layer{stage}.{block}.relu" for stage in range(1, 5) for block in range(2)]


def build(name):
    """A stock network with random weights, in eval mode."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # deprecation warnings of the libraries' own imports
        torch.manual_seed(0)
        library, _, architecture = name.partition(":")
        if library == "timm":
            return import_module("timm").create_model(architecture, pretrained=False).eval()
        models = import_module("torchvision.models")
        if architecture == "vit_b_16":
            # the 12 blocks of vit_b_16, with narrow layers
            vit = models.VisionTransformer(32, 16, num_layers=12, num_heads=2, hidden_dim=16, mlp_dim=32)
            return vit.eval()
        return getattr(models, architecture)(weights=None).eval()


@pytest.fixture(scope="module")
def resnet():
    return build("torchvision:resnet18")


@pytest.fixture(scope="module")
def vit():
    return build("torchvision:vit_b_16")


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# Numbers of modules, of those called more than once, with tuple outputs, never called, and overwritten in place.
# densenet121 has 121 normalisations that a ReLU overwrites, and `features` returns the last one's tensor: 122.
STOCK = {
    "torchvision:resnet18": (67, 8, 0, 0, 17),
    "torchvision:densenet121": (432, 0, 0, 0, 122),
    "torchvision:vit_b_16": (151, 0, 12, 12, 0),
    "torchvision:swin_t": (179, 12, 0, 24, 0),
    "timm:resnet18": (93, 0, 0, 0, 25),
}


@pytest.mark.parametrize("name", STOCK)
def test_stock_models_are_described_as_measured(name, images):
    model = build(name)
    rows = describe_layers(model, images)
    assert tuple(row.name for row in rows[:3]) == ("input", "penultimate", "logits")
    assert [row.name for row in rows] == ["input", "penultimate", "logits", *layer_names(model)[3:]]
    layers = rows[3:]
    counts = (
        len(layers),
        sum(row.calls > 1 for row in layers),
        sum(row.outputs > 1 for row in layers),
        sum(row.calls == 0 for row in layers),
        sum(row.overwritten for row in layers),
    )
    assert counts == STOCK[name]
    assert hooks(model) == 0
    # each combination of properties is checked against a Representation of one such layer
    kinds = {(row.calls > 1, row.outputs > 1, row.calls == 0, row.overwritten): row for row in layers}
    for row in kinds.values():
        suffix = ("@-1" if row.calls > 1 else "") + ("#0" if row.outputs > 1 else "")
        representation = Representation(model, row.name + suffix)
        with torch.no_grad():
            if row.calls == 0:
                with pytest.raises(UsageError, match="never called"):
                    representation(images)
            elif row.shape and row.calls == 1:
                assert representation(images).shape == (2, row.dimension)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:swin_t", "timm:resnet18"])
def test_pseudo_layers(name, images):
    model = build(name)
    with torch.no_grad():
        assert torch.equal(Representation(model, "input")(images), images.flatten(1))
        assert torch.equal(Representation(model, "logits")(images), model(images))
        features = Representation(model, "penultimate")(images)
        head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        assert torch.equal(head(features), model(images))


def test_in_place_operations_do_not_change_the_features(resnet, images):
    seen = []
    handle = resnet.bn1.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        resnet(images)
        handle.remove()
        kept = Representation(resnet, "bn1")(images)
        wanted = resnet.bn1(resnet.conv1(images))
    assert float(seen[0].min()) == 0  # without a clone the hook's tensor is overwritten by the ReLU
    assert float(kept.min()) < 0
    torch.testing.assert_close(kept, wanted.flatten(1))


@pytest.mark.parametrize("layer", ["input", "bn1", "layer2.0.relu@0", "layer4", "penultimate", "logits"])
def test_gradients_reach_the_images(resnet, images, layer):
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(Representation(resnet, layer)(leaf).pow(2).sum(), leaf)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().amax(1) > 0).all()
    assert all(p.grad is None for p in resnet.parameters())


@pytest.mark.parametrize("layer", RELU_NAMES[:1])
def test_a_layer_called_twice_needs_a_call_number(resnet, images, layer):
    with pytest.raises(UsageError, match=f"called 2 times.*{layer}@0 to {layer}@1 or {layer}@-1"):
        Representation(resnet, layer)(images)
    with torch.no_grad():
        first, second, last = (Representation(resnet, f"{layer}@{call}")(images) for call in (0, 1, -1))
        block = Representation(resnet, layer.removesuffix(".relu"))(images)
    assert torch.equal(second, last)
    assert not torch.equal(first, last)
    assert torch.equal(last, block)
    for call in (2, -3):
        with pytest.raises(UsageError, match=f"selects call {call}, but a forward pass has only 2"):
            Representation(resnet, f"{layer}@{call}")(images)


def test_a_tuple_output_needs_an_index(vit, images):
    layer = "encoder.layers.encoder_layer_0.self_attention"
    with pytest.raises(UsageError, match=rf"returns 2 values: select one, such as {layer}#0"):
        Representation(vit, layer)(images)
    with torch.no_grad():
        tokens = Representation(vit, f"{layer}#0")(images)
        assert torch.equal(Representation(vit, f"{layer}@0#0")(images), tokens)
        assert torch.equal(Representation(vit, f"{layer}#-2")(images), tokens)
    assert tokens.shape == (2, 5 * 16)  # four patches and the class token, 16 wide
    for index in (1, 2, -3):
        with pytest.raises(UsageError, match=rf"output {index} is not a tensor; tensors are at \[0\]"):
            Representation(vit, f"{layer}#{index}")(images)


def test_a_single_tensor_takes_no_index(resnet, images):
    for layer in ("bn1#0", "logits#0"):
        with pytest.raises(UsageError, match="returns one tensor: leave out #0"):
            Representation(resnet, layer)(images)


@pytest.mark.parametrize("layer", ["input@0", "logits@0", "penultimate@-1", "input#0", "penultimate#0"])
def test_pseudo_layers_take_no_call_number(resnet, layer):
    with pytest.raises(UsageError, match="leave out @ and #"):
        Representation(resnet, layer)


def test_a_layer_that_is_never_called_is_refused(vit, images):
    with pytest.raises(UsageError, match="never called in a forward pass"):
        Representation(vit, "encoder.layers.encoder_layer_0.self_attention.out_proj")(images)


@pytest.mark.parametrize("layer", ["", "@0", "#0", "a@b", "bn1#0@1", "bn1@", "a@1@2"])
def test_a_malformed_layer_name_is_refused(resnet, layer):
    with pytest.raises(UsageError, match="not of the form"):
        Representation(resnet, layer)


def test_an_unknown_layer_is_refused_with_near_matches(resnet):
    with pytest.raises(UnknownNameError, match=r"unknown layer 'layer1.0.bn3'; did you mean 'layer1.0.bn2' or "):
        Representation(resnet, "layer1.0.bn3")
    with pytest.raises(UnknownNameError, match="unknown layer ''"):
        find_module(resnet, "")


def test_an_unknown_reduction_is_refused(resnet):
    with pytest.raises(UnknownNameError, match=r"unknown reduction 'max'; did you mean 'mean'\? Legal: flatten, mean"):
        Representation(resnet, "bn1", "max")


def test_every_layer_name_is_accepted(resnet):
    names = layer_names(resnet)
    assert tuple(names[:3]) == PSEUDO_LAYERS
    assert len(names) == len(set(names)) == 70
    for name in names:
        Representation(resnet, name)


@pytest.mark.parametrize("layer", ["bn1", "layer1.0.relu", "layer1.0.relu@7", "penultimate", "logits", "input"])
def test_hooks_are_removed(resnet, images, layer):
    with torch.no_grad():
        try:
            Representation(resnet, layer)(images)
        except UsageError:
            assert layer in ("layer1.0.relu", "layer1.0.relu@7")
    assert hooks(resnet) == 0


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Flatten()
        self.second = nn.Linear(4, 2)

    def forward(self, images):
        self.second(self.first(images))
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("layer", ["first", "second", "penultimate"])
def test_hooks_are_removed_after_an_error(layer):
    model, images = Fails(), torch.zeros(1, 1, 2, 2)
    with pytest.raises(RuntimeError, match="out of memory"):
        Representation(model, layer)(images)
    with pytest.raises(RuntimeError, match="out of memory"):
        describe_layers(model, images)
    assert hooks(model) == 0


def test_penultimate_is_the_input_of_the_last_linear_layer(resnet, vit, images):
    with torch.no_grad():
        pooled = Representation(resnet, "avgpool")(images)
        assert torch.equal(Representation(resnet, "penultimate")(images), pooled)
        assert pooled.shape == (2, 512)
        token = Representation(vit, "penultimate")(images)
        assert token.shape == (2, 16)
        assert torch.equal(vit.heads(token), vit(images))


def test_penultimate_of_a_convolutional_classifier(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        assert torch.equal(Representation(model, "penultimate")(images), model[0](images).flatten(1))


def test_penultimate_needs_a_linear_layer_and_descriptions_do_not(images):
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten())
    with pytest.raises(UsageError, match="needs a model whose forward ends in a linear layer"):
        Representation(model, "penultimate")(images)
    rows = {row.name: row for row in describe_layers(model, images)}
    assert rows["penultimate"].calls == 0
    assert rows["0"].shape == (2, 30, 30)


def test_reductions(resnet, vit, images):
    with torch.no_grad():
        flat = Representation(resnet, "layer2")(images)
        mean = Representation(resnet, "layer2", "mean")(images)
        assert flat.shape == (2, 128 * 4 * 4)
        torch.testing.assert_close(mean, flat.view(2, 128, 16).mean(2))
        layer = "encoder.layers.encoder_layer_3"
        tokens, mean = Representation(vit, layer)(images), Representation(vit, layer, "mean")(images)
        torch.testing.assert_close(mean, tokens.view(2, 5, 16).mean(1))
        assert torch.equal(Representation(resnet, "logits", "mean")(images), Representation(resnet, "logits")(images))


class Odd(nn.Module):
    """Layers whose output is no batch of features: a dictionary of two, a number, a scalar, windows."""

    def __init__(self):
        super().__init__()
        self.table, self.number, self.scalar, self.windows = (Part(kind) for kind in range(4))

    def forward(self, images):
        for part in (self.table, self.number, self.scalar, self.windows):
            part(images)
        return images.flatten(1)


class Part(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, images):
        return ({"features": images, "scale": images}, 1.0, images.sum(), images.reshape(len(images) * 2, -1))[
            self.kind
        ]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("table", r"returns 2 values \(features, scale\): select one, such as table#f"),
        ("number", "returns a float, not a tensor"),
        ("scalar", r"needs a batch and a feature axis, not the shape \(\)"),
        ("windows", r"returns the shape \(4, 8\) for 2 images: its first axis must be the batch"),
    ],
)
def test_outputs_that_are_no_batch_of_features_are_refused(layer, message):
    model, images = Odd(), torch.rand(2, 1, 4, 4)
    with pytest.raises(UsageError, match=message):
        Representation(model, layer)(images)
    assert {row.name: row.calls for row in describe_layers(model, images)}[layer] == 1


class Wrapper(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(0.5))

    def forward(self, images):
        return self.network(images - self.mean)


def test_layer_names_skip_a_wrapper(resnet, images):
    wrapped = Wrapper(resnet)
    assert layer_names(wrapped) == layer_names(resnet)
    with torch.no_grad():
        for layer in ("conv1", "penultimate", "logits"):
            found = Representation(wrapped, layer)(images)
            torch.testing.assert_close(found, Representation(resnet, layer)(images - 0.5))
        # `input` is the image before the normalisation
        assert torch.equal(Representation(wrapped, "input")(images), images.flatten(1))
    assert len(describe_layers(wrapped, images)) == 70


def test_a_child_called_network_beside_others_is_no_wrapper(images):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.head = nn.Flatten(), nn.Linear(3072, 2)

        def forward(self, images):
            return self.head(self.network(images))

    assert layer_names(Whole())[3:] == ["network", "head"]
    assert Representation(Whole(), "head")(images).shape == (2, 2)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_names_of_layers_do_not_depend_on_the_number_of_wrappers(depth):
    inner = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    images, wrapped = torch.rand(5, 1, 2, 2), inner
    for _ in range(depth):
        wrapped = Wrapper(wrapped)
    assert layer_names(wrapped) == layer_names(inner)
    expected = Representation(inner, "1")(images - 0.5 * depth)
    assert torch.allclose(Representation(wrapped, "1")(images), expected, atol=1e-6)
