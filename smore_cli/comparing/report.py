"""A comparison as tables: in the terminal and in Markdown. `cells` says what stands in them, once for all views."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from smore_cli.comparing.summary import Row, Score, Summary

__all__ = ["LEGEND", "cells", "headers", "markdown", "tables"]

LEGEND = (
    "Scores are means over seeds and questions, in per cent; in brackets the difference to {baseline} with its 95 % "
    "interval (paired bootstrap over seeds and questions), with * where zero is outside. loss: held-out, at the end. "
    "tokens: after what share of the tokens the loss was {baseline}'s last one. step, memory: time of a step and peak "
    "memory, through {baseline}'s run of the same seed; the runs are separate, so that what else the machine did is in "
    "them. ppl: perplexity of held-out general text (what is forgotten). dividend: what routing itself earned, in "
    "nats on the held-out rows, and its share of the gain (first seed): the loss with the best update that is the same "
    "for every token, less the routed loss. lr: the learning rate; where several were tried the one with the least "
    "held-out loss (first seed), with ! where it is the least or the largest of them."
)


def headers(summary: Summary) -> list[str]:
    """Returns the names of the columns."""
    first = next(iter(summary.rows.values()))[0]
    columns = ["", "trainable", "active", *first.scores]
    columns += ["loss", "tokens"] if first.held_out is not None else []
    columns += ["step", "memory", "lr"]
    columns += ["ppl"] if summary.backbone.perplexity is not None else []
    return [*columns, *(["dividend"] if first.dividend is not None else [])]


def cells(row: Row) -> list[str]:
    """Returns what stands in a method's line."""
    found = [row.label, f"{row.trainable / 1e6:.2f} M", f"{row.active / 1e6:.2f} M"]
    found += [_score(score) for score in row.scores.values()]
    if row.held_out is not None:
        share = row.tokens_to_baseline
        found += [f"{row.held_out:.3f}", "-" if share is None else f"{100 * share:.0f} %"]
    found += [f"{row.step_ratio:.2f}", f"{row.memory_ratio:.2f}"]
    found.append(f"{row.learning_rate:.1e}" + ("!" if row.at_edge else ""))
    found += [] if row.perplexity is None else [f"{row.perplexity:.2f}"]
    if row.dividend is not None:
        share = row.dividend["share"]
        found.append(f"{row.dividend['dividend']:+.3f}" + ("" if share is None else f" ({100 * share:.1f} %)"))
    return found


def backbone_cells(summary: Summary) -> list[str]:
    """Returns the line of the backbone alone."""
    found = ["backbone", "-", "-", *(f"{100 * value:.1f}" for value in summary.backbone.scores.values())]
    rest = len(headers(summary)) - len(found)
    end = [""] * rest
    if summary.backbone.perplexity is not None:
        end[headers(summary).index("ppl") - len(found)] = f"{summary.backbone.perplexity:.2f}"
    return found + end


def lines(summary: Summary, objective: str) -> list[list[str]]:
    """Returns the table of an objective: the backbone, the baseline, the others."""
    return [backbone_cells(summary), *(cells(row) for row in summary.rows[objective])]


def tables(summary: Summary) -> list[Table]:
    """Returns a table an objective, for the terminal."""
    found = []
    for objective in summary.rows:
        table = Table(title=objective, box=None, padding=(0, 2, 0, 0), pad_edge=False, title_justify="left")
        for name in headers(summary):
            table.add_column(name, justify="left" if not name else "right")
        for line in lines(summary, objective):
            table.add_row(*line)
        found.append(table)
    return found


def markdown(summary: Summary) -> str:
    """Returns the whole comparison as Markdown."""
    questions = ", ".join(f"{task} ({n})" for task, n in summary.questions.items())
    text = [
        f"# Comparison: {summary.title}",
        "",
        f"{summary.seeds} seeds, {summary.tokens:,.0f} tokens a run; questions: {questions or 'none'}.",
    ]
    for objective in summary.rows:
        text += ["", f"## {objective}", "", _line(headers(summary)), _line(["---"] * len(headers(summary)))]
        text += [_line(line) for line in lines(summary, objective)]
    return "\n".join([*text, "", LEGEND.format(baseline=summary.baseline), ""])


def _line(columns: list[str]) -> str:
    return "| " + " | ".join(columns) + " |"


def _score(score: Score) -> str:
    value = f"{100 * score.value:.1f}"
    if score.above is None:
        return value
    above = score.above
    mark = "*" if above.sure else ""
    return f"{value} ({100 * above.value:+.1f} [{100 * above.low:+.1f}, {100 * above.high:+.1f}]{mark})"
