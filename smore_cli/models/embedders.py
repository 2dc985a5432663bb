"""Vectors for prompts: the mean of a model's last hidden states over the prompt's tokens, divided by its length.

backbone   the adapted model's own backbone, adapters off, on the prompt's token ids
sentence   a sentence embedder by path or hub name, on the prompt's text behind an optional prefix
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from smore_cli.errors import AdapterError, ModelError
from smore_cli.models.quiet import quiet
from smore_cli.models.source import find_source, one_line
from smore_cli.nn import adapted_modules
from smore_cli.nn.prior_hooks import priors_of
from smore_cli.recipe.schema import ModelConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["BackboneEmbedder", "SentenceEmbedder", "bare", "fingerprint", "use_tokenizer"]

BATCH_TOKENS = 8192
"""Tokens, padding included, that are embedded at a time."""


class BackboneEmbedder:
    """The backbone's own last hidden states, before its output embedding.

    Attributes:
        max_length: how many tokens of a prompt are read; None: all.
    """

    def __init__(self, max_length: int | None = None) -> None:
        self.max_length = max_length

    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Returns (P, d) float32 unit vectors; see `smore_cli.nn.prior.Embedder`."""
        backbone: Any = getattr(model, "base_model", model)
        with bare(model):
            return _pooled(backbone, [list(prompt[: self.max_length]) for prompt in prompts], use_cache=False)

    def identity(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> str:
        """Returns a hash of the backbone's weights, the settings and the prompts."""
        return _hash(["backbone", self.max_length, fingerprint(model), [list(prompt) for prompt in prompts]])


class SentenceEmbedder:
    """An encoder such as all-MiniLM-L6-v2, loaded when it is first needed and put on the backbone's device.

    Prompts come as the backbone's token ids, so that every caller has them; they are turned back into text, without
    special tokens, by the backbone's tokenizer (`use_tokenizer`).

    Attributes:
        name: a folder or a hub name.
        revision: of a hub model.
        prefix: put before every prompt, as in 'clustering: '.
        max_length: tokens of the embedder's own that are read; None: as many as its tokenizer allows.
        tokenizer: the backbone's.
    """

    def __init__(self, name: str, revision: str | None = None, prefix: str = "", max_length: int | None = None) -> None:
        self.name, self.revision, self.prefix, self.max_length = name, revision, prefix, max_length
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Returns (P, d) float32 unit vectors; see `smore_cli.nn.prior.Embedder`.

        Raises:
            AdapterError: the backbone's tokenizer is not known.
            ModelError: the embedder cannot be loaded.
        """
        texts = self._texts(prompts)
        encoder, tokenizer = self._load()
        places = getattr(encoder.config, "max_position_embeddings", None) or tokenizer.model_max_length
        limit = self.max_length or min(tokenizer.model_max_length, places)
        rows = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        with bare(model):
            return _pooled(encoder.to(next(model.parameters()).device), rows)

    def identity(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> str:
        """Returns a hash of the embedder's weights, the settings and the prompts' texts."""
        return _hash(["sentence", self.max_length, fingerprint(self._load()[0]), self._texts(prompts)])

    def _texts(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise AdapterError(
                f"the embedder {self.name} reads text, and the backbone's tokenizer is not known",
                "open the run with smore_cli.models.runs.open_run(...).load(), or call use_tokenizer(model, tokenizer)",
            )
        return [self.prefix + str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in prompts]

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = _load_encoder(self.name, self.revision)
        return self._loaded


def use_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the backbone's tokenizer to those priors of a model that read prompts as text."""
    for prior in priors_of(model).values():
        if isinstance(prior.embedder, SentenceEmbedder):
            prior.embedder.tokenizer = tokenizer


def fingerprint(model: nn.Module) -> str:
    """Returns a hash of a backbone's shapes and of 16 numbers of each parameter; adapters are left out.

    A name alone does not tell: a folder may hold other weights tomorrow, a 4-bit backbone has other hidden states.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            continue
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 16)][:16].cpu().contiguous()
        digest.update(f"{tuple(parameter.shape)} {parameter.dtype} ".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Inside: the bare backbone in evaluation mode, without gradients or autocast. Afterwards all is as it was."""
    adapted = list(adapted_modules(model).values())
    active, training = [each.active for each in adapted], [(each, each.training) for each in model.modules()]
    device = next(model.parameters()).device.type
    try:
        for each in adapted:
            each.active = None
        model.eval()
        # Not inference mode: what is computed now may be needed in training later.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for each, name in zip(adapted, active, strict=True):
            each.active = name
        for module, flag in training:
            module.training = flag


def _pooled(model: Callable[..., Any], rows: Sequence[Sequence[int]], **options: Any) -> Tensor:
    """Returns the normalised mean of the last hidden states of each row, (P, d) float32 on the CPU."""
    device = next(model.parameters()).device  # type: ignore[attr-defined]
    pooled: dict[int, Tensor] = {}
    for members in _batches([len(row) for row in rows]):
        longest = max(len(rows[i]) for i in members)
        ids = torch.tensor([[*rows[i], *[0] * (longest - len(rows[i]))] for i in members])
        mask = torch.arange(longest) < torch.tensor([len(rows[i]) for i in members])[:, None]
        ids, mask = ids.to(device), mask.to(device)
        hidden = model(input_ids=ids, attention_mask=mask.long(), **options).last_hidden_state  # (P, S, d)
        total = torch.where(mask[:, :, None], hidden.float(), 0.0).sum(1)
        pooled.update(zip(members, F.normalize(total, dim=-1).cpu(), strict=True))
    return torch.stack([pooled[i] for i in range(len(rows))])


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yields the numbers of rows of similar length, at most `BATCH_TOKENS` with padding (or one row)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[i] * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _load_encoder(name: str, revision: str | None) -> tuple[Any, Any]:
    """Returns an encoder (float32, evaluation mode) and its tokenizer; a folder never causes a network call."""
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer

    try:
        source = find_source(ModelConfig(name_or_path=name, revision=revision))
    except ModelError as error:
        raise ModelError(f"embedder: {error.message}", error.hint) from error
    where: dict[str, Any] = {
        "revision": source.revision,
        "local_files_only": source.local,
        "trust_remote_code": False,
    }
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.name, **where)
            encoder, info = AutoModel.from_pretrained(
                source.name, dtype=torch.float32, output_loading_info=True, **where
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"embedder {name}: {one_line(error)}", "it must be an encoder with its tokenizer") from error
    # The last hidden states do not pass through the pooler, which many embedders are published without.
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith("pooler.")):
        raise ModelError(f"embedder {name}: the files lack {len(missing)} tensors, as {missing[0]}")
    return encoder.requires_grad_(False).eval(), tokenizer


def _hash(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
