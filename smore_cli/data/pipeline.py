"""From what rows mean to checked tokens: rendered, tokenised and held against the invariants, a thousand at a time.

One conversation can become several rows, one for each assistant turn, where one row cannot hold every turn as the model
would be asked for it. So rows carry the number of the raw row that they come from.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from smore_cli.data.chat import FIXED_DATE, TurnsRewritten
from smore_cli.data.formats import Conversation, read_examples
from smore_cli.data.invariants import HINTS, OTHER_PROMPT, Invariants
from smore_cli.data.report import name_rows
from smore_cli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Literal

    from smore_cli.data.encode import Encoded, Encoder
    from smore_cli.data.formats import Example
    from smore_cli.data.sources import SourceRows
    from smore_cli.data.templates import Rendered, Renderer
    from smore_cli.recipe.schema import Source

__all__ = ["encode_examples", "encode_source", "notice_lines"]

CHUNK = 1000
"""Rows given to the tokenizer at a time: enough to keep its threads busy."""

SPLIT = "conversations became one row for each assistant turn, as each turn changes how earlier ones are written"
DATED = f"rows say {FIXED_DATE:%d %b %Y} where the chat template asks for today's date, to be the same tomorrow"


def encode_source(
    raw: SourceRows, source: Source, renderer: Renderer, encoder: Encoder
) -> Iterator[tuple[int, Encoded]]:
    """Yields the tokenised rows of a whole source; see `encode_examples`.

    Raises:
        DataError: a row is not of the source's format, cannot be written, or violates an invariant.
    """
    examples = enumerate(read_examples(raw, source.format), 1)
    return encode_examples(examples, raw, renderer, encoder, renderer.style(source.format))


def encode_examples(
    examples: Iterable[tuple[int, Example]],
    raw: SourceRows,
    renderer: Renderer,
    encoder: Encoder,
    style: Literal["plain", "chat"],
) -> Iterator[tuple[int, Encoded]]:
    """Yields the tokenised rows of a source, each with the number of the raw row it comes from.

    Args:
        examples: what the rows mean, with their numbers; read a chunk at a time.
        raw: the source, for the names of places in errors and for `notices`.
        renderer: writes examples as text.
        encoder: tokenises them.
        style: how the source is written, from `renderer.style`.

    Raises:
        DataError: a row cannot be written, or rows violate an invariant; their numbers are named.
    """
    invariants = Invariants(encoder.tokenizer, encoder.leading)
    numbered = iter(examples)
    while chunk := list(islice(numbered, CHUNK)):
        if style == "chat" and renderer.template.writes_date:
            raw.notices[DATED] += len(chunk)
        rendered = [pair for number, example in chunk for pair in _render(number, example, raw, renderer, style)]
        encoded = encoder.encode([text for _, text in rendered])
        yield from _checked(chunk, rendered, encoded, raw, renderer, encoder, invariants)


def _render(
    number: int, example: Example, raw: SourceRows, renderer: Renderer, style: Literal["plain", "chat"]
) -> list[tuple[int, Rendered]]:
    try:
        try:
            return [(number, renderer.render(example, style))]
        except TurnsRewritten:
            if not isinstance(example, Conversation) or renderer.data.loss_on != "assistant":
                raise
            raw.notices[SPLIT] += 1
            return [(number, turn) for turn in renderer.render_turns(example)]
    except DataError as error:
        raise DataError(f"{raw.place(number)}: {error.message}", error.hint) from error


def _checked(
    examples: list[tuple[int, Example]],
    rendered: list[tuple[int, Rendered]],
    encoded: list[Encoded],
    raw: SourceRows,
    renderer: Renderer,
    encoder: Encoder,
    invariants: Invariants,
) -> list[tuple[int, Encoded]]:
    """Returns the rows of a chunk, those split whose turns cannot share a row.

    Raises:
        DataError: rows violate an invariant.
    """
    by_number = dict(examples)
    rows: list[tuple[int, Encoded]] = []
    violations: dict[str, list[int]] = {}
    problems = invariants.problems([text for _, text in rendered], encoded)
    for (number, text), row, problem in zip(rendered, encoded, problems, strict=True):
        example = by_number[number]
        if problem == OTHER_PROMPT and isinstance(example, Conversation) and len(text.branches[0].spans) > 1:
            # An answer that begins with white space: later turns read it as one token with what stands before it.
            raw.notices[SPLIT] += 1
            turns = renderer.render_turns(example)
            apart = encoder.encode(turns)
            problem = next((found for found in invariants.problems(turns, apart) if found), None)
            rows += [(number, turn) for turn in apart]
        else:
            rows.append((number, row))
        if problem:
            violations.setdefault(problem, []).append(number)
    for problem, numbers in violations.items():
        seen = f"of the {len(examples):,} rows from {examples[0][0]:,} on"
        count = f"{len(numbers):,} {seen}" if len(numbers) > 1 else "one row"
        raise DataError(f"{raw.origin}: {problem}: {count} ({name_rows(numbers)})", HINTS[problem])
    return _without_lost_turns(rows)


def _without_lost_turns(rows: list[tuple[int, Encoded]]) -> list[tuple[int, Encoded]]:
    """Leaves out turns that max_length cut off, where other turns of their conversation are left to learn."""
    learnable = {number for number, row in rows if row.learnable}
    first = {number: place for place, (number, _) in reversed(list(enumerate(rows)))}
    return [
        (number, row)
        for place, (number, row) in enumerate(rows)
        if row.learnable or (number not in learnable and first[number] == place)
    ]


def notice_lines(raw: SourceRows) -> tuple[str, ...]:
    """Returns what there is to know about the rows of a source that was read, one line each."""
    return tuple(f"{raw.origin}: {count:,} {what}" for what, count in sorted(raw.notices.items()))
