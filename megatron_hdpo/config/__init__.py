"""The recipe of a run: its schema, its file, and the checks that come before any GPU time is spent."""

from megatron_hdpo.config.check import check_recipe
from megatron_hdpo.config.file import load_recipe, save_recipe
from megatron_hdpo.config.recipe import Recipe, RecipeError, parse_recipe

__all__ = ["Recipe", "RecipeError", "check_recipe", "load_recipe", "parse_recipe", "save_recipe"]
