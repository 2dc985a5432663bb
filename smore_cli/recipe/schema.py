"""What a recipe may say, one class a section. The fields' descriptions are the documentation: `smore recipe schema`."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from smore_cli.methods import MethodConfig, available_methods, load_method

__all__ = ["DataConfig", "EvalConfig", "ModelConfig", "QuantizationConfig", "Recipe", "Source", "TrainConfig"]


def _whole(value: object) -> object:
    # pydantic compares a Literal by equality, so that true and 1.0 would pass for 1.
    if type(value) is not int:
        raise PydanticCustomError("int_type", "Input should be a whole number")
    return value


def _method_config(value: object) -> object:
    """Checks an `adapter:` section with the class of its method, whose errors keep their places."""
    if isinstance(value, str) and value in available_methods():
        written = {"section": f"adapter: {{method: {value}}}"}
        raise PydanticCustomError("bare_method", "'adapter' must be a section: write {section}", written)
    if not isinstance(value, dict):
        return value
    name, methods = value.get("method"), available_methods()
    if isinstance(name, str) and name in methods:
        return load_method(name).model_validate(value)
    if "method" not in value:
        wrong = PydanticCustomError("missing", "there is no method")
    elif not isinstance(name, str):
        wrong = PydanticCustomError("string_type", "the method is not a name")
    else:
        near = difflib.get_close_matches(name, methods, n=1)
        said = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(methods)}"
        wrong = PydanticCustomError("unknown_method", "unknown method '{name}': {said}", {"name": name, "said": said})
    details = InitErrorDetails(type=wrong, loc=("method",), input=value.get("method", value))
    raise ValidationError.from_exception_data("adapter", [details])


class Section(BaseModel):
    """A section of a recipe: unknown keys and silent conversions are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """`model:` the frozen backbone."""

    name_or_path: Annotated[
        str, Field(description="a local folder, a hub name, or a bundled model such as smollm2-135m")
    ]
    revision: Annotated[str | None, Field(description="branch, tag or commit of a hub model")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="compute type; auto is float32 on a CPU (few are faster in bfloat16), else bfloat16"),
    ] = "auto"
    attn_implementation: Annotated[
        Literal["sdpa", "eager", "flash_attention_2"] | None,
        Field(description="attention kernel; default: the model's"),
    ] = None


class QuantizationConfig(Section):
    """`quantization:` a 4-bit backbone through bitsandbytes (QLoRA)."""

    bits: Annotated[Literal[4], BeforeValidator(_whole), Field(description="bits per weight")] = 4
    type: Annotated[Literal["nf4", "fp4"], Field(description="4-bit number format")] = "nf4"
    double_quant: Annotated[bool, Field(description="quantise the quantisation constants too")] = True


class Source(Section):
    """One data source of `data.train` or `data.eval`."""

    path: Annotated[
        str, Field(description="a file (.jsonl .json .csv .parquet), a hub dataset, or the bundled set 'quickstart'")
    ]
    format: Annotated[
        Literal["multiple_choice", "prompt_completion", "chat", "alpaca", "text"],
        Field(description="how to read a row"),
    ]
    name: Annotated[str | None, Field(description="configuration of a hub dataset, as in ARC-Easy")] = None
    split: Annotated[str, Field(description="split of a hub or bundled dataset; a slice such as train[:100] works")] = (
        "train"
    )
    revision: Annotated[str | None, Field(description="branch, tag or commit of a hub dataset")] = None
    columns: Annotated[
        dict[str, str],
        Field(
            description="renames: {name the format wants: name the file has}; also {group: name of the column that "
            "holds each row's group}"
        ),
    ] = Field(default_factory=dict)
    group: Annotated[
        str | None,
        Field(description="group of all rows of this source, for methods that tell groups apart (loramoe)"),
    ] = None


class DataConfig(Section):
    """`data:` what is learned."""

    train: Annotated[list[Source], Field(description="training sources, concatenated", min_length=1)]
    eval: Annotated[list[Source], Field(description="held-out sources")] = Field(default_factory=list)
    eval_fraction: Annotated[
        float, Field(description="share of the training rows held out when data.eval is empty", ge=0, lt=1)
    ] = 0.0
    max_length: Annotated[int, Field(description="longest row in tokens; longer rows are cut on the right", ge=8)] = (
        1024
    )
    template: Annotated[
        Literal["auto", "plain", "chat"],
        Field(
            description="chat: the tokenizer's chat template; plain: 'Question: ... Answer:'; auto: chat for chat rows"
        ),
    ] = "auto"
    loss_on: Annotated[
        Literal["assistant", "last_turn", "completion", "all"],
        Field(
            description="which tokens are learned. completion: the answer (of a chat its last turn, of a text all); "
            "assistant: every assistant turn, last_turn: only the last, both for format chat; all: the prompt too"
        ),
    ] = "completion"
    objective: Annotated[
        Literal["completion", "choice_ranking"],
        Field(
            description="completion: the right answer's tokens; choice_ranking: softmax over the choices' mean "
            "log-likelihoods"
        ),
    ] = "completion"
    ranking_completion_weight: Annotated[
        float, Field(description="weight of the completion loss added to choice_ranking", ge=0)
    ] = 0.1
    on_no_supervision: Annotated[
        Literal["error", "drop"],
        Field(description="what to do with rows whose every supervised token was cut off by max_length"),
    ] = "error"


