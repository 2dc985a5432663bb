"""A byte-level BPE tokenizer as llama.cpp keeps it: tokens, their kinds, merges, and the name of its pre-tokenizer.

llama.cpp splits text by rules that are built in under a name (`tokenizer.ggml.pre`). The name is found by what
tokenizer.json says the rules are; for rules that are not known here there is no right name, and a wrong one would give
other tokens for the same text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smore_cli.errors import UsageError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

__all__ = ["GgufTokenizer", "read_tokenizer"]

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_NAMES: dict[str, str] = {
    json.dumps(["ByteLevel"]): "gpt-2",
    json.dumps(["Digits", "ByteLevel"]): "smollm",
    json.dumps([_LLAMA3, "ByteLevel-raw"]): "llama-bpe",
    json.dumps([_QWEN2, "ByteLevel-raw"]): "qwen2",
}
"""llama.cpp's name of each sequence of rules."""


@dataclass(frozen=True)
class GgufTokenizer:
    """What is written.

    Attributes:
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: by id, as many as the embedding has rows.
        kinds: ordinary, control, user-defined or unused.
        merges: in their order.
        special: ids of bos, eos, pad and unk, where there are any.
        add_bos: whether a text begins with bos.
        template: of chats; None: none.
    """

    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    template: str | None

    def write(self, writer: GGUFWriter) -> None:
        """Adds it to a file's metadata."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        for role, number in self.special.items():
            getattr(writer, f"add_{role}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        if self.template is not None:
            writer.add_chat_template(self.template)


def read_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> GgufTokenizer:
    """Returns a tokenizer as llama.cpp keeps it.

    Args:
        tokenizer: a fast one.
        vocab_size: rows of the embedding.

    Raises:
        UsageError: it is no byte-level BPE, or splits text by rules that have no name in llama.cpp.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError("the tokenizer has no tokenizer.json, and gguf is written from one", "--to hf needs none")
    values = json.loads(backend.to_str())
    if values["model"]["type"] != "BPE" or values["model"].get("byte_fallback"):
        kind = "a SentencePiece one" if values["model"].get("byte_fallback") else f"of type {values['model']['type']}"
        raise UsageError(f"the tokenizer is {kind}; gguf is written with a byte-level BPE", "export with --to hf")
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {each["id"]: each for each in values["added_tokens"]}
    tokens = [names.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    return GgufTokenizer(
        pre=_pre_tokenizer(values["pre_tokenizer"]),
        tokens=tokens,
        kinds=[_kind(i, names, added) for i in range(vocab_size)],
        merges=[_merge(merge) for merge in values["model"]["merges"]],
        special=_special(tokenizer, vocab_size),
        add_bos=tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id],
        template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _kind(number: int, names: dict[int, str], added: dict[int, dict[str, Any]]) -> int:
    if number not in names:
        return _UNUSED
    if number not in added:
        return _NORMAL
    return _CONTROL if added[number]["special"] else _USER_DEFINED


def _merge(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _special(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, int]:
    found = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad", "unk")}
    return {role: number for role, number in found.items() if number is not None and number < vocab_size}


def _pre_tokenizer(values: dict[str, Any] | None) -> str:
    parts = [] if values is None else values.get("pretokenizers", [values])
    rules = [_rule(part) for part in parts]
    if (name := _NAMES.get(json.dumps(rules))) is None:
        shown = ", ".join(rules) or "none"
        problem = f"the tokenizer's rules for splitting text ({shown}) have no name that smore knows in llama.cpp"
        raise UsageError(problem, f"known are those of: {', '.join(_NAMES.values())}")
    return name


def _rule(part: dict[str, Any]) -> str:
    """Returns a rule in a word, all of its settings included."""
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return "ByteLevel"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return "ByteLevel-raw"
        case {"type": "Digits", "individual_digits": True}:
            return "Digits"
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}:
            return regex
        case _:
            return json.dumps(part, sort_keys=True)
