"""The README.md of a run: what was trained, on what, and what was measured. No number that was not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smore_cli.recipe.schema import Recipe

__all__ = ["model_card"]


def model_card(recipe: Recipe, recipe_yaml: str, run: dict[str, Any]) -> str:
    """Returns the card as Markdown.

    Args:
        recipe: what was run.
        recipe_yaml: the resolved recipe, shown whole.
        run: the values of run.json.
    """
    base = recipe.model.name_or_path
    parameters, result, data = run["parameters"], run["result"], run["data"]
    rows = "training rows from a stream" if data["train_rows"] is None else f"{data['train_rows']:,} training rows"
    share = 100 * parameters["trainable"] / parameters["total"]
    lines = [
        "---",
        f"base_model: {base}",
        "library_name: smore-cli",
        f"tags: [{recipe.adapter.method}, mixture-of-lora-experts]" if recipe.adapter.routed else "tags: [lora]",
        "---",
        "",
        f"# {recipe.adapter.title.split(':')[0]} adapter for {base}",
        "",
        f"- method: {recipe.adapter.title} ({recipe.adapter.paper})",
        f"- trainable parameters: {parameters['trainable']:,} ({share:.2f} % of {parameters['total']:,})",
        f"- data: {rows}, {data['eval_rows']:,} held out; "
        f"{result['supervised_tokens']:,} supervised of {result['tokens']:,} tokens seen",
        f"- steps: {result['steps']:,} ({result['epochs']:.2f} epochs), seed {recipe.seed}",
        f"- last training loss: {result['loss']:.4f}",
    ]
    if "adapter_step" in result:
        lines.append(f"- adapter: that of step {result['adapter_step']:,}, the best by {result['best']['metric']}")
    if "eval_loss" in result:
        lines.append(f"- held-out loss: {result['eval_loss']:.4f}")
    if "eval_accuracy" in result:
        lines.append(f"- held-out choice accuracy: {result['eval_accuracy']:.3f}")
    lines += [
        f"- time in steps: {result['seconds']:.0f} s on {run['environment']['device']}; "
        f"peak memory {run['peak_memory_bytes']['resident'] / 2**30:.2f} GiB",
        "",
        "## Use",
        "",
        "```console",
        "smore eval THIS_FOLDER --benchmark arc --base",
        "```",
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe_yaml.rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)
