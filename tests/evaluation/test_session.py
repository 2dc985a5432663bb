from __future__ import annotations

from typing import Any

import pytest

from smore_cli.evaluation.subjects import training_template
from smore_cli.recipe.schema import DataConfig, Source


@pytest.mark.parametrize(
    ("template", "formats", "expected"),
    [
        ("auto", ["multiple_choice", "chat"], "plain"),
        ("auto", ["chat", "chat"], "chat"),
        ("chat", ["multiple_choice"], "chat"),
        ("plain", ["multiple_choice"], "plain"),
    ],
)
def test_questions_are_asked_the_way_training_wrote_them(template: Any, formats: list[Any], expected: str) -> None:
    sources = [Source(path="x.jsonl", format=form) for form in formats]
    assert training_template(DataConfig(train=sources, template=template)) == expected
