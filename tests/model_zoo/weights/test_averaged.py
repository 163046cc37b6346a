"""Files with raw and averaged weights: what the format's own loader takes is taken, and `key=` chooses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from audit.errors import CheckpointError, MismatchError, UsageError
from audit.run.identity import _network_identity
from model_zoo import libraries
from model_zoo.load import SourceSettings, load_model
from model_zoo.weights.checkpoints import copy_weights, read_weights

State = dict[str, Tensor]


@pytest.fixture
def averaged(small: Callable[..., nn.Module]) -> State:
    torch.manual_seed(1)
    return small().state_dict()


def _loaded(path: Path, network: nn.Module, key: str = "") -> tuple[State, tuple[str, ...]]:
    notes = copy_weights(network, read_weights(path, key=key))
    return network.state_dict(), notes


def _is(found: State, wanted: State) -> bool:
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


def _as_averaged_model(network: nn.Module, state: State) -> State:
    """Return the state dict of torch's own averaged model, which counts its updates and prefixes its names."""
    network.load_state_dict(state)
    return AveragedModel(network).state_dict()


# Averaged weights are the right ones in all of these: that is what the loaders of these formats take.
FORMATS: dict[str, Callable[[State, State, nn.Module], Any]] = {
    "timm": lambda raw, ema, _: {"epoch": 3, "state_dict": raw, "state_dict_ema": ema, "args": None},
    "timm, distributed": lambda raw, ema, _: {
        "state_dict": {f"module.{name}": tensor for name, tensor in raw.items()},
        "state_dict_ema": {f"module.{name}": tensor for name, tensor in ema.items()},
    },
    "ConvNeXt": lambda raw, ema, _: {"model": raw, "optimizer": {"state": {}}, "model_ema": ema},
    "torchvision's references": lambda raw, ema, network: {
        "model": raw,
        "model_ema": _as_averaged_model(network, ema),
        "epoch": 1,
    },
    "mmengine": lambda raw, ema, _: {"state_dict": ema, "ema_state_dict": raw},
    "Lightning": lambda raw, ema, _: {"state_dict": ema, "current_model_state": raw},
    "adversarial training": lambda raw, ema, _: {"model_state_dict": ema, "unaveraged_model_state_dict": raw},
}


@pytest.mark.parametrize("layout", FORMATS)
def test_the_weights_that_the_formats_own_loader_takes(
    layout: str, state: State, averaged: State, small: Callable[..., nn.Module], tmp_path: Path
) -> None:
    torch.save(FORMATS[layout](state, averaged, small()), tmp_path / "w.pth")
    found, notes = _loaded(tmp_path / "w.pth", small())
    assert _is(found, averaged)
    assert not _is(found, state)
    assert any("unwrapped" in note for note in notes)


def test_timm_reads_the_same_file_in_the_same_way(
    state: State, averaged: State, small: Callable[..., nn.Module], tmp_path: Path
) -> None:
    read = libraries._timm().models.load_state_dict
    for raw, ema in (("state_dict", "state_dict_ema"), ("model", "model_ema")):
        torch.save({raw: state, ema: averaged}, tmp_path / "w.pth")
        found, notes = _loaded(tmp_path / "w.pth", small())
        assert _is(found, read(str(tmp_path / "w.pth"), weights_only=True))
        assert notes[0] == f"unwrapped {ema!r}, the averaged weights (key={raw} takes the raw ones), ignored {raw}"


@pytest.mark.parametrize(
    ("key", "wanted"),
    [("state_dict", "raw"), ("state_dict_ema", "averaged"), ("", "averaged")],
)
def test_key_chooses_in_a_file_reference(
    key: str, wanted: str, state: State, averaged: State, factories: Path, trusted: SourceSettings, tmp_path: Path
) -> None:
    torch.save({"state_dict": state, "state_dict_ema": averaged}, tmp_path / "w.pth")
    ref = f"file:{tmp_path / 'w.pth'}?arch={factories}:small&num_classes=10{f'&key={key}' if key else ''}"
    model = load_model(ref, trusted)
    assert _is(model.network.state_dict(), state if wanted == "raw" else averaged)
    assert any(f"took the entry {key!r}" in note or not key for note in model.entry.renames)


def test_the_choice_is_part_of_the_identity() -> None:
    ref = "file:w.pth?arch=nets.py:small&num_classes=10"
    assert _network_identity(ref) != _network_identity(f"{ref}&key=model_ema")


# Two sets of weights of which no loader is known to prefer one.
UNDECIDED: dict[str, tuple[Callable[[State, State], Any], str, str]] = {
    "entries": (lambda a, b: {"model": a, "ema": b}, "model", "ema"),
    "an entry with an entry": (lambda a, b: {"model": a, "ema": {"module": b, "updates": 3}}, "model", "ema.module"),
    "best and last": (lambda a, b: {"state_dict": a, "best_state": b}, "state_dict", "best_state"),
    "prefixes": (lambda a, b: {**_below("net", a), **_below("ema_net", b)}, "net", "ema_net"),
    "prefixes in an entry": (
        lambda a, b: {"state_dict": {**_below("student.backbone", a), **_below("teacher.backbone", b)}},
        "student.backbone",
        "state_dict.teacher.backbone",
    ),
    "names and a prefix": (lambda a, b: {**a, **_below("ema", b)}, ".", "ema"),
}


def _below(prefix: str, state: State) -> State:
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("layout", UNDECIDED)
def test_two_sets_that_fit_are_never_guessed_between(
    layout: str, state: State, averaged: State, small: Callable[..., nn.Module], tmp_path: Path
) -> None:
    make, first, second = UNDECIDED[layout]
    torch.save(make(state, averaged), tmp_path / "w.pth")
    with pytest.raises((UsageError, MismatchError), match=r"choose .*key=") as caught:
        _loaded(tmp_path / "w.pth", small())
    assert "\n" not in str(caught.value)
    assert _is(_loaded(tmp_path / "w.pth", small(), first)[0], state)
    assert _is(_loaded(tmp_path / "w.pth", small(), second)[0], averaged)


@pytest.mark.parametrize("layout", UNDECIDED)
def test_two_names_of_the_same_values_need_no_choice(
    layout: str, state: State, small: Callable[..., nn.Module], tmp_path: Path
) -> None:
    torch.save(UNDECIDED[layout][0](state, state), tmp_path / "w.pth")
    assert _is(_loaded(tmp_path / "w.pth", small())[0], state)


def test_a_key_that_the_file_lacks(state: State, small: Callable[..., nn.Module], tmp_path: Path) -> None:
    torch.save({"model": state, "epoch": 3}, tmp_path / "w.pth")
    for key in ("ema", "model.teacher", "epoch"):
        with pytest.raises(CheckpointError, match=rf"has no entry '{key}' and no names that start with .* keys"):
            _loaded(tmp_path / "w.pth", small(), key)
