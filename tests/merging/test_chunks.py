"""Chunk by chunk every entry is worked on, and gives what float64 gives."""

import pytest
import torch

from searchmerge.merging.chunks import CHUNK, Chunks
from searchmerge.merging.kernels import Chunk, weighted_sum
from searchmerge.merging.operands import Operands

SIZES = [1, 63, CHUNK - 1, CHUNK, 2 * CHUNK + 3]


def mean_delta(chunk: Chunk):
    return (weighted_sum(chunk.deltas, chunk.scalars[0]),)


def operands(n_entries, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    draw = torch.Generator().manual_seed(n_entries)
    base, *experts = (torch.randn(n_entries, generator=draw).to(dtype) for dtype in dtypes)
    return Operands(base, tuple(experts), torch.full((1, len(experts)), 0.5))


def weighted(own, factors):
    """Return the weighted sum of task vectors in float64."""
    deltas = [expert.double() - own.base.double() for expert in own.experts]
    return sum(factor * delta for factor, delta in zip(factors, deltas, strict=True))


@pytest.mark.parametrize("n_entries", [0, *SIZES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_chunks_cover_every_entry(n_entries, dtype):
    own = operands(n_entries)
    out = torch.full((n_entries,), 9.0, dtype=dtype)
    assert Chunks().merge(mean_delta, own, 2.0, out) is None
    expected = own.base.double() + 2.0 * weighted(own, (0.5, 0.5))
    torch.testing.assert_close(out, expected.to(dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("n_entries", SIZES)
def test_the_merged_task_vector_alone_is_written_in_the_dtype_of_what_it_is_written_to(n_entries):
    own, out = operands(n_entries), torch.full((n_entries,), 9.0, dtype=torch.bfloat16)
    Chunks().write_merged(mean_delta, own, out)
    expected = weighted(own, (0.5, 0.5)).float().bfloat16()
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("n_entries", SIZES)
def test_products_are_those_of_what_each_set_of_scalars_merges(n_entries):
    own = operands(n_entries)
    sets = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.25, -2.0]]])
    numbers = torch.randn(n_entries, generator=torch.Generator().manual_seed(1))
    found = sum(sums.double() for sums in Chunks().products(mean_delta, own, sets, numbers))
    expected = [torch.dot(weighted(own, row.tolist()), numbers.double()) for [row] in sets]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-2)


def test_task_vectors_of_a_wider_base_are_those_that_are_measured():
    """The base's digits beyond float32 are no change that an expert made."""
    base = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    own = Operands(base, (base.float(), base.float() + 1.0), torch.zeros(1, 2))
    same, other = Chunks().compute(lambda chunk: chunk.deltas, own)
    assert torch.equal(same, torch.zeros(200))
    assert torch.equal(other, base.float() + 1.0 - base.float())
    out = torch.empty_like(base)
    Chunks().merge(lambda chunk: (chunk.deltas[0],), own, 1.0, out)
    assert torch.equal(out, base)
