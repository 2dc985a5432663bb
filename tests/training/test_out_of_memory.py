"""A process whose memory is limited runs out of it for real, and says what would have helped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LIMITED = """\
import resource, sys
import smore_cli.training.loop, smore_cli.planning.smaller, torch._dynamo, torch._subclasses.fake_tensor
from smore_cli.cli import main
room = int(sys.argv.pop(1)) << 20
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room,) * 2)
main()
"""
RECIPE = """\
version: 1
model: {{name_or_path: {model}}}
adapter: {{method: lora, target_modules: [q_proj], rank: 2}}
data: {{train: [{{path: {folder}/rows.jsonl, format: prompt_completion}}], max_length: 500}}
train: {{max_steps: 3, per_device_batch_size: 4, global_batch_size: 512, save_steps: 1, gradient_census: false}}
output_dir: {folder}/run
"""

ROOM = "700"
"""MiB: less than half of what the step needs, and enough to plan a smaller one in."""


@pytest.mark.slow  # a process of its own that runs full, then plans several smaller runs
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_running_out_of_memory_is_explained(tiny_llama: Path, tmp_path: Path) -> None:
    row = json.dumps({"prompt": "a quick brown fox " * 60, "completion": "jumps"})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 512)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_llama, folder=tmp_path))
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    sizes = ["--set", "train.per_device_batch_size=512"]
    command = [sys.executable, str(script), ROOM, "train", str(tmp_path / "recipe.yaml"), *sizes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    said = ended.stderr
    assert ended.returncode == 1, said
    assert re.search(r"error: out of memory in training, step 1, pass 1 of 1: 512 rows x \d+ tokens", said)
    assert "training row" in said and "activations" in said, said
    suggested = re.findall(r"^  (--set .*?)   peak", said, re.MULTILINE)
    assert len(suggested) == 3 and "train.per_device_batch_size" in suggested[0]
    assert f"smore train {tmp_path}/recipe.yaml {' '.join(sizes)} --resume {suggested[0]}" in said
    assert "from the first step, as there is no checkpoint yet" in said
