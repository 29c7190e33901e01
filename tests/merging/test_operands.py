"""Parts of a parameter keep their place, and a function's tallies are counted once."""

import pytest
import torch

from searchmerge.merging.operands import Operands, count_tallies


def operands(n_entries=10, **more):
    entries = torch.arange(float(n_entries))
    return Operands(entries, (entries + 1, entries + 2), torch.ones(1, 2), **more)


def test_a_part_of_a_part_knows_where_in_its_parameter_it_begins_and_copies_nothing():
    whole = operands(kept=(torch.arange(10.0) + 3,), keys=torch.tensor([1, 2]), start=100)
    part = whole.part(2, 9).part(1, 4)
    assert part.start == 103
    for found, tensor in zip(
        (part.base, *part.experts, *part.kept),
        (whole.base, *whole.experts, *whole.kept),
        strict=True,
    ):
        assert torch.equal(found, tensor[3:6])
        assert found.data_ptr() == tensor[3:].data_ptr()
    assert part.keys is whole.keys


@pytest.mark.parametrize("n_tallies", [0, 2])
def test_tallies_are_what_a_function_returns_beside_what_is_merged(n_tallies):
    calls = []

    def function(chunk):
        calls.append(len(chunk.deltas))
        return (chunk.deltas[0], *[chunk.deltas[0].sum()] * n_tallies)

    assert [count_tallies(function, operands(n)) for n in (3, 3, 5)] == [n_tallies] * 3
    assert calls == [2]


def test_a_function_that_draws_is_given_places_and_keys_as_it_is_counted():
    def function(chunk):
        return (chunk.deltas[0] + chunk.positions + chunk.keys[1],)

    assert count_tallies(function, operands(keys=torch.tensor([1, 2]))) == 0
