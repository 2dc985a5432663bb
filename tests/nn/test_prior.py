"""The prior finds its way from the prompt to the layers: padded, cached, generated, recomputed, interrupted."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from smore_cli.data.batch import Row, collate
from smore_cli.errors import AdapterError
from smore_cli.methods.trex import TRexConfig
from smore_cli.models.forward import target_logprobs
from smore_cli.nn import AdapterContext, attach, checkpoint_contexts, current_context, detach, set_active
from smore_cli.nn.prior_hooks import active_prior, priors_of
from tests.nn.models import adapter_gradients, add_random, llama, logits, token_ids

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from smore_cli.nn.prior import SequencePrior

CLOSE: dict[str, float] = {"rtol": 1e-6, "atol": 1e-8}
PAD = 2
PROMPTS = [token_ids(n, seed=n).tolist() for n in (6, 3, 4)]


def with_trex(folder: Path, **fields: Any) -> nn.Module:
    """A float64 Llama with a random 2 x 3 T-REX whose mix and scale are near one half, and centroids from prompts."""
    model = add_random(llama(folder), TRexConfig(**{"num_down": 2, "num_up": 3, "on_missing_prior": "error", **fields}))
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".omega", ".g")):
                parameter.mul_(0.01)
    prior = prior_of(model)
    spread = [token_ids(5, seed=100 + i).tolist() for i in range(6)]
    prior.centroids = prior.embedder(model, spread)
    return model


@pytest.fixture
def model(tiny_llama: Path) -> nn.Module:
    return with_trex(tiny_llama)


def prior_of(model: nn.Module) -> SequencePrior:
    prior = active_prior(model)
    assert prior is not None
    return prior


def padded(rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    fill = [[PAD] * (longest - len(row)) for row in rows]
    ids = [[*gap, *row] if side == "left" else [*row, *gap] for gap, row in zip(fill, rows, strict=True)]
    zero = [[0] * len(gap) for gap in fill]
    one = [[1] * len(row) for row in rows]
    mask = [[*z, *o] if side == "left" else [*o, *z] for z, o in zip(zero, one, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def places(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


def with_prior(model: nn.Module, ids: Tensor, prior: Tensor, **inputs: Any) -> Tensor:
    with AdapterContext(aux=False, prior=prior):
        return logits(model, ids, **inputs)


# Where it comes from.


def test_a_score_is_the_product_of_the_mean_hidden_state_and_a_centroid(model: nn.Module) -> None:
    prior = prior_of(model)
    found = prior.scores(model, PROMPTS)
    set_active(model, None)
    for row, prompt in zip(found, PROMPTS, strict=True):
        with torch.no_grad():
            hidden = model.base_model(input_ids=torch.tensor([prompt])).last_hidden_state[0]  # type: ignore[operator]
        mean = hidden.mean(0)
        torch.testing.assert_close(row, (mean / mean.norm()).float() @ prior.centroids.T, rtol=1e-5, atol=1e-6)


def test_a_call_computes_the_prior_of_each_row_by_itself(model: nn.Module) -> None:
    ids = token_ids(2, 5)
    prior = prior_of(model).scores(model, ids.tolist())
    assert not torch.allclose(prior[0], prior[1], atol=1e-3)
    assert torch.equal(logits(model, ids), with_prior(model, ids, prior))
    assert not torch.allclose(logits(model, ids), with_prior(model, ids, prior.flip(0)), atol=1e-3)
    assert current_context() is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_prior_nor_output(model: nn.Module, side: str) -> None:
    ids, mask = padded(PROMPTS, side)
    out = logits(model, ids, attention_mask=mask, position_ids=places(mask))
    for row, real, prompt in zip(out, mask, PROMPTS, strict=True):
        torch.testing.assert_close(row[real == 1], logits(model, torch.tensor([prompt]))[0], **CLOSE)


def test_the_prompt_mask_says_what_the_prior_reads(model: nn.Module) -> None:
    row = Row(PROMPTS[0], [[7, 8, 9]], [[True] * 3])
    batch = collate([row], pad_token_id=PAD)
    prior = prior_of(model).scores(model, [PROMPTS[0]])
    with AdapterContext(aux=False, prompt_mask=batch.prompt_mask):
        found = logits(model, batch.input_ids)
    assert torch.equal(found, with_prior(model, batch.input_ids, prior))
    assert not torch.allclose(found, logits(model, batch.input_ids), atol=1e-4)
    with (
        pytest.raises(AdapterError, match=r"prompt_mask is \(1, 9\), the token ids are \(1, 5\)"),
        AdapterContext(aux=False, prompt_mask=batch.prompt_mask),
    ):
        logits(model, batch.input_ids[:, :5])


def test_branches_of_a_row_share_the_prior_of_their_prompt(model: nn.Module) -> None:
    branches = [[7, 8], [9], [10, 11, 12]]
    shared = Row(PROMPTS[0], branches, [[True] * len(branch) for branch in branches])
    apart = [Row(PROMPTS[0], [branch], [[True] * len(branch)]) for branch in branches]
    found = []
    for rows in ([shared], apart):
        batch = collate(rows, pad_token_id=PAD, mask_dtype=torch.float64)
        with AdapterContext(token_mask=batch.token_mask, aux=False, prompt_mask=batch.prompt_mask), torch.no_grad():
            found.append(target_logprobs(model, batch))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_each_prompt_is_embedded_once_and_together(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    prior, seen = prior_of(model), list[int]()
    embedder = prior.embedder
    monkeypatch.setattr(prior, "embedder", lambda m, prompts: (seen.append(len(prompts)), embedder(m, prompts))[1])
    ids = torch.cat([token_ids(2, 5), token_ids(1, 5)])
    for _ in range(2):
        logits(model, ids)
    logits(model, torch.cat([ids, token_ids(1, 5, seed=4)]))
    assert seen == [2, 1]
    prior.centroids = prior.centroids.flip(0)  # others were loaded: nothing of the old ones may be used
    changed = prior.scores(model, ids.tolist())
    assert seen == [2, 1, 2]
    prior.centroids.copy_(prior.centroids.flip(0))
    torch.testing.assert_close(prior.scores(model, ids.tolist()), changed.flip(1), rtol=1e-6, atol=1e-7)


# What embedding must not do.


def test_embedding_leaves_no_trace(model: nn.Module) -> None:
    model.train()
    model.base_model.layers[0].eval()  # type: ignore[union-attr, index, operator]
    flags = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    state, traces = torch.get_rng_state(), list[Any]()
    batch = collate([Row(prompt, [[5, 6]], [[True, True]]) for prompt in PROMPTS], pad_token_id=PAD)
    with AdapterContext(token_mask=batch.token_mask, observe=traces.append, prompt_mask=batch.prompt_mask) as context:
        target_logprobs(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert len(traces) == len(context.loads) == 14 and current_context() is None
    assert context.prior is None


def test_autocast_and_inference_mode_do_not_reach_the_scores(tiny_llama: Path) -> None:
    model, ids = with_trex(tiny_llama).float(), token_ids(2, 5)
    exact = with_trex(tiny_llama).float()
    wanted = prior_of(exact).scores(exact, ids.tolist())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids)
    assert torch.equal(prior_of(model).scores(model, ids.tolist()), wanted)
    model(input_ids=ids).logits.sum().backward()  # a tensor of inference mode could not be saved for this
    assert adapter_gradients(model)


def test_recomputed_activations_see_the_same_prior(tiny_llama: Path) -> None:
    model, ids = with_trex(tiny_llama).train(), token_ids(2, 7)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})  # type: ignore[operator]
        model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        gradients.append(adapter_gradients(model))
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 14 * 5
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


# Decoding.


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decoding_keeps_the_prior_of_the_prompt(model: nn.Module, side: str) -> None:
    ids, mask = padded(PROMPTS, side)
    prior = prior_of(model).scores(model, PROMPTS)
    out = model(input_ids=ids, attention_mask=mask, position_ids=places(mask), use_cache=True)
    new = token_ids(3, 2, seed=9)
    for step in range(2):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        position = torch.tensor([[len(prompt) + step] for prompt in PROMPTS])
        with torch.no_grad():
            out = model(
                input_ids=new[:, step : step + 1], attention_mask=mask, position_ids=position,
                past_key_values=out.past_key_values, use_cache=True,
            )  # fmt: skip
        for b, prompt in enumerate(PROMPTS):
            whole = torch.tensor([prompt + new[b, : step + 1].tolist()])
            torch.testing.assert_close(out.logits[b, -1], with_prior(model, whole, prior[b : b + 1])[0, -1], **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"prefill_chunk_size": 2},
        {"cache_implementation": "static", "disable_compile": True},
        {"attention_mask": None},
    ],
    ids=str,
)
def test_generate_decodes_each_row_with_the_prior_of_its_prompt(model: nn.Module, options: dict[str, Any]) -> None:
    ids, mask = padded(PROMPTS, "left")
    prior = prior_of(model).scores(model, PROMPTS)
    out = model.generate(  # type: ignore[operator]
        **{"inputs": ids, "attention_mask": mask, "eos_token_id": None, "pad_token_id": PAD, **options},
        max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    for b, prompt in enumerate(PROMPTS):
        tokens = list(prompt)
        for step in range(4):
            whole = with_prior(model, torch.tensor([tokens]), prior[b : b + 1])[0, -1]
            torch.testing.assert_close(out.logits[step][b].double(), whole, rtol=1e-4, atol=1e-4)
            tokens.append(int(whole.argmax()))
        assert out.sequences[b, ids.shape[1] :].tolist() == tokens[len(prompt) :]
    assert current_context() is None


def test_every_beam_has_the_prior_of_its_prompt(model: nn.Module) -> None:
    ids, mask = padded(PROMPTS, "left")
    settings: dict[str, Any] = {
        "max_new_tokens": 4, "do_sample": False, "num_beams": 3, "num_return_sequences": 2, "eos_token_id": None,
        "pad_token_id": PAD, "output_scores": True, "return_dict_in_generate": True,
    }  # fmt: skip
    whole = model.generate(ids, attention_mask=mask, **settings)  # type: ignore[operator]
    for b, prompt in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([prompt]), **settings)  # type: ignore[operator]
        rows = slice(2 * b, 2 * b + 2)
        torch.testing.assert_close(whole.sequences_scores[rows], alone.sequences_scores, rtol=1e-4, atol=1e-4)
        assert torch.equal(whole.sequences[rows, ids.shape[1] :], alone.sequences[:, len(prompt) :])


def test_generate_takes_a_prior_that_the_caller_gives(model: nn.Module) -> None:
    ids, prior = token_ids(1, 5), prior_of(model).scores(model, [[11, 12, 13]])
    settings: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "pad_token_id": PAD}
    with AdapterContext(aux=False, prior=prior):
        out = model.generate(ids, return_dict_in_generate=True, num_return_sequences=1, **settings)  # type: ignore[operator]
    torch.testing.assert_close(out.logits[0].double(), with_prior(model, ids, prior)[:, -1], rtol=1e-5, atol=1e-5)
    with (
        pytest.raises(AdapterError, match=r"prior is \(1, 6\), this batch needs \(2, 6\)"),
        AdapterContext(prior=prior),
    ):
        model.generate(token_ids(2, 5), **settings)  # type: ignore[operator]


# Where it cannot be known.


def unknown(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Calls that do not show the prompt."""
    ids = token_ids(2, 4)
    embeddings = model.get_input_embeddings()(ids)  # type: ignore[operator]
    set_active(model, None)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    set_active(model, "default")
    four = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    return {
        "without token ids": {"inputs_embeds": embeddings},
        "has not seen": {"input_ids": ids[:, :1], "past_key_values": cache},
        "does not tell": {"input_ids": ids, "attention_mask": four},
        "row 1 has no token": {"input_ids": ids, "attention_mask": torch.tensor([[1] * 4, [0] * 4])},
    }


