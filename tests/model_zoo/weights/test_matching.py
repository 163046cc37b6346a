"""Layouts of real weights files, and mismatches with the network."""

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audit.errors import CheckpointError, InvalidModelError, MismatchError
from model_zoo.weights.checkpoints import Weights, copy_weights, read_weights
from model_zoo.weights.state_dicts import find_state_dict

State = dict[str, Tensor]


def _prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}},
    "model": lambda s: {"model": s, "model_ema": _prefixed(s, "x."), "args": argparse.Namespace(lr=1)},
    "net": lambda s: {"net": s, "acc": 0.9},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "list of one": lambda s: {"state_dict": [s], "err": torch.tensor(0.1)},
    "unusual name": lambda s: {"best_weights": s, "epoch": 1},
    "module.": lambda s: _prefixed(s, "module."),
    "_orig_mod.": lambda s: _prefixed(s, "_orig_mod."),
    "model.": lambda s: _prefixed(s, "model."),
    "two prefixes": lambda s: {"state_dict": _prefixed(s, "module._orig_mod.")},
    "deep": lambda s: {"state_dict": {"model": [OrderedDict(_prefixed(s, "module.model."))]}},
    "with a number": lambda s: {**s, "epoch": 5},
    "parameters": lambda s: {n: nn.Parameter(t) if t.is_floating_point() else t for n, t in s.items()},
    "half": lambda s: {n: t.half() if t.is_floating_point() else t for n, t in s.items()},
    "no counters": lambda s: {n: t for n, t in s.items() if "num_batches" not in n},
}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_load_and_every_step_is_listed(
    layout: str, new: bool, state: State, small: Callable[..., nn.Module], tmp_path: Path
) -> None:
    torch.save(LAYOUTS[layout](state), tmp_path / "w.pth", _use_new_zipfile_serialization=new)
    network = small()
    notes = copy_weights(network, read_weights(tmp_path / "w.pth"))
    tolerance = 1e-3 if layout == "half" else 0.0
    for name, tensor in network.state_dict().items():
        assert torch.allclose(tensor, state[name], atol=tolerance, rtol=tolerance), name
    assert (notes == ()) == (layout in ("bare", "parameters"))


def test_notes_name_prefixes_and_omissions(state: State, small: Callable[..., nn.Module]) -> None:
    tensors = _prefixed({n: t for n, t in state.items() if "num_batches" not in n}, "module.")
    notes = copy_weights(small(), Weights(tensors, "0"))
    assert notes[0] == "stripped 'module.' from 8 of 8 names (module.0.weight -> 0.weight)"
    assert notes[1] == "1 num_batches_tracked are not in the checkpoint; they are unused in eval mode"


def test_prefixes_in_the_network_are_kept(state: State, small: Callable[..., nn.Module]) -> None:
    network = nn.ModuleDict({"model": small()})
    assert copy_weights(network, Weights(_prefixed(state, "model."), "0")) == ()
    notes = copy_weights(network, Weights(_prefixed(state, "module.model."), "0"))
    assert notes == ("stripped 'module.' from 9 of 9 names (module.model.0.weight -> model.0.weight)",)


class _WithConstants(nn.Module):
    def __init__(self, values: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("mu", torch.zeros(1, values, 1, 1))


def test_only_small_normalisation_constants_may_be_missing() -> None:
    tensors = nn.Linear(2, 2).state_dict()
    tensors = _prefixed(tensors, "linear.")
    notes = copy_weights(_WithConstants(3), Weights(tensors, "0"))
    assert notes == ("mu is not in the checkpoint; the architecture's value is kept",)
    with pytest.raises(MismatchError, match="missing: mu"):
        copy_weights(_WithConstants(300), Weights(tensors, "0"))


def test_wrong_keys_are_named(state: State, small: Callable[..., nn.Module]) -> None:
    state.pop("0.weight")
    state["head.weight"] = torch.zeros(3)
    with pytest.raises(MismatchError, match=r"8 of the network's 9 .*missing: 0\.weight; unknown.*: head\.weight"):
        copy_weights(small(), Weights(state, "0"))
    assert copy_weights(small(), Weights({**small().state_dict(), "head.weight": torch.zeros(3)}, "0"), r"^head\.") == (
        "head.weight of the checkpoint is not used by the architecture",
    )


def test_a_wrong_number_of_classes_is_reported(state: State, small: Callable[..., nn.Module]) -> None:
    with pytest.raises(MismatchError, match="the checkpoint has 10 outputs, the network 100"):
        copy_weights(small(100), Weights(state, "0"))


def test_wrong_shapes_and_kinds_are_named(state: State, small: Callable[..., nn.Module]) -> None:
    wrong = {**state, "0.weight": torch.zeros(4, 1, 3, 3)}
    with pytest.raises(MismatchError, match=r"0\.weight is 4x1x3x3, the network needs 4x3x3x3"):
        copy_weights(small(), Weights(wrong, "0"))
    wrong = {**state, "0.bias": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(MismatchError, match=r"0\.bias holds int64, the network needs float32"):
        copy_weights(small(), Weights(wrong, "0"))


def test_shapes_are_compared_before_anything_is_copied(state: State, small: Callable[..., nn.Module]) -> None:
    huge = torch.zeros(1).as_strided((1_000_000_000,), (0,))
    with pytest.raises(MismatchError, match=r"0\.bias is 1000000000"):
        copy_weights(small(), Weights({**state, "0.bias": huge}, "0"))


def test_weights_that_are_not_finite_are_counted(state: State, small: Callable[..., nn.Module]) -> None:
    state["4.weight"][0, :3] = torch.nan
    state["0.bias"][1] = torch.inf
    network = small()
    before = network.state_dict()["0.bias"].clone()
    with pytest.raises(InvalidModelError, match=r"0\.bias \(1 of 4\), 4\.weight \(3 of 640\)"):
        copy_weights(network, Weights(state, "0"))
    assert torch.equal(network.state_dict()["0.bias"], before)


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        ([{"a": torch.zeros(1)}, {"a": torch.zeros(1)}], "it is a list of 2"),
        ({"epoch": 3}, "it is a mapping with the keys epoch"),
        (7, "it is a int"),
        ({"a": {"w": torch.zeros(1)}, "b": {"w": torch.zeros(1)}}, "the keys a, b"),
        ({"w": torch.zeros(3, device="meta")}, "tensor 'w' has no data"),
        ({"w": torch.eye(3).to_sparse()}, "tensor 'w' is sparse"),
    ],
)
def test_contents_without_a_state_dict_are_refused(contents: object, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence) as caught:
        find_state_dict(contents, "w.pth")
    assert caught.value.kind == "not_a_checkpoint"


def test_named_entries_and_depth() -> None:
    tensors, notes = find_state_dict({"last": {"state_dict": {"w": torch.ones(1)}}, "best": {}}, "w.pth", ("last",))
    assert list(tensors) == ["w"]
    assert notes == ("took the entry 'last'", "unwrapped 'state_dict'")
    with pytest.raises(CheckpointError, match=r"w.pth has no entry 'last'"):
        find_state_dict({"best": {}}, "w.pth", ("last",))
    nested: Any = {"w": torch.ones(1)}
    for _ in range(12):
        nested = [nested]
    with pytest.raises(CheckpointError, match="more than 8 levels"):
        find_state_dict(nested, "w.pth")
