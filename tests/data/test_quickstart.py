"""The shipped quick-start files: sound rows, right answers, nothing given away, no near-duplicate across the split."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from smore_cli.data import quickstart
from smore_cli.data.quickstart import make, science_earth, science_living, science_matter
from smore_cli.data.quickstart.items import Item, slug
from smore_cli.data.quickstart.split import deal

Row = dict[str, Any]

FOLDER = Path(quickstart.__file__).parent
FAMILIES = ("science", "arithmetic", "reformat", "labelling")


def read(name: str) -> list[Row]:
    return [json.loads(line) for line in (FOLDER / name).read_bytes().decode("ascii").splitlines()]


TRAIN, TEST = read("train.jsonl"), read("test.jsonl")
ROWS = TRAIN + TEST


def of(family: str, rows: list[Row] = ROWS) -> list[Row]:
    return [row for row in rows if row["family"] == family]


def kind(row: Row) -> str:
    return str(row["id"].split("/")[1])


def answer(row: Row) -> str:
    return str(row["choices"][row["label"]])


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


# ---- form and size


def test_sizes_are_as_documented() -> None:
    assert Counter(row["family"] for row in TRAIN) == dict.fromkeys(FAMILIES, 450)
    assert Counter(row["family"] for row in TEST) == dict.fromkeys(FAMILIES, 95)
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 1_000_000


def test_every_row_is_a_sound_multiple_choice_question() -> None:
    for row in ROWS:
        assert list(row) == ["id", "family", "question", "choices", "label"]
        assert len(set(row["choices"])) == len(row["choices"]), row
        assert len(row["choices"]) == 3 if "/mood-" in row["id"] else 4, row
        assert 0 <= row["label"] < len(row["choices"])
        for text in (row["question"], *row["choices"]):
            assert text and text == " ".join(text.split()), row


def test_ids_are_unique_and_name_their_family() -> None:
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    assert all(row["id"].startswith(row["family"] + "/") for row in ROWS)


def test_questions_are_short() -> None:
    assert sum(len(row["question"].split()) for row in ROWS) / len(ROWS) < 20
    assert max(len(row["question"].split()) for row in ROWS) < 40


# ---- nothing but the answer tells the answer


@pytest.mark.parametrize("rows", [TRAIN, TEST], ids=["train", "test"])
def test_the_right_choice_stands_equally_often_at_every_position(rows: list[Row]) -> None:
    positions: dict[tuple[str, int], Counter[int]] = defaultdict(Counter)
    for row in rows:
        positions[row["family"], len(row["choices"])][row["label"]] += 1
    for (_, choices), counts in positions.items():
        assert len(counts) == choices and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pick", [min, max], ids=["shortest", "longest"])
def test_length_does_not_give_the_answer_away(family: str, pick: Callable[[list[int]], int]) -> None:
    hits = 0.0
    for row in of(family):
        lengths = [len(choice) for choice in row["choices"]]
        if len(answer(row)) == pick(lengths):
            hits += 1 / lengths.count(pick(lengths))  # ties are guessed among
    assert hits / len(of(family)) < 0.33


def test_size_does_not_give_an_arithmetic_answer_away() -> None:
    ranks = Counter(sorted(map(int, row["choices"])).index(int(answer(row))) for row in of("arithmetic"))
    assert all(0.18 < ranks[rank] / len(of("arithmetic")) < 0.32 for rank in range(4))


@pytest.mark.parametrize("rows", [TRAIN, TEST], ids=["train", "test"])
def test_labels_of_a_labelling_task_are_about_equally_frequent(rows: list[Row]) -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in of("labelling", rows):
        task, label = kind(row).split("-")
        assert label == answer(row)
        counts[task][label] += 1
    assert {task: sorted(labels) for task, labels in counts.items()} == {
        "desk": ["badge", "gadget", "ledger", "parcel"],
        "mood": ["cloudy", "stormy", "sunny"],
        "page": ["atlas", "meadow", "pantry", "pitch"],
    }
    for labels in counts.values():
        assert min(labels.values()) / max(labels.values()) > 0.75


# ---- the answers are right

STORIES: dict[str, Callable[[int, int, int], float]] = {
    "gift": lambda a, b, c: a + b - c,
    "bus": lambda a, b, c: a - b + c,
    "boxes": lambda a, b, c: a * b + c,
    "packing": lambda a, b, c: a * b - c,
    "harvest": lambda a, b, c: (a + b) / c,
    "bakery": lambda a, b, c: (a - b) / c,
    "change": lambda a, b, c: c - a * b,
    "savings": lambda a, b, c: c + a * b,
    "reading": lambda a, b, c: c - a - b,
    "party_bags": lambda a, b, c: c * (a + b),
    "eggs": lambda a, b, c: c * (a - b),
    "sweets": lambda a, b, c: a / b + c,
    "card_game": lambda a, b, c: a / b - c,
    "tickets": lambda a, b, c: a / b * c,
    "teams": lambda a, b, c: a * b / c,
    "weather": lambda a, b, c: a - b + c,
    "farm": lambda a, b, c: a + b + c,
    "ages": lambda a, b, c: a + b - c,
    "water_tank": lambda a, b, c: a - b - c,
    "train_ride": lambda a, b, c: c - a - b,
    "cinema": lambda a, b, c: c - a * b,
    "snack_bar": lambda a, b, c: c * (a + b),
    "shelves": lambda a, b, c: a * b * c,
    "library": lambda a, b, c: a - b + c,
}


def numbers(row: Row) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", row["question"])]


def test_arithmetic_answers_follow_from_the_numbers_in_the_question() -> None:
    # In every text the numbers stand in the order a, b, c.
    for row in of("arithmetic"):
        assert STORIES[kind(row)](*numbers(row)) == int(answer(row)), row
    assert {kind(row) for row in of("arithmetic")} == set(STORIES)


def date_in(text: str, form: str) -> datetime:
    pattern = {"%d %B %Y": r"\d+ [A-Z][a-z]+ \d{4}", "%Y-%m-%d": r"\d{4}-\d\d-\d\d"}[form]
    return datetime.strptime(re.findall(pattern, text)[-1], form)


def converted(question: str) -> str:
    """The right answer of a unit question."""
    match = re.fullmatch(r"Convert ([\d.]+) (\w+) to (\w+)\.", question)
    if match:
        value, source, target = match.groups()
    else:
        match = re.fullmatch(r"How many (\w+) are ([\d.]+) (\w+)\?", question)
        assert match
        target, value, source = match.groups()
    scale = {"metres": {"cm": 100.0, "km": 1 / 1000}, "grams": {"mg": 1000.0, "kg": 1 / 1000}}
    scale |= {"kg": {"grams": 1000.0, "tonnes": 1 / 1000}, "cm": {"mm": 10.0, "metres": 1 / 100}}
    scale |= {"minutes": {"seconds": 60.0, "hours": 1 / 60}, "hours": {"minutes": 60.0}, "km": {"metres": 1000.0}}
    scale |= {"tonnes": {"kg": 1000.0}, "litres": {"ml": 1000.0}, "seconds": {"minutes": 1 / 60}}
    scale |= {"mg": {"grams": 1 / 1000}, "mm": {"cm": 1 / 10}, "ml": {"litres": 1 / 1000}}
    return f"{round(float(value) * scale[source][target], 6):g} {target}"


def tail(question: str) -> list[str]:
    """The words after the colon of a list or phrase question."""
    return re.split(r"[,/ ]+", question.split(": ")[1].rstrip("."))


def ordinal(question: str) -> str:
    number = str(re.findall(r"\d+", question)[0])
    irregular = {"1": "st", "2": "nd", "3": "rd"}
    return number + ("th" if number[-2:] in ("11", "12", "13") else irregular.get(number[-1], "th"))


def in_digits(question: str) -> str:
    ones = "zero one two three four five six seven eight nine".split()  # noqa: SIM905
    tens = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
    match = re.search(r"(\w+) hundred and (\w+)-(\w+)", question)
    assert match
    return str(ones.index(match[1]) * 100 + tens.index(match[2]) * 10 + ones.index(match[3]))


def long_date(question: str) -> str:
    date = date_in(question, "%Y-%m-%d")
    return f"{date.day} {date:%B %Y}"


def clock_12(question: str) -> str:
    hour, minute = re.findall(r"(\d+):(\d+)", question)[0]
    return f"{int(hour) - 12}:{minute} pm"


def clock_24(question: str) -> str:
    return f"{datetime.strptime(re.findall(r'[0-9]+:[0-9]+ pm', question)[0], '%I:%M %p'):%H:%M}"


def surname_first(question: str) -> str:
    match = re.search(r"([A-Z]\w+) ([A-Z]\w+) (?:with|stand)", question)
    assert match
    return f"{match[2]}, {match[1]}"


REFORMAT: dict[str, Callable[[str], str]] = {
    "date_iso": lambda q: f"{date_in(q, '%d %B %Y'):%Y-%m-%d}",
    "date_slash": lambda q: f"{date_in(q, '%d %B %Y'):%d/%m/%Y}",
    "date_words": long_date,
    "time_24": clock_24,
    "time_12": clock_12,
    "units_down": converted,
    "units_up": converted,
    "list_sort": lambda q: ", ".join(sorted(tail(q))),
    "list_reverse": lambda q: ", ".join(reversed(tail(q))),
    "list_semicolons": lambda q: "; ".join(tail(q)),
    "list_and": lambda q: "{}, {} and {}".format(*tail(q)),
    "phrase_hyphens": lambda q: "-".join(tail(q)),
    "phrase_title": lambda q: " ".join(word.capitalize() for word in tail(q)),
    "money": lambda q: "${}.{:0>2}".format(*re.findall(r"\d+", q)),
    "surname_first": surname_first,
    "percent": lambda q: f"{float(re.findall(r'0[.][0-9]+', q)[0]):.0%}",
    "ordinal": ordinal,
    "digits": in_digits,
}


def test_reformat_answers_follow_from_the_question() -> None:
    for row in of("reformat"):
        assert REFORMAT[kind(row)](row["question"]) == answer(row), row
    assert {kind(row) for row in of("reformat")} == set(REFORMAT)


TABLES = {t.name: t for t in (*science_living.TABLES, *science_matter.TABLES, *science_earth.TABLES)}


def test_no_wrong_science_choice_is_true_by_the_tables() -> None:
    for row in of("science"):
        table = TABLES[kind(row)]
        subject = next(s for s in table.facts if slug(s) == row["id"].split("/")[2])
        right = answer(row)
        wrong = [choice for choice in row["choices"] if choice != right]
        if right == subject:
            asked = table.facts[subject]
            assert asked in row["question"] and not any(table.holds(choice, asked) for choice in wrong), row
        else:
            assert subject in row["question"] and right == table.facts[subject], row
            assert not any(table.holds(subject, choice) for choice in wrong), row


# ---- no near-duplicates across the split


def asserted_fact(row: Row) -> tuple[str, str, str]:
    """The fact whose subject and answer both stand in question and answer, found without the id's material part."""
    text = " ".join(words(f"{row['question']} {answer(row)}"))
    found = [
        (kind(row), subject, fact)
        for subject, fact in TABLES[kind(row)].facts.items()
        if all(re.search(rf"\b{' '.join(words(part))}\b", text) for part in (subject, fact))
    ]
    assert found, row
    return max(found, key=lambda fact: len(fact[1]) + len(fact[2]))


