"""`smore eval`."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from smore_cli.evaluation.outcome import Evaluation

__all__ = ["eval_command"]


def eval_command(
    benchmark: Annotated[
        list[str],
        typer.Option(
            "--benchmark",
            metavar="NAME",
            help="arc, boolq, commonsense, gsm8k, ... (also NAME:letters, NAME:text), a file of your own questions, or "
            "any task name of lm-eval; repeat it, or separate names by commas.",
        ),
    ],
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN]...", help="Runs' folders, on one backbone; default: the newest under runs/."),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Evaluate the backbone beside the runs, with their adapters switched off.")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Evaluate this backbone alone, without a run.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", metavar="DIR", help="Read questions from files here, not the hub."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N questions of each task.")
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option("--batch-size", metavar="N|auto", help="Questions a forward pass; auto: by length and device."),
    ] = "auto",
    full_precision: Annotated[
        bool,
        typer.Option("--full-precision", help="Unquantised weights under a run of 4 or 8 bits; says what it changes."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    output: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the JSON here too, with every question.")
    ] = None,
) -> None:
    """Measure runs on benchmarks; what was found is also kept in each run, as eval/NAME.json.

    An evaluation that was killed goes on where it was when the same command is given again.
    """
    from smore_cli.errors import UsageError
    from smore_cli.evaluation.benchmarks import read_tasks

    if runs and model is not None:
        raise UsageError("both a run and --model were given", "--model evaluates a backbone without any run")
    if full_precision and model is not None:
        raise UsageError("--full-precision is for a run, and --model has none", "leave it out")
    if output is not None and output.is_dir():
        raise UsageError(f"--out: {output} is a folder", "name a file")
    size = _batch_size(batch_size)
    names = [name for each in benchmark for name in each.split(",") if name]
    # Before the model is loaded, so that a mistake shows at once.
    tasks = {task.name: task for name in names for task in read_tasks(name, data_dir)}

    from smore_cli.evaluation.outcome import label_of, open_journal, together, write_evaluations
    from smore_cli.evaluation.session import measure
    from smore_cli.evaluation.subjects import load_subject, load_subjects

    if full_precision:
        _say_precision(runs or [None])
    label = label_of(names)
    subjects = [load_subject(None, model)] if model else load_subjects(runs or [None], full_precision=full_precision)
    journal = open_journal(subjects, label, output)
    if len(journal):
        _say(f"going on with an evaluation that was stopped: {len(journal)} passes are known from {journal.path}")
    found = measure(
        subjects,
        label,
        list(tasks.values()),
        with_base=base,
        limit=limit,
        batch_size=size,
        progress=_progress,
        journal=journal,
    )
    if as_json:
        documents = [each.document(samples=False) | {"seconds": each.rounded_seconds()} for each in found]
        typer.echo(json.dumps(together(documents), indent=2))
    else:
        _print_table(found)
    for path in write_evaluations(found, output):
        _say(f"written to {path}")
    journal.close()


def _batch_size(text: str) -> int | None:
    """Returns the number of questions a forward pass; None for auto.

    Raises:
        UsageError: it is neither.
    """
    from smore_cli.errors import UsageError

    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UsageError(f"--batch-size: '{text}' is neither auto nor a number from 1", "leave it out for auto")
    return int(text)


def _say(line: str) -> None:
    from smore_cli.cli.console import err

    err.print(line, markup=False, highlight=False, soft_wrap=True)


def _say_precision(runs: Sequence[Path | None]) -> None:
    """Says what unquantised weights change under each run."""
    from smore_cli.merging.precision import precision_gap
    from smore_cli.models.runs import open_run

    for run in runs:
        _say(precision_gap(open_run(run)).line())


def _print_table(found: Sequence[Evaluation]) -> None:
    """Prints one evaluation with its interval or difference, several side by side."""
    from smore_cli.cli.console import out
    from smore_cli.evaluation.report import LEGEND, comparison, table

    first = found[0]
    if len(found) == 1:
        out.print(table("backbone" if first.subject.run is None else "run", first.results, first.base))
    else:
        names = [str(each.subject.run) for each in found]
        short = [Path(name).name for name in names]
        names = short if len(set(short)) == len(short) else names
        out.print(comparison(names, [each.results for each in found], first.base))
    out.print(LEGEND, markup=False, soft_wrap=True)
    parts = ", ".join(f"{part} {seconds:.1f} s" for each in found for part, seconds in each.seconds.items() if seconds)
    questions = sum(result.n for result in first.results)
    out.print(f"time: {parts} ({questions} questions)", markup=False, soft_wrap=True)


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how many choices (or answers) are done: a bar on a terminal, one plain line elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from smore_cli.cli.console import err

    text = f"scoring the {label}"
    if not err.is_terminal:
        err.print(f"{text} ...", markup=False)
        yield _Lines()
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Prints how far the scoring is as plain lines, one every half minute."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.last < 30:
            return
        from smore_cli.cli.console import err

        self.last = time.monotonic()
        err.print(f"  {done} of {total}", markup=False)
