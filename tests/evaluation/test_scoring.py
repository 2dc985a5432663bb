from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from smore_cli.errors import DataError
from smore_cli.evaluation.scoring import BRANCH_TOKENS, CPU_TOKENS, PrefixSharingLM, longest_shared_sequence
from smore_cli.methods.smore import SMoREConfig
from smore_cli.models.logit_rule import logit_rule
from smore_cli.nn import attach

QUESTIONS = [
    (
        "Question: What do plants need to grow?\nAnswer:",
        [" water", " the quick brown fox", " gold and iron", " a star"],
    ),
    ("Question: Which of these is a source of light?\nAnswer:", [" sun", " moon", " a", " stones in a river"]),
    ("A metal?", [" iron", " wood"]),
    ("A metal?\n", ["iron", "wood"]),  # white space at a prompt's end moves to the answer
    ("", ["water", "Metals conduct electricity and heat."]),  # no prompt: lm-eval puts BOS there
    ("Question: What?\nAnswer:", [" same", " same", " the same and more"]),
]


@pytest.fixture(autouse=True)
def silent_lm_eval(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="lm_eval")


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


def requests(questions: list[tuple[str, list[str]]]) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (prompt, answer), i)
        for prompt, answers in questions
        for i, answer in enumerate(answers)
    ]


def assert_same_scores(model: Any, tokenizer: Any, asked: list[Instance], tolerance: float = 1e-4) -> None:
    ours = PrefixSharingLM(model, tokenizer, batch_size=3).loglikelihood(asked)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3).loglikelihood(asked, disable_tqdm=True)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=tolerance)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_scores_are_those_of_lm_evals_own_model(model: Any, tokenizer: Any) -> None:
    assert longest_shared_sequence(model) > 1000
    assert_same_scores(model, tokenizer, requests(QUESTIONS))


