"""From what a row means to text: a prompt, the branches that may follow it, and which characters are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from smore_cli.data.chat import ChatTemplate, Span
from smore_cli.data.formats import (
    CHAT_FORMATS,
    Conversation,
    Example,
    Instruction,
    MultipleChoice,
    PromptCompletion,
    Text,
)
from smore_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from smore_cli.recipe.schema import DataConfig

__all__ = ["Branch", "Rendered", "Renderer"]

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Branch:
    """A text that follows the prompt.

    Attributes:
        text: the text, without the prompt.
        spans: the characters of it that are learned.
        eos: whether the tokenizer's end-of-text token follows, learned too.
    """

    text: str
    spans: tuple[Span, ...]
    eos: bool


@dataclass(frozen=True)
class Rendered:
    """A row as text; `gold` is the index of the right branch."""

    prompt: str
    branches: tuple[Branch, ...]
    gold: int = 0


class Renderer:
    """Renders examples as one recipe's `data:` section says.

    Args:
        data: the section; `template`, `loss_on` and `objective` are read.
        tokenizer: for its chat template.
    """

    def __init__(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.data = data
        self.tokenizer = tokenizer
        self._template: ChatTemplate | None = None

    @property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template.

        Raises:
            DataError: the tokenizer has none.
        """
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer)
        return self._template

    def style(self, format_name: str) -> Literal["plain", "chat"]:
        """Returns how rows of a format are written: a `text` row is always plain, as it has no turns.

        Raises:
            DataError: `template: plain` with conversations, or a chat template wanted where there is none.
        """
        if format_name == "text":
            return "plain"
        if format_name in CHAT_FORMATS and self.data.template == "plain":
            raise _no_plain_form()
        if format_name in CHAT_FORMATS or self.data.template == "chat":
            _ = self.template
            return "chat"
        return "plain"

    def render(self, example: Example, style: Literal["plain", "chat"]) -> Rendered:
        """Returns an example as text; a conversation, also one that stands in a `prompt_completion` row, as a chat.

        Raises:
            TurnsRewritten: the chat template writes earlier turns differently; `render_turns` can write them.
            DataError: the chat template cannot write it.
        """
        if style == "plain" and not isinstance(example, Conversation):
            return self._plain(example)
        if self.data.template == "plain":
            raise _no_plain_form()
        if isinstance(example, MultipleChoice) and self.data.objective == "choice_ranking":
            return self._chat_choices(example)
        return self._conversation(_as_conversation(example))

    def render_turns(self, example: Conversation) -> list[Rendered]:
        """Returns a conversation as one text for each assistant turn, which ends with that turn.

        So each turn is learned exactly as the model would be asked for it, where one text cannot hold them all: a
        template that rewrites earlier turns, or an answer whose first token depends on what stands before it.

        Raises:
            DataError: the chat template cannot write it.
        """
        turns = []
        for place, message in enumerate(example.messages):
            if message["role"] == "assistant":
                text, spans = self.template.turns(example.messages[: place + 1], last_only=True)
                self._require_all_written(example.messages[: place + 1], text)
                turns.append(Rendered("", (self._closed(text, spans),)))
        return turns

    def _plain(self, example: Example) -> Rendered:
        prompt, answers, gold = _plain_parts(example)
        if self.data.objective == "completion":
            answers, gold = (answers[gold],), 0
        if self.data.loss_on == "all":
            prompt, answers = "", tuple(prompt + answer for answer in answers)
        return Rendered(prompt, tuple(Branch(answer, ((0, len(answer)),), eos=True) for answer in answers), gold)

    def _chat_choices(self, example: MultipleChoice) -> Rendered:
        """Renders a question once, with every choice as an assistant's turn of its own."""
        question = [{"role": "user", "content": example.question}]
        prompt = self.template.render(question, generation_prompt=True)
        branches = []
        for choice in example.choices:
            text, spans = self.template.turns([*question, {"role": "assistant", "content": choice}], last_only=True)
            if not text.startswith(prompt):
                problem = "the chat template writes a question differently once it is answered"
                raise DataError(problem, "use template: plain")
            branch = self._closed(text, spans)
            shifted = tuple((start - len(prompt), end - len(prompt)) for start, end in branch.spans)
            branches.append(Branch(branch.text[len(prompt) :], shifted, branch.eos))
        return Rendered(prompt, tuple(branches), example.label)

    def _conversation(self, example: Conversation) -> Rendered:
        messages = example.messages
        if self.data.loss_on == "all":
            text = self.template.render(messages)
            spans = [(0, len(text))]
        else:
            messages = _through_last_answer(messages)
            text, spans = self.template.turns(messages, last_only=self.data.loss_on != "assistant")
        self._require_all_written(messages, text)
        if messages[-1]["role"] == "assistant" and spans:
            return Rendered("", (self._closed(text, spans),))
        return Rendered("", (Branch(text, tuple(spans), eos=False),))

    def _require_all_written(self, messages: tuple[dict[str, Any], ...], text: str) -> None:
        if (place := self.template.left_out(messages, text)) is not None:
            problem = f"the chat template leaves out message {place + 1}, whose role is '{messages[place]['role']}'"
            raise DataError(problem, "take such messages out of the data, or map their role to one it writes")

    def _closed(self, text: str, spans: list[Span]) -> Branch:
        """Returns a text that ends in an assistant's turn; EOS is added where the template itself does not end it."""
        start, end = spans[-1]
        if self.template.closes(text[:end]):
            return Branch(text, tuple(spans), eos=False)
        end = start + len(text[start:end].rstrip())
        return Branch(text[:end], (*spans[:-1], (start, end)), eos=True)


def _no_plain_form() -> DataError:
    return DataError("template: plain has no form for conversations", "use template: auto")


def _through_last_answer(messages: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """Returns the messages up to the last answer: what follows it is not learned, and no answer can see it."""
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: answers[-1] + 1] if answers else messages


def _plain_parts(example: Example) -> tuple[str, tuple[str, ...], int]:
    """Returns prompt, possible answers and the index of the right one; prompt + answer is what a plain model reads.

    A question is written exactly as lm-evaluation-harness writes its ARC task, so training and scoring agree.
    """
    match example:
        case MultipleChoice():
            answers = tuple(f" {choice}" for choice in example.choices)
            return f"Question: {example.question}\nAnswer:", answers, example.label
        case PromptCompletion():
            return example.prompt, (example.completion,), 0
        case Instruction():
            form = ALPACA_WITH_INPUT if example.input else ALPACA
            return form.format(instruction=example.instruction, input=example.input), (example.output,), 0
        case Text():
            return "", (example.text,), 0
        case Conversation():
            raise TypeError("a conversation has no plain form; Renderer.style refuses it")


def _as_conversation(example: Example) -> Conversation:
    """Returns one question and its right answer as two turns; a conversation is what it is."""
    match example:
        case Conversation():
            return example
        case MultipleChoice():
            asked, answer = example.question, example.choices[example.label]
        case PromptCompletion():
            asked, answer = example.prompt, example.completion
        case Instruction():
            asked, answer = "\n\n".join(part for part in (example.instruction, example.input) if part), example.output
        case Text():
            raise TypeError("a text has no turns; Renderer.style writes it plain")
    return Conversation(({"role": "user", "content": asked}, {"role": "assistant", "content": answer}))
