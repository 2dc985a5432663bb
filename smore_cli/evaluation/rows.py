"""From the columns of a benchmark's own data set to the plain form {question, choices, label}.

A row may be in the plain form already, as a user's file is, with passage or context written into the question or beside
it. A converter takes either; what it does not know it leaves to the parser of `multiple_choice`, which says what is
wrong and where.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from smore_cli.data.messages import Misfit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["CONVERTERS"]

Row = dict[str, Any]


def boolq(row: Mapping[str, Any]) -> Row:
    """Passage and question become two lines, lm-eval's own wording; choices default to no and yes.

    Where the passage is in the question already, the last line is the question.
    """
    question, choices, label = row.get("question"), row.get("choices", ["no", "yes"]), row.get("label")
    label = row.get("answer") if label is None else label
    if isinstance(label, bool) and isinstance(choices, list):
        label = next((i for i, text in enumerate(choices) if (str(text).lower() in ("yes", "true")) == label), label)
    if not isinstance(question, str):
        return {**row, "choices": choices, "label": label}
    passage = next((row[key] for key in ("passage", "context") if isinstance(row.get(key), str)), None)
    if passage is None or passage in question:
        passage, question = _last_line(re.sub(r"\s*Answer:\s*$", "", question))
    question = re.sub(r"^Question:\s*", "", question.strip())
    text = f"Question: {question.rstrip('?')}?"
    return {**row, "question": f"{passage}\n{text}" if passage else text, "choices": choices, "label": label}


def hellaswag(row: Mapping[str, Any]) -> Row:
    """The activity and the story so far, and four endings, cleaned as lm-eval cleans them."""
    if "endings" not in row:
        return dict(row)
    story = row["ctx_a"] + " " + row["ctx_b"].capitalize()
    question = _clean(f"{row['activity_label']}: {story}")
    return {**row, "question": question, "choices": [_clean(text) for text in row["endings"]], "label": _from(row, 0)}


def openbookqa(row: Mapping[str, Any]) -> Row:
    """The stem of the question."""
    if "question_stem" not in row:
        return dict(row)
    return {**row, "question": row["question_stem"]}


def piqa(row: Mapping[str, Any]) -> Row:
    """A goal and two solutions."""
    if "sol1" not in row:
        return dict(row)
    return {**row, "question": row.get("goal"), "choices": [row["sol1"], row.get("sol2")], "label": _from(row, 0)}


def siqa(row: Mapping[str, Any]) -> Row:
    """Context and question on one line, three answers; the data set counts them from 1."""
    context, question = row.get("context"), row.get("question")
    if isinstance(context, str) and isinstance(question, str) and context not in question:
        question = f"{context} {question}"
    if "answerA" not in row:  # context and question may stand on two lines of one text
        return {**row, "question": " ".join(question.split("\n")) if isinstance(question, str) else question}
    return {
        **row,
        "question": question,
        "choices": [row[f"answer{letter}"] for letter in "ABC"],
        "label": _from(row, 1),
    }


def winogrande(row: Mapping[str, Any]) -> Row:
    """A sentence with a blank, and the two options for it; the data set counts them from 1.

    Raises:
        Misfit: the sentence has no blank, or several.
    """
    plain = dict(row)
    if "option1" in row:
        plain["question"] = row.get("question", row.get("sentence"))
        plain["choices"], plain["label"] = [row["option1"], row.get("option2")], _from(row, 1, "answer")
    elif "sentence" in row and "question" not in row:
        plain["question"] = row["sentence"]
    if isinstance(plain.get("question"), str):
        plain["question"] = re.sub("_+", "_", plain["question"])
        if (blanks := plain["question"].count("_")) != 1:
            raise Misfit(f"the sentence must have one blank '_', it has {blanks}")
    return plain


def mmlu(row: Mapping[str, Any]) -> Row:
    """The answer is an index, called `answer`."""
    return {**row, "label": row.get("label", row.get("answer"))}


def _last_line(text: str) -> tuple[str, str]:
    """Returns what stands before the last line, and the last line."""
    before, _, last = text.strip().rpartition("\n")
    return before.rstrip(), last


def _from(row: Mapping[str, Any], first: int, key: str = "label") -> Any:
    """Returns a label that counts from `first`, perhaps as a text, as an index; anything else as it is."""
    label = row.get(key, row.get("label"))
    return int(label) - first if isinstance(label, int | str) and re.fullmatch(r"\d+", str(label)) else label


def _clean(text: str) -> str:
    """Removes what WikiHow's markup left in HellaSwag, as lm-eval does."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


CONVERTERS: dict[str, Callable[[Mapping[str, Any]], Row]] = {
    function.__name__: function for function in (boolq, hellaswag, mmlu, openbookqa, piqa, siqa, winogrande)
}
"""What a task's `metadata.rows` names."""
