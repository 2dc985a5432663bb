"""Rewriting a value in another form: dates, times, units, lists, names, amounts. The wrong choices are near misses.

Every kind is a function of a random generator that returns the source value, the question, the right form and the near
misses. A source value belongs to a group (all date kinds share one group, all list kinds another): within a group no
value is used twice, so 3 March 2021 is asked for in one format, once, in one file.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from smore_cli.data.quickstart.items import Item
from smore_cli.data.quickstart.reformat_text import ADJECTIVES, FIRST_NAMES, MONTHS, ONES, SURNAMES, TENS, UNITS, WORDS

__all__ = ["KINDS", "Draw", "reformat_items"]


class Draw(NamedTuple):
    """One drawn question: the value it starts from, its wordings, the right form and the near misses."""

    source: str
    wordings: tuple[str, ...]
    answer: str
    misses: tuple[str, ...]


def reformat_items(per_kind: int, rng: random.Random) -> Iterator[Item]:
    """`per_kind` questions of every kind, each with its own source value, in one of the kind's wordings."""
    used: set[tuple[str, str]] = set()
    for group, name, draw in KINDS:
        made = 0
        while made < per_kind:
            source, wordings, answer, misses = draw(rng)
            wrong = tuple(miss for miss in dict.fromkeys(misses) if miss != answer)
            if (group, source) in used or len(wrong) < 3:
                continue
            used.add((group, source))
            wording = made % len(wordings)
            chosen = tuple(rng.sample(wrong, 3))
            yield Item("reformat", name, source, wording, wordings[wording], answer, chosen)
            made += 1


