from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from smore_cli.data.batch import Row
from smore_cli.errors import SmoreError
from smore_cli.nn import adapted_modules, set_active
from smore_cli.nn.context import RoutingTrace
from smore_cli.routing import RouterStatistics, RoutingCollector, collect_routing
from tests.nn.models import add_random, llama, small_smore
from tests.routing.traces import owners, picks, random_trace

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


def collected(model: nn.Module, *passes: tuple[list[int], list[RoutingTrace]]) -> list[RouterStatistics]:
    """What a collector makes of passes, each a token mask and the traces seen under it."""
    collector = RoutingCollector(model)
    for mask, traces in passes:
        with collector.watch(torch.tensor([mask])) as context:
            assert context.observe is not None
            for trace in traces:
                context.observe(trace)
    return collector.results()


def test_load_share_and_entropy_are_exactly_what_was_decided() -> None:
    model, [q] = owners("q")
    # Three tokens with two parents each: experts 0 and 1 five times, 0 and 2 once, 3 never.
    trace = picks(q, [[[0, 1], [1, 0]], [[0, 1], [0, 1]], [[0, 1], [0, 2]]], experts=4, weight=0.25)
    [router] = collected(model, ([1, 1, 1], [trace]))
    assert (router.module, router.level, router.decisions, router.picked) == ("q", 0, 6, 2)
    assert router.load == [1, 5 / 6, 1 / 6, 0]
    assert router.share == [0.25, 0.25 * 5 / 6, 0.25 / 6, 0]
    assert router.entropy == pytest.approx(1, abs=1e-12)
    assert router.dead == [3]


def test_entropy_is_the_mean_over_decisions_not_that_of_the_mean() -> None:
    model, [q] = owners("q")
    # One decision is certain, the other undecided between two of four: 0 and log 2 / log 4.
    probabilities = torch.tensor([[[1.0, 0, 0, 0]], [[0, 0.5, 0.5, 0]]])
    [router] = collected(model, ([1, 1], [RoutingTrace(q, 0, probabilities, probabilities)]))
    assert router.entropy == pytest.approx(0.25, abs=1e-15)


def test_a_dense_gate_is_judged_by_its_weights() -> None:
    model, [q] = owners("q")
    gates = torch.tensor([[[0.5, 0.25, 0.25]], [[0.5, 0.5, 0.0]]], dtype=torch.float64)  # a weight may underflow
    [router] = collected(model, ([1, 1], [RoutingTrace(q, 0, gates, gates)]))
    assert not router.selects
    assert router.load == [1, 1, 0.5]
    assert router.share == [0.5, 0.375, 0.125]
    entropy = -sum(part * math.log(part) for part in router.share)
    assert router.effective_experts == pytest.approx(math.exp(entropy), abs=1e-12)


def test_a_negative_weight_is_a_pick() -> None:
    model, [q] = owners("q")
    [router] = collected(model, ([1], [picks(q, [[[2]]], experts=3, weight=-0.5)]))
    assert router.load == [0, 0, 1]
    assert router.share == [0, 0, -0.5]


def test_a_single_expert_has_nothing_to_decide() -> None:
    model, [q] = owners("q")
    [router] = collected(model, ([1], [picks(q, [[[0]]], experts=1, weight=1.0)]))
    assert (router.entropy, router.effective_experts, router.balance, router.dead) == (0, 1, 1, [])


def test_padding_is_not_counted_whatever_is_in_it() -> None:
    model, [q] = owners("q")
    real, padding = picks(q, [[[0, 1]], [[1, 2]]], experts=3), torch.full((2, 1, 3), torch.nan)
    padded = RoutingTrace(q, 0, torch.cat([real.probabilities, padding]), torch.cat([real.gates, padding]))
    assert collected(model, ([1, 1, 0, 0], [padded])) == collected(model, ([1, 1], [real]))


@pytest.mark.parametrize("cuts", [[1, 299], [100, 100, 100], [7] * 42 + [6]])
def test_the_split_into_passes_and_their_order_do_not_matter(cuts: list[int]) -> None:
    model, [q] = owners("q")
    whole = random_trace(q, 300)
    parts = zip(whole.probabilities.split(cuts), whole.gates.split(cuts), strict=True)
    passes = [([1] * len(p), [RoutingTrace(q, 0, p, g)]) for p, g in parts]
    [expected] = collected(model, ([1] * 300, [whole]))
    assert_same(collected(model, *reversed(passes)), [expected], tolerance=1e-13)


def test_a_million_small_weights_add_up() -> None:
    model, [q] = owners("q")
    collector = RoutingCollector(model)
    trace = picks(q, [[[0]]] * 100_000, experts=2, weight=0.1)
    for _ in range(10):
        with collector.watch(torch.ones(1, 100_000)) as context:
            assert context.observe is not None
            context.observe(trace)
    assert collector.results()[0].share[0] == pytest.approx(
        float(torch.tensor(0.1)), rel=1e-12
    )  # float32 would be 1e-4 off


def test_results_are_in_the_models_order_root_first() -> None:
    model, [a, b] = owners("a", "b")
    traces = [picks(owner, [[[0]]], experts=2, level=level) for owner, level in ((b, 0), (b, 1), (a, 0), (a, 1))]
    assert [(r.module, r.level) for r in collected(model, ([1], traces))] == [("a", 1), ("a", 0), ("b", 1), ("b", 0)]


