"""What is known of a sequence before its tokens are routed, and the router that mixes it with each token's own choice.

    s     = e C^T                                     one vector a sequence: e embeds its prompt, C are K centroids
    p_t   = softmax(R x_t)                            one a token
    pi_t  = c_token lam p_t + c_prior (1 - lam) s     lam = sigmoid(kappa omega), learned
    gates = gam pi_t = a p_t + b s                    gam = sigmoid(kappa g), learned; may be negative, sum to anything

`smore_cli.nn.prior_hooks` brings s from the prompt to the layers.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn

from smore_cli.errors import AdapterError
from smore_cli.nn.bank import Bank
from smore_cli.nn.context import current_context, heard
from smore_cli.nn.routed_grid import Form, Given, Prior, grid, kernel_of, prior_gates, routed_grid
from smore_cli.nn.router import Router, Routing

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Clustering", "Embedder", "MissingPrior", "PriorBank", "PriorRouter", "SequencePrior"]

MissingPrior = Literal["error", "zero", "uniform"]
"""What happens where a sequence has no prior: nothing is computed, s = 0, or s = 1/K for every expert."""


class PriorRouter(Router):
    """A softmax over the token's logits, mixed with the prior of its sequence.

    Attributes:
        weight: R, (K, d), zero at the start.
        omega: (1,) logit of the mix.
        g: (1,) logit of the scale.
        token_scale: c_token.
        prior_scale: c_prior; 0: there is no prior, and none is asked for.
        sharpness: kappa; with Adam it makes both logits learn that much faster.
        on_missing: what to do where the sequences have no prior.
    """

    def __init__(
        self,
        features: int,
        num_experts: int,
        *,
        token_scale: float,
        prior_scale: float,
        sharpness: float,
        on_missing: MissingPrior,
    ) -> None:
        super().__init__(features, num_experts, init="zero")
        self.omega = nn.Parameter(torch.zeros(1))
        self.g = nn.Parameter(torch.zeros(1))
        self.token_scale, self.prior_scale, self.sharpness = token_scale, prior_scale, sharpness
        self.on_missing = on_missing

    def decide(self, logits: Tensor) -> Routing:
        """Routes (N, K) logits: rows of equal length one after another, each a sequence or a pack of documents."""
        routing = super().decide(logits)
        return replace(routing, gates=prior_gates(routing.probabilities, self.omega, self.g, self.form(logits)))

    def form(self, latent: Tensor, down: int = 0) -> Form:
        """Returns what is computed of N tokens' latents (N, ...), of `down` down vectors."""
        return Form(down, self.token_scale, self.prior_scale, self.sharpness, self._prior(latent))

    def _prior(self, latent: Tensor) -> Prior | None:
        """Returns what is known of the sequences of N tokens, or None where that is zero."""
        if self.prior_scale == 0:
            return None
        n, context = len(latent), current_context()
        if context is not None and context.prior is not None:
            prior, documents = context.prior, _documents(n)
            fits = documents is not None or n % len(prior) == 0
            if prior.dim() != 2 or prior.shape[1] != self.num_experts or not fits:
                shape = tuple(prior.shape)
                raise AdapterError(f"a prior {shape} is not (sequences, {self.num_experts}) for {n} tokens")
            return Prior(prior.to(latent), None if documents is None else documents.to(latent.device))
        if self.on_missing == "error":
            raise AdapterError("the adapter needs the prior of every sequence, and none is known", HINT)
        if self.on_missing == "zero":
            return None
        return Prior(latent.new_full((1, self.num_experts), 1 / self.num_experts), None)


def _documents(num_tokens: int) -> Tensor | None:
    """Returns the document of each token, (N,), where documents share the rows of the batch."""
    context = current_context()
    documents = None if context is None else context.documents
    return None if documents is None or documents.numel() != num_tokens else documents.reshape(-1)


HINT = "call the whole model on token ids, or give AdapterContext(prior=...), or set on_missing_prior: zero or uniform"