@pytest.mark.parametrize("why", ["without token ids", "has not seen", "does not tell", "row 1 has no token"])
def test_the_policy_decides_where_the_prompt_is_not_known(tiny_llama: Path, why: str) -> None:
    with pytest.raises(AdapterError, match=f"prior of the sequences is not known: .*{why}"):
        model = with_trex(tiny_llama)
        model(**unknown(model)[why])
    assert current_context() is None
    for policy, value in (("zero", 0.0), ("uniform", 1 / 6)):
        model = with_trex(tiny_llama, on_missing_prior=policy)
        with torch.no_grad():
            found = model(**unknown(model)[why]).logits
            with AdapterContext(aux=False, prior=torch.full((2, 6), value, dtype=torch.float64)):
                wanted = model(**unknown(model)[why]).logits
        torch.testing.assert_close(found, wanted)


def test_a_prior_without_centroids_is_not_known(tiny_llama: Path) -> None:
    model = llama(tiny_llama)
    attach(model, TRexConfig())
    with pytest.raises(AdapterError, match="no centroids yet"):
        logits(model, token_ids(1, 3))
    with pytest.raises(AdapterError, match="no centroids yet"):
        model.generate(token_ids(1, 3), max_new_tokens=1)  # type: ignore[operator]


@pytest.mark.parametrize("shape", [(1, 6), (3, 6), (2, 5), (6,)])
def test_a_prior_given_for_another_batch_is_refused(model: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(AdapterError, match="this batch needs"), AdapterContext(prior=torch.zeros(shape)):
        model(input_ids=token_ids(2, 4))


def test_a_cache_of_fewer_rows_is_refused(model: nn.Module) -> None:
    cache = model(input_ids=token_ids(2, 4), use_cache=True).past_key_values
    with pytest.raises(AdapterError, match="the cache holds 2 rows"):
        model(input_ids=token_ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize("again", ["forward", "generate"])
def test_an_interrupted_call_leaves_nothing_behind(model: nn.Module, again: str) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    logits(model, token_ids(2, 4, seed=3))  # embedded already, so that it is the pass itself that is interrupted
    handle = model.base_model.layers[1].register_forward_pre_hook(interrupt)  # type: ignore[union-attr, index, operator]
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=token_ids(2, 4, seed=3))
    handle.remove()
    left = current_context()
    assert left is not None and left.entered_by is not None  # the hook that leaves does not run for this exception
    ids = token_ids(2, 4)
    wanted = with_prior(model, ids, prior_of(model).scores(model, ids.tolist()))
    if again == "forward":
        assert torch.equal(logits(model, ids), wanted)
    else:
        with_prior_of_another = current_context()
        assert with_prior_of_another is not None and with_prior_of_another.prior is not None
        out = model.generate(  # type: ignore[operator]
            ids, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=PAD
        )
        torch.testing.assert_close(out.logits[0].double(), wanted[:, -1], rtol=1e-5, atol=1e-5)
    assert current_context() is None


# Switching and copying.


def test_the_prior_comes_and_goes_with_its_adapter(tiny_llama: Path) -> None:
    model, ids = with_trex(tiny_llama), token_ids(2, 4)
    with_adapter = logits(model, ids)
    attach(model, TRexConfig(num_down=1, num_up=2, prior="none"), name="plain")
    model.double()
    assert active_prior(model) is None
    logits(model, ids)
    set_active(model, None)
    assert torch.equal(logits(model, ids), logits(llama(tiny_llama).double(), ids))
    set_active(model, "default")
    assert torch.equal(logits(model, ids), with_adapter)
    detach(model, "plain")
    detach(model, "default")
    assert priors_of(model) == {} and not model._forward_pre_hooks and not model._forward_hooks
    assert "generate" not in vars(model)
    assert torch.equal(logits(model, ids), logits(llama(tiny_llama).double(), ids))


def test_a_copy_has_a_prior_of_its_own(model: nn.Module) -> None:
    ids = token_ids(2, 4)
    wanted = logits(model, ids)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    detach(model)  # a copy that leaned on the original would notice
    for other in copies:
        assert torch.equal(logits(other, ids), wanted)
        assert other.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=PAD).shape == (2, 6)
        detach(other)
        assert not other._forward_pre_hooks and "generate" not in vars(other)
