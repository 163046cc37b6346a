"""RobustBench: folder layout, key rules, and download addresses."""

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from audit.errors import EnvironmentFault, MismatchError, UnknownNameError
from model_zoo import catalogue, libraries
from model_zoo.catalogue import robustbench_rows
from model_zoo.load import LoadedModel, SourceSettings, identify, load_model
from model_zoo.sources import pretrained
from model_zoo.untrusted import file_sha256
from model_zoo.weights import key_rules

Check = Callable[[LoadedModel], None]


def _robustbench(name: str, threat: str = "corruptions") -> tuple[str, nn.Module]:
    return f"robustbench:cifar10/{threat}/{name}", libraries.robustbench_build("cifar10", threat, name)


def test_robustbench_model_in_its_own_folder_layout(check_contract: Check, offline: SourceSettings) -> None:
    ref, network = _robustbench("Hendrycks2020AugMix_WRN")
    assert offline.model_dir is not None
    path = offline.model_dir / "cifar10" / "corruptions" / "Hendrycks2020AugMix_WRN.pt"
    path.parent.mkdir(parents=True)
    tensors = {f"module.{n}": t for n, t in network.state_dict().items() if n not in ("mu", "sigma")}
    torch.save({"state_dict": tensors, "epoch": 9}, path)
    model = load_model(ref, offline)
    check_contract(model)
    assert model.image_shape == (3, 32, 32)
    assert model.entry.weights_sha256 == file_sha256(path)
    assert any("stripped 'module.'" in note for note in model.entry.renames)
    assert "mu is not in the checkpoint; the architecture's value is kept" in model.entry.renames
    cached = offline.cache / "robustbench" / "cifar10" / "corruptions" / path.name
    cached.parent.mkdir(parents=True)
    path.rename(cached)
    assert identify(ref, offline).weights_sha256 == model.entry.weights_sha256


def test_the_entry_named_last_is_used_like_in_robustbench(tmp_path: Path) -> None:
    network = nn.Linear(2, 2)
    good, other = nn.Linear(2, 2).state_dict(), nn.Linear(2, 2).state_dict()
    torch.save({"last": good, "best": other}, tmp_path / "a.pt")
    notes = key_rules.copy_robustbench_weights(network, "Andriushchenko2020Understanding", [tmp_path / "a.pt"])
    assert notes[0] == "took the entry 'last'"
    assert torch.equal(network.weight, good["weight"])


def test_weights_are_copied_into_the_classifier_inside_a_normalisation(tmp_path: Path) -> None:
    class Normalize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

    network = nn.Sequential()
    network.add_module("normalize", Normalize())
    network.add_module("model", nn.Linear(2, 2))
    good = nn.Linear(2, 2).state_dict()
    torch.save({f"module.model.{n}": t for n, t in good.items()}, tmp_path / "a.pt")
    notes = key_rules.copy_robustbench_weights(network, "Salman2020Do_R18", [tmp_path / "a.pt"])
    assert "filled the part named 'model', as robustbench does" in notes
    assert torch.equal(network.state_dict()["model.weight"], good["weight"])


class _Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.std_model, self.rob_model = nn.Linear(2, 2), nn.Linear(2, 2)
        self.policy_net, self.bn = nn.Linear(2, 2), nn.BatchNorm1d(2)


@pytest.mark.parametrize(
    ("name", "children"),
    [
        ("Chen2020Adversarial", ("models.0", "models.1")),
        ("Bai2024MixedNUTS", ("std_model", "rob_model")),
        ("Bai2023Improving_edm", ("comp_model.models.0", "comp_model.models.1", "comp_model.policy_net")),
    ],
)
def test_ensembles_are_loaded_member_by_member(name: str, children: tuple[str, ...], tmp_path: Path) -> None:
    network = nn.ModuleDict({"comp_model": _Ensemble()}) if name.startswith("Bai2023") else _Ensemble()
    paths = key_rules.robustbench_files(tmp_path, name, len(children))
    assert [path.name for path in paths][:2] == [f"{name}.pt_m0.pt", f"{name}.pt_m1.pt"]
    states = [nn.Linear(2, 2).state_dict() for _ in children]
    for path, weights in zip(paths, states, strict=True):
        pair = {"model": weights, "bn": nn.BatchNorm1d(2).state_dict()}
        torch.save(pair if children[-1].endswith("policy_net") and path == paths[-1] else weights, path)
    key_rules.copy_robustbench_weights(network, name, paths)
    for child, weights in zip(children, states, strict=True):
        assert torch.equal(network.get_submodule(child).state_dict()["weight"], weights["weight"])


@pytest.mark.parametrize(
    ("dataset", "name"), [("cifar10", "Debenedetti2022Light_XCiT-S12"), ("imagenet", "Standard_R50")]
)
def test_networks_whose_constructor_downloads_are_built_without_weights(
    dataset: str, name: str, tmp_path: Path
) -> None:
    network = libraries.robustbench_build(dataset, "Linf", name)
    assert [child for child, _ in network.named_children()] == ["normalize", "model"]
    torch.save(network.get_submodule("model").state_dict(), tmp_path / "w.pt")
    notes = key_rules.copy_robustbench_weights(network, name, [tmp_path / "w.pt"])
    assert "filled the part named 'model', as robustbench does" in notes


