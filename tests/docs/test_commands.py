"""Everything the README and the guides show is run, in the order it is shown.

What a fenced block's language means here:

    bash      commands, each must succeed
    console   `$ command`, then lines that must stand in what it prints (`...` stands for any lines)
    yaml      a whole recipe, or sections that replace those of recipes/quickstart.yaml: must load
    jsonl     one JSON value a line
    python    a program that must run
    text      a drawing

A comment before a block adds to that: `<!-- file: NAME -->` writes it to a file that the commands after it use (one
named `broken...` need not load), `<!-- exit: N -->` says which exit code the commands must have, and
`<!-- needs: NAME -->` that they read the shared data under that name (the page is skipped where there is none), and
`<!-- stop: SIGINT -->` that this signal comes after the first checkpoint. Training takes three small steps, no held-out
data, evaluation and inspection four rows (`shortened`). Lines of `make`, `pip` and `git` are
not run here: `.ci/run` is made of the first two.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from smore_cli.comparing.spec import read_comparison
from smore_cli.recipe import load_recipe

PROJECT = Path(__file__).resolve().parents[2]
PAGES = sorted([PROJECT / "README.md", *PROJECT.glob("docs/*.md")])
OUTSIDE = {"make", "pip", "git", "cd"}
# What makes a benchmark a test: every line of it runs, no figure means anything.
TINY = {
    "layer": ["--shapes", "32x32", "--blocks", "64", "--tokens", "16", "--methods", "mola", "smore"],
    "step": ["--model", "tiny-llama", "--methods", "mola", "--batch", "1", "--tokens", "8"],
    "scaling": ["--shape", "32x32", "--tokens", "16", "--longest", "32", "--sweeps", "mola: picks", "smore: fanout"],
    "grouped": ["--shapes", "32x32", "--ranks", "4", "--tokens", "16"],
    "decode": ["--model", "tiny-llama", "--shapes", "32x32", "--methods", "mola", "--new-tokens", "2"],
    "gpu": ["--device", "cpu", "--tiny"],
    "cores": ["--methods", "mola", "trex", "smore", "--width", "32", "--tokens", "16"],
    "attention": ["--documents", "2x5", "2x4+1x3", "--heads", "4", "2", "8", "--lines", "2"],
    "optimiser": ["--model", "tiny-llama", "--methods", "mola", "lora"],
    "end_to_end": ["--model", "tiny-llama", "--methods", "mola", "--limit", "3", "--rows", "2"],
}
BLOCK = re.compile(
    r"(?:^<!-- (?P<note>[^\n]+) -->\n)?^```(?P<language>\S*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the `key: value` of the comment before it."""

    language: str
    text: str
    notes: dict[str, str]


@dataclass(frozen=True)
class Command:
    """A shown command and the lines of output shown below it."""

    line: str
    output: list[str]


