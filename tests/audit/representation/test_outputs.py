"""Outputs that hold several values, and networks without a classifier, as representations."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from audit.errors import UsageError
from audit.representation.headless import Headless, resolved_layer
from audit.representation.layers import Representation, describe_layers, layer_names
from audit.representation.outputs import copied, parts_of, with_changed


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class States:
    last_hidden_state: Tensor
    pooler_output: Tensor
    steps: int = 3


KINDS = {
    "dict": lambda a, b: {"last_hidden_state": a, "pooler_output": b},
    "ordered": lambda a, b: OrderedDict(last_hidden_state=a, pooler_output=b, attentions=None),
    "dataclass": States,
}


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(16, 6)

    def forward(self, images):
        features = self.linear(images.flatten(1))
        return KINDS[self.kind](features.unflatten(1, (3, 2)), features * 2)


class Network(nn.Module):
    """A classifier that reads one value of its block's output."""

    def __init__(self, kind):
        super().__init__()
        self.block, self.head = Block(kind), nn.Linear(6, 4)

    def forward(self, images):
        found = self.block(images)
        return self.head(parts_of(found)["pooler_output"])


@pytest.fixture
def images():
    return torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_of_an_output_is_selected_by_name(kind, images):
    network = Network(kind).eval()
    features = network.block.linear(images.flatten(1)).detach()
    for _ in range(2):  # the second pass leaves the network early
        found = Representation(network, "block#last_hidden_state")(images)
        assert torch.allclose(found, features)
        assert torch.allclose(Representation(network, "block#pooler_output")(images), 2 * features)
    mean = Representation(network, "block#last_hidden_state", "mean")(images)
    assert torch.allclose(mean, features.unflatten(1, (3, 2)).mean(1))
    (row,) = [row for row in describe_layers(network, images) if row.name == "block"]
    assert (row.shape, row.outputs) == ((3, 2), len(parts_of(KINDS[kind](1, 2))))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_value_that_the_logits_are_computed_from_determines_them(kind, images):
    network = Network(kind).eval()
    assert Representation(network, "block#pooler_output").determines_logits(images[:1])
    assert not Representation(network, "block#last_hidden_state").determines_logits(images[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_or_missing_name_is_refused_with_the_legal_ones(kind, images):
    network = Network(kind).eval()
    with pytest.raises(UsageError, match=r"last_hidden_state, pooler_output\): select one, such as block#last_hidden"):
        Representation(network, "block")(images)
    with pytest.raises(UsageError, match=r"output logits is not a tensor; tensors are at \['last_hidden_state', 'pool"):
        Representation(network, "block#logits")(images)


def test_the_only_value_of_a_dictionary_needs_no_name():
    class Only(nn.Module):
        def forward(self, images):
            return {"out": images.flatten(1)}

    network = nn.Sequential(OrderedDict(only=Only(), rest=nn.Identity()))
    network.rest.forward = lambda found: found["out"]
    images = torch.rand(3, 1, 2, 2)
    assert torch.equal(Representation(network, "only")(images), images.flatten(1))
    assert Representation(network, "only").determines_logits(images[:1])


def test_copies_do_not_follow_changes_in_place():
    one, two = torch.zeros(2), torch.ones(2)
    for output in ((one, two), {"a": one, "b": [two]}, States(one, two)):
        kept = copied(output)
        one.add_(5)
        two.add_(5)
        numbers = [v for part in parts_of(kept).values() for v in (part if isinstance(part, tuple) else (part,))]
        assert [float(value[0]) for value in numbers if isinstance(value, Tensor)] == [0, 1]
        one.sub_(5)
        two.sub_(5)


@pytest.mark.parametrize(
    ("output", "index"),
    [((1.0, 2.0), 1), ([1.0, 2.0], -1), (Pair(1.0, 2.0), 1), ({"a": 1.0, "b": 2.0}, "b"), (States(1.0, 2.0), None)],
)
def test_one_value_is_changed_and_the_kind_of_the_output_kept(output, index):
    index = "pooler_output" if isinstance(output, States) else index
    changed = with_changed(output, index, lambda value: value + 10)
    assert type(changed) is type(output)
    assert list(parts_of(changed).values())[:2] == [1.0, 12.0]
    assert list(parts_of(output).values())[:2] == [1.0, 2.0]


def test_an_encoder_has_an_output_and_no_logits(images):
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 6))
    encoder = Headless(network).eval()
    wanted = network(images).detach()
    for layer in ("output", "penultimate", " output"):
        found = Representation(encoder, layer)
        assert torch.allclose(found(images), wanted)
        assert found.encode(images).log_probs.shape == (5, 0)
        assert not found.determines_logits(images[:1])
    with pytest.raises(UsageError, match="'logits' does not exist: the network has no classifier; its features are"):
        Representation(encoder, "logits")
    assert layer_names(encoder) == ["input", "output", "0", "1"]
    assert [row.name for row in describe_layers(encoder, images)] == ["input", "output", "0", "1"]
    assert torch.allclose(Representation(network, "output")(images), wanted)  # of a classifier: its logits


def test_the_layers_of_an_encoder_keep_their_names_in_copies():
    assert resolved_layer(Headless(nn.Flatten()), "penultimate") == "output"
    assert resolved_layer(Headless(nn.Flatten()), "features.3@1#0") == "features.3@1#0"
    assert resolved_layer(nn.Flatten(), "penultimate") == "penultimate"
