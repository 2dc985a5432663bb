"""The names other tools use, and what the same thing is called in a recipe."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FOREIGN_NAMES", "Foreign"]


class Foreign(NamedTuple):
    """A name of another tool.

    Attributes:
        whose: whose name it is, as in "axolotl's".
        here: the dotted key that says it here (`data.train.x` for key x of a source); empty where no single key does.
        note: what else there is to know, or what to do where `here` is empty.
    """

    whose: str
    here: str = ""
    note: str = ""


_AXOLOTL, _FACTORY, _HF, _PEFT, _TRL = "axolotl's", "LLaMA-Factory's", "transformers.Trainer's", "PEFT's", "TRL's"
_GLOBAL = "the rows of one optimiser step over all devices; accumulation follows from it"
_FOUR_BIT = "write the section quantization: {bits: 4}"
_DTYPE = "write dtype: bfloat16 in model"
_LAUNCHER = "several devices are set up through accelerate's own configuration"

FOREIGN_NAMES: dict[str, Foreign] = {
    # model
    "base_model": Foreign(_AXOLOTL, "model.name_or_path"),
    "model_name_or_path": Foreign(f"{_FACTORY} and {_TRL}", "model.name_or_path"),
    "base_model_name_or_path": Foreign(_PEFT, "model.name_or_path"),
    "pretrained_model_name_or_path": Foreign("transformers'", "model.name_or_path"),
    "model_name": Foreign("unsloth's", "model.name_or_path"),
    "model_revision": Foreign(_TRL, "model.revision"),
    "torch_dtype": Foreign("transformers 4's", "model.dtype"),
    "bf16": Foreign(f"{_HF} and {_AXOLOTL}", "", _DTYPE),
    "fp16": Foreign(f"{_HF} and {_AXOLOTL}", "", f"float16 is not offered; {_DTYPE}"),
    "flash_attention": Foreign(_AXOLOTL, "model.attn_implementation", "with flash_attention_2"),
    "flash_attn": Foreign(_FACTORY, "model.attn_implementation", "with flash_attention_2"),
    "trust_remote_code": Foreign(_HF, "", "models that bring their own code are not supported"),
    "special_tokens": Foreign(_AXOLOTL, "", "the tokenizer's own special tokens are used"),
    # quantization
    "load_in_4bit": Foreign(f"{_AXOLOTL} and transformers'", "", _FOUR_BIT),
    "load_in_8bit": Foreign(f"{_AXOLOTL} and transformers'", "", "write the section quantization: {bits: 8}"),
    "quantization_bit": Foreign(_FACTORY, "quantization.bits"),
    "bnb_4bit_quant_type": Foreign("transformers'", "quantization.type"),
    "bnb_4bit_use_double_quant": Foreign("transformers'", "quantization.double_quant"),
    "double_quantization": Foreign(_FACTORY, "quantization.double_quant"),
    # adapter
    "peft_type": Foreign(_PEFT, "adapter.method"),
    "finetuning_type": Foreign(_FACTORY, "adapter.method"),
    "r": Foreign(_PEFT, "adapter.rank"),
    "lora_r": Foreign(_AXOLOTL, "adapter.rank"),
    "lora_rank": Foreign(_FACTORY, "adapter.rank"),
    "lora_alpha": Foreign(f"{_PEFT} and {_AXOLOTL}", "adapter.alpha"),
    "lora_dropout": Foreign(f"{_PEFT} and {_AXOLOTL}", "adapter.dropout"),
    "lora_target": Foreign(_FACTORY, "adapter.target_modules"),
    "lora_target_modules": Foreign(_AXOLOTL, "adapter.target_modules"),
    "lora_modules_to_save": Foreign(_AXOLOTL, "adapter.modules_to_save"),
    "additional_target": Foreign(_FACTORY, "adapter.modules_to_save"),
    "lora_target_linear": Foreign(_AXOLOTL, "adapter.target_modules", "with all-linear"),
    "peft_use_dora": Foreign(_AXOLOTL, "adapter.use_dora"),
    "peft_use_rslora": Foreign(_AXOLOTL, "adapter.use_rslora"),
    "bias": Foreign(_PEFT, "", "the backbone's biases stay as they are"),
    "task_type": Foreign(_PEFT, "", "every model here is a causal language model"),
    "layers_to_transform": Foreign(_PEFT, "adapter.target_modules", "with full paths, which name single layers"),
    "num_experts_per_tok": Foreign("transformers'", "adapter.top_k"),
    "num_local_experts": Foreign("transformers'", "adapter.num_experts"),
    # data
    "dataset": Foreign(_FACTORY, "data.train", "a list of {path, format} entries"),
    "datasets": Foreign(_AXOLOTL, "data.train", "a list of {path, format} entries"),
    "dataset_name": Foreign(_TRL, "data.train", "a list of {path, format} entries"),
    "test_datasets": Foreign(_AXOLOTL, "data.eval", "a list of {path, format} entries"),
    "eval_dataset": Foreign(_FACTORY, "data.eval", "a list of {path, format} entries"),
    "type": Foreign(_AXOLOTL, "data.train.format"),
    "ds_type": Foreign(_AXOLOTL, "", "the ending of path tells the file's type"),
    "data_files": Foreign("datasets'", "data.train.path"),
    "config_name": Foreign("datasets'", "data.train.name"),
    "dataset_config": Foreign(_TRL, "data.train.name"),
    "column_mapping": Foreign("AutoTrain's", "data.train.columns"),
    "val_set_size": Foreign(_AXOLOTL, "data.eval_fraction", "a share of the training rows, as in 0.02"),
    "val_size": Foreign(_FACTORY, "data.eval_fraction", "a share of the training rows, as in 0.02"),
    "sequence_len": Foreign(_AXOLOTL, "data.max_length"),
    "cutoff_len": Foreign(_FACTORY, "data.max_length"),
    "max_seq_length": Foreign(f"{_TRL} and unsloth's", "data.max_length"),
    "max_seq_len": Foreign("torchtune's", "data.max_length"),
    "model_max_length": Foreign("transformers'", "data.max_length"),
    "chat_template": Foreign(_AXOLOTL, "data.template", "one of auto, plain, chat"),
    "sample_packing": Foreign(_AXOLOTL, "data.packing"),
    "neat_packing": Foreign(_FACTORY, "data.packing"),
    "max_samples": Foreign(_FACTORY, "", "write a slice in the source, as in split: train[:1000]"),
    "field_messages": Foreign(_AXOLOTL, "data.train.columns", "as in {messages: conversation}"),
    "field": Foreign(_AXOLOTL, "data.train.columns", "as in {text: body}"),
    "roles_to_train": Foreign(_AXOLOTL, "data.loss_on", "assistant or last_turn"),
    "num_proc": Foreign("datasets'", "", "there is nothing to set: tokenised rows are kept for later runs"),
    "dataset_num_proc": Foreign(_TRL, "", "there is nothing to set: tokenised rows are kept for later runs"),
    "preprocessing_num_workers": Foreign(_FACTORY, "", "there is nothing to set: tokenised rows are kept"),
    "train_on_inputs": Foreign(_AXOLOTL, "data.loss_on", "all, or completion to leave the prompt out"),
    "train_on_prompt": Foreign(_FACTORY, "data.loss_on", "all, or completion to leave the prompt out"),
    "completion_only_loss": Foreign(_TRL, "data.loss_on", "completion or all"),
    "assistant_only_loss": Foreign(_TRL, "data.loss_on", "assistant"),
    # train
    "lr": Foreign("a short", "train.learning_rate"),
    "num_epochs": Foreign(_AXOLOTL, "train.epochs"),
    "num_train_epochs": Foreign(_HF, "train.epochs"),
    "max_train_steps": Foreign("accelerate's", "train.max_steps"),
    "steps": Foreign("a short", "train.max_steps"),
    "batch_size": Foreign("torchtune's", "train.per_device_batch_size"),
    "micro_batch_size": Foreign(_AXOLOTL, "train.per_device_batch_size"),
    "per_device_train_batch_size": Foreign(_HF, "train.per_device_batch_size"),
    "per_device_eval_batch_size": Foreign(_HF, "eval.batch_size"),
    "eval_batch_size": Foreign(_AXOLOTL, "eval.batch_size"),
    "gradient_accumulation_steps": Foreign(f"{_HF} and {_AXOLOTL}", "train.global_batch_size", _GLOBAL),
    "lr_scheduler_type": Foreign(_HF, "train.lr_scheduler"),
    "cosine_min_lr_ratio": Foreign(_AXOLOTL, "train.min_lr_ratio"),
    "num_decay_steps": Foreign("transformers'", "train.decay_ratio", "a share of the steps"),
    "optimizer": Foreign(_AXOLOTL, "train.optim"),
    "loraplus_ratio": Foreign("a short", "train.loraplus_lr_ratio"),
    "beta1": Foreign("a short", "train.adam_beta1"),
    "beta2": Foreign("a short", "train.adam_beta2"),
    "eps": Foreign("torch's", "train.adam_epsilon"),
    "gradient_clipping": Foreign("DeepSpeed's", "train.max_grad_norm"),
    "activation_checkpointing": Foreign("transformers 5's", "train.gradient_checkpointing"),
    "gradient_checkpointing_kwargs": Foreign(_HF, "", "checkpointing is always the non-reentrant kind"),
    "eval_steps": Foreign(_HF, "eval.steps"),
    "evals_per_epoch": Foreign(_AXOLOTL, "eval.steps", "steps between evaluations"),
    "eval_strategy": Foreign(_HF, "eval.steps", "steps between evaluations"),
    "evaluation_strategy": Foreign(_HF, "eval.steps", "steps between evaluations"),
    "save_strategy": Foreign(_HF, "train.save_steps", "steps between checkpoints"),
    "saves_per_epoch": Foreign(_AXOLOTL, "train.save_steps", "steps between checkpoints"),
    "deepspeed": Foreign(f"{_HF} and {_AXOLOTL}", "", _LAUNCHER),
    "fsdp": Foreign(f"{_HF} and {_AXOLOTL}", "", _LAUNCHER),
    "fsdp_config": Foreign(f"{_HF} and {_AXOLOTL}", "", _LAUNCHER),
    # log
    "wandb_project": Foreign(_AXOLOTL, "log.project"),
    "wandb_name": Foreign(_AXOLOTL, "log.run_name"),
    "mlflow_experiment_name": Foreign(_AXOLOTL, "log.project"),
    "mlflow_run_name": Foreign(_AXOLOTL, "log.run_name"),
    "use_tensorboard": Foreign(_AXOLOTL, "log.report_to", "[tensorboard]"),
    # whole recipe
    "out_dir": Foreign("litgpt's", "output_dir"),
    "stage": Foreign(_FACTORY, "", "`smore train` fine-tunes with supervision; there is no other stage"),
    "push_to_hub": Foreign(_HF, "", "nothing is uploaded: the run folder holds the adapter"),
    "hub_model_id": Foreign(_HF, "", "nothing is uploaded: the run folder holds the adapter"),
    "resume_from_checkpoint": Foreign(_HF, "", "resume with `smore train RECIPE --resume`"),
}
