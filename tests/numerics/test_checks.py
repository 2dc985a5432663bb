"""`smore doctor --numerics` finds nothing on a sound stack, and finds each of the mistakes it is there for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from smore_cli.cli import main
from smore_cli.data.batch import Batch
from smore_cli.errors import ModelError
from smore_cli.nn import AdapterContext
from smore_cli.numerics import checks, processes
from smore_cli.numerics.measure import Measured, distance
from smore_cli.numerics.run import run_numerics
from smore_cli.numerics.subjects import TINY, TOLERANCE, Subject, subjects, tiny_llama
from smore_cli.training import step
from smore_cli.training.objective import Counts, Objective, Share

CPU = torch.device("cpu")


def outcomes(name: str, change: Callable[[Subject], Subject] = lambda subject: subject) -> dict[str, checks.Outcome]:
    """One check with each method, the reference of a sound stack."""
    found = {}
    for subject in subjects(tiny_llama(CPU), CPU):
        found[subject.name] = checks.run_check(change(subject), name, checks.reference(subject))
    return found


class MeanOfEachPass(Objective):
    """What gradient accumulation does where nobody looks: the mean of the means of micro-batches of unequal size."""

    def __call__(self, model: torch.nn.Module, batch: Batch, counts: Counts) -> Share:
        own = super().__call__(model, batch, Counts.of([batch]))
        return replace(own, loss=own.loss / len(checks.SPLIT))


def test_a_loss_averaged_by_micro_batch_is_found() -> None:
    found = outcomes("micro-batches", lambda subject: replace(subject, objective=MeanOfEachPass(False, 0.0)))
    assert [outcome.ok for outcome in found.values()] == [False, False]


def test_a_balance_loss_of_each_micro_batch_by_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_statistics", lambda *_: None)
    found = outcomes("micro-batches")
    assert found["lora"].ok  # has no such loss
    assert found["smore"].distance is not None
    assert found["smore"].distance.loss < TOLERANCE < found["smore"].distance.aux


@pytest.mark.parametrize("mistake", ["positions", "attention"])
def test_packed_documents_that_see_one_another_are_found(monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    sound = checks.collate_packs

    def naive(*args: Any, **kwargs: Any) -> Batch:
        batch = sound(*args, **kwargs)
        everything = torch.ones_like(batch.input_ids)
        running = everything.cumsum(1) - 1
        if mistake == "positions":
            return replace(batch, position_ids=running)
        return replace(batch, attention_mask=everything)

    monkeypatch.setattr(checks, "collate_packs", naive)
    assert [outcome.ok for outcome in outcomes("packing").values()] == [False, False]


def test_a_recomputation_without_the_token_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_context(model: Any) -> None:
        model.activation_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()

    monkeypatch.setattr(checks, "enable_checkpointing", without_context)
    found = outcomes("gradient checkpointing")
    assert found["lora"].ok  # knows of no mask
    assert found["smore"].ok is False


def test_padding_that_is_counted_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdapterContext, "flat_mask", lambda *_: None)
    found = outcomes("padding on the left")
    assert found["lora"].ok
    assert found["smore"].distance is not None
    assert found["smore"].distance.aux > TOLERANCE


def test_positions_counted_from_the_left_edge_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = checks.left_padded

    def naive(batch: Batch, more: int) -> Batch:
        moved = sound(batch, more)
        return replace(moved, position_ids=torch.arange(moved.input_ids.shape[1]).expand_as(moved.input_ids) // 2)

    monkeypatch.setattr(checks, "left_padded", naive)
    assert [outcome.ok for outcome in outcomes("padding on the left").values()] == [False, False]


AVERAGED = """
import sys
from pathlib import Path
from smore_cli.training.parallel import Processes
sound = Processes.sum_gradients
def averaged(self, parameters):  # what DDP does to a loss that is a share of the step already
    parameters = list(parameters)
    sound(self, parameters)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= self.count
Processes.sum_gradients = averaged
from smore_cli.numerics.worker import main
main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
"""


def test_gradients_averaged_over_processes_are_found() -> None:
    found = processes.check_processes(["-c", AVERAGED])
    assert [(outcome.ok, outcome.note != "") for outcome in found] == [(False, True)] * 2


def test_where_processes_cannot_work_it_says_so_and_does_not_fail() -> None:
    found = processes.check_processes(["-c", "raise SystemExit('no network here')"])
    assert [outcome.ok for outcome in found] == [None, None]
    assert "no network here" in found[0].note


def test_what_the_backbone_cannot_do_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ModelError("it is recurrent")

    monkeypatch.setattr(checks, "prepare_packing", refuse)
    found = outcomes("packing")
    assert [(outcome.ok, outcome.note) for outcome in found.values()] == [(None, "it is recurrent")] * 2


def test_a_number_that_is_not_finite_is_far_from_every_other() -> None:
    one = Measured(1.0, 0.0, {"a": torch.ones(2)})
    assert distance(replace(one, loss=float("nan")), one).largest == float("inf")
    assert distance(replace(one, gradient={"a": torch.tensor([1.0, float("nan")])}), one).largest == float("inf")
    assert distance(one, one).largest == 0


def test_a_sound_stack_passes_and_the_users_backbone_is_checked(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--numerics", "--model", str(tiny_llama), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert caught.value.code == 0, report
    assert report["ok"]
    assert len(report["checks"]) == 18
    for check in report["checks"]:
        assert check["ok"], check
        assert max(check["loss"], check["gradient"], check["aux"] or 0) < 1e-5, check
    assert {check["method"] for check in report["checks"] if check["aux"] is not None} == {"smore"}
    routed = [check for check in report["checks"] if check["method"] == "smore"]
    assert {check["compared"] for check in routed} == {*checks.CHECKS, processes.NAME}
    assert {check["backbone"] for check in report["checks"]} == {TINY, str(tiny_llama)}


def test_a_failed_check_is_a_table_and_exit_code_three(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "_statistics", lambda *_: None)
    monkeypatch.setattr("smore_cli.numerics.run.check_processes", lambda: [])
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--numerics"])
    shown = capsys.readouterr()
    assert caught.value.code == 3
    assert "numbers depend on: micro-batches (smore)" in shown.err
    assert shown.out.count("yes") == 7
    assert shown.out.count("NO") == 1


def test_a_model_without_numerics_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--model", "somewhere"])
    assert caught.value.code == 2
    assert "--numerics" in capsys.readouterr().err


def test_the_adapters_are_gone_afterwards() -> None:
    model = tiny_llama(CPU)
    before = [name for name, _ in model.named_parameters()]
    assert len(list(subjects(model, CPU))) == 2
    assert [name for name, _ in model.named_parameters()] == before


def test_a_backbone_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        run_numerics(str(tmp_path / "nowhere"))
