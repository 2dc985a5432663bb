"""Which text a merge is compared on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from smore_cli.merging.text import comparison_text
from smore_cli.methods.lora import LoRAConfig
from smore_cli.recipe import Recipe
from smore_cli.recipe.schema import DataConfig, ModelConfig, Source


def _source(path: Path, text: str) -> Source:
    path.write_text("".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(40)))
    return Source(path=str(path), format="text")


def _recipe(data: DataConfig) -> Recipe:
    return Recipe(version=1, model=ModelConfig(name_or_path="x"), adapter=LoRAConfig(), data=data, output_dir="x")


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> object:
    return AutoTokenizer.from_pretrained(tiny_llama)


def test_held_out_text_comes_before_training_text(tokenizer: object, tmp_path: Path) -> None:
    train, held_out = _source(tmp_path / "train.jsonl", "apples"), _source(tmp_path / "eval.jsonl", "metals")
    both = comparison_text(_recipe(DataConfig(train=[train], eval=[held_out], loss_on="all")), tokenizer, 50)
    assert both.origin == held_out.path
    assert tokenizer.decode(both.texts[0]).startswith("metals 0")
    alone = comparison_text(_recipe(DataConfig(train=[train], loss_on="all")), tokenizer, 50)
    assert alone.origin == train.path


def test_exactly_the_stated_number_of_tokens_is_taken(tokenizer: object, tmp_path: Path) -> None:
    recipe = _recipe(DataConfig(train=[_source(tmp_path / "train.jsonl", "apples")], loss_on="all"))
    assert sum(map(len, comparison_text(recipe, tokenizer, 50).texts)) == 50


def test_bundled_questions_stand_in_for_text_that_is_not_there(tokenizer: object, tmp_path: Path) -> None:
    gone = DataConfig(train=[Source(path=str(tmp_path / "gone.jsonl"), format="text")])
    for recipe in (None, _recipe(gone)):
        text = comparison_text(recipe, tokenizer, 64)
        assert text.origin == "quickstart"
        assert tokenizer.decode(text.texts[0]).startswith("Question: ")
