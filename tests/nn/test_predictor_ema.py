from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from genejepa.nn.ema import ema_decay, update_average
from genejepa.nn.predictor import GeneSetPredictor

if TYPE_CHECKING:
    from collections.abc import Callable

N_CELLS, N_GENES, DIM = 5, 24, 8


@pytest.fixture
def predictor(make_seeded: Callable[[Callable[[], Any]], Any]) -> GeneSetPredictor:
    made: GeneSetPredictor = make_seeded(lambda: GeneSetPredictor(N_GENES, dim=DIM, hidden=16))
    return made


@pytest.fixture
def context(generator: torch.Generator) -> Tensor:
    return torch.randn(N_CELLS, DIM, generator=generator)


def query_of(predictor: GeneSetPredictor, genes: list[int], n_blocks: int) -> Tensor:
    """Query of a set of genes that is cut into ``n_blocks`` blocks, among blocks of other genes."""
    others = [gene for gene in range(N_GENES) if gene not in genes]
    parts = [*torch.tensor(genes).tensor_split(n_blocks), *torch.tensor(others).tensor_split(3)]
    blocks = torch.full((len(parts), max(len(part) for part in parts)), N_GENES)
    for row, part in zip(blocks, parts, strict=True):
        row[: len(part)] = part
    return predictor.set_queries(blocks, (torch.arange(len(parts)) < n_blocks).float())


@torch.no_grad()
def test_prediction_depends_on_what_is_asked_for(predictor: GeneSetPredictor, context: Tensor) -> None:
    blocks = torch.arange(N_GENES).view(4, -1)
    queries = predictor.set_queries(blocks, torch.eye(4))
    predicted = torch.stack([predictor(context, query) for query in queries] + [predictor(context)])
    for cell in predicted.unbind(1):
        distances = torch.pdist(cell)
        assert distances.min() > 0.1 * cell.norm(dim=1).mean()


@torch.no_grad()
def test_prediction_depends_on_the_context(predictor: GeneSetPredictor, context: Tensor) -> None:
    assert torch.pdist(predictor(context)).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("n_blocks", [2, 3, 6, 8], ids="{} blocks".format)
def test_query_does_not_depend_on_the_cut_into_blocks(predictor: GeneSetPredictor, n_blocks: int) -> None:
    genes = [1, 4, 5, 9, 13, 20]
    torch.testing.assert_close(
        query_of(predictor, genes, n_blocks), query_of(predictor, genes, 1), atol=1e-6, rtol=1e-5
    )


@torch.no_grad()
def test_query_is_the_sum_of_the_gene_vectors_over_the_root_of_their_number(
    predictor: GeneSetPredictor,
) -> None:
    genes = [0, 3, 7, 8, 22]
    expected = predictor.gene_queries[genes].sum(0) / math.sqrt(len(genes))
    torch.testing.assert_close(query_of(predictor, genes, 2), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_query_of_no_genes_is_finite(predictor: GeneSetPredictor) -> None:
    blocks = torch.arange(N_GENES).view(4, -1)
    assert torch.count_nonzero(predictor.set_queries(blocks, torch.zeros(2, 4))) == 0


@torch.no_grad()
def test_average_equals_the_closed_form(generator: torch.Generator) -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = [weight.double().clone() for weight in target.parameters()]
    for decay in (0.5, 0.9, 0.99, 1.0, 0.0, 0.7):
        for weight in source.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        update_average(target, source, decay)
        expected = [
            decay * old + (1 - decay) * new.double() for old, new in zip(expected, source.parameters(), strict=True)
        ]
    for found, wanted in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_average_of_a_constant_source_forgets_the_start_geometrically() -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    start = target.weight.clone()
    for _ in range(7):
        update_average(target, source, 0.8)
    expected = source.weight + 0.8**7 * (start - source.weight)
    torch.testing.assert_close(target.weight, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_average_of_itself_stays() -> None:
    source = nn.Linear(3, 2)
    target = nn.Linear(3, 2)
    target.load_state_dict(source.state_dict())
    update_average(target, source, 0.3)
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.bias, source.bias)


@pytest.mark.parametrize("total", [20, 600, 100_000])
def test_decay_rises_from_a_tenth_of_the_training_to_one(total: int) -> None:
    schedule = [ema_decay(step, total) for step in range(0, total + 1, max(1, total // 20))]
    assert schedule[0] == pytest.approx(1 - 10 / total)
    assert schedule[-1] == pytest.approx(1.0)
    assert schedule == sorted(schedule)
    assert ema_decay(total // 2, total) == pytest.approx(1 - 5 / total)  # half way up the cosine
    assert ema_decay(2 * total, total) == pytest.approx(1.0)


@pytest.mark.parametrize("total", [0, 1, 5, 10])
def test_decay_of_a_very_short_training_is_a_share(total: int) -> None:
    assert ema_decay(0, total) == 0.0
    assert all(0.0 <= ema_decay(step, total) <= 1.0 for step in range(total + 2))
