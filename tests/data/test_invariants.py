"""What holds of every row of every kind of chat template, and what is said where it does not.

The symptoms are those that other trainers had: assistant masks of zeros or ones where a template marks no turns, the
real EOS masked because it is the pad token, BOS written twice, a training prefix that inference never gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from smore_cli.data.batch import Row, collate
from smore_cli.data.encode import Encoded, Encoder
from smore_cli.data.formats import Conversation, read_examples
from smore_cli.data.invariants import DOUBLE_BOS, NO_BOS, NO_END, OTHER_PROMPT, Invariants
from smore_cli.data.pipeline import SPLIT, encode_examples
from smore_cli.data.sources import SourceRows
from smore_cli.data.templates import Renderer
from smore_cli.errors import DataError
from smore_cli.recipe.schema import DataConfig
from tests.data.conftest import byte_level, llama_like, wrap
from tests.data.stock_templates import BROKEN, LLAMA_2, LLAMA_31, MARKED, PHI_3, QWEN_3, STOCK

Learned = Callable[..., str]
Messages = list[dict[str, Any]]

END = {"llama31": "<|eot_id|>", "llama32": "<|eot_id|>", "qwen3": "<|im_end|>", "gemma3": "<end_of_turn>",
       "mistral": "</s>", "llama2": "</s>", "phi3": "<|end|>", "marked": "<|im_end|>"}  # fmt: skip


def tokenizer_with(template: str, *, adds_bos: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer whose pad is its EOS."""
    built = llama_like("<s>") if adds_bos else byte_level()
    return wrap(built, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=template)


def say(*contents: str) -> Messages:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]


def encoded(tokenizer: PreTrainedTokenizerBase, *rows: Messages, **fields: Any) -> tuple[list[Encoded], SourceRows]:
    data = DataConfig.model_validate({"train": [{"path": "x.jsonl", "format": "chat"}], **fields})
    raw = SourceRows("x.jsonl", [{"messages": messages} for messages in rows], {})
    examples = enumerate(read_examples(raw, "chat"), 1)
    found = encode_examples(examples, raw, Renderer(data, tokenizer), Encoder(tokenizer, data.max_length), "chat")
    return [row for _, row in found], raw


