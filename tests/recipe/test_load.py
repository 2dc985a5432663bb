from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smore_cli.errors import RecipeError
from smore_cli.methods import available_methods
from smore_cli.recipe import load_recipe

CORPUS = (Path(__file__).parent / "broken_recipes.txt").read_text(encoding="utf-8")
CASES = re.findall(r"^=== (\S+), line (\d)\n((?:(?!!).*\n)*?)((?:! .*\n)+)", CORPUS, flags=re.MULTILINE)

# One line each, with one mistake each, that do not touch one another.
INDEPENDENT = [
    "model: {name_or_path: smollm2-135m, dtype: bf16}",
    "adapter: {method: smore, fanouts: [2, 2]}",
    "data: {train: [{path: rows.jsonl, format: chat, name: x}]}",
    "train: {learning_rate: fast}",
    "eval: {steps: 1}",
    "seed: -1",
    "base_model: x",
    "quantization: {bits: 4, bits: 4}",
    "output_dir: 5",
]
SOUND = [
    "model: {name_or_path: smollm2-135m}",
    "adapter: {method: smore}",
    "data: {train: [{path: rows.jsonl, format: chat}]}",
    "train: {}",
    "eval: {}",
    "seed: 1",
    "# nothing",
    "quantization: {bits: 4}",
    "output_dir: runs/x",
]


def test_the_corpus_is_read_whole() -> None:
    assert len(CASES) == CORPUS.count("\n=== ") - 1 >= 60  # the first describes the form


@pytest.mark.parametrize(("number", "text", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_broken_recipe_is_answered_with_exactly_its_problems(
    problems: Callable[..., list[str]], good: str, number: str, text: str, expected: str
) -> None:
    lines = good.splitlines()
    lines[int(number) - 1 : int(number)] = text.splitlines()
    expected = expected.replace("{methods}", ", ".join(available_methods()))
    assert problems("\n".join(lines) + "\n") == [line[2:] for line in expected.splitlines()]


def test_a_sound_recipe_has_no_problem(problems: Callable[..., list[str]], good: str) -> None:
    assert problems(good) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n\tepochs: 1\n", "7:1: a tab; YAML is indented with spaces"),
        ("seed: \x07\n", "6:7: character U+0007 is not allowed in YAML"),
        ("train: " + "[" * 600, "1:1: nested too deeply"),
    ],
    ids=["tab", "control character", "deep nesting"],
)
def test_what_yaml_does_not_allow_is_one_clear_problem(
    problems: Callable[..., list[str]], good: str, text: str, expected: str
) -> None:
    assert problems(good + text) == [expected]


@settings(max_examples=40, deadline=None)
@given(broken=st.sets(st.integers(0, len(SOUND) - 1), min_size=1))
def test_independent_mistakes_are_all_found_in_one_pass(
    tmp_path_factory: pytest.TempPathFactory, broken: set[int]
) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    lines = [INDEPENDENT[index] if index in broken else line for index, line in enumerate(SOUND)]
    path.write_text("\n".join(["version: 1", *lines]), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert len(caught.value.problems) == len(broken)
    numbers = [int(re.match(rf"{re.escape(str(path))}:(\d+):", problem)[1]) for problem in caught.value.problems]  # type: ignore[index]
    assert numbers == sorted(index + 2 for index in broken)


def test_a_problem_shows_its_source_line_and_points_at_the_column(write: Callable[[str], Path], good: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(good + "train: {epoch: 1}\n"))
    assert caught.value.problems == [
        "recipe.yaml:6:9: unknown key 'epoch' in train: did you mean 'epochs'?\n"
        "     6 | train: {epoch: 1}\n"
        "       |         ^"
    ]


def test_a_very_long_source_line_is_shown_around_the_problem(write: Callable[[str], Path], good: str) -> None:
    roles = ", ".join(f"role_{number}: user" for number in range(100))
    line = f"data: {{train: [{{path: rows.jsonl, format: chat, roles: {{{roles}}}, kind: x}}]}}\n"
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(good.replace("data: {train: [{path: rows.jsonl, format: chat}]}\n", line)))
    _, shown, caret = caught.value.problems[0].splitlines()
    assert len(shown) < 140
    assert shown[caret.index("^") :].startswith("kind: x")


def test_a_file_that_is_no_recipe_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "latin.yaml").write_bytes("version: 1\nmodel: é\n".encode("latin-1"))
    (tmp_path / "large.yaml").write_bytes(b"a" * (2 << 20))
    for name, expected in {
        "missing.yaml": ": no such file",
        ".": ": a folder, not a recipe",
        "empty.yaml": ": the recipe is empty",
        "list.yaml": ":1:1: a recipe is a mapping of sections, as in 'model: {name_or_path: ...}'",
        "latin.yaml": ":2:8: not UTF-8 text (byte 0xe9)",
        "large.yaml": ": larger than 1 MiB, so it is no recipe",
    }.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(tmp_path / name)
        assert caught.value.problems[0].splitlines()[0] == f"{tmp_path / name}{expected}"
        assert len(caught.value.problems) == 1


def test_a_byte_order_mark_and_windows_line_ends_do_not_move_positions(
    problems: Callable[..., list[str]], good: str
) -> None:
    text = "\ufeff" + (good + "sed: 1\n").replace("\n", "\r\n")
    assert problems(text) == ["6:1: unknown key 'sed' at the top level: did you mean 'seed'?"]


def test_an_alias_stands_for_its_anchor(write: Callable[[str], Path], good: str) -> None:
    text = good.replace(
        "format: chat}", "format: chat, columns: &c {messages: turns}}, {path: b.jsonl, format: chat, columns: *c}"
    )
    first, second = load_recipe(write(text)).data.train
    assert first.columns == second.columns == {"messages": "turns"}


def test_an_unknown_key_does_not_hide_what_its_section_contradicts(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "version: 1\nmodel: {name_or_path: smollm2-135m}\n"
        "adapter:\n  method: smore\n  lora_r: 8\n  fanout: [5, 2]\n"
        "data: {train: [{path: rows.jsonl, format: chat}]}\noutput_dir: runs/x\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert [problem.split(": ", 1)[1].splitlines()[0] for problem in caught.value.problems] == [
        "unknown key 'lora_r' in adapter: that is axolotl's name, here it is 'rank'",
        "fanout: 5 children cannot be picked from the 4 experts of pool 0",
    ]
