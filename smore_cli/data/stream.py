"""Rows of a stream: read, rendered and tokenised when they are needed, in an order that follows from the seed alone.

    source    a buffer of `shuffle_buffer` rows is filled; a random one is drawn and the next row takes its place; at
              the end the rest are drawn in random order, and the next epoch begins with a shuffle of its own
    mixture   before each draw a source is picked at random by its weight
    draw i    the i-th row of that, i = 0, 1, ...: what `StreamRows[i]` tokenises

A stream is wound forward by drawing without tokenising, so the rows of step n are found without the n steps before, and
a process tokenises only the rows of its own passes. Every drawn row goes into a hash: at any draw it tells whether the
rows so far are those of another run, without looking at what has not been read.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from smore_cli.data.build import check_source
from smore_cli.data.cache import settings_hash
from smore_cli.data.encode import Encoder
from smore_cli.data.entries import Entry, entry_reader
from smore_cli.data.formats import read_examples
from smore_cli.data.groups import number_labels
from smore_cli.data.pipeline import encode_examples, encode_source
from smore_cli.data.sources import SourceRows
from smore_cli.data.templates import Renderer
from smore_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from smore_cli.data.batch import Row
    from smore_cli.data.groups import Label
    from smore_cli.recipe.schema import DataConfig

__all__ = ["Reached", "StreamRows"]

FRUITLESS = 1000
"""Rows in a row with nothing to learn, after which it is no accident."""


class Reached(NamedTuple):
    """How far a stream is.

    Attributes:
        draws: rows drawn.
        hash: of these rows, their order, and how they are written and tokenised.
        epochs: how often all sources had ended.
    """

    draws: int
    hash: str
    epochs: int


class Draw(NamedTuple):
    """One draw: which of the sources, how often it had ended before, and the row."""

    source: int
    epoch: int
    entry: Entry


@dataclass(frozen=True)
class _OneRow(SourceRows):
    """A single row of a source; its origin says already where it stands."""

    def place(self, number: int) -> str:
        return self.origin


class StreamRows:
    """The draws of a run as tokenised rows, by number; not a sequence, as it has no end.

    Args:
        data: the recipe's data section.
        tokenizer: a fast tokenizer.
        seed: of the order.

    Attributes:
        groups: what the data calls the groups of its rows.
        identity: hash of the settings that the rows depend on.

    Raises:
        DataError: a source is not there or cannot be streamed, or settings contradict each other.
        ModelError: the tokenizer cannot do what is asked.
    """

    def __init__(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._data, self._seed = data, seed
        self._renderer, self._encoder = Renderer(data, tokenizer), Encoder(tokenizer, data.max_length)
        for source in data.train:
            check_source(data, source, self._renderer)
        self._readers = [entry_reader(source) for source in data.train]
        labels: list[Label | None] = [source.group for source in data.train]
        self._numbers, self.groups = number_labels(labels)
        self.identity = settings_hash(data, tokenizer, data.train)
        self.restart()

    def restart(self) -> None:
        """Goes back to the first draw; a process that inherits this object must, or two would share one open file."""
        weights = [source.weight or 1.0 for source in self._data.train]
        self._draws = _draws(self._readers, weights, self._data.shuffle_buffer, self._seed)
        self._known: dict[int, Row | Draw] = {}
        self._reached = {0: Reached(0, hashlib.sha256(self.identity.encode()).hexdigest(), 0)}
        self._epochs = [0] * len(self._readers)
        self._first = self._next = 0

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what is read so far, for processes that get a copy."""
        begun = {"_draws", "_known", "_reached", "_epochs", "_first", "_next"}
        return {name: value for name, value in self.__dict__.items() if name not in begun}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over the rest, at the first draw."""
        self.__dict__.update(state)
        self.restart()

    def __getitem__(self, number: int) -> Row:
        """Returns draw `number`, tokenised; in place of one that is to be dropped stands the next that is not.

        Raises:
            DataError: its row cannot be read, is not of its format or has nothing to learn; names file and line.
        """
        sources: dict[str, None] = {}  # of the fruitless draws, in their order
        for place in range(number, number + FRUITLESS):
            draw = self._wind(place)
            found = self._tokenised(draw) if isinstance(draw, Draw) else draw
            if isinstance(draw, Draw):
                sources[self._data.train[draw.source].path] = None
            if found is not None:
                self._known[number] = found
                return found
        problem = f"{', '.join(sources)}: {FRUITLESS:,} rows one after another have no token to learn"
        raise DataError(problem, "raise data.max_length, or see that the rows have answers")

    def tokenise(self, numbers: Iterable[int]) -> None:
        """Tokenises several draws at once, which is faster than one by one; what is wrong with one shows at `[...]`."""
        by_source: dict[int, dict[int, Entry]] = {}
        for number in numbers:
            if isinstance(draw := self._wind(number), Draw):
                by_source.setdefault(draw.source, {})[number] = draw.entry
        for place, entries in by_source.items():
            with suppress(DataError):
                self._tokenise_together(place, entries)

    def _tokenise_together(self, place: int, entries: dict[int, Entry]) -> None:
        source = self._data.train[place]
        raw = SourceRows(source.path, [entry.row() for entry in entries.values()], source.columns, source.roles)
        examples = zip(entries, read_examples(raw, source.format), strict=True)
        style = self._renderer.style(source.format)
        found = list(encode_examples(examples, raw, self._renderer, self._encoder, style))
        made = Counter(number for number, _ in found)
        for number, encoded in found:
            if made[number] == 1 and encoded.learnable:
                self._known[number] = replace(encoded.row, group=self._numbers[place])

    def reached(self, draws: int) -> Reached:
        """Returns what there is to say after so many draws."""
        if draws < self._first:
            self.restart()
        if draws > self._next:
            self._wind(draws - 1)
        return self._reached[draws]

    def forget(self, before: int) -> None:
        """Gives up the draws below a number; to go back there is to read again from the beginning."""
        for number in range(self._first, min(before, self._next)):
            self._known.pop(number, None)
            self._reached.pop(number, None)
        self._first = max(self._first, min(before, self._next))

    def _wind(self, number: int) -> Row | Draw:
        """Returns a draw, tokenised or not yet, after all that come before it."""
        if number < self._first:
            self.restart()
        while self._next <= number:
            draw = next(self._draws)
            self._epochs[draw.source] = draw.epoch
            before = self._reached[self._next].hash.encode()
            now = hashlib.sha256(before + draw.entry.content()).hexdigest()
            self._known[self._next] = draw
            self._next += 1
            self._reached[self._next] = Reached(self._next, now, min(self._epochs))
        return self._known[number]

    def _tokenised(self, draw: Draw) -> Row | None:
        """Returns a row's tokens, or None where it has nothing to learn and is to be dropped."""
        source, place = self._data.train[draw.source], draw.entry.place
        raw = _OneRow(place, [draw.entry.row()], source.columns, source.roles)
        try:
            found = [encoded for _, encoded in encode_source(raw, source, self._renderer, self._encoder)]
        except DataError as error:
            raise DataError(error.message.removesuffix(": one row (row 1)"), error.hint) from error
        if len(found) != 1:
            problem = f"{place}: the chat template rewrites earlier turns, so this conversation makes {len(found)} rows"
            raise DataError(problem, "use loss_on: last_turn, or set data.streaming: false")
        if found[0].learnable:
            return replace(found[0].row, group=self._numbers[draw.source])
        if self._data.on_no_supervision == "error":
            hint = f"max_length {self._data.max_length} cuts its answer off, or it has none: raise max_length, or set "
            raise DataError(f"{place}: no token to learn", f"{hint}on_no_supervision: drop")
        return None


def _draws(readers: list[Callable[[], Iterator[Entry]]], weights: list[float], size: int, seed: int) -> Iterator[Draw]:
    streams = [_shuffled(read, place, size, seed) for place, read in enumerate(readers)]
    dice, totals = random.Random(f"mixture {seed}"), list(accumulate(weights))
    while True:
        place = dice.choices(range(len(streams)), cum_weights=totals)[0] if len(streams) > 1 else 0
        yield next(streams[place])


def _shuffled(read: Callable[[], Iterator[Entry]], place: int, size: int, seed: int) -> Iterator[Draw]:
    """Yields the rows of a source for ever, every epoch in another order."""
    epoch = 0
    while True:
        dice = random.Random(f"source {place} epoch {epoch} {seed}")
        entries = read()
        buffer = list(islice(entries, size))
        if not buffer:
            raise DataError(f"data.train.{place} is empty: it holds no row", "take it out of the recipe")
        for entry in entries:
            drawn = dice.randrange(len(buffer))
            yield Draw(place, epoch, buffer[drawn])
            buffer[drawn] = entry
        if size > 1:
            dice.shuffle(buffer)
        for entry in buffer:
            yield Draw(place, epoch, entry)
        epoch += 1
