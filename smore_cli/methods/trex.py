"""T-REX: r1 + r2 vectors make r1 r2 rank-one experts, weighed by the token and by what its prompt resembles.

    y = W x + b + gam * sum_ij pi_ij b_j (a_i . x)            gam = sigmoid(kappa g)

    pi = c_tok lam softmax(R x) + c_task (1 - lam) s          lam = sigmoid(kappa omega)
    s  = C e                                                  e: unit embedding of the prompt, C: r1 r2 centroids

             b_1    b_2   ...  b_r2      expert k = i r2 + j is b_j a_i^T: every down vector a_i (rows of A, r1) meets
      a_1   pi_11  pi_12 ... pi_1r2      every up vector b_j (columns of B, r2). They span r1 r2 dimensions, but the
      a_2   pi_21  pi_22 ... pi_2r2      update of one token has rank min(r1, r2) at most.

Paper: "T-REX: Mixture-of-Rank-One-Experts with Semantic-aware Intuition for Multi-task Large Language Model Finetuning"
(v1: "Intuition-aware Mixture-of-Rank-1-Experts"), https://arxiv.org/abs/2404.08985

Sources: the layer, its start and its constants are those of the released code (mode `rank1_flex`); the paper's body
could not be read. ASSUMPTIONS, because the code only ships finished centroids: that they come from k-means on the
training prompts, and that a centroid is the plain mean of unit vectors.

Deviations from the released code: its literal 32 is c_tok = r1 r2, which it is for 4 x 8 (`token_scale: 32` for other
shapes); prompts are embedded by the backbone itself unless an embedder is named (theirs: nomic-embed-text-v1 without a
prefix, on the bare question; here the text is the whole prompt as the model reads it); the prior stays in float32,
belongs to its sequence, and is made from the prompt wherever the model is called; centroids travel in the adapter.

70 % of T-REX is its router: on Llama-2-7B, all linear maps, 4 x 8 has 51,872,192 parameters, of which R has 36.4 M.
`router_input: latent` routes on A x instead, which leaves 15,462,848 (not in the paper).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from smore_cli.errors import AdapterError
from smore_cli.methods import MethodConfig, Site

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from smore_cli.nn import Adapter
    from smore_cli.nn.prior import SequencePrior


class TRexConfig(MethodConfig):
    """`method: trex`."""

    title: ClassVar[str] = "T-REX: a grid of rank-one experts and a prior from the prompt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.08985"
    size_fields: ClassVar[tuple[str, ...]] = ("num_down", "num_up")

    method: Literal["trex"] = "trex"
    num_down: Annotated[int, Field(description="r1, down vectors; there are r1 r2 rank-one experts", ge=1)] = 4
    num_up: Annotated[int, Field(description="r2, up vectors", ge=1)] = 8
    token_scale: Annotated[
        float | None, Field(description="c_tok, weight of the token's softmax; default: r1 r2 (released: 32)", gt=0)
    ] = None
    prior_scale: Annotated[float, Field(description="c_task, weight of the prior", gt=0)] = 4.0
    gate_sharpness: Annotated[
        float, Field(description="kappa, multiplies the logits of the learned mix and scale", gt=0)
    ] = 100.0
    dropout: Annotated[float, Field(description="dropout on the input of A", ge=0, lt=1)] = 0.0
    router_input: Annotated[
        Literal["input", "latent"], Field(description="what the router sees: x, or A x (a third of the parameters)")
    ] = "input"
    prior: Annotated[
        Literal["clusters", "none"], Field(description="clusters: the prompt's likeness to centroids; none: s = 0")
    ] = "clusters"
    on_missing_prior: Annotated[
        Literal["error", "zero", "uniform"],
        Field(description="where the prompt is not known: stop, s = 0, or s = 1 / (r1 r2)"),
    ] = "error"
    embedder: Annotated[
        str,
        Field(
            description="what embeds prompts, by the mean of its last hidden states: 'backbone', or a sentence "
            "embedder's folder or hub name"
        ),
    ] = "backbone"
    embedder_revision: Annotated[str | None, Field(description="branch, tag or commit of a hub embedder")] = None
    embedder_prefix: Annotated[str, Field(description="text a sentence embedder reads before the prompt")] = ""
    embedder_max_length: Annotated[
        int | None, Field(description="tokens of a prompt that are embedded; default: all the embedder can read", ge=1)
    ] = None
    centroids: Annotated[
        str | None, Field(description="file of finished centroids (.pt .npy .safetensors), in place of k-means")
    ] = None
    kmeans_seed: Annotated[int, Field(description="seed of k-means on the training prompts", ge=0)] = 0
    kmeans_n_init: Annotated[int, Field(description="starts of k-means, of which the best counts", ge=1)] = 4
    kmeans_max_prompts: Annotated[
        int | None, Field(description="different prompts that are clustered, a random sample; default: all", ge=1)
    ] = None

    @model_validator(mode="after")
    def _consistent(self) -> TRexConfig:
        # Values are compared with the defaults, not asked whether they were set: a saved config sets every field.
        changed = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        of_text = {"embedder_revision", "embedder_prefix"} & changed
        of_kmeans = {"kmeans_seed", "kmeans_n_init", "kmeans_max_prompts"} & changed
        of_prior = {"on_missing_prior", "embedder", "embedder_max_length", "centroids", "prior_scale"} & changed
        if self.prior == "none" and (unused := sorted(of_prior | of_text | of_kmeans)):
            raise ValueError(f"{unused[0]}: nothing reads it with prior: none")
        if self.embedder == "backbone" and of_text:
            raise ValueError(
                f"{min(of_text)}: only a sentence embedder has one; the backbone reads the prompt's tokens"
            )
        if self.kmeans_max_prompts is not None and self.kmeans_max_prompts < self.num_experts:
            raise ValueError(
                f"kmeans_max_prompts: {self.kmeans_max_prompts} prompts cannot make the num_down num_up = "
                f"{self.num_experts} clusters"
            )
        if self.centroids is not None and of_kmeans:
            raise ValueError(f"{min(of_kmeans)}: nothing is clustered where centroids are given")
        return self

    @property
    def num_experts(self) -> int:
        """K, pairs of a down and an up vector."""
        return self.num_down * self.num_up

    @property
    def depends_on(self) -> str:
        """The token and its prompt; with lam = 0 the prompt alone."""
        return "the token" if self.prior == "none" else "the token and on its prompt's likeness to the clusters"

    def build(self, site: Site) -> Adapter:
        """Returns a `PriorBank` with a grid core; B, R, omega and g are zero."""
        from smore_cli.nn.prior import PriorBank, PriorRouter
        from smore_cli.nn.routed_grid import grid

        router = PriorRouter(
            site.in_features if self.router_input == "input" else self.num_down,
            self.num_experts,
            token_scale=float(self.num_experts) if self.token_scale is None else self.token_scale,
            prior_scale=self.prior_scale if self.prior == "clusters" else 0.0,
            sharpness=self.gate_sharpness,
            on_missing=self.on_missing_prior,
        )
        return PriorBank(
            site.in_features,
            site.out_features,
            down=self.num_down,
            up=self.num_up,
            router=router,
            core=grid,
            dropout=self.dropout,
            router_input=self.router_input,
            expert_axes={"router.weight": (0, 0)},  # the pairs share the vectors; only R has a row for each
        )

    def build_prior(self, model: nn.Module) -> SequencePrior | None:
        """Returns the prior, whose centroids are still to be found or loaded."""
        from smore_cli.models.embedders import BackboneEmbedder, SentenceEmbedder
        from smore_cli.models.prior import CentroidFile, KMeans
        from smore_cli.nn.prior import SequencePrior

        if self.prior == "none":
            return None
        length, k = self.embedder_max_length, self.num_experts
        return SequencePrior(
            k,
            embedder=BackboneEmbedder(length)
            if self.embedder == "backbone"
            else SentenceEmbedder(self.embedder, self.embedder_revision, self.embedder_prefix, length),
            clustering=KMeans(k, self.kmeans_seed, self.kmeans_n_init, self.kmeans_max_prompts)
            if self.centroids is None
            else CentroidFile(self.centroids, k),
            on_missing=self.on_missing_prior,
        )

    def num_parameters(self, site: Site) -> int:
        """A has r1 d_in, B r2 d_out, R r1 r2 d_in (or r1 r2 r1, in rank space); omega and g are two more."""
        r1, r2 = self.num_down, self.num_up
        routed = site.in_features if self.router_input == "input" else r1
        return r1 * site.in_features + r2 * site.out_features + r1 * r2 * routed + 2


_ORIGINAL_NAMES = {
    "lora_A": "A",
    "lora_B": "B",
    "router": "router.weight",
    "omg": "router.omega",
    "binary_main_gate_weight": "router.g",
}


def from_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of an adapter trained by the released code to this file's names.

    Args:
        state_dict: names as in `[base_model.model.]PATH.lora_A[.default].weight`, or in the live module
            `PATH.router.modules_to_save.default.weight`; PATH may be empty.

    Returns:
        The same numbers as `[PATH.]A` and so on; the two scalars, (1, 1) in the original, are (1,) here.

    Raises:
        AdapterError: a name is none of the released layout's.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        stem = name.removeprefix("base_model.model.").removesuffix(".weight")
        stem = stem.removesuffix(".default").removesuffix(".modules_to_save")
        path, _, last = stem.rpartition(".")
        if last not in _ORIGINAL_NAMES or not name.endswith(".weight"):
            raise AdapterError(f"'{name}' is not a tensor of the released T-REX layout", "expected lora_A.weight")
        ours = _ORIGINAL_NAMES[last]
        renamed[f"{path}.{ours}" if path else ours] = tensor.reshape(1) if tensor.shape == (1, 1) else tensor
    return renamed


def settings_from_original(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the settings of an adapter trained by the released code (mode `rank1_flex`).

    Its adapter_config.json says only r = r1 r2 and the dropout; the shapes say r1 and r2. What else the code has built
    in is written out: its literal 32, and the embedder its centroids were made with.

    Args:
        values: adapter_config.json.
        tensors: what `from_original` returned.

    Raises:
        AdapterError: there are no such tensors, or r is not r1 r2.
    """
    downs = {t.shape[0] for name, t in tensors.items() if name.endswith(".A")}
    ups = {t.shape[-1] for name, t in tensors.items() if name.endswith(".B")}
    if len(downs) != 1 or len(ups) != 1:
        raise AdapterError("the adapter's lora_A and lora_B tensors do not have one r1 and one r2")
    r1, r2 = downs.pop(), ups.pop()
    if values["r"] != r1 * r2:
        raise AdapterError(f"r is {values['r']}, and lora_A and lora_B make {r1} x {r2} pairs", "'rank1_flex' is read")
    return {
        "num_down": r1,
        "num_up": r2,
        "token_scale": 32.0,
        "dropout": float(values.get("lora_dropout", 0.0)),
        "embedder": "nomic-ai/nomic-embed-text-v1",
        "embedder_max_length": 512,
    }
