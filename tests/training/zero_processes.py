"""What each of two processes does for tests/training/test_zero.py; started once, as accelerate would start it.

`python -m tests.training.zero_processes FOLDER` runs the recipes in FOLDER under ZeRO 1, 2 and 3, into
FOLDER/NAME-STAGE, and writes what only the processes know to FOLDER/zero-RANK.json.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from smore_cli.training.parallel import Processes
from smore_cli.training.together import one_voice
from tests.training.two_processes import run, stop_and_resume


def configure(folder: Path, stage: int, **settings: Any) -> None:
    """Puts into the environment what `accelerate launch --deepspeed_config_file` puts there."""
    # Nothing is so small that every process keeps it: otherwise stage 3 would share out nothing of a tiny model.
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **settings}
    path = folder / f"deepspeed-{os.environ['RANK']}.json"
    path.write_text(json.dumps({"zero_optimization": zero, "gradient_clipping": "auto"}))
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


def go_on(folder: Path, before: str, name: str, processes: Processes) -> str | None:
    """Goes on from the run that one process alone has started."""
    if processes.main:
        shutil.copytree(folder / before, folder / name)
        shutil.rmtree(folder / name / "checkpoint-4")
        path = folder / name / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": False}))
    processes.from_main(None)
    return run(folder, "plain", name, processes, resume=True)


def main(folder: Path) -> None:
    """Runs everything."""
    with one_voice() as processes:
        found: dict[str, Any] = {}
        for stage in (1, 2, 3):
            configure(folder, stage)
            found[f"plain-{stage}"] = run(folder, "plain", f"plain-{stage}", processes)
            found[f"continued-{stage}"] = go_on(folder, "alone", f"continued-{stage}", processes)
            if stage == 1:
                continue  # 2 keeps optimiser state in the same way
            found[f"noisy-{stage}"] = run(folder, "noisy", f"noisy-{stage}", processes)
            found[f"stopped-{stage}"] = stop_and_resume(folder, "noisy", f"stopped-{stage}", processes)
            found[f"wild-{stage}"] = run(folder, "wild", f"wild-{stage}", processes)
        found["quantised-3"] = run(folder, "quantised", "quantised-3", processes)
        found["half-3"] = run(folder, "half", "half-3", processes)
        configure(folder, 2, offload_optimizer={"device": "cpu"})
        found["offloaded"] = run(folder, "plain", "offloaded", processes)
        found["quantised-2"] = run(folder, "quantised", "quantised-2", processes)
        (folder / f"zero-{processes.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
