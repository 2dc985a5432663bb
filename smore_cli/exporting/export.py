"""`smore export`: a run in the format of another program, which is asked the same prompts before it is kept."""

from __future__ import annotations

import gc
import importlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smore_cli import __version__
from smore_cli.errors import CheckFailed, UsageError
from smore_cli.exporting.card import export_card
from smore_cli.exporting.compare import Verdict, answers, judge
from smore_cli.exporting.folder import new_folder
from smore_cli.exporting.formats import Options, Written
from smore_cli.merging.text import comparison_text
from smore_cli.merging.writing import write_manifest
from smore_cli.models.load import load_tokenizer
from smore_cli.models.runs import open_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from smore_cli.models.runs import Run

__all__ = ["FORMATS", "Exported", "export"]

FORMATS = {
    "peft": "merged:write_peft",
    "hf": "merged:write_hf",
    "hf-code": "hf_code:write_hf_code",
    "hf-moe": "hf_moe:write_hf_moe",
    "gguf": "gguf_export:write_gguf",
}
"""Name of a format: module in this package, and the function in it that writes one."""
_ONLY = {"rank": ("peft",), "type": ("gguf",), "calibration": ("peft", "hf", "gguf")}
"""Formats that read an option."""
PROMPTS, PROMPT_TOKENS = 6, 64
"""How many prompts --verify continues, and their length at most."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        out: the folder.
        run: where the adapter came from.
        format: its name.
        written: by the format.
        verdict: of --verify; None: it was not asked for.
        shown: the verdict for people.
    """

    out: Path
    run: Path
    format: str
    written: Written
    verdict: Verdict | None
    shown: list[str]

    def document(self) -> dict[str, Any]:
        """Returns what export.json holds."""
        return {
            "format": self.format,
            "out": str(self.out),
            "run": str(self.run),
            "smore_version": __version__,
            "what": self.written.what,
            "consumer": self.written.consumer,
            "verdict": None if self.verdict is None else asdict(self.verdict) | {"passed": self.verdict.passed},
            **self.written.facts,
        }


def export(
    path: Path, out: Path, to: str, *, options: Options | None = None, tolerance: float | None = None
) -> Exported:
    """Exports a run.

    Args:
        path: a run, a checkpoint or an adapter folder.
        out: must not exist.
        to: the format, one of `FORMATS`.
        options: what else was asked for.
        tolerance: mean difference of log-probabilities, in nats, that is allowed; default: the format's.

    Raises:
        UsageError: the format cannot hold this adapter, or `out` exists; nothing was written.
        CheckFailed: the answers differ by more than the tolerance; nothing is left of the export.
    """
    options = options or Options()
    _require_options(to, options, tolerance)
    run = open_run(path)
    with new_folder(out) as folder:
        written = _writer(to)(run, folder, options)
        verdict, shown = _verified(run, written, tolerance) if options.verify else (None, [])
        if written.scratch is not None:
            shutil.rmtree(written.scratch)
        exported = Exported(out, run.folder, to, written, verdict, shown)
        text = json.dumps(exported.document(), indent=1, sort_keys=True, default=str) + "\n"
        (folder / "export.json").write_text(text, encoding="utf-8")
        export_card(folder, run, exported.format, written, shown)
        write_manifest(folder)
    return exported


def _writer(to: str) -> Callable[[Run, Path, Options], Written]:
    module, _, name = FORMATS[to].partition(":")
    found: Callable[[Run, Path, Options], Written] = getattr(
        importlib.import_module(f"smore_cli.exporting.{module}"), name
    )
    return found


def _require_options(to: str, options: Options, tolerance: float | None) -> None:
    """Refuses what this format would not read."""
    if to not in FORMATS:
        raise UsageError(f"--to {to} is no format", f"there are: {', '.join(FORMATS)}")
    for name, owners in _ONLY.items():
        if getattr(options, name) is not None and to not in owners:
            raise UsageError(f"--{name} is for --to {' and '.join(owners)}, and this is --to {to}", "leave it out")
    if tolerance is not None and not options.verify:
        raise UsageError("--tolerance is what --verify allows", "add --verify")


def _verified(run: Run, written: Written, tolerance: float | None) -> tuple[Verdict, list[str]]:
    """Asks both the same prompts, one after the other: two models need not be in memory at once.

    Returns:
        The verdict, and the verdict for people.

    Raises:
        CheckFailed: the answers differ by more than is allowed.
    """
    tokenizer = load_tokenizer(run.model)
    prompts = [ids[:PROMPT_TOKENS] for ids in comparison_text(run.recipe, tokenizer).texts[:PROMPTS]]
    ours = answers(written.ours(), prompts)
    gc.collect()
    theirs = answers(written.theirs(prompts), prompts)
    verdict = judge(ours, theirs, tolerance=written.tolerance if tolerance is None else tolerance)
    shown = verdict.lines(lambda token: str(tokenizer.decode([token])))
    if not verdict.passed:
        raise CheckFailed(
            f"{written.consumer} answers otherwise: {'; '.join(shown)}",
            "nothing was kept; give a larger --tolerance if that is good enough",
        )
    return verdict, shown
