from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

import smore_cli
from smore_cli.methods import available_methods, load_method
from smore_cli.recipe import schema

PACKAGE = Path(smore_cli.__file__).parent
SECTIONS = [
    schema.Recipe,
    schema.ModelConfig,
    schema.QuantizationConfig,
    schema.Source,
    schema.DataConfig,
    schema.TrainConfig,
    schema.EvalConfig,
    schema.LogConfig,
]


def single(annotation: object) -> bool:
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


@cache
def attributes_read(*parts: str) -> set[str]:
    """Names read as an attribute anywhere in these modules and subpackages."""
    names: set[str] = set()
    for path in [path for part in parts for path in sorted(PACKAGE.glob(part))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


def test_every_section_is_looked_at() -> None:
    defined = [
        value for value in vars(schema).values() if isinstance(value, type) and issubclass(value, schema.Section)
    ]
    assert set(defined) == {*SECTIONS, schema.Section}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_of_a_recipe_is_read_somewhere(section: type[BaseModel]) -> None:
    outside = sorted(
        path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name not in ("recipe", "methods")
    )
    # Of a field with a single value there is nothing to read: the loader has checked it.
    chosen = {name for name, field in section.model_fields.items() if not single(field.annotation)}
    assert chosen - attributes_read(*(f"{folder}/**/*.py" for folder in outside)) == set()


@pytest.mark.parametrize("method", available_methods())
def test_every_field_of_a_method_is_read_by_it_or_by_what_attaches_it(method: str) -> None:
    own = set(load_method(method).model_fields) - {"method"}  # the loader reads it: it names the class of the section
    assert own - attributes_read(f"methods/{method}.py", "nn/**/*.py") == set()
