"""`--to gguf`: the merged model for llama.cpp, and beside it a LoRA as an adapter for the backbone's own file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from smore_cli.errors import CheckFailed, UsageError
from smore_cli.exporting.compare import Writer, greedy
from smore_cli.exporting.formats import Options, Written
from smore_cli.exporting.gguf_adapter import is_plain_lora, write_adapter
from smore_cli.exporting.gguf_model import NUMBERS, LlamaNames, gguf_bytes, require_llama, write_model
from smore_cli.exporting.gguf_tokenizer import read_tokenizer
from smore_cli.exporting.llama_cpp import LlamaCpp, require_llama_cpp
from smore_cli.exporting.merged import load_plain, merge_into
from smore_cli.merging.outcome import MERGE_FILE
from smore_cli.merging.writing import require_room
from smore_cli.models.load import load_skeleton, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from smore_cli.models.runs import Run

__all__ = ["write_gguf"]

TOLERANCE = {"f32": 1e-3, "f16": 5e-3, "bf16": 0.05, "q8_0": 0.1}
"""Mean difference in nats, by type of the numbers, from the merged model in transformers and its own type."""


def write_gguf(run: Run, folder: Path, options: Options) -> Written:
    """Writes model-TYPE.gguf and, for a plain LoRA, adapter-TYPE.gguf.

    Raises:
        UsageError: the backbone, its tokenizer or the type is not one that is written.
    """
    kind = options.type or "f16"
    if kind not in NUMBERS:
        raise UsageError(f"--type {kind} is no type of gguf that is written here", f"there are: {', '.join(NUMBERS)}")
    if options.verify:
        require_llama_cpp()
    skeleton, tokenizer = load_skeleton(run.model), load_tokenizer(run.model)
    names = require_llama(skeleton.config)
    kept = read_tokenizer(tokenizer, skeleton.config.vocab_size)
    numbers = sum(parameter.numel() for parameter in skeleton.parameters())
    require_room(folder, gguf_bytes(numbers, kind) + 4 * numbers)  # the merged folder lies beside it for a while
    scratch = folder / "merged"
    scratch.mkdir()
    merge_into(run, scratch, options)
    for name in (MERGE_FILE, "README.md"):
        shutil.copy(scratch / name, folder)
    name = Path(run.model.name_or_path).name
    model_file = folder / f"model-{kind}.gguf"
    write_model(scratch, model_file, kind, kept, f"{name} with a merged {run.adapter.method} adapter")
    what = f"{model_file.name}, the merged model"
    if not run.adapter.config(skeleton).routed and _write_lora(run, folder, kind, names, name, options):
        what += f"; adapter-{kind}.gguf, the LoRA alone, for a gguf file of the backbone"
    return Written(
        what=what,
        use=f"llama-cli -m {model_file.name}",
        consumer="llama.cpp",
        ours=lambda: greedy(load_plain(scratch, options)),
        theirs=lambda prompts: _open(model_file, tokenizer, prompts),
        tolerance=TOLERANCE[kind],
        facts={"type": kind, "tokenizer": kept.pre},
        scratch=scratch,
    )


def _write_lora(run: Run, folder: Path, kind: str, names: LlamaNames, name: str, options: Options) -> bool:
    """Writes the adapter where it is a plain LoRA; returns whether it is."""
    model, _ = run.load(options.device)
    if not is_plain_lora(model):
        return False
    write_adapter(model, folder / f"adapter-{kind}.gguf", kind, names, f"LoRA for {name}")
    return True


def _open(file: Path, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]) -> Writer:
    """Opens the file with llama.cpp and sees that it splits text into the same tokens.

    Raises:
        CheckFailed: it does not.
    """
    model = LlamaCpp(file)
    for ids in prompts:
        text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        ours, theirs = tokenizer(text).input_ids, model.tokens(text)
        if ours != theirs:
            problem = f"llama.cpp makes {len(theirs)} other tokens of {text[:40]!r}, where ours makes {len(ours)}"
            raise CheckFailed(problem, "nothing was kept; the tokenizer has rules that the file cannot say")
    return model.write
