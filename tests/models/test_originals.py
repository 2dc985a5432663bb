"""Adapters of other programs, converted: what is loaded computes what the other program's formula says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch

from smore_cli.methods.smore import SMoREConfig
from smore_cli.models.adapter_files import load_adapter
from smore_cli.models.originals import import_adapter
from smore_cli.models.runs import open_run
from smore_cli.nn import AdapterContext, adapted_modules
from tests.models.original_adapters import (
    FFN,
    mixlora_tensors,
    moe_peft_values,
    plugin_tensors,
    smore_tensors,
    smore_values,
    trex_tensors,
    trex_values,
    write,
)
from tests.nn.models import llama, logits, token_ids
from tests.nn.oracle import Oracle

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn import AdaptedModule

SCALE = 2.0  # alpha 6 over r 3
CLOSE: dict[str, float] = {"rtol": 1e-9, "atol": 1e-9}


def loaded(tiny_llama: Path, adapter: Path, out: Path, **options: Any) -> dict[str, AdaptedModule]:
    """Converts an adapter, loads the result, and returns its modules in float64."""
    import_adapter(adapter, out, **options)
    model = llama(tiny_llama)
    load_adapter(model, out)
    return adapted_modules(model.double())


def rows(d: int, n: int = 6) -> Tensor:
    return torch.randn(1, n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def softmax(values: Tensor) -> list[float]:
    exps = [math.exp(float(value)) for value in values]
    return [value / sum(exps) for value in exps]


def expert(tensors: dict[str, Tensor], prefix: str, e: int, x: Tensor) -> Tensor:
    """(alpha / r) B_e A_e x of MoE-PEFT's experts."""
    A, B = (tensors[f"{prefix}.experts.{e}.lora_{half}.weight"].double() for half in "AB")
    return SCALE * (B @ (A @ x))


def mola_weights(p: list[float]) -> list[float]:
    best = sorted(range(len(p)), key=lambda e: -p[e])[:2]
    return [p[e] / sum(p[b] for b in best) if e in best else 0.0 for e in range(len(p))]


def dynmole_weights(p: list[float], *, q: float = 1.1, eps: float = 1e-5, top_p: float = 0.9) -> list[float]:
    """The released code's order of operations, entropy_threshold 0.8 and keep_top_k 1."""
    highest = (1 - len(p) ** (1 - q)) / (q - 1)
    entropy = (1 - sum((value + eps) ** q for value in p)) / (q - 1) / highest
    if entropy > 0.8:
        return p
    mass, weights = 0.0, [0.0] * len(p)
    for place, e in enumerate(sorted(range(len(p)), key=lambda e: -p[e])):
        mass += p[e]
        if mass <= top_p or place < 1:
            weights[e] = p[e]
    return weights


DYNMOLE = {
    "routing_strategy": "dynmole",
    "entropy_threshold": 0.8,
    "entropy_index": 1.1,
    "entropy_eps": 1e-5,
    "keep_top_k": 1,
    "top_p": 0.9,
}


@pytest.mark.parametrize(
    ("method", "settings", "weights"),
    [("mola", {"routing_strategy": "mola", "top_k": 2}, mola_weights), ("dynmole", DYNMOLE, dynmole_weights)],
)
def test_a_mola_or_dynmole_adapter_computes_its_original_formula(
    tiny_llama: Path, tmp_path: Path, method: str, settings: dict[str, Any], weights: Any
) -> None:
    targets = ("up_proj", "down_proj", "v_proj")
    tensors = plugin_tensors(method, targets)
    values = moe_peft_values(tiny_llama, method.upper(), targets, **settings)
    modules = loaded(tiny_llama, write(tmp_path / "theirs", values, tensors), tmp_path / "ours")
    assert len(modules) == 6
    sizes = set()
    for path, module in modules.items():
        prefix = path.replace("model.", f"{method}.", 1)
        x = rows(module.base.in_features)  # type: ignore[arg-type]
        expected = module.base(x).clone()
        for n, token in enumerate(x[0]):
            w = weights(softmax(tensors[f"{prefix}.moe_gate.weight"].double() @ token))
            sizes.add(sum(value > 0 for value in w))
            for e, value in enumerate(w):
                expected[0, n] += value * expert(tensors, prefix, e, token)
        torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-6)  # routers are float32 or wider
    assert sizes == ({2} if method == "mola" else {1, 2, 4})  # every branch of the router was taken


