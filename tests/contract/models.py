"""Every method on every architecture: tiny random models, made once and copied, with the adapter's default settings."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from smore_cli.data.batch import Batch, Row, collate
from smore_cli.errors import AdapterError
from smore_cli.methods import MethodConfig, available_methods, load_method
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.smore import SMoREConfig
from smore_cli.models.forward import target_logits
from smore_cli.nn import AdapterContext, adapted_modules, attach
from smore_cli.nn.attach import find_targets
from smore_cli.nn.prior_hooks import active_prior
from tests.nn.trees import randomise_

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from smore_cli.nn import Adapter
    from smore_cli.nn.context import RoutingTrace

VOCABULARY, PAD = 64, 0

# Widths that differ wherever they can; weights ten times as large as usual, so that a narrow model says something.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}
_MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES, tie_word_embeddings=True)),  # biases on q, k and v
    "gpt2": lambda: GPT2LMHeadModel(  # Conv1D, biases, tied embeddings
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_inner=48, n_layer=2, n_head=4, initializer_range=0.2,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=2, pad_token_id=PAD,
        )
    ),
}  # fmt: skip
ARCHITECTURES = list(_MODELS)

# Settings that take other paths through a method's code than its default does.
_SMALL_TREE: dict[str, Any] = {"router_dim": 4, "key_dim": 4, "rank": [2, 2]}
VARIANTS: dict[str, MethodConfig] = {
    "dora": LoRAConfig(use_dora=True, rank=4),
    "smore noisy shared": SMoREConfig(
        gate="noisy_topk", shared_pool=True, num_experts=[3, 3], fanout=[1, 2], **_SMALL_TREE
    ),
    "smore dense prelu": SMoREConfig(gate="dense", activation="prelu", router_activation="prelu", **_SMALL_TREE),
}


# What a method learns from the training data before its first step is missing here: T-REX has no centroids.
_WITHOUT_DATA: dict[str, dict[str, Any]] = {"trex": {"on_missing_prior": "zero"}}


@functools.cache
def backbone(architecture: str) -> nn.Module:
    """Returns the bare model, frozen, in evaluation mode; nobody changes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _MODELS[architecture]()
        with torch.no_grad():  # biases are born zero, and a term that is zero is not tested
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
    return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class Case:
    """A method (or a variant of one) on an architecture.

    Attributes:
        architecture: name of the backbone.
        config: the adapter's settings.
    """

    architecture: str
    config: MethodConfig

    def bare(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Returns a backbone of one's own."""
        model = copy.deepcopy(backbone(self.architecture)).to(dtype)
        if dtype == torch.float64:  # those of transformers compute in float32, whatever they are given
            for path, module in list(model.named_modules()):
                if type(module).__name__.endswith("RMSNorm"):
                    norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=dtype)  # type: ignore
                    norm.weight = module.weight
                    model.set_submodule(path, norm)
        return model

    def fresh(self, dtype: torch.dtype = torch.float32, *, seed: int = 0, **changes: Any) -> nn.Module:
        """Returns a backbone with a freshly initialised adapter (float32, or float64 with a float64 backbone)."""
        model = self.bare(dtype)
        attached(model, self.config.model_copy(update=changes), seed=seed)
        if dtype == torch.float64:
            model.double()
        return model

    def random(self, dtype: torch.dtype = torch.float32, *, seed: int = 0, **changes: Any) -> nn.Module:
        """Returns a backbone with an adapter whose every parameter is random."""
        return randomised(self.fresh(dtype, **changes), seed=seed)

    @property
    def without_dropout(self) -> dict[str, Any]:
        """Changes that switch off the method's dropout, if it has any."""
        return {"dropout": 0.0} if "dropout" in type(self.config).model_fields else {}


def attached(model: nn.Module, config: MethodConfig, *, name: str = "default", seed: int = 0) -> nn.Module:
    """Attaches an adapter, ready to be called: a prior gets centroids, as training would have found them."""
    attach(model, config, name=name, seed=seed)
    if (prior := active_prior(model)) is not None:
        width = prior.embedder(model, [[3]]).shape[1]
        generator = torch.Generator().manual_seed(2)
        prior.centroids = F.normalize(torch.randn(prior.num_experts, width, generator=generator), dim=1)
    return model


