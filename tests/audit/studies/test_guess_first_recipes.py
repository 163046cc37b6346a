"""Recipes of "Guess First": architectures, training data, and models that load by their card."""

import json
from dataclasses import replace

import pytest
import torch

from audit.errors import IntegrityError, UnknownNameError, UsageError
from audit.representation.layers import Representation
from audit.studies.recipes import GUESS_FIRST_RECIPES, GuessFirstRun, find_recipe, train_guess_first
from audit.studies.recipes.guess_first import TrainingData, build_network, load_training_data
from model_zoo.load import load_model
from reports.cli import main

RUN = GuessFirstRun(epochs=2, seed=3)
IE = GUESS_FIRST_RECIPES["guess-first/c-js-ie"]


@pytest.fixture(scope="module")
def data():
    whole = load_training_data(RUN)
    return TrainingData(whole.images[:500], whole.labels[:500], *whole[2:])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("trained")
    return folder, train_guess_first(IE, RUN, folder, data=data)


def test_the_recipes_match_the_columns_of_the_paper():
    columns = {
        "c-dv": ("hypothesis-net", "donsker-varadhan", False, False),
        "c-js": ("hypothesis-net", "jensen-shannon", False, False),
        "c-dv-ie": ("hypothesis-net", "donsker-varadhan", True, False),
        "c-js-ie": ("hypothesis-net", "jensen-shannon", True, False),
        "cnn": ("plain-cnn", "cross-entropy", False, False),
        "vib": ("vib", "cross-entropy", False, True),
        "lenet": ("lenet", "cross-entropy", False, False),
    }
    found = {
        recipe.variant: (recipe.architecture, t.objective, t.elimination > 0, t.kl_weight > 0)
        for recipe in GUESS_FIRST_RECIPES.values()
        for t in [recipe.training]
    }
    assert found == columns
    assert {
        (r.training.epochs, r.training.batch_size, r.training.learning_rate) for r in GUESS_FIRST_RECIPES.values()
    } == {(200, 250, 1e-3)}
    with pytest.raises(UnknownNameError, match="unknown recipe 'guess-first/c-jsie'; did you mean 'guess-first/c-js"):
        find_recipe("guess-first/c-jsie")


@pytest.mark.parametrize("recipe", GUESS_FIRST_RECIPES.values(), ids=lambda recipe: recipe.variant)
def test_every_recipe_learns_the_digits_in_a_few_steps(recipe, data, tmp_path):
    losses, recipe = [], replace(recipe, training=replace(recipe.training, batch_size=50))
    card = train_guess_first(recipe, replace(RUN, epochs=5), tmp_path, lambda _, loss: losses.append(loss), data)
    assert losses[-1] < losses[0]
    natural, adversarial = (number["value"] for number in card["published"])
    assert natural > (0.15 if recipe.variant == "lenet" else 0.5)  # slower without batch norm
    assert adversarial <= natural
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_a_trained_model_loads_by_its_card_and_can_be_audited(trained, data):
    folder, card = trained
    assert json.loads((folder / "guess-first-c-js-ie-digits-3.json").read_text()) == json.loads(json.dumps(card))
    model = load_model(f"file:{folder}/{card['id']}.safetensors")
    assert (model.num_classes, model.image_shape) == (10, (1, 8, 8))
    assert model.entry.pinned
    assert (model.entry.dataset, model.entry.training) == ("digits", "standard")
    assert card["recipe"] == "rvaudit train guess-first/c-js-ie: 2 epochs, seed 3, 500 training images"
    right = model.network(data.held_out_images[:500]).argmax(1) == data.held_out_labels[:500]
    assert card["published"][0]["value"] == pytest.approx(float(right.double().mean()), abs=1e-9)
    assert Representation(model.network, "fc2")(data.images[:4]).shape == (4, 10 * 256)


def test_weights_that_differ_from_their_card_are_refused(trained, tmp_path):
    folder, card = trained
    weights = tmp_path / "net.safetensors"
    weights.write_bytes((folder / f"{card['id']}.safetensors").read_bytes())
    for changed, said in (
        ({"sha256": "0" * 64}, "sha256|hash"),
        ({"image_shape": [1, 8]}, "value of the wrong kind"),
        ({"training": "odd"}, "has training 'odd'"),
    ):
        (tmp_path / "net.json").write_text(json.dumps(card | changed))
        with pytest.raises(IntegrityError, match=said):
            load_model(f"file:{weights}")
    (tmp_path / "net.json").unlink()
    with pytest.raises(UsageError, match="num_classes"):
        load_model(f"file:{weights}")


def test_resumed_training_gives_the_weights_of_an_uninterrupted_run(trained, data, tmp_path):
    def killed(epoch, _loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_guess_first(IE, RUN, tmp_path, killed, data)
    assert [path.name for path in tmp_path.iterdir()] == ["guess-first-c-js-ie-digits-3.partial.pt"]
    told = []
    card = train_guess_first(IE, RUN, tmp_path, lambda epoch, _: told.append(epoch), data)
    assert told == [1]
    assert card["sha256"] == trained[1]["sha256"]


def test_the_seed_determines_the_network_and_leaves_the_global_stream(data):
    torch.manual_seed(77)
    before = torch.get_rng_state()
    one, same, other = (build_network(IE, data, seed)[0].fc1.linear.of_hypothesis for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_data_set_without_splits_is_divided_into_disjoint_parts(tmp_path):
    import numpy as np

    pixels = np.arange(50 * 64, dtype=np.float32).reshape(50, 1, 8, 8) / 4000
    np.savez(tmp_path / "tiny set.npz", images=pixels, labels=np.arange(50) % 10)
    run = GuessFirstRun(f"npz:{tmp_path}/tiny set.npz", count=30)
    data = load_training_data(run)
    assert (len(data.images), len(data.held_out_images)) == (30, 20)
    assert float(data.images.max()) < float(data.held_out_images.min())
    assert len(load_training_data(replace(run, count=None)).images) == 40
    assert run.name(IE) == "guess-first-c-js-ie-tiny-set-0"
    for count in (0, 50):
        with pytest.raises(UsageError, match=f"{count} of the 50 images .* legal are 1 to 49"):
            load_training_data(replace(run, count=count))
    named = load_training_data(GuessFirstRun(count=100))
    assert len(named.images) == 100
    assert len(named.held_out_images) == len(load_training_data(RUN).held_out_images)


def test_the_command_trains_and_refuses_options_of_other_recipes(tmp_path, capsys):
    words = ["train", "guess-first/lenet", "--epochs", "1", "--count", "300", "--seed", "4", "--out", str(tmp_path)]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("guess-first-lenet-digits-4: natural 0.")
    assert main(["train", "digits-vgg-standard", "--epochs", "1", "--out", str(tmp_path)]) == 2
    assert "recipe digits-vgg-standard is fixed: omit --epochs" in capsys.readouterr().err
