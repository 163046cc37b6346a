"""How the bundled checkpoints are made; `rvaudit train RECIPE` runs one again."""

from model_zoo.recipes.digits import RECIPES, Recipe, find_recipe, train_recipe

__all__ = ["RECIPES", "Recipe", "find_recipe", "train_recipe"]
