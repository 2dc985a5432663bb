"""LoRA and rsLoRA equal PEFT's on the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM

from smore_cli.errors import UsageError
from smore_cli.methods import Site, config_from_dict
from smore_cli.methods.lora import LoRAConfig
from smore_cli.nn import adapted_modules, attach

if TYPE_CHECKING:
    from pathlib import Path

    from smore_cli.nn.low_rank import LowRank

EXACT: dict[str, float] = {"rtol": 1e-11, "atol": 1e-11}
ROUNDING: dict[str, float] = {"rtol": 1e-5, "atol": 1e-6}


class Net(nn.Module):
    """Two linear maps with a bend between them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20, bias=bias)
        self.second = nn.Linear(20, 9, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def twins(bias: bool, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """Returns the same network with our LoRA and with PEFT's, with the same random weights."""
    torch.manual_seed(0)
    ours, theirs = Net(bias), Net(bias)
    theirs.load_state_dict(ours.state_dict())
    config = LoRAConfig(rank=4, target_modules=["first", "second"], **settings)
    attach(ours, config)
    alpha = 8 if config.alpha is None else config.alpha
    peft = PeftConfig(r=4, lora_alpha=alpha, use_rslora=config.use_rslora, target_modules=["first", "second"])
    theirs = get_peft_model(theirs, peft)
    give_the_same_weights(ours, theirs)
    return ours.double(), theirs.double()


def give_the_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    for path, module in adapted_modules(ours).items():
        lora, layer = module.adapters["default"], theirs.base_model.model.get_submodule(path)  # type: ignore[union-attr]
        with torch.no_grad():
            nn.init.normal_(lora.lora_B, std=0.2)
            layer.lora_A["default"].weight.copy_(lora.lora_A)
            layer.lora_B["default"].weight.copy_(lora.lora_B)


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    for path, module in adapted_modules(ours).items():
        lora, layer = module.adapters["default"], theirs.base_model.model.get_submodule(path)  # type: ignore[union-attr]
        assert lora.lora_A.grad.any() and lora.lora_B.grad.any()
        tolerance = EXACT if lora.lora_A.dtype == torch.float64 else ROUNDING
        torch.testing.assert_close(lora.lora_A.grad, layer.lora_A["default"].weight.grad, **tolerance)
        torch.testing.assert_close(lora.lora_B.grad, layer.lora_B["default"].weight.grad, **tolerance)


@pytest.mark.parametrize(
    "settings",
    [{}, {"alpha": 1.0}, {"alpha": 32.0}, {"alpha": 6.0, "use_rslora": True}],
    ids=["default", "alpha-1", "alpha-32", "rslora"],
)
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_equal_pefts(bias: bool, settings: dict[str, Any]) -> None:
    ours, theirs = twins(bias, **settings)
    x = torch.randn(3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(x) for model, x in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(*outputs, **EXACT)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **EXACT)
    assert_same_gradients(ours, theirs)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # read by PEFT
def test_a_llama_with_lora_on_all_linears_equals_pefts(tiny_llama: Path) -> None:
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tiny_llama) for _ in range(2))
    attach(ours, LoRAConfig(rank=4, alpha=8))
    theirs = get_peft_model(theirs, PeftConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted_by_peft = {path.removesuffix(".lora_A.default") for path, _ in theirs.base_model.model.named_modules()}
    assert set(adapted_modules(ours)) <= adapted_by_peft and len(adapted_modules(ours)) == 14
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == theirs.get_nb_trainable_parameters()[0]
    torch.manual_seed(0)
    give_the_same_weights(ours, theirs)
    ids = torch.randint(3, 512, (2, 9))
    outputs = [model(input_ids=ids, labels=ids) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.loss.backward()
    assert_same_gradients(ours, theirs)


def test_a_fresh_update_is_exactly_zero_and_first_moves_b() -> None:
    torch.manual_seed(0)
    net, x = Net(bias=True), torch.randn(7, 12)
    before = net(x)
    attach(net, LoRAConfig(rank=4))
    assert torch.equal(net(x), before)
    net(x).sum().backward()
    for module in adapted_modules(net).values():
        assert module.adapters["default"].lora_B.grad.any() and not module.adapters["default"].lora_A.grad.any()


def test_dropout_acts_on_the_update_in_training_alone() -> None:
    torch.manual_seed(0)
    lora: LowRank = LoRAConfig(rank=4, dropout=0.5).build(Site("site", 6, 5))  # type: ignore[assignment]
    nn.init.normal_(lora.lora_B)
    x, y = torch.randn(1, 6).expand(2000, 6), torch.zeros(2000, 5)
    exact = lora.eval()(x, y)
    assert torch.equal(exact, lora(x, y))
    dropped = lora.train()(x, y)
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(dropped.mean(0), exact[0], rtol=0, atol=0.25 * exact.abs().max().item())


@pytest.mark.parametrize(("rank", "d_in", "d_out"), [(1, 3, 7), (16, 576, 192), (64, 4096, 14336)])
def test_the_parameter_formula_counts_the_parameters(rank: int, d_in: int, d_out: int) -> None:
    config, site = LoRAConfig(rank=rank), Site("site", d_in, d_out)
    assert config.num_parameters(site) == sum(p.numel() for p in config.build(site).parameters())


def test_alpha_defaults_to_twice_the_rank() -> None:
    assert LoRAConfig(rank=8).scale == LoRAConfig(rank=8, alpha=16).scale == 2
    assert LoRAConfig(rank=8, alpha=4).scale == 0.5


def test_rslora_divides_by_the_root_of_the_rank_and_wants_alpha() -> None:
    assert LoRAConfig(rank=16, alpha=8, use_rslora=True).scale == 2
    with pytest.raises(ValidationError, match="alpha: use_rslora needs it"):
        LoRAConfig(rank=16, use_rslora=True)


def test_settings_survive_the_trip_through_a_dictionary() -> None:
    config = LoRAConfig(rank=3, alpha=5, dropout=0.1, use_rslora=True, use_dora=True, target_modules=["q_proj"])
    assert config_from_dict(config.model_dump()) == config
    with pytest.raises(UsageError, match="unknown method"):
        config_from_dict({"method": "no such thing"})
