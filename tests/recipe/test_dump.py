from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smore_cli.comparing.spec import is_comparison
from smore_cli.methods import available_methods, load_method
from smore_cli.recipe import Recipe, dump_recipe, json_schema, load_recipe

SURPRISING = [
    "yes",
    "no",
    "null",
    "~",
    "",
    "1e-4",
    "1E5",
    "0x1f",
    "0o7",
    "010",
    "1_000",
    ".5",
    ".inf",
    "a: b",
    "# x",
    "- a",
]
SURPRISING += [
    "<<",
    "=",
    "*a",
    "&a",
    "!t",
    "%d",
    "@x",
    "`x`",
    " x ",
    "two\nlines",
    "\ttab",
    "'",
    '"',
    "2024-01-01",
    "1:30",
    "\x85",
    "a\u2028b",
]
written = st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t\x85")  # what a recipe may hold
text = st.sampled_from(SURPRISING) | st.text(written, max_size=12)
positive = st.floats(min_value=1e-300, max_value=1e300)


def recipe_with(**values: Any) -> Recipe:
    sound: dict[str, Any] = {
        "version": 1,
        "model": {"name_or_path": "smollm2-135m"},
        "adapter": {"method": "lora"},
        "data": {"train": [{"path": "quickstart", "format": "multiple_choice"}]},
        "output_dir": "runs/x",
    }
    return Recipe.model_validate(sound | values)


def reload(recipe: Recipe, folder: Path) -> Recipe:
    path = folder / "resolved.yaml"
    path.write_bytes(dump_recipe(recipe).encode())
    return load_recipe(path)


@settings(max_examples=60, deadline=None)
@given(
    name=text,
    revision=st.none() | text,
    roles=st.dictionaries(text, st.sampled_from(["user", "tool"]), max_size=3),
    column=text,
    modules=text | st.lists(text, min_size=1, max_size=3),
    rate=positive,
    epochs=st.none() | positive,
    seed=st.integers(0, 2**31 - 1),
)
@example(
    name="1e-4", revision="null", roles={"yes": "user"}, column="no", modules=["on"], rate=1e-4, epochs=1e16, seed=0
)
def test_a_recipe_survives_being_written_and_read(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    revision: str | None,
    roles: dict[str, str],
    column: str,
    modules: str | list[str],
    rate: float,
    epochs: float | None,
    seed: int,
) -> None:
    source = {"path": "quickstart", "format": "chat"}
    recipe = recipe_with(
        model={"name_or_path": "smollm2-135m", "revision": revision},
        adapter={"method": "lora", "target_modules": modules},
        data={"train": [source | {"group": name, "roles": roles, "columns": {"messages": column}}]},
        train={"learning_rate": rate, "epochs": epochs},
        seed=seed,
    )
    assert reload(recipe, tmp_path_factory.mktemp("recipe")) == recipe


@pytest.mark.parametrize("method", available_methods())
def test_the_defaults_of_every_method_survive_and_its_fields_are_written(tmp_path: Path, method: str) -> None:
    recipe = recipe_with(adapter={"method": method})
    again = reload(recipe, tmp_path)
    assert again == recipe
    assert type(again.adapter) is load_method(method)
    for field in load_method(method).model_fields:
        assert f"\n  {field}: " in dump_recipe(recipe)


def test_every_ready_recipe_survives(project: Path, tmp_path: Path) -> None:
    paths = [path for path in sorted((project / "recipes").rglob("*.yaml")) if not is_comparison(path)]
    assert len(paths) > 30
    for path in paths:
        assert reload(load_recipe(path), tmp_path) == load_recipe(path)


def objects(schema: Any) -> list[dict[str, Any]]:
    """Every object with named properties anywhere in a JSON schema."""
    if isinstance(schema, list):
        return [found for item in schema for found in objects(item)]
    if not isinstance(schema, dict):
        return []
    inside = [found for item in schema.values() for found in objects(item)]
    return [schema, *inside] if schema.get("type") == "object" and "properties" in schema else inside


def test_the_schema_has_one_alternative_for_each_method() -> None:
    schema = json_schema()
    alternatives = [
        schema["$defs"][choice["$ref"].rpartition("/")[2]] for choice in schema["properties"]["adapter"]["oneOf"]
    ]
    assert [choice["properties"]["method"]["const"] for choice in alternatives] == available_methods()
    assert all("method" in choice["required"] for choice in alternatives)


def test_the_schema_is_as_strict_as_the_loader_and_describes_every_field() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert len(objects(schema)) == 8 + len(available_methods())  # recipe, its sections, source and methods
    for section in objects(schema):
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            referred = schema["$defs"].get(field.get("$ref", "").rpartition("/")[2], {})
            assert field.get("description") or referred.get("description"), (section["title"], name)


def test_every_reference_of_the_schema_leads_somewhere() -> None:
    schema = json_schema()
    for reference in {part.split('"')[0] for part in str(schema).replace("'", '"').split('"#/$defs/')[1:]}:
        assert reference in schema["$defs"]
