"""Before the first step: every tensor and every expert is reached by a gradient, and looking changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from smore_cli.data.batch import collate
from smore_cli.errors import CheckFailed
from smore_cli.methods import config_from_dict
from smore_cli.methods.hydralora import HydraLoRAConfig
from smore_cli.methods.lora import LoRAConfig
from smore_cli.models.logit_rule import logit_rule
from smore_cli.nn import adapted_modules, attach, checkpoint_contexts
from smore_cli.recipe import load_recipe
from smore_cli.training.census import Census, gradient_census, take_census
from smore_cli.training.census_table import coverage_table
from smore_cli.training.dry_run import dry_run
from smore_cli.training.loop import train
from smore_cli.training.objective import Objective
from smore_cli.training.setup import prepare
from tests.contract.models import PAD, Case, cases, rows
from tests.nn.models import llama, small_smore, token_ids

if TYPE_CHECKING:
    from torch import nn

    from smore_cli.data.batch import Batch
    from smore_cli.methods import MethodConfig

MakeRecipe = Callable[..., Path]
NOISY = {
    "method": "smore",
    "target_modules": ["q_proj", "down_proj"],
    "rank": [2, 2],
    "num_experts": [4, 4],
    "fanout": [2, 2],
    "gate": "noisy_topk",
    "router_dim": 4,
    "key_dim": 4,
}
ON_LLAMA = {name.rsplit("-", 1)[0]: case for name, case in cases() if case.architecture == "llama"}


def batches(count: int = 3) -> list[Batch]:
    return [collate(rows(8, seed=100 * i), pad_token_id=PAD) for i in range(count)]


def census(model: nn.Module, probes: list[Batch] | None = None) -> Census:
    return gradient_census(
        model.train(),
        batches() if probes is None else probes,
        Objective(ranking=False, completion_weight=0.0),
        device=torch.device("cpu"),
        backward=torch.Tensor.backward,
    )


def fresh(tiny_llama: Path, config: MethodConfig) -> nn.Module:
    model = llama(tiny_llama)
    attach(model, config)
    return model


ONE_EXPERT: list[dict[str, Any]] = [
    *({"method": name, "num_experts": 1, "top_k": 1} for name in ("dynmole", "goat", "mixlora", "mola", "moelora")),
    *({"method": name, "num_experts": 1} for name in ("comol", "hydralora", "mode", "omoe")),
    {"method": "mor", "num_experts": 1, "top_k": 1, "num_routers": 1},
    {"method": "loramoe", "num_experts": 1, "delta": 0.0},
    {"method": "trex", "num_down": 1, "num_up": 1, "prior": "none"},
    {"method": "smore", "rank": [2, 2], "num_experts": [1, 1], "fanout": [1, 1]},
    {"method": "smore", "rank": [2, 2], "num_experts": [3, 1], "fanout": [2, 1]},
    {"method": "smore", "rank": [2, 2], "num_experts": [1, 3], "fanout": [1, 2]},
]


@pytest.mark.parametrize("values", ONE_EXPERT, ids=lambda values: f"{values['method']}-{values.get('num_experts', 1)}")
def test_a_router_with_one_expert_has_nothing_to_learn_and_passes(tiny_llama: Path, values: dict[str, Any]) -> None:
    assert census(fresh(tiny_llama, config_from_dict(values))).problems == {}


@pytest.mark.parametrize("case", ON_LLAMA.values(), ids=ON_LLAMA)
def test_every_method_passes_with_its_defaults(case: Case) -> None:
    found = census(case.fresh())
    assert found.problems == {}
    adapters = [module.adapters["default"] for module in adapted_modules(case.fresh()).values()]
    assert sum(found.tensors.values()) == sum(len(list(adapter.parameters())) for adapter in adapters)
    assert (found.experts > 0) == any(adapter.expert_axes for adapter in adapters)  # type: ignore[arg-type]
    assert "all reached" in found.line()


def test_the_model_is_left_bit_for_bit_as_it_was(tiny_llama: Path) -> None:
    model = fresh(tiny_llama, small_smore(gate="noisy_topk"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    state = torch.get_rng_state()
    assert census(model).problems == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks


def test_a_tensor_cut_off_from_the_loss_is_named(tiny_llama: Path) -> None:
    model = fresh(tiny_llama, LoRAConfig(rank=2))
    lora: Any = adapted_modules(model)["model.layers.1.mlp.up_proj"].adapters["default"]
    added = type(lora).added
    lora.added = lambda x, y, latent: added(lora, x, y, latent).detach() + 0 * x.sum()
    problems = census(model).problems
    assert problems == {
        "model.layers.1.mlp.up_proj.lora_B": "no gradient reaches it",
        "model.layers.1.mlp.up_proj.lora_A": "no gradient reaches it",
    }


def test_what_one_batch_leaves_out_in_one_module_is_not_held_against_it(tiny_llama: Path) -> None:
    model = fresh(tiny_llama, LoRAConfig(rank=2))
    lora: Any = adapted_modules(model)["model.layers.1.mlp.up_proj"].adapters["default"]
    added, calls = type(lora).added, []

    def silent_for_a_while(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:  # as a router whose ReLUs are off
        calls.append(1)
        out: torch.Tensor = added(lora, x, *others)
        return out.detach() + 0 * x.sum() if len(calls) <= 4 else out

    lora.added = silent_for_a_while
    found = census(model, batches(8))
    assert found.problems == {} and found.line().endswith("tensors that only stronger noise woke: 2")
    assert len(calls) == 5  # and no pass more than it takes


def test_a_false_declaration_is_found_either_way(tiny_llama: Path) -> None:
    model = fresh(tiny_llama, LoRAConfig(rank=2, target_modules=["q_proj"]))
    first, second = (module.adapters["default"] for module in adapted_modules(model).values())
    first.silent_at_start = lambda: frozenset({"lora_A", "lora_B"})  # type: ignore[assignment]
    second.silent_at_start = lambda: frozenset()  # type: ignore[assignment]
    assert census(model).problems == {
        "model.layers.0.self_attn.q_proj.lora_B": "has a gradient at the first step, where its method declares none",
        "model.layers.1.self_attn.q_proj.lora_A": "no gradient at the first step, which its method does not declare",
    }


@pytest.mark.parametrize("when", ["start", "later"])
def test_a_gradient_that_is_not_finite_is_found(tiny_llama: Path, when: str) -> None:
    model = fresh(tiny_llama, LoRAConfig(rank=2, target_modules=["q_proj"]))
    lora: Any = adapted_modules(model)["model.layers.0.self_attn.q_proj"].adapters["default"]
    name = "lora_B" if when == "start" else "lora_A"
    calls: list[torch.Tensor] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(gradient)
        return gradient * torch.inf if when == "start" or len(calls) > 1 else gradient

    getattr(lora, name).register_hook(spoil)
    text = "its first gradient is not finite" if when == "start" else "its gradient is not finite"
    assert census(model).problems == {f"model.layers.0.self_attn.q_proj.{name}": text}


def test_an_expert_that_gets_tokens_but_no_gradient_is_named(tiny_llama: Path) -> None:
    model = fresh(tiny_llama, HydraLoRAConfig(target_modules=["q_proj"], dropout=0.0))
    bank: Any = adapted_modules(model)["model.layers.1.self_attn.q_proj"].adapters["default"]
    bank.B.register_hook(lambda gradient: gradient.index_fill(1, torch.arange(4, 12), 0.0))  # of 4 experts, rank 4
    assert census(model).problems == {
        "model.layers.1.self_attn.q_proj.B": "no gradient reaches experts 1, 2, which got tokens"
    }


def test_experts_that_got_no_token_are_counted_and_no_error(tiny_llama: Path) -> None:
    model = fresh(tiny_llama, small_smore(num_experts=[4, 64], fanout=[1, 1]))
    probe = batches(1)
    found = census(model, probe)
    assert found.problems == {}
    assert found.experts == 14 * (4 + 64) and 14 * 10 < found.not_picked < found.experts
    assert f"experts not picked yet: {found.not_picked:,}" in found.line()


def test_recomputed_activations_give_the_same_census(tiny_llama: Path) -> None:
    found = []
    for recompute in (False, True):
        model = fresh(tiny_llama, small_smore(num_experts=[4, 32], fanout=[1, 1]))
        if recompute:
            settings = {"use_reentrant": False, "context_fn": checkpoint_contexts}
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)  # type: ignore[operator]
        found.append(census(model))
    assert found[0] == found[1] and found[0].not_picked > 0


def test_the_nudged_passes_stop_when_everything_is_reached(tiny_llama: Path) -> None:
    model, calls = fresh(tiny_llama, LoRAConfig(rank=2)), []
    logit_rule(model)  # is asked once, by a pass of its own
    model.register_forward_hook(lambda *_: calls.append(1))
    census(model)
    assert len(calls) == 2
    model = fresh(tiny_llama, small_smore(num_experts=[4, 64], fanout=[1, 1]))
    logit_rule(model)
    model.register_forward_hook(lambda *_: calls.append(1))
    census(model)
    assert len(calls) == 2 + 3


def test_the_table_puts_layers_that_look_the_same_into_one_column() -> None:
    coverage = {f"model.layers.{i}.{name}": (2, 2) for i in range(6) for name in ("attn.q_proj", "mlp.up_proj")}
    coverage["model.layers.3.mlp.up_proj"] = (1, 2)
    del coverage["model.layers.5.attn.q_proj"]
    assert coverage_table(coverage) == [
        "reached      0-2    3    4    5",
        "attn.q_proj  6/6  2/2  2/2     ",
        "mlp.up_proj  6/6  1/2  2/2  2/2",
    ]


# In a run.


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Everything in metrics.jsonl that is not a time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


@pytest.mark.parametrize("adapter", [NOISY, {"method": "hydralora", "dropout": 0.1}], ids=["noisy", "dropout"])
def test_a_run_with_the_census_is_byte_for_byte_the_run_without(
    make_recipe: MakeRecipe, tmp_path: Path, adapter: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    said = {}
    for wanted in (True, False):
        settings = {"max_steps": 3, "gradient_census": wanted, "global_batch_size": 8}
        path = make_recipe(adapter=adapter, train=settings, output_dir=str(tmp_path / str(wanted)))
        train(load_recipe(path), path.read_text())
        said[wanted] = "gradient census" in capsys.readouterr().err
    assert said == {True: True, False: False}
    files = [tmp_path / str(wanted) / "adapter_model.safetensors" for wanted in (True, False)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert numbers(tmp_path / "True") == numbers(tmp_path / "False")


DEAD = {**NOISY, "gate": "switch", "init": "b_zero", "activation": "relu"}  # relu'(0) = 0: nothing below p ever moves


def test_a_run_that_could_not_train_ends_before_it_begins(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_recipe(adapter=DEAD)
    with pytest.raises(CheckFailed, match=r"model\.layers\.0\.self_attn\.q_proj\.B\.0: no gradient") as caught:
        train(load_recipe(path), path.read_text())
    assert caught.value.exit_code == 3 and "gradient_census: false" in caught.value.hint
    assert not (tmp_path / "run").exists()
    table = capsys.readouterr().err.splitlines()
    (header,) = [line for line in table if line.startswith("reached")]
    assert header.split() == ["reached", "0-1"]
    assert [line.split()[0] for line in table if "/" in line and line.startswith(("self", "mlp"))] == [
        "self_attn.q_proj",
        "mlp.down_proj",
    ]
    with pytest.raises(CheckFailed):
        dry_run(load_recipe(path))


def test_a_dry_run_shows_which_targets_of_which_layers_are_reached(make_recipe: MakeRecipe) -> None:
    shown = dry_run(load_recipe(make_recipe(adapter={"method": "lora", "target_modules": ["q_proj", "up_proj"]})))
    table = shown[shown.index(next(line for line in shown if line.startswith("reached"))) :]
    assert [line.split() for line in table[:3]] == [
        ["reached", "0-1"], ["self_attn.q_proj", "4/4"], ["mlp.up_proj", "4/4"],
    ]  # fmt: skip


def test_a_dry_run_takes_the_census_and_its_first_step_is_the_same(
    make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for wanted in (True, False):
        shown = dry_run(load_recipe(make_recipe(adapter=NOISY, train={"gradient_census": wanted})))
        lines.append([line.split(", ")[0] for line in shown if line.startswith("first step")])
        assert ("gradient census" in capsys.readouterr().err) is wanted
    assert lines[0] == lines[1]


def test_a_resumed_run_takes_no_census(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_recipe(train={"max_steps": 4, "save_steps": 2})
    train(load_recipe(path), path.read_text())
    run = tmp_path / "run" / "run.json"
    run.write_text(json.dumps({**json.loads(run.read_text()), "finished": False}))
    capsys.readouterr()
    train(load_recipe(path), path.read_text(), resume=True)
    shown = capsys.readouterr().err
    assert "resuming" in shown and "census" not in shown


def test_the_time_it_took_is_on_record(make_recipe: MakeRecipe) -> None:
    said: list[str] = []
    setup = prepare(load_recipe(make_recipe(adapter=NOISY)), said.append)
    take_census(setup, said.append)
    assert setup.seconds["census"] >= 0
    assert said[-1].startswith("gradient census: 4 modules, ") and "silent at the first step as declared: " in said[-1]


def test_tokens_that_say_nothing_do_not_count(tiny_llama: Path) -> None:
    """In the last layer an expert picked by prompt tokens alone cannot have a gradient."""
    model = fresh(tiny_llama, small_smore(num_experts=[4, 32], fanout=[1, 1], target_modules=["down_proj"]))
    ids = token_ids(1, 40)[0].tolist()
    row = rows(1)[0]
    long_prompt = collate([type(row)(ids[:39], [ids[39:]], [[True]])], pad_token_id=PAD)
    assert census(model, [long_prompt]).problems == {}