class PriorBank(Bank):
    """A bank under a `PriorRouter`: the prior of a batch is for this batch, never stretched over another."""

    def check(self, x: Tensor) -> None:
        """Refuses an input of another batch.

        Raises:
            AdapterError: the prior is for another number of sequences than x (B, S, d_in) has.
        """
        context = current_context()
        if context is not None and context.prior is not None and x.dim() > 2:
            rows = len(context.prior) if context.documents is None else len(context.documents)
            if len(x) != rows:
                raise AdapterError(f"a prior for {rows} sequences met a batch of {len(x)}", HINT)

    def middle(self, latent: Tensor) -> Tensor:
        """As `Bank.middle`; a grid under a router on x is one node where there is a kernel for it."""
        context, router, down = current_context(), self.router, len(self.A)
        known = self.core is grid and self.router_input == "input" and (context is None or context.edit is None)
        if known and isinstance(router, PriorRouter):  # inspection and merging put others there
            form = router.form(latent, down)
            if (kernel := kernel_of(latent, form)) is not None:
                mixed, p, gates = routed_grid(kernel, Given(latent, router.omega, router.g), form)
                if heard():
                    self._reported(Routing(latent[:, None, down:], p, gates, None, latent[:, :down]))
                return mixed
        return super().middle(latent)


class Embedder(Protocol):
    """Turns prompts, given as the backbone's token ids, into vectors."""

    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Returns unit vectors (P, d), float32 on the CPU, of P prompts; `model` is the adapted backbone."""
        ...

    def identity(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> str:
        """Returns a hash of everything that the vectors depend on."""
        ...


class Clustering(Protocol):
    """Finds centroids. Its `repr` names everything that the result depends on besides the arguments."""

    def sample(self, count: int) -> list[int]:
        """Returns which of `count` different prompts it wants to see."""
        ...

    def __call__(self, embeddings: Tensor, counts: Sequence[int]) -> Tensor:
        """Returns (K, d) float32.

        Args:
            embeddings: (P, d) unit vectors of P different prompts.
            counts: how often each prompt occurs.
        """
        ...


class SequencePrior(nn.Module):
    """Scores prompts against centroids, each prompt embedded once.

    Attributes:
        centroids: (K, d) float32; (K, 0) until they are found (`models.prior.fit_prior`) or loaded.
        embedder: makes the vectors.
        clustering: finds the centroids.
        on_missing: what to do where a sequence's prompt is not known.
    """

    centroids: Tensor

    def __init__(
        self, num_experts: int, *, embedder: Embedder, clustering: Clustering, on_missing: MissingPrior = "error"
    ) -> None:
        super().__init__()
        self.register_buffer("centroids", torch.empty(num_experts, 0))
        self.embedder, self.clustering, self.on_missing = embedder, clustering, on_missing
        self._scores: dict[bytes, Tensor] = {}
        self._scored_with = self.centroids

    @property
    def num_experts(self) -> int:
        """K."""
        return len(self.centroids)

    @property
    def fitted(self) -> bool:
        """Whether there are centroids."""
        return self.centroids.shape[1] > 0

    def make_room(self, shape: Sequence[int]) -> None:
        """Gives the centroids the shape they have in a file, before they are read from it."""
        if len(shape) == 2 and shape[0] == self.num_experts:
            self.centroids = self.centroids.new_zeros(*shape)

    def scores(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Returns the prior (B, K) of B prompts, float32 on the CPU; those not seen before are embedded in one go.

        Raises:
            AdapterError: the embedder does not belong to the centroids.
        """
        if not torch.equal(self._scored_with, self.centroids):  # others were loaded in the meantime
            self._scores.clear()
        keys = [_key(prompt) for prompt in prompts]
        new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._scores}
        if new:
            self.remember(list(new.values()), self.embedder(model, list(new.values())))
        return torch.stack([self._scores[key] for key in keys])

    def remember(self, prompts: Sequence[Sequence[int]], embeddings: Tensor) -> None:
        """Keeps the scores of prompts (P of them) whose embeddings (P, d) are known.

        Raises:
            AdapterError: the embeddings are not finite, or of another width than the centroids.
        """
        if embeddings.shape[1] != self.centroids.shape[1]:
            raise AdapterError(
                f"the embedder gives vectors of {embeddings.shape[1]} numbers, the centroids have "
                f"{self.centroids.shape[1]}",
                "use the embedder the centroids were made with",
            )
        if not embeddings.isfinite().all():
            raise AdapterError("the embedding of a prompt is not finite", "does the backbone overflow in its dtype?")
        # Kept beyond an evaluation, and used in training.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            scores = embeddings.float() @ self.centroids.float().cpu().T
            self._scores.update(zip(map(_key, prompts), scores, strict=True))
            self._scored_with = self.centroids.clone()


def _key(prompt: Sequence[int]) -> bytes:
    return array("q", prompt).tobytes()