def _date(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(1950, 2039), rng.randint(1, 12), rng.randint(1, 28)


def _other_month(month: int) -> int:
    return month % 12 + 1


def _date_iso(rng: random.Random) -> Draw:
    y, m, d = _date(rng)
    text = f"{d} {MONTHS[m - 1]} {y}"
    misses = (f"{y}-{d:02}-{m:02}", f"{y}-{_other_month(m):02}-{d:02}", f"{d:02}-{m:02}-{y}", f"{y}-{m:02}-{d + 1:02}")
    wordings = (f"Write {text} as YYYY-MM-DD.", f"Give the date {text} in the form YYYY-MM-DD.")
    return Draw(f"{y}-{m:02}-{d:02}", wordings, f"{y}-{m:02}-{d:02}", misses)


def _date_slash(rng: random.Random) -> Draw:
    y, m, d = _date(rng)
    text = f"{d} {MONTHS[m - 1]} {y}"
    misses = (f"{m:02}/{d:02}/{y}", f"{d:02}/{_other_month(m):02}/{y}", f"{y}/{m:02}/{d:02}", f"{d + 1:02}/{m:02}/{y}")
    wordings = (f"Write {text} as DD/MM/YYYY.", f"Give the date {text} in the form DD/MM/YYYY.")
    return Draw(f"{y}-{m:02}-{d:02}", wordings, f"{d:02}/{m:02}/{y}", misses)


def _date_words(rng: random.Random) -> Draw:
    y, m, d = _date(rng)
    month, other, swapped = MONTHS[m - 1], MONTHS[_other_month(m) - 1], MONTHS[(d - 1) % 12]
    misses = (f"{d} {other} {y}", f"{m} {swapped} {y}", f"{d} {month} {y + 1}", f"{d + 1} {month} {y}")
    source = f"{y}-{m:02}-{d:02}"
    wordings = (f"Write {source} with the month as a word.", f"Spell out the month in the date {source}.")
    return Draw(source, wordings, f"{d} {month} {y}", misses)


def _time(rng: random.Random) -> tuple[int, int]:
    return rng.randint(13, 23), rng.randint(1, 59)


def _time_24(rng: random.Random) -> Draw:
    h, m = _time(rng)
    text = f"{h - 12}:{m:02} pm"
    misses = (f"{h - 12:02}:{m:02}", f"{h - 2}:{m:02}", f"{(h + 1) % 24:02}:{m:02}", f"{h}:{(m + 10) % 60:02}")
    wordings = (f"Write {text} in 24-hour time.", f"On a 24-hour clock, what is {text}?")
    return Draw(f"{h}:{m:02}", wordings, f"{h}:{m:02}", misses)


def _time_12(rng: random.Random) -> Draw:
    h, m = _time(rng)
    hour = h - 12
    misses = (f"{hour}:{m:02} am", f"{h - 10}:{m:02} pm", f"{hour}:{(m + 10) % 60:02} pm", f"{hour + 1}:{m:02} pm")
    wordings = (f"Write {h}:{m:02} with am or pm.", f"On a 12-hour clock, what is {h}:{m:02}?")
    return Draw(f"{h}:{m:02}", wordings, f"{hour}:{m:02} pm", misses)


def _number(value: float) -> str:
    """A number without a useless fraction: 2500, 2.5, 0.25."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


def _units_down(rng: random.Random) -> Draw:
    large, small, factor = rng.choice(UNITS)
    tenths = rng.randint(11, 99)
    value, right = tenths / 10, tenths * factor / 10
    # Counting an hour as 100 minutes is the slip people make; for decimal units it would be the right answer.
    slip = value * 100 if factor == 60 else right + factor / 10
    wrong = (right * 10, right / 10, right + factor, slip)
    wordings = (f"Convert {_number(value)} {large} to {small}.", f"How many {small} are {_number(value)} {large}?")
    return Draw(
        f"{tenths} {large}", wordings, f"{_number(right)} {small}", tuple(f"{_number(w)} {small}" for w in wrong)
    )


def _units_up(rng: random.Random) -> Draw:
    large, small, factor = rng.choice(UNITS)
    tenths = rng.randint(11, 99)
    value, right = tenths * factor / 10, tenths / 10
    wrong = (right * 10, right / 10, right + 1, right + 0.1)
    wordings = (f"Convert {_number(value)} {small} to {large}.", f"How many {large} are {_number(value)} {small}?")
    return Draw(
        f"{tenths} {large}", wordings, f"{_number(right)} {large}", tuple(f"{_number(w)} {large}" for w in wrong)
    )


def _words(rng: random.Random, count: int) -> tuple[list[str], str]:
    """`count` words, and their sorted form as the source value: the same words in another order are the same value."""
    words = rng.sample(WORDS, count)
    return words, " ".join(sorted(words))


def _swapped(words: list[str], i: int, j: int) -> list[str]:
    changed = list(words)
    changed[i], changed[j] = changed[j], changed[i]
    return changed


def _list_sort(rng: random.Random) -> Draw:
    words, source = _words(rng, 3)
    right = sorted(words)
    wrong = (_swapped(right, 0, 1), _swapped(right, 1, 2), right[::-1], words)
    text = ", ".join(words)
    wordings = (f"Sort alphabetically: {text}.", f"Put these words in alphabetical order: {text}.")
    return Draw(source, wordings, ", ".join(right), tuple(", ".join(w) for w in wrong))


def _list_reverse(rng: random.Random) -> Draw:
    words, source = _words(rng, 3)
    right = words[::-1]
    wrong = (_swapped(right, 0, 1), _swapped(right, 1, 2), words, [right[0], *words[:2]])
    text = ", ".join(words)
    wordings = (f"Reverse the list: {text}.", f"Write this list from last to first: {text}.")
    return Draw(source, wordings, ", ".join(right), tuple(", ".join(w) for w in wrong))


def _list_semicolons(rng: random.Random) -> Draw:
    (a, b, c), source = _words(rng, 3)
    misses = (f"{a}, {b}; {c}", f"{a}; {b}, {c}", f"{a}; {c}; {b}", f"{a}: {b}: {c}", f"{a}, {b}, {c}")
    wordings = (f"Write with semicolons: {a}, {b}, {c}.", f"Put semicolons instead of commas: {a}, {b}, {c}.")
    return Draw(source, wordings, f"{a}; {b}; {c}", misses)


def _list_and(rng: random.Random) -> Draw:
    (a, b, c), source = _words(rng, 3)
    misses = (f"{a} and {b}, {c}", f"{a}, {c} and {b}", f"{a}, {b} or {c}", f"{a}, {b}, {c} and")
    wordings = (f"Join as a phrase: {a} / {b} / {c}.", f"Write as a list with and before the last: {a} / {b} / {c}.")
    return Draw(source, wordings, f"{a}, {b} and {c}", misses)


def _phrase(rng: random.Random) -> tuple[str, str, str]:
    first, second = rng.sample(ADJECTIVES, 2)
    return first, second, rng.choice(WORDS)


def _phrase_hyphens(rng: random.Random) -> Draw:
    a, b, c = _phrase(rng)
    misses = (f"{a}_{b}_{c}", f"{a} {b}-{c}", f"{a}-{b} {c}", f"{a.title()}-{b.title()}-{c.title()}", f"{b}-{a}-{c}")
    wordings = (f"Write as a file name with hyphens: {a} {b} {c}.", f"Join with hyphens: {a} {b} {c}.")
    return Draw(f"{a} {b} {c}", wordings, f"{a}-{b}-{c}", misses)


def _phrase_title(rng: random.Random) -> Draw:
    a, b, c = _phrase(rng)
    title = f"{a} {b} {c}".title()
    misses = (f"{a.title()} {b} {c}", f"{a} {b} {c}", f"{a.title()} {b.title()} {c}", f"{a} {b.title()} {c.title()}")
    wordings = (f"Capitalise every word: {a} {b} {c}.", f"Write in title case: {a} {b} {c}.")
    return Draw(f"{a} {b} {c}", wordings, title, misses)


def _money(rng: random.Random) -> Draw:
    d, c = rng.randint(2, 59), rng.randint(2, 98)
    misses = (f"${d}.{c % 10}{c // 10}", f"${c}.{d:02}", f"${d + 1}.{c:02}", f"${d}{c:02}", f"{d}.${c:02}")
    wordings = (f"Write {d} dollars and {c} cents as an amount.", f"Give {d} dollars {c} cents as a price.")
    return Draw(f"{d}.{c:02}", wordings, f"${d}.{c:02}", misses)


def _surname_first(rng: random.Random) -> Draw:
    first, last = rng.choice(FIRST_NAMES), rng.choice(SURNAMES)
    misses = (f"{first}, {last}", f"{last} {first}", f"{last}; {first}", f"{first} {last},")
    wordings = (f"Write {first} {last} with the surname first.", f"How does {first} {last} stand in a name index?")
    return Draw(f"{first} {last}", wordings, f"{last}, {first}", misses)


def _percent(rng: random.Random) -> Draw:
    n = rng.randint(2, 98)
    misses = (f"0.{n:02}%", f"{n}0%", f"{n / 10:.1f}%", f"{n + 10}%")
    value = _number(n / 100)
    return Draw(value, (f"Write {value} as a percentage.", f"What is {value} in per cent?"), f"{n}%", misses)


def _ordinal(rng: random.Random) -> Draw:
    n = rng.randint(1, 129)
    last = 0 if n // 10 % 10 == 1 else n % 10
    right = {1: "st", 2: "nd", 3: "rd"}.get(last, "th")
    misses = tuple(f"{n}{end}" for end in ("st", "nd", "rd", "th") if end != right)
    return Draw(str(n), (f"Write {n} as an ordinal number.", f"Add the ordinal ending to {n}."), f"{n}{right}", misses)


def _digits(rng: random.Random) -> Draw:
    hundreds, tens, ones = rng.randint(1, 9), rng.randint(2, 9), rng.randint(1, 9)
    text = f"{ONES[hundreds - 1]} hundred and {TENS[tens - 2]}-{ONES[ones - 1]}"
    right = f"{hundreds}{tens}{ones}"
    misses = (f"{hundreds}{ones}{tens}", f"{hundreds}0{tens}{ones}", f"{tens}{hundreds}{ones}", f"{right}0")
    return Draw(right, (f"Write {text} in digits.", f"Which number is {text}?"), right, misses)


KINDS: tuple[tuple[str, str, Callable[[random.Random], Draw]], ...] = (
    ("date", "date_iso", _date_iso),
    ("date", "date_slash", _date_slash),
    ("date", "date_words", _date_words),
    ("time", "time_24", _time_24),
    ("time", "time_12", _time_12),
    ("unit", "units_down", _units_down),
    ("unit", "units_up", _units_up),
    ("list", "list_sort", _list_sort),
    ("list", "list_reverse", _list_reverse),
    ("list", "list_semicolons", _list_semicolons),
    ("list", "list_and", _list_and),
    ("phrase", "phrase_hyphens", _phrase_hyphens),
    ("phrase", "phrase_title", _phrase_title),
    ("money", "money", _money),
    ("name", "surname_first", _surname_first),
    ("percent", "percent", _percent),
    ("ordinal", "ordinal", _ordinal),
    ("digits", "digits", _digits),
)
