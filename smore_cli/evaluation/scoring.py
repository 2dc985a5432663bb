"""Log-likelihoods for lm-evaluation-harness with every question's prompt read once.

lm-eval asks for log p(choice | prompt) for each choice, and its own Hugging Face model runs prompt + choice anew every
time. Here the choices of one prompt become branches of one row, kept apart by a 4-D attention mask, and the output
embedding runs only where a token is scored:

    HFLM   prompt a a        this   prompt a a b c c
           prompt b
           prompt c c

The last token of a choice is predicted, never read, so it takes no place in either. The token ids are HFLM's own
(`tok_encode`, `_encode_pair`) and the scores agree to float32 rounding. Log-probabilities are taken in float32 whatever
the model's dtype; HFLM takes them in the model's.
"""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from lm_eval.models.huggingface import HFLM

from smore_cli.data.batch import Row, collate
from smore_cli.errors import DataError
from smore_cli.evaluation.generation import generate_in_batches
from smore_cli.evaluation.journal import NO_JOURNAL, Journal
from smore_cli.models.forward import target_scores
from smore_cli.nn import AdapterContext
from smore_cli.nn.prior_hooks import active_prior

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from smore_cli.data.batch import Batch

__all__ = ["PrefixSharingLM", "longest_shared_sequence"]

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and continuation as text (None for a window of a long text), then the token ids of each."""
Score = tuple[float, bool]
"""Summed log-likelihood in nats, and whether greedy decoding would write the continuation."""

CPU_TOKENS, GPU_TOKENS = 1024, 32768
"""Tokens of a forward pass, padding included, where no batch size is asked for. A CPU is busy with few."""
LEAST_FILLED = 0.8
"""Rows shorter than this share of a batch's longest go into the next one, once a batch is a quarter full."""
BRANCH_TOKENS = 512
"""Branches share a row up to this many tokens, or the prompt's length if that is more: attention grows with S^2."""