def refused(tokenizer: PreTrainedTokenizerBase, *rows: Messages, **fields: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        encoded(tokenizer, *rows, **fields)
    assert "\n" not in caught.value.message and caught.value.hint
    return caught.value


def prompts(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, bos: bool) -> list[list[int]]:
    """What the model is given to answer each assistant turn, by the library's own function."""
    found = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            ids = tokenizer.apply_chat_template(messages[:place], add_generation_prompt=True, return_dict=False)
            found.append([tokenizer.bos_token_id, *ids] if bos and ids[0] != tokenizer.bos_token_id else list(ids))
    return found


def learned_starts(row: Row) -> list[list[int]]:
    """The tokens before each learned run."""
    ids, mask = row.prompt + row.branches[0], [False] * len(row.prompt) + row.supervised[0]
    return [ids[:place] for place in range(1, len(ids)) if mask[place] and not mask[place - 1]]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", [name for name in STOCK if name != "llama32"])
def test_every_turn_is_learned_with_its_end_after_exactly_the_prompt_of_inference(
    name: str, adds_bos: bool, learned: Learned
) -> None:
    tokenizer = tokenizer_with(STOCK[name], adds_bos=adds_bos)
    messages = say("What do plants need?", "Water and light.", "How are you?", "Hello there!", "And metals?", "Heat.")
    rows, raw = encoded(tokenizer, messages, loss_on="assistant")
    found = [start for row in rows for start in learned_starts(row.row)]
    assert found == prompts(tokenizer, messages, bos=adds_bos)
    text = "".join(learned(tokenizer, row.row) for row in rows)
    think = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    space = {"mistral": " ", "llama2": " "}.get(name, "")
    after = " " if name == "llama2" else ""
    answers = [message["content"] for message in messages[1::2]]
    assert text == "".join(f"{think}{space}{answer}{after}{END[name]}" for answer in answers)
    # One row an answer where the template rewrites turns, or where they are tokenised otherwise once others follow.
    assert len(rows) in ((3,) if name == "qwen3" else (1, 3))
    assert raw.notices == ({SPLIT: 1} if len(rows) == 3 else {})


@pytest.mark.parametrize("name", STOCK)
def test_the_last_turn_alone_is_learned_of_every_template(name: str, learned: Learned) -> None:
    tokenizer = tokenizer_with(STOCK[name])
    messages = say("Hi", "Hello", "Bye", "See you", "One more thing")
    for loss_on in ("last_turn", "completion"):
        [row], _ = encoded(tokenizer, messages, loss_on=loss_on)
        assert learned(tokenizer, row.row).strip().endswith(f"See you{' ' * (name == 'llama2')}{END[name]}")
        if name != "llama32":  # whose prompt holds today's date
            assert learned_starts(row.row) == prompts(tokenizer, messages, bos=False)[-1:]
    [whole], _ = encoded(tokenizer, messages[:4], loss_on="all")
    assert all(whole.row.supervised[0][1:])


@pytest.mark.parametrize("name", ["llama31", "gemma3", "mistral"])
def test_a_system_turn_is_written_where_the_template_wants_it(name: str, learned: Learned) -> None:
    tokenizer = tokenizer_with(STOCK[name], adds_bos=True)
    messages = [{"role": "system", "content": "Be kind."}, *say("Hi", "Hello", "Bye", "See you")]
    rows, _ = encoded(tokenizer, messages, loss_on="assistant")
    assert [start for row in rows for start in learned_starts(row.row)] == prompts(tokenizer, messages, bos=True)
    assert all("Be kind." in tokenizer.decode(row.row.prompt + row.row.branches[0]) for row in rows)


def test_thinking_is_learned_where_a_template_drops_it_from_earlier_turns(learned: Learned) -> None:
    tokenizer = tokenizer_with(QWEN_3)
    messages = say("2+2?", "<think>\neasy\n</think>\n\n4", "3+3?", "<think>\nhm\n</think>\n\n6")
    first, second = encoded(tokenizer, messages, loss_on="assistant")[0]
    assert learned(tokenizer, first.row) == "<think>\neasy\n</think>\n\n4<|im_end|>"
    assert learned(tokenizer, second.row) == "<think>\nhm\n</think>\n\n6<|im_end|>"
    assert "easy" not in tokenizer.decode(second.row.branches[0])


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(alphabet="ab .,:\n?é🙂", min_size=1, max_size=8), min_size=2, max_size=4))
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", ["marked", "phi3", "qwen3", "mistral"])
def test_white_space_around_answers_never_moves_the_prompt(name: str, adds_bos: bool, texts: list[str]) -> None:
    tokenizer = tokenizer_with(STOCK[name], adds_bos=adds_bos)
    messages = say(*(text if text.strip() else f"{text}a" for text in texts))
    rows, _ = encoded(tokenizer, messages, loss_on="assistant")
    assert [start for row in rows for start in learned_starts(row.row)] == prompts(tokenizer, messages, bos=adds_bos)


def test_pad_being_eos_does_not_mask_the_real_eos() -> None:
    tokenizer = tokenizer_with(LLAMA_2)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows, _ = encoded(tokenizer, say("Hi", "Hello", "Bye", "Ciao"), say("Hi", "Hello"), loss_on="assistant")
    batch = collate([row.row for row in rows], pad_token_id=tokenizer.pad_token_id)
    assert (batch.targets == tokenizer.eos_token_id).sum() == 3


@pytest.mark.parametrize("adds_bos", [False, True])
def test_each_conversation_has_one_bos_unless_its_template_opens_several_texts(adds_bos: bool) -> None:
    for template, count in ((LLAMA_31, 1), (PHI_3, int(adds_bos)), (LLAMA_2, 2)):
        tokenizer = tokenizer_with(template, adds_bos=adds_bos)
        [row], _ = encoded(tokenizer, say("Hi", "Hello", "Bye", "Ciao"), loss_on="last_turn")
        ids = row.row.prompt + row.row.branches[0]
        assert ids.count(tokenizer.bos_token_id) == count
        assert count == 0 or ids[0] == tokenizer.bos_token_id


def test_a_date_of_today_is_fixed_and_said(learned: Learned) -> None:
    tokenizer = tokenizer_with(STOCK["llama32"])
    [row], raw = encoded(tokenizer, say("Hi", "Hello"))
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(row.row.branches[0])
    assert [what for what in raw.notices if "today's date" in what]


