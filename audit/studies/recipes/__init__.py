"""Recipes for training models: the bundled models, the CIFAR-10 model set, and the "Guess First" networks."""

from audit.errors import UnknownNameError
from audit.studies.recipes.cifar import CifarRecipe, is_trained, train_cifar
from audit.studies.recipes.digits import DIGITS_RECIPES, DigitsRecipe, train_digits
from audit.studies.recipes.guess_first import GUESS_FIRST_RECIPES, GuessFirstRecipe, GuessFirstRun, train_guess_first

__all__ = [
    "DIGITS_RECIPES",
    "GUESS_FIRST_RECIPES",
    "CifarRecipe",
    "DigitsRecipe",
    "GuessFirstRecipe",
    "GuessFirstRun",
    "find_recipe",
    "is_trained",
    "train_cifar",
    "train_digits",
    "train_guess_first",
]


def find_recipe(name: str) -> DigitsRecipe | GuessFirstRecipe:
    """Return a recipe by name; raises UnknownNameError with the nearest names."""
    if name in DIGITS_RECIPES:
        return DIGITS_RECIPES[name]
    if name not in GUESS_FIRST_RECIPES:
        raise UnknownNameError("recipe", name, [*DIGITS_RECIPES, *GUESS_FIRST_RECIPES])
    return GUESS_FIRST_RECIPES[name]