def source_value(row: Row) -> object:
    """What a reformat row starts from, the same whatever it is turned into."""
    right, name = answer(row), kind(row)
    if name.startswith("date"):
        return datetime.strptime(REFORMAT["date_words"](right) if name == "date_iso" else right, DATE_FORMS[name])
    if name.startswith("time"):
        hour, minute = map(int, re.findall(r"\d+", right))
        return "time", hour % 12, minute
    if name.startswith("units"):
        return frozenset(re.findall(r"[\d.]+ [a-z]+", row["question"])) | {right}
    if name.startswith("list"):
        return frozenset(words(right)) - {"and"}
    return right.lower()


DATE_FORMS = {"date_iso": "%d %B %Y", "date_slash": "%d/%m/%Y", "date_words": "%d %B %Y"}
MATERIAL: dict[str, Callable[[Row], object]] = {
    "science": asserted_fact,
    "arithmetic": lambda row: (kind(row), *sorted(numbers(row))),
    "reformat": source_value,
    "labelling": lambda row: row["id"].rsplit("/", 1)[0],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_material_stands_in_both_files(family: str) -> None:
    train, test = ({MATERIAL[family](row) for row in of(family, rows)} for rows in (TRAIN, TEST))
    assert not train & test
    assert len(test) == 95  # every test row asks about something of its own


def test_no_question_stands_twice() -> None:
    assert len({" ".join(words(row["question"])) for row in ROWS}) == len(ROWS)


def test_no_test_row_shares_most_of_its_words_with_a_training_row() -> None:
    train = [set(words(f"{row['question']} {answer(row)}")) for row in TRAIN]
    for row in TEST:
        own = set(words(f"{row['question']} {answer(row)}"))
        assert max(len(own & other) / len(own | other) for other in train) <= 0.85, row


def test_quoted_texts_of_the_two_files_are_different_texts() -> None:
    def quoted(row: Row) -> set[str]:
        return set(words(row["question"].split('"')[1]))

    train = [quoted(row) for row in of("labelling", TRAIN)]
    for row in of("labelling", TEST):
        own = quoted(row)
        assert max(len(own & other) / len(own | other) for other in train) < 0.7, row


def test_dealing_keeps_a_material_together_and_drops_what_reads_the_same() -> None:
    items = [
        Item("f", "k", f"m{i}", w, f"Which is number {i}, way {w}?", str(i), ("a",)) for i in range(9) for w in (0, 1)
    ]
    twins = [Item("f", "k", f"twin{i}", 0, f"which is: number {i} way 0", str(i), ("a",)) for i in range(9)]
    train, test = deal([*items, *twins], 6, 3, random.Random(0))
    assert not {item.key for item in train} & {item.key for item in test}
    asked = [" ".join(words(item.question)) for item in (*train, *test)]
    assert len(set(asked)) == len(asked)
    with pytest.raises(ValueError, match="training questions"):
        deal(items, 100, 3, random.Random(0))


# ---- the files are what the script makes


def test_the_script_makes_the_shipped_files_in_a_fresh_process() -> None:
    command = [sys.executable, "-m", "smore_cli.data.quickstart.make", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_check_says_no_to_a_missing_and_to_a_changed_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--folder", str(tmp_path)]
    assert make.main([*options, "--check"]) == 3
    assert not list(tmp_path.iterdir())
    assert make.main(options) == 0
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write("\n")
    capsys.readouterr()
    assert make.main([*options, "--check"]) == 3
    assert "test.jsonl" in capsys.readouterr().err
