"""DoRA against its equation, against PEFT, and against the reference numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from smore_cli.methods import Site
from smore_cli.methods.lora import LoRAConfig
from smore_cli.models.load import load_backbone
from smore_cli.nn import AdaptedModule, adapted_modules, attach
from smore_cli.nn.low_rank import WeightDecomposed
from smore_cli.recipe.schema import ModelConfig, QuantizationConfig
from tests.nn.models import llama, logits, token_ids

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

D_IN, D_OUT = 12, 9


def linear(bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(D_IN, D_OUT, bias=bias, dtype=dtype).requires_grad_(False)


def dora(base: nn.Module, **fields: Any) -> AdaptedModule:
    """A linear map with a fresh DoRA of rank 4."""
    config = LoRAConfig(**{"rank": 4, "use_dora": True, **fields})
    module = AdaptedModule(base)
    module.adapters["default"] = config.build(Site("site", D_IN, D_OUT, base=base)).to(base.weight.dtype)
    module.active = "default"
    return module


def randomise_(module: AdaptedModule) -> WeightDecomposed:
    adapter: Any = module.adapters["default"]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        adapter.lora_A.copy_(torch.randn(adapter.lora_A.shape, generator=generator) * 0.4)
        adapter.lora_B.copy_(torch.randn(adapter.lora_B.shape, generator=generator) * 0.4)
        adapter.lora_magnitude_vector.copy_(0.5 + torch.rand(D_OUT, generator=generator))
    return adapter  # type: ignore[no-any-return]


def x_of(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def by_the_equation(base: nn.Linear, adapter: WeightDecomposed, x: Tensor) -> Tensor:
    """y_i = m_i / |v_i| <v_i, x> + b_i with v_i = w_i + s sum_k B_ik a_k, one number at a time."""
    y = torch.zeros(len(x), D_OUT, dtype=torch.float64)
    W, A, B = base.weight.tolist(), adapter.lora_A.tolist(), adapter.lora_B.tolist()
    m = adapter.lora_magnitude_vector.tolist()
    for i in range(D_OUT):
        v = [W[i][j] + adapter.scale * sum(B[i][k] * A[k][j] for k in range(len(A))) for j in range(D_IN)]
        length = math.sqrt(sum(value * value for value in v))
        for n in range(len(x)):
            projected = sum(v[j] * float(x[n, j]) for j in range(D_IN))
            y[n, i] = m[i] / length * projected
            y[n, i] += 0 if base.bias is None else float(base.bias[i])
    return y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fields", [{}, {"alpha": 3.0, "use_rslora": True}], ids=["lora", "rslora"])
def test_the_output_is_that_of_the_equation(bias: bool, fields: dict[str, Any]) -> None:
    base, x = linear(bias), x_of(5, D_IN)
    module = dora(base, **fields)
    adapter = randomise_(module)
    torch.testing.assert_close(module(x), by_the_equation(base, adapter, x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module(x.view(1, 5, D_IN)), module(x)[None], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_fresh_dora_gives_the_base_to_the_last_bit(bias: bool, dtype: torch.dtype) -> None:
    base, x = linear(bias, dtype), x_of(64, D_IN, dtype=dtype)
    module = AdaptedModule(base)
    module.adapters["default"] = LoRAConfig(rank=4, use_dora=True).build(Site("site", D_IN, D_OUT, base=base))
    module.active = "default"
    assert torch.equal(module(x), base(x))


def test_a_fresh_dora_gives_the_whole_model_to_the_last_bit(tiny_llama: Path) -> None:
    model, ids = llama(tiny_llama), token_ids(2, 9)
    plain = logits(model, ids)
    attach(model, LoRAConfig(rank=2, use_dora=True, dropout=0.3))
    assert torch.equal(logits(model, ids), plain)


def test_the_first_step_moves_b_and_the_magnitudes_and_not_a() -> None:
    module = dora(linear())
    module(x_of(7, D_IN)).square().sum().backward()
    adapter: Any = module.adapters["default"]
    silent = {name for name, parameter in adapter.named_parameters() if not parameter.grad.any()}
    assert silent == adapter.silent_at_start() == {"lora_A"}
    assert adapter.lora_magnitude_vector.grad.all()


def test_a_row_of_zeros_in_the_weight_stays_finite() -> None:
    base, x = linear(), x_of(3, D_IN)
    base.weight[2] = 0
    module = dora(base)
    assert torch.equal(module(x), base(x))
    module(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.adapters.parameters())  # type: ignore[union-attr]


def test_gradients_are_those_of_a_norm_held_constant() -> None:
    """Finite differences of the equation with the norm frozen at its value (DoRA, section 4.3)."""
    base, x = linear(), x_of(4, D_IN)
    module = dora(base)
    adapter = randomise_(module)
    frozen = (base.weight + adapter.scale * adapter.lora_B @ adapter.lora_A).norm(dim=1).detach()

    def held(A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        return (m / frozen) * (x @ (base.weight + adapter.scale * B @ A).T) + base.bias

    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    point = tuple(getattr(adapter, name).detach().clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(held, point)
    expected = torch.autograd.grad(held(*point).square().sum(), point)
    module(x).square().sum().backward()
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(getattr(adapter, name).grad, gradient, rtol=1e-10, atol=1e-10)


# Against PEFT.


def twins(base: nn.Module, dtype: torch.dtype, dropout: float = 0.0) -> tuple[AdaptedModule, nn.Module]:
    """The same linear map with our DoRA and PEFT's, with the same random weights."""
    module = dora(base, alpha=6.0, dropout=dropout).to(dtype)
    adapter = randomise_(module)
    peft = PeftConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0"], lora_dropout=dropout)
    theirs = get_peft_model(nn.Sequential(base), peft).to(dtype)
    layer: Any = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(adapter.lora_A)
        layer.lora_B["default"].weight.copy_(adapter.lora_B)
        layer.lora_magnitude_vector["default"].weight.copy_(adapter.lora_magnitude_vector)
    return module, layer


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_equal_pefts(bias: bool, dropout: float, dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = twins(linear(bias, dtype), dtype, dropout)
    inputs = [x_of(3, 5, D_IN, dtype=dtype).requires_grad_() for _ in range(2)]
    outputs = []
    for module, x in zip((ours.train(), theirs.train()), inputs, strict=True):
        torch.manual_seed(5)  # the same elements are dropped
        outputs.append(module(x))
        outputs[-1].square().sum().backward()
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(*outputs, **close)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **close)
    adapter: Any = ours.adapters["default"]
    layer: Any = theirs
    torch.testing.assert_close(adapter.lora_A.grad, layer.lora_A["default"].weight.grad, **close)
    torch.testing.assert_close(adapter.lora_B.grad, layer.lora_B["default"].weight.grad, **close)
    magnitude = layer.lora_magnitude_vector["default"].weight.grad
    torch.testing.assert_close(adapter.lora_magnitude_vector.grad, magnitude, **close)


