from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import smore_cli
from smore_cli.cli import main
from smore_cli.errors import CheckFailed, CheckpointError, DataError, Interrupted, SmoreError

COMMANDS = ["train", "eval", "merge", "import", "inspect-routing", "recipe", "data", "doctor"]
HEAVY = {"torch", "transformers", "datasets", "accelerate", "numpy", "lm_eval"}


def run(*args: str) -> int:
    """Runs the command in this process and returns its exit code."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    code = caught.value.code
    assert isinstance(code, int)
    return code


def modules_after(code: str, *args: str) -> set[str]:
    """Modules that a fresh process has imported after running `code`."""
    script = f"import sys\n{code}\nprint('loaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


CALL = "from smore_cli.cli import main\ntry: main()\nexcept SystemExit as e: assert e.code == {code}, e.code"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMORE_DEBUG", "0")  # main() writes it: set here, it is put back after the test
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Puts an error here, and `smore recipe schema` meets it."""
    errors: list[BaseException] = []

    def json_schema() -> None:
        raise errors[0]

    monkeypatch.setattr("smore_cli.recipe.json_schema", json_schema)
    return errors


def test_help_names_every_command_and_imports_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert f" {command} " in shown
    assert not HEAVY & modules_after(CALL.format(code=0), "--help")


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        assert run(command, "--help") == 0
        assert f"smore {command}" in capsys.readouterr().out


def test_checking_a_recipe_imports_nothing_heavy(tmp_path: Path, project: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("version: 1\nadapter: {method: smore, lora_r: 8}\n")
    loaded = modules_after(CALL.format(code=2), "recipe", "validate", str(broken))
    assert "pydantic" in loaded
    assert not HEAVY & loaded
    sound = str(project / "recipes" / "quickstart.yaml")
    assert not HEAVY & modules_after(CALL.format(code=0), "recipe", "validate", sound)
    assert not HEAVY & modules_after(CALL.format(code=2), "train", str(broken))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"smore {smore_cli.__version__}\n"


def test_an_unknown_command_is_a_usage_error_that_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trian") == 2
    shown = capsys.readouterr()
    assert "Did you mean 'train'?" in shown.err
    assert shown.out == ""


def test_recipe_problems_are_shown_one_by_one_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("version: 2\nmodel: {name_or_path: m}\nadapter: {method: lora}\ndata: {train: [{path: p}]}\n")
    assert run("recipe", "validate", str(path)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line for line in shown.err.splitlines() if not line.startswith(" ")] == [
        f"{path}:1:1: missing key 'output_dir' at the top level",
        f"{path}:1:10: 'version' must be 1, got 2",
        f"{path}:4:16: missing key 'format' in data.train.0",
        "error: 3 problems in the recipe; nothing was run",
    ]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SmoreError("it broke", "mend it"), 1),
        (CheckpointError("it broke", "mend it"), 1),
        (DataError("it broke", "mend it"), 2),
        (CheckFailed("it broke", "mend it"), 3),
        (Interrupted("it broke", "mend it"), 130),
    ],
)
def test_an_error_is_one_line_a_hint_and_its_exit_code(
    fail: list[BaseException], capsys: pytest.CaptureFixture[str], error: SmoreError, code: int
) -> None:
    fail.append(error)
    assert run("recipe", "schema") == code
    assert capsys.readouterr() == ("", "error: it broke\nhint: mend it\n")


def test_an_unexpected_error_is_one_line(fail: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    fail.append(RuntimeError("this\n  and that"))
    assert run("recipe", "schema") == 1
    shown = capsys.readouterr().err
    assert shown == "internal error: RuntimeError: this and that\nhint: run again with --debug for the traceback\n"


@pytest.mark.parametrize("args", [["--debug", "recipe", "schema"], ["recipe", "schema", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(
    fail: list[BaseException], capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    fail.append(DataError("it broke"))
    assert run(*args) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last)")
    assert shown.endswith("error: it broke\n")


def test_debug_can_be_set_in_the_environment(
    fail: list[BaseException], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMORE_DEBUG", "1")
    fail.append(ValueError("it broke"))
    assert run("recipe", "schema") == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_quiet_and_exits_130(fail: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    fail.append(KeyboardInterrupt())
    assert run("recipe", "schema") == 130
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "smore_cli", "recipe", "schema"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 1


@pytest.mark.parametrize("no_color", [True, False])
def test_colours_are_for_terminals_that_want_them(no_color: bool) -> None:
    terminal, stderr = pty.openpty()
    environment = {**os.environ, "NO_COLOR": "1" if no_color else "", "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "smore_cli", "recipe", "copy", "nothing", "x"]
    subprocess.run(command, stderr=stderr, env=environment, check=False)
    os.close(stderr)
    shown = os.read(terminal, 4096).decode()
    os.close(terminal)
    assert "there is no ready recipe 'nothing'" in shown
    assert ("\x1b[" in shown) is not no_color


def test_libraries_are_told_to_be_quiet_before_they_are_imported() -> None:
    script = "import os, smore_cli.cli; print(*(os.environ[n] for n in ('OMP_WAIT_POLICY', 'TOKENIZERS_PARALLELISM')))"
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "TOKENIZERS_", "HF_"))}
    done = subprocess.run([sys.executable, "-c", script], env=bare, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["passive", "false"]


def test_it_runs_as_a_module_too() -> None:
    command = [sys.executable, "-m", "smore_cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"smore {smore_cli.__version__}\n"
