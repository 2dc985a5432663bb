"""Noise of the promised size on real tokens, while training, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from smore_cli.nn import AdapterContext
from smore_cli.training.neftune import add_neftune

WIDTH, ALPHA = 16, 5.0
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]])


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, WIDTH)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding


@pytest.fixture
def embedder() -> Embedder:
    model = Embedder().train()
    add_neftune(model, ALPHA)
    return model


def noise(model: Embedder, context: AdapterContext) -> Tensor:
    """(B, S, d) what was added to the embeddings."""
    ids = torch.arange(12).view(2, 6) % 8
    with context:
        return (model.embedding(ids) - model.embedding.weight[ids]).detach()


def test_every_row_gets_noise_by_its_own_length(embedder: Embedder) -> None:
    torch.manual_seed(0)
    found = noise(embedder, AdapterContext(token_mask=MASK))
    assert not found[MASK == 0].any()
    for row, length in enumerate((4, 1)):
        bound = ALPHA / (length * WIDTH) ** 0.5
        size = found[row][MASK[row] == 1].abs()
        assert 0.75 * bound < size.max() <= bound + 1e-6
        assert size.mean() == pytest.approx(bound / 2, rel=0.4)
    torch.manual_seed(0)
    assert torch.equal(found, noise(embedder, AdapterContext(token_mask=MASK)))
    assert not torch.equal(found, noise(embedder, AdapterContext(token_mask=MASK)))


def test_documents_that_share_a_row_have_lengths_of_their_own(embedder: Embedder) -> None:
    documents = torch.tensor([[0, 0, 0, 0, 1, -1], [2, 2, 2, 2, 2, 2]])
    mask = (documents >= 0).long()
    found = noise(embedder, AdapterContext(token_mask=mask, documents=documents)).abs().amax(-1)
    bounds = {-1: 0.0} | {number: ALPHA / (length * WIDTH) ** 0.5 for number, length in enumerate((4, 1, 6))}
    allowed = torch.tensor([[bounds[int(number)] for number in row] for row in documents])
    assert (found <= allowed + 1e-6).all()
    assert (found > 0.5 * allowed)[documents >= 0].all()


def test_there_is_none_in_evaluation_nor_outside_a_training_pass(embedder: Embedder) -> None:
    assert not noise(embedder, AdapterContext(token_mask=MASK, aux=False)).any()
    ids = torch.arange(6)[None]
    assert torch.equal(embedder.embedding(ids), embedder.embedding.weight[ids])
    assert noise(embedder, AdapterContext(token_mask=MASK)).any()
    assert not noise(embedder.eval(), AdapterContext(token_mask=MASK)).any()
