"""How checkpoints are made: `rvaudit train RECIPE` makes a bundled one again, or one of the "Guess First" networks."""

from audit.errors import UnknownNameError
from audit.studies.recipes.cifar import CifarRecipe, is_trained, train_cifar
from audit.studies.recipes.digits import RECIPES, Recipe, train_recipe
from audit.studies.recipes.guess_first import GUESS_FIRST, GuessFirstRecipe, GuessFirstRun, train_guess_first

__all__ = [
    "GUESS_FIRST",
    "RECIPES",
    "CifarRecipe",
    "GuessFirstRecipe",
    "GuessFirstRun",
    "Recipe",
    "find_recipe",
    "is_trained",
    "train_cifar",
    "train_guess_first",
    "train_recipe",
]


def find_recipe(name: str) -> Recipe | GuessFirstRecipe:
    """Return a recipe by name; raises UnknownNameError with the nearest names."""
    if name in RECIPES:
        return RECIPES[name]
    if name not in GUESS_FIRST:
        raise UnknownNameError("recipe", name, [*RECIPES, *GUESS_FIRST])
    return GUESS_FIRST[name]
