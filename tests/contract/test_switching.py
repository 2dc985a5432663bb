"""Adapters are switched on and off, stand beside one another, and leave no trace; dropout is for training alone."""

from __future__ import annotations

import torch

from smore_cli.methods.lora import LoRAConfig
from smore_cli.nn import adapted_modules, detach, set_active
from smore_cli.nn.attach import find_targets
from tests.contract.models import Case, attached, logits, randomised, token_ids


def test_switching_off_and_removing_leave_the_backbone_bit_identical(case: Case) -> None:
    bare, model, ids = case.bare(), case.bare(), token_ids(2, 7)
    before = logits(bare, ids)
    with_adapter = logits(randomised(attached(model, case.config)), ids)
    assert not torch.allclose(with_adapter, before, atol=1e-3)
    set_active(model, None)
    assert torch.equal(logits(model, ids), before)
    set_active(model, "default")
    assert torch.equal(logits(model, ids), with_adapter)
    detach(model)
    assert torch.equal(logits(model, ids), before)
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in bare.named_modules()
    ]
    parameters = bare.state_dict()
    assert list(model.state_dict()) == list(parameters)
    assert all(torch.equal(value, parameters[name]) for name, value in model.state_dict().items())


def test_two_adapters_on_one_model_switch_independently(case: Case) -> None:
    configs, ids, model, alone = {"a": case.config, "b": LoRAConfig(rank=2)}, token_ids(2, 7), case.bare(), {}
    for name, config in configs.items():
        single = case.bare()
        for each in (single, model):
            randomised(attached(each, config, name=name), name, seed=ord(name))
        alone[name] = logits(single, ids)
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-3)
    for name in ("a", "b", "a"):
        set_active(model, name)
        assert torch.equal(logits(model, ids), alone[name])
        trainable = {key.split(".adapters.")[1].split(".")[0] for key, p in model.named_parameters() if p.requires_grad}
        assert trainable == {name}
    detach(model, "a")
    assert adapted_modules(model).keys() == find_targets(case.bare(), "all-linear").keys()  # those of LoRA
    set_active(model, "b")
    assert torch.equal(logits(model, ids), alone["b"])


def test_dropout_acts_in_training_and_never_in_evaluation(case: Case) -> None:
    model, ids = case.random(), token_ids(2, 7)
    torch.manual_seed(0)
    exact = logits(model.eval(), ids)
    assert torch.equal(logits(model, ids), exact)
    if "dropout" not in type(case.config).model_fields:
        return
    dropped = case.random(dropout=0.5).train()
    assert not torch.equal(logits(dropped, ids), logits(dropped, ids))
    assert torch.equal(logits(dropped.eval(), ids), exact)
