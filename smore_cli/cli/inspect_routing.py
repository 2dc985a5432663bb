"""`smore inspect-routing`."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from smore_cli.routing.session import RoutingProfile

__all__ = ["inspect_routing_command"]


def inspect_routing_command(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="A run's folder, or an adapter's; default: the newest run under runs/."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="FILE_OR_NAME",
            help="Look at this; may be repeated; default: the run's held-out or training rows.",
        ),
    ] = None,
    format_name: Annotated[
        str | None, typer.Option("--format", metavar="F", help="How to read --data; default: as the run's own data.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", metavar="S", help="Split of --data; default: train.")] = None,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, help="At most N rows, evenly spaced over the data.")
    ] = 128,
    tokens: Annotated[
        Literal["all", "supervised"],
        typer.Option("--tokens", help="Count every token, or the places that predict one that is learned or scored."),
    ] = "all",
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", metavar="N", min=1, help="Rows a forward pass; changes only the speed."),
    ] = None,
    level: Annotated[
        int | None, typer.Option("--level", metavar="N", min=0, help="Only this tree level; 0 is the leaves.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="A-B", help="Only these layers, as in 0-5,29.")
    ] = None,
    detail: Annotated[
        str | None,
        typer.Option("--detail", metavar="PATH", help="All numbers of one linear map, by path or as in 3.q."),
    ] = None,
    causal: Annotated[
        bool,
        typer.Option("--causal", help="Also what each expert is worth: the loss without it, and with nothing but it."),
    ] = False,
    dividend: Annotated[
        bool,
        typer.Option(
            "--dividend", help="Also what routing earned over the best static update; by layer where --layers is given."
        ),
    ] = False,
    similarity: Annotated[
        bool, typer.Option("--similarity", help="Also how alike the experts' update matrices are.")
    ] = False,
    drift: Annotated[
        bool, typer.Option("--drift", help="Also the same rows through the run's checkpoints, the earliest first.")
    ] = False,
    compare: Annotated[
        Path | None, typer.Option("--compare", metavar="RUN2", help="Also the same rows through this run.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Also which experts each token of this text takes.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Also one self-contained page, for a browser."),
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Also a picture: layers by experts.")
    ] = None,
    parquet: Annotated[
        Path | None, typer.Option("--parquet", metavar="FILE", help="Also a table: a line an expert of each router.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show which experts the tokens of some data use: per layer, projection and tree level."""
    from smore_cli.errors import UsageError
    from smore_cli.routing.layout import parse_layers

    if not data and (format_name or split):
        raise UsageError("--format and --split are about --data, which is not given", "name a file with --data")
    if detail is not None and layers is not None:
        raise UsageError("--detail names one linear map, --layers several", "give one of the two")
    for option, file in (("--html", html), ("--png", png)):
        if file is not None and file.is_dir():
            raise UsageError(f"{option}: {file} is a folder", "name a file in it")
    wanted_layers = parse_layers(layers) if layers is not None else None

    from smore_cli.routing.session import Choice, DataRequest, Extra, inspect_run
    from smore_cli.routing.worth import WorthRequest

    profile = inspect_run(
        run,
        DataRequest(tuple(data or ()), format_name, split, limit, tokens == "supervised"),
        Choice(level, wanted_layers, detail),
        batch_size=batch_size,
        worth=WorthRequest(causal, dividend, frozenset(wanted_layers or ())),
        prompt=prompt,
        extra=Extra(similarity or detail is not None, drift, compare),
        say=_say,
        progress=_progress,
    )
    document = profile.document()
    if html is not None:
        from smore_cli.routing.html import render_page

        _write(html, render_page(document).encode())
    if png is not None:
        from smore_cli.routing.png import draw_png

        _write(png, draw_png(profile))
    if parquet is not None:
        from smore_cli.routing.table import parquet_bytes

        _write(parquet, parquet_bytes(document))
    if as_json:
        typer.echo(json.dumps(document, indent=1, allow_nan=False))
    else:
        _print(profile, in_full=detail is not None)


