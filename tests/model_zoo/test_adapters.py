"""Networks in wrappers, in other precisions and with other outputs become plain float32 networks with scores (N, K)."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audit.errors import MismatchError
from audit.representation.layers import Representation
from model_zoo import libraries
from model_zoo.adapters import Scores, find_form, output_form, plain_network, with_scores
from model_zoo.load import SourceSettings, load_model

HEAD = "import torch\nfrom torch import nn\nfrom dataclasses import dataclass\nfrom collections import namedtuple\n"
BODY = """
def body(classes=10):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, classes))

"""


def _network(tmp_path: Path, code: str, state: dict[str, Tensor], options: str = "&shape=3x8x8") -> Any:
    """Load a file with the network of a factory `net` written in `code`."""
    (tmp_path / "own.py").write_text(HEAD + BODY + code)
    torch.save(state, tmp_path / "w.pth")
    classes = "" if "num_classes" in options else "&num_classes=10"
    ref = f"file:{tmp_path / 'w.pth'}?arch={tmp_path / 'own.py'}:net{classes}{options}"
    return load_model(ref, SourceSettings(trust_code=True, offline=True))


def _body(classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, classes)).eval()


WRAPPED = {
    "half": ("def net():\n    return body().half()\n", "converted the network from float16 to float32"),
    "double": ("def net():\n    return body().double()\n", "converted the network from float64 to float32"),
    "bfloat16": ("def net():\n    return body().bfloat16()\n", "converted the network from bfloat16 to float32"),
    "mixed": ("def net():\n    b = body()\n    b[0].half()\n    return b\n", "from float16 to float32"),
    "compiled": ("def net():\n    return torch.compile(body())\n", "took the network out of torch.compile"),
    "compiled in place": ("def net():\n    b = body()\n    b.compile()\n    return b\n", "out of torch.compile"),
    "parallel": ("def net():\n    return nn.DataParallel(body())\n", "took the network out of DataParallel"),
    "parallel, compiled": (
        "def net():\n    return nn.DataParallel(torch.compile(body().half()))\n",
        "took the network out of torch.compile",
    ),
    "a compiled part": (
        "def net():\n    b = body()\n    b[3] = torch.compile(b[3])\n    return b\n",
        "took the network out of torch.compile",
    ),
}


@pytest.mark.parametrize("shape", ["&shape=3x8x8", ""])
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_networks_load_as_plain_ones(kind: str, shape: str, tmp_path: Path) -> None:
    code, note = WRAPPED[kind]
    wanted = _body()
    model = _network(tmp_path, code, wanted.state_dict(), shape)
    images = torch.rand(4, 3, 8, 8)
    assert torch.equal(model.network(images), wanted(images))
    assert any(note in told for told in model.entry.renames), model.entry.renames
    kinds = {type(module).__name__ for module in model.network.modules()}
    assert kinds == {"Sequential", "Conv2d", "ReLU", "Flatten", "Linear"}


def test_a_network_that_casts_by_itself_keeps_its_precision(tmp_path: Path) -> None:
    code = (
        "class net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.b = body().double()\n"
        "    def forward(self, images):\n        return self.b(images.double())\n"
    )
    wanted = _body().double()
    model = _network(tmp_path, code, {f"b.{name}": tensor for name, tensor in wanted.state_dict().items()})
    images = torch.rand(4, 3, 8, 8)
    scores = model.network(images)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, wanted(images.double()).float())


def test_unwrapping_leaves_other_networks_alone() -> None:
    network = _body()
    before = dict(network.state_dict())
    same, notes = plain_network(network, None)
    assert same is network
    assert notes == ()
    assert all(
        tensor is before[name] or torch.equal(tensor, before[name]) for name, tensor in same.state_dict().items()
    )


def _of(expression: str, classes: int = 10) -> str:
    return (
        f"@dataclass\nclass Out:\n    logits: object = None\n    pooler_output: object = None\n"
        f"Named = namedtuple('Named', 'logits aux')\n"
        f"class net(nn.Module):\n    def __init__(self):\n"
        f"        super().__init__()\n        self.b = body({classes})\n"
        f"    def forward(self, images):\n        s = self.b(images)\n        return {expression}\n"
    )


OUTPUTS = {
    "two more dimensions": ("s[:, :, None, None]", "dropped dimensions of size 1"),
    "one more dimension": ("s.unsqueeze(2)", "dropped dimensions of size 1"),
    "a dictionary": ("{'loss': None, 'logits': s, 'hidden': s * 2}", "took 'logits' of the network's outputs"),
    "a data class": ("Out(logits=s, pooler_output=s * 2)", "took 'logits' of the network's outputs"),
    "a named tuple": ("Named(s, s * 2)", "took 'logits' of the network's outputs"),
    "logits with dimensions": ("{'logits': s[:, :, None, None]}", "dropped dimensions of size 1"),
    "another key": ("{'out': s, 'features': images}", "took 'out' of the network's outputs"),
    "scores and images": ("(s, images)", "took 0 of the network's outputs"),
    "features and scores": ("[images.flatten(1), s]", "took 1 of the network's outputs"),
}


@pytest.mark.parametrize("options", ["", "&shape=3x8x8", "&shape=3x8x8&mean=.5,.4,.3&std=.2,.2,.3"])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_scores_are_found_in_other_outputs(kind: str, options: str, tmp_path: Path) -> None:
    expression, note = OUTPUTS[kind]
    wanted = _body()
    code = _of(expression)
    if not options:  # a network that takes one of the usual sizes
        code = code.replace("self.b(images)", "self.b(images[:, :, :8, :8])")
    state = {f"b.{name}": tensor for name, tensor in wanted.state_dict().items()}
    model = _network(tmp_path, code, state, options)
    images = torch.rand(4, 3, 8, 8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.2, 0.3]).view(3, 1, 1)
    inside = (images - mean) / std if "mean" in options else images
    assert torch.allclose(model.network(images), wanted(inside), atol=1e-6)
    assert any(note in told for told in model.entry.renames), model.entry.renames
    read = Representation(model.network, "b.1")
    assert torch.allclose(read(images), wanted[:2](inside).flatten(1), atol=1e-6)


@pytest.mark.parametrize("kind", ["two", "one for each image", "a dictionary"])
def test_one_output_becomes_the_scores_of_two_classes(kind: str, tmp_path: Path) -> None:
    expression = {"two": "s", "one for each image": "s[:, 0]", "a dictionary": "{'logits': s}"}[kind]
    wanted = _body(1)
    state = {f"b.{name}": tensor for name, tensor in wanted.state_dict().items()}
    model = _network(tmp_path, _of(expression, 1), state, "&num_classes=2&shape=3x8x8")
    images = torch.rand(50, 3, 8, 8)
    scores, single = model.network(images), wanted(images)[:, 0]
    assert scores.shape == (50, 2)
    assert torch.allclose(scores.softmax(1)[:, 1], torch.sigmoid(single), atol=1e-6)
    labels = (single > 0).long()
    assert torch.equal(scores.argmax(1), labels)
    loss = nn.functional.cross_entropy(scores, labels)
    assert torch.allclose(loss, nn.functional.binary_cross_entropy_with_logits(single, labels.float()), atol=1e-6)
    assert any("its one output s became the scores 0 and s" in note for note in model.entry.renames)


@pytest.mark.parametrize(
    "expression", ["torch.sigmoid(s)", "torch.sigmoid(s)[:, 0]", "{'logits': s.sigmoid().view(-1)}"]
)
def test_one_probability_is_refused(expression: str, tmp_path: Path) -> None:
    state = {f"b.{name}": tensor for name, tensor in _body(1).state_dict().items()}
    with pytest.raises(
        MismatchError, match=r"one probability for an image: its last step is a sigmoid.*return the logit"
    ):
        _network(tmp_path, _of(expression, 1), state, "&num_classes=2&shape=3x8x8")


@pytest.mark.parametrize("arch", ["torchvision:squeezenet1_1", "timm:test_vit", "a factory"])
def test_architectures_are_built_with_one_output_for_such_weights(arch: str, tmp_path: Path) -> None:
    if arch == "a factory":
        (tmp_path / "own.py").write_text(HEAD + BODY + "def net(num_classes):\n    return body(num_classes)\n")
        reference, shape, arch = _body(1), "3x8x8", f"{tmp_path / 'own.py'}:net"
    elif arch.startswith("timm"):
        reference, shape = libraries.timm_build("test_vit", {"num_classes": 1, "img_size": 32}), "3x32x32"
    else:
        reference, shape = libraries.torchvision_build("squeezenet1_1", 1, 64), "3x64x64"
    torch.save(reference.state_dict(), tmp_path / "w.pth")
    ref = f"file:{tmp_path / 'w.pth'}?arch={arch}&num_classes=2&shape={shape}"
    model = load_model(ref, SourceSettings(trust_code=True, offline=True))
    images = torch.rand(3, *map(int, shape.split("x")))
    with torch.no_grad():
        assert torch.allclose(model.network(images)[:, 1], reference.eval()(images)[:, 0], atol=1e-5)
        assert not model.network(images)[:, 0].any()
    assert model.num_classes == 2


class _Encoder(nn.Module):
    def __init__(self, outputs: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.outputs = nn.Conv2d(3, 6, 4, 4), outputs

    def forward(self, images: Tensor) -> Any:
        tokens = self.layer(images).flatten(2).mT
        return self.outputs(tokens, tokens.mean(1))


@dataclass
class _Outputs:
    last_hidden_state: Tensor
    pooler_output: Tensor | None


_Named = namedtuple("_Named", ["last_hidden_state", "extra"])
ENCODERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "both": (lambda t, p: {"last_hidden_state": t, "pooler_output": p}, "pooled"),
    "ordered": (lambda t, p: OrderedDict(last_hidden_state=t, pooler_output=p), "pooled"),
    "data class": (lambda t, p: _Outputs(t, p), "pooled"),
    "no pooler": (lambda t, _: _Outputs(t, None), "tokens"),
    "tokens only": (lambda t, _: {"last_hidden_state": t}, "tokens"),
    "a tensor": (lambda _, p: p, "pooled"),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_features_of_encoders_without_a_classifier(kind: str) -> None:
    make, wanted = ENCODERS[kind]
    encoder = _Encoder(make)
    images = torch.rand(2, 3, 8, 8)
    tokens = encoder.layer(images).flatten(2).mT
    network = with_scores(encoder, find_form(encoder, 0, (3, 8, 8), "encoder"), (), ())
    assert torch.equal(network(images), tokens.mean(1) if wanted == "pooled" else tokens)
    assert isinstance(network, Scores) == (kind != "a tensor")


@pytest.mark.parametrize(
    "outputs",
    [
        {"out": torch.zeros(1, 10), "aux": torch.ones(1, 10)},
        (torch.zeros(1, 10), torch.ones(1, 10)),
        {"features": torch.zeros(1, 64)},
        torch.zeros(1, 10, 2, 2),
        torch.zeros(1, 1),
        None,
    ],
)
def test_outputs_that_are_not_clear_are_left_alone(outputs: Any) -> None:
    assert output_form(outputs, 10) is None


def test_the_refusal_of_two_outputs_names_them(tmp_path: Path) -> None:
    state = {f"b.{name}": tensor for name, tensor in _body().state_dict().items()}
    with pytest.raises(MismatchError, match="has an output dict with out, aux for one image, but 10 classes"):
        _network(tmp_path, _of("{'out': s, 'aux': s * 2}"), state)


def test_looking_at_the_outputs_changes_nothing() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    network[1].eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    assert find_form(network, 2, (3, 8, 8), "net") is None
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
