"""Names that differ from the network's by one rule, and tensors beside the network's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audit.errors import MismatchError
from model_zoo import libraries
from model_zoo.weights.checkpoints import Weights, copy_weights, read_weights

State = dict[str, Tensor]


def _below(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def _inside(path: str, wrapper: str, state: State) -> State:
    """Return a state dict whose names have a wrapper after one path."""
    return {n.replace(path, f"{path}{wrapper}.", 1) if n.startswith(path) else n: t for n, t in state.items()}


def _constants(*names: str) -> State:
    return {name: torch.full((3, 1, 1), 0.5) for name in names}


BESIDE: dict[str, tuple[Callable[[State], Any], str]] = {
    "MadryLab": (
        lambda s: {
            "model": {
                **_constants("module.normalizer.new_mean", "module.normalizer.new_std"),
                **_below("module.model.", s),
                **_constants("module.attacker.normalize.new_mean", "module.attacker.normalize.new_std"),
                **_below("module.attacker.model.", s),
            },
            "epoch": 90,
        },
        "tensors outside 'module.model.' are not used: module.normalizer.new_mean",
    ),
    "Lightning": (
        lambda s: {
            "state_dict": {
                **_below("model.", s),
                "criterion.weight": torch.ones(10),
                "train_acc.confmat": torch.zeros(10, 10),
            },
            "pytorch-lightning_version": "2.5",
        },
        "criterion.weight of the checkpoint is not used: part of a training criterion or metric",
    ),
    "Lightning, another name": (
        lambda s: {"state_dict": {**_below("classifier.net.", s), "loss.weight": torch.ones(10)}},
        "1 tensors outside 'classifier.net.' are not used: loss.weight",
    ),
    "averaged model": (
        lambda s: {"n_averaged": torch.tensor(7), **_below("module.", s)},
        "n_averaged of the checkpoint is not used: a counter",
    ),
    "counters": (
        lambda s: {**s, "global_step": torch.tensor([3]), "ema_decay": torch.tensor(0.99)},
        "global_step of the checkpoint is not used: a counter",
    ),
    "mmcv's averaged copy": (
        lambda s: {**s, **{f"ema_{n.replace('.', '_')}": t + 1 for n, t in s.items()}},
        "ema_0_bias of the checkpoint is not used: a copy of the weights that mmcv swaps",
    ),
    "a normalisation in a Sequential": (
        lambda s: {**_constants("0.mean", "0.std"), **_below("1.", s)},
        "2 tensors outside '1.' are not used: 0.mean, 0.std",
    ),
    "a projector": (
        lambda s: {**_below("backbone.", s), "projector.0.weight": torch.ones(4, 10)},
        "1 tensors outside 'backbone.' are not used: projector.0.weight",
    ),
}

PREFIXED: dict[str, tuple[Callable[[State], Any], str]] = {
    "backbone.": (lambda s: _below("backbone.", s), "stripped 'backbone.' in 9 of 9 names"),
    "encoder.module.": (lambda s: _below("encoder.module.", s), "stripped 'encoder.module.' in 9 of 9"),
    "net.": (lambda s: _below("net.", s), "stripped 'net.' in 9 of 9 names (net.0.weight -> 0.weight)"),
    "FSDP": (lambda s: _below("_fsdp_wrapped_module.", s), "stripped '_fsdp_wrapped_module.'"),
    "nested FSDP": (
        lambda s: _inside("0.", "_fsdp_wrapped_module", _inside("4.", "_fsdp_wrapped_module", s)),
        "dropped the wrapper '_fsdp_wrapped_module' in 4 of 9 names",
    ),
    "nested compile": (
        lambda s: _below("module._orig_mod.", _inside("1.", "_orig_mod", s)),
        "dropped the wrapper '_orig_mod'",
    ),
    "checkpointing": (
        lambda s: _inside("4.", "_checkpoint_wrapped_module", s),
        "dropped the wrapper '_checkpoint_wrapped_module' in 2 of 9 names",
    ),
    "parallel features": (lambda s: _inside("0.", "module", s), "dropped the wrapper 'module' in 2 of 9 names"),
}


@pytest.mark.parametrize("layout", [*BESIDE, *PREFIXED])
def test_one_renaming_loads_every_tensor_and_is_noted(
    layout: str, state: State, small: Callable[..., nn.Module], tmp_path: Path
) -> None:
    make, sentence = (BESIDE | PREFIXED)[layout]
    torch.save(make(state), tmp_path / "w.pth")
    network = small()
    notes = copy_weights(network, read_weights(tmp_path / "w.pth"))
    found = network.state_dict()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert any(sentence in note for note in notes), notes


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "a normalisation first": lambda net: nn.Sequential(nn.Identity(), net),
    "a wrapper": lambda net: nn.ModuleDict({"inner": nn.ModuleDict({"model": net})}),
    "a compiled part": lambda net: nn.ModuleDict({"_orig_mod": net}),
}


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.model."])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_the_network_may_lie_in_a_wrapper_of_its_own(
    wrapper: str, prefix: str, state: State, small: Callable[..., nn.Module]
) -> None:
    inner = small()
    copy_weights(WRAPPED[wrapper](inner), Weights(_below(prefix, state), "0"))
    found = inner.state_dict()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.encoder."])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_torchvision_networks_under_a_prefix(name: str, prefix: str) -> None:
    wanted = libraries.torchvision_build(name, 10, 64).state_dict()
    network = libraries.torchvision_build(name, 10, 64)
    beside = {"head.weight": torch.ones(128, 64)} if prefix else {}
    copy_weights(network, Weights({**_below(prefix, wanted), **beside}, "0"))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in network.state_dict().items())


def _deeper(state: State) -> State:
    return {**state, "4.extra.weight": torch.ones(10, 10)}


# The network's tensors are all there, and the file still belongs to a network that computes something else.
OTHERS: dict[str, Callable[[State], State]] = {
    "a layer inside": lambda s: {**s, "1.gate.weight": torch.ones(4, 4)},
    "a layer after": lambda s: {**s, "6.weight": torch.ones(10, 10), "6.bias": torch.ones(10)},
    "a second head": lambda s: {**s, "head_dist.weight": torch.ones(10, 64), "head_dist.bias": torch.ones(10)},
    "a layer inside, below a prefix": lambda s: _below("net.", _deeper(s)),
    "a numbered part": lambda s: {**_below("0.", s), "1.weight": torch.ones(10, 10)},
}


@pytest.mark.parametrize("layout", OTHERS)
def test_files_of_larger_networks_are_refused(layout: str, state: State, small: Callable[..., nn.Module]) -> None:
    network = small()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(MismatchError, match=r"do not fit: .*(unknown to the network|missing).*is arch= the right one"):
        copy_weights(network, Weights(OTHERS[layout](state), "0"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_single_layer_is_not_looked_for_in_other_places(state: State) -> None:
    for network in (nn.Linear(64, 10), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), nn.BatchNorm2d(4)):
        with pytest.raises(MismatchError, match="do not fit"):
            copy_weights(network, Weights(_below("backbone.", state), "0"))


def test_blocks_of_equal_shape_are_not_guessed_between() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    blocks = nn.ModuleDict({"first": block(), "second": block(), "third": block()})
    with pytest.raises(MismatchError, match=r"under 3 prefixes, 'first\.' and 'second\.' and 'third\.'; choose"):
        copy_weights(block(), Weights(blocks.state_dict(), "0"))


def test_a_buffer_that_the_network_computes_itself_may_be_stored() -> None:
    class Indexed(nn.Module):
        def __init__(self, index: Tensor) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("index", index, persistent=False)

    index = torch.arange(4)
    stored = {**Indexed(index).state_dict(), "index": index}
    notes = copy_weights(Indexed(index), Weights(stored, "0"))
    assert notes == ("index of the checkpoint is not used: the network computes this buffer itself",)
    with pytest.raises(MismatchError, match="unknown to the network: index"):
        copy_weights(Indexed(index + 1), Weights(stored, "0"))


def test_tied_tensors_may_be_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.decoder.weight = self.encoder.weight

    for name in ("encoder.weight", "decoder.weight"):
        network = Tied()
        copy_weights(network, Weights({name: torch.eye(3)}, "0"))
        assert torch.equal(network.encoder.weight, torch.eye(3))
        assert torch.equal(network.decoder.weight, torch.eye(3))
    with pytest.raises(MismatchError, match="missing"):
        copy_weights(Tied(), Weights({"other.weight": torch.eye(3)}, "0"))