class PrefixSharingLM(HFLM):  # type: ignore[misc]  # lm_eval ships no types
    """lm-eval's Hugging Face model with log-likelihoods computed row by row; everything else is HFLM's.

    Args:
        model: a causal language model of transformers, with or without adapters; switched to eval mode.
        tokenizer: its tokenizer.
        batch_size: rows (prompts) a forward pass; None: as many as have room, by their length; where memory runs out
            a pass is halved.
        on_progress: called with the number of requests done and the number in all.
        journal: where answers are kept, and taken from, pass by pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        journal: Journal = NO_JOURNAL,
    ) -> None:
        small = model.device.type == "cpu"  # where larger batches are no faster
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or (8 if small else 32))
        self._longest = min(self.max_length, longest_shared_sequence(model))
        self._on_progress = on_progress or (lambda done, total: None)
        self._journal = journal
        self._room = None if batch_size else CPU_TOKENS if small else GPU_TOKENS

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Score]:
        """Scores (context, continuation) requests; without lm-eval's progress bars."""
        scores: list[Score] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return scores

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Generates the answers of (context, settings) requests; without lm-eval's progress bars."""
        answer = partial(super().generate_until, disable_tqdm=True)
        return generate_in_batches(requests, answer, self.batch_size, self._journal, self._on_progress)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Score]:
        """Scores tokenised requests, in their order. Those that cannot share a row are HFLM's to cut and score.

        An adapter with a prior has to know which tokens are the prompt, which HFLM does not say: then they are cut as
        HFLM cuts them and scored here, each in a row of its own.

        `override_bs` is lm-eval's batch size for windows of a long text; rows here follow `batch_size`.
        """
        if empty := [text for text, _, answer in requests if not answer]:
            raise DataError(f"a choice adds no token to its prompt, so it has no likelihood: {empty[0]}")
        scores: dict[int, Score] = {}
        short = [i for i, (_, prompt, answer) in enumerate(requests) if len(prompt) + len(answer) - 1 <= self._longest]
        batches = self._batches(self._rows(requests, short))
        if active_prior(self.model) is not None:
            # Apart from the others: a row with branches takes a dense mask, which would override a sliding window.
            batches += self._batches(self._single_rows(requests, sorted({*range(len(requests))} - {*short})))
        for batch in batches:
            members = [i for _, indices in batch for i in indices]
            last = [requests[i][2][-1] for i in members]
            rows = [row for row, _ in batch]
            asked = [[row.prompt, row.branches] for row in rows], last
            scores.update(zip(members, self._kept(asked, partial(self._score, rows, last)), strict=True))
            self._on_progress(len(scores), len(requests))
        rest = [i for i in range(len(requests)) if i not in scores]
        rest.sort(key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for members in (rest[start : start + self.batch_size] for start in range(0, len(rest), self.batch_size)):
            theirs = [requests[i] for i in members]
            whole = partial(super()._loglikelihood_tokens, theirs, disable_tqdm=True)
            scores.update(zip(members, self._kept([request[1:] for request in theirs], whole), strict=True))
            self._on_progress(len(scores), len(requests))
        return [scores[i] for i in range(len(requests))]

    def _kept(self, asked: Any, answer: Callable[[], list[Score]]) -> list[Score]:
        """Returns the scores that are kept of a pass, or works them out and keeps them."""
        key = self._journal.key(asked)
        known = self._journal.recall(key)
        if known is None:
            known = answer()
            self._journal.keep(key, known)
        return [(value, bool(greedy)) for value, greedy in known]

    def _batches(self, rows: Iterable[tuple[Row, list[int]]]) -> list[list[tuple[Row, list[int]]]]:
        """Returns the rows in batches, long ones first: if memory runs out, then at once."""
        batches: list[list[tuple[Row, list[int]]]] = []
        for item in sorted(rows, key=lambda item: -item[0].length):
            if batches and self._takes(batches[-1], item[0].length):
                batches[-1].append(item)
            else:
                batches.append([item])
        return batches

    def _takes(self, batch: list[tuple[Row, list[int]]], length: int) -> bool:
        """Whether a batch takes one more row, no longer than those it has."""
        if self._room is None:
            return len(batch) < int(self.batch_size)
        longest, rows = batch[0][0].length, len(batch)
        if rows * longest >= self._room // 4 and length < LEAST_FILLED * longest:
            return False  # busy enough: padding would cost more than another pass
        return (rows + 1) * longest <= self._room

    def _single_rows(self, requests: list[Request], indices: Iterable[int]) -> Iterator[tuple[Row, list[int]]]:
        """Yields one row a request, its prompt cut on the left to what the model can read."""
        for i in indices:
            _, prompt, answer = requests[i]
            over = max(0, len(prompt) + len(answer) - 1 - self.max_length)
            branch = answer[:-1]
            yield Row(prompt[over:], [branch], [[True] * len(branch)]), [i]

    def _rows(self, requests: list[Request], indices: Iterable[int]) -> Iterator[tuple[Row, list[int]]]:
        """Yields rows and, for each of their branches, the request it answers."""
        groups: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for i in indices:
            groups[tuple(requests[i][1])].append(i)
        for context, members in groups.items():
            lengths = [len(requests[i][2]) for i in members]
            for chunk in _chunks(members, lengths, room=max(BRANCH_TOKENS, len(context))):
                branches = [requests[i][2][:-1] for i in chunk]
                yield Row(list(context), branches, [[True] * len(branch) for branch in branches]), chunk

    def _score(self, rows: list[Row], last: list[int]) -> list[Score]:
        """Returns the score of every branch of `rows` continued by its token of `last`.

        In one forward pass; where its memory runs out and no batch size was asked for, in two or more.
        """
        try:
            return self._score_together(rows, last)
        except torch.cuda.OutOfMemoryError:
            if self._room is None or len(rows) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(rows) // 2
        branches = sum(len(row.branches) for row in rows[:half])
        return self._score(rows[:half], last[:branches]) + self._score(rows[half:], last[branches:])

    @torch.inference_mode()
    def _score_together(self, rows: list[Row], last: list[int]) -> list[Score]:
        """Returns the score of every branch of `rows` continued by its token of `last`, in one forward pass."""
        pad = self.tokenizer.pad_token_id
        batch = _with_last_tokens(collate(rows, pad_token_id=pad, mask_dtype=self.model.dtype), rows, last)
        batch = batch.to(self.device)
        with AdapterContext(token_mask=batch.token_mask, aux=False, prompt_mask=batch.prompt_mask):
            logprobs, best = target_scores(self.model, batch, best=True)
        choice = batch.choice.cpu()
        sums = torch.zeros(len(last), dtype=torch.float64).index_add_(0, choice, logprobs.double().cpu())
        misses = torch.zeros(len(last), dtype=torch.long).index_add_(0, choice, (~cast("Tensor", best)).long().cpu())
        return [(value, count == 0) for value, count in zip(sums.tolist(), misses.tolist(), strict=True)]


def _with_last_tokens(batch: Batch, rows: list[Row], last: list[int]) -> Batch:
    """Returns the batch with one more target a branch, its token of `last`.

    It is predicted by the branch's last token, or the prompt's where the branch is empty.
    """
    ends = []
    for b, row in enumerate(rows):
        end = b * batch.input_ids.shape[1] + len(row.prompt)
        prompt_end = end - 1
        for branch in row.branches:
            end += len(branch)
            ends.append(end - 1 if branch else prompt_end)
    return replace(
        batch,
        sources=torch.cat([batch.sources, torch.tensor(ends)]),
        targets=torch.cat([batch.targets, torch.tensor(last)]),
        choice=torch.cat([batch.choice, torch.arange(len(last))]),
    )


def _chunks(members: list[int], lengths: list[int], room: int) -> Iterator[list[int]]:
    """Splits `members` in order so that the lengths of a chunk add up to at most `room` (or it is one member)."""
    chunk, used = list[int](), 0
    for member, length in zip(members, lengths, strict=True):
        if chunk and used + length > room:
            yield chunk
            chunk, used = [], 0
        chunk.append(member)
        used += length
    yield chunk


def longest_shared_sequence(model: PreTrainedModel) -> int:
    """Returns how long a prompt with one continuation may be for its prompt to be shared, in tokens; 0: never.

    Sharing needs a model whose places are given by `position_ids` and whose attention takes a dense 4-D mask. That
    leaves out models without that argument and those with ALiBi (places are distances in the row), recurrent ones (the
    branches would run into one another), and kernels that take no dense mask (flash attention, flex attention). A dense
    mask also overrides a sliding window, which changes nothing while the sequence is no longer than the window.
    """
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    if (
        "position_ids" not in inspect.signature(model.forward).parameters
        or getattr(config, "alibi", False)
        or getattr(model, "_is_stateful", False)
        or not layers <= {"full_attention", "sliding_attention"}
        or config._attn_implementation not in ("sdpa", "eager")
    ):
        return 0
    window = getattr(config, "sliding_window", None)
    return int(window) if window else sys.maxsize
