from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from smore_cli.data.batch import Row, collate
from smore_cli.data.build import build_rows, split_eval
from smore_cli.errors import DataError, ModelError
from smore_cli.recipe.schema import DataConfig, Source

Write = Callable[..., str]
Config = Callable[..., DataConfig]
Learned = Callable[..., str]

SHORT = {"prompt": "Hi", "completion": " there"}
LONG = {"prompt": "one two three four five six seven eight nine ten", "completion": " eleven"}


def build(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    return build_rows(data, tokenizer, data.train)


def refused(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> DataError:
    with pytest.raises(DataError) as caught:
        build(data, tokenizer)
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize("objective", ["completion", "choice_ranking"])
def test_every_row_of_arc_easy_learns_its_answer_and_nothing_else(
    shared_data: Path, smol_tokenizer: PreTrainedTokenizerBase, data_config: Config, learned: Learned, objective: str
) -> None:
    path = shared_data / "arc_easy_train.jsonl"
    source = {"split": "train[:300]"}
    data = data_config(str(path), "multiple_choice", objective=objective, max_length=512, source=source)
    built = build(data, smol_tokenizer)
    from smore_cli.data.files import read_file

    raw = list(read_file(path, "arc"))[:300]
    assert len(built.rows) == 300 and built.report.total.dropped == ()
    for row, source_row in zip(built.rows, raw, strict=True):
        assert smol_tokenizer.decode(row.prompt) == f"Question: {source_row['question']}\nAnswer:"
        gold = source_row["choices"][source_row["label"]]
        assert learned(smol_tokenizer, row, row.gold) == f" {gold}<|im_end|>"
        choices = source_row["choices"] if objective == "choice_ranking" else [gold]
        assert [learned(smol_tokenizer, row, place) for place in range(len(row.branches))] == [
            f" {choice}<|im_end|>" for choice in choices
        ]


def test_gsm8k_reads_through_renamed_columns(
    shared_data: Path, smol_tokenizer: PreTrainedTokenizerBase, data_config: Config, learned: Learned
) -> None:
    source = {"columns": {"prompt": "question", "completion": "answer"}, "split": "test[:20]"}
    path = str(shared_data / "gsm8k_test.jsonl")
    with pytest.raises(DataError, match="cannot use split 'test"):
        build(data_config(path, "prompt_completion", source=source), smol_tokenizer)
    built = build(data_config(path, "prompt_completion", source=source | {"split": "train[:1]"}), smol_tokenizer)
    assert learned(smol_tokenizer, built.rows[0]).endswith("#### 18<|im_end|>")


def test_the_report_counts_what_the_batches_hold(
    tokenizer: PreTrainedTokenizerBase, write: Write, data_config: Config
) -> None:
    question = {"question": "What do plants need?", "choices": ["water and light", "gold", "x"], "label": "A"}
    data = data_config(write([question, question | {"label": 2}]), "multiple_choice", objective="choice_ranking")
    built = build(data, tokenizer)
    batch = collate(built.rows, pad_token_id=tokenizer.pad_token_id)
    total = built.report.total
    assert (total.rows, total.tokens, total.supervised) == (2, int(batch.token_mask.sum()), len(batch.targets))
    assert total.longest == batch.input_ids.shape[1]
    assert [row.gold for row in built.rows] == [0, 2]


def test_sources_are_concatenated_and_reported_one_by_one(
    byte_tokenizer: PreTrainedTokenizerBase, write: Write, data_config: Config
) -> None:
    first, second = write([SHORT] * 3), write([{"text": "a text"}], "texts.jsonl")
    data = data_config(first, "prompt_completion")
    sources = [*data.train, Source(path=second, format="text")]
    built = build_rows(data, byte_tokenizer, sources)
    assert [(source.origin, source.rows) for source in built.report.sources] == [(first, 3), (second, 1)]
    assert built.report.total.tokens == sum(row.length for row in built.rows)
    assert built.rows[3] == build_rows(data, byte_tokenizer, sources[1:]).rows[0]


def test_rows_are_the_same_however_they_are_chunked(
    byte_tokenizer: PreTrainedTokenizerBase, write: Write, data_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_config(write([{"prompt": f"{n}:", "completion": f" {n * n}"} for n in range(25)]), "prompt_completion")
    whole = build(data, byte_tokenizer)
    monkeypatch.setattr("smore_cli.data.pipeline.CHUNK", 7)
    assert build(data, byte_tokenizer) == whole


def test_rows_without_a_learned_token_are_refused_by_name(
    byte_tokenizer: PreTrainedTokenizerBase, write: Write, data_config: Config
) -> None:
    path = write([SHORT, LONG, SHORT, *[LONG] * 12])
    error = refused(data_config(path, "prompt_completion", max_length=16), byte_tokenizer)
    rows = "rows 2, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 3 more"
    assert error.message == f"{path}: 13 of 15 rows have no token to learn ({rows})"
    assert "max_length 16" in error.hint and "on_no_supervision: drop" in error.hint


def test_rows_without_a_learned_token_are_dropped_and_counted_if_asked(
    byte_tokenizer: PreTrainedTokenizerBase, write: Write, data_config: Config
) -> None:
    data = data_config(write([SHORT, LONG, SHORT]), "prompt_completion", max_length=16, on_no_supervision="drop")
    built = build(data, byte_tokenizer)
    assert len(built.rows) == built.report.total.rows == 2
    assert built.report.sources[0].dropped == (2,)
    assert built.report.lines()[0].endswith("0 truncated, 1 dropped (row 2: nothing to learn)")


def test_a_source_of_which_nothing_is_left_is_refused_even_when_dropping(
    byte_tokenizer: PreTrainedTokenizerBase, write: Write, data_config: Config
) -> None:
    data = data_config(write([LONG]), "prompt_completion", max_length=16, on_no_supervision="drop")
    error = refused(data, byte_tokenizer)
    assert "1 of 1 rows has no token to learn (row 1)" in error.message
    assert "on_no_supervision" not in error.hint


def test_a_conversation_without_an_assistant_has_nothing_to_learn(
    byte_tokenizer: PreTrainedTokenizerBase, write: Write, data_config: Config
) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert (
        "has no token to learn (row 1)"
        in refused(data_config(write([{"messages": messages}]), "chat"), byte_tokenizer).message
    )


def test_a_row_that_is_cut_but_learns_something_is_counted_as_truncated(
    byte_tokenizer: PreTrainedTokenizerBase, write: Write, data_config: Config
) -> None:
    path = write([SHORT, {"prompt": "Hi", "completion": " there, my dear old friend"}])
    total = build(data_config(path, "prompt_completion", max_length=12), byte_tokenizer).report.total
    assert (total.rows, total.truncated, total.dropped, total.longest) == (2, 1, (), 12)


def test_a_ranked_question_of_which_one_choice_is_cut_off_whole_is_not_learned(
    byte_tokenizer: PreTrainedTokenizerBase, write: Write, data_config: Config
) -> None:
    row = {"question": "one two three four five six", "choices": ["a", "b"], "label": 0}
    data = data_config(write([row]), "multiple_choice", objective="choice_ranking", max_length=8)
    assert "row 1" in refused(data, byte_tokenizer).message


def test_what_a_template_cannot_write_is_named_with_its_row(
    with_template: Any, write: Write, data_config: Config
) -> None:
    good = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    path = write([{"messages": good}, {"messages": [{"role": "system", "content": "Be"}, *good]}])
    error = refused(data_config(path, "chat"), with_template("gemma"))
    assert error.message.startswith(f"{path}, row 2: the chat template refuses these messages")


@pytest.mark.parametrize(
    ("format_name", "fields", "problem"),
    [
        ("chat", {"template": "plain"}, "template: plain has no form for conversations"),
        ("text", {"objective": "choice_ranking"}, "choice_ranking ranks choices, and format text has none"),
        ("multiple_choice", {"objective": "choice_ranking", "loss_on": "all"}, "would learn the question"),
    ],
)
def test_contradictions_are_found_before_any_file_is_read(
    byte_tokenizer: PreTrainedTokenizerBase, data_config: Config, format_name: str, fields: dict[str, Any], problem: str
) -> None:
    assert problem in refused(data_config("not there.jsonl", format_name, **fields), byte_tokenizer).message


@pytest.mark.parametrize(("format_name", "template"), [("chat", "auto"), ("alpaca", "chat")])
def test_a_chat_template_that_is_not_there_is_one_error(
    with_template: Any, data_config: Config, format_name: str, template: str
) -> None:
    tokenizer = with_template("chatml")
    tokenizer.chat_template = None
    error = refused(data_config("not there.jsonl", format_name, template=template), tokenizer)
    assert error.message == "not there.jsonl: the tokenizer has no chat template"


def test_a_slow_tokenizer_is_refused(data_config: Config) -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(ModelError, match="ByT5Tokenizer cannot tell which characters a token covers"):
        build(data_config("x.jsonl", "text"), ByT5Tokenizer())


def rows_of(count: int) -> list[Row]:
    return [Row([number], [[1]], [[True]]) for number in range(count)]


def test_the_split_is_the_same_for_a_seed_and_another_for_another() -> None:
    rows = rows_of(100)
    assert split_eval(rows, 0.1, seed=3) == split_eval(rows, 0.1, seed=3)
    assert split_eval(rows, 0.1, seed=3) != split_eval(rows, 0.1, seed=4)


@pytest.mark.parametrize(("fraction", "held_out"), [(0, 0), (0.001, 1), (0.02, 2), (0.5, 50), (0.98, 98)])
def test_the_split_keeps_every_row_once_and_in_order(fraction: float, held_out: int) -> None:
    rows = rows_of(100)
    train, evaluation = split_eval(rows, fraction, seed=0)
    assert len(evaluation) == held_out
    assert sorted([*train, *evaluation], key=lambda row: row.prompt) == rows
    for part in (train, evaluation):
        assert part == sorted(part, key=lambda row: row.prompt)


def test_a_split_that_leaves_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(DataError, match=r"eval_fraction 0\.5 of 1 rows leaves none"):
        split_eval(rows_of(1), 0.5, seed=0)
