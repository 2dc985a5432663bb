from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from smore_cli.data.batch import Row
from smore_cli.errors import UsageError
from smore_cli.models.load import load_tokenizer
from smore_cli.nn import adapted_modules
from smore_cli.recipe.schema import ModelConfig, Recipe
from smore_cli.routing import collect_routing
from smore_cli.routing.trace import RouterTrace, TextTrace, trace_text
from smore_cli.routing.trace_view import trace_detail, trace_tables
from tests.nn.models import add_random, llama, small_smore


def traced(folder: Path, text: str, recipe: Recipe | None = None) -> tuple[Any, TextTrace]:
    """A model with a small random tree in every linear map, and the trace of a text."""
    model = add_random(llama(folder), small_smore())
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(folder)))
    modules = set(adapted_modules(model))
    return model, trace_text(model, tokenizer, text, recipe, modules=modules, level=None)  # type: ignore[arg-type]


def test_a_trace_is_what_the_statistics_of_the_same_text_are_means_of(tiny_llama: Path) -> None:
    model, trace = traced(tiny_llama, "Ice melts")
    rows = [Row([], [trace.ids], [[False] * len(trace.ids)])]
    found = collect_routing(model, rows, pad_token_id=0, batch_size=1, on_progress=lambda done, total: None).routers
    assert [(r.module, r.level) for r in trace.routers] == [(r.module, r.level) for r in found]
    for router, statistics in zip(trace.routers, found, strict=True):
        assert router.mean_gates.mean(0).tolist() == pytest.approx(statistics.share, abs=1e-6)
    assert "".join(trace.tokens).endswith("Ice melts")


@pytest.mark.parametrize(("format_name", "style"), [("chat", "chat template"), ("text", "as it stands")])
def test_a_text_is_written_as_the_rows_that_the_run_was_trained_on(
    tiny_llama: Path, format_name: str, style: str
) -> None:
    model = {"name_or_path": str(tiny_llama)}
    data = {"train": [{"path": "rows.jsonl", "format": format_name}], "max_length": 32}
    parts = {"version": 1, "model": model, "adapter": {"method": "smore"}, "data": data, "output_dir": "run"}
    recipe = Recipe.model_validate(parts)
    _, trace = traced(tiny_llama, "Ice melts", recipe)
    written = "".join(trace.tokens)
    assert style in trace.style
    assert written.count("<|im_start|>") == (2 if format_name == "chat" else 0)
    assert ("user\nIce melts<|im_end|>" in written) == (format_name == "chat")
    _, long = traced(tiny_llama, "Ice melts " * 50, recipe)
    assert len(long.ids) == 32


def test_nothing_to_trace_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="the text is empty"):
        traced(tiny_llama, "")


def test_the_terminal_shows_the_heaviest_expert_of_each_layer_and_in_full_every_pick() -> None:
    gates = torch.tensor([[[0.25, 0.75, 0.0]], [[0.6, 0.0, 0.4]]])  # two tokens, one parent, three experts
    routers = [RouterTrace(f"layers.{layer}.q_proj", 0, gates.roll(layer, -1)) for layer in range(3)]
    trace = TextTrace("a\nb", "as it stands", [1, 2], ["a\n", "</b> "], routers)
    console = Console(width=80, record=True)
    for table in trace_tables(trace, routers, 80):
        console.print(table)
    console.print(trace_detail(trace, routers[0]))
    shown = console.export_text()
    assert "a⏎     120" in shown and "</b>·  012" in shown
    assert "1: 0.750  0: 0.250" in shown
