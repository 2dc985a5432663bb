"""Where the questions of a task come from: a file in the user's folder, the hub, or the package itself.

    multiple choice    {id, question, choices, label}, or the columns of the task's own data set (`rows`)
    generated answer   {id, question, answer}

Files are named for their task: NAME_test.jsonl, NAME_dev.jsonl, NAME_validation.jsonl or NAME.jsonl, as in `shots` also
NAME_train.jsonl; other common names of a task stand in its YAML file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smore_cli.data.formats import MultipleChoice, read_example
from smore_cli.data.messages import Misfit, require_characters
from smore_cli.data.sources import describe_source, read_source
from smore_cli.errors import DataError, UsageError
from smore_cli.evaluation.rows import CONVERTERS
from smore_cli.recipe.schema import Source

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from smore_cli.data.sources import SourceRows

__all__ = ["Questions", "parse_answers", "parse_choices", "read_answers", "read_choices", "read_shots"]

TEST, TRAIN = ("_test", "_dev", "_validation", "_val", ""), ("_train",)
"""How the name of a file of questions goes on, and of one of solved examples; the first that is there is read."""
ENDINGS = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Questions:
    """Questions in the plain form, and the file or hub dataset they are from."""

    rows: list[dict[str, Any]]
    origin: str


def read_choices(config: Mapping[str, Any], data_dir: Path | None) -> Questions:
    """Returns a task's multiple-choice questions, `{id, question, choices, label, family}`.

    Args:
        config: the task's; `metadata` says where the questions are.
        data_dir: folder with the questions as files; None: the task's own source.

    Raises:
        DataError: they are missing, out of reach, or not of the form.
        UsageError: the task brings its own questions and takes no folder.
    """
    source = _source(config, data_dir, TEST)
    return Questions(parse_choices(config, _read(config, source)), describe_source(source))


def parse_choices(config: Mapping[str, Any], rows: SourceRows) -> list[dict[str, Any]]:
    """Returns rows as multiple-choice questions.

    Raises:
        DataError: a row is not of the form.
    """
    places = config["metadata"]
    convert = CONVERTERS.get(places.get("rows", ""), dict)
    questions = []
    for number, row in enumerate(rows, 1):
        try:
            plain = convert(row)
        except Misfit as misfit:
            raise DataError(
                f"{rows.place(number)}: {misfit}", misfit.hint or "mend the row, or take it out"
            ) from misfit
        example = read_example(plain, "multiple_choice", rows, number)
        assert isinstance(example, MultipleChoice)  # it is what the parser of that format returns
        questions.append(
            {
                "id": str(row.get("id", number)),
                "question": example.question,
                "choices": list(example.choices),
                "label": example.label,
                "family": str(row[places["family"]]) if places.get("family") in row else None,
            }
        )
    return questions


def read_answers(config: Mapping[str, Any], data_dir: Path | None) -> Questions:
    """Returns a task's questions with answers to generate, `{id, question, answer, family}`; see `read_choices`."""
    source = _source(config, data_dir, TEST)
    return Questions(parse_answers(_read(config, source)), describe_source(source))


def parse_answers(rows: SourceRows) -> list[dict[str, Any]]:
    """Returns rows as questions with an answer as text.

    Raises:
        DataError: a row has no question, or no answer that is a text or a number.
    """
    questions = []
    for number, row in enumerate(rows, 1):
        for key in ("question", "answer"):
            value = row.get(key)
            if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
                raise DataError(f"{rows.place(number)}: no '{key}'", "wanted {question, answer}, one a line")
        question, answer = (require_characters(str(row[key]), f"'{key}'") for key in ("question", "answer"))
        questions.append({"id": str(row.get("id", number)), "question": question, "answer": answer, "family": None})
    return questions


def read_shots(config: Mapping[str, Any], data_dir: Path | None) -> list[dict[str, Any]] | None:
    """Returns the solved examples that a task's prompts choose from; None where it shows none."""
    if not config.get("num_fewshot"):
        return None
    return parse_answers(_read(config, _source(config, data_dir, TRAIN), TRAIN[0]))


def _read(config: Mapping[str, Any], source: Source, split: str = TEST[0]) -> SourceRows:
    """Returns a source's rows; where it is a hub dataset out of reach, the file that could take its place is named."""
    try:
        return read_source(source)
    except DataError as error:
        if "files" not in config["metadata"] or Path(source.path).is_file():
            raise
        file = f"{config['metadata']['files'][0]}{split}.jsonl"
        hint = f"connect, or give --data-dir a folder with {file}"
        raise DataError(f"benchmark '{config['task']}': {error.message}", hint) from error


def _source(config: Mapping[str, Any], data_dir: Path | None, splits: Sequence[str]) -> Source:
    """Returns where a task's rows are.

    Raises:
        DataError: the folder has no file of the task.
    """
    places = config["metadata"]
    hub = Source(format="multiple_choice", **places["shots" if splits is TRAIN else "source"])
    if data_dir is None:
        return hub
    if "files" not in places:
        raise UsageError(f"benchmark '{config['task']}' brings its own questions", "leave out --data-dir")
    wanted = [f"{name}{split}{ending}" for split in splits for name in places["files"] for ending in ENDINGS]
    present = {path.name.lower().replace("-", "_"): path for path in sorted(data_dir.iterdir())}
    found = next((present[name] for name in wanted if name in present), None)
    if found is None:
        name, others = places["files"][0], ", ".join(splits[1:-1])
        also = f" (or {others}, or plain {name}.jsonl)" if others else ""
        form = (
            "{id, question, answer}" if config["output_type"] == "generate_until" else "{id, question, choices, label}"
        )
        raise DataError(
            f"benchmark '{config['task']}' wants the file {name}{splits[0]}.jsonl{also}, which is not in {data_dir}",
            f"one {form} a line; without --data-dir it is {describe_source(hub)} from the hub",
        )
    return Source(path=str(found), format="multiple_choice")
