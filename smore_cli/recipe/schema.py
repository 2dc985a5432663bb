"""What a recipe may say, one class a section. The fields' descriptions are the documentation: `smore recipe schema`."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from smore_cli.methods import MethodConfig, available_methods, load_method

__all__ = [
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "ModelConfig",
    "QuantizationConfig",
    "Recipe",
    "Source",
    "TrainConfig",
]


_ONE_LINE = r"^\S(.*\S)?$"  # of a name or path: not empty, no line break, no white space around it


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
        near = difflib.get_close_matches(name.lower(), methods, n=1)
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
        str,
        Field(
            description="a local folder, a hub name, a .gguf file, or a bundled model such as smollm2-135m",
            pattern=_ONE_LINE,
        ),
    ]
    revision: Annotated[str | None, Field(description="branch, tag or commit of a hub model")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="compute type; auto is float32 on a CPU (few are faster in bfloat16), else bfloat16"),
    ] = "auto"
    attn_implementation: Annotated[
        Literal["sdpa", "eager", "flex_attention", "flash_attention_2"] | None,
        Field(description="attention kernel; default: the model's. flex_attention trains on GPUs only"),
    ] = None
    device_map: Annotated[
        Literal["auto"] | None,
        Field(
            description="auto: spread the layers over all GPUs, for a model that is too large for one; one process only"
        ),
    ] = None


class QuantizationConfig(Section):
    """`quantization:` a 4-bit (QLoRA) or 8-bit (LLM.int8) backbone through bitsandbytes."""

    bits: Annotated[Literal[4, 8], BeforeValidator(_whole), Field(description="bits per weight")] = 4
    type: Annotated[
        Literal["nf4", "fp4"] | None, Field(description="4-bit number format; default: nf4. 8 bits have only one")
    ] = None
    double_quant: Annotated[
        bool | None, Field(description="quantise the quantisation constants of 4 bits too; default: yes")
    ] = None


class Source(Section):
    """One data source of `data.train` or `data.eval`."""

    path: Annotated[
        str,
        Field(
            description="a file (.jsonl .json .csv .parquet .arrow; text also .gz), a folder of such files or one that "
            "save_to_disk wrote, a glob such as data/*.jsonl, a hub dataset, or the bundled set 'quickstart'",
            pattern=_ONE_LINE,
        ),
    ]
    format: Annotated[
        Literal["multiple_choice", "prompt_completion", "chat", "sharegpt", "alpaca", "text"],
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
    roles: Annotated[
        dict[str, Literal["user", "assistant", "system", "tool"]],
        Field(description="for chat and sharegpt, names of roles beyond the usual ones: {the file's: ours}"),
    ] = Field(default_factory=dict)
    weight: Annotated[
        float | None,
        Field(
            description="share of the rows of an epoch that come from this source, relative to the other weights; on "
            "all sources of data.train or on none (then by size)",
            gt=0,
            le=1e9,
        ),
    ] = None
    group: Annotated[
        str | None,
        Field(description="group of all rows of this source, for methods that tell groups apart (loramoe)"),
    ] = None


class DataConfig(Section):
    """`data:` what is learned."""

    train: Annotated[list[Source], Field(description="training sources, mixed by size or by weight", min_length=1)]
    eval: Annotated[list[Source], Field(description="held-out sources")] = Field(default_factory=list)
    eval_fraction: Annotated[
        float, Field(description="share of the training rows held out when data.eval is empty", ge=0, lt=1)
    ] = 0.0
    max_length: Annotated[int, Field(description="longest row in tokens; longer rows are cut on the right", ge=8)] = (
        1024
    )
    packing: Annotated[
        bool,
        Field(
            description="lay several rows in one line of at most max_length tokens, without their seeing one another; "
            "batch sizes then count lines"
        ),
    ] = False
    streaming: Annotated[
        bool,
        Field(
            description="read and tokenise rows as they are needed, for data that is not to be read as a whole: "
            ".jsonl, .csv, .parquet and hub datasets; needs train.max_steps, and data.eval for held-out rows"
        ),
    ] = False
    shuffle_buffer: Annotated[
        int,
        Field(
            description="streaming: rows of a source that wait, of which a random one is next; 1: no shuffling", ge=1
        ),
    ] = 10_000
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
            "assistant: every assistant turn, last_turn: only the last, both for chat and sharegpt; all: the prompt too"
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
        int,
        Field(
            description="rows (questions, for choice_ranking; lines of several rows, with data.packing) a forward pass",
            ge=1,
        ),
    ] = 8
    global_batch_size: Annotated[
        int | None,
        Field(
            description="rows (or lines, with data.packing) an optimiser step, over all devices and accumulation; "
            "default: no accumulation",
            ge=1,
        ),
    ] = None
    group_by_length: Annotated[
        bool, Field(description="rows of similar length share a forward pass, which saves padding; or data.packing")
    ] = False
    optim: Annotated[
        Literal["adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "adafactor"],
        Field(
            description="optimiser. adamw_bnb_8bit: AdamW's state in 8 bits; paged_*: state that moves to CPU memory "
            "when the GPU is full (on a CPU nothing is paged); adafactor: factored state, no momentum"
        ),
    ] = "adamw_torch_fused"
    loraplus_lr_ratio: Annotated[
        float | None,
        Field(description="LoRA+: how much faster the up-projections (B) learn than the rest; default: as fast", gt=0),
    ] = None
    router_learning_rate: Annotated[
        float | None, Field(description="peak learning rate of the routers; default: learning_rate", gt=0)
    ] = None
    lr_scheduler: Annotated[
        Literal["constant", "linear", "cosine", "wsd"],
        Field(description="learning rate after warm-up; wsd: stable, then a decay over the last steps (decay_ratio)"),
    ] = "cosine"
    warmup_ratio: Annotated[float, Field(description="share of the steps that warm up", ge=0, lt=1)] = 0.0
    warmup_steps: Annotated[int | None, Field(description="steps that warm up; instead of warmup_ratio", ge=0)] = None
    decay_ratio: Annotated[float, Field(description="wsd: share of the steps that decay, at the end", gt=0, le=1)] = 0.2
    decay_type: Annotated[
        Literal["linear", "cosine", "1-sqrt"], Field(description="wsd: how the learning rate decays")
    ] = "linear"
    min_lr_ratio: Annotated[
        float, Field(description="where linear, cosine and wsd end, as a share of the peak", ge=0, lt=1)
    ] = 0.0
    neftune_noise_alpha: Annotated[
        float | None,
        Field(description="NEFTune: size of the noise on the embeddings in training, usually 5; default: none", gt=0),
    ] = None
    weight_decay: Annotated[
        float, Field(description="decoupled weight decay of the adapter's matrices (not of routers and biases)", ge=0)
    ] = 0.0
    adam_beta1: Annotated[float, Field(description="AdamW beta 1", ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(description="AdamW beta 2", ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(description="AdamW epsilon", gt=0)] = 1e-8
    max_grad_norm: Annotated[
        float, Field(description="gradient norm above which gradients are scaled down; 0: never", ge=0)
    ] = 1.0
    dataloader_num_workers: Annotated[
        int,
        Field(
            description="processes that make the next batches while a step runs (and tokenise, with data.streaming); "
            "0: none, each batch is made when its step begins; the run is the same",
            ge=0,
            le=256,
        ),
    ] = 0
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
    """`eval:` evaluation while training: loss on the held-out rows, and benchmarks."""

    steps: Annotated[int | None, Field(description="steps between evaluations; default: only at the end", ge=1)] = None
    batch_size: Annotated[int, Field(description="rows a forward pass", ge=1)] = 8
    metric_for_best_model: Annotated[
        Literal["eval_loss", "eval_accuracy", "loss", "aux_loss", "grad_norm"],
        Field(
            description="number of metrics.jsonl that says which checkpoint is the best, asked at every evaluation; "
            "eval_accuracy is there for choice_ranking, loss, aux_loss and grad_norm are of training"
        ),
    ] = "eval_loss"
    greater_is_better: Annotated[
        bool | None, Field(description="whether more of it is better; default: true for an accuracy, else false")
    ] = None
    early_stopping_patience: Annotated[
        int | None,
        Field(description="evaluations in a row without improvement after which the run ends; default: never", ge=1),
    ] = None
    early_stopping_threshold: Annotated[
        float, Field(description="what an improvement must exceed to count for early_stopping_patience", ge=0)
    ] = 0.0
    benchmarks: Annotated[
        list[str],
        Field(
            description="benchmarks to score at every evaluation, as --benchmark of smore eval names them; their "
            "numbers go into metrics.jsonl"
        ),
    ] = Field(default_factory=list)
    benchmark_data_dir: Annotated[
        str | None, Field(description="folder with the questions as files; default: each benchmark's own source")
    ] = None
    benchmark_limit: Annotated[
        int | None, Field(description="the first so many questions of each task; default: all", ge=1)
    ] = None
    load_best_model_at_end: Annotated[
        bool, Field(description="the adapter that comes out is the best checkpoint's instead of the last step's")
    ] = False


class LogConfig(Section):
    """`log:` where metrics go beside metrics.jsonl."""

    report_to: Annotated[
        list[Literal["tensorboard", "wandb", "mlflow"]], Field(description="trackers, through accelerate")
    ] = Field(default_factory=list)
    project: Annotated[str, Field(description="project (wandb), experiment (mlflow)", min_length=1)] = "smore"
    run_name: Annotated[
        str | None, Field(description="name of the run (wandb, mlflow); default: the run folder's", min_length=1)
    ] = None


class Recipe(Section):
    """A whole recipe."""

    version: Annotated[Literal[1], BeforeValidator(_whole), Field(description="version of this format")]
    model: Annotated[ModelConfig, Field(description="the frozen backbone")]
    quantization: Annotated[
        QuantizationConfig | None, Field(description="a backbone in 4 or 8 bits; default: not quantised")
    ] = None
    adapter: Annotated[
        SerializeAsAny[MethodConfig],
        BeforeValidator(_method_config),
        Field(description="what is trained: a method and its settings"),
    ]
    data: Annotated[DataConfig, Field(description="what is learned")]
    train: Annotated[TrainConfig, Field(description="the optimisation")] = TrainConfig()
    eval: Annotated[EvalConfig, Field(description="evaluation while training")] = EvalConfig()
    log: Annotated[LogConfig, Field(description="where metrics go beside metrics.jsonl")] = LogConfig()
    output_dir: Annotated[str, Field(description="the run folder", pattern=_ONE_LINE)]
    seed: Annotated[int, Field(description="seeds initialisation, data order and dropout", ge=0, lt=2**31)] = 0
