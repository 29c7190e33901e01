"""Rows of entries are merged as chunks are, whatever is left over at the end."""

import pytest
import torch

from searchmerge.merging.chunks import Chunks
from searchmerge.merging.kernels import pack
from searchmerge.merging.methods.dare import merge_drawn_elected
from searchmerge.merging.methods.linear import weighted_kept
from searchmerge.merging.methods.ties import TiesScalars, merge_ties
from searchmerge.merging.operands import Operands, count_tallies
from searchmerge.merging.randomness import random_keys
from searchmerge.merging.rows import (
    AT_ONCE,
    ROW,
    in_rows,
    merge_rows,
    multiply_rows,
    new_sums,
    new_tallies,
    numbers_of,
    rows_of,
    spans,
    total_of,
    write_rows,
)


def merge_mean(chunk):
    return merge_ties(chunk, aggregate="mean")


def ties_operands(n_entries):
    draw = torch.Generator().manual_seed(n_entries)
    base, *experts = (torch.randn(n_entries, generator=draw).bfloat16() for _ in range(4))
    scalars = pack(TiesScalars([0.5, 1.0, 0.0], [1.0, -0.5, 2.0], majority=1.0, bound=-1e-45))
    return Operands(base, tuple(experts), scalars)


def in_rows_of(function, operands, scale, dtype=torch.float32):
    """Return what is merged and the tally, by the kernel of rows, run as it is."""
    out = torch.empty(len(operands.base), dtype=dtype)
    tallies = new_tallies(count_tallies(function, operands), len(out) // ROW, out.device)
    rows = rows_of(operands, numbers_of(operands.scalars, scale))
    merge_rows(function, rows, out.view(-1, ROW), *tallies)
    return out, total_of(tallies) if tallies else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_give_what_chunks_give_with_the_same_tally(dtype):
    operands = ties_operands(40 * ROW)
    merged, tally = in_rows_of(merge_mean, operands, 0.5, dtype)
    out = torch.empty_like(merged)
    wanted = Chunks().merge(merge_mean, operands, 0.5, out)
    assert torch.equal(merged, out)
    assert torch.equal(tally, wanted.double())


def test_zero_sums_of_entries_that_are_not_zero_are_tallied():
    base = torch.zeros(2 * ROW)
    experts = (torch.ones(2 * ROW), -torch.ones(2 * ROW))
    scalars = pack(TiesScalars([0.0, 0.0], [1.0, 1.0], majority=1.0, bound=-1e-45))
    _, tally = in_rows_of(merge_mean, Operands(base, experts, scalars), 1.0)
    assert float(tally[0]) == 0.0
    assert float(tally[1]) > 0.0


@pytest.mark.parametrize("start", [0, 5 * ROW])
def test_draws_go_by_the_place_in_the_parameter(start):
    n_entries = 6 * ROW
    draw = torch.Generator().manual_seed(0)
    base, *experts = (torch.randn(n_entries, generator=draw) for _ in range(3))
    scalars = torch.tensor([[8e6, 9e6], [1.5, 2.0], [1.0, 0.5], [1.0, 1.0], [-1e-45, -1e-45]])
    keys = random_keys(1, ("a", "b"), "w")
    operands = Operands(base, tuple(experts), scalars, keys=keys, start=start)
    merged, tally = in_rows_of(merge_drawn_elected, operands, 1.0)
    out = torch.empty_like(merged)
    assert torch.equal(Chunks().merge(merge_drawn_elected, operands, 1.0, out), tally.float())
    assert torch.equal(merged, out)


def test_what_was_kept_in_few_bits_is_summed_in_float32():
    kept = tuple(torch.randn(2 * ROW).bfloat16() for _ in range(2))
    scalars = torch.tensor([[0.3, 0.7]])
    operands = Operands(torch.zeros(2 * ROW), (), scalars, kept)
    wanted = kept[0].float() * scalars[0, 0] + kept[1].float() * scalars[0, 1]
    out = torch.empty(2 * ROW)
    write_rows(weighted_kept, rows_of(operands, numbers_of(scalars, 1.0)), out.view(-1, ROW))
    torch.testing.assert_close(out, wanted)
    assert Chunks().merge(weighted_kept, operands, 1.0, out) is None
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize(
    ("n_entries", "n_taken"),
    [(0, 0), (ROW, 0), (2 * ROW - 1, 0), (2 * ROW, 2 * ROW), (2 * ROW + 1, 2 * ROW)],
)
def test_two_rows_or_none_are_taken(n_entries, n_taken):
    assert in_rows(n_entries) == n_taken
    assert list(spans(n_entries)) == ([(0, n_taken)] if n_taken else [])


@pytest.mark.parametrize("n_entries", [AT_ONCE, AT_ONCE + ROW, 3 * AT_ONCE + 7])
def test_what_is_long_is_cut_into_parts_alike(n_entries):
    parts = list(spans(n_entries))
    assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
    assert parts[-1][1] == n_entries // ROW * ROW
    lengths = [stop - start for start, stop in parts]
    assert max(lengths) <= AT_ONCE
    assert max(lengths) - min(lengths) <= ROW
    assert not any(length % ROW for length in lengths)


@pytest.mark.parametrize("n_scalars", [1, 2, 4])
@pytest.mark.parametrize("n_experts", [1, 3, 4])
def test_numbers_end_with_the_scale_and_fill_16_bytes(n_scalars, n_experts):
    scalars = torch.rand(n_scalars, n_experts)
    numbers = numbers_of(scalars, 0.25)
    assert numbers.numel() % 4 == 0
    assert torch.equal(numbers[:n_scalars], scalars)
    assert numbers[-1].tolist() == [0.25] * n_experts


def products_in_rows(operands, sets, weights, run):
    """Return the inner products, by the kernel of rows, as ``run`` runs it."""
    numbers = torch.stack([numbers_of(scalars, 1.0) for scalars in sets])
    sums, outs = new_sums(len(sets), len(weights) // ROW, weights.device)
    run(multiply_rows(len(sets)), rows_of(operands, numbers), (weights.view(-1, ROW), *outs))
    return sums.sum(1)


def sets_of(operands):
    """Return scalars under which one expert after the other has the only coefficient."""
    sets = operands.scalars.repeat(3, 1, 1)
    sets[:, 1] = torch.eye(3)
    return sets


@pytest.mark.parametrize("n_rows", [2, 7, 40])
def test_products_of_rows_are_those_of_chunks(n_rows):
    operands = ties_operands(n_rows * ROW)
    weights = torch.randn(n_rows * ROW, generator=torch.Generator().manual_seed(1)).bfloat16()

    def run(kernel, rows, outs):
        kernel(merge_mean, rows, *outs)

    found = products_in_rows(operands, sets_of(operands), weights, run)
    [wanted] = Chunks().products(merge_mean, operands, sets_of(operands), weights)
    assert found.shape == (3,)
    assert wanted.abs().min() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
