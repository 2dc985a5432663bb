"""Speed of our log-likelihood scoring against lm-eval's own Hugging Face model, on the same requests, in one run.

    python benchmarks/eval_speed.py --data-dir DIR [--model smollm2-135m] [--limit 100] [--batch-size 8] [--repeats 3]

The two take turns on the same questions (ours, theirs, ours, ...), so that a busy machine slows both. Printed: seconds
of each (wall clock and processor), ours in the batches that `smore eval` makes, the ratio to the faster of HFLM's two
batch sizes (one choice a row: N, and 4 N), the largest difference between any two log-likelihoods, and how many
questions are answered alike.
"""

from __future__ import annotations

import argparse
import logging
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from smore_cli.evaluation.benchmarks import read_tasks
from smore_cli.evaluation.scoring import PrefixSharingLM
from smore_cli.models.load import load_backbone
from smore_cli.recipe.schema import ModelConfig


def main() -> None:
    args = parse_arguments()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    backbone = load_backbone(ModelConfig(name_or_path=args.model), None, None)
    requests = [
        Instance("loglikelihood", {}, (f"Question: {row['question']}\nAnswer:", f" {choice}"), i)
        for row in read_tasks(args.benchmark, args.data_dir)[0].questions[: args.limit]
        for i, choice in enumerate(row["choices"])
    ]
    scorers = {
        "smore": PrefixSharingLM(backbone.model, backbone.tokenizer),
        f"HFLM {args.batch_size}": HFLM(
            pretrained=backbone.model, tokenizer=backbone.tokenizer, batch_size=args.batch_size
        ),
        f"HFLM {4 * args.batch_size}": HFLM(
            pretrained=backbone.model, tokenizer=backbone.tokenizer, batch_size=4 * args.batch_size
        ),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in scorers}
    scores = {}
    for _ in range(args.repeats):
        for name, scorer in scorers.items():
            started = time.perf_counter(), time.process_time()
            scores[name] = [value for value, _ in scorer.loglikelihood(requests, disable_tqdm=True)]
            seconds[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    print(f"{len(requests)} choices of {args.limit} questions, medians of {args.repeats} turns")
    for clock, label in enumerate(("wall clock", "processor")):
        middle = {name: median(turn[clock] for turn in turns) for name, turns in seconds.items()}
        shown = ", ".join(f"{name} {value:.2f} s" for name, value in middle.items())
        ours, *theirs = middle.values()
        print(f"{label:10}  {shown}, ratio {min(theirs) / ours:.2f}")
    first, second, _ = scores.values()
    print(f"largest difference of a log-likelihood: {max(abs(a - b) for a, b in zip(first, second, strict=True)):.1e}")
    alike = sum(a == b for a, b in zip(picks(first, requests), picks(second, requests), strict=True))
    print(f"questions answered alike: {alike} of {len(picks(first, requests))}")


def picks(scores: list[float], requests: list[Instance]) -> list[int]:
    """Returns the likeliest choice of each question."""
    starts = [i for i, request in enumerate(requests) if request.idx == 0] + [len(requests)]
    return [max(range(a, b), key=scores.__getitem__) - a for a, b in pairwise(starts)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with arc_easy_test.jsonl")
    parser.add_argument("--model", default="smollm2-135m", help="as in a recipe's model.name_or_path")
    parser.add_argument("--benchmark", default="arc_easy", help="a task that reads local files")
    parser.add_argument("--limit", type=int, default=100, help="questions")
    parser.add_argument("--batch-size", type=int, default=8, help="HFLM's smaller batch size, in choices")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each scorer")
    return parser.parse_args()


if __name__ == "__main__":
    main()
