"""A user's own questions: a file with choices is multiple choice, one with answers is answered and compared.

{id, question, choices, label}    Question: ... Answer:, acc and acc_norm as for ARC
{id, question, answer}            the same prompt; one line is generated greedily and must be the answer exactly
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smore_cli.data.files import READERS, data_kind
from smore_cli.data.sources import read_source
from smore_cli.errors import DataError
from smore_cli.evaluation.questions import parse_answers, parse_choices
from smore_cli.recipe.schema import Source

__all__ = ["is_own_file", "read_own_file"]

_PROMPT = "Question: {{question}}\nAnswer:"
_MEAN: dict[str, Any] = {"aggregation": "mean", "higher_is_better": True}


def is_own_file(name: str) -> bool:
    """Whether a benchmark's name is that of a file: it ends like a data file."""
    return data_kind(Path(name)) in READERS


def read_own_file(path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns lm-eval's config of the file's task, named for the file, and its questions.

    Raises:
        DataError: there is no such file, or its rows are of neither form.
    """
    if not Path(path).expanduser().is_file():
        raise DataError(f"there is no file {path} to evaluate on", "wanted {question, choices, label}, one a line")
    rows = read_source(Source(path=path, format="multiple_choice"))
    first = next(iter(rows))
    name = Path(path).name.partition(".")[0]
    if "choices" not in first and "answer" in first:
        return _exact_match(name), parse_answers(rows)
    config = _multiple_choice(name)
    return config, parse_choices(config, rows)


def _multiple_choice(name: str) -> dict[str, Any]:
    return {
        "task": name,
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": _PROMPT,
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", **_MEAN}, {"metric": "acc_norm", **_MEAN}],
        "metadata": {"version": 1.0, "family": "family"},
    }


def _exact_match(name: str) -> dict[str, Any]:
    stripped = {"function": "regex", "regex_pattern": r"(?s)^\s*(.*?)\s*$"}
    return {
        "task": name,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": _PROMPT,
        "doc_to_target": "{{answer.strip()}}",
        "num_fewshot": 0,
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match", **_MEAN}],
        "filter_list": [{"name": "none", "filter": [stripped, {"function": "take_first"}]}],
        "metadata": {"version": 1.0},
    }