class TrainConfig(Section):
    """`train:` the optimisation."""

    learning_rate: Annotated[float, Field(description="peak learning rate", gt=0)] = 2e-4
    epochs: Annotated[float | None, Field(description="passes over the data (default 1)", gt=0)] = None
    max_steps: Annotated[int | None, Field(description="optimiser steps; instead of epochs", ge=1)] = None
    per_device_batch_size: Annotated[
        int, Field(description="rows (questions, for choice_ranking) a forward pass", ge=1)
    ] = 8
    global_batch_size: Annotated[
        int | None,
        Field(description="rows an optimiser step, over all devices and accumulation; default: no accumulation", ge=1),
    ] = None
    lr_scheduler: Annotated[Literal["constant", "linear", "cosine"], Field(description="schedule after warm-up")] = (
        "cosine"
    )
    warmup_ratio: Annotated[float, Field(description="share of the steps that warm up", ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(description="AdamW's decoupled weight decay", ge=0)] = 0.0
    adam_beta1: Annotated[float, Field(description="AdamW beta 1", ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(description="AdamW beta 2", ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(description="AdamW epsilon", gt=0)] = 1e-8
    max_grad_norm: Annotated[
        float, Field(description="gradient norm above which gradients are scaled down; 0: never", ge=0)
    ] = 1.0
    gradient_checkpointing: Annotated[bool, Field(description="recompute activations in the backward pass")] = False
    aux_statistics: Annotated[
        Literal["global_batch", "micro_batch"],
        Field(
            description="tokens a balance loss averages over. global_batch: all of a step, exact, one more forward "
            "pass when accumulating; micro_batch: each forward pass by itself, so the loss depends on the split"
        ),
    ] = "global_batch"
    gradient_census: Annotated[
        bool,
        Field(
            description="before the first step, check in two or three passes that a gradient reaches every tensor and "
            "every expert; the run is the same without"
        ),
    ] = True
    on_collapse: Annotated[
        Literal["warn", "stop"],
        Field(
            description="what to do when routers send nearly everything to the same experts, over all steps between "
            "two lines of metrics. warn: a line; stop: save a checkpoint and end with an error, where more than a "
            "tenth of the routers do and no fewer than at the line before"
        ),
    ] = "warn"
    logging_steps: Annotated[int, Field(description="steps between lines of metrics.jsonl", ge=1)] = 10
    save_steps: Annotated[int, Field(description="steps between checkpoints", ge=1)] = 500
    save_total_limit: Annotated[int | None, Field(description="how many checkpoints to keep; default: all", ge=1)] = (
        None
    )


class EvalConfig(Section):
    """`eval:` evaluation while training (loss on the held-out rows)."""

    steps: Annotated[int | None, Field(description="steps between evaluations; default: only at the end", ge=1)] = None
    batch_size: Annotated[int, Field(description="rows a forward pass", ge=1)] = 8


class Recipe(Section):
    """A whole recipe."""

    version: Annotated[Literal[1], BeforeValidator(_whole), Field(description="version of this format")]
    model: Annotated[ModelConfig, Field(description="the frozen backbone")]
    quantization: Annotated[
        QuantizationConfig | None, Field(description="a 4-bit backbone (QLoRA); default: not quantised")
    ] = None
    adapter: Annotated[
        SerializeAsAny[MethodConfig],
        BeforeValidator(_method_config),
        Field(description="what is trained: a method and its settings"),
    ]
    data: Annotated[DataConfig, Field(description="what is learned")]
    train: Annotated[TrainConfig, Field(description="the optimisation")] = TrainConfig()
    eval: Annotated[EvalConfig, Field(description="evaluation while training")] = EvalConfig()
    output_dir: Annotated[str, Field(description="the run folder")]
    seed: Annotated[int, Field(description="seeds initialisation, data order and dropout", ge=0)] = 0