@pytest.mark.parametrize("legacy", [False, True])
def test_a_mixlora_adapter_computes_its_original_formula(tiny_llama: Path, tmp_path: Path, legacy: bool) -> None:
    values = moe_peft_values(
        tiny_llama, "MIXLORA", (*FFN, "q_proj"), routing_strategy="mixtral" if legacy else "mixlora", act_fn="silu"
    )
    if legacy:
        values["target_modules"] = ["w1_proj", "w2_proj", "w3_proj", "q_proj"]
    adapter = write(tmp_path / "theirs", values, mixlora_tensors(legacy=legacy))
    tensors = mixlora_tensors()
    modules = loaded(tiny_llama, adapter, tmp_path / "ours")
    assert len(modules) == 4
    for layer in range(2):
        attention = modules[f"model.layers.{layer}.self_attn.q_proj"]
        x = rows(32)
        A, B = (tensors[f"mixlora.layers.{layer}.self_attn.q_proj.lora_{half}.weight"].double() for half in "AB")
        torch.testing.assert_close(attention(x), attention.base(x) + SCALE * x @ A.T @ B.T, **CLOSE)
        module = modules[f"model.layers.{layer}.mlp"]
        mlp: Any = module.base
        prefix, expected = f"mixlora.layers.{layer}.mlp", torch.zeros_like(x)
        for n, token in enumerate(x[0]):
            p = softmax(tensors[f"{prefix}.moe_gate.weight"].double() @ token)
            best = sorted(range(4), key=lambda e: -p[e])[:2]
            for e in best:
                gate = mlp.gate_proj(token) + expert(tensors, f"{prefix}.gate_proj", e, token)
                up = mlp.up_proj(token) + expert(tensors, f"{prefix}.up_proj", e, token)
                hidden = gate * torch.sigmoid(gate) * up
                out = mlp.down_proj(hidden) + expert(tensors, f"{prefix}.down_proj", e, hidden)
                expected[0, n] += p[e] / sum(p[b] for b in best) * out
        torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-6)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"gate_type": "noisy_topk", "num_active": [1, 2], "lora_alpha": [4.0, 3.0]},
    {"gate_type": "dense", "expert_act_fn": "prelu|0.25", "gate_act_fn": "prelu|0.1"},
    {"is_shared_expert_pool": True, "num_experts": [3, 3], "expert_dims": [2, 2], "activation_position": "child_v2"},
    {"num_experts": [4], "num_active": [1], "expert_dims": [3], "gate_dims": [5], "expert_act_fn": "identity"},
]


def by_our_names(module: dict[str, Tensor]) -> dict[str, Tensor]:
    """One module's tensors as the oracle reads them."""
    heads = {"A": "A", "A_bias": "a", "B": "B", "B_bias": "b", "W": "W", "W_bias": "w"}
    params = {}
    for name, tensor in module.items():
        head, _, rest = name.removeprefix("moe_").partition(".")
        if head in heads:
            params[f"{heads[head]}.{int(rest) - (head[0] == 'W')}"] = tensor.double()
        elif head == "gate":
            inner = rest.replace("weight_noise.weight", "noise")
            params[f"router.levels.{inner}"] = tensor.double()
        elif head == "downproj_x":
            params[f"router.down.{rest}"] = tensor.double()
        elif head == "expert_act_param":
            params[f"act.{rest}.weight"] = tensor.double()
        else:
            params["p" if head.endswith("bias") else "P"] = tensor.double()
    return params