@pytest.mark.parametrize(
    ("name", "loss_on", "problem"),
    [
        ("two bos", "assistant", f"x.jsonl: {DOUBLE_BOS}: 2 of the 2 rows from 1 on (rows 1, 2)"),
        ("two bos", "all", f"x.jsonl: {DOUBLE_BOS}"),
        ("bos of its own", "assistant", f"x.jsonl: {DOUBLE_BOS}"),
        ("no end", "assistant", f"x.jsonl: {NO_END}: one row (row 1)"),
        ("other opening", "assistant", "x.jsonl, row 1: the chat template does not open turn 2 as its generation"),
        ("opened thinking", "last_turn", "x.jsonl, row 1: the chat template does not open turn 4 as its generation"),
        ("mark too late", "assistant", "x.jsonl, row 1: the chat template does not open turn 2 as its generation"),
        ("a mark too few", "assistant", "x.jsonl, row 1: the chat template marks 1 turns"),
        ("code that fails", "last_turn", "x.jsonl, row 1: the chat template fails on these messages: can only"),
        ("undefined", "last_turn", "x.jsonl, row 1: the chat template fails on these messages: 'dict object'"),
    ],
)
def test_a_broken_template_stops_with_row_numbers(name: str, loss_on: str, problem: str) -> None:
    tokenizer = tokenizer_with(BROKEN[name], adds_bos=True)
    error = refused(tokenizer, say("Hi", "Hello", "Bye", "Ciao"), say("Hi", "Hello"), loss_on=loss_on)
    assert error.message.startswith(problem)


def test_the_text_of_a_special_token_in_the_data_is_found() -> None:
    tokenizer = tokenizer_with(LLAMA_31)
    error = refused(tokenizer, say("Hi", "Hello"), say("Hi <s> there", "Hello"))
    assert error.message == f"x.jsonl: {DOUBLE_BOS}: one row (row 2)"


def test_a_message_that_a_template_skips_in_silence_is_refused() -> None:
    tool = [*say("2+2?", "I ask."), {"role": "tool", "content": "four"}, {"role": "assistant", "content": "4"}]
    error = refused(tokenizer_with(PHI_3), tool)
    assert error.message == "x.jsonl, row 1: the chat template leaves out message 3, whose role is 'tool'"
    [row], _ = encoded(tokenizer_with(QWEN_3), tool)
    assert "<tool_response>\nfour\n</tool_response>" in tokenizer_with(QWEN_3).decode(row.row.branches[0])


def tampered(change: Callable[[list[int], list[bool]], tuple[list[int], list[bool]]]) -> str | None:
    """What is said of a row whose tokens were changed after they were made."""
    tokenizer = tokenizer_with(MARKED, adds_bos=True)
    data = DataConfig.model_validate({"train": [{"path": "x.jsonl", "format": "chat"}], "loss_on": "assistant"})
    rendered = Renderer(data, tokenizer).render(Conversation(tuple(say("Hi", "Hello"))), "chat")
    encoder = Encoder(tokenizer, 512)
    [whole] = encoder.encode([rendered])
    ids, mask = change([*whole.row.prompt, *whole.row.branches[0]], [False, *whole.row.supervised[0]])
    row = Encoded(Row(ids[:1], [ids[1:]], [mask[1:]]), False, whole.spans)
    [problem] = Invariants(tokenizer, encoder.leading).problems([rendered], [row])
    return problem


def test_the_checks_look_at_the_tokens_themselves() -> None:
    def last_learned(ids: list[int], mask: list[bool]) -> int:
        return max(place for place, on in enumerate(mask) if on)

    assert tampered(lambda ids, mask: (ids, mask)) is None
    assert tampered(lambda ids, mask: ([ids[1], *ids[1:]], mask)) == NO_BOS
    assert tampered(lambda ids, mask: ([*ids[:3], ids[0], *ids[4:]], mask)) == DOUBLE_BOS
    assert tampered(lambda ids, mask: ([*ids[:2], ids[-1], *ids[3:]], mask)) == OTHER_PROMPT

    def end_not_learned(ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
        mask[last_learned(ids, mask)] = False
        return ids, mask

    assert tampered(end_not_learned) == NO_END
