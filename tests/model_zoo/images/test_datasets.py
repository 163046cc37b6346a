"""Images: float32 in [0, 1], fixed order, hash; and errors for models that do not fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from audit.errors import EnvironmentFault, MismatchError, UnknownNameError, UsageError
from model_zoo.entries import ModelEntry
from model_zoo.images.datasets import ImageRequest, ImageSet, check_fit, load_images
from model_zoo.load import LoadedModel

RNG = np.random.default_rng(0)


def _pixels(*shape: int) -> "np.ndarray[Any, Any]":
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def _check_contract(images: ImageSet) -> None:
    assert images.images.dtype == torch.float32
    assert images.labels.dtype == torch.int64
    assert images.images.ndim == 4
    assert len(images.images) == len(images.labels) == len(images.indices)
    assert 0 <= float(images.images.min()) <= float(images.images.max()) <= 1
    assert len(images.sha256) == 64


def test_digits_splits_are_stratified_and_disjoint() -> None:
    test, train = load_images("digits"), load_images("digits", ImageRequest(split="train"))
    for images in (test, train):
        _check_contract(images)
        assert images.images.shape[1:] == (1, 8, 8)
        counts = images.labels.bincount()
        assert counts.max() - counts.min() <= 6
    assert (len(test.labels), len(train.labels)) == (900, 897)
    assert sorted(test.indices + train.indices) == list(range(1797))
    assert test.classes == tuple("0123456789")
    # Published numbers depend on the order, so it must never change.
    assert test.sha256 == "241ffd3778d673f56942f776e502b59f216e444d2f7d238fbc28aba0d6ec9be2"


def test_a_subset_is_a_prefix() -> None:
    whole, part = load_images("digits"), load_images("digits", ImageRequest(count=50))
    assert torch.equal(part.images, whole.images[:50])
    assert part.indices == whole.indices[:50]
    assert part.sha256 != whole.sha256
    assert part.sha256 == load_images("digits", ImageRequest(count=50)).sha256


@pytest.mark.parametrize("count", [0, -3])
def test_counts_below_one(count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} images were asked for; ask for at least 1"):
        load_images("digits", ImageRequest(count=count))


def test_counts_above_the_set() -> None:
    with pytest.raises(UsageError, match=r"901 images were asked for; digits \(test\) has 900"):
        load_images("digits", ImageRequest(count=901))


def test_names_and_splits() -> None:
    with pytest.raises(UnknownNameError, match="unknown data set 'cifar11'; did you mean 'cifar10"):
        load_images("cifar11")
    with pytest.raises(UnknownNameError, match="unknown split 'validation'"):
        load_images("digits", ImageRequest(split="validation"))
    with pytest.raises(UsageError, match="'npz:' names no path"):
        load_images("npz:")
    with pytest.raises(UsageError, match=r"has no splits, so 'train' cannot be taken"):
        load_images("npz:a.npz", ImageRequest(split="train"))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion-mnist", "svhn"])
def test_fetched_sets_that_are_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        EnvironmentFault, match=rf"data set {name} is not complete in .* offline mode does not fetch it"
    ):
        load_images(name, ImageRequest(data_dir=tmp_path, offline=True))


def test_an_mnist_folder_is_read(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels, labels = _pixels(12, 28, 28), np.arange(12, dtype=np.uint8) % 10
    for stem in ("train", "t10k"):
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(
            np.array([2051, 12, 28, 28], ">i4").tobytes() + pixels.tobytes()
        )
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(np.array([2049, 12], ">i4").tobytes() + labels.tobytes())
    images = load_images("mnist", ImageRequest(count=5, data_dir=tmp_path, offline=True))
    _check_contract(images)
    assert images.images.shape == (5, 1, 28, 28)
    assert torch.equal(images.images[:, 0], torch.from_numpy(pixels[:5]).float() / 255)
    assert images.classes[0] == "0 - zero"


def test_colour_data_sets_are_converted_to_channels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    class Fake:
        data, targets, labels, classes = _pixels(4, 32, 32, 3), [0, 1, 0, 1], np.array([0, 1, 0, 1]), ["cat", "dog"]

        def __init__(self, *_: object, **__: object) -> None: ...

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    images = load_images("cifar10", ImageRequest(data_dir=tmp_path))
    assert images.images.shape == (4, 3, 32, 32)
    assert images.classes == ("cat", "dog")
    monkeypatch.setattr(Fake, "data", _pixels(4, 3, 32, 32))
    monkeypatch.setattr(datasets, "SVHN", Fake)
    assert load_images("svhn", ImageRequest(data_dir=tmp_path)).images.shape == (4, 3, 32, 32)


def _model(num_classes: int, shape: tuple[int, int, int] | None, inputs: int = 64) -> LoadedModel:
    network = nn.Sequential(nn.Flatten(), nn.Linear(inputs, max(num_classes, 1)))
    return LoadedModel(network, num_classes, shape, ModelEntry(ref="file:a", name="net", source="file"))


def test_models_and_images_that_fit() -> None:
    digits = load_images("digits", ImageRequest(count=5))
    check_fit(_model(10, (1, 8, 8)), digits)
    check_fit(_model(10, None), digits)


def test_models_and_images_that_do_not_fit() -> None:
    digits = load_images("digits", ImageRequest(count=5))
    with pytest.raises(MismatchError, match="net takes images of 3x8x8, digits has 1x8x8: the channels differ"):
        check_fit(_model(10, (3, 8, 8)), digits)
    with pytest.raises(MismatchError, match="net takes images of 1x28x28, digits has 1x8x8: the size differ"):
        check_fit(_model(10, (1, 28, 28)), digits)
    with pytest.raises(MismatchError, match="net has 100 outputs, data set digits has 10 classes"):
        check_fit(_model(100, (1, 8, 8)), digits)
    with pytest.raises(MismatchError, match="net has no classifier"):
        check_fit(_model(0, (1, 8, 8)), digits)
    with pytest.raises(MismatchError, match="net does not take images of shape 1x8x8"):
        check_fit(_model(10, None, inputs=65), digits)
    with pytest.raises(UsageError, match="divide by 255"):
        check_fit(_model(10, (1, 8, 8)), replace(digits, images=digits.images * 255))


def test_balanced_images_are_the_first_of_each_class():
    images = load_images("digits", ImageRequest(count=50, balanced=True))
    whole = load_images("digits")
    assert images.labels.bincount().tolist() == [5] * 10
    places = [whole.indices.index(index) for index in images.indices]
    assert places == sorted(places)
    for label in range(10):
        first = (whole.labels == label).nonzero().flatten()[:5]
        chosen = torch.tensor(images.indices)[images.labels == label]
        assert torch.equal(torch.tensor(whole.indices)[first], chosen)


@pytest.mark.parametrize(("count", "said"), [(55, "ask for a multiple"), (900, "one has")])
def test_unbalanceable_counts_are_refused(count, said):
    with pytest.raises(UsageError, match=said):
        load_images("digits", ImageRequest(count=count, balanced=True))
