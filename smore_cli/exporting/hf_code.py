"""`--to hf-code`: the routed model as it is, in a folder with the code that it needs (`trust_remote_code`)."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

from smore_cli.errors import UsageError
from smore_cli.exporting.compare import Step, Writer, greedy
from smore_cli.exporting.formats import Options, Written
from smore_cli.exporting.self_contained import ADAPTER_SETTINGS, ADAPTER_WEIGHTS
from smore_cli.exporting.source import load_dense
from smore_cli.exporting.sources import flat_name, flat_sources
from smore_cli.kernels import unused
from smore_cli.merging.writing import require_room, write_model
from smore_cli.models.adapter_files import WEIGHTS_FILE
from smore_cli.models.load import load_skeleton
from smore_cli.nn import detach

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from smore_cli.methods import MethodConfig
    from smore_cli.models.runs import Run

__all__ = ["write_hf_code"]

_MIXIN = "smore_cli.exporting.self_contained"
_MODELING = '''\
"""{title}, on {base}, with the code that it needs; written by smore."""

from transformers import {base}

from .{mixin} import SelfContained
from .{method} import {settings}
from .configuration_smore import SmoreConfig


class SmoreForCausalLM(SelfContained, {base}):
    """{base} with its adapter."""

    config_class = SmoreConfig
    settings_class = {settings}
'''
_CONFIGURATION = '''\
"""The settings of {base} under a name of their own: without the code beside them nothing loads."""

from transformers import {base}


class SmoreConfig({base}):
    """As {base}."""

    model_type = "{kind}"
'''


def write_hf_code(run: Run, folder: Path, options: Options) -> Written:
    """Writes backbone, adapter and code.

    Raises:
        UsageError: the adapter has an exact form without code, or needs a second model.
    """
    config = _require_portable(run)
    model, tokenizer = load_dense(run, options.device)
    require_room(folder, sum(parameter.nbytes for parameter in model.parameters()))
    detach(model)
    base, kind = type(model).__name__, model.config.model_type
    write_model(model, tokenizer, folder, model.dtype, "4GB")
    code = flat_sources([_MIXIN, type(config).__module__])
    # Classes are registered in a process by this name, and two exports with other code must not be taken for another.
    name = f"smore_{config.method}_{kind}_{hashlib.sha256(''.join(code.values()).encode()).hexdigest()[:8]}"
    _name_the_code(folder, name)
    settings = config.model_dump(mode="json")
    (folder / ADAPTER_SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(run.adapter.folder / WEIGHTS_FILE, folder / ADAPTER_WEIGHTS)
    for file, text in (code | _entry(config, model, name)).items():
        (folder / file).write_text(text, encoding="utf-8")
    return Written(
        what=f"{base} with its {config.method} adapter as it is, and the code it needs",
        use="from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=True)',
        consumer="transformers with the folder's own code",
        ours=lambda: _without_kernels(greedy(load_dense(run, options.device)[0])),
        theirs=lambda _: _open(folder, options),
        tolerance=0.0,
        facts={"base_class": base, "dtype": str(model.dtype).removeprefix("torch.")},
    )


def _require_portable(run: Run) -> MethodConfig:
    config = run.adapter.config(load_skeleton(run.model))
    if not config.routed:
        raise UsageError(f"a {config.method} adapter needs no code of its own", "--to hf is exact, and so is --to peft")
    if (embedder := getattr(config, "embedder", "backbone")) != "backbone" and getattr(config, "prior", "") != "none":
        problem = f"the prior of this adapter reads prompts with {embedder}, a second model that the folder cannot hold"
        raise UsageError(problem, "keep it as an adapter, or train with embedder: backbone")
    return config


def _name_the_code(folder: Path, name: str) -> None:
    """Tells config.json which classes load the folder."""
    path = folder / "config.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    values |= {
        "architectures": ["SmoreForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_smore.SmoreConfig",
            "AutoModelForCausalLM": "modeling_smore.SmoreForCausalLM",
        },
        "model_type": name,
    }
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _entry(config: MethodConfig, model: PreTrainedModel, kind: str) -> dict[str, str]:
    """Returns the two files that transformers asks for, by name."""
    names = {
        "title": type(config).title,
        "base": type(model).__name__,
        "mixin": flat_name(_MIXIN),
        "method": flat_name(type(config).__module__),
        "settings": type(config).__name__,
    }
    return {
        "modeling_smore.py": _MODELING.format(**names),
        "configuration_smore.py": _CONFIGURATION.format(base=type(model.config).__name__, kind=kind),
    }


def _without_kernels(writer: Writer) -> Writer:
    """Returns a writer that computes as the folder's code does, which is PyTorch alone: equal to the last bit."""

    def write(prompt: Sequence[int], new_tokens: int) -> list[Step]:
        with unused():
            return writer(prompt, new_tokens)

    return write


def _open(folder: Path, options: Options) -> Writer:
    from transformers import AutoModelForCausalLM

    from smore_cli.models.device import default_device
    from smore_cli.models.quiet import quiet

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=True,  # it was written here, a moment ago
            dtype="auto",
            device_map={"": options.device or default_device()},
        )
    return greedy(model)
