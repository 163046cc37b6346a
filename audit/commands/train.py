"""The command `train`: train models from their recipes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from audit.commands.options import FOLDER, count_option, grouped_options, json_option
from audit.errors import UsageError


@dataclass(frozen=True)
class TrainingOptions:
    """Options of guess-first recipes; None where the default of the recipe is kept."""

    dataset: str | None
    count: int | None
    epochs: int | None
    seed: int | None


@click.command("train")
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True)
@click.option("--out", type=FOLDER, default=Path("trained"), show_default=True, help="The folder of weights and cards.")
@grouped_options(
    "options",
    TrainingOptions,
    click.option("--dataset", default=None, help="For guess-first recipes: a data set, such as parquet:PATH. [digits]"),
    count_option("For guess-first recipes: images. [all]"),
    click.option("--epochs", type=int, default=None, help="For guess-first recipes. [200]"),
    click.option("--seed", type=click.IntRange(0), default=None, help="For guess-first recipes. [0]"),
)
@json_option("the cards of the models as one JSON array")
def train_command(recipes: tuple[str, ...], out: Path, as_json: bool, options: TrainingOptions) -> None:
    """Train bundled models again; RECIPE is a name of `rvaudit models --source bundled`, or all.

    Other recipes are guess-first/NAME with NAME c-dv, c-js, c-dv-ie, c-js-ie, cnn, vib or lenet; load their weights as
    file:OUT/<name>.safetensors. Interrupted training resumes.

    Example: rvaudit train guess-first/c-js --images 500 --epochs 20 --out trained
    """
    from audit.commands.display import Display
    from audit.studies.recipes import (
        DIGITS_RECIPES,
        GuessFirstRecipe,
        GuessFirstRun,
        find_recipe,
        train_digits,
        train_guess_first,
    )

    cards, given = list[dict[str, Any]](), {name: value for name, value in vars(options).items() if value is not None}
    for recipe in list(DIGITS_RECIPES.values()) if recipes == ("all",) else [find_recipe(name) for name in recipes]:
        if isinstance(recipe, GuessFirstRecipe):
            dataset = GuessFirstRun.dataset if options.dataset is None else options.dataset
            settings = GuessFirstRun(dataset, options.count, options.epochs, options.seed or GuessFirstRun.seed)
            with Display(settings.epochs or recipe.training.epochs) as display:
                card = train_guess_first(recipe, settings, out, display.step)
        elif given:
            raise UsageError(f"recipe {recipe.id} is fixed: omit --{' --'.join(given)}")
        else:
            with Display(recipe.epochs) as display:
                card = train_digits(recipe, out, display.step)
        cards.append(card)
        if as_json:
            continue
        natural, adversarial = (number["value"] for number in card["published"])
        click.echo(f"{card['id']}: natural {natural:.3f}, adversarial {adversarial:.3f}, sha256 {card['sha256']}")
    if as_json:
        click.echo(json.dumps(cards, allow_nan=False))
