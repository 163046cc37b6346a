"""Networks load checkpoints by their own code: hooks, versions, extra state, parametrisations."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from audit.errors import MismatchError
from model_zoo import libraries
from model_zoo.load import SourceSettings, load_model
from model_zoo.weights.checkpoints import Weights, copy_weights, read_weights, write_safetensors

State = dict[str, Tensor]


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _saved(contents: object, tmp_path: Path) -> Weights:
    torch.save(contents, tmp_path / "w.pth")
    return read_weights(tmp_path / "w.pth")


class _Renamed(nn.Module):
    """A network that renames the keys of its older version by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)


class _ByOverride(_Renamed):
    def _load_from_state_dict(self, state_dict: State, prefix: str, *arguments: Any) -> None:
        for part in ("weight", "bias"):
            if f"{prefix}fc.{part}" in state_dict:
                state_dict[f"{prefix}head.{part}"] = state_dict.pop(f"{prefix}fc.{part}")
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class _ByHook(_Renamed):
    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(_: nn.Module, state_dict: State, prefix: str, *__: Any) -> None:
        for part in ("weight", "bias"):
            if f"{prefix}fc.{part}" in state_dict:
                state_dict[f"{prefix}head.{part}"] = state_dict.pop(f"{prefix}fc.{part}")


class _ByVersion(_ByOverride):
    _version = 3

    def _load_from_state_dict(self, state_dict: State, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version") not in (2, 3):
            raise ValueError(f"version {metadata.get('version')} is not supported")
        if metadata["version"] == 2:  # stored with the opposite sign then
            state_dict[f"{prefix}body.bias"] = -state_dict[f"{prefix}body.bias"]
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)


class _ByLoadStateDict(_Renamed):
    def load_state_dict(self, state_dict: State, strict: bool = True, assign: bool = False) -> Any:
        renamed = {name.replace("fc.", "head."): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(renamed, strict, assign)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
@pytest.mark.parametrize("make", [_ByOverride, _ByHook, _ByLoadStateDict])
def test_names_that_the_network_renames_itself(make: Callable[[], nn.Module], prefix: str, tmp_path: Path) -> None:
    wanted = make().state_dict()
    stored = {f"{prefix}{name.replace('head.', 'fc.')}": tensor for name, tensor in wanted.items()}
    network = make()
    copy_weights(network, _saved(stored, tmp_path))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(MismatchError, match=r"missing: .*body\.bias"):
        copy_weights(make(), _saved({n: t for n, t in stored.items() if not n.endswith("body.bias")}, tmp_path))


@pytest.mark.parametrize("prefix", ["", "module.", "module.model.", "backbone."])
@pytest.mark.parametrize("version", [2, 3])
def test_versions_of_modules_reach_the_network(version: int, prefix: str, tmp_path: Path) -> None:
    old, wanted = _ByVersion(), _ByVersion()
    parts: nn.Module = old
    for name in reversed(prefix.split(".")[:-1]):
        parts = nn.ModuleDict({name: parts})
    stored: Any = parts.state_dict()
    stored._metadata[prefix.removesuffix(".")]["version"] = version
    own: Any = old.state_dict()
    own._metadata[""]["version"] = version
    wanted.load_state_dict(own)
    network = _ByVersion()
    copy_weights(network, _saved(stored, tmp_path))
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in network.state_dict().items())


def test_files_without_versions_are_taken_for_the_networks_own(tmp_path: Path) -> None:
    wanted = _ByVersion().state_dict()
    write_safetensors(wanted, tmp_path / "w.safetensors")
    network = _ByVersion()
    copy_weights(network, read_weights(tmp_path / "w.safetensors"))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in network.state_dict().items())
    stored: Any = _ByVersion().state_dict()
    stored._metadata[""]["version"] = 1
    with pytest.raises(MismatchError, match=r"do not fit: version 1 is not supported; is arch="):
        copy_weights(_ByVersion(), _saved(stored, tmp_path))