def test_magnitudes_start_where_pefts_do() -> None:
    base = linear(dtype=torch.float32)
    peft = get_peft_model(nn.Sequential(base), PeftConfig(r=4, use_dora=True, target_modules=["0"]))
    theirs = peft.base_model.model[0].lora_magnitude_vector["default"].weight
    ours: Any = dora(base).adapters["default"]
    torch.testing.assert_close(ours.lora_magnitude_vector, theirs, rtol=1e-6, atol=0)


def test_transposed_weights_start_as_the_base_and_follow_the_same_equation() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    ids = token_ids(2, 7) % 64
    plain = logits(model, ids)
    attach(model, LoRAConfig(rank=2, use_dora=True, target_modules=["c_attn"]))
    assert torch.equal(logits(model, ids), plain)
    (module,) = adapted_modules(model).values()
    adapter: Any = module.adapters["default"]
    assert adapter.lora_magnitude_vector.shape == (48,)
    nn.init.normal_(adapter.lora_B)
    nn.init.uniform_(adapter.lora_magnitude_vector, 0.5, 1.5)
    direction = module.base.weight.T + adapter.scale * adapter.lora_B @ adapter.lora_A  # type: ignore[operator, union-attr]
    weight = adapter.lora_magnitude_vector[:, None] * direction / direction.norm(dim=1, keepdim=True)
    x = x_of(3, 16, dtype=torch.float32)
    torch.testing.assert_close(module(x), x @ weight.T + module.bias, rtol=1e-5, atol=1e-5)


