"""Cosines of experts' updates against the dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smore_cli.methods import config_from_dict
from smore_cli.methods.mola import MoLAConfig
from smore_cli.nn.targets import Site
from smore_cli.routing.similarity import expert_similarity

SITE = Site("map", 12, 10)


def _filled(config: Any) -> Any:
    adapter = config.build(SITE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapter


def test_a_block_bank_has_the_cosines_of_its_experts_matrices() -> None:
    adapter = _filled(MoLAConfig(method="mola", num_experts=3, rank=2))
    with torch.no_grad():
        dense = []
        down, (up, _) = adapter.down(), adapter.up()
        rows = torch.cat(down.rows)
        for expert in range(3):
            part = slice(2 * expert, 2 * expert + 2)
            dense.append((up[:, part] @ rows[part]).flatten())
        expected = torch.nn.functional.cosine_similarity(torch.stack(dense)[:, None], torch.stack(dense)[None], dim=-1)
    found = expert_similarity(adapter)
    assert found is not None
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "smore", "rank": [2, 2], "num_experts": [3, 4], "fanout": [2, 2], "router_dim": 4, "key_dim": 4},
        {"method": "trex", "num_down": 2, "num_up": 3, "prior": "none"},
        {"method": "dynmole", "num_experts": 3, "rank": 2},
        {"method": "hydralora", "num_experts": 3, "rank": 2},
    ],
    ids=lambda settings: str(settings["method"]),
)
def test_every_shape_of_bank_has_symmetric_cosines(settings: dict[str, Any]) -> None:
    adapter = _filled(config_from_dict(settings))
    for level in range(2 if settings["method"] == "smore" else 1):
        found = torch.tensor(expert_similarity(adapter, level))
        torch.testing.assert_close(found, found.t())
        torch.testing.assert_close(found.diagonal(), torch.ones(len(found)), rtol=0, atol=1e-9, check_dtype=False)
        assert found.abs().max() <= 1 and len(found) == {"smore": [3, 4][level], "trex": 6}.get(settings["method"], 3)
