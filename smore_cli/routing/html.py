"""One HTML page of a routing document: no network, no server, no file beside it.

    document --compact--> JSON inside the page --a few hundred lines of script, inside too--> tables one can hover

Everything that comes from data is put in by text nodes in the browser, or escaped here; a policy inside the page
forbids it to load anything, so what the page shows stays with whoever opens it.
"""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["TRACE_BYTES", "render_page"]

DIGITS = 4
"""Significant digits of the numbers in the page; the JSON document has all of them."""
TRACE_BYTES = 750_000
"""The most gates of a trace that the page holds, a byte each; the page says where a text was longer."""
STEPS = 127
"""Gates of a trace are whole numbers from -127 to 127, times a scale of the router's."""
_SCRIPTS = ("base.js", "experts.js", "trace.js", "tree.js", "facts.js", "worth.js", "main.js")


def render_page(document: dict[str, Any]) -> str:
    """Returns the page of a document of `smore inspect-routing --json`."""
    environment = Environment(
        loader=PackageLoader("smore_cli.routing", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        document=document,
        style=_part("page.css"),
        script="\n".join(_part(name) for name in _SCRIPTS),
        data=_inside_a_script(_compact(document)),
    )


def _part(name: str) -> str:
    return (files("smore_cli.routing") / "page" / name).read_text("utf-8")


def _inside_a_script(value: Any) -> str:
    """Returns a value as JSON that no text in it can end: `<` begins both `</script>` and `<!--`."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _compact(document: dict[str, Any]) -> dict[str, Any]:
    """Returns a document with rounded numbers, and a trace's gates as bytes."""
    compact: dict[str, Any] = _rounded({key: value for key, value in document.items() if key != "trace"})
    if "trace" in document:
        experts = {(router["module"], router["level"]): router["experts"] for router in document["routers"]}
        compact["trace"] = _compact_trace(document["trace"], experts)
    return compact


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _compact_trace(trace: dict[str, Any], experts: dict[tuple[str, int], int]) -> dict[str, Any]:
    """Returns the first tokens of a trace, each router's gates (tokens, experts), mean over parents, as base64."""
    per_token = sum(experts[router["module"], router["level"]] for router in trace["routers"])
    kept = min(len(trace["tokens"]), max(TRACE_BYTES // max(per_token, 1), 1))
    routers = []
    for router in trace["routers"]:
        count = experts[router["module"], router["level"]]
        scale, gates = _as_bytes([_mean_gates(token, count) for token in router["picks"][:kept]])
        routers.append({**router, "picks": None, "experts": count, "scale": scale, "gates": gates})
    return {
        **trace,
        "ids": None,
        "all_tokens": len(trace["tokens"]),
        "tokens": trace["tokens"][:kept],
        "routers": routers,
    }


def _mean_gates(parents: Sequence[Sequence[tuple[int, float]]], experts: int) -> list[float]:
    gates = [0.0] * experts
    for picks in parents:
        for expert, weight in picks:
            gates[expert] += weight / len(parents)
    return gates


def _as_bytes(gates: Sequence[Sequence[float]]) -> tuple[float, str]:
    """Returns the scale and the steps of gates; one that is not 0 is no 0 there either: it tells a pick."""
    scale = max((abs(gate) for token in gates for gate in token), default=0.0) / STEPS or 1.0
    steps = [round(gate / scale) or (gate > 0) - (gate < 0) for token in gates for gate in token]
    return float(f"{scale:.6g}"), base64.b64encode(bytes(step % 256 for step in steps)).decode()
