"""GGUF files, run by llama.cpp itself, against transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("xllamacpp", reason="runs the files with llama.cpp (pip install xllamacpp)")

from transformers import AutoTokenizer

from smore_cli.errors import UsageError
from smore_cli.exporting.compare import answers, greedy, judge
from smore_cli.exporting.export import export
from smore_cli.exporting.formats import Options
from smore_cli.exporting.llama_cpp import LlamaCpp
from smore_cli.methods.lora import LoRAConfig
from smore_cli.models.runs import open_run
from tests.exporting.runs import CPU, make_model, make_run

if TYPE_CHECKING:
    from pathlib import Path

LORA = LoRAConfig(rank=4)
PROMPTS = [[5, 9, 300, 77], list(range(100, 140))]


def _verified(type: str) -> Options:
    return Options(type=type, verify=True, device=CPU)


@pytest.mark.parametrize(("type", "within"), [("f32", 1e-4), ("f16", 4e-3), ("bf16", 0.03), ("q8_0", 0.06)])
def test_llama_cpp_answers_as_transformers_within_the_types_error(
    tiny_llama: Path, tmp_path: Path, type: str, within: float
) -> None:
    run = make_run(tmp_path / "run", tiny_llama, LORA)
    verdict = export(run, tmp_path / "out", "gguf", options=_verified(type)).verdict
    assert verdict is not None
    assert verdict.tokens > 20
    assert verdict.mean < within
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"model-{type}.gguf", f"adapter-{type}.gguf", "merge.json", "export.json", "README.md", "manifest.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"tie_word_embeddings": True, "head_dim": 16, "attention_bias": True, "num_key_value_heads": 4}),
        ("mistral", {"sliding_window": 96}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64, "rope_theta": 1e4,
                }
            },
        ),
    ],
)  # fmt: skip
def test_biases_heads_windows_and_scaled_positions_arrive(
    tiny_llama: Path, tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    model = make_model(tmp_path / "model", tiny_llama, family, **settings)
    run = make_run(tmp_path / "run", model, LORA, size=0.2)
    verdict = export(run, tmp_path / "out", "gguf", options=_verified("f32")).verdict
    assert verdict is not None
    assert verdict.mean < 1e-4
    assert verdict.divergence is None


def test_the_adapter_alone_makes_the_backbones_file_answer_as_the_run(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, LORA, size=0.3)
    nothing = make_run(tmp_path / "nothing", tiny_llama, LORA, size=0.0)
    export(run, tmp_path / "out", "gguf", options=Options(type="f32", device=CPU))
    export(nothing, tmp_path / "base", "gguf", options=Options(type="f32", device=CPU))
    ours = answers(greedy(open_run(run).load(CPU)[0]), PROMPTS)
    base = tmp_path / "base/model-f32.gguf"
    with_adapter = judge(
        ours, answers(LlamaCpp(base, tmp_path / "out/adapter-f32.gguf").write, PROMPTS), tolerance=None
    )
    without = judge(ours, answers(LlamaCpp(base).write, PROMPTS), tolerance=None)
    assert with_adapter.mean < 1e-4
    assert without.mean > 0.5


@pytest.mark.parametrize(
    ("family", "settings", "named"),
    [
        ("qwen2", {}, r"'qwen2' model is not written as gguf"),
        ("llama", {"hidden_act": "gelu"}, "activation silu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, "'dynamic'"),
    ],
)
def test_what_the_file_cannot_hold_is_refused_in_one_line(
    tiny_llama: Path, tmp_path: Path, family: str, settings: dict[str, Any], named: str
) -> None:
    model = make_model(tmp_path / "model", tiny_llama, family, **settings)
    run = make_run(tmp_path / "run", model, LORA)
    with pytest.raises(UsageError, match=named) as caught:
        export(run, tmp_path / "out", "gguf", options=Options(device=CPU))
    assert "\n" not in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_real_model_and_its_tokenizer_in_llama_cpp(smollm2: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", smollm2, LoRAConfig(rank=8, target_modules=["q_proj", "down_proj"]), size=0.02)
    verdict = export(run, tmp_path / "out", "gguf", options=_verified("bf16")).verdict
    assert verdict is not None
    assert verdict.mean < 0.05
    model, tokenizer = LlamaCpp(tmp_path / "out/model-bf16.gguf"), AutoTokenizer.from_pretrained(smollm2)
    texts = ["<|im_start|>user\n3 + 14 = 2024?<|im_end|>\n", "  naïve café\t\n\n   it's 1,000 日本語 🙂", "a" * 20]
    assert [model.tokens(text) for text in texts] == [tokenizer(text).input_ids for text in texts]
