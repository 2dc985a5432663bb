from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smore_cli.data.encode import Encoder
from smore_cli.data.formats import MultipleChoice
from smore_cli.data.templates import Renderer
from smore_cli.errors import ModelError
from smore_cli.evaluation import evaluate, harness
from smore_cli.evaluation.benchmarks import read_tasks
from smore_cli.evaluation.results import TaskResult
from smore_cli.evaluation.scoring import PrefixSharingLM
from smore_cli.recipe.schema import DataConfig, Source

QUESTIONS = [
    {
        "id": f"q{i}",
        "question": f"Which number comes after {i}?",
        "choices": [f"{i}", f"it is {i + 1}", "fire"],
        "label": i % 3,
    }
    for i in range(7)
]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "arc_easy_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return tmp_path


def argmax(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def test_accuracies_follow_from_the_log_likelihoods(model: Any, tokenizer: Any, folder: Path) -> None:
    (result,) = evaluate(model, tokenizer, ["arc_easy"], data_dir=folder)
    assert [sample.id for sample in result.samples] == [row["id"] for row in QUESTIONS]
    for sample, row in zip(result.samples, QUESTIONS, strict=True):
        choices: Any = row["choices"]
        normed = [value / len(choice) for value, choice in zip(sample.loglikelihoods, choices, strict=True)]
        assert sample.acc == (argmax(sample.loglikelihoods) == row["label"])
        assert sample.acc_norm == (argmax(normed) == row["label"])
    assert result.acc == sum(sample.acc for sample in result.samples) / 7
    assert {sample.acc for sample in result.samples} == {True, False}


def test_a_limit_takes_the_first_questions(model: Any, tokenizer: Any, folder: Path) -> None:
    (whole,) = evaluate(model, tokenizer, ["arc_easy"], data_dir=folder)
    (part,) = evaluate(model, tokenizer, ["arc_easy"], data_dir=folder, limit=3)
    assert [sample.id for sample in part.samples] == ["q0", "q1", "q2"]
    for a, b in zip(part.samples, whole.samples[:3], strict=True):
        assert a.loglikelihoods == pytest.approx(b.loglikelihoods, abs=1e-5)


def test_a_group_and_a_task_of_it_are_evaluated_once(model: Any, tokenizer: Any, folder: Path) -> None:
    (folder / "arc_challenge_test.jsonl").write_text((folder / "arc_easy_test.jsonl").read_text())
    results = evaluate(model, tokenizer, ["arc_challenge", "arc"], data_dir=folder, limit=2)
    assert [result.task for result in results] == ["arc_challenge", "arc_easy"]


def test_quickstart_is_reported_by_family(model: Any, tokenizer: Any) -> None:
    (result,) = evaluate(model, tokenizer, ["quickstart"], limit=40)
    families = result.families()
    assert len(families) >= 2
    assert all(isinstance(family, TaskResult) for family in families)
    assert sum(family.n for family in families) == result.n == 40


def test_nothing_is_printed_and_the_process_is_left_as_it_was(
    model: Any, tokenizer: Any, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    model.train()
    before, states = torch.get_rng_state(), random.getstate()
    evaluate(model, tokenizer, ["arc_easy"], data_dir=folder)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == states
    assert logger.level == level
    assert model.training
    model.eval()


def asked(monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any, folder: Path, template: Any) -> list[list[int]]:
    """Returns the token ids, prompt and answer joined, of everything the model was asked."""
    seen: list[list[int]] = []

    class Listening(PrefixSharingLM):
        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
            seen.extend(prompt + answer for _, prompt, answer in requests)
            return super()._loglikelihood_tokens(requests, **options)

    monkeypatch.setattr(harness, "PrefixSharingLM", Listening)
    evaluate(model, tokenizer, ["arc_easy"], data_dir=folder, template=template)
    return seen


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_questions_are_asked_with_the_tokens_they_are_trained_with(
    monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any, folder: Path, template: Any
) -> None:
    source = Source(path="x.jsonl", format="multiple_choice")
    renderer = Renderer(DataConfig(train=[source], template=template, objective="choice_ranking"), tokenizer)
    rendered = [
        renderer.render(MultipleChoice(str(row["question"]), tuple(row["choices"]), 0), template)  # type: ignore[arg-type]
        for row in QUESTIONS
    ]
    rows = [encoded.row for encoded in Encoder(tokenizer, 512).encode(rendered)]
    trained = [row.prompt + branch for row in rows for branch in row.branches]
    scored = asked(monkeypatch, model, tokenizer, folder, template)
    # Training goes on to the end-of-turn token; scoring stops at the answer's last one.
    assert [ids[: len(other)] for ids, other in zip(trained, scored, strict=True)] == scored
    assert {tokenizer.decode(ids[len(other) :]).strip() for ids, other in zip(trained, scored, strict=True)} == {
        tokenizer.eos_token
    }


def test_a_chat_needs_a_chat_template(model: Any, tiny_llama: Path, folder: Path) -> None:
    bare: Any = AutoTokenizer.from_pretrained(tiny_llama)
    bare.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        evaluate(model, bare, ["arc_easy"], data_dir=folder, template="chat")


def test_lm_evals_own_tasks_run_with_metrics_that_are_no_means(
    monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any
) -> None:
    import datasets
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    rows = [{"sentence1": f"Anna has {i}.", "sentence2": "Ice melts.", "label": i % 2, "idx": i} for i in range(6)]
    sets = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(rows)))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: sets)
    (task,) = read_tasks("mrpc")
    (result,) = harness.score(model, tokenizer, [task])
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    theirs = evaluator.evaluate(lm, {"tasks": {"mrpc": read_tasks("mrpc")[0].theirs}}, bootstrap_iters=0)
    assert result.metrics == ["acc"]
    assert result.acc == theirs["results"]["mrpc"]["acc,none"]
    assert result.others == {"f1": theirs["results"]["mrpc"]["f1,none"]}


def test_an_answer_of_ones_own_file_must_be_matched_exactly(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"question": "Anna has", "answer": "?"}) + "\n")
    (result,) = evaluate(model, tokenizer, [str(file)])
    written = str(result.samples[0].response).strip()
    assert result.value("exact_match") == 0
    file.write_text("".join(json.dumps({"question": "Anna has", "answer": each}) + "\n" for each in (written, "ice")))
    (result,) = evaluate(model, tokenizer, [str(file)])
    assert result.values("exact_match") == [1, 0]
