"""How long `smore` takes to answer without doing any work: the help, a sound recipe, a recipe with mistakes.

    python benchmarks/startup.py [--runs 20]

Each command runs in a fresh process, the commands in turn, so that a busy moment of the machine does not fall on one of
them alone. The least wall time and CPU time of each are printed; the project's promise is under 0.5 s.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BROKEN = """\
version: 1
model: {name_or_path: smollm2-135m}
adapter: {method: smore, lora_r: 8}
data: {train: [{path: quickstart, format: chatt}]}
train: {learning_rate: fast}
"""
QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"


def measure(command: list[str], exit_code: int) -> tuple[float, float]:
    """Returns wall and CPU seconds of one run of `smore`, which must end with `exit_code`."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "smore_cli", *command], capture_output=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != exit_code:
        raise SystemExit(f"smore {' '.join(command)} exited with {done.returncode}: {done.stderr.decode()}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder) / "broken.yaml"
        broken.write_text(BROKEN, encoding="utf-8")
        commands = {
            "smore --help": (["--help"], 0),
            "smore recipe validate (sound)": (["recipe", "validate", str(QUICKSTART)], 0),
            "smore recipe validate (broken)": (["recipe", "validate", str(broken)], 2),
            "smore train (broken)": (["train", str(broken)], 2),
        }
        times = {name: [measure(*command)] for name, command in commands.items()}
        for _ in range(runs - 1):
            for name, command in commands.items():
                times[name].append(measure(*command))
    print(f"least of {runs} runs, seconds             wall    CPU")
    for name, measured in times.items():
        print(f"{name:36} {min(wall for wall, _ in measured):6.3f} {min(cpu for _, cpu in measured):6.3f}")


if __name__ == "__main__":
    main()