def test_a_four_bit_base_starts_exactly_and_follows_the_equation_of_its_dequantised_weight(tiny_llama: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    settings = ModelConfig(name_or_path=str(tiny_llama), dtype="float32")
    model = load_backbone(settings, QuantizationConfig(), torch.device("cpu")).model
    ids = token_ids(2, 9)
    plain = logits(model, ids)
    attach(model, LoRAConfig(rank=2, use_dora=True))
    assert torch.equal(logits(model, ids), plain)
    module = adapted_modules(model)["model.layers.0.mlp.up_proj"]
    adapter: Any = module.adapters["default"]
    nn.init.normal_(adapter.lora_B)
    weight: Any = module.base.weight
    direction = dequantize_4bit(weight.data, weight.quant_state) + adapter.scale * adapter.lora_B @ adapter.lora_A
    merged = adapter.lora_magnitude_vector[:, None] * direction / direction.norm(dim=1, keepdim=True)
    x = x_of(3, 32, dtype=torch.float32)
    torch.testing.assert_close(module(x), x @ merged.T, rtol=1e-4, atol=1e-4)


def test_the_reference_numbers_are_met(shared_golden: Path) -> None:
    golden = {name: torch.from_numpy(array) for name, array in np.load(shared_golden / "dynmole.npz").items()}
    W, A, B = golden["L_W"], golden["L_A"][0], golden["L_B"][0]
    base = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=torch.float64)
    base.weight.data.copy_(W)
    scale = float(golden["L_scale"])
    adapter = WeightDecomposed(base, W.shape[1], W.shape[0], rank=len(A), scale=scale, dropout=0.0).double()
    with torch.no_grad():
        adapter.lora_A.copy_(A)
        adapter.lora_B.copy_(B)
        adapter.lora_magnitude_vector.copy_(golden["L_dora_m"])
    expected = golden["L_y_dora_expert0"]
    torch.testing.assert_close(adapter.adapted(golden["L_x"], base), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("rank", "use_dora", "expected"), [(2, False, 2 * 21), (2, True, 2 * 21 + 9), (5, True, 114)])
def test_the_parameter_formula_counts_the_magnitudes(rank: int, use_dora: bool, expected: int) -> None:
    config, site = LoRAConfig(rank=rank, use_dora=use_dora), Site("site", D_IN, D_OUT, base=linear())
    assert config.num_parameters(site) == expected == sum(p.numel() for p in config.build(site).parameters())


def test_dora_is_not_built_without_the_linear_map_it_starts_from() -> None:
    with pytest.raises(ValueError, match="site: DoRA starts from the weight"):
        LoRAConfig(use_dora=True).build(Site("site", D_IN, D_OUT))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # read by PEFT
def test_a_llama_with_dora_on_all_linears_equals_pefts(tiny_llama: Path) -> None:
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tiny_llama) for _ in range(2))
    attach(ours, LoRAConfig(rank=4, alpha=8, use_dora=True))
    peft = PeftConfig(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(theirs, peft)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == theirs.get_nb_trainable_parameters()[0]
    torch.manual_seed(0)
    for path, module in adapted_modules(ours).items():
        adapter: Any = module.adapters["default"]
        layer = theirs.base_model.model.get_submodule(path)
        with torch.no_grad():
            nn.init.normal_(adapter.lora_B, std=0.2)
            layer.lora_A["default"].weight.copy_(adapter.lora_A)
            layer.lora_B["default"].weight.copy_(adapter.lora_B)
    ids = token_ids(2, 9)
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=1e-4, atol=1e-5)
