"""A full or read-only disk is found before training where it can be, and costs no more than the write that failed."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from smore_cli.errors import CheckpointError, UsageError
from smore_cli.recipe import load_recipe
from smore_cli.training.checkpoint import checkpoints, damage
from smore_cli.training.disk import checkpoint_bytes, checkpoints_kept, require_space, run_bytes, show_bytes
from smore_cli.training.loop import train
from smore_cli.training.run import Run
from smore_cli.training.run_folder import MetricsLog, read_run_json, require_new, require_writable
from smore_cli.training.setup import prepare

MakeRecipe = Callable[..., Path]
LORA = {"method": "lora", "target_modules": ["q_proj"], "rank": 2}
TRAIN = {"save_steps": 2, "gradient_census": False}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Every write beyond `size` fails with EFBIG, as one on a full disk does with ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_estimate_is_what_a_checkpoint_takes(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = make_recipe(adapter={**LORA, "target_modules": "all-linear", "rank": 64}, train=TRAIN)
    recipe = load_recipe(path)
    setup = prepare(recipe, lambda _: None)
    expected = checkpoint_bytes(setup.model, recipe.train)
    train(recipe, path.read_text())
    taken = sum(file.stat().st_size for file in checkpoints(tmp_path / "run")[0].iterdir())
    assert 0.9 * expected < taken < 1.2 * expected
    whole = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert 0.8 * whole < run_bytes(setup.model, recipe, 6) < 2 * whole


def test_a_run_that_cannot_fit_is_refused_before_its_first_step(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = make_recipe(train={**TRAIN, "save_steps": 1, "max_steps": 10**12})
    with pytest.raises(UsageError, match="would not fit on the disk") as caught:
        train(load_recipe(path), path.read_text())
    assert "--set train.save_total_limit=2" in caught.value.hint
    assert not (tmp_path / "run").exists()


def test_what_a_run_has_written_already_counts_as_room(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = load_recipe(make_recipe(adapter=LORA, train=TRAIN))
    setup = prepare(recipe, lambda _: None)
    steps = shutil.disk_usage(tmp_path).free // checkpoint_bytes(setup.model, recipe.train) * 2
    require_space(tmp_path / "run", setup.model, recipe, steps // 2)
    with pytest.raises(UsageError):
        require_space(tmp_path / "run", setup.model, recipe, steps * 2)
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "checkpoint").open("wb") as file:
        file.truncate(1 << 42)  # sparse: as large as any disk, and it takes nothing
    require_space(tmp_path / "run", setup.model, recipe, steps * 2)


@pytest.mark.parametrize(
    ("save", "limit", "every", "kept"),
    [
        (3, None, None, 3),  # 3 6 9
        (3, 2, None, 3),
        (3, 1, None, 2),
        (3, None, 3, 4),  # 3 6 9, and 10 where it is the best
        (3, None, 4, 5),  # 3 6 9, the best of 4 8 10, and the next that takes its place
        (3, 1, 4, 3),  # the newest, the best, a new one
        (20, None, None, 0),
        (20, 5, 4, 3),  # no more than 4 8 10
    ],
)
def test_checkpoints_of_the_best_evaluation_are_counted(
    make_recipe: MakeRecipe, save: int, limit: int | None, every: int | None, kept: int
) -> None:
    recipe = load_recipe(make_recipe())
    changes = {"save_steps": save, "save_total_limit": limit}
    recipe = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update=changes),
            "eval": recipe.eval.model_copy(update={"steps": every}),
        }
    )
    assert checkpoints_kept(recipe, 10) == kept


@pytest.mark.parametrize(("size", "text"), [(12, "12 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB")])
def test_sizes_are_shown_for_people(size: int, text: str) -> None:
    assert show_bytes(size) == text


def test_a_checkpoint_that_cannot_be_written_is_a_warning_and_the_next_one_is_tried(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = make_recipe(adapter=LORA, train=TRAIN), tmp_path / "run"
    whole = load_recipe(path).model_copy(update={"output_dir": str(tmp_path / "whole")})
    train(whole, path.read_text())
    capsys.readouterr()
    write = Run.write_state

    def with_full_disk_once(self: Run, folder: Path) -> Path:
        if self.state.step != 4:
            return write(self, folder)
        kept = [(p, p.read_bytes()) for p in (run / "checkpoint-2").iterdir()]
        with files_of_at_most(2000):
            try:
                return write(self, folder)
            finally:
                assert [(p, p.read_bytes()) for p, _ in kept] == kept
                assert [p.name for p in run.iterdir() if "checkpoint-" in p.name] == ["checkpoint-2"]

    monkeypatch.setattr(Run, "write_state", with_full_disk_once)
    values = train(load_recipe(path), path.read_text())
    said = [line for line in capsys.readouterr().err.splitlines() if "could not be written" in line]
    assert len(said) == 1, said
    assert f"{run / 'checkpoint-4'} could not be written: {os.strerror(errno.EFBIG)}" in said[0]
    assert "training goes on, the next checkpoint is due after step 6" in said[0]
    assert values["finished"]
    assert (run / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "whole" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_result_that_cannot_be_written_is_saved_elsewhere_and_the_run_can_be_ended(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rescue, run = tmp_path / "rescue", tmp_path / "run"
    rescue.mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(rescue))
    path = make_recipe(adapter=LORA, train=TRAIN)
    results = Run.write_results

    def with_a_folder_in_the_way(self: Run) -> object:
        (run / "README.md").mkdir()  # a file cannot replace it, whoever the user is
        return results(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_results", with_a_folder_in_the_way)
        with pytest.raises(CheckpointError, match="nothing is lost") as caught:
            train(load_recipe(path), path.read_text())
    assert caught.value.exit_code == 1
    (saved,) = rescue.glob("*/checkpoint-6")
    assert damage(saved) is None
    assert f"--checkpoint {saved}" in caught.value.hint
    assert not read_run_json(run)["finished"]
    (run / "README.md").rmdir()
    values = train(load_recipe(path), path.read_text(), checkpoint=saved)
    assert values["finished"]
    assert values["result"]["steps"] == 6
    assert values["result"]["loss"] > 0


def test_a_full_disk_delays_the_lines_of_metrics(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.add({"step": 1, "text": "x" * 50}) is None
    before = log.path.read_bytes()
    with files_of_at_most(len(before) + 10):
        assert log.add({"step": 2, "text": "y" * 50}) == os.strerror(errno.EFBIG)
        assert log.path.read_bytes() == before  # not half a line
    assert log.add({"step": 3}) is None
    assert [line[:10] for line in log.path.read_text().splitlines()] == ['{"step": 1', '{"step": 2', '{"step": 3']


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        require_new(tmp_path / "file" / "run")
    if Path("/proc/self").is_dir():  # a file system in which nobody, not even root, can make a file
        with pytest.raises(UsageError, match="cannot be written"):
            require_writable(Path("/proc/self/run"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="cannot be written: Permission denied"):
        require_new(tmp_path / "locked" / "run")


def test_what_a_killed_start_left_behind_does_not_stand_in_the_way(tmp_path: Path) -> None:
    host = os.uname().nodename
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f".run.json.tmp-{2**22 + 5}-{host}-0123abcd").touch()  # beyond any process id of Linux
    require_new(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
