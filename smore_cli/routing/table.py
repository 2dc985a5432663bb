"""A routing document as a tidy table for other tools: one line an expert of each router, Parquet."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["parquet_bytes", "tidy"]

_OF_THE_ROUTER = ("module", "layer", "projection", "level", "experts", "picked", "decisions", "entropy")
_OF_THE_EXPERT = ("load", "share", "mean_gate")


def tidy(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns one mapping an expert: run, router, expert, its numbers, and those of its router beside them."""
    lines = []
    for router in document["routers"]:
        shared = {"run": document["run"], "method": document["method"]}
        shared |= {name: router[name] for name in (*_OF_THE_ROUTER, "effective_experts", "balance", "active_experts")}
        for label, found in router["information"].items():
            shared |= {f"{label}_{name}": value for name, value in found.items()}
        for expert in range(router["experts"]):
            own = {name: router[name][expert] for name in _OF_THE_EXPERT}
            lines.append({**shared, "expert": expert, **own, "dead": expert in router["dead"]})
    return lines


def parquet_bytes(document: dict[str, Any]) -> bytes:
    """Returns the table as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(tidy(document)), sink)
    return bytes(sink.getvalue())
