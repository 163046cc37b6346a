"""Recipes of the CIFAR-10 model set: settings, resumed training, and models that load by their card."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from audit.errors import UnknownNameError, UsageError
from audit.representation.layers import Representation
from audit.studies.recipes import is_trained, train_cifar
from audit.studies.recipes.cifar import EPS, PAPER_RECIPES, SMALL_RECIPES, CifarRecipe, model_set
from audit.training.classifiers import ClassifierTraining, StepSchedule
from model_zoo.architectures import build
from model_zoo.images.datasets import load_images
from model_zoo.load import load_model

ONE = model_set(
    "t", {"vgg": CifarRecipe("", "", "vgg", ClassifierTraining(), {"width": 2})}, ClassifierTraining(epochs=2)
)
SHAPE = {"image_shape": (3, 32, 32), "num_classes": 10}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path, draws = tmp_path_factory.mktemp("images") / "images.npz", np.random.default_rng(1)
    np.savez(path, images=draws.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), labels=np.arange(40) % 10)
    return load_images(f"npz:{path}")


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, train_cifar(ONE[2], images, images, folder)


def test_the_model_set_and_training_match_the_paper():
    assert {recipe.family for recipe in PAPER_RECIPES} == {
        "baseline-h",
        "resnet-18",
        "vgg-16",
        "resnet-50",
        "densenet-121",
    }
    assert sorted({round(255 * recipe.trained_eps, 9) for recipe in PAPER_RECIPES}) == [0, 2, 8]
    assert (
        len({recipe.training.seed for recipe in PAPER_RECIPES})
        == len(PAPER_RECIPES)
        == len({recipe.id for recipe in PAPER_RECIPES})
    )
    for recipe in PAPER_RECIPES:
        training = recipe.training
        assert (training.learning_rate, training.weight_decay, training.epochs) == (0.1, 5e-4, 150)
        assert training.steps == StepSchedule(every=50, factor=0.1, momentum=0.9)
        assert training.pgd.steps == 7
        assert (training.shift, training.flip) == (4, True)
    assert {recipe.family for recipe in SMALL_RECIPES} == {"baseline-h", "vgg", "resnet", "densenet", "resnet-deep"}
    assert PAPER_RECIPES[2].passes == 8 * PAPER_RECIPES[0].passes


@pytest.mark.parametrize(
    ("name", "arguments", "weights", "features"),
    [
        ("cifar-resnet", {"depth": 18}, 11_173_962, 512),
        ("cifar-resnet", {"depth": 50}, 23_520_842, 2048),
        ("cifar-densenet", {"depth": 121}, 6_956_426, 1024),
        ("cifar-vgg", {}, 14_724_042, 512),
    ],
)
def test_wide_networks_have_published_sizes_and_keep_the_resolution(name, arguments, weights, features):
    with torch.random.fork_rng(devices=[]):
        network = build(name, SHAPE | arguments).eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == weights
    batch = torch.rand(1, 3, 32, 32)
    first = next(each for each, part in network.named_modules() if isinstance(part, torch.nn.Conv2d))
    with torch.no_grad():
        assert network(batch).shape == (1, 10)
        assert Representation(network, first)(batch).shape == (1, 64 * 32 * 32)
        assert Representation(network, "penultimate")(batch).shape == (1, features)


def test_a_depth_that_does_not_exist_is_refused():
    with pytest.raises(UnknownNameError, match="did you mean"):
        build("cifar-resnet", SHAPE | {"depth": 19})


def test_a_trained_model_loads_by_its_card(trained, images):
    folder, card = trained
    assert json.loads((folder / "t-vgg-robust-8.json").read_text()) == json.loads(json.dumps(card))
    model = load_model(f"file:{folder}/t-vgg-robust-8.safetensors")
    assert (model.entry.training, model.entry.trained_eps, model.entry.family) == ("robust", EPS, "vgg")
    right = (model.network(images.images).argmax(1) == images.labels).double().mean()
    assert card["published"][0]["value"] == pytest.approx(float(right), abs=1e-9)
    assert card["published"][1]["value"] <= card["published"][0]["value"]
    assert sorted(path.name for path in folder.iterdir()) == ["t-vgg-robust-8.json", "t-vgg-robust-8.safetensors"]


class _Killed(Exception):
    pass


def test_resumed_training_gives_the_same_weights(trained, images, tmp_path):
    def stop(epoch, _loss):
        raise _Killed

    with pytest.raises(_Killed):
        train_cifar(ONE[2], images, images, tmp_path, stop)
    assert (tmp_path / "t-vgg-robust-8.partial.pt").exists()
    told = []
    card = train_cifar(ONE[2], images, images, tmp_path, lambda epoch, _loss: told.append(epoch))
    assert told == [1]
    assert card["sha256"] == trained[1]["sha256"]
    assert not (tmp_path / "t-vgg-robust-8.partial.pt").exists()


def test_a_trained_network_is_identified_by_settings_and_images(trained, images):
    folder, recipe = trained[0], ONE[2]
    assert is_trained(recipe, images, folder)
    assert not is_trained(ONE[0], images, folder)
    for other, data in (
        (recipe, replace(images, sha256="0" * 64)),
        (replace(recipe, training=replace(recipe.training, epochs=3)), images),
    ):
        with pytest.raises(UsageError, match="is of other settings or training images"):
            is_trained(other, data, folder)
