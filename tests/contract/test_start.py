"""A fresh adapter: what it computes, what it counts, what its first gradient reaches."""

from __future__ import annotations

import pytest
import torch

from smore_cli.errors import AdapterError
from smore_cli.methods import available_methods
from smore_cli.nn import AdapterContext, adapted_modules, attach
from smore_cli.nn.attach import find_targets, sites_of
from smore_cli.nn.context import RoutingTrace
from smore_cli.nn.prior_hooks import active_prior
from tests.contract.models import (
    Case,
    adapters,
    backbone,
    batch,
    default_config,
    gradients,
    kind,
    logits,
    loss_of,
    token_ids,
)

WHOLE_MLP = [name for name in available_methods() if "gated_mlp" in default_config(name).sites]


def test_a_fresh_adapter_computes_exactly_what_the_backbone_does(case: Case) -> None:
    ids = token_ids(2, 7)
    same = torch.equal(logits(case.fresh(), ids), logits(case.bare(), ids))
    assert same is case.config.starts_as_backbone


def test_the_parameters_without_a_first_gradient_are_exactly_those_declared(case: Case) -> None:
    model = case.fresh().train()
    torch.manual_seed(0)
    loss_of(model, batch()).backward()
    found = gradients(model)
    assert found and all(gradient.isfinite().all() for gradient in found.values())
    silent = {name for name, gradient in found.items() if not gradient.any()}
    paths = {path: f"{path}.adapters.default" for path in adapters(model)}
    declared = {f"{paths[path]}.{name}" for path, part in adapters(model).items() for name in part.silent_at_start()}
    assert {kind(name) for name in silent ^ declared} == set()


def test_the_parameter_formula_counts_what_trains(case: Case) -> None:
    bare = case.bare()
    sites = sites_of(bare, find_targets(bare, case.config.target_modules, case.config.sites))
    trained = sum(parameter.numel() for parameter in case.fresh().parameters() if parameter.requires_grad)
    assert sum(case.config.num_parameters(site) for site in sites.values()) == trained


def test_a_seed_gives_one_adapter_and_leaves_the_global_random_state_alone(case: Case) -> None:
    before = torch.get_rng_state()
    first, again, other = (dict(case.fresh(seed=seed).named_parameters()) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    trained = [name for name, parameter in first.items() if parameter.requires_grad]
    assert all(torch.equal(first[name], again[name]) for name in trained)
    if case.config.starts_as_backbone:  # what starts from the backbone's weights may draw nothing
        assert not all(torch.equal(first[name], other[name]) for name in trained)


def test_expert_axes_hold_one_block_for_every_expert_and_only_those_picked_have_a_gradient(case: Case) -> None:
    model = case.random(**case.without_dropout)
    prior = active_prior(model)
    given = None if prior is None else torch.full((1, prior.num_experts), 0.5)
    generator = torch.Generator().manual_seed(1)
    sites = sites_of(model, dict(adapted_modules(model)))
    for path, module in adapted_modules(model).items():
        adapter, traces = module.adapter("default"), list[RoutingTrace]()
        x = torch.randn(1, 2, sites[path].in_features, generator=generator)
        with AdapterContext(observe=traces.append, aux=False, prior=given):
            out = module(x)
        (out * torch.randn(out.shape, generator=generator)).sum().backward()
        picked = {trace.level: (trace.gates != 0).flatten(0, 1).any(0) for trace in traces}
        parameters = dict(adapter.named_parameters())
        for name, (level, dim) in adapter.expert_axes.items():
            experts, gradient = picked[level], parameters[name].grad
            assert gradient is not None
            blocks = gradient.unflatten(dim, (len(experts), -1)).movedim(dim, 0).flatten(1)
            assert blocks.any(1).tolist() == experts.tolist(), f"{path}.{name}"


@pytest.mark.parametrize("method", WHOLE_MLP)
def test_a_method_on_gated_mlps_refuses_a_model_without_any(method: str) -> None:
    bare = backbone("gpt2")
    modules = [type(module) for module in bare.modules()]
    with pytest.raises(AdapterError, match="gated MLP"):
        attach(bare, default_config(method))
    assert [type(module) for module in bare.modules()] == modules