def test_values_that_are_not_finite_are_an_error_that_names_the_router() -> None:
    model, [q] = owners("q")
    bad = RoutingTrace(q, 0, torch.full((1, 1, 2), torch.nan), torch.ones(1, 1, 2))
    with pytest.raises(SmoreError, match="router of q gives values that are not finite"):
        collected(model, ([1], [bad]))


def rows(*lengths: int, branches: int = 1) -> list[Row]:
    """Rows of a prompt of 3 tokens and branches of the given length."""
    generator = torch.Generator().manual_seed(len(lengths))

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 500, (count,), generator=generator).tolist()  # type: ignore[no-any-return]

    return [Row(tokens(3), [tokens(n) for _ in range(branches)], [[True] * n] * branches) for n in lengths]


def run(model: nn.Module, data: list[Row], batch_size: int) -> list[RouterStatistics]:
    done: list[tuple[int, int]] = []
    found = collect_routing(
        model, data, pad_token_id=2, batch_size=batch_size, on_progress=lambda *pair: done.append(pair)
    )
    assert done[-1] == (len(data), len(data))
    return found.routers


def assert_same(one: list[RouterStatistics], other: list[RouterStatistics], tolerance: float = 1e-9) -> None:
    assert [(r.module, r.level, r.decisions, r.picked) for r in one] == [
        (r.module, r.level, r.decisions, r.picked) for r in other
    ]
    for a, b in zip(one, other, strict=True):
        numbers = [*a.load, *a.share, a.entropy]
        assert numbers == pytest.approx([*b.load, *b.share, b.entropy], rel=0, abs=tolerance)


METHODS: list[dict[str, Any]] = [
    {"gate": "switch"},
    {"gate": "dense"},
    {"gate": "noisy_topk", "fanout": [1, 2]},
    {"rank": [2, 2, 2], "num_experts": [3, 4, 5], "fanout": [2, 1, 3]},
    {"shared_pool": True},
]


@pytest.mark.parametrize("fields", METHODS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_batch_size_row_order_and_padding_do_not_change_a_models_statistics(
    tiny_llama: Path, fields: dict[str, Any]
) -> None:
    # In float64: in float32 the model's own rounding depends on the batch, and with it a pick on the edge.
    model = add_random(llama(tiny_llama), small_smore(**fields)).double()
    data = rows(2, 9, 1, 30, 5, 5, 17)
    alone = run(model, data, 1)
    assert len(alone) == len(adapted_modules(model)) * len(fields.get("rank", [2, 2]))
    assert alone[0].decisions == sum(row.length for row in data)
    assert len({tuple(router.load) for router in alone}) > 1 or fields.get("gate") == "dense"
    for batch_size in (3, 7):
        assert_same(run(model, data, batch_size), alone)
    assert_same(run(model, data[::-1], 2), alone)


def test_the_answers_to_one_question_are_all_counted_and_the_question_once(tiny_llama: Path) -> None:
    model = add_random(llama(tiny_llama), small_smore()).double()
    data = rows(4, 2, branches=3)
    found = run(model, data, 2)
    assert found[0].decisions == (3 + 3 * 4) + (3 + 3 * 2)
    assert found[1].decisions == 2 * found[0].decisions  # two parents at the leaves
    assert_same(run(model, data, 1), found)


def test_a_router_set_by_hand_sends_tokens_where_its_keys_say(tiny_llama: Path) -> None:
    model = add_random(llama(tiny_llama), small_smore(num_experts=[4, 3], fanout=[2, 1], gate_weights="pool"))
    path = "model.layers.1.self_attn.q_proj"
    root = adapted_modules(model)[path].adapters["default"].router.levels[1]  # type: ignore[union-attr, index]
    with torch.no_grad():  # the query is (1, 0, 0, 0) for every token, so the scores are the keys' first column
        root.mlp[2].weight.zero_()
        root.mlp[2].bias.copy_(torch.tensor([1.0, 0, 0, 0]))
        root.keys[:, 0] = torch.log(torch.tensor([1.0, 2.0, 5.0]))
    found = {(router.module, router.level): router for router in run(model, rows(4, 8), 2)}
    router = found[path, 1]
    assert router.load == [0, 0, 1]
    assert router.share == pytest.approx([0, 0, 5 / 8], abs=1e-6)
    parts = [1 / 8, 2 / 8, 5 / 8]
    assert router.entropy == pytest.approx(-sum(p * math.log(p) for p in parts) / math.log(3), abs=1e-6)
    assert (router.effective_experts, router.balance, router.dead) == (1, 0, [0, 1])


def test_collecting_changes_neither_the_model_nor_its_answers(tiny_llama: Path) -> None:
    model = add_random(llama(tiny_llama), small_smore())
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        run(model, rows(4, 8), 2)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_the_output_embedding_is_not_run(tiny_llama: Path) -> None:
    model = add_random(llama(tiny_llama), small_smore())
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *call: seen.append(call[2].numel()))  # type: ignore[operator]
    run(model, rows(4, 8), 2)
    assert seen == [0]


def test_only_the_active_adapter_is_looked_at(tiny_llama: Path) -> None:
    model = add_random(llama(tiny_llama), small_smore(target_modules=["q_proj"]), name="first")
    add_random(model, small_smore(target_modules=["v_proj"], num_experts=[3, 3]), name="second")
    assert {router.num_experts for router in run(model, rows(4), 1)} == {3}
    set_active(model, "first")
    assert {router.num_experts for router in run(model, rows(4), 1)} == {4}
