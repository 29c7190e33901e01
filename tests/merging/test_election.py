"""Signs are elected alike, compiled or not."""

import itertools
from typing import NamedTuple

import pytest
import torch

from searchmerge.merging.election import merge_elected, positive_bound
from searchmerge.merging.engine import Engine, Operands
from searchmerge.merging.kernels import Chunk, pack, unpack

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
