"""GOAT against the method written out on a rewritten base weight, and what holds in place of a silent start."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers.pytorch_utils import Conv1D

from smore_cli.errors import AdapterError
from smore_cli.methods import Site, config_from_dict
from smore_cli.methods.goat import GOATConfig
from smore_cli.models.adapter_files import load_adapter, save_adapter
from smore_cli.nn import adapted_modules, attach, detach
from smore_cli.nn.low_rank import LowRank
from smore_cli.recipe.schema import ModelConfig
from tests.methods.flat import counted, expert, fresh_bank, silent_parameters
from tests.nn.models import llama, logits, token_ids
from tests.nn.test_gradients import gradcheck
from tests.nn.trees import randomise_, rows

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from smore_cli.nn.bank import Bank

SMALL: dict[str, Any] = {"num_experts": 3, "rank": 6, "dropout": 0.0}
BASE = ModelConfig(name_or_path="tiny")


def linear(d_in: int = 8, d_out: int = 7) -> nn.Linear:
    made = nn.Linear(d_in, d_out).double().requires_grad_(False)
    made.weight.copy_(rows(d_out, d_in, seed=3))
    return made


def made(base: nn.Linear | None = None, **fields: Any) -> tuple[Bank, nn.Linear]:
    """Returns a fresh adapter and its base."""
    base = linear() if base is None else base
    return fresh_bank(GOATConfig(**{**SMALL, **fields}), base.in_features, base.out_features, base), base


def written_out(bank: Bank, base: nn.Linear, x: Tensor, scale: float, rho: float, top_k: int) -> Tensor:
    """The base weight minus the start, and every picked expert, token by token, and the start piece by piece."""
    s, r = 3, 2
    U, S, Vh = torch.linalg.svd(base.weight, full_matrices=False)
    stretch = len(S) // s
    start = torch.zeros_like(base.weight)
    for i in range(s):
        for j in range(i * stretch, i * stretch + r):
            start += S[j] / (scale * rho) * torch.outer(U[:, j], Vh[j])
    rewritten = base.weight - scale / s * start
    out = torch.zeros(len(x), len(base.weight), dtype=torch.float64)
    for t, row in enumerate(x):
        p = torch.softmax(bank.router.weight @ row, 0)
        best = sorted(range(s), key=lambda e: -p[e].item())[:top_k]
        out[t] = rewritten @ row + base.bias
        for e in best:
            A, B = expert(bank, e)
            out[t] += scale * p[e] / sum(p[b] for b in best) * (B @ (A @ row))
    return out


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, math.sqrt(3 * 8 / 2)),
        ({"eta": 0.5, "rho": 4.0}, math.sqrt(1.5 * 8 / 2)),
        ({"alpha": 16.0, "top_k": 3}, 8.0),
    ],
)
def test_the_output_equals_the_method_written_out(fields: dict[str, Any], scale: float, trained: bool) -> None:
    bank, base = made(**fields)
    if trained:
        randomise_(bank)
    x = rows(12, 8)
    expected = written_out(bank, base, x, scale, fields.get("rho", 10.0), fields.get("top_k", 2))
    # Factors were rounded to float32, in which an adapter starts.
    torch.testing.assert_close(bank(x, base(x)), expected, rtol=1e-5, atol=1e-5)


def test_factors_share_the_singular_values_equally() -> None:
    bank, base = made()
    S = torch.linalg.svdvals(base.weight)[[0, 1, 2, 3, 4, 5]] / (math.sqrt(3 * 8 / 2) * 10)
    torch.testing.assert_close(bank.A.square().sum(1), S, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(bank.B.square().sum(0), S, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fields", [{"top_k": 3}, {"num_experts": 1, "top_k": 1}, {"top_k": 3, "alpha": 3.0}])
def test_with_equal_gates_a_fresh_adapter_is_the_backbone(fields: dict[str, Any]) -> None:
    bank, base = made(**fields)
    nn.init.zeros_(bank.router.weight)
    x = rows(12, 8)
    torch.testing.assert_close(bank(x, base(x)), base(x), rtol=1e-12, atol=1e-12)


def test_a_fresh_adapter_differs_by_what_its_gates_make_of_the_pieces() -> None:
    bank, base = made()
    x = rows(12, 8)
    left, right, scale = bank.B, bank.A, math.sqrt(3 * 8 / 2)
    gates = bank.router(x).gates.squeeze(1)
    pieces = torch.stack([x @ right[2 * e : 2 * e + 2].T @ left[:, 2 * e : 2 * e + 2].T for e in range(3)], 1)
    expected = scale * ((gates - 1 / 3)[..., None] * pieces).sum(1)
    torch.testing.assert_close(bank(x, base(x)) - base(x), expected, rtol=1e-10, atol=1e-12)
    assert not GOATConfig.starts_as_backbone and expected.abs().max() > 0.01


def test_gradients_equal_finite_differences() -> None:
    config = GOATConfig(num_experts=3, rank=3, aux_loss_coefficient=0.3)
    bank = fresh_bank(config, 4, 3, linear(4, 3))
    randomise_(bank)
    gradcheck(bank, rows(3, 4))


def test_the_subtracted_start_sees_no_dropout_and_never_trains() -> None:
    bank, base = made(dropout=0.5, top_k=3)
    nn.init.zeros_(bank.A)
    x = rows(40, 8)
    torch.testing.assert_close(bank.train()(x, base(x)), bank.eval()(x, base(x)), rtol=0, atol=0)
    assert {name for name, _ in bank.named_buffers()} == {"A0", "B0"} <= set(bank.state_dict())
    assert {name for name, _ in bank.named_parameters()} == {"A", "B", "router.weight"}


def test_one_expert_that_learned_is_lora_on_what_is_left_of_the_weight() -> None:
    bank, base = made(num_experts=1, top_k=1, rank=2, alpha=4.0)
    randomise_(bank)
    lora, x = LowRank(8, 7, rank=2, scale=2).double(), rows(7, 8)
    lora.load_state_dict({"lora_A": bank.A, "lora_B": bank.B})
    left = base.weight - 2 * bank.B0 @ bank.A0  # type: ignore[operator]
    torch.testing.assert_close(bank(x, base(x)), lora(x, x @ left.T + base.bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "silent"),
    [
        ({}, set()),
        ({"aux_loss_coefficient": 0.0}, set()),
        ({"num_experts": 1, "top_k": 1}, {"router.weight"}),
    ],
)
def test_the_declared_silence_at_the_start_is_the_true_one(fields: dict[str, Any], silent: set[str]) -> None:
    bank, _ = made(**fields)
    assert silent_parameters(bank) == bank.silent_at_start() == silent


@pytest.mark.parametrize("meta", [False, True])
def test_without_a_weight_the_parameters_have_their_shapes_and_are_zero(meta: bool) -> None:
    with torch.device("meta"):
        base = nn.Linear(11, 9) if meta else None
    bank = fresh_bank(GOATConfig(**SMALL), 11, 9, base)
    assert bank.A.shape == (6, 11) and bank.B.shape == (9, 6)
    assert not bank.A.any() and not bank.B.any() and bank.router.weight.any()


@pytest.mark.parametrize("shape", [{}, {"num_experts": 1, "top_k": 1}, {"num_experts": 2, "rank": 4}])
def test_the_parameter_formula_counts_the_parameters(shape: dict[str, Any]) -> None:
    config = GOATConfig(**shape)
    assert config.num_parameters(Site("site", 11, 9)) == counted(config, 11, 9)


def test_a_conv1d_and_a_linear_of_the_same_map_give_the_same_adapter() -> None:
    base, conv = linear(), Conv1D(7, 8).double().requires_grad_(False)
    conv.weight.copy_(base.weight.T)
    ours, theirs = made(base)[0], fresh_bank(GOATConfig(**SMALL), 8, 7, conv)
    torch.testing.assert_close(theirs.B @ theirs.A, ours.B @ ours.A, rtol=1e-5, atol=1e-7)


def test_a_4_bit_weight_is_decomposed_as_what_it_stands_for() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(64, 48, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    base.weight = bnb.nn.Params4bit(rows(48, 64).float(), requires_grad=False, quant_type="nf4").to("cpu")
    if base.weight.quant_state is None:
        base.weight = base.weight._quantize("cpu")
    bank = GOATConfig(num_experts=1, rank=48, top_k=1, rho=1.0, alpha=48.0, dropout=0.0).build(
        Site("site", 64, 48, base=base)
    )
    x = rows(5, 64).float()
    torch.testing.assert_close(bank.B @ (bank.A @ x.T), base(x).T, rtol=1e-3, atol=1e-3)  # type: ignore[operator]


def test_the_backbone_is_never_changed(tiny_llama: Path) -> None:
    model, ids = llama(tiny_llama), token_ids(2, 7)
    before, said = {name: p.clone() for name, p in model.named_parameters()}, logits(model, ids)
    attach(model, GOATConfig())
    assert not torch.equal(logits(model, ids), said)
    for module in adapted_modules(model).values():
        module.active = None
    assert torch.equal(logits(model, ids), said)
    detach(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_loaded_adapter_does_not_depend_on_the_weights_it_is_loaded_onto(tiny_llama: Path, tmp_path: Path) -> None:
    """The start that is subtracted comes from the file, not from another decomposition."""
    config = GOATConfig()
    model, other = llama(tiny_llama), llama(tiny_llama)
    attach(model, config)
    save_adapter(model, config, tmp_path, base=BASE)
    for parameter in other.parameters():
        parameter.mul_(1.5)
    load_adapter(other, tmp_path)
    for path, module in adapted_modules(model).items():
        loaded = adapted_modules(other)[path].adapter("default").state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in module.adapter("default").state_dict().items())
        assert loaded["A0"].any() and loaded["B0"].any()


def test_bfloat16_gives_the_float64_output_up_to_rounding() -> None:
    base, x = linear(64, 48), rows(50, 64)
    exact = fresh_bank(GOATConfig(), 64, 48, base)
    half = fresh_bank(GOATConfig(), 64, 48, base).float()
    out, wanted = half(x.bfloat16(), base(x).bfloat16()), exact(x, base(x))
    assert out.dtype == torch.bfloat16
    assert ((out.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() < 0.02


def test_more_ranks_than_a_stretch_of_the_spectrum_holds_are_refused() -> None:
    with pytest.raises(AdapterError, match="rank: 24 is more than the 16 singular values of k_proj split over 8"):
        GOATConfig(rank=24).build(Site("k_proj", 32, 16))
    assert GOATConfig(rank=16).build(Site("k_proj", 32, 16)) is not None


def test_the_derived_scale_is_the_papers() -> None:
    site = Site("q_proj", 4096, 4096)
    assert GOATConfig().scale(site) == pytest.approx(math.sqrt(3 * 4096))  # rank 8 over 8 experts
    assert GOATConfig(rank=32, eta=0.25).scale(site) == pytest.approx(math.sqrt(0.75 * 4096 / 4))
    assert GOATConfig(alpha=16.0).scale(site) == 16.0  # the early code's


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 9}, "top_k: 9 experts cannot be picked from 8"),
        ({"top_k": 1}, "top_k: a single pick"),
        ({"rank": 12}, "rank: 12 cannot be split evenly over 8 experts"),
        ({"alpha": 16.0, "eta": 0.5}, "eta: belongs to the derived scale"),
        ({"rho": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GOATConfig(**fields)


@pytest.mark.parametrize("fields", [{"alpha": 4.0}, {"eta": 2.0, "rho": 5.0}])
def test_settings_survive_the_trip_through_a_dictionary(fields: dict[str, Any]) -> None:
    config = GOATConfig(**fields)
    assert config_from_dict(config.model_dump()) == config
