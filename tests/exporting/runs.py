"""Runs with random adapters, and tiny backbones of other families."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import smore_cli
from smore_cli.models.adapter_files import save_adapter
from smore_cli.nn import attach
from smore_cli.recipe import Recipe, dump_recipe
from smore_cli.recipe.schema import DataConfig, ModelConfig, Source

if TYPE_CHECKING:
    from smore_cli.methods import MethodConfig

CPU = torch.device("cpu")
ROWS = Path(smore_cli.__file__).parent / "data/quickstart/train.jsonl"


def make_run(
    folder: Path, model: Path, adapter: MethodConfig, size: float = 0.1, dtype: Any = "float32", **sections: Any
) -> Path:
    """Writes a run with a random adapter, whose data is a few questions: prompts of --verify are made from it."""
    folder.mkdir(parents=True)
    rows = ROWS.read_text(encoding="utf-8").splitlines(keepends=True)[::200]
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    recipe = Recipe(
        version=1,
        model=ModelConfig(name_or_path=str(model), dtype=dtype),
        adapter=adapter,
        data=DataConfig(train=[Source(path=str(folder / "rows.jsonl"), format="multiple_choice")]),
        output_dir=str(folder),
        **sections,
    )
    adapted = AutoModelForCausalLM.from_pretrained(model)
    attach(adapted, adapter)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    (folder / "resolved.yaml").write_text(dump_recipe(recipe))
    (folder / "run.json").write_text("{}")
    save_adapter(adapted, adapter, folder, base=recipe.model)
    return folder


def make_model(folder: Path, tokenizer_of: Path, model_type: str, **settings: Any) -> Path:
    """Writes a tiny random model of another family, with the tokenizer of `tokenizer_of`."""
    shared: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    config = AutoConfig.for_model(model_type, **(shared | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at the start, and a bias that is lost would not show
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    for file in tokenizer_of.glob("*"):
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder)
    return folder
