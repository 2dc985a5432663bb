"""A recipe written out: as YAML, every default spelled out, and as the JSON schema of all recipes."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from smore_cli.methods import available_methods, load_method
from smore_cli.recipe.reading import CORE_SCALARS
from smore_cli.recipe.schema import Recipe

__all__ = ["dump_recipe", "json_schema"]


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else; one line for a list of scalars."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _short_list(dumper: _Dumper, values: list[Any] | tuple[Any, ...]) -> yaml.Node:
    nested = any(isinstance(value, dict | list) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=not nested)


def _text(dumper: _Dumper, value: str) -> yaml.Node:
    # Three more characters end a line in YAML 1.1; only inside double quotes are they escaped.
    style = '"' if any(mark in value for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _short_list)
_Dumper.add_representer(tuple, _short_list)
for _name, _pattern, _first in CORE_SCALARS:
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)


def dump_recipe(recipe: Recipe) -> str:
    """Returns the recipe as YAML with every field; `load_recipe` reads the same recipe from it."""
    values = recipe.model_dump()
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema (draft 2020-12) of a recipe; `adapter` has one alternative for each method."""
    methods = {name: load_method(name) for name in available_methods()}
    models: list[type[BaseModel]] = [Recipe, *methods.values()]
    refs, whole = models_json_schema([(model, "validation") for model in models])
    definitions = whole["$defs"]
    root = definitions.pop(refs[Recipe, "validation"]["$ref"].rpartition("/")[2])
    adapter = root["properties"]["adapter"]
    definitions.pop(adapter["$ref"].rpartition("/")[2])
    root["properties"]["adapter"] = {
        "description": adapter["description"],
        "oneOf": [refs[model, "validation"] for model in methods.values()],
    }
    for name, model in methods.items():
        definition = definitions[refs[model, "validation"]["$ref"].rpartition("/")[2]]
        definition["properties"]["method"] |= {"const": name, "description": model.title}
        definition["required"] = sorted({*definition.get("required", ()), "method"})
        definition["description"] = f"{model.title} ({model.paper})"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}
