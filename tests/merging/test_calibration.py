"""Which text a merge is fitted to, and that it is never judged on the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from transformers import AutoTokenizer

from smore_cli.errors import DataError, UsageError
from smore_cli.merging.calibration import Calibration, Corpus, batches_of, read_texts
from smore_cli.methods.lora import LoRAConfig
from smore_cli.recipe import Recipe
from smore_cli.recipe.schema import DataConfig, ModelConfig, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _source(path: Path, word: str, count: int = 40, **settings: Any) -> Source:
    path.write_text("".join(json.dumps({"text": f"{word} {i} and {word} again"}) + "\n" for i in range(count)))
    return Source(path=str(path), format="text", **settings)


def _recipe(**data: Any) -> Recipe:
    config = DataConfig(loss_on="all", **data)
    return Recipe(version=1, model=ModelConfig(name_or_path="x"), adapter=LoRAConfig(), data=config, output_dir="x")


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


def _words(tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> list[str]:
    return [str(tokenizer.decode(row.prompt + row.branches[0])).split()[0] for row in corpus.rows]


def test_the_training_mixture_is_fitted_to_and_evaluation_data_judge(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    train = [_source(tmp_path / "a.jsonl", "apples", weight=3.0), _source(tmp_path / "b.jsonl", "metals", weight=1.0)]
    recipe = _recipe(train=train, eval=[_source(tmp_path / "c.jsonl", "stars")])
    texts = read_texts(recipe, tokenizer, Calibration(tokens=600))
    words = _words(tokenizer, texts.calibration)
    assert 2 < words.count("apples") / words.count("metals") < 4.5
    assert 600 <= texts.calibration.tokens < 700
    assert texts.role == "evaluation data"
    assert [set(_words(tokenizer, corpus)) for corpus in texts.judged] == [{"stars"}]


def test_rows_that_the_run_held_out_judge_source_by_source_and_are_never_fitted_to(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    train = [_source(tmp_path / "a.jsonl", "apples"), _source(tmp_path / "b.jsonl", "metals")]
    texts = read_texts(_recipe(train=train, eval_fraction=0.2), tokenizer, Calibration(tokens=100_000))
    held_out = [tuple(row.branches[0]) for corpus in texts.judged for row in corpus.rows]
    fitted = [tuple(row.branches[0]) for row in texts.calibration.rows]
    assert texts.role == "held out" and len(texts.judged) == 2
    assert len(held_out) == 16 and len(fitted) == 64
    assert not set(held_out) & set(fitted)


def test_without_held_out_rows_those_judge_that_were_not_fitted_to(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    recipe = _recipe(train=[_source(tmp_path / "a.jsonl", "apples")])
    texts = read_texts(recipe, tokenizer, Calibration(tokens=200))
    judged = {tuple(row.branches[0]) for row in texts.judged[0].rows}
    assert texts.role == "training rows not fitted to" and judged
    assert not judged & {tuple(row.branches[0]) for row in texts.calibration.rows}


def test_a_file_of_ones_own_is_read_as_the_runs_data_or_by_a_named_format(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    recipe = _recipe(train=[_source(tmp_path / "a.jsonl", "apples")], eval=[_source(tmp_path / "c.jsonl", "stars")])
    own = tmp_path / "own.jsonl"
    _source(own, "rivers")
    texts = read_texts(recipe, tokenizer, Calibration(path=own, tokens=100))
    assert set(_words(tokenizer, texts.calibration)) == {"rivers"}
    assert set(_words(tokenizer, texts.judged[0])) == {"stars"}
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "rain?"}, {"role": "assistant", "content": "water that falls"}]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    texts = read_texts(recipe, tokenizer, Calibration(path=chats, format="chat", tokens=100))
    assert "water" in str(tokenizer.decode(texts.calibration.rows[0].branches[0]))
    with pytest.raises(UsageError, match="no --format"):
        read_texts(None, tokenizer, Calibration(path=own))
    with pytest.raises(DataError, match="nowhere"):
        read_texts(recipe, tokenizer, Calibration(path=tmp_path / "nowhere.jsonl"))


def test_bundled_questions_stand_in_for_data_that_is_not_there(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    gone = _recipe(train=[Source(path=str(tmp_path / "gone.jsonl"), format="text")])
    for recipe in (None, gone):
        texts = read_texts(recipe, tokenizer, Calibration(tokens=500))
        assert texts.role == "bundled questions" and texts.calibration.origin == "quickstart"
        judged = {tuple(row.prompt) for row in texts.judged[0].rows}
        assert judged and not judged & {tuple(row.prompt) for row in texts.calibration.rows}


def test_a_pass_holds_no_more_than_its_tokens_and_every_row_is_in_one(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    recipe = _recipe(train=[_source(tmp_path / "a.jsonl", "apples", count=400)])
    rows = read_texts(recipe, tokenizer, Calibration(tokens=5000)).calibration.rows
    batches = batches_of(rows, 0)
    assert max(batch.input_ids.numel() for batch in batches) <= 2048
    assert sum(int(batch.token_mask.sum()) for batch in batches) == sum(row.length for row in rows)
