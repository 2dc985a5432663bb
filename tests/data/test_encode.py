from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from smore_cli.data.batch import Row, collate
from smore_cli.data.encode import Encoder
from smore_cli.data.formats import Conversation, MultipleChoice, PromptCompletion, Text
from smore_cli.data.templates import Renderer
from smore_cli.errors import ModelError
from smore_cli.recipe.schema import DataConfig

Make = Callable[..., PreTrainedTokenizerBase]
Learned = Callable[..., str]

# No special tokens, which are tokens and not text, and no bytes that SmolLM2 has no token for (it lacks a few).
WORDS = st.text(alphabet="aehiknorstwAT 0123456789.,:;?!'-\n\té漢🙂", max_size=40)
PROSE = st.text(alphabet="ab .,:\n?é漢🙂", max_size=30)
SHARED = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def config(**fields: Any) -> DataConfig:
    return DataConfig.model_validate({"train": [{"path": "x.jsonl", "format": "text"}], **fields})


def row_of(tokenizer: PreTrainedTokenizerBase, example: Any, style: str = "plain", **fields: Any) -> Row:
    data = config(**fields)
    rendered = Renderer(data, tokenizer).render(example, style)  # type: ignore[arg-type]
    [encoded] = Encoder(tokenizer, data.max_length).encode([rendered])
    return encoded.row


def chat(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(contents)))


def count(ids: list[int], token: int | None) -> int:
    return sum(number == token for number in ids)


@SHARED
@given(prompt=PROSE, completion=PROSE)
def test_what_is_learned_is_exactly_the_completion_and_eos(
    byte_tokenizer: PreTrainedTokenizerBase, learned: Learned, prompt: str, completion: str
) -> None:
    assume(completion)
    row = row_of(byte_tokenizer, PromptCompletion("." + prompt, completion))
    assert learned(byte_tokenizer, row) == completion + "</s>"
    assert byte_tokenizer.decode(row.prompt) == "." + prompt


@SHARED
@given(question=WORDS, choices=st.lists(WORDS, min_size=2, max_size=5), data=st.data())
def test_every_ranked_choice_is_learned_exactly_with_eos(
    smol_tokenizer: PreTrainedTokenizerBase, learned: Learned, question: str, choices: list[str], data: st.DataObject
) -> None:
    gold = data.draw(st.integers(0, len(choices) - 1))
    example = MultipleChoice(question, tuple(choices), gold)
    row = row_of(smol_tokenizer, example, objective="choice_ranking")
    assert row.gold == gold
    assert smol_tokenizer.decode(row.prompt) == f"Question: {question}\nAnswer:"
    for place, choice in enumerate(choices):
        assert learned(smol_tokenizer, row, place) == f" {choice}<|im_end|>"


@SHARED
@given(texts=st.lists(PROSE, min_size=2, max_size=6))
@pytest.mark.parametrize("template", ["chatml", "phi"])
def test_what_is_learned_of_a_chat_is_exactly_the_assistants_turns(
    with_template: Make, learned: Learned, template: str, texts: list[str]
) -> None:
    tokenizer = with_template(template)
    end = {"chatml": "<|im_end|>", "phi": "<|end|>"}[template]
    row = row_of(tokenizer, chat(*texts), "chat", loss_on="assistant")
    assert learned(tokenizer, row) == "".join(text + end for text in texts[1::2])


@SHARED
@given(texts=st.lists(PROSE, min_size=2, max_size=4))
@pytest.mark.parametrize("trim_offsets", [True, False])
def test_offsets_without_white_space_do_not_move_what_is_learned(
    with_template: Make, learned: Learned, texts: list[str], trim_offsets: bool
) -> None:
    tokenizer = with_template("llama3", trim_offsets=trim_offsets)
    row = row_of(tokenizer, chat(*texts), "chat", loss_on="assistant")
    assert learned(tokenizer, row) == "".join(text.strip() + "<|eot_id|>" for text in texts[1::2])


