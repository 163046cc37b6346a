"""`file:` references: weights files with an architecture of a library or of a Python factory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from audit.errors import EnvironmentFault, IntegrityError, MismatchError, UnknownNameError, UnsafeError, UsageError
from model_zoo import libraries
from model_zoo.load import SourceSettings, identify, load_model
from model_zoo.model_types import check_outputs
from model_zoo.sources import files
from model_zoo.untrusted import file_sha256


@pytest.fixture
def weights(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "net-a.pth"
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    return path


@pytest.fixture
def ref(weights: Path, factories: Path) -> str:
    return f"file:{weights}?arch={factories}:small&num_classes=10"


def test_factory_with_normalisation_inside(
    ref: str, trusted: SourceSettings, small: Callable[..., nn.Module], state: dict[str, torch.Tensor], factories: Path
) -> None:
    options = "&mean=.5,.4,1/3&std=.2,.2,.25&shape=3x8x8&training=robust&trained_norm=linf&trained_eps=8/255"
    model = load_model(ref + options, trusted)
    plain = small()
    plain.load_state_dict(state)
    images = torch.rand(4, 3, 8, 8)
    mean, std = torch.tensor([0.5, 0.4, 1 / 3]).view(3, 1, 1), torch.tensor([0.2, 0.2, 0.25]).view(3, 1, 1)
    assert torch.allclose(model.network(images), plain.eval()((images - mean) / std), atol=1e-5)
    assert model.image_shape == (3, 8, 8)
    entry = model.entry
    assert (entry.training, entry.trained_norm, entry.trained_eps) == ("robust", "linf", 8 / 255)
    assert (entry.name, entry.family, entry.ref) == ("net-a", "small", ref + options)
    assert (entry.code_trusted, entry.code_sha256, entry.pinned) == (True, file_sha256(factories), False)
    assert not model.network.training
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


def test_shape_is_unknown_where_not_given(ref: str, trusted: SourceSettings) -> None:
    assert load_model(ref, trusted).image_shape is None


def test_module_factory_and_names(
    weights: Path, trusted: SourceSettings, factories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(factories.parent))
    model = load_model(f"file:{weights}?arch=nets:small&num_classes=10&name=mine&family=cnn", trusted)
    assert (model.entry.name, model.entry.family) == ("mine", "cnn")
    assert model.entry.code_sha256 == file_sha256(factories)


def test_code_needs_trust(ref: str) -> None:
    with pytest.raises(UnsafeError, match="would run Python code; pass --trust-code"):
        load_model(ref)
    with pytest.raises(UnsafeError, match="--trust-code"):
        identify(ref)


def test_identify_runs_no_code(weights: Path, factories: Path, trusted: SourceSettings) -> None:
    entry = identify(f"file:{weights}?arch={factories}:broken&num_classes=10", trusted)
    assert entry.weights_sha256 == file_sha256(weights)


def test_pinned_hash(ref: str, weights: Path, trusted: SourceSettings) -> None:
    assert identify(f"{ref}&sha256={file_sha256(weights)}", trusted).pinned
    with pytest.raises(IntegrityError, match="not the published 0123"):
        identify(f"{ref}&sha256=0123", trusted)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (("num_classes=10", "num_classes=ten"), UsageError, "num_classes='ten' of a file: reference is not a number"),
        (("num_classes=10", "num_classes=1"), UsageError, "at least 2"),
        (("num_classes=10", "num_classes=12"), MismatchError, "the checkpoint has 10 outputs, the network 12"),
        (("num_classes=10", "num_classes=10&shape=3x32"), UsageError, "write shape=3x32x32"),
        (("num_classes=10", "num_classes=10&shape=3x9x9"), MismatchError, "does not take images of shape 3x9x9"),
        (("num_classes=10", "num_classes=10&mean=.5,.5,.5"), UsageError, "std='' is not a number"),
        (("num_classes=10", "num_classes=10&mean=.5&std=1,1"), UsageError, "mean='.5' and std='1,1' do not fit"),
        (("num_classes=10", "num_classes=10&mean=.5&std=0"), UsageError, "the std above 0"),
        (("num_classes=10", "num_classes=10&std=x"), UsageError, "mean='' is not a number"),
        (("num_classes=10", "num_classes=10&training=strong"), UnknownNameError, "unknown training 'strong'"),
        (("num_classes=10", "num_classes=10&trained_norm=lp"), UnknownNameError, "unknown trained_norm 'lp'"),
        (("num_classes=10", "num_classes=10&trained_eps=big"), UsageError, "trained_eps='big' is not a number"),
        ((":small", ":smal"), UnknownNameError, r"unknown factory in .* 'smal'; did you mean 'small'"),
        ((":small", ":broken"), UsageError, r"broken raised RuntimeError: out of paint"),
        ((":small", ":number"), MismatchError, r"number returned a int, not a torch\.nn\.Module"),
        ((":small", ":tiny"), MismatchError, "checkpoint and architecture do not fit"),
        (("nets.py:", "nots.py:"), EnvironmentFault, r"factory file .*nots\.py does not exist"),
        (("nets.py:small", "nets.py"), UsageError, "is neither a model reference nor a Python factory"),
        (("net-a.pth", "net-b.pth"), EnvironmentFault, r"net-b\.pth does not exist; .* holds net-a\.pth"),
    ],
)
def test_invalid_file_references_are_refused(
    ref: str, change: tuple[str, str], error: type, sentence: str, trusted: SourceSettings
) -> None:
    with pytest.raises(error, match=sentence):
        load_model(ref.replace(*change), trusted)


def test_arch_is_needed_and_must_be_an_architecture(weights: Path, trusted: SourceSettings) -> None:
    with pytest.raises(UsageError, match="needs arch="):
        load_model(f"file:{weights}?num_classes=10", trusted)
    with pytest.raises(UsageError, match="cannot be taken from hf-hub:"):
        load_model(f"file:{weights}?arch=hf-hub:a/b&num_classes=10", trusted)
    with pytest.raises(EnvironmentFault, match=r"module 'no\.such\.module' cannot be found"):
        load_model(f"file:{weights}?arch=no.such.module:net&num_classes=10", trusted)


def test_a_factory_file_that_python_cannot_import(
    ref: str, trusted: SourceSettings, factories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factories.write_text("raise ValueError('unfinished')  # one")
    with pytest.raises(UsageError, match="raised ValueError: unfinished"):
        load_model(ref, trusted)
    factories.write_text("pass  # two")
    monkeypatch.setattr(files.importlib.util, "spec_from_file_location", lambda *_: None)
    with pytest.raises(UsageError, match="cannot be imported as Python code"):
        load_model(ref, trusted)


@pytest.mark.parametrize(
    ("arch", "build", "shape"),
    [
        ("torchvision:resnet18", lambda: libraries.torchvision_build("resnet18", 10, None), (3, 32, 32)),
        ("torchvision:vit_b_16", lambda: libraries.torchvision_build("vit_b_16", 10, 32), (3, 32, 32)),
        ("timm:test_vit", lambda: libraries.timm_build("test_vit", {"num_classes": 10, "img_size": 32}), (3, 32, 32)),
        ("timm:resnet18", lambda: libraries.timm_build("resnet18", {"num_classes": 10, "in_chans": 1}), (1, 32, 32)),
        (
            "robustbench:cifar10/corruptions/Hendrycks2020AugMix_WRN",
            lambda: libraries.robustbench_build("cifar10", "corruptions", "Hendrycks2020AugMix_WRN"),
            None,
        ),
    ],
)
def test_library_architectures(
    arch: str, build: Callable[[], nn.Module], shape: tuple[int, ...] | None, tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    # Some libraries initialise the classifier with zeros, which gives no gradient.
    state = {n: t + 0.01 * torch.randn(t.shape) if "head" in n else t for n, t in build().state_dict().items()}
    torch.save(state, path)
    size = f"&shape={'x'.join(map(str, shape))}" if shape else ""
    model = load_model(f"file:{path}?arch={arch}&num_classes=10{size}", SourceSettings(offline=True))
    shape = shape or (3, 32, 32)
    assert model.image_shape == shape
    assert not model.entry.code_trusted
    images = torch.rand(2, *shape, requires_grad=True)
    model.network(images).square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_an_encoder_without_a_classifier(tmp_path: Path) -> None:
    path = tmp_path / "encoder.pth"
    torch.save(libraries.timm_build("test_vit", {"num_classes": 0, "img_size": 32}).state_dict(), path)
    ref = f"file:{path}?arch=timm:test_vit&num_classes=0&shape=3x32x32"
    model = load_model(ref, SourceSettings(offline=True))
    assert model.num_classes == 0
    assert model.network(torch.rand(2, 3, 32, 32)).shape == (2, 64)
    with pytest.raises(UsageError, match="audit a layer below it instead"):
        load_model(ref.replace("timm:test_vit", "bundled:digits-vgg-robust"), SourceSettings(offline=True))


def test_the_blank_image_is_on_the_device_of_the_network():
    seen = []

    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1, device="meta"))

        def forward(self, images):
            seen.append(images.device.type)
            return torch.zeros(len(images), 2)

    check_outputs(Elsewhere(), 2, (1, 4, 4), "elsewhere")
    assert seen == ["meta"]
