"""Small real tokenizers (trained here with the tokenizers library) and short chat templates in the style of known
ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from smore_cli.data.batch import Row
from smore_cli.recipe.schema import DataConfig, Source

CORPUS = [
    "Question: Which of these is a source of light?\nAnswer: the sun. What do plants need to grow?\n\nAnswer: water.",
    "The quick brown fox jumps over the lazy dog.\n\n\nMetals conduct electricity and heat; ice melts into water.",
    "user\nassistant\nsystem\nmodel\nHello there! How are you?\n\nBelow is an instruction that describes a task.",
]
SPECIAL = [
    "<s>",
    "</s>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
]

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{ m.content | trim }}{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{{ m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "phi": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "roles": (  # no special token at all
        "{% for m in messages %}{{ m.role | capitalize + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    ),
    "rewriting": (  # keeps the reasoning of the last turn only
        "{% for m in messages %}{% set text = m.content if loop.last else m.content.split('</think>')[-1] %}"
        "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "marked": (  # rewrites too, but says itself what the assistant wrote (without the token that ends the turn)
        "{% for m in messages %}{% set text = m.content if loop.last else m.content.split('</think>')[-1] %}"
        "{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ text }}{% endgeneration %}{% else %}{{ text }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


def byte_level(*, trim_offsets: bool = False) -> Tokenizer:
    """A byte-level BPE, as GPT-2's: it can write any text and reads it back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def llama_like(bos: str = "<s>") -> Tokenizer:
    """A BPE with byte fallback over words that begin with a low line, and BOS put before every text: as Llama's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<unk>", *SPECIAL, *(f"<0x{b:02X}>" for b in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    number = tokenizer.token_to_id(bos)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
    )
    return tokenizer


def wrap(tokenizer: Tokenizer, **names: Any) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerBase:
    """No BOS, and pad is EOS, as in many decoders."""
    return wrap(byte_level(), eos_token="</s>", pad_token="</s>", chat_template=TEMPLATES["chatml"])


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerBase:
    """Puts BOS before every text, and its chat template writes BOS too."""
    return wrap(llama_like(), bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATES["llama3"])


@pytest.fixture(scope="session")
def smol_tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    """SmolLM2's own tokenizer: BOS is not added, pad is EOS, the template adds a system turn."""
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session", params=["byte", "bos", "smol"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture(scope="session")
def with_template() -> Callable[..., PreTrainedTokenizerBase]:
    """Makes a tokenizer with one of the templates above; `adds_bos` gives it a BOS of its own."""

    def make(name: str, *, adds_bos: bool = False, trim_offsets: bool = False) -> PreTrainedTokenizerBase:
        bos = {"llama3": "<|begin_of_text|>", "gemma": "<bos>"}.get(name, "<s>")
        built = llama_like(bos) if adds_bos else byte_level(trim_offsets=trim_offsets)
        return wrap(built, bos_token=bos, eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATES[name])

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as a .jsonl file and returns its path."""

    def write_rows(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write_rows


@pytest.fixture(scope="session")
def data_config() -> Callable[..., DataConfig]:
    """Makes a data section with one source."""

    def make(path: str, format_name: str, *, source: dict[str, Any] | None = None, **fields: Any) -> DataConfig:
        return DataConfig(train=[Source(path=path, format=format_name, **(source or {}))], **fields)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def learned() -> Callable[..., str]:
    """Gives the text that a branch's learned tokens write, as it stands in the whole row."""

    def learned_text(tokenizer: PreTrainedTokenizerBase, row: Row, branch: int = 0) -> str:
        ids = row.prompt + row.branches[branch]
        mask = [False] * len(row.prompt) + row.supervised[branch]
        text = ""
        for place, supervised in enumerate(mask):
            if supervised and not (place and mask[place - 1]):
                start = place
            if supervised and (place + 1 == len(mask) or not mask[place + 1]):
                text += _decode(tokenizer, ids[: place + 1])[len(_decode(tokenizer, ids[:start])) :]
        return text

    return learned_text


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
