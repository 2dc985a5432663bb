"""`smore eval`."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["eval_command"]


def eval_command(
    benchmark: Annotated[
        str,
        typer.Option("--benchmark", metavar="NAME", help="quickstart, arc_easy, arc_challenge, or arc for both."),
    ],
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="A run's folder; default: the newest under runs/.")
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Evaluate the backbone beside the run, with its adapter switched off.")
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
        int | None,
        typer.Option("--batch-size", metavar="N", min=1, help="Questions a forward pass; default 8 on a CPU, else 32."),
    ] = None,
    full_precision: Annotated[
        bool,
        typer.Option("--full-precision", help="Unquantised weights under a run of 4 or 8 bits; says what it changes."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    output: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the JSON here too, with every question.")
    ] = None,
) -> None:
    """Measure a run on a benchmark; what was found is also kept in the run, as eval/NAME.json."""
    from smore_cli.cli.console import err, out
    from smore_cli.errors import UsageError
    from smore_cli.evaluation.benchmarks import read_tasks

    if run is not None and model is not None:
        raise UsageError("both a run and --model were given", "--model evaluates a backbone without any run")
    if output is not None and output.is_dir():
        raise UsageError(f"--out: {output} is a folder", "name a file")
    tasks = read_tasks(benchmark, data_dir)  # before the model is loaded, so that a mistake shows at once

    from smore_cli.evaluation.report import LEGEND, table
    from smore_cli.evaluation.session import load_subject, measure

    if full_precision:
        from smore_cli.merging.precision import precision_gap
        from smore_cli.models.runs import open_run

        if model is not None:
            raise UsageError("--full-precision is for a run, and --model has none", "leave it out")
        err.print(precision_gap(open_run(run)).line(), markup=False, highlight=False, soft_wrap=True)
    subject = load_subject(run, model, full_precision=full_precision)
    found = measure(subject, benchmark, tasks, with_base=base, limit=limit, batch_size=batch_size, progress=_progress)
    if as_json:
        typer.echo(json.dumps(found.document(samples=False), indent=2))
    else:
        out.print(table("backbone" if subject.run is None else "run", found.results, found.base))
        out.print(LEGEND, markup=False, soft_wrap=True)
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in found.seconds.items())
        questions = sum(result.n for result in found.results)
        out.print(f"time: {parts} ({questions} questions)", markup=False, soft_wrap=True)
    for path in found.write(output):
        err.print(f"written to {path}", markup=False, soft_wrap=True)


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how many choices are scored: a bar on a terminal, one plain line elsewhere."""
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
        err.print(f"  {done} of {total} choices", markup=False)
