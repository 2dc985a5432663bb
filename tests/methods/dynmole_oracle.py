"""DynMoLE written out from its equations: one token, one expert at a time, in Python's own numbers."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.methods.dynmole import DynMoLEConfig
    from smore_cli.nn.bank import Bank


def entropy_by_loops(p: list[float], c: DynMoLEConfig, normalised: bool) -> float:
    powers, s = 0.0, len(p)
    for x in p:
        powers += (x + c.eps) * math.log(x + c.eps) if c.q == 1 else (x + c.eps) ** c.q
    if c.q == 1:
        value, largest = -powers, math.log(s)
    elif c.entropy == "tsallis":
        value, largest = (1 - powers) / (c.q - 1), (1 - s ** (1 - c.q)) / (c.q - 1)
    else:
        value, largest = math.log(powers) / (1 - c.q), math.log(s)
    return value / largest if normalised else value


def route_by_loops(p: list[float], c: DynMoLEConfig) -> tuple[set[int], list[float]]:
    """Returns the experts of one token and the weights of all."""
    s = len(p)
    order = sorted(range(s), key=lambda e: -p[e])
    kept, mass = 0, 0.0
    for e in order:
        if (mass if c.crossing else mass + p[e]) > c.top_p:
            break
        mass += p[e]
        kept += 1
    picked = set(order[: max(kept, c.top_k)])
    largest = (
        1.0
        if c.threshold_on == "normalised"
        else entropy_by_loops([1 / s] * s, c.model_copy(update={"eps": 0.0}), False)
    )
    if c.threshold < largest and entropy_by_loops(p, c, c.threshold_on == "normalised") > c.threshold:
        picked = set(range(s))
    total = sum(p[e] for e in picked) if c.renormalise else 1.0
    return picked, [p[e] / total if e in picked else 0.0 for e in range(s)]


def probabilities_of(bank: Bank, x: Tensor) -> list[list[float]]:
    result = []
    for row in x:
        logits = [torch.dot(weight, row).item() for weight in bank.router.weight]
        exponents = [math.exp(z - max(logits)) for z in logits]
        result.append([e / sum(exponents) for e in exponents])
    return result


def update_by_loops(bank: Bank, x: Tensor, c: DynMoLEConfig) -> tuple[Tensor, list[set[int]]]:
    r, update, picks = c.rank, torch.zeros(len(x), len(bank.B), dtype=torch.float64), []
    for t, p in enumerate(probabilities_of(bank, x)):
        picked, weights = route_by_loops(p, c)
        picks.append(picked)
        for e in range(c.num_experts):
            A, B = bank.A[e * r : (e + 1) * r], bank.B[:, e * r : (e + 1) * r]
            update[t] += weights[e] * c.alpha / r * (B @ (A @ x[t]))
    return update, picks


def losses_by_loops(banks: list[Bank], x: Tensor, c: DynMoLEConfig, mask: Tensor) -> tuple[float, float]:
    """Returns the entropy term and the balance term."""
    s = c.num_experts
    routers = [[(p, *route_by_loops(p, c)) for p in probabilities_of(bank, x)] for bank in banks]
    on = mask.flatten().tolist()
    counted = [
        routed for router in routers for routed, m in zip(router, on, strict=True) if m or c.entropy_over_padding
    ]
    entropy = sum(entropy_by_loops(p, c, True) for p, _, _ in counted) / len(counted)
    real = [[routed for routed, m in zip(router, on, strict=True) if m] for router in routers]
    groups = [list(itertools.chain(*real))] if c.balance == "pooled" else real
    balances = []
    for group in groups:
        total = 0.0
        for e in range(s):
            if c.balance_fractions == "soft":
                F = sum(weights[e] for _, _, weights in group) / len(group)
            else:
                F = sum(sum(x > p[e] for x in p) < c.top_k for p, _, _ in group) / len(group)
            total += F * sum(p[e] for p, _, _ in group) / len(group)
        balances.append(s * total)
    return c.entropy_loss_coefficient * entropy, c.aux_loss_coefficient * sum(balances) / len(balances)