def blocks(page: Path) -> list[Block]:
    found = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        notes = dict([match["note"].split(": ", 1)]) if match["note"] else {}
        found.append(Block(match["language"], match["text"], notes))
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a `bash` or `console` block; a backslash at the end of a line joins the next."""
    found: list[Command] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "console" and line.startswith("$ "):
            found.append(Command(line[2:], []))
        elif block.language == "console":
            found[-1].output.append(line)
        elif line.strip() and not line.startswith("#"):
            found.append(Command(line, []))
    return found


def shortened(words: list[str]) -> list[str]:
    """The command as shown, with the flags that keep a test short appended."""
    if words[:2] == ["smore", "train"]:
        steps = ["train.epochs=null", "train.max_steps=3", "train.save_steps=1", "train.per_device_batch_size=2"]
        short = [*steps, "data.eval=null"]
        return [*words, *(word for setting in short for word in ("--set", setting))]
    if words[:2] in (["smore", "eval"], ["smore", "inspect-routing"]):
        return [*words, "--limit", "4"]
    if words[:2] == ["smore", "compare"]:
        short = ["train.max_steps=2", "train.per_device_batch_size=2", "eval.steps=2", "compare.seeds=1"]
        short += ["compare.objectives=[completion]", "compare.limit=4", "compare.dividend_tokens=0"]
        short += ["compare.methods.mola=null"]
        return [*words, *(word for setting in short for word in ("--set", setting))]
    if words[0] == "python":
        return [*words, *TINY[Path(words[1]).stem], "--repeats", "1"]
    return words


def run(argv: list[str], folder: Path, *, expected: int = 0, stop: str | None = None) -> str:
    """What the command prints; with `stop`, the signal is sent when the first checkpoint stands."""
    # Python's own view of the environment: readline, which pytest loads, puts COLUMNS=80 into the inherited one.
    process = subprocess.Popen(
        argv, cwd=folder, env=dict(os.environ), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        while stop and process.poll() is None and not list(folder.glob("runs/*/checkpoint-1/complete.json")):
            time.sleep(0.05)
        if stop:
            process.send_signal(signal.Signals[stop])
        printed, _ = process.communicate(timeout=900)
    finally:
        process.kill()  # does nothing to one that has ended
    assert process.returncode == expected, f"{shlex.join(argv)}\n{printed}"
    return printed


def run_command(command: Command, folder: Path, notes: dict[str, str]) -> None:
    words = shlex.split(command.line, comments=True)
    if words[0] in OUTSIDE:
        return
    assert words[0] == "smore" or words[:1] == ["python"], f"no way to run {command.line!r} in a test"
    expected = 130 if "stop" in notes else int(notes.get("exit", "0"))
    argv = [sys.executable, *(["-m", "smore_cli"] if words[0] == "smore" else []), *shortened(words)[1:]]
    printed = " ".join(run(argv, folder, expected=expected, stop=notes.get("stop")).split())
    shown = [" ".join(line.split()) for line in command.output if line.strip() not in ("", "...")]
    missing = [line for line in shown if line not in printed]
    assert not missing, f"{command.line}: shown but not printed: {missing}\nprinted:\n{printed}"


def sections(text: str) -> dict[str, str]:
    """A recipe's text, split at its top-level keys."""
    parts = re.split(r"^(?=\w+:)", text, flags=re.MULTILINE)
    return {part.split(":", 1)[0]: part for part in parts if re.match(r"\w+:", part)}


def check_recipe(block: Block, folder: Path) -> None:
    path = folder / block.notes.get("file", "shown.yaml")
    shown = sections(block.text)
    base = {} if "version" in shown else sections((PROJECT / "recipes/quickstart.yaml").read_text(encoding="utf-8"))
    path.write_text("".join((base | shown).values()), encoding="utf-8")
    if "compare" in shown:
        read_comparison(path)
    elif "broken" not in path.stem:
        load_recipe(path)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_everything_a_page_shows_works(
    page: Path, tmp_path: Path, smollm2: Path, request: pytest.FixtureRequest
) -> None:
    shutil.copytree(PROJECT / "recipes", tmp_path / "recipes")
    (tmp_path / "benchmarks").symlink_to(PROJECT / "benchmarks")
    (tmp_path / "tiny-llama").symlink_to(request.getfixturevalue("tiny_llama"))  # what benchmarks run on here
    for block in blocks(page):
        if "needs" in block.notes:
            (tmp_path / block.notes["needs"]).symlink_to(request.getfixturevalue("shared_data"))
        if block.language in ("bash", "console"):
            for command in commands(block):
                run_command(command, tmp_path, block.notes)
        elif block.language == "yaml":
            check_recipe(block, tmp_path)
        elif block.language == "jsonl":
            assert all(json.loads(line) for line in block.text.splitlines())
            if "file" in block.notes:
                (tmp_path / block.notes["file"]).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            if "file" in block.notes:
                (tmp_path / block.notes["file"]).write_text(block.text, encoding="utf-8")
            run([sys.executable, "-c", block.text], tmp_path)
        else:
            assert block.language == "text", f"{page.name}: a block in {block.language!r}, which no test runs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert not [target for target in local if not (page.parent / target).exists()]


def test_the_readme_leads_to_every_guide() -> None:
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PROJECT.glob("docs/*.md") if f"(docs/{page.name})" not in readme] == []
