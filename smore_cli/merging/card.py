"""The README.md of a merged model: what was merged, how, and what was measured. No number that was not."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smore_cli.merging.merge import Merged

__all__ = ["card"]


def card(merged: Merged, *, peft: bool = False) -> str:
    """Returns the card as Markdown."""
    what = "PEFT LoRA adapter" if peft else "model"
    lines = [
        "---",
        f"base_model: {merged.backbone}",
        f"library_name: {'peft' if peft else 'transformers'}",
        "---",
        "",
        f"# {merged.backbone} with a {merged.adapter} adapter, as a plain {what}",
        "",
        f"- adapter: {merged.run}",
        f"- method: {merged.how}",
        f"- weights: {merged.dtype}, from {merged.weights}",
        f"- {merged.difference.tokens:,} tokens compared: mean KL {merged.difference.mean_kl:.2e} nats, "
        f"same first choice {100 * merged.difference.top1_agreement:.2f} %",
        "",
        f"Loss on {merged.verdict.role}:",
        "",
        "| source | backbone | adapter | this | gain kept |",
        "|---|---|---|---|---|",
    ]
    for source in merged.verdict.sources:
        kept = "-" if source.gain_kept is None else f"{100 * source.gain_kept:.1f} %"
        lines.append(f"| {source.origin} | {source.base:.4f} | {source.routed:.4f} | {source.merged:.4f} | {kept} |")
    if merged.benchmarks:
        lines += ["", "| benchmark | n | backbone | adapter | this |", "|---|---|---|---|---|"]
        for b in merged.benchmarks:
            lines.append(f"| {b['task']} | {b['n']} | {b['base']:.3f} | {b['routed']:.3f} | {b['merged']:.3f} |")
    return "\n".join([*lines, ""])
