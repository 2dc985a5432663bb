from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from smore_cli.data.formats import Conversation, Instruction, MultipleChoice, PromptCompletion, Text
from smore_cli.data.templates import Branch, Rendered, Renderer
from smore_cli.errors import DataError
from smore_cli.recipe.schema import DataConfig

Make = Callable[..., PreTrainedTokenizerBase]
Config = Callable[..., DataConfig]

QUESTION = MultipleChoice("Why?", ("because", "so"), 1)
CHAT = Conversation(
    tuple({"role": role, "content": text} for role, text in [("user", "Hi"), ("assistant", "Yo"), ("user", "Bye")])
)


def whole(text: str, *, eos: bool = True) -> Branch:
    return Branch(text, ((0, len(text)),), eos)


@pytest.fixture
def renderer(with_template: Make, data_config: Config) -> Callable[..., Renderer]:
    def make(template: str = "chatml", **fields: Any) -> Renderer:
        return Renderer(data_config("x.jsonl", "text", **fields), with_template(template))

    return make


def test_a_plain_question_is_written_as_the_evaluation_harness_writes_arc(renderer: Any) -> None:
    assert renderer().render(QUESTION, "plain") == Rendered("Question: Why?\nAnswer:", (whole(" so"),))


def test_ranking_keeps_every_choice_and_which_is_right(renderer: Any) -> None:
    rendered = renderer(objective="choice_ranking").render(QUESTION, "plain")
    assert rendered == Rendered("Question: Why?\nAnswer:", (whole(" because"), whole(" so")), gold=1)


def test_prompt_and_completion_are_joined_as_they_are(renderer: Any) -> None:
    assert renderer().render(PromptCompletion("a b", "c"), "plain") == Rendered("a b", (whole("c"),))


@pytest.mark.parametrize("given", ["", "1, 2"])
def test_alpaca_rows_are_written_with_the_known_prompt(renderer: Any, given: str) -> None:
    rendered = renderer().render(Instruction("Add.", given, "3"), "plain")
    assert rendered.branches == (whole("3"),)
    opening = ", paired with an input that provides further context. " if given else ". "
    assert rendered.prompt == (
        f"Below is an instruction that describes a task{opening}"
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
        f"{'### Input:' + chr(10) + given + chr(10) * 2 if given else ''}### Response:\n"
    )


def test_braces_in_an_instruction_stay(renderer: Any) -> None:
    assert "{input} {x}" in renderer().render(Instruction("{input} {x}", "", "3"), "plain").prompt


def test_loss_on_all_leaves_no_prompt(renderer: Any) -> None:
    rendered = renderer(loss_on="all").render(QUESTION, "plain")
    assert rendered == Rendered("", (whole("Question: Why?\nAnswer: so"),))


def test_a_text_is_one_branch_under_any_template(renderer: Any) -> None:
    made = renderer(template="chatml", objective="completion")
    assert made.style("text") == "plain"
    assert made.render(Text("once"), "plain") == Rendered("", (whole("once"),))


@pytest.mark.parametrize(
    ("template", "format_name", "style"),
    [
        ("auto", "chat", "chat"),
        ("auto", "multiple_choice", "plain"),
        ("auto", "alpaca", "plain"),
        ("chat", "multiple_choice", "chat"),
        ("chat", "text", "plain"),
        ("plain", "prompt_completion", "plain"),
    ],
)
def test_auto_means_the_chat_template_for_chat_rows_only(
    with_template: Make, data_config: Config, template: str, format_name: str, style: str
) -> None:
    made = Renderer(data_config("x.jsonl", "text", template=template), with_template("chatml"))
    assert made.style(format_name) == style


def test_conversations_have_no_plain_form(with_template: Make, data_config: Config) -> None:
    with pytest.raises(DataError, match="no form for conversations"):
        Renderer(data_config("x.jsonl", "chat", template="plain"), with_template("chatml")).style("chat")


@pytest.mark.parametrize(
    "example",
    [QUESTION, PromptCompletion("Why?", "so"), Instruction("Why?", "", "so")],
)
def test_every_format_becomes_two_turns_in_the_chat_template(renderer: Any, example: Any) -> None:
    rendered = renderer().render(example, "chat")
    text = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nso<|im_end|>\n"
    start = text.index("so<")
    assert rendered == Rendered("", (Branch(text, ((start, start + len("so<|im_end|>")),), eos=False),))


def test_an_instructions_input_follows_it_in_the_users_turn(renderer: Any) -> None:
    rendered = renderer().render(Instruction("Add.", "1, 2", "3"), "chat")
    assert rendered.branches[0].text.startswith("<|im_start|>user\nAdd.\n\n1, 2<|im_end|>")


@pytest.mark.parametrize(
    ("template", "end"), [("llama3", "<|eot_id|>"), ("chatml", "<|im_end|>\n"), ("marked", "<|im_end|>\n")]
)
def test_ranked_choices_share_the_prompt_that_generation_starts_from(
    with_template: Make, data_config: Config, template: str, end: str
) -> None:
    tokenizer = with_template(template)
    made = Renderer(data_config("x.jsonl", "multiple_choice", objective="choice_ranking"), tokenizer)
    rendered = made.render(QUESTION, "chat")
    asked = [{"role": "user", "content": "Why?"}]
    assert rendered.prompt == tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert [branch.text for branch in rendered.branches] == [f"because{end}", f"so{end}"]
    for branch in rendered.branches:
        assert branch.spans == ((0, len(branch.text.rstrip())),) and not branch.eos


def test_eos_ends_the_last_turn_of_a_template_that_has_no_end_of_turn(renderer: Any) -> None:
    rendered = renderer("roles").render(PromptCompletion("Why?", "so"), "chat")
    text = "User: Why?\nAssistant: so"
    assert rendered == Rendered("", (Branch(text, ((len(text) - 2, len(text)),), eos=True),))


def test_a_conversation_that_the_user_ends_stops_with_the_last_answer(renderer: Any) -> None:
    [branch] = renderer("roles").render(CHAT, "chat").branches
    assert branch.text == "User: Hi\nAssistant: Yo" and branch.eos
    assert [branch.text[start:end] for start, end in branch.spans] == ["Yo"]


def test_loss_on_all_learns_a_whole_conversation(renderer: Any) -> None:
    [branch] = renderer(loss_on="all").render(CHAT, "chat").branches
    assert branch.spans == ((0, len(branch.text)),)


def test_loss_on_chooses_the_turns(renderer: Any) -> None:
    long = Conversation((*CHAT.messages, {"role": "assistant", "content": "Ciao"}))
    found = {}
    for loss_on in ("assistant", "last_turn", "completion"):
        [branch] = renderer(loss_on=loss_on).render(long, "chat").branches
        found[loss_on] = [branch.text[start:end] for start, end in branch.spans]
    last = ["Ciao<|im_end|>"]
    assert found == {"assistant": ["Yo<|im_end|>", *last], "last_turn": last, "completion": last}
