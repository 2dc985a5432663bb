"""`smore train` against transformers' Trainer with PEFT's LoRA: the same rows, model, optimiser and learning rate.

    python benchmarks/end_to_end.py --data FOLDER/arc_easy_train.jsonl
    python benchmarks/end_to_end.py --data FOLDER/gsm8k_train.jsonl --format prompt_completion \
        --columns prompt=question completion=answer
    python benchmarks/end_to_end.py --methods mola smore   # on the bundled rows

Every run is a process of its own, and the runs take turns. `tokens/s` counts real tokens, not padding, over the
training loop without loading; `peak RSS` is the process's largest resident memory, loading included; `loss` the mean
over the epoch's steps, which says that all learn the same. As many steps in all of them:

    smore         packed lines, head only where a token is learned
    HF, padded    rows in random order, each batch padded to its longest row: what the Trainer does by itself
    HF, flat      rows of a batch one after another in one line (DataCollatorWithFlattening): its own way to pack

PEFT's rank is the one that trains nearest to as many numbers as ours.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from common import MIB, Row, arguments, report
from subjects import equal_rank, linear_names, linear_sites, load_model, method_config

from smore_cli.data.packing import pack_rows
from smore_cli.methods import available_methods
from smore_cli.models.load import load_tokenizer
from smore_cli.nn.targets import find_targets, sites_of
from smore_cli.recipe import load_recipe
from smore_cli.recipe.schema import Recipe
from smore_cli.training.run_data import load_run_data

COLLATORS = ("padded", "flat")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.worker:
        print(json.dumps(hugging_face(load_recipe(args.recipe), args.worker, args.rows)))
        return
    with tempfile.TemporaryDirectory() as folder:
        recipes = {method: write_recipe(method, Path(folder), args) for method in args.methods}
        rows = race(recipes, args)
    title = f"End to end, {args.model}, {args.limit} rows: medians of {args.repeats} turns"
    report(title, rows, args)


def race(recipes: dict[str, Path], args: argparse.Namespace) -> list[Row]:
    """Runs all variants in turn and returns a row each."""
    found: dict[str, list[dict[str, Any]]] = {}
    for turn in range(args.repeats):
        for method, recipe in recipes.items():
            out = recipe.with_name(f"{method}-{turn}")
            found.setdefault(f"smore: {method}", []).append(ours(recipe, out))
            for collator in COLLATORS:
                name = f"HF, {collator}: LoRA for {method}"
                command = [sys.executable, __file__, "--worker", collator, "--recipe", str(recipe)]
                printed = run([*command, "--rows", str(args.rows)])
                found.setdefault(name, []).append(json.loads(printed.splitlines()[-1]))
    rows = []
    for name, results in found.items():
        row: Row = {"run": name, "trains": results[0]["trainable"], "tokens": results[0]["tokens"]}
        row |= {"steps": results[0]["steps"], "loss": mean(result["loss"] for result in results)}
        row |= {"tokens/s": median(result["tokens"] / result["seconds"] for result in results)}
        row |= {"peak RSS MiB": median(result["peak"] for result in results) / MIB}
        if name.startswith("HF"):  # what ours is to it, turn by turn
            own = found[f"smore: {name.rpartition(' ')[2]}"]
            speed = [b["seconds"] / b["tokens"] * a["tokens"] / a["seconds"] for a, b in zip(own, results, strict=True)]
            row |= {"smore's speed": median(speed)}
            row |= {"smore's RSS": median(a["peak"] / b["peak"] for a, b in zip(own, results, strict=True))}
        rows.append(row)
    return rows


def write_recipe(method: str, folder: Path, args: argparse.Namespace) -> Path:
    """Writes a recipe of one epoch with as many lines as the Trainer has batches."""
    if args.data is None:
        source: dict[str, Any] = {"path": "quickstart", "split": f"train[:{args.limit}]"}
    else:
        (folder / "rows.jsonl").write_text(
            "".join(line + "\n" for line in args.data.read_text(encoding="utf-8").splitlines()[: args.limit]),
            encoding="utf-8",
        )
        source = {"path": str(folder / "rows.jsonl")}
    source |= {"format": args.format}
    if args.columns:
        source |= {"columns": dict(pair.split("=", 1) for pair in args.columns)}
    values: dict[str, Any] = {
        "version": 1,
        "model": {"name_or_path": args.model},
        "adapter": method_config(method).model_dump(mode="json", exclude_none=True),
        "data": {"train": [source]},
        "output_dir": str(folder),
    }
    tokenizer = load_tokenizer(Recipe.model_validate(values).model)
    lengths = [row.length for row in load_run_data(Recipe.model_validate(values), tokenizer, lambda _: None).train_rows]
    values["data"] |= {"packing": True, "max_length": line_length(lengths, math.ceil(len(lengths) / args.rows))}
    values["train"] = {"learning_rate": 1e-3, "epochs": 1.0, "per_device_batch_size": 1, "lr_scheduler": "constant"}
    values["train"] |= {"gradient_census": False, "logging_steps": 10_000}  # the Trainer has no such check
    path = folder / f"{method}.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return path


def line_length(lengths: list[int], lines: int) -> int:
    """Returns the fewest tokens of a line of which rows of these lengths fill no more than so many."""
    shortest = max(math.ceil(sum(lengths) / lines), *lengths)
    fits = (n for n in count(shortest) if len(pack_rows(range(len(lengths)), lengths, n, seed=0, epoch=0)) <= lines)
    return next(fits)


def ours(recipe: Path, out: Path) -> dict[str, Any]:
    """Runs `smore train` and returns what run.json says."""
    run([sys.executable, "-m", "smore_cli", "train", str(recipe), "--output-dir", str(out)])
    values = json.loads((out / "run.json").read_text(encoding="utf-8"))
    result, memory = values["result"], values["peak_memory_bytes"]
    return {
        "trainable": values["parameters"]["trainable"], "tokens": result["tokens"], "seconds": result["seconds"],
        "steps": result["steps"], "loss": result["loss"], "peak": memory["resident"],
    }  # fmt: skip


def run(command: list[str]) -> str:
    """Runs a command and returns what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def hugging_face(recipe: Recipe, collator: str, rows_per_batch: int) -> dict[str, Any]:
    """Trains PEFT's LoRA on a recipe's rows with the Trainer, in this process."""
    import resource

    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments

    cuda = torch.cuda.is_available()
    tokenizer = load_tokenizer(recipe.model)
    data = [
        {"input_ids": row.prompt + row.branches[0], "labels": [-100] * len(row.prompt) + _labels(row)}
        for row in load_run_data(recipe, tokenizer, lambda _: None).train_rows
    ]
    device, dtype = ("cuda", "bfloat16") if cuda else ("cpu", "float32")
    model = load_model(recipe.model.name_or_path, device=device, dtype=dtype, nf4=False)
    targets = find_targets(model, recipe.adapter.target_modules, recipe.adapter.sites)
    numbers = sum(recipe.adapter.num_parameters(site) for site in sites_of(model, targets).values())
    rank = equal_rank(numbers, linear_sites(model))
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=linear_names(model)))
    with tempfile.TemporaryDirectory() as out:
        settings = TrainingArguments(
            out, per_device_train_batch_size=rows_per_batch, num_train_epochs=1, learning_rate=1e-3, bf16=cuda,
            lr_scheduler_type="constant", save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not cuda,
            dataloader_pin_memory=cuda, logging_steps=1,
        )  # fmt: skip
        padded, flat = DataCollatorForSeq2Seq(tokenizer), DataCollatorWithFlattening(return_position_ids=True)
        trainer = Trainer(model, settings, data_collator=padded if collator == "padded" else flat, train_dataset=data)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tokens": sum(len(row["input_ids"]) for row in data),
        "seconds": seconds, "steps": trainer.state.global_step,
        "loss": mean(line["loss"] for line in trainer.state.log_history if "loss" in line),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def _labels(row: Any) -> list[int]:
    return [token if learned else -100 for token, learned in zip(row.branches[0], row.supervised[0], strict=True)]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--data", type=Path, metavar="FILE", help="JSONL, of its first rows; default: bundled rows")
    parser.add_argument("--format", default="multiple_choice", help="of its rows, as in a recipe's data.train")
    parser.add_argument("--columns", nargs="*", metavar="OURS=THEIRS", help="as in a recipe's data.train")
    parser.add_argument("--model", default="smollm2-135m", help="as in a recipe's model.name_or_path")
    parser.add_argument("--methods", nargs="+", default=["mola", "smore"], choices=available_methods())
    parser.add_argument("--limit", type=int, default=160, help="training rows")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch of the Trainer")
    parser.add_argument("--worker", choices=COLLATORS, help=argparse.SUPPRESS)  # this script as one of the runs
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
