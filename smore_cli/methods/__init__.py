"""The registry of methods: one file here is one method, its file name is the method's name.

A method file holds a `MethodConfig` subclass: the fields a recipe may set under `adapter:`, the formula of its
parameter count, and `build`, which makes the adapter of one linear map. Modules are imported only when named, and
import torch only inside functions, so that checking a recipe stays fast.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from smore_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from smore_cli.nn import Adapter
    from smore_cli.nn.prior import SequencePrior

__all__ = ["MethodConfig", "Site", "SiteKind", "available_methods", "config_from_dict", "load_method", "require_top_k"]

T = TypeVar("T")


SiteKind = Literal["linear", "gated_mlp"]


@dataclass(frozen=True)
class Site:
    """Where an adapter sits: one linear map y = W x of the backbone, or one gated MLP.

    Attributes:
        name: the module's path in the backbone, as in `model.layers.0.mlp.up_proj`.
        in_features: width of x.
        out_features: width of y.
        kind: `linear`, or `gated_mlp` for down_proj(act_fn(gate_proj x) * up_proj x) as a whole.
        hidden: width between the maps of a gated MLP.
        layer: number of the transformer layer, from 0.
        num_layers: how many there are.
        base: the module itself, for a method that starts from its weight (`smore_cli.nn.adapted.dense_weight`).
    """

    name: str
    in_features: int
    out_features: int
    kind: SiteKind = "linear"
    hidden: int = 0
    layer: int = 0
    num_layers: int = 1
    base: nn.Module | None = field(default=None, repr=False, compare=False)

    def at_depth(self, values: list[T] | T) -> T:
        """Returns the value for this site's layer: lists are spread over the depth, [2, 4, 6, 8] by quarters.

        A list longer than the depth is sampled: of those four, two layers have 2 and 6.
        """
        if not isinstance(values, list):
            return values
        return values[self.layer * len(values) // self.num_layers]


class MethodConfig(BaseModel):
    """What a recipe may say under `adapter:`; every method adds its own fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    title: ClassVar[str]
    """The method's name as its paper writes it, and its idea in a few words."""
    paper: ClassVar[str]
    """Link to the paper."""
    routed: ClassVar[bool] = True
    """Whether the update depends on the token (and so has no exact dense form)."""
    sites: ClassVar[frozenset[SiteKind]] = frozenset({"linear"})
    """What it can adapt."""
    starts_as_backbone: ClassVar[bool] = True
    """Whether a fresh adapter changes nothing at all."""
    size_fields: ClassVar[tuple[str, ...]] = ("rank",)
    """The settings that make it larger or smaller without making it another method."""

    method: Annotated[str, Field(description="which method; `smore recipe schema` lists the fields of each")]
    target_modules: Annotated[
        Annotated[list[str], Field(min_length=1)] | str,
        Field(description="names of the linear maps to adapt, as in [q_proj, v_proj], or 'all-linear'"),
    ] = "all-linear"
    modules_to_save: Annotated[
        list[str],
        Field(
            description="modules trained as a whole beside the adapter and saved with it, as in [embed_tokens, lm_head]"
        ),
    ] = Field(default_factory=list)

    @property
    def row_groups(self) -> int | None:
        """How many groups of training rows it tells apart (the data must name each row's); None: it asks for none."""
        return None

    @property
    def depends_on(self) -> str:
        """What the update depends on, so that no single matrix equals it."""
        return "the token"

    @abstractmethod
    def build(self, site: Site) -> Adapter:
        """Returns the freshly initialised adapter of one site (float32)."""

    def build_prior(self, model: nn.Module) -> SequencePrior | None:
        """Returns what tells the adapter of each sequence before its tokens are routed; None: nothing does."""
        return None

    @abstractmethod
    def num_parameters(self, site: Site) -> int:
        """Returns how many trainable numbers `build(site)` has, from the method's formula."""

    def num_active_parameters(self, site: Site) -> int:
        """Returns how many of them one token's update is made of, at most: without the experts it does not go to."""
        return self.num_parameters(site)


def available_methods() -> list[str]:
    """Returns the names of all methods, sorted, without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_method(name: str) -> type[MethodConfig]:
    """Returns the config class of the method `name`.

    Raises:
        UsageError: there is no such method; the message suggests the nearest name.
    """
    methods = available_methods()
    if name not in methods:
        near = difflib.get_close_matches(name, methods, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(methods)}"
        raise UsageError(f"unknown method '{name}'", hint)
    module = importlib.import_module(f"{__name__}.{name}")
    configs = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, MethodConfig) and value.__module__ == module.__name__
    ]
    if len(configs) != 1:
        raise TypeError(f"{module.__name__} must define exactly one MethodConfig, found {len(configs)}")
    return configs[0]


def require_top_k(top_k: int, num_experts: int, *, renormalised: bool = True) -> None:
    """Checks a number of picks, for a method's validator.

    Args:
        top_k: experts a token goes to.
        num_experts: how many there are.
        renormalised: whether the picked experts' weights are made to sum to 1.

    Raises:
        ValueError: there are not so many, or a single pick leaves the router nothing to learn.
    """
    if top_k > num_experts:
        raise ValueError(f"top_k: {top_k} experts cannot be picked from {num_experts}")
    if renormalised and top_k == 1 and num_experts > 1:
        raise ValueError(
            "top_k: a single pick, divided by its own sum, has weight 1 whatever the router says, so that the language "
            "model's loss could never teach the router; pick at least 2"
        )


def config_from_dict(values: dict[str, Any]) -> MethodConfig:
    """Returns the checked config of a saved adapter's settings (`method` names the class)."""
    return load_method(str(values.get("method"))).model_validate(values)
