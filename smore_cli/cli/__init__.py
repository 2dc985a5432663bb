"""The `smore` command: finds the subcommand, and turns every error into one clear line and an exit code.

Exit codes: 0 ok, 1 failed while running, 2 usage or recipe error (nothing was run), 3 a check ran and said no,
130 interrupted.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from smore_cli import __version__
from smore_cli.errors import RecipeError, SmoreError

__all__ = ["app", "main"]

# These are read once, when the libraries are first imported, so they are set before any command can import them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin against each other: 2 were slower than 1
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork, and it warns about it
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns at import that an optional CPU kernel is not there
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # looking for some reads the metadata of every package installed

_COMMANDS = {
    "plan": "plan:plan_command",
    "train": "train:train_command",
    "eval": "eval:eval_command",
    "merge": "merge:merge_command",
    "export": "export:export_command",
    "import": "import_adapter:import_command",
    "compare": "compare:compare_command",
    "inspect-routing": "inspect_routing:inspect_routing_command",
    "recipe": "recipe:app",
    "data": "data:app",
    "doctor": "doctor:doctor_command",
}
"""Name of a command: module in this package, and the function or the Typer app in it; imported when it is used."""


class _LazyGroup(TyperGroup):
    """A group that imports a command's module when the command is named, and all of them for `--help`."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in _COMMANDS:
            return _load_command(cmd_name)
        # The "did you mean" of an unknown command looks among these.
        self.commands = {name: _load_command(name) for name in _COMMANDS}
        return None


def _load_command(name: str) -> Any:
    module, _, attribute = _COMMANDS[name].partition(":")
    found = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    if not isinstance(found, typer.Typer):
        alone = typer.Typer(add_completion=False)
        alone.command(name)(found)
        found = alone
    command = typer.main.get_command(found)
    command.name = name
    return command


app = typer.Typer(name="smore", cls=_LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"smore {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="SMORE_DEBUG", help="Show the traceback of an error; may stand anywhere.")
    ] = False,
) -> None:
    """Fine-tune language models with mixtures of low-rank experts."""
    os.environ["SMORE_DEBUG"] = "1" if debug else "0"  # processes started from here follow it


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs `smore` and exits.

    Args:
        args: the command line after `smore`; by default the process's own.
    """
    given = list(sys.argv[1:] if args is None else args)
    if "--debug" in given:  # an option of the whole program, which people add at the end of the line that failed
        given = ["--debug", *(argument for argument in given if argument != "--debug")]
    try:
        try:
            typer.main.get_command(app).main(given, prog_name="smore")
        finally:
            sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's last breath
    except SmoreError as error:
        _show_traceback()
        _explain(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has no reader
        sys.exit(1)
    except Exception as error:
        if not _show_traceback():
            summary = " ".join(str(error).split())
            _say("internal error", f"{type(error).__name__}: {summary}" if summary else type(error).__name__)
            _say("hint", "run again with --debug for the traceback")
        sys.exit(1)
    sys.exit(0)


def _explain(error: SmoreError) -> None:
    if isinstance(error, RecipeError):
        # Each problem begins with file:line:column, the form editors and terminals make a link of.
        typer.echo(error.message, err=True)
        count = len(error.problems)
        _say("error", f"{count} problem{'s' if count > 1 else ''} in the recipe; nothing was run")
    else:
        _say("error", error.message)
    if error.hint:
        _say("hint", error.hint)


def _say(label: str, text: str) -> None:
    color = False if os.environ.get("NO_COLOR") else None  # None: colours on a terminal only
    styled = typer.style(f"{label}:", fg=typer.colors.CYAN if label == "hint" else typer.colors.RED, bold=True)
    typer.echo(f"{styled} {text}", err=True, color=color)


def _show_traceback() -> bool:
    """Prints the traceback of the error at hand if it is wanted; returns whether it was."""
    wanted = os.environ.get("SMORE_DEBUG") == "1"
    if wanted:
        traceback.print_exc()
    return wanted