def test_the_answer_a_model_would_write_is_marked_greedy(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer("Question: What do plants need?", return_tensors="pt").input_ids
    written = model.generate(prompt, max_new_tokens=3, do_sample=False)[0, prompt.shape[1] :].tolist()
    other = next(token for token in range(512) if token not in written)
    answers = [written, written[:1], [*written[:2], other], [other, *written[1:]]]
    lm = PrefixSharingLM(model, tokenizer, batch_size=1)
    scores = lm._loglikelihood_tokens([(None, prompt[0].tolist(), answer) for answer in answers])
    assert [greedy for _, greedy in scores] == [True, True, False, False]


def test_scores_with_an_adapter_are_those_of_lm_evals_own_model(model: Any, tokenizer: Any) -> None:
    asked = requests(QUESTIONS)
    bare = [value for value, _ in PrefixSharingLM(model, tokenizer, batch_size=4).loglikelihood(asked)]
    attach(model, SMoREConfig(rank=[2, 2], num_experts=[3, 3], router_dim=4, key_dim=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    adapted = [value for value, _ in PrefixSharingLM(model, tokenizer, batch_size=4).loglikelihood(asked)]
    assert max(abs(a - b) for a, b in zip(bare, adapted, strict=True)) > 0.1
    assert_same_scores(model, tokenizer, asked)


def test_a_question_is_read_once_and_its_answers_without_their_last_token(model: Any, tokenizer: Any) -> None:
    shapes: list[tuple[int, ...]] = []
    logit_rule(model)  # is asked once, by a pass of two tokens
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    prompt, answers = QUESTIONS[0]
    PrefixSharingLM(model, tokenizer, batch_size=8).loglikelihood(requests([(prompt, answers)]))
    length = len(tokenizer(prompt).input_ids)
    assert shapes == [(1, length + sum(len(tokenizer(prompt + a).input_ids) - length - 1 for a in answers))]


def test_batch_size_does_not_change_scores(model: Any, tokenizer: Any) -> None:
    asked = requests(QUESTIONS)
    one, many = (PrefixSharingLM(model, tokenizer, batch_size=size).loglikelihood(asked) for size in (1, 100))
    assert [value for value, _ in one] == pytest.approx([value for value, _ in many], abs=1e-5)


def test_prompts_longer_than_the_model_are_cut_as_lm_eval_cuts_them(model: Any, tokenizer: Any) -> None:
    long = "Ice melts into water. " * 200
    assert len(tokenizer(long).input_ids) > model.config.max_position_embeddings
    assert_same_scores(model, tokenizer, requests([(long, [" water", " ice and snow"]), *QUESTIONS]))


def test_a_sequence_of_exactly_the_models_length_is_scored_whole(model: Any, tokenizer: Any) -> None:
    word = " water"
    assert len(tokenizer(word).input_ids) == 1
    prompt = word * model.config.max_position_embeddings  # and one answer token, which is predicted but not read
    assert_same_scores(
        model, tokenizer, requests([(prompt, [" sun", " the"]), (prompt[len(word) :], [" sun", " the"])])
    )


def test_very_many_answers_to_one_prompt_are_split_over_rows(model: Any, tokenizer: Any) -> None:
    answers = [f" number {i} of many, many numbers" for i in range(80)]
    assert sum(len(tokenizer(answer).input_ids) for answer in answers) > 2 * BRANCH_TOKENS
    widths: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    PrefixSharingLM(model, tokenizer, batch_size=1).loglikelihood(requests([("Which?", answers)]))
    assert len(widths) > 2
    assert max(widths) <= BRANCH_TOKENS + len(tokenizer("Which?").input_ids)
    assert_same_scores(model, tokenizer, requests([("Which?", answers)]))


def test_an_answer_without_a_token_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="adds no token"):
        PrefixSharingLM(model, tokenizer, batch_size=1).loglikelihood(requests([("What?", [""])]))


def test_progress_counts_up_to_all_requests(model: Any, tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    lm = PrefixSharingLM(model, tokenizer, batch_size=2, on_progress=lambda done, total: seen.append((done, total)))
    asked = requests(QUESTIONS)
    lm.loglikelihood(asked)
    assert len(seen) == 3
    assert seen == sorted(seen)
    assert seen[-1] == (len(asked), len(asked))


def test_whole_texts_are_scored_as_by_lm_eval(model: Any, tokenizer: Any) -> None:
    texts = ["Metals conduct electricity and heat.", "Ice melts into water. " * 120]
    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    ours = PrefixSharingLM(model, tokenizer, batch_size=2).loglikelihood_rolling(asked, disable_tqdm=True)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2).loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours == pytest.approx(theirs, rel=1e-6)


SMALL = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0, "initializer_range": 0.3}


@pytest.mark.parametrize("kind", ["no position_ids (ALiBi)", "recurrent"])
def test_models_that_cannot_share_a_prefix_are_scored_answer_by_answer(tokenizer: Any, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "recurrent":
        model: Any = MambaForCausalLM(MambaConfig(**SMALL, state_size=4))
    else:
        model = BloomForCausalLM(BloomConfig(**SMALL, n_head=2))
    assert longest_shared_sequence(model) == 0
    assert_same_scores(model.eval(), tokenizer, requests(QUESTIONS))


def test_a_prefix_is_shared_only_within_a_sliding_window(tokenizer: Any) -> None:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = MistralConfig(**SMALL, **heads, intermediate_size=32, sliding_window=10)
    model: Any = MistralForCausalLM(config).eval()
    assert longest_shared_sequence(model) == 10
    lengths = [len(tokenizer(prompt).input_ids) for prompt, _ in QUESTIONS]
    assert min(lengths) < 8 < 12 < max(lengths)
    assert_same_scores(model, tokenizer, requests(QUESTIONS))


def test_kernels_without_dense_masks_do_not_share(model: Any) -> None:
    model.config._attn_implementation = "flash_attention_2"
    assert longest_shared_sequence(model) == 0


@pytest.mark.slow
def test_scores_of_the_real_model_on_arc_are_those_of_lm_eval(smollm2: Path, shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "arc_easy_test.jsonl").read_text().splitlines()[:5]]
    asked = requests([(f"Question: {r['question']}\nAnswer:", [f" {c}" for c in r["choices"]]) for r in rows])
    real: Any = AutoModelForCausalLM.from_pretrained(smollm2)
    assert_same_scores(real, AutoTokenizer.from_pretrained(smollm2), asked, tolerance=3e-4)


def test_answers_generated_in_a_batch_are_those_of_one_at_a_time(model: Any, tokenizer: Any) -> None:
    attach(model, SMoREConfig(rank=[2, 2], num_experts=[3, 3], router_dim=4, key_dim=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    settings = {"until": ["\n"], "do_sample": False, "max_gen_toks": 8}
    prompts = ["Anna has", "Question: What do plants need to grow? Answer:", "A recipe names a model, an"]
    asked = [Instance("generate_until", {}, (prompt, settings), i) for i, prompt in enumerate(prompts)]
    written = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        written.append(tokenizer.decode(new, skip_special_tokens=True).split("\n")[0])
    assert len(set(written)) == 3
    for size in (1, 3):
        assert PrefixSharingLM(model, tokenizer, batch_size=size).generate_until(asked) == written


def test_batches_without_a_size_hold_as_many_rows_as_have_room(model: Any, tokenizer: Any) -> None:
    shapes: list[tuple[int, ...]] = []
    logit_rule(model)
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    prompts = [(f"{'water ' * length}{number}", [" sun", " moon"]) for length in (2, 100) for number in range(40)]
    PrefixSharingLM(model, tokenizer).loglikelihood(requests(prompts))
    assert all(rows * length <= CPU_TOKENS for rows, length in shapes)
    assert shapes[0][0] < shapes[-1][0]
    assert len(shapes) < 20


def test_a_pass_that_runs_out_of_memory_is_halved(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PrefixSharingLM(model, tokenizer, batch_size=100).loglikelihood(requests(QUESTIONS))
    together = PrefixSharingLM._score_together

    def small(self: Any, rows: Any, last: Any) -> Any:
        if len(rows) > 2:
            raise torch.cuda.OutOfMemoryError
        return together(self, rows, last)

    monkeypatch.setattr(PrefixSharingLM, "_score_together", small)
    halved = PrefixSharingLM(model, tokenizer).loglikelihood(requests(QUESTIONS))
    assert [value for value, _ in halved] == pytest.approx([value for value, _ in whole], abs=1e-5)
