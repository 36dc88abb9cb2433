"""The recipe of a run: its schema, its file, and the checks before any GPU time is spent.

This room joins the section classes of all rooms (`<room>/config.py`) and imports no torch, so a recipe is read and
checked in under a second. It may import every room below `training`. Start reading at `recipe.py`, then `check.py`.
"""

from megatron_hdpo.config.check import check_recipe, check_sections
from megatron_hdpo.config.file import load_recipe, save_recipe
from megatron_hdpo.config.recipe import Recipe, RecipeError, parse_recipe

__all__ = ["Recipe", "RecipeError", "check_recipe", "check_sections", "load_recipe", "parse_recipe", "save_recipe"]
