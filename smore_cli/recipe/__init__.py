"""Recipes: what is trained, on what and how, as one strict YAML file. Nothing here imports torch or transformers."""

from smore_cli.recipe.dump import dump_recipe, json_schema
from smore_cli.recipe.load import load_recipe, read_recipe
from smore_cli.recipe.schema import Recipe

__all__ = ["Recipe", "dump_recipe", "json_schema", "load_recipe", "read_recipe"]
