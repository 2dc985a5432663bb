"""Mixtures of gated MLPs against loops over tokens and experts, the reference numbers, and plain LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smore_cli.nn import AdapterContext
from smore_cli.nn.balance import SwitchBalanceLoss
from smore_cli.nn.gated_mlp import GatedExperts
from smore_cli.nn.low_rank import LowRank
from smore_cli.nn.selection import TopK, TopP
from smore_cli.nn.switch import SwitchRouter
from tests.nn.trees import randomise_, rows

if TYPE_CHECKING:
    from pathlib import Path

    from smore_cli.nn.selection import Selector

D, H, S, R, SCALE = 6, 10, 4, 2, 1.5
CLOSE: dict[str, float] = {"rtol": 1e-11, "atol": 1e-11}
SELECTORS: dict[str, tuple[Selector, int | None]] = {
    "top-2": (TopK(2), 2),
    "top-2 as it is": (TopK(2, renormalise=False), 2),
    "top-1": (TopK(1, renormalise=False), 1),
    "all four": (TopK(4), 4),
    "top-p": (TopP(0.7), None),
    "top-p renormalised": (TopP(0.7, renormalise=True), None),
}


class MLP(nn.Module):
    """A gated MLP, with biases, as some models have them."""

    def __init__(self, d: int = D, hidden: int = H, *, bias: bool = True) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(d, hidden, bias=bias), nn.Linear(d, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, d, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


def mlp() -> MLP:
    module = MLP().double().requires_grad_(False)
    randomise_(module)
    return module


def experts(name: str = "top-2", *, num_experts: int = S, random: bool = True, **options: Any) -> GatedExperts:
    torch.manual_seed(0)
    select, picks = SELECTORS[name]
    router = SwitchRouter(D, num_experts, select=select, init="normal")
    module = GatedExperts(D, H, rank=R, router=router, picks=picks, scale=SCALE, **options).double().eval()
    if random:
        randomise_(module)
    return module


def expert_by_hand(module: GatedExperts, base: MLP, x: Tensor, k: int) -> Tensor:
    """E_k(x) of one token from its updated weights."""
    block = slice(k * R, (k + 1) * R)
    W1 = base.gate_proj.weight + SCALE * module.gate_B[:, block] @ module.gate_A[block]
    W3 = base.up_proj.weight + SCALE * module.up_B[:, block] @ module.up_A[block]
    W2 = base.down_proj.weight + SCALE * module.down_B[:, block] @ module.down_A[block]
    gate, up = W1 @ x + base.gate_proj.bias, W3 @ x + base.up_proj.bias
    return W2 @ (gate * torch.sigmoid(gate) * up) + base.down_proj.bias


def weights_by_hand(name: str, p: list[float]) -> list[float]:
    order = sorted(range(len(p)), key=lambda k: -p[k])
    if name.startswith("top-p"):
        picked, mass = [], 0.0
        for k in order:
            if mass <= 0.7:
                picked.append(k)
            mass += p[k]
    else:
        picked = order[: {"top-2": 2, "top-2 as it is": 2, "top-1": 1, "all four": 4}[name]]
    total = sum(p[k] for k in picked) if name in ("top-2", "all four", "top-p renormalised") else 1.0
    return [p[k] / total if k in picked else 0.0 for k in range(len(p))]


@pytest.mark.parametrize("name", SELECTORS)
def test_the_mixture_is_what_a_loop_over_tokens_and_experts_gives(name: str) -> None:
    module, base, x = experts(name), mlp(), rows(12, D)
    found = module.adapted(x.view(3, 4, D), base).view(12, D)
    counts = set()
    for t in range(12):
        weights = weights_by_hand(name, torch.softmax(module.router.weight @ x[t], 0).tolist())
        counts.add(sum(w > 0 for w in weights))
        own = base(x[t])
        expected = own + sum(w * (expert_by_hand(module, base, x[t], k) - own) for k, w in enumerate(weights))
        torch.testing.assert_close(found[t], expected, **CLOSE)
        if name in ("top-2", "all four", "top-p renormalised"):  # the paper's form
            mixture = sum(w * expert_by_hand(module, base, x[t], k) for k, w in enumerate(weights))
            torch.testing.assert_close(found[t], mixture, **CLOSE)
    assert len(counts) > 1 if name.startswith("top-p") else len(counts) == 1


def test_top_2_and_top_p_equal_the_reference_numbers(shared_golden: Path) -> None:
    data = {key: torch.from_numpy(value) for key, value in np.load(shared_golden / "dynmole.npz").items()}
    base = MLP(10, 12, bias=False).double()
    for name, key in (("gate", "F_W1"), ("up", "F_W3"), ("down", "F_W2")):
        getattr(base, f"{name}_proj").weight.data = data[key]
    x, own = data["L_x"], base(data["L_x"])
    for select, picks in ((TopK(2), 2), (TopP(0.8), None)):
        router = SwitchRouter(10, 6, select=select)
        module = GatedExperts(10, 12, rank=3, router=router, picks=picks, scale=float(data["L_scale"])).double()
        router.weight.data = data["L_Wg"]
        for name, number in (("gate", 1), ("up", 3), ("down", 2)):
            getattr(module, f"{name}_A").data = data[f"F_A{number}"].flatten(0, 1)
            getattr(module, f"{name}_B").data = data[f"F_B{number}"].permute(1, 0, 2).flatten(1)
        found, gates = module.adapted(x, base), module.router(x).gates[:, 0]
        # The reference weighs the experts themselves; where weights do not sum to one, that also rescales the MLP.
        published = found - (1 - gates.sum(1, keepdim=True)) * own
        loop = torch.stack([gated_by_hand(data, k) for k in range(6)], 1)  # (32, 6, 10)
        torch.testing.assert_close(published, (gates[..., None] * loop).sum(1), rtol=1e-10, atol=1e-10)
        if picks == 2:
            torch.testing.assert_close(found, data["F_y_top2"], rtol=1e-10, atol=1e-10)


def gated_by_hand(data: dict[str, Tensor], k: int) -> Tensor:
    """E_k of every reference token."""
    W1, W2, W3 = (data[f"F_W{n}"] + data["L_scale"] * data[f"F_B{n}"][k] @ data[f"F_A{n}"][k] for n in (1, 2, 3))
    return (F.silu(data["L_x"] @ W1.T) * (data["L_x"] @ W3.T)) @ W2.T


def test_an_only_expert_is_plain_lora_on_the_three_maps() -> None:
    for name in ("all four", "top-p", "top-1"):
        module, base, x = experts(name, num_experts=1), mlp(), rows(7, D)
        module.picks = None if module.picks is None else 1
        module.router.select = TopK(1) if module.picks else TopP(0.7)

        def lora(linear: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
            plain = LowRank(A.shape[1], B.shape[0], rank=R, scale=SCALE).double()
            plain.lora_A.data, plain.lora_B.data = A, B
            return plain.adapted(x, linear)

        gate = lora(base.gate_proj, x, module.gate_A, module.gate_B)
        up = lora(base.up_proj, x, module.up_A, module.up_B)
        expected = lora(base.down_proj, F.silu(gate) * up, module.down_A, module.down_B)
        torch.testing.assert_close(module.adapted(x, base), expected, **CLOSE)


@pytest.mark.parametrize("name", ["top-2", "all four", "top-p renormalised"])
def test_with_identical_experts_and_weights_that_sum_to_one_routing_does_not_matter(name: str) -> None:
    module, base, x = experts(name), mlp(), rows(9, D)
    with torch.no_grad():
        for part in ("gate", "up", "down"):
            A, B = module.get_parameter(f"{part}_A"), module.get_parameter(f"{part}_B")
            A.copy_(A[:R].repeat(S, 1))
            B.copy_(B[:, :R].repeat(1, S))
    first, before = module.adapted(x, base), module.router(x).picked
    with torch.no_grad():
        module.router.weight.copy_(module.router.weight.flip(0))
    assert name == "all four" or not torch.equal(module.router(x).picked, before)  # type: ignore[arg-type]
    torch.testing.assert_close(module.adapted(x, base), first, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SELECTORS)
def test_a_fresh_mixture_gives_exactly_what_the_mlp_gives(name: str, dtype: torch.dtype) -> None:
    module, base = experts(name, random=False).float().train(), mlp().to(dtype)
    module = module.double() if dtype == torch.float64 else module
    x = rows(12, D).view(3, 4, D).to(dtype)
    assert torch.equal(module.adapted(x, base), base(x))


@pytest.mark.parametrize("name", SELECTORS)
def test_gradients_equal_finite_differences(name: str) -> None:
    module, base = experts(name), mlp()
    parameters = dict(module.named_parameters())

    def mixture(x: Tensor, *values: Tensor) -> Tensor:
        swapped = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(_Called(module, base), {f"module.{k}": v for k, v in swapped.items()}, (x,))

    x = rows(3, D, seed=5).requires_grad_()
    values = [parameter.detach().clone().requires_grad_() for parameter in parameters.values()]
    assert torch.autograd.gradcheck(mixture, (x, *values), eps=1e-6, atol=1e-7, fast_mode=True)


class _Called(nn.Module):
    """Makes `adapted` the forward of a module, for `functional_call`."""

    def __init__(self, module: GatedExperts, base: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.base = [base]

    def forward(self, x: Tensor) -> Tensor:
        return self.module.adapted(x, self.base[0])


@pytest.mark.parametrize("coefficient", [None, 0.1])
def test_the_parameters_without_a_first_gradient_are_those_declared(coefficient: float | None) -> None:
    losses = [] if coefficient is None else [SwitchBalanceLoss(coefficient)]
    for name in ("top-2", "top-p"):
        module, base, x = experts(name, random=False, losses=losses).train(), mlp(), rows(40, D)
        with AdapterContext() as context:
            out = module.adapted(x, base)
        (out.square().sum() + context.aux_loss()).backward()
        silent = {key for key, p in module.named_parameters() if p.grad is None or not p.grad.any()}
        assert silent == module.silent_at_start()
        assert ("router.weight" in silent) == (coefficient is None)


def test_the_expert_axes_are_where_the_experts_lie() -> None:
    module, base, x = experts("top-2"), mlp(), rows(1, D)
    picked = module.router(x).picked[0, 0]  # type: ignore[index]
    module.adapted(x, base).square().sum().backward()
    assert set(module.expert_axes) == {name for name, _ in module.named_parameters() if name != "router.weight"}
    for name, (level, dim) in module.expert_axes.items():
        slices = module.get_parameter(name).grad.chunk(S, dim)  # type: ignore[union-attr]
        assert level == 0 and [bool(part.any()) for part in slices] == picked.tolist(), name


def test_only_the_inputs_are_kept_for_the_backward_pass() -> None:
    """Of the experts' hidden states nothing is saved: not more than the MLP alone would keep, whatever the experts."""
    d, hidden, n = 16, 64, 128
    router = SwitchRouter(d, 8, select=TopK(2))
    module, base = GatedExperts(d, hidden, rank=2, router=router, picks=2), MLP(d, hidden)
    base.requires_grad_(False)
    wide: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape == (n, hidden):
            wide.add(tensor.data_ptr())
        return tensor

    x = torch.randn(n, d, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module.adapted(x, base)
    assert out.requires_grad and len(wide) <= 2  # W1 x and W3 x


def test_dropout_acts_in_training_alone_and_its_mask_survives_recomputation() -> None:
    module, base, x = experts(dropout=0.5), mlp(), rows(5, D)
    assert torch.equal(module.adapted(x, base), experts().adapted(x, base))
    module.train()
    torch.manual_seed(1)
    a = module.adapted(x, base)
    torch.manual_seed(1)
    assert torch.equal(module.adapted(x, base), a)
    assert not torch.equal(module.adapted(x, base), a)
    # Linear in down_B, so the gradient must be the very latent the forward pass used.
    torch.manual_seed(1)
    (slope,) = torch.autograd.grad(module.adapted(x, base).sum(), module.down_B)
    with torch.no_grad():
        module.down_B[0, 0] += 1.0
    torch.manual_seed(1)
    torch.testing.assert_close(module.adapted(x, base).sum() - a.sum(), slope[0, 0], **CLOSE)


def test_an_output_alone_is_refused() -> None:
    with pytest.raises(TypeError, match="call adapted"):
        experts()(rows(2, D), rows(2, D))
