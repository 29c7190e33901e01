"""Signs are elected alike, compiled or not."""

import itertools
from typing import NamedTuple

import pytest
import torch

from searchmerge.merging.election import Majority, merge_elected, positive_bound
from searchmerge.merging.engine import Engine
from searchmerge.merging.kernels import Chunk, pack, unpack
from searchmerge.merging.method import Pass
from searchmerge.merging.operands import Operands

ODD = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 0.3, -0.3, 1.0, -1.0, 1.5, -(2.0**24), 1e30, -1e30]


class Elected(NamedTuple):
    coefficients: torch.Tensor | list[float]
    majority: torch.Tensor | float
    bound: torch.Tensor | float


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
@pytest.mark.parametrize("majority", [1.0, -1.0])
def test_compiled_elections_equal_eager_ones_to_the_bit(majority, aggregate):
    columns = torch.tensor(list(itertools.product(ODD, repeat=3))).T
    scalars = pack(Elected([0.5, 1.0, -2.0], majority, positive_bound(majority)))
    own = Operands(torch.zeros(columns.shape[1]), tuple(columns), scalars)

    def elect(chunk: Chunk):
        merged, *tally = merge_elected(list(chunk.deltas), unpack(Elected, chunk), aggregate)
        return merged, merged * 0 + tally[0], merged * 0 + tally[1]

    eager, compiled = (Engine(kind).compute(elect, own) for kind in ("eager", "compiled"))
    for one, other in zip(eager, compiled, strict=True):
        assert torch.equal(one, other)


def settled(majority, key, density, elects):
    """Return what was assumed, one after the other, until a pass stood."""
    assumed = []

    def make(sign):
        assumed.append(sign)
        return Pass(len, torch.full((1, 1), sign).expand)

    work = majority.settle(key, [[density] * 3], make)
    while work is not None and work.revise is not None:
        work = work.revise(torch.tensor([elects, 1.0]))
    return assumed


def test_the_majority_is_guessed_to_be_that_of_the_most_similar_densities():
    majority = Majority()
    assert settled(majority, "a", 0.10, -7.0) == [1.0, -1.0]
    assert settled(majority, "b", 0.40, 9.0) == [-1.0, 1.0]
    assert settled(majority, "c", 0.15, -3.0) == [-1.0]
    assert settled(majority, "d", 0.35, 2.0) == [1.0]
    assert settled(majority, "c", 0.15, -3.0) == [-1.0]
