from __future__ import annotations

import json
from pathlib import Path

import pytest

from smore_cli.cli import main

RECIPE = """\
version: 1
model: {{name_or_path: {model}}}
adapter: {{method: mola, target_modules: [q_proj], rank: 2, num_experts: 4, top_k: 2}}
data: {{train: [{{path: {folder}/rows.jsonl, format: prompt_completion}}], eval_fraction: 0.2}}
train: {{max_steps: 4, save_steps: 1, save_total_limit: 1, per_device_batch_size: 2}}
output_dir: {folder}/run
"""
LLAMA_70B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> Path:
    rows = [{"prompt": "a b " * n, "completion": " yes"} for n in range(1, 11)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_llama, folder=tmp_path))
    return path


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    assert stopped.value.code == 0


def test_a_plan_names_everything_and_adds_up(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("plan", recipe, "--json", "--device", "cpu")
    plan = json.loads(capsys.readouterr().out)
    experts, router = 4 * 2 * (32 + 32), 4 * 32
    assert plan["parameters"]["trainable"] == 2 * (experts + router)
    assert plan["parameters"]["active"] == 2 * (experts // 2 + router)
    assert plan["parameters"]["parts"] == {"down": experts, "routers": 2 * router, "up": experts}
    memory = plan["memory"]
    assert sum(memory["components"].values()) == memory["peak"] == max(memory["phases"].values())
    assert set(memory["phases"]) == {"training", "optimiser step", "census", "evaluation"}
    assert memory["peak_by_gradient_checkpointing"]["true"] <= memory["peak_by_gradient_checkpointing"]["false"]
    assert plan["rows"]["train"] == 8 and plan["rows"]["held_out"] == 2 and plan["steps"]["steps"] == 4
    assert plan["heaviest_pass"]["lines"] == 2 and 0 < plan["tokens"]["padding"] < 1
    assert plan["disk"]["adapter"] == 4 * plan["parameters"]["trainable"] and plan["disk"]["checkpoints_kept"] == 2
    assert plan["notes"] == [] and not (tmp_path / "run").exists()


def test_the_tables_fit_a_terminal(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("plan", recipe, "--set", "train.gradient_checkpointing=true")
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("trainable", "activations", "peak", "padding", "checkpoint"))
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 100


def test_a_70b_needs_only_its_config(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "llama-70b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    arguments = ["plan", recipe, "--json", "--device", "cuda", "--set", f"model.name_or_path={folder}"]
    run(*arguments, "--set", "quantization.bits=4")
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"]["backbone"] == 70_553_706_496
    components = plan["memory"]["components"]
    linears = 70_553_706_496 - 2 * 128256 * 8192 - 161 * 8192
    assert components["backbone: quantised weights"] == linears // 2
    assert components["backbone: weights"] >= 2 * (2 * 128256 * 8192 + 161 * 8192)
    assert "no tokenizer" in plan["notes"][0] and plan["rows"] is None
