from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from transformers import AutoTokenizer

from smore_cli.data.batch import Row
from smore_cli.data.build import build_rows, split_eval
from smore_cli.errors import UsageError
from smore_cli.recipe.schema import Recipe, Source
from smore_cli.routing.inputs import choose_inputs, given_source, spread

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)  # type: ignore[no-any-return]


def write(path: Path, count: int) -> str:
    path.write_text("".join(json.dumps({"text": f"Row {i} of {path.stem}."}) + "\n" for i in range(count)))
    return str(path)


def recipe(**data: Any) -> Recipe:
    values = {
        "version": 1,
        "model": {"name_or_path": "m"},
        "adapter": {"method": "smore"},
        "data": data,
        "output_dir": "runs/x",
    }
    return Recipe.model_validate(values)


@pytest.fixture
def train(tmp_path: Path) -> dict[str, str]:
    return {"path": write(tmp_path / "train.jsonl", 10), "format": "text"}


def test_a_run_is_looked_at_on_its_held_out_sources(
    tmp_path: Path, train: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> None:
    held_out = {"path": write(tmp_path / "eval.jsonl", 3), "format": "text"}
    found = choose_inputs([], recipe(train=[train], eval=[held_out]), tokenizer, None)
    assert (found.role, found.origins, len(found.rows)) == ("held-out", [held_out["path"]], 3)
    assert found.line() == f"{held_out['path']}, held out from training; 3 rows; {found.tokens} tokens"


def test_without_them_on_exactly_the_rows_that_training_held_out(
    train: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> None:
    run = recipe(train=[train], eval_fraction=0.3)
    found = choose_inputs([], run, tokenizer, None)
    rows = build_rows(run.data, tokenizer, run.data.train).rows
    assert (found.role, found.rows) == ("held-out", split_eval(rows, 0.3, run.seed)[1])
    assert found.available == 3


def test_and_else_on_its_training_rows(train: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> None:
    found = choose_inputs([], recipe(train=[train]), tokenizer, 4)
    assert (found.role, len(found.rows), found.available) == ("training", 4, 10)
    assert found.line() == (
        f"{train['path']}, which the run was trained on; 4 of 10 rows, evenly spaced; {found.tokens} tokens"
    )
    assert found.document() == {
        "role": "training", "sources": [train["path"]], "rows": 4, "available_rows": 10, "tokens": found.tokens,
        "labels": [],
    }  # fmt: skip


def test_given_data_are_read_in_the_format_of_the_runs_own(
    tmp_path: Path, train: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> None:
    other, run = write(tmp_path / "other.jsonl", 2), recipe(train=[train])
    source = given_source(other, None, None, run)
    assert (source.format, source.split) == ("text", "train")
    found = choose_inputs([source], run, tokenizer, None)
    assert (found.role, found.origins, len(found.rows)) == ("given", [other], 2)


def test_an_adapter_without_a_recipe_takes_given_data_only(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = given_source(write(tmp_path / "other.jsonl", 2), "text", None, None)
    assert len(choose_inputs([source], None, tokenizer, None).rows) == 2
    with pytest.raises(UsageError, match="no recipe that names its data"):
        choose_inputs([], None, tokenizer, None)


def test_the_bundled_set_needs_no_format_and_has_splits() -> None:
    assert given_source("quickstart", None, "test[:4]", None) == Source(
        path="quickstart", format="multiple_choice", split="test[:4]"
    )


def test_a_format_that_is_missing_or_unknown_is_refused(train: dict[str, str]) -> None:
    mixed = recipe(train=[train, {**train, "format": "chat"}])
    for run in (None, mixed):
        with pytest.raises(UsageError, match=r"--data x\.jsonl: there is no --format") as caught:
            given_source("x.jsonl", None, None, run)
        assert "multiple_choice" in caught.value.hint
    with pytest.raises(UsageError, match="there is no format 'texts'"):
        given_source("x.jsonl", "texts", None, mixed)


def test_given_data_need_not_suit_the_runs_objective(
    tmp_path: Path, train: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> None:
    questions = {"path": "quickstart", "format": "multiple_choice", "split": "test[:2]"}
    run = recipe(train=[questions], objective="choice_ranking")
    assert all(len(row.branches) == 4 for row in choose_inputs([], run, tokenizer, None).rows)
    plain = choose_inputs([given_source(train["path"], "text", None, run)], run, tokenizer, None)
    assert len(plain.rows) == 10
    again = choose_inputs([given_source("quickstart", None, "test[:2]", run)], run, tokenizer, None)
    assert all(len(row.branches) == 4 for row in again.rows)


@pytest.mark.parametrize(
    ("limit", "chosen"), [(None, list(range(10))), (20, list(range(10))), (3, [0, 3, 6]), (1, [0])]
)
def test_fewer_rows_are_taken_from_all_over_the_data(limit: int | None, chosen: list[int]) -> None:
    rows = [Row([index], [[1]], [[True]]) for index in range(10)]
    assert [row.prompt[0] for row in spread(rows, limit)] == chosen