@pytest.mark.parametrize("variant", VARIANTS, ids=["switch", "noisy", "dense-prelu", "shared", "one-layer"])
def test_a_smore_adapter_computes_its_original_formula(
    tiny_llama: Path, tmp_path: Path, variant: dict[str, Any]
) -> None:
    values = smore_values(tiny_llama, **variant)
    tensors = smore_tensors(values)
    modules = loaded(tiny_llama, write(tmp_path / "theirs", values, tensors, pickled=False), tmp_path / "ours")
    assert len(modules) == 6
    config = SMoREConfig(
        rank=values["expert_dims"],
        num_experts=values["num_experts"],
        fanout=values["num_active"],
        gate=values["gate_type"],
        activation=values["expert_act_fn"].split("|")[0],
        router_activation=values["gate_act_fn"].split("|")[0],
        activation_position=values["activation_position"],
        shared_pool=values["is_shared_expert_pool"],
        alpha=values["lora_alpha"],
    )
    for path, module in list(modules.items())[-3:]:
        prefix = f"base_model.model.{path}."
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        x = rows(module.base.in_features, 4)  # type: ignore[arg-type]
        update = Oracle(config, by_our_names(own))(x[0])
        torch.testing.assert_close(module(x), module.base(x) + update[None], **CLOSE)


def test_a_trex_adapter_computes_its_original_formula(tiny_llama: Path, tmp_path: Path) -> None:
    tensors, centroids = trex_tensors(), torch.randn(6, 7)
    torch.save(centroids, tmp_path / "centroids.pt")
    adapter = write(tmp_path / "theirs", trex_values(tiny_llama), tensors)
    options = {"centroids": tmp_path / "centroids.pt", "embedder": "some/embedder"}
    modules = loaded(tiny_llama, adapter, tmp_path / "ours", **options)
    assert len(modules) == 4
    prior = torch.rand(1, 6, dtype=torch.float64)
    for path, module in modules.items():
        names = ("lora_A", "lora_B", "router", "omg", "binary_main_gate_weight")
        A, B, R, omega, g = (tensors[f"base_model.model.{path}.{name}.weight"].double() for name in names)
        lam, gam = (1 / (1 + math.exp(-100 * float(value))) for value in (omega, g))
        x = rows(32)
        expected = module.base(x).clone()
        for n, token in enumerate(x[0]):
            p = softmax(R @ token)
            for i in range(2):
                for j in range(3):
                    pi = 32 * lam * p[3 * i + j] + 4 * (1 - lam) * float(prior[0, 3 * i + j])
                    expected[0, n] += gam * pi * float(A[i] @ token) * B[:, j]
        with AdapterContext(prior=prior):
            torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    config = open_run(tmp_path / "ours").adapter.values
    assert (config["embedder"], config["num_down"], config["num_up"]) == ("some/embedder", 2, 3)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by PEFT
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_a_pickled_adapter_of_pefts_becomes_a_safe_one(
    tiny_llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    theirs: Any = llama(tiny_llama)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj"], **settings))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=False)
    ids = token_ids(2, 7)
    import_adapter(tmp_path / "theirs", tmp_path / "ours", base=str(tiny_llama))
    ours = llama(tiny_llama)
    load_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(logits(ours, ids), logits(theirs.eval(), ids), rtol=1e-4, atol=1e-5)
    again = peft.PeftModel.from_pretrained(llama(tiny_llama), tmp_path / "ours")  # type: ignore[arg-type]
    torch.testing.assert_close(logits(again.eval(), ids), logits(ours, ids), rtol=1e-4, atol=1e-5)


def test_what_was_found_and_what_was_assumed_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = write(
        tmp_path / "theirs",
        moe_peft_values(tiny_llama, "MOLA", ("v_proj",), top_k=3),
        plugin_tensors("mola", ("v_proj",)),
    )
    done = import_adapter(adapter, tmp_path / "ours")
    assert (done.config.method, done.config.target_modules) == ("mola", ["v_proj"])
    assert (done.modules, done.tensors, done.base.name_or_path) == (2, 18, str(tiny_llama))
    assert done.parameters == 2 * 4 * (3 * (32 + 16) + 32)
    assert done.assumed == {"aux_loss_coefficient": 1e-3}
    assert sorted(file.name for file in done.out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_rank_stabilised_experts_keep_their_scale(tiny_llama: Path, tmp_path: Path) -> None:
    values = moe_peft_values(tiny_llama, "MOLA", ("v_proj",), use_rslora=True)
    done = import_adapter(write(tmp_path / "theirs", values, plugin_tensors("mola", ("v_proj",))), tmp_path / "ours")
    settings: Any = done.config
    assert settings.alpha / settings.rank == pytest.approx(6 / math.sqrt(3))