class _Scaled(nn.Module):
    """A network with state that is no parameter: a scale in a dictionary or a tensor."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.linear, self.extra = nn.Linear(2, 2), extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("prefix", ["", "module.", "net."])
@pytest.mark.parametrize("extra", [{"scale": 3.0, "names": ["a"]}, torch.tensor([1.0, 2.0]), None, 7])
def test_extra_state_is_loaded(extra: Any, prefix: str, tmp_path: Path) -> None:
    stored = {f"{prefix}{name}": value for name, value in _Scaled(extra).state_dict().items()}
    network = _Scaled({})
    copy_weights(network, _saved(stored, tmp_path))
    assert torch.equal(network.extra, extra) if isinstance(extra, Tensor) else network.extra == extra


def test_extra_state_that_is_missing_is_named(tmp_path: Path) -> None:
    stored = {name: value for name, value in _Scaled({}).state_dict().items() if "extra" not in name}
    with pytest.raises(MismatchError, match="missing: _extra_state"):
        copy_weights(_Scaled({}), _saved(stored, tmp_path))


def _layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))


def _parametrised(how: Callable[[nn.Module], object]) -> nn.Sequential:
    network = _layers()
    with _quiet():
        how(network[0])
        how(network[2])
    return network


def _pruned(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", 0.5)


FORMS: dict[str, Callable[[], nn.Sequential]] = {
    "plain": _layers,
    "weight norm": lambda: _parametrised(parametrizations.weight_norm),
    "old weight norm": lambda: _parametrised(nn.utils.weight_norm),
    "spectral norm": lambda: _parametrised(parametrizations.spectral_norm),
    "old spectral norm": lambda: _parametrised(nn.utils.spectral_norm),
    "pruned": lambda: _parametrised(_pruned),
}
PAIRS = [
    *((form, form) for form in FORMS),
    *((form, "plain") for form in FORMS if form != "plain"),
    ("weight norm", "old weight norm"),
    ("old weight norm", "weight norm"),
    ("spectral norm", "old spectral norm"),
    ("old spectral norm", "spectral norm"),
]


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("stored", "needed"), PAIRS)
def test_parametrised_weights_in_every_form(stored: str, needed: str, prefix: str, tmp_path: Path) -> None:
    source = FORMS[stored]()
    with torch.no_grad():
        for tensor in source.state_dict().values():
            tensor.mul_(1.5)
        source.eval()
        images = torch.rand(3, 3, 4, 4)
        wanted = source(images)
    network = FORMS[needed]()
    state = {f"{prefix}{name}": tensor.clone() for name, tensor in source.state_dict().items()}
    copy_weights(network, _saved(state, tmp_path))
    with torch.no_grad():
        assert torch.allclose(network.eval()(images), wanted, atol=1e-5)


@pytest.mark.parametrize("names", [("0.weight_orig", "0.weight_mask"), ("0.weight_g", "0.weight_v")])
@pytest.mark.parametrize("shape", [(), (3,), (4, 1, 3, 3), (0,)])
def test_parts_that_do_not_go_together_are_refused(names: tuple[str, str], shape: tuple[int, ...]) -> None:
    state = {name: tensor for name, tensor in _layers().state_dict().items() if name != "0.weight"}
    parts = {names[0]: torch.ones(7), names[1]: torch.ones(shape)}
    with pytest.raises(MismatchError, match="do not fit"):
        copy_weights(_layers(), Weights({**state, **parts}, "0"))


def test_layers_that_take_their_shape_from_the_file(tmp_path: Path) -> None:
    wanted = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    with _quiet():
        network = nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(2))
    copy_weights(network, _saved({f"module.{name}": t for name, t in wanted.state_dict().items()}, tmp_path))
    images = torch.rand(3, 3, 2, 2)
    assert torch.equal(network.eval()(images), wanted(images))


def test_errors_of_the_networks_own_code_are_one_sentence(tmp_path: Path) -> None:
    class Failing(nn.Linear):
        def _load_from_state_dict(self, *_: Any) -> None:
            raise KeyError("layout\nof 2019")

    with pytest.raises(MismatchError, match=r"do not fit: 'layout.*of 2019'; is arch= the right one") as caught:
        copy_weights(Failing(2, 2), _saved(nn.Linear(2, 2).state_dict(), tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_file_for_a_timm_architecture_goes_through_timms_filter(prefix: str, tmp_path: Path) -> None:
    reference = libraries.timm_build("test_vit", {"num_classes": 10, "img_size": 32})
    stored = {**reference.state_dict(), "pos_embed": torch.randn(1, 1 + 9, 64)}  # trained on 48 x 48 pixels
    torch.save({"state_dict": {f"{prefix}{name}": tensor for name, tensor in stored.items()}}, tmp_path / "w.pth")
    ref = f"file:{tmp_path / 'w.pth'}?arch=timm:test_vit&num_classes=10&shape=3x32x32"
    model = load_model(ref, SourceSettings(offline=True))
    module: Any = sys.modules[type(reference).__module__]
    reference.load_state_dict(module.checkpoint_filter_fn(dict(stored), reference))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model.network(images), reference.eval()(images), atol=1e-5)
    assert any("timm's filter" in note for note in model.entry.renames)