@SHARED
@given(asked=PROSE, answer=PROSE)
@pytest.mark.parametrize("trim_offsets", [True, False])
def test_the_space_before_an_answer_is_not_learned_where_the_template_writes_it(
    with_template: Make, learned: Learned, asked: str, answer: str, trim_offsets: bool
) -> None:
    tokenizer = with_template("roles", trim_offsets=trim_offsets)  # "Assistant: " and then the answer
    row = row_of(tokenizer, chat(asked, answer), "chat")
    assert learned(tokenizer, row) == answer.rstrip() + "</s>"


@pytest.mark.parametrize("answer", ["\n\nHello", "\nHello", " Hello\n\n", ""])
def test_white_space_at_an_answers_edge_does_not_merge_with_the_template(
    with_template: Make, learned: Learned, answer: str
) -> None:
    tokenizer = with_template("chatml")
    row = row_of(tokenizer, chat("Hi", answer), "chat")
    assert learned(tokenizer, row) == answer + "<|im_end|>"
    before = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    assert row.branches[0][: len(before)] == before  # what generation starts from


def test_the_branch_continues_the_joint_tokenisation(tokenizer: PreTrainedTokenizerBase) -> None:
    row = row_of(tokenizer, MultipleChoice("What do plants need to grow?", ("light", "water"), 1))
    prompt, branch = "Question: What do plants need to grow?\nAnswer:", " water"
    assert row.prompt == tokenizer(prompt)["input_ids"]
    assert row.prompt + row.branches[0] == [*tokenizer(prompt + branch)["input_ids"], tokenizer.eos_token_id]


def test_a_branch_that_would_merge_with_the_prompt_is_tokenised_alone(smol_tokenizer: PreTrainedTokenizerBase) -> None:
    row = row_of(smol_tokenizer, PromptCompletion("ab", "out it"))
    joint = smol_tokenizer("about it")["input_ids"]
    assert joint[: len(row.prompt)] != row.prompt  # the two do merge
    assert row.prompt == smol_tokenizer("ab")["input_ids"]
    assert row.branches == [[*smol_tokenizer("out it")["input_ids"], smol_tokenizer.eos_token_id]]


def test_eos_is_learned_although_pad_is_the_same_token(smol_tokenizer: PreTrainedTokenizerBase) -> None:
    assert smol_tokenizer.pad_token_id == smol_tokenizer.eos_token_id
    rows = [row_of(smol_tokenizer, PromptCompletion("Hi", answer)) for answer in (" there", " there, my old friend")]
    batch = collate(rows, pad_token_id=smol_tokenizer.pad_token_id)
    assert count(batch.targets.tolist(), smol_tokenizer.eos_token_id) == 2


def test_an_answer_that_ends_in_eos_gets_no_second_one(
    byte_tokenizer: PreTrainedTokenizerBase, learned: Learned
) -> None:
    row = row_of(byte_tokenizer, PromptCompletion("Hi", " there</s>"))
    assert learned(byte_tokenizer, row) == " there</s>"


@pytest.mark.parametrize(
    ("example", "style"),
    [(PromptCompletion("Hi", " there"), "plain"), (Text("Hi there"), "plain"), (chat("Hi", "Hello"), "chat")],
)
def test_a_tokenizer_with_bos_gives_exactly_one(
    bos_tokenizer: PreTrainedTokenizerBase, learned: Learned, example: Any, style: str
) -> None:
    row = row_of(bos_tokenizer, example, style)
    assert row.prompt[0] == bos_tokenizer.bos_token_id
    assert count(row.prompt + row.branches[0], bos_tokenizer.bos_token_id) == 1
    assert "<s>" not in learned(bos_tokenizer, row)


@pytest.mark.parametrize("template", ["llama3", "gemma", "chatml"])
@pytest.mark.parametrize("objective", ["completion", "choice_ranking"])
def test_bos_of_tokenizer_and_template_together_is_one(with_template: Make, template: str, objective: str) -> None:
    tokenizer = with_template(template, adds_bos=True)
    row = row_of(tokenizer, MultipleChoice("Why?", ("a", "b"), 0), "chat", objective=objective)
    assert (row.prompt + row.branches[0])[0] == tokenizer.bos_token_id
    assert count(row.prompt + row.branches[0], tokenizer.bos_token_id) == 1


