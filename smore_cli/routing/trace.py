"""One text, token by token: which experts each router takes for it, and with what weight.

The text is what a user would ask: where the run was trained on conversations it is written as a user's turn with the
opening of the answer, else it is taken as it stands. What a token is shown as is its own text, white space included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from smore_cli.data.encode import Encoder
from smore_cli.data.templates import Branch, Rendered, Renderer
from smore_cli.errors import SmoreError, UsageError
from smore_cli.nn import AdapterContext, adapted_modules
from smore_cli.routing.layout import places

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from smore_cli.nn.context import RoutingTrace
    from smore_cli.recipe.schema import Recipe

__all__ = ["RouterTrace", "TextTrace", "trace_text"]


@dataclass(frozen=True)
class RouterTrace:
    """What one router, on one level of its tree, does with every token.

    Attributes:
        module: path of the adapted linear map.
        level: tree level, 0 = leaves.
        gates: (N, F, s) float32 on the CPU, the weight of each expert for each of the F parents, 0 where not picked.
    """

    module: str
    level: int
    gates: Tensor

    @property
    def mean_gates(self) -> Tensor:
        """(N, s) the weights of each token's experts, mean over parents."""
        return self.gates.mean(1)

    def picks(self) -> list[list[list[tuple[int, float]]]]:
        """Returns for each token and parent the picked experts and their weights, the heaviest first."""
        return [[_heaviest_first(parent) for parent in token] for token in self.gates.tolist()]


@dataclass(frozen=True)
class TextTrace:
    """All routers on one text.

    Attributes:
        text: as it was given.
        style: how it was written: as it stands, or as a user's turn of the chat template.
        ids: (N) the tokens.
        tokens: the text of each.
        routers: in the model's order, the root of each first.
    """

    text: str
    style: str
    ids: list[int]
    tokens: list[str]
    routers: list[RouterTrace]

    def document(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        found = places(router.module for router in self.routers)
        routers = [
            {**vars(found[r.module]), "module": r.module, "level": r.level, "picks": r.picks()} for r in self.routers
        ]
        return {"text": self.text, "style": self.style, "ids": self.ids, "tokens": self.tokens, "routers": routers}


@torch.inference_mode()
def trace_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    recipe: Recipe | None,
    *,
    modules: Collection[str],
    level: int | None,
) -> TextTrace:
    """Runs one text through a model and keeps what its routers do with each token.

    Args:
        model: with its routed adapter active, in evaluation mode.
        tokenizer: its tokenizer.
        text: longer texts than the run's `max_length` are cut on the right.
        recipe: the run's, for how its rows are written; None: the text is taken as it stands.
        modules: the adapted modules that are wanted, by path.
        level: the tree level that is wanted; None: all.

    Raises:
        UsageError: the text is empty.
        SmoreError: a router gave values that are not finite.
    """
    style, written = _written(text, tokenizer, recipe)
    ids = _tokens(written, tokenizer, recipe)
    if not ids:
        raise UsageError("--prompt: the text is empty, there is no token to trace", 'as in --prompt "Ice melts into"')
    paths = {m.adapters[m.active]: path for path, m in adapted_modules(model).items() if m.active is not None}
    found: list[RouterTrace] = []

    def observe(trace: RoutingTrace) -> None:
        path = paths[trace.owner]
        if path in modules and level in (None, trace.level):
            found.append(RouterTrace(path, trace.level, trace.gates.float().cpu()))

    given = torch.tensor([ids], device=model.device)
    with AdapterContext(token_mask=torch.ones_like(given, dtype=torch.bool), aux=False, observe=observe):
        model(input_ids=given, use_cache=False, logits_to_keep=1)
    for router in found:
        if not router.gates.isfinite().all():
            problem = f"the router of {router.module} gives values that are not finite"
            raise SmoreError(problem, "the adapter's training diverged")
    return TextTrace(text, style, ids, [_text_of(tokenizer, token) for token in ids], found)


def _written(text: str, tokenizer: PreTrainedTokenizerBase, recipe: Recipe | None) -> tuple[str, str]:
    """Returns how a text is written, for people, and the text as the model reads it."""
    if recipe is not None:
        renderer = Renderer(recipe.data, tokenizer)
        if renderer.style(recipe.data.train[0].format) == "chat":
            written = renderer.template.render([{"role": "user", "content": text}], generation_prompt=True)
            return "as a user's turn of the chat template", written
    return "as it stands, without a template", text


def _tokens(written: str, tokenizer: PreTrainedTokenizerBase, recipe: Recipe | None) -> list[int]:
    """Returns a text's tokens, as those of a training row: BOS once, where the tokenizer has one."""
    if not written:
        return []
    max_length = recipe.data.max_length if recipe is not None else 1024
    row = Encoder(tokenizer, max_length).encode([Rendered("", (Branch(written, (), eos=False),))])[0].row
    return row.prompt + row.branches[0]


def _text_of(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Returns a token's text; decoded by itself, a token of SentencePiece loses the space before it."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if isinstance(piece, str) and piece.startswith("▁"):
        return piece.replace("▁", " ")
    return str(tokenizer.decode([token]))


def _heaviest_first(gates: list[float]) -> list[tuple[int, float]]:
    picked = [(expert, weight) for expert, weight in enumerate(gates) if weight]
    return sorted(picked, key=lambda pair: -abs(pair[1]))
