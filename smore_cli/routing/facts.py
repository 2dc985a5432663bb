"""What is known of each router beyond its decisions: what they tell of data sets and tokens, how alike experts are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from smore_cli.nn import adapted_modules
from smore_cli.nn.targets import is_linear
from smore_cli.routing.information import Information, of_rows, of_tokens, token_class
from smore_cli.routing.similarity import expert_similarity
from smore_cli.routing.tokens import top_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from smore_cli.routing.inputs import Inputs
    from smore_cli.routing.statistics import RouterStatistics
    from smore_cli.routing.tokens import Usage

__all__ = ["router_facts"]

CONTEXTS = 3
"""Places of a token that are shown with what stands around them."""
Key = tuple[str, int]


def router_facts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Inputs,
    routers: Sequence[RouterStatistics],
    usage: Usage,
    *,
    similarity: bool,
    contexts: bool,
) -> dict[Key, dict[str, Any]]:
    """Returns the facts of each router as JSON values, by module and level.

    Args:
        model: whose routers they are.
        tokenizer: its tokenizer.
        inputs: the rows, in the order that `usage` numbers them.
        routers: those that were chosen.
        usage: what they did, token by token.
        similarity: whether the experts' updates are compared.
        contexts: whether tokens are shown in context.
    """
    keys = [(router.module, router.level) for router in routers]
    information = _information(tokenizer, inputs, keys, usage)
    adapted = adapted_modules(model)
    facts: dict[Key, dict[str, Any]] = {}
    for key in keys:
        found: dict[str, Any] = {"information": information[key]}
        found["top_tokens"] = top_tokens(usage, key, tokenizer, contexts=CONTEXTS if contexts else 0)
        if similarity:
            module = adapted[key[0]]
            matrix = expert_similarity(module.adapter(module.active or ""), key[1]) if is_linear(module.base) else None
            found["similarity"] = matrix
        facts[key] = found
    return facts


def _information(
    tokenizer: PreTrainedTokenizerBase, inputs: Inputs, keys: Sequence[Key], usage: Usage
) -> dict[Key, dict[str, Any]]:
    """Returns what each router tells of the rows' labels, where they have some, and of the tokens' classes."""
    side_by_side = torch.cat([usage.experts[key] for key in keys], 1)
    experts = [usage.experts[key].shape[1] for key in keys]
    classes = {int(token): token_class(tokenizer, int(token)) for token in usage.ids.unique()}
    labels = torch.tensor([classes[token] for token in usage.ids.tolist()])
    of_kind = of_tokens(side_by_side, experts, labels, usage.rows, usage.ids)
    found: dict[str, list[Information]] = {"token_class": of_kind}
    if inputs.labels is not None:
        found["dataset"] = of_rows(side_by_side, experts, torch.tensor(inputs.labels), usage.rows)
    return {key: {name: each[i].document() for name, each in found.items()} for i, key in enumerate(keys)}
