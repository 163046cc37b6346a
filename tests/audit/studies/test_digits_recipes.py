"""Recipes of the bundled models: reproducible training, and cards that match the models."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from audit.errors import UnknownNameError
from audit.studies.recipes import DIGITS_RECIPES, DigitsRecipe, find_recipe, train_digits
from audit.studies.recipes.digits import EPS
from model_zoo import catalogue
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import load_model
from model_zoo.untrusted import file_sha256

TINY = DigitsRecipe("digits-vgg-tiny", "vgg", trained_eps=0.05, epochs=1, seed=5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object], list[int]]:
    """Return folder, card and reported epochs of a recipe with one epoch."""
    folder, told = tmp_path_factory.mktemp("trained") / "new", []
    card = train_digits(TINY, folder, lambda epoch, _loss: told.append(epoch))
    return folder, card, told


def test_every_bundled_model_has_a_recipe() -> None:
    assert sorted(DIGITS_RECIPES) == catalogue.bundled_names()
    for name, recipe in DIGITS_RECIPES.items():
        card = catalogue.read_card(name)
        assert (card["family"], card["trained_eps"]) == (recipe.family, recipe.trained_eps)
        assert card["recipe"].startswith(f"rvaudit train {name}: {recipe.epochs} epochs, seed {recipe.seed}, ")
        assert card["training"] == ("robust" if recipe.trained_eps else "standard")
        assert card["sha256"] == file_sha256(catalogue.BUNDLED / f"{name}.safetensors")
    assert len({recipe.seed for recipe in DIGITS_RECIPES.values()}) == len(DIGITS_RECIPES)
    by_family: dict[str, set[float]] = {}
    for recipe in DIGITS_RECIPES.values():
        by_family.setdefault(recipe.family, set()).add(recipe.trained_eps)
    assert len(by_family) == 4
    assert all(radii == {0.0, EPS / 4, EPS} for radii in by_family.values())
    size = sum(path.stat().st_size for path in catalogue.BUNDLED.iterdir())
    assert size < 5_000_000


def test_an_unknown_recipe_is_refused() -> None:
    assert find_recipe("digits-vgg-robust").training.threat is not None
    assert find_recipe("digits-vgg-standard").training.threat is None
    with pytest.raises(UnknownNameError, match="unknown recipe 'digits-vg-robust'; did you mean 'digits-vgg-robust'"):
        find_recipe("digits-vg-robust")


def test_training_writes_weights_and_a_card_that_load(
    trained: tuple[Path, dict[str, object], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, card, told = trained
    assert told == [0]
    assert json.loads((folder / f"{TINY.id}.json").read_text()) == json.loads(json.dumps(card))
    assert card["sha256"] == file_sha256(folder / f"{TINY.id}.safetensors")
    monkeypatch.setattr(catalogue, "BUNDLED", folder)
    model = load_model(f"bundled:{TINY.id}")
    assert model.entry.pinned
    assert (model.entry.training, model.entry.trained_norm, model.entry.trained_eps) == ("robust", "linf", 0.05)
    held_out = load_images("digits", ImageRequest(split="test"))
    found = (model.network(held_out.images).argmax(1) == held_out.labels).double().mean()
    natural, adversarial = model.entry.published
    assert float(found) == pytest.approx(natural.value, abs=1e-9)
    assert natural.source == f"measured on {len(held_out.images)} held-out test images"
    assert adversarial.source.endswith(f"at l-inf {EPS}")
    assert adversarial.value <= natural.value


def test_the_seed_determines_the_network_and_leaves_the_global_stream(
    trained: tuple[Path, dict[str, object], list[int]], tmp_path: Path
) -> None:
    torch.manual_seed(77)
    before = torch.get_rng_state()
    assert train_digits(TINY, tmp_path)["sha256"] == trained[1]["sha256"]
    assert torch.equal(torch.get_rng_state(), before)
    assert train_digits(replace(TINY, seed=6), tmp_path)["sha256"] != trained[1]["sha256"]


def test_training_and_held_out_images_are_disjoint() -> None:
    train, test = (load_images("digits", ImageRequest(split=split)) for split in ("train", "test"))
    assert not set(train.indices) & set(test.indices)
