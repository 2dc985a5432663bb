"""Our tasks on plain files give what lm-eval's own tasks give on their own columns, with its own Hugging Face model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from smore_cli.evaluation.benchmarks import read_tasks
from smore_cli.evaluation.harness import score
from smore_cli.evaluation.quiet import quiet_lm_eval

Rows = list[dict[str, Any]]

BOOLQ = [("Ice is cold.\nIt melts.", "is ice cold", 1), ("Metals conduct heat.", "does metal float", 0)]
SIQA = [("Anna gave three apples away.", "What will Anna do?", ["rest", "count the rest", "run"], 2)]
PIQA = [("melt ice", ["heat it", "cool it until it is gone"], 1), ("count", ["use stars", "use fingers"], 0)]
OBQA = [("Plants need", ["water", "gold and iron", "a star", "ice"], 3), ("The sun is", ["light", "a", "b", "c"], 0)]
WINO = [("The fox jumps over the dog because the _ is lazy.", ["fox", "dog"], 1), ("A _ is hot.", ["sun", "moon"], 0)]
CSQA = [("Where is ice? ", ["village", "sun", "steam", "table", "film"], 4)]
MMLU = [(" Which conducts? ", ["metal", "wood", "ice", "air"], 0)]
SWAG = [("Cooking", "A pot is filled.", "the water", ["boils [step] now.", "sings.", "is  gone.", "[title] A"], 1)]
SUMS = [("How many apples are 2 and 3?", "2 + 3 = 5\n#### 5"), ("And 12 less 6?", "12 - 6 = 6\n#### 6")]
SHOTS = [(f"Anna has {i} and 2. How many?", f"{i} + 2 = {i + 2}\n#### {i + 2}") for i in range(8)]


def letters(texts: list[str]) -> dict[str, list[str]]:
    return {"text": texts, "label": list("ABCDE"[: len(texts)])}


# Name, lm-eval's folder and name, its split, its rows, the same rows in the plain form.
CASES: dict[str, tuple[str, str, str, Rows, Rows]] = {
    "boolq": (
        "super_glue/boolq", "boolq", "validation",
        [{"passage": p, "question": q, "label": y} for p, q, y in BOOLQ],
        [{"question": f"{p}\n{q}", "choices": ["no", "yes"], "label": y} for p, q, y in BOOLQ],
    ),
    "siqa": (
        "siqa", "social_iqa", "validation",
        [{"context": c, "question": q, "answerA": a[0], "answerB": a[1], "answerC": a[2], "label": str(y + 1)}
         for c, q, a, y in SIQA],
        [{"question": f"{c} {q}", "choices": a, "label": y} for c, q, a, y in SIQA],
    ),
    "piqa": (
        "piqa", "piqa", "validation",
        [{"goal": q, "sol1": a[0], "sol2": a[1], "label": y} for q, a, y in PIQA],
        [{"question": q, "choices": a, "label": y} for q, a, y in PIQA],
    ),
    "openbookqa": (
        "openbookqa", "openbookqa", "test",
        [{"question_stem": q, "choices": letters(a), "answerKey": "ABCD"[y]} for q, a, y in OBQA],
        [{"question": q, "choices": a, "label": y} for q, a, y in OBQA],
    ),
    "winogrande": (
        "winogrande", "winogrande", "validation",
        [{"sentence": q, "option1": a[0], "option2": a[1], "answer": str(y + 1)} for q, a, y in WINO],
        [{"question": q, "choices": a, "label": y} for q, a, y in WINO],
    ),
    "csqa": (
        "commonsense_qa", "commonsense_qa", "validation",
        [{"question": q, "choices": letters(a), "answerKey": "ABCDE"[y]} for q, a, y in CSQA],
        [{"question": q, "choices": a, "label": y} for q, a, y in CSQA],
    ),
    "mmlu": (
        "mmlu/default", "mmlu_anatomy", "test",
        [{"question": q, "choices": a, "answer": y, "subject": "anatomy"} for q, a, y in MMLU],
        [{"question": q, "choices": a, "label": y, "subject": "anatomy"} for q, a, y in MMLU],
    ),
    "hellaswag": (
        "hellaswag", "hellaswag", "validation",
        [{"activity_label": t, "ctx_a": a, "ctx_b": b, "endings": e, "label": str(y)} for t, a, b, e, y in SWAG],
        [{"question": f"{t}: {a} {b.capitalize()}", "choices": ["boils now.", "sings.", "is gone.", " A"], "label": y}
         for t, a, b, _, y in SWAG],
    ),
    "gsm8k": (
        "gsm8k", "gsm8k", "test",
        [{"question": q, "answer": a} for q, a in SUMS],
        [{"id": f"s{q}", "question": q, "answer": a} for q, a in SUMS],
    ),
}  # fmt: skip


def write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)


def theirs(model: Any, tokenizer: Any, folder: str, task: str, files: dict[str, str]) -> tuple[dict[str, Any], Rows]:
    """Returns what lm-eval makes of its own task on its own columns: the numbers and the log of every question."""
    manager = TaskManager(include_path=str(Path(lm_eval.tasks.__file__).parent / folder), include_defaults=False)
    own = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    with quiet_lm_eval():
        built = manager._factory.build(manager.task_index[task], overrides=own, registry=manager.task_index)
        loaded = {"tasks": {task: built}}
        for each in loaded["tasks"].values():
            each.set_fewshot_seed(1234)
            each.set_config("num_fewshot", each.get_config("num_fewshot") or 0)
            if each.OUTPUT_TYPE == "generate_until":
                each.set_config("generation_kwargs", each.get_config("generation_kwargs") | {"max_gen_toks": 12})
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
        found = evaluator.evaluate(lm, loaded, bootstrap_iters=0)
    return found["results"][task], found["samples"][task]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["own columns", "plain"])
def test_scores_are_those_of_lm_evals_own_task_and_model(tmp_path: Path, tiny: Any, name: str, form: str) -> None:
    folder, task, split, native, plain = CASES[name]
    columns = write(tmp_path / "native.jsonl", native)
    extra = [{"question": q, "answer": a} for q, a in SHOTS]
    files = {split: columns} | ({"train": write(tmp_path / "gsm8k_train.jsonl", extra)} if name == "gsm8k" else {})
    files |= {"dev": columns} if name == "mmlu" else {}
    files |= {key: columns for key in ("train", "validation") if name != "gsm8k" and key not in files}
    numbers, log = theirs(*tiny, folder, task, files)

    write(tmp_path / f"{name}_dev.jsonl", native if form == "own columns" else plain)
    (read,) = read_tasks(name, tmp_path)
    if name == "gsm8k":
        read.config["generation_kwargs"]["max_gen_toks"] = 12
    (result,) = score(*tiny, [read])
    assert len(result.metrics) >= 1
    for metric in result.metrics:
        key = metric if "," in metric else f"{metric},none"
        assert result.value(metric) == numbers[key]
    assert {key for key in numbers if "," in key and "stderr" not in key} == {
        metric if "," in metric else f"{metric},none" for metric in result.metrics
    }
    for ours, one in zip(result.samples, log, strict=False):  # of two filters the first
        if ours.loglikelihoods is None:
            assert ours.response == one["resps"][0][0]
        else:
            assert ours.loglikelihoods == pytest.approx([value for value, _ in one["filtered_resps"]], abs=1e-4)
