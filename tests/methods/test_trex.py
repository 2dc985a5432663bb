"""T-REX's layer against its equation, written out as sums, and the identities that follow from it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError

from smore_cli.errors import AdapterError
from smore_cli.methods import Site, config_from_dict
from smore_cli.methods.trex import TRexConfig, from_original
from smore_cli.nn import AdapterContext
from smore_cli.nn.routed_grid import grid

if TYPE_CHECKING:
    from smore_cli.nn.prior import PriorBank

Tensor = torch.Tensor
B, S, D_IN, D_OUT = 2, 4, 10, 7
EXACT: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}


def layer(seed: int = 0, **fields: Any) -> PriorBank:
    """Returns a float64 layer, 2 x 3 unless told, whose every number is random."""
    config = TRexConfig(**{"num_down": 2, "num_up": 3, **fields})
    bank: PriorBank = config.build(Site("site", D_IN, D_OUT)).double()  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in bank.named_parameters():
            size = 0.004 if name in ("router.omega", "router.g") else 0.5
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return bank


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update(bank: PriorBank, x: Tensor, prior: Tensor | None = None) -> Tensor:
    with AdapterContext(aux=False, prior=prior):
        return bank(x, x.new_zeros(*x.shape[:-1], D_OUT))


@torch.no_grad()
def oracle(bank: PriorBank, x: Tensor, prior: Tensor | None, *, token: float, task: float, kappa: float) -> Tensor:
    """y_t = gam sum_ij pi_t[i,j] b_j <a_i, x_t>, one number after another; R reads x, or A x where it is as narrow."""
    r1, r2 = len(bank.A), bank.B.shape[1]
    lam, gam = (1 / (1 + math.exp(-kappa * float(v))) for v in (bank.router.omega, bank.router.g))
    y = torch.zeros(*x.shape[:-1], D_OUT, dtype=torch.float64)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            h = [sum(float(bank.A[i, n] * x[b, t, n]) for n in range(D_IN)) for i in range(r1)]
            seen = x[b, t].tolist() if bank.router.weight.shape[1] == D_IN else h
            logits = [sum(float(w) * v for w, v in zip(row, seen, strict=True)) for row in bank.router.weight]
            exps = [math.exp(z) for z in logits]
            for i in range(r1):
                for j in range(r2):
                    k = i * r2 + j
                    weight = token * lam * exps[k] / sum(exps)
                    if prior is not None:
                        weight += task * (1 - lam) * float(prior[b, k])
                    for m in range(D_OUT):
                        y[b, t, m] += gam * weight * float(bank.B[m, j]) * h[i]
    return y


@pytest.mark.parametrize("with_prior", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_down": 3, "num_up": 1},
        {"router_input": "latent"},
        {"token_scale": 32.0, "prior_scale": 0.5, "gate_sharpness": 7.0},
    ],
)
def test_the_layer_is_the_double_sum_over_pairs(fields: dict[str, Any], with_prior: bool) -> None:
    bank = layer(**fields, on_missing_prior="zero")
    k = len(bank.router.weight)
    x, prior = numbers(B, S, D_IN), numbers(B, k, seed=2) if with_prior else None
    constants = {"token": fields.get("token_scale", float(k)), "task": fields.get("prior_scale", 4.0)}
    wanted = oracle(bank, x, prior, **constants, kappa=fields.get("gate_sharpness", 100.0))
    torch.testing.assert_close(update(bank, x, prior), wanted, **EXACT)


def test_pairs_are_counted_row_by_row() -> None:
    latent, gates = numbers(5, 2), numbers(5, 1, 6)
    wanted = torch.einsum("ni,nij->nj", latent, gates.view(5, 2, 3))
    torch.testing.assert_close(grid(latent, gates), wanted, **EXACT)
    transposed = torch.einsum("ni,nji->nj", latent, gates.view(5, 3, 2))
    assert not torch.allclose(transposed, wanted, atol=1e-3)


def test_gradients_equal_finite_differences() -> None:
    bank, x, prior = layer(), numbers(B, S, D_IN).requires_grad_(), numbers(B, 6, seed=2).requires_grad_()
    names, values = zip(*bank.named_parameters(), strict=True)
    y = numbers(B, S, D_OUT, seed=3)

    def outputs(x: Tensor, prior: Tensor, *parameters: Tensor) -> Tensor:
        with AdapterContext(aux=False, prior=prior):
            return torch.func.functional_call(bank, dict(zip(names, parameters, strict=True)), (x, y))

    inputs = (x, prior, *(value.detach().clone().requires_grad_() for value in values))
    assert torch.autograd.gradcheck(outputs, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


# A fresh adapter.


def test_a_fresh_adapter_changes_nothing_and_only_b_has_a_gradient() -> None:
    bank = TRexConfig(num_down=2, num_up=3).build(Site("site", D_IN, D_OUT))
    x, y = numbers(B, S, D_IN).float(), numbers(B, S, D_OUT).float()
    with AdapterContext(aux=False, prior=numbers(B, 6).float()):
        out = bank(x, y)
    assert torch.equal(out, y)
    out.square().sum().backward()
    reached = {name for name, p in bank.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"B"} == {name for name, _ in bank.named_parameters()} - bank.silent_at_start()


@pytest.mark.parametrize("k", [(4, 8), (2, 3)])
def test_at_the_start_a_pair_weighs_half_of_one_half_plus_twice_its_prior(k: tuple[int, int]) -> None:
    bank = TRexConfig(num_down=k[0], num_up=k[1]).build(Site("site", D_IN, D_OUT))
    prior = numbers(B, k[0] * k[1]).float()
    traces: list[Any] = []
    with AdapterContext(aux=False, observe=traces.append, prior=prior):
        bank(numbers(B, S, D_IN).float(), torch.zeros(B, S, D_OUT))
    gates = traces[0].gates.view(B, S, -1)
    torch.testing.assert_close(gates, (0.5 * (0.5 + 2 * prior))[:, None].expand_as(gates))


# Identities.


def gates_of(bank: PriorBank, x: Tensor, prior: Tensor) -> Tensor:
    traces: list[Any] = []
    with AdapterContext(aux=False, observe=traces.append, prior=prior):
        bank(x, x.new_zeros(*x.shape[:-1], D_OUT))
    return traces[0].gates.view(*x.shape[:2], -1)  # type: ignore[no-any-return]


def test_one_token_has_low_rank_and_all_of_them_span_every_pair() -> None:
    bank, x, prior = layer(), numbers(1, 40, D_IN), numbers(1, 6, seed=2)
    pairs = gates_of(bank, x, prior)[0].view(40, 2, 3)
    matrices = torch.einsum("mj,tij,in->tmn", bank.B.detach(), pairs, bank.A.detach())
    assert {int(torch.linalg.matrix_rank(matrix)) for matrix in matrices} == {2}
    assert int(torch.linalg.matrix_rank(matrices.flatten(1))) == 6
    torch.testing.assert_close(torch.einsum("tmn,tn->tm", matrices, x[0]), update(bank, x, prior)[0], **EXACT)


def test_the_mix_decides_between_the_token_and_the_prior() -> None:
    bank, x, prior = layer(), numbers(B, S, D_IN), numbers(B, 6, seed=2)
    with torch.no_grad():
        bank.router.omega.fill_(5)
    assert torch.equal(update(bank, x, prior), update(bank, x, 7 * prior))
    with torch.no_grad():
        bank.router.omega.fill_(-5)
    both = update(bank, x, prior) + update(bank, 2 * x.flip(1), prior)
    torch.testing.assert_close(update(bank, x + 2 * x.flip(1), prior), both, **EXACT)
    for b in range(B):  # so that it can be merged for each sequence: gam c_task B S^T A
        gam = torch.sigmoid(100 * bank.router.g)
        delta = gam * 4 * bank.B @ prior[b].view(2, 3).T @ bank.A
        torch.testing.assert_close(update(bank, x, prior)[b], x[b] @ delta.T, **EXACT)


def test_the_output_is_affine_in_the_prior_and_zero_is_no_prior() -> None:
    bank, x, s, t = layer(on_missing_prior="zero"), numbers(B, S, D_IN), numbers(B, 6, seed=2), numbers(B, 6, seed=3)
    zero = update(bank, x, torch.zeros_like(s))
    both = update(bank, x, s) + update(bank, x, t) - zero
    torch.testing.assert_close(update(bank, x, s + t), both, **EXACT)
    assert torch.equal(update(bank, x), zero)
    ablated = layer(prior="none")
    torch.testing.assert_close(update(ablated, x, s), zero, **EXACT)


def test_gates_add_up_and_a_shift_of_all_logits_changes_nothing() -> None:
    bank, x, prior = layer(), numbers(B, S, D_IN), numbers(B, 6, seed=2)
    lam, gam = torch.sigmoid(100 * bank.router.omega), torch.sigmoid(100 * bank.router.g)
    wanted = gam * (6 * lam + 4 * (1 - lam) * prior.sum(1))
    torch.testing.assert_close(gates_of(bank, x, prior).sum(-1), wanted[:, None].expand(B, S), **EXACT)
    before = update(bank, x, prior)
    with torch.no_grad():
        bank.router.weight.add_(numbers(D_IN, seed=9))
    torch.testing.assert_close(update(bank, x, prior), before, **EXACT)


def test_one_pair_with_the_token_alone_is_a_scaled_rank_one_lora() -> None:
    bank, x = layer(num_down=1, num_up=1, token_scale=3.0), numbers(B, S, D_IN)
    with torch.no_grad():
        bank.router.omega.fill_(5)
    gam = torch.sigmoid(100 * bank.router.g)
    torch.testing.assert_close(update(bank, x, numbers(B, 1)), 3 * gam * x @ bank.A.T @ bank.B.T, **EXACT)


def test_the_grid_is_a_sum_of_rank_one_experts_and_of_unit_cores() -> None:
    bank, x, prior = layer(), numbers(B, S, D_IN), numbers(B, 6, seed=2)
    gates = gates_of(bank, x, prior)
    experts = torch.zeros(B, S, D_OUT, dtype=torch.float64)
    cores = torch.zeros(B, S, 3, dtype=torch.float64)
    for k in range(6):
        i, j = divmod(k, 3)
        experts += gates[..., k, None] * (x @ bank.A[i])[..., None] * bank.B[:, j]
        unit = torch.zeros(2, 3, dtype=torch.float64)
        unit[i, j] = 1
        cores += gates[..., k, None] * (x @ bank.A.T @ unit)
    torch.testing.assert_close(update(bank, x, prior), experts, **EXACT)
    torch.testing.assert_close(update(bank, x, prior), cores @ bank.B.T, **EXACT)


# One prior a sequence.


def test_the_prior_moves_with_its_sequence_and_is_not_changed() -> None:
    bank, x, prior = layer(), numbers(3, S, D_IN), numbers(3, 6, seed=2)
    before, order = prior.clone(), torch.tensor([2, 0, 1])
    out = update(bank, x, prior)
    torch.testing.assert_close(update(bank, x[order], prior[order]), out[order], **EXACT)
    assert not torch.allclose(update(bank, x, prior[order]), out, atol=1e-3)
    assert torch.equal(prior, before)
    torch.testing.assert_close(update(bank, x[:, :2], prior), out[:, :2], **EXACT)


@pytest.mark.parametrize("shape", [(1, 6), (4, 6), (2, 5), (2, 1, 6)])
def test_a_prior_for_another_batch_is_never_stretched(shape: tuple[int, ...]) -> None:
    with pytest.raises(AdapterError, match="prior"):
        update(layer(), numbers(B, S, D_IN), numbers(*shape))


def test_without_a_prior_the_policy_decides() -> None:
    x = numbers(B, S, D_IN)
    with pytest.raises(AdapterError, match="needs the prior of every sequence"):
        update(layer(), x)
    uniform = torch.full((B, 6), 1 / 6, dtype=torch.float64)
    torch.testing.assert_close(update(layer(on_missing_prior="uniform"), x), update(layer(), x, uniform), **EXACT)


def test_the_router_sees_its_input_without_dropout() -> None:
    bank, x, prior = layer(dropout=0.5).train(), numbers(B, S, D_IN), numbers(B, 6, seed=2)
    assert torch.equal(gates_of(bank, x, prior), gates_of(bank, x, prior))
    assert not torch.equal(update(bank, x, prior), update(bank, x, prior))


# Settings and names.


@pytest.mark.parametrize("fields", [{}, {"router_input": "latent"}, {"num_down": 3, "num_up": 5}, {"prior": "none"}])
def test_the_parameter_formula_counts_the_parameters(fields: dict[str, Any]) -> None:
    config = TRexConfig(**fields)
    with torch.device("meta"):
        for n, m in ((10, 7), (4096, 11008)):
            site = Site("site", n, m)
            assert config.num_parameters(site) == sum(p.numel() for p in config.build(site).parameters())


def test_llama_2_7b_has_the_released_number_and_a_third_of_it_with_a_latent_router() -> None:
    maps = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
    sites = [Site("site", n, m) for n, m in maps] * 32
    assert sum(TRexConfig().num_parameters(site) for site in sites) == 51_872_192
    assert sum(TRexConfig(router_input="latent").num_parameters(site) for site in sites) == 15_462_848
    assert sum(4 * n + 8 * m + 32 * n + 2 for n, m in maps) * 32 == 51_872_192


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embedder_prefix": "query: "}, "embedder_prefix: only a sentence embedder"),
        ({"embedder_revision": "main"}, "embedder_revision: only a sentence embedder"),
        ({"centroids": "c.npy", "kmeans_seed": 1}, "kmeans_seed: nothing is clustered"),
        ({"kmeans_max_prompts": 31}, "kmeans_max_prompts: 31 prompts cannot make the num_down num_up = 32"),
        ({"prior": "none", "embedder": "some/model"}, "embedder: nothing reads it with prior: none"),
        ({"prior": "none", "kmeans_n_init": 9}, "kmeans_n_init: nothing reads it"),
        ({"prior": "none", "prior_scale": 2.0}, "prior_scale: nothing reads it"),
        ({"num_down": 0}, "num_down"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TRexConfig(**fields)


@pytest.mark.parametrize("fields", [{}, {"prior": "none"}, {"centroids": "c.pt", "embedder": "x/y"}])
def test_settings_survive_the_trip_through_a_dictionary(fields: dict[str, Any]) -> None:
    config = TRexConfig(**fields)
    assert config_from_dict(config.model_dump(mode="json")) == config


def test_names_of_the_released_layout_are_read() -> None:
    saved = {
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 10),
        "model.layers.0.mlp.up_proj.lora_B.default.weight": torch.ones(7, 3),
        "router.modules_to_save.default.weight": torch.ones(6, 10),
        "omg.weight": torch.full((1, 1), 2.0),
        "binary_main_gate_weight.weight": torch.full((1, 1), 3.0),
    }
    found = from_original(saved)
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    path = "model.layers.0.mlp.up_proj"
    assert shapes == {
        f"{path}.A": (2, 10), f"{path}.B": (7, 3), "router.weight": (6, 10), "router.omega": (1,), "router.g": (1,),
    }  # fmt: skip
    assert found["router.omega"].item() == 2 and found["router.g"].item() == 3
    for wrong in ("lora_C.weight", "lora_A.bias", "router_map.weight"):
        with pytest.raises(AdapterError, match=f"'{wrong}' is not a tensor"):
            from_original({wrong: torch.ones(1)})
