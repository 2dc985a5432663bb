"""Asking llama.cpp, through the package `xllamacpp`: a development dependency, which nothing but --verify needs."""

from __future__ import annotations

import importlib.util
import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from smore_cli.errors import SmoreError, UsageError
from smore_cli.exporting.compare import Step
from smore_cli.models.source import one_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["LlamaCpp", "require_llama_cpp"]

_ASKED = 64  # most probable tokens that each step is asked for
_SECONDS = 600


def require_llama_cpp() -> None:
    """Refuses a check that cannot be made, before anything is written.

    Raises:
        UsageError: xllamacpp is not installed.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise UsageError("--verify of a gguf file runs it with llama.cpp, which is not here", "pip install xllamacpp")


class LlamaCpp:
    """A GGUF file, opened; it is closed with the object.

    Args:
        model: the file.
        adapter: a LoRA to add to it.
        context: most tokens of a text.
    """

    def __init__(self, model: Path, adapter: Path | None = None, context: int = 256) -> None:
        import xllamacpp

        settings: Any = xllamacpp.CommonParams()
        settings.model.path = str(model)
        settings.n_ctx, settings.n_parallel, settings.port = context, 1, 0
        settings.cpuparams.n_threads = 1
        settings.warmup, settings.verbosity, settings.fit_params = False, -1, False
        settings.n_gpu_layers = 0
        # Its defaults compute attention in half precision, which would be taken for an error of the file.
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        if adapter is not None:
            settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(settings)

    def tokens(self, text: str) -> list[int]:
        """Returns what llama.cpp's tokenizer makes of a text, special tokens in it included."""
        found: list[int] = self._ask("tokenize", {"content": text, "add_special": True, "parse_special": True})[
            "tokens"
        ]
        return found

    def write(self, prompt: Sequence[int], new_tokens: int) -> list[Step]:
        """Continues token ids greedily."""
        asked = {"prompt": list(prompt), "n_predict": new_tokens, "n_probs": _ASKED, "return_tokens": True}
        answer = self._ask("completion", {**asked, "temperature": 0, "cache_prompt": False})
        known = list(answer["completion_probabilities"])
        steps = []
        for token in answer["tokens"]:
            if known and known[0]["id"] == token:
                steps.append(Step(token, {one["id"]: one["logprob"] for one in known.pop(0)["top_logprobs"]}))
            else:  # of a token that ends inside a character llama.cpp tells no probabilities
                steps.append(Step(token, {}))
        return steps

    def _ask(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(f"{self._server.listening_address}/{route}", data=json.dumps(body).encode())
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it listens on this machine alone
        try:
            with direct.open(request, timeout=_SECONDS) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise SmoreError(f"llama.cpp refuses: {one_line(ValueError(error.read().decode()))}") from error
        return found