def test_bos_that_only_the_template_writes_is_kept(with_template: Make) -> None:
    tokenizer = with_template("llama3")
    row = row_of(tokenizer, chat("Hi", "Hello"), "chat")
    assert row.prompt == [] and row.branches[0][0] == tokenizer.bos_token_id
    assert count(row.branches[0], tokenizer.bos_token_id) == 1


def test_a_tokenizer_that_adds_no_bos_gets_none(smol_tokenizer: PreTrainedTokenizerBase) -> None:
    row = row_of(smol_tokenizer, PromptCompletion("Hi", " there"))
    assert smol_tokenizer.bos_token_id not in row.prompt + row.branches[0]


def test_the_first_token_of_all_is_not_counted_as_learned_where_nothing_predicts_it(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    row = row_of(tokenizer, Text("Metals conduct electricity."))
    batch = collate([row], pad_token_id=tokenizer.pad_token_id)
    assert len(batch.targets) == sum(row.supervised[0])
    assert row.supervised[0][0] == bool(row.prompt)
    assert all(row.supervised[0][1:])


def test_a_text_is_its_tokens_and_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    row = row_of(tokenizer, Text("Metals conduct electricity."))
    assert row.prompt + row.branches[0] == [
        *tokenizer("Metals conduct electricity.")["input_ids"],
        tokenizer.eos_token_id,
    ]


@pytest.mark.parametrize("max_length", [8, 9, 12, 40])
def test_the_prompt_with_its_longest_branch_is_what_is_bounded(
    smol_tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    example = MultipleChoice("Why?", ("so", "because of the weather"), 0)
    rows = {
        limit: row_of(smol_tokenizer, example, objective="choice_ranking", max_length=limit)
        for limit in (max_length, 1024)
    }
    cut, full = rows[max_length], rows[1024]
    room = max_length - len(full.prompt)
    assert cut.prompt == full.prompt and len(cut.prompt) + max(map(len, cut.branches)) <= max_length
    assert cut.branches == [branch[:room] for branch in full.branches]
    assert cut.supervised == [mask[:room] for mask in full.supervised]


def test_truncation_is_reported_and_a_cut_answer_does_not_learn_to_end(smol_tokenizer: PreTrainedTokenizerBase) -> None:
    example = PromptCompletion("Hi", " one two three four five six")
    rendered = Renderer(config(), smol_tokenizer).render(example, "plain")
    [whole] = Encoder(smol_tokenizer, 1024).encode([rendered])
    [fits] = Encoder(smol_tokenizer, whole.row.length).encode([rendered])
    [cut] = Encoder(smol_tokenizer, whole.row.length - 1).encode([rendered])
    assert fits == whole and not whole.truncated and whole.row.branches[0][-1] == smol_tokenizer.eos_token_id
    assert cut.truncated and cut.learnable and cut.row.branches[0] == whole.row.branches[0][:-1]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_row_whose_answer_is_cut_off_is_not_learnable(smol_tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
    rendered = Renderer(config(), smol_tokenizer).render(PromptCompletion("one two three", " four"), "plain")
    [cut] = Encoder(smol_tokenizer, limit).encode([rendered])
    assert cut.truncated and not cut.learnable and cut.row.length <= limit


def test_a_tokenizer_without_eos_cannot_end_an_answer(with_template: Make) -> None:
    tokenizer = with_template("chatml")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-text token"):
        row_of(tokenizer, PromptCompletion("Hi", " there"))
    row_of(tokenizer, chat("Hi", "Hello"), "chat")  # its turns end by themselves


def test_a_text_longer_than_the_model_reads_gives_no_warning(
    with_template: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = with_template("chatml")
    tokenizer.model_max_length = 16
    row_of(tokenizer, Text("ice melts into water " * 20))
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_that_replaces_what_it_does_not_know_still_keeps_the_spans(learned: Learned) -> None:
    words = Tokenizer(models.WordLevel({"hi": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="[UNK]")
    row = row_of(tokenizer, PromptCompletion("hi hi", " strange hi"))
    assert (row.prompt, row.branches, row.supervised) == ([0, 0], [[1, 0, 2]], [[True, True, True]])
