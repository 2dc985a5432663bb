"""Writes train.jsonl and test.jsonl of the quick-start set from the material in this package.

* `python -m smore_cli.data.quickstart.make` rewrites both files, byte for byte the same every time
* `python -m smore_cli.data.quickstart.make --check` writes nothing; exit 3 if a file is not what it would write
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from smore_cli.data.quickstart import science_earth, science_living, science_matter
from smore_cli.data.quickstart.arithmetic import arithmetic_items
from smore_cli.data.quickstart.items import Item
from smore_cli.data.quickstart.labelling import labelling_items
from smore_cli.data.quickstart.labelling_desk import DESK
from smore_cli.data.quickstart.labelling_mood import MOOD
from smore_cli.data.quickstart.labelling_page import PAGE
from smore_cli.data.quickstart.reformat import reformat_items
from smore_cli.data.quickstart.science import science_items
from smore_cli.data.quickstart.split import deal
from smore_cli.errors import CheckFailed

__all__ = ["build", "main"]

TRAIN_PER_FAMILY, TEST_PER_FAMILY = 450, 95
SEED = 20260


def build() -> dict[str, str]:
    """The text of every file by its name."""
    train: list[Item] = []
    test: list[Item] = []
    for family in _families():
        # Every family has its own generator: a change of one leaves the rows of the others as they are.
        family_items = list(family)
        rng = random.Random(f"{SEED} {family_items[0].family}")
        family_train, family_test = deal(family_items, TRAIN_PER_FAMILY, TEST_PER_FAMILY, rng)
        train += family_train
        test += family_test
    return {"train.jsonl": _file(train, "train"), "test.jsonl": _file(test, "test")}


def _families() -> list[Iterable[Item]]:
    """The questions of every family, more than are used."""
    facts = (*science_living.TABLES, *science_matter.TABLES, *science_earth.TABLES)
    return [
        science_items(facts, random.Random(f"{SEED} facts")),
        arithmetic_items(per_story=26, rng=random.Random(f"{SEED} numbers")),
        reformat_items(per_kind=34, rng=random.Random(f"{SEED} values")),
        labelling_items((DESK, MOOD, PAGE), per_text=4, rng=random.Random(f"{SEED} texts")),
    ]


def _file(items: Sequence[Item], name: str) -> str:
    """The rows in mixed order, one JSON object a line, the right choice equally often at every position."""
    rng = random.Random(f"{SEED} {name}")
    groups: dict[tuple[str, int], list[Item]] = defaultdict(list)
    for item in items:
        groups[item.family, len(item.wrong) + 1].append(item)
    rows = []
    for (_, choices), group in groups.items():
        positions = rng.sample([n % choices for n in range(len(group))], len(group))
        rows += [_row(item, position, rng) for item, position in zip(group, positions, strict=True)]
    rng.shuffle(rows)
    return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows)


def _row(item: Item, position: int, rng: random.Random) -> dict[str, object]:
    choices = rng.sample(item.wrong, len(item.wrong))
    choices.insert(position, item.answer)
    return {
        "id": item.id,
        "family": item.family,
        "question": item.question,
        "choices": choices,
        "label": position,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, or 3 where `--check` finds a file that differs."""
    parser = argparse.ArgumentParser(prog="python -m smore_cli.data.quickstart.make", description="quick-start data")
    parser.add_argument("--check", action="store_true", help="compare instead of writing; exit 3 on a difference")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the two files are")
    options = parser.parse_args(arguments)
    status = 0
    for name, text in build().items():
        path = options.folder / name
        if not options.check:
            path.write_bytes(text.encode("ascii"))
            print(f"{path}: {text.count(chr(10))} rows, {len(text)} bytes")
        elif not path.is_file() or path.read_bytes() != text.encode("ascii"):
            print(f"{path}: not what the script makes; run it without --check", file=sys.stderr)
            status = CheckFailed.exit_code
    return status


if __name__ == "__main__":
    sys.exit(main())
