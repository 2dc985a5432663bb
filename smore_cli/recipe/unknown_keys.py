"""Unknown keys: whose name it is, what was meant, or where it belongs."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel

from smore_cli.methods import MethodConfig, available_methods, load_method
from smore_cli.recipe.document import Loc
from smore_cli.recipe.foreign import FOREIGN_NAMES
from smore_cli.recipe.schema import Recipe, Source

__all__ = ["known_keys", "unknown_key"]


def unknown_key(loc: Loc, values: dict[str, Any], root: type[BaseModel] = Recipe) -> str:
    """Returns the message about the key at `loc`, which the section it stands in does not have."""
    *parts, key = loc
    section = tuple(parts)
    where = f"in {'.'.join(map(str, section))}" if section else "at the top level"
    return f"unknown key '{key}' {where}: {_advice(section, str(key), values, root)}"


def _advice(section: Loc, key: str, values: dict[str, Any], root: type[BaseModel]) -> str:
    if foreign := _foreign_name(section, key, values):
        return foreign
    known = known_keys(section, values, root)
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return f"did you mean '{near[0]}'?"
    if homes := _homes(key, values):
        return f"it belongs in {' or '.join(homes)}"
    near = difflib.get_close_matches(key, FOREIGN_NAMES, n=1, cutoff=0.85)
    if near and (foreign := _foreign_name(section, near[0], values)):
        return f"if '{near[0]}' is meant, {foreign}"
    if near := difflib.get_close_matches(key, known, n=1):
        return f"did you mean '{near[0]}'?"
    return f"there are {', '.join(known)}"


def _foreign_name(section: Loc, key: str, values: dict[str, Any]) -> str:
    """Returns what a name of another tool is called here, or nothing."""
    foreign = FOREIGN_NAMES.get(key)
    if foreign is None:
        return ""
    here = foreign.here
    home, _, name = here.rpartition(".")
    in_source = section[:2] in (("data", "train"), ("data", "eval"))
    if home == "data.train" and not in_source:
        return ""
    if home == "adapter" and name not in known_keys(("adapter",), values):
        method = values["adapter"].get("method") if isinstance(values.get("adapter"), dict) else None
        return f"that is {foreign.whose} name" + (f"; method '{method}' has no such setting" if method else "")
    if home == ".".join(map(str, section)) or home == "data.train":
        here = name
    if not here:
        return f"that is {foreign.whose} name; {foreign.note}"
    note = f" ({foreign.note})" if foreign.note else ""
    return f"that is {foreign.whose} name, here it is '{here}'{note}"


def _homes(key: str, values: dict[str, Any]) -> list[str]:
    """Returns the sections that have a key of this name."""
    sections = [name for name in Recipe.model_fields if key in known_keys((name,), values)]
    if key in Source.model_fields:
        sections.append("an entry of data.train")
    return [*sections, *(["the top level"] if key in Recipe.model_fields else [])]


def known_keys(section: Loc, values: dict[str, Any], root: type[BaseModel] = Recipe) -> list[str]:
    """Returns the keys the section at `section` may have; none if it is not a section."""
    model: type[BaseModel] | None = root
    for part in section:
        if isinstance(part, int) or model is None:
            continue  # an entry of a list has the list's type
        field = model.model_fields.get(part)
        model = _model_in(field.annotation) if field else None
        if model is MethodConfig:
            adapter = values.get("adapter")
            method = adapter.get("method") if isinstance(adapter, dict) else None
            model = load_method(method) if isinstance(method, str) and method in available_methods() else model
    return list(model.model_fields) if model else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part))), None)