def default_config(method: str) -> MethodConfig:
    """Returns a method's settings as a recipe that says nothing has them."""
    if method in VARIANTS:
        return VARIANTS[method]
    return load_method(method).model_validate({"method": method, **_WITHOUT_DATA.get(method, {})})


def cases() -> Iterator[tuple[str, Case]]:
    """Yields every method on every architecture that it can adapt, and the variants on one, with a name for it."""
    for method in [*available_methods(), *VARIANTS]:
        config = default_config(method)
        for architecture in ["gpt2"] if method in VARIANTS else ARCHITECTURES:
            if "gated_mlp" in config.sites and architecture == "gpt2":
                continue  # `test_start.py` has a test that it is refused
            yield f"{method}-{architecture}", Case(architecture, on(architecture, config))


def on(architecture: str, config: MethodConfig) -> MethodConfig:
    """Returns the settings, with all linear maps as targets where the architecture lacks the named ones."""
    try:
        find_targets(backbone(architecture), config.target_modules, config.sites)
    except AdapterError:
        return config.model_copy(update={"target_modules": "all-linear"})
    return config


def adapters(model: nn.Module, name: str = "default") -> dict[str, Adapter]:
    """Returns an adapter's parts by module path."""
    return {path: module.adapter(name) for path, module in adapted_modules(model).items() if name in module.adapters}


def randomised(model: nn.Module, name: str = "default", *, seed: int = 0) -> nn.Module:
    """Gives every parameter of an adapter random values, so that no term of its equation is silently zero."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for adapter in adapters(model, name).values():
            randomise_(adapter)
            for parameter in adapter.parameters():
                parameter.mul_(0.5)
    return model


# Data.


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    """Returns random tokens, none of them special."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def rows(count: int = 8, seed: int = 0) -> list[Row]:
    """Returns rows of a prompt and an answer, of uneven lengths, in two groups."""
    found = []
    for i in range(count):
        prompt, answer = token_ids(3 + i % 4, seed=seed + i).tolist(), token_ids(2 + i % 3, seed=99 + i).tolist()
        found.append(Row(prompt, [answer], [[True] * len(answer)], group=i % 2))
    return found


def batch(count: int = 8) -> Batch:
    """Returns rows as one forward pass."""
    return collate(rows(count), pad_token_id=PAD)


# Passes.


def logits(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **inputs: Any) -> Tensor:
    """Returns all logits (B, S, vocabulary), without gradients."""
    with torch.no_grad():
        return forward(model, ids, mask, **inputs).logits  # type: ignore[no-any-return]


def forward(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **inputs: Any) -> Any:
    """Runs the model as evaluation does; the first three tokens of a row are its prompt."""
    real = torch.ones_like(ids) if mask is None else mask
    with AdapterContext(token_mask=mask, aux=False, prompt_mask=real.bool() & (real.cumsum(1) <= 3)):
        return model(input_ids=ids, attention_mask=mask, **inputs)


def context_of(data: Batch, observe: Callable[[RoutingTrace], None] | None = None) -> AdapterContext:
    """Returns the context of a training pass."""
    return AdapterContext(token_mask=data.token_mask, groups=data.groups, prompt_mask=data.prompt_mask, observe=observe)


def loss_of(model: nn.Module, data: Batch, observe: Callable[[RoutingTrace], None] | None = None) -> Tensor:
    """Returns the loss of one pass, auxiliary losses included, in the model's own precision."""
    with context_of(data, observe) as context:
        found = target_logits(model, data)
    loss = F.cross_entropy(found if found.dtype == torch.float64 else found.float(), data.targets)
    return loss + context.aux_loss().to(loss.dtype)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Returns the gradients of all trainable parameters by name (zeros where there is none), and clears them."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            parameter.grad = None
    return found


def kind(name: str) -> str:
    """Returns a parameter's name within its adapter."""
    return name.split(".adapters.")[1].split(".", 1)[1]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Compares tensors by name."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def padded(rows_: Sequence[list[int]], side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns token ids, mask and position ids (B, S) of rows padded on the left or on the right."""
    width = max(len(row) for row in rows_)

    def pad(row: list[int]) -> list[int]:
        filling = [PAD] * (width - len(row))
        return filling + row if side == "left" else row + filling

    ids = torch.tensor([pad(row) for row in rows_])
    mask = torch.tensor([pad([1] * len(row)) for row in rows_])
    positions = torch.tensor([pad(list(range(len(row)))) for row in rows_])
    return ids, mask, positions
