"""From the prompt to the layers: the prior is worked out by itself whenever an adapted model is called.

A hook before the model's forward pass makes an `AdapterContext` current that holds the prior of every row, and one
after it leaves that context again. (Where `context.documents` share rows, read document for row.) Where the prompt of a
row is found, in this order:

    context.prior           given by the caller: taken as it is
    `generate`              the prompt is what `generate` was given; each beam has the prior of its prompt
    a cache with tokens     the prior that the pass had which filled it
    context.prompt_mask     those tokens of the row
    else                    the row's real tokens, by the attention mask (B, S) or context.token_mask

Where none of these tells (embeddings instead of token ids, a cache that somebody else filled), the prior's `on_missing`
decides.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from smore_cli.errors import AdapterError
from smore_cli.nn.context import AdapterContext, current_context
from smore_cli.nn.prior import HINT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from smore_cli.nn.prior import SequencePrior

__all__ = ["active_prior", "install_prior", "priors_of", "remove_prior", "select_prior", "without_prior"]

_ATTRIBUTE = "_smore_priors"
_CACHES = ("past_key_values", "cache_params")


def install_prior(model: nn.Module, name: str, prior: SequencePrior) -> None:
    """Gives a model the prior of its adapter `name`."""
    if (priors := _priors(model)) is None:
        priors = _Priors(model)
        setattr(model, _ATTRIBUTE, priors)
    priors.by_name[name] = prior


def remove_prior(model: nn.Module, name: str) -> None:
    """Takes the prior of an adapter away, if it has one; with the last one the hooks go too."""
    if (priors := _priors(model)) is None:
        return
    priors.by_name.pop(name, None)
    if priors.active == name:
        priors.active = None
    if not priors.by_name:
        priors.close(model)
        delattr(model, _ATTRIBUTE)


def select_prior(model: nn.Module, name: str | None) -> None:
    """Uses the prior of the adapter `name`; None, or one that has no prior: none."""
    if (priors := _priors(model)) is not None:
        priors.active = name


@contextmanager
def without_prior(model: nn.Module) -> Iterator[None]:
    """Inside: a pass through the model looks for no prior."""
    priors = _priors(model)
    active = None if priors is None else priors.active
    select_prior(model, None)
    try:
        yield
    finally:
        select_prior(model, active)


def priors_of(model: nn.Module) -> Mapping[str, SequencePrior]:
    """Returns the priors of a model's adapters by the adapters' names."""
    priors = _priors(model)
    return {} if priors is None else priors.by_name


def active_prior(model: nn.Module) -> SequencePrior | None:
    """Returns the prior of the adapter in use, if it has one."""
    priors = _priors(model)
    return None if priors is None else priors.current


def _priors(model: nn.Module) -> _Priors | None:
    return getattr(model, _ATTRIBUTE, None)


_GENERATING: ContextVar[tuple[_Priors, Tensor] | None] = ContextVar("smore_generating", default=None)
"""Inside `generate`: whose it is, and the prior of each of its prompts."""


class _Priors:
    """The priors of one model and its hooks: bound methods, so that a deep copy of the model has hooks of its own.

    Attributes:
        by_name: priors by adapter.
        active: the adapter in use.
        generate: the model's `generate` as it was; None: it has none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.by_name: dict[str, SequencePrior] = {}
        self.active: str | None = None
        self._of_cache: WeakKeyDictionary[object, tuple[str | None, Tensor]] = WeakKeyDictionary()
        self._handles = [
            model.register_forward_pre_hook(self.enter, with_kwargs=True),
            model.register_forward_hook(self.leave, with_kwargs=True, always_call=True),
        ]
        self.generate: Callable[..., Any] | None = getattr(model, "generate", None)
        if self.generate is not None:
            cast("Any", model).generate = functools.partial(_generate, model)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the caches out, which belong to this process (a `WeakKeyDictionary` cannot be pickled either)."""
        return {**self.__dict__, "_of_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _of_cache=WeakKeyDictionary())

    def close(self, model: nn.Module) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        if self.generate is not None:
            del model.__dict__["generate"]

    @property
    def current(self) -> SequencePrior | None:
        """The prior in use."""
        return None if self.active is None else self.by_name.get(self.active)

    def caller(self) -> AdapterContext:
        """Returns the context that the caller made current, or an empty one."""
        stale = current_context()
        if stale is not None and stale.entered_by is self:  # a keyboard interrupt, which runs no hook, ended that pass
            stale.__exit__()
        return current_context() or AdapterContext(aux=False)

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the forward pass: makes a context current that has the rows' prior."""
        prior = self.current
        if prior is None:
            return
        outer = self.caller()
        found = self._find(model, prior, outer, _named(model, args, kwargs))
        replace(outer, prior=found, entered_by=self).__enter__()

    def leave(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After it: leaves that context, and remembers which prior the cache was filled with."""
        context = current_context()
        if context is None or context.entered_by is not self:
            return
        context.__exit__()
        inputs = _named(model, args, kwargs)
        cache = next((c for name in _CACHES if (c := getattr(output, name, None)) is not None), None) or _cache(inputs)
        if hasattr(cache, "get_seq_length") and context.prior is not None and context.places is None:
            self._of_cache[cache] = (self.active, context.prior.detach())

    def _find(
        self, model: nn.Module, prior: SequencePrior, context: AdapterContext, inputs: dict[str, Any]
    ) -> Tensor | None:
        """Returns the prior (B, K) of the rows, or None where it is unknown and that is allowed."""
        ids = inputs.get("input_ids")
        rows = ids if ids is not None else inputs.get("inputs_embeds")
        generating, cache = _GENERATING.get(), _cache(inputs)
        if generating is not None and generating[0] is self and rows is not None:
            given = generating[1]
            if len(rows) % len(given):
                raise AdapterError(
                    f"generate was given {len(given)} prompts, and calls the model with {len(rows)} rows"
                )
            return given.repeat_interleave(len(rows) // len(given), dim=0)
        if context.prior is not None:
            return _checked(context.prior, prior.num_experts, rows if context.places is None else context.places)
        if cache is not None and not _is_empty(cache):
            name, known = self._of_cache.get(cache, (None, None))
            if known is None or name != self.active:
                return _missing(prior, "the cache holds tokens that this adapter has not seen")
            if rows is None or len(rows) != len(known):
                return _missing(prior, f"the cache holds {len(known)} rows")
            return known
        if ids is None:
            return _missing(prior, "the model was called without token ids")
        mask = _prompt_mask(context, inputs.get("attention_mask"), ids)
        if context.places is not None and mask is not None:  # document by document, (D, L)
            places = context.places.to(ids.device)
            ids, mask = (t.to(ids.device).reshape(-1)[places.clamp_min(0)] for t in (ids, mask))
            mask = (mask != 0) & (places >= 0)
        return self._scores(model, prior, ids, mask)

    def _scores(self, model: nn.Module, prior: SequencePrior, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """Returns the prior of the rows of `ids` (B, S), whose prompts are where `mask` (B, S) is true."""
        if not prior.fitted:
            return _missing(prior, "there are no centroids yet (training finds them; an adapter folder has them)")
        if mask is None:
            return _missing(prior, "the attention mask does not tell which tokens are real")
        keep = mask.cpu() != 0
        prompts = [row[real].tolist() for row, real in zip(ids.cpu(), keep, strict=True)]
        if empty := [row for row, prompt in enumerate(prompts) if not prompt]:
            return _missing(prior, f"row {empty[0]} has no token")
        return prior.scores(model, prompts).to(ids.device)


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` of a model with priors: the prior is that of the given prompts, whatever the model is called with.

    Without a cache, or with a prompt that is read in chunks, no single call of the model shows the prompt.
    """
    priors = cast("_Priors", _priors(model))
    generate = cast("Callable[..., Any]", priors.generate)
    given = [args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids")]
    ids = next((ids for ids in given if ids is not None), None)
    prior, context = priors.current, priors.caller()
    if prior is None or ids is None or ids.dim() != 2:
        return generate(*args, **kwargs)
    if context.prior is not None:
        found: Tensor | None = _checked(context.prior, prior.num_experts, ids)
    else:
        mask = kwargs.get("attention_mask")
        mask = _prompt_mask(context, _real_tokens(model, ids, kwargs) if mask is None else mask, ids)
        found = priors._scores(model, prior, ids, mask)
    if found is None:
        return generate(*args, **kwargs)
    token = _GENERATING.set((priors, found))
    try:
        return generate(*args, **kwargs)
    finally:
        _GENERATING.reset(token)


def _real_tokens(model: Any, ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Returns the attention mask that `generate` makes where it is given none: padding is masked if it can be told."""
    settings = kwargs.get("generation_config") or model.generation_config
    pad = kwargs.get("pad_token_id", settings.pad_token_id)
    ends = kwargs.get("eos_token_id", settings.eos_token_id)
    ends = ends if isinstance(ends, list) else [ends]
    return torch.ones_like(ids) if pad is None or pad in ends else ids != pad


def _prompt_mask(context: AdapterContext, attention_mask: Any, ids: Tensor) -> Tensor | None:
    """Returns which tokens (B, S) are the rows' prompts, or None where that cannot be told."""
    if context.prompt_mask is not None:
        if context.prompt_mask.shape != ids.shape:
            shapes = f"{tuple(context.prompt_mask.shape)}, the token ids are {tuple(ids.shape)}"
            raise AdapterError(f"AdapterContext.prompt_mask is {shapes}")
        return context.prompt_mask
    masks = [mask for mask in (attention_mask, context.token_mask) if mask is not None]
    if not masks:
        return torch.ones_like(ids)
    return next((mask for mask in masks if isinstance(mask, Tensor) and mask.shape == ids.shape), None)


def _checked(prior: Tensor, num_experts: int, rows: Tensor | None) -> Tensor:
    """Returns a prior that the caller gave, if it is one for this batch."""
    size = len(prior) if rows is None else len(rows)
    if prior.shape != (size, num_experts):
        raise AdapterError(f"AdapterContext.prior is {tuple(prior.shape)}, this batch needs ({size}, {num_experts})")
    return prior


def _missing(prior: SequencePrior, why: str) -> Tensor | None:
    """Returns None, so that the layers do what `on_missing` says, unless that is to stop."""
    if prior.on_missing == "error":
        raise AdapterError(f"the prior of the sequences is not known: {why}", HINT)
    return None


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns a call's arguments by name."""
    names = list(inspect.signature(model.forward).parameters) if args else []
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _cache(inputs: dict[str, Any]) -> Any:
    return next((inputs[name] for name in _CACHES if inputs.get(name) is not None), None)


def _is_empty(cache: Any) -> bool:
    length = getattr(cache, "get_seq_length", None)
    return length is not None and int(length()) == 0