def test_an_ensemble_of_another_version_is_refused(tmp_path: Path) -> None:
    paths = key_rules.robustbench_files(tmp_path, "X", 2)
    for path in paths:
        torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(MismatchError, match=r"no part 'models\.0'"):
        key_rules.copy_robustbench_weights(nn.Linear(2, 2), "X", paths)


def test_robustbench_names_and_missing_files(offline: SourceSettings) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown RobustBench data set 'cifar'; did you mean 'cifar10'"):
        load_model("robustbench:cifar/Linf/Standard", offline)
    with pytest.raises(UnknownNameError, match=r"unknown RobustBench threat model of cifar10 'linf'.*'Linf'"):
        load_model("robustbench:cifar10/linf/Standard", offline)
    with pytest.raises(
        UnknownNameError, match=r"unknown RobustBench model of cifar10/Linf 'Wong2020Fst'.*Wong2020Fast"
    ):
        load_model("robustbench:cifar10/Linf/Wong2020Fst", offline)
    with pytest.raises(
        EnvironmentFault, match=r"offline mode does not fetch it; put its weights at .*Wong2020Fast\.pt"
    ):
        load_model("robustbench:cifar10/Linf/Wong2020Fast", offline)


def test_download_addresses_of_robustbench_weights() -> None:
    def urls(dataset: str, threat: str, name: str) -> list[Any]:
        return pretrained._robustbench_downloads(catalogue.robustbench_row(dataset, threat, name))

    assert len(urls("cifar10", "Linf", "Chen2020Adversarial")) == 3
    assert urls("cifar10", "Linf", "Wong2020Fast")[0].link.endswith("/view")
    assert "xcit-s-cifar10" in urls("cifar10", "Linf", "Debenedetti2022Light_XCiT-S12")[0].url
    assert urls("imagenet", "corruptions", "AlexNet")[0].sha256 == "7be5be79"
    assert urls("imagenet", "Linf", "Standard_R50")[0].sha256 == "0676ba61"


def test_robustbench_weights_are_fetched_into_the_cache(
    server: tuple[str, dict[str, tuple[bytes, int | None]], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ref, network = _robustbench("Hendrycks2020AugMix_WRN")
    torch.save(network.state_dict(), tmp_path / "w.pt")
    url, answers, asked = server
    answers["/w"] = ((tmp_path / "w.pt").read_bytes(), None)
    monkeypatch.setattr(pretrained, "_DRIVE", url)
    monkeypatch.setattr(libraries, "robustbench_drive_ids", lambda *_: ["/w"])
    settings = SourceSettings(cache_dir=tmp_path / "cache", model_dir=tmp_path / "none")
    for _ in range(2):
        assert identify(ref, settings).weights_sha256 == file_sha256(tmp_path / "w.pt")
    assert asked == ["/w"]


def test_a_constructor_that_needs_a_gpu_is_an_environment_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def wants(message: str) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            raise RuntimeError(message)

        return build

    for message, expected in (("Found no NVIDIA driver", EnvironmentFault), ("shape", RuntimeError)):
        monkeypatch.setattr(libraries, "_robustbench_entry", lambda *_, m=message: {"model": wants(m)})
        with pytest.raises(expected, match=r"this machine has none|shape"):
            libraries.robustbench_build("cifar10", "Linf", "Standard")


def test_every_architecture_is_built_with_the_installed_timm() -> None:
    """Without memory for weights; constructors that read weights or need a GPU cannot be tried that way."""
    built, failed, seen = 0, {}, set()
    for row in robustbench_rows():
        architecture = row.dataset, row.entry.architecture
        if architecture in seen:
            continue
        seen.add(architecture)
        try:
            with torch.device("meta"):
                libraries.robustbench_build(row.dataset, row.threat, row.id)
            built += 1
        except Exception as error:  # constructors of others may raise anything
            failed[row.entry.ref] = str(error)
    newest = tuple(int(part) for part in version("timm").split(".")[:3]) >= (1, 0, 31)
    assert built >= (62 if newest else 48), failed  # earlier versions of timm read values of initial weights
    unexplained = {ref: why for ref, why in failed.items() if "meta tensor" not in why and "moves to a GPU" not in why}
    assert unexplained == {}


def test_without_robustbench_its_references_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, offline: SourceSettings
) -> None:
    monkeypatch.setitem(sys.modules, "robustbench.model_zoo.models", None)
    monkeypatch.setattr(libraries, "find_spec", lambda _name: None)
    with pytest.raises(EnvironmentFault, match=r"which is not installed; pip install 'rvaudit\[robustbench\]'"):
        libraries.robustbench_build("cifar10", "Linf", "Carmon2019Unlabeled")
    with pytest.raises(EnvironmentFault, match=r"which is not installed; pip install 'rvaudit\[robustbench\]'"):
        load_model("robustbench:imagenet/Linf/Salman2020Do_R18", SourceSettings(cache_dir=offline.cache))
    with pytest.raises(EnvironmentFault, match=r"needs robustbench's list; pip install 'rvaudit\[robustbench\]'"):
        libraries.robustbench_image_ids()
