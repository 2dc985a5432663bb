"""Kills trainings: `python crash.py RECIPE FOLDER KILLS SEED` prints what came of it as JSON (see test_crash.py).

One process that has everything imported and has run nothing forks a child for each part of a run. A child is killed by
SIGKILL: half of them from outside after a random time, half by themselves at a random event (a file opened, flushed,
renamed, removed, a folder made) inside a checkpoint that is being written or pruned. After each kill the newest
complete checkpoint is found here, by its hashes, and must be the one that the next child goes on from.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - children find it imported

from smore_cli.recipe import read_recipe
from smore_cli.training import loop

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "shutil.rmtree", "os.rmdir"}
KILLS_A_RUN = 13


def start(recipe: Path, run: Path, log: Path, die_at_event: int | None) -> int:
    """Forks a child that trains, or goes on where there is a run; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    code = 1
    try:
        if die_at_event is not None:
            die_inside_a_checkpoint(die_at_event)
        loaded, document = read_recipe(recipe, [f"output_dir={run}"])
        resume = (run / "run.json").exists()
        loop.train(loaded, recipe.read_text(), resume=resume, document=document)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def die_inside_a_checkpoint(event: int) -> None:
    """Makes this process kill itself at the n-th thing it does to a checkpoint's files."""
    seen, fsync, replace = 0, os.fsync, os.replace

    def count(path: str) -> None:
        nonlocal seen
        if "checkpoint-" in path and "/run-" in path:
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(name: str, args: tuple[Any, ...]) -> None:
        if name in EVENTS:
            count(os.fspath(args[0]) if isinstance(args[0], str | os.PathLike) else "")

    def flush(descriptor: int) -> None:
        count(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def rename(source: Any, target: Any) -> None:
        replace(source, target)
        count(os.fspath(target))  # the moment after it, too

    sys.addaudithook(audit)
    os.fsync, os.replace = flush, rename


def newest_complete(run: Path) -> int | None:
    """The step of the newest checkpoint whose files are all what its marker says; not the project's own code."""
    steps = []
    for marker in run.glob("checkpoint-*/complete.json"):
        hashes = json.loads(marker.read_text())
        files = {name: marker.parent / name for name in hashes}
        if all(p.is_file() and hashlib.sha256(p.read_bytes()).hexdigest() == hashes[n] for n, p in files.items()):
            steps.append(int(marker.parent.name.partition("-")[2]))
    return max(steps, default=None)


def require_resumed_from(step: int | None, log: str) -> None:
    """Checks that a child went on from that step, if it came as far as saying so."""
    found = re.search(r"resuming from \S+ at step (\d+)", log)
    if found is not None and int(found[1]) != step:
        stop(f"went on from step {found[1]}, the newest complete checkpoint is of {step}\n{log}")
    if found is None and "no complete checkpoint" in log and step is not None:
        stop(f"started anew, the newest complete checkpoint is of {step}\n{log}")


def stop(problem: str) -> NoReturn:
    raise SystemExit(problem)


def finished(run: Path) -> bool:
    path = run / "run.json"
    return path.exists() and bool(json.loads(path.read_text())["finished"])


def outcome(run: Path) -> list[Any]:
    """The adapter's hash, and every number in the metrics that is no time and no count of what this part routed."""
    times = ("seconds", "tokens_per_second", "routing")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key not in times} for line in lines]
    return [hashlib.sha256((run / "adapter_model.safetensors").read_bytes()).hexdigest(), metrics]


def main(recipe: Path, folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    dice, log = random.Random(seed), folder / "log.txt"
    whole, began = folder / "run-whole", time.monotonic()
    _, status = os.waitpid(start(recipe, whole, log, None), 0)
    if status:
        stop(f"the undisturbed run failed\n{log.read_text()}")
    length, expected = time.monotonic() - began, outcome(whole)
    counts = {"inside": 0, "anywhere": 0, "runs": 0, "resumed": 0}
    while counts["inside"] + counts["anywhere"] < kills:
        run, here = folder / f"run-{counts['runs']}", 0
        while not finished(run):
            inside, most = (counts["inside"] + counts["anywhere"]) % 2 == 0, here >= KILLS_A_RUN
            before = newest_complete(run)
            counts["resumed"] += before is not None
            pid = start(recipe, run, log, dice.randrange(1, 120) if inside and not most else None)
            if not inside and not most:
                time.sleep(dice.uniform(0.05, 0.5) * length)
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            require_resumed_from(before, log.read_text())
            if os.WIFSIGNALED(status):
                counts["inside" if inside else "anywhere"] += 1
                here += 1
            elif status:
                stop(f"a run that went on from step {before} failed\n{log.read_text()}")
        counts["runs"] += 1
        if outcome(run) != expected:
            stop(f"{run} did not end where the undisturbed run ended, after {here} kills")
        if leftover := [path.name for path in run.iterdir() if path.name.startswith(".")]:
            stop(f"{run} is littered with {leftover}")
    print(json.dumps(counts | {"cpu_seconds": round(sum(os.times()[:4]), 1)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
