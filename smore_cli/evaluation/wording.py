"""Other wordings of a multiple-choice task: scored by the letter of a listed choice, or by the choice's text.

    letters   Question: Which is hot?     text   Question: Which is hot?
              A. ice                             Answer: fire
              B. fire
              Answer: B

Letters are the protocol of the papers (MoE-PEFT, T-REX, OpenCompass); text tells more of a small model, which knows an
answer long before it can name its letter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["as_letters", "as_text"]

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# A question that brings its own "Question:", after a passage, gets no second one.
_QUESTION = "{{ '' if 'Question: ' in question else 'Question: ' }}{{ question.strip() }}\n"
_ACC: dict[str, Any] = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}


def as_letters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a task's config with its choices listed and their letters scored: lm-eval's for CommonsenseQA."""
    listed = "{% for choice in choices %}{{ '" + _LETTERS + "'[loop.index0] }}. {{ choice }}\n{% endfor %}"
    return {
        **config,
        "task": f"{config['task']}:letters",
        "doc_to_text": f"{_QUESTION}{listed}Answer:",
        "doc_to_choice": "{{ ('" + _LETTERS + "' | list)[:choices | length] }}",
        "doc_to_target": "label",
        "metric_list": [_ACC],
    }


def as_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a task's config with the text of each choice as its answer, ARC's wording, acc and acc_norm.

    A task that does so by itself keeps its own wording.
    """
    named = {**config, "task": f"{config['task']}:text"}
    if config["doc_to_choice"] == "choices":
        return named
    return {
        **{key: value for key, value in named.items() if key != "description"},
        "doc_to_text": f"{_QUESTION}Answer:",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [_ACC, {**_ACC, "metric": "acc_norm"}],
    }
