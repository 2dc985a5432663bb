"""MixLoRA as a stock mixture of experts: the same logits in plain transformers, or a reason."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smore_cli.errors import CheckFailed, UsageError
from smore_cli.exporting.export import export
from smore_cli.exporting.formats import Options
from smore_cli.methods.mixlora import MixLoRAConfig
from smore_cli.methods.mola import MoLAConfig
from smore_cli.models.runs import open_run
from tests.exporting.runs import CPU, make_model, make_run

if TYPE_CHECKING:
    from pathlib import Path

    from smore_cli.methods import MethodConfig

ON_CPU, VERIFIED = Options(device=CPU), Options(device=CPU, verify=True)
EVERYWHERE = MixLoRAConfig(num_experts=3, rank=2)
TEXT = "Question: what is ice?\nAnswer: water, and steam where it is hot. Date: 2024-03-17."


def _logits(run: Path, out: Path) -> tuple[Any, Any, Any]:
    """Ours, the export's in plain transformers, and the bare backbone's."""
    adapted, tokenizer = open_run(run).load(CPU)
    plain = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    base = AutoModelForCausalLM.from_pretrained(open_run(run).model.name_or_path, dtype=adapted.dtype).eval()
    assert AutoTokenizer.from_pretrained(out)(TEXT).input_ids == tokenizer(TEXT).input_ids
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    with torch.no_grad():
        return tuple(model(input_ids=ids).logits for model in (adapted, plain, base))


def _assert_same(run: Path, out: Path) -> None:
    ours, theirs, base = _logits(run, out)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-3)
    assert (ours - base).abs().max() > 1  # else the backbone alone would pass


@pytest.mark.parametrize(
    ("family", "settings", "architecture"),
    [
        ("llama", {"tie_word_embeddings": True, "head_dim": 16}, "mixtral"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}, "mixtral"),
        ("mistral", {"sliding_window": 8}, "mixtral"),
        ("qwen2", {"rms_norm_eps": 1e-4}, "qwen2_moe"),
        ("qwen3", {"head_dim": 16}, "qwen3_moe"),
    ],
)
def test_the_stock_mixture_has_the_logits_of_the_adapter(
    tiny_llama: Path, tmp_path: Path, family: str, settings: dict[str, Any], architecture: str
) -> None:
    model = make_model(tmp_path / "model", tiny_llama, family, **settings)
    run = make_run(tmp_path / "run", model, EVERYWHERE, size=0.3)
    export(run, tmp_path / "out", "hf-moe", options=ON_CPU)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == architecture
    _assert_same(run, tmp_path / "out")


@pytest.mark.parametrize(
    "adapter",
    [
        MixLoRAConfig(num_experts=3, rank=2, top_k=1, target_modules=["mlp", "q_proj"], renormalise=False),
        MixLoRAConfig(num_experts=3, rank=2, router="top_p"),
        MixLoRAConfig(num_experts=3, rank=2, router="switch"),
        MoLAConfig(num_experts=3, rank=2),
    ],
    ids=lambda adapter: f"{adapter.method}-{getattr(adapter, 'router', '')}",
)
def test_what_no_stock_mixture_computes_is_refused_with_the_reason(
    tiny_llama: Path, tmp_path: Path, adapter: MethodConfig
) -> None:
    run = make_run(tmp_path / "run", tiny_llama, adapter)
    with pytest.raises(UsageError, match=r"sum to one|summing to one|whole feed-forward network") as caught:
        export(run, tmp_path / "out", "hf-moe", options=ON_CPU)
    assert "hf-code" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("family", "settings", "named"),
    [
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("gemma", {"head_dim": 8}, "'gemma'"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "use_sliding_window"),
    ],
)
def test_a_backbone_that_the_twin_cannot_be_is_refused(
    tiny_llama: Path, tmp_path: Path, family: str, settings: dict[str, Any], named: str
) -> None:
    model = make_model(tmp_path / "model", tiny_llama, family, **settings)
    run = make_run(tmp_path / "run", model, EVERYWHERE)
    with pytest.raises(UsageError, match=named):
        export(run, tmp_path / "out", "hf-moe", options=ON_CPU)
    assert not (tmp_path / "out").exists()


def test_layers_without_experts_whole_modules_and_a_temperature_are_kept(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = MixLoRAConfig(
        num_experts=4,
        rank=2,
        temperature=0.5,
        target_modules=["model.layers.1.mlp", "v_proj", "model.layers.0.mlp.up_proj"],
        modules_to_save=["lm_head", "model.norm"],
    )
    model = make_model(tmp_path / "model", tiny_llama, "llama", tie_word_embeddings=True)
    run = make_run(tmp_path / "run", model, adapter, size=0.3)
    export(run, tmp_path / "out", "hf-moe", options=ON_CPU)
    _assert_same(run, tmp_path / "out")


def test_verify_says_where_the_answers_part_and_keeps_nothing_beyond_the_tolerance(
    tiny_llama: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", tiny_llama, EVERYWHERE, dtype="bfloat16")
    done = export(run, tmp_path / "out", "hf-moe", options=VERIFIED)
    assert done.verdict is not None
    assert 0 < done.verdict.mean < 0.1
    assert done.verdict.prompts == 6
    with pytest.raises(CheckFailed, match=r"log-probabilities differ by .* 1e-09 allowed") as caught:
        export(run, tmp_path / "other", "hf-moe", options=VERIFIED, tolerance=1e-9)
    assert caught.value.exit_code == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_a_quantised_backbone_becomes_the_numbers_it_stood_for(tiny_llama: Path, tmp_path: Path) -> None:
    from smore_cli.recipe.schema import QuantizationConfig

    run = make_run(tmp_path / "run", tiny_llama, EVERYWHERE, quantization=QuantizationConfig())
    done = export(run, tmp_path / "out", "hf-moe", options=VERIFIED)
    assert done.verdict is not None
    assert done.verdict.mean < 1e-3
    ours, theirs, _ = _logits(run, tmp_path / "out")
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-2)