def _print(profile: RoutingProfile, *, in_full: bool) -> None:
    """Prints a profile for people, or its one linear map in full."""
    from smore_cli.cli.console import out
    from smore_cli.routing import facts_view, view
    from smore_cli.routing.statistics import levels_of

    def line(text: str, style: str = "") -> None:
        out.print(text, style=style, markup=False)

    line(f"{profile.run}: {profile.method} on {profile.backbone}", "bold")
    line(f"data: {profile.inputs.line()}")
    levels = levels_of(profile.routers)
    for level in levels:
        members = [router for router in profile.routers if router.level == level]
        line(f"\nlevel {view.level_name(level, levels)}{f' of {members[0].module}' if in_full else ''}", "bold")
        if in_full:
            line(view.detail_line(members[0]))
            out.print(view.detail(members[0]))
            continue
        for table in view.heat_tables(members, out.width):
            out.print(table)
    if not in_full:
        line("")
        for text in view.LEGEND:
            line(text, "dim")
        line("")
        out.print(view.summary_table(profile.routers))
        for text in view.dead_lines(profile.routers):
            line(text, "red")
        line("")
        out.print(facts_view.information_table(profile))
    else:
        for facts in profile.facts.values():
            for text in facts_view.detail_lines(facts):
                line(text)
            for table in facts_view.detail_tables(facts):
                line("")
                out.print(table)
    if profile.beside:
        line("")
        out.print(facts_view.beside_table(profile))
    _print_worth(profile, in_full=in_full)
    _print_trace(profile, in_full=in_full)


def _print_worth(profile: RoutingProfile, *, in_full: bool) -> None:
    """Prints what experts and routing are worth, where that was measured."""
    from smore_cli.cli.console import out
    from smore_cli.routing import worth_view as view

    def line(text: str, style: str = "") -> None:
        out.print(text, style=style, markup=False)

    if (causal := profile.worth.causal) is not None:
        line(f"\n{view.causal_line(causal)}", "bold")
        for name, table in view.causal_tables(causal, in_full=in_full):
            line(f"level {name}")
            out.print(table)
        if not in_full:
            line(view.CAUSAL_LEGEND, "dim")
    if (dividend := profile.worth.dividend) is not None:
        line("\nWhat routing earned", "bold")
        for text in view.dividend_lines(dividend, profile.worth.fitted_to):
            line(text)
        if dividend.layers:
            out.print(view.dividend_table(dividend))


def _print_trace(profile: RoutingProfile, *, in_full: bool) -> None:
    """Prints what the routers do with each token of the text that was given."""
    from smore_cli.cli.console import out
    from smore_cli.routing import trace_view as view
    from smore_cli.routing.view import level_name

    if (trace := profile.trace) is None:
        return
    out.print(f"\n{view.trace_line(trace)}", style="bold", markup=False)
    levels = sorted({router.level for router in trace.routers}, reverse=True)
    for level in levels:
        out.print(f"level {level_name(level, levels)}", markup=False)
        members = [router for router in trace.routers if router.level == level]
        tables = [view.trace_detail(trace, members[0])] if in_full else view.trace_tables(trace, members, out.width)
        for table in tables:
            out.print(table)
    if not in_full:
        out.print(view.TRACE_LEGEND, style="dim", markup=False)


def _write(file: Path, content: bytes) -> None:
    """Writes a file whole or not at all, and says so."""
    from smore_cli.atomic import write_bytes, writing

    with writing(file):
        write_bytes(file, content)
    _say(f"wrote {file} ({len(content) / 1e3:,.0f} kB)")


def _say(line: str) -> None:
    from smore_cli.cli.console import err

    err.print(line, markup=False, soft_wrap=True)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how much of a piece of work is done: a bar on a terminal, one plain line elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from smore_cli.cli.console import err

    if not err.is_terminal:
        _say(f"{what} ...")
        yield lambda done, total: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
