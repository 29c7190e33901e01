"""Runs any function of entries as C++."""

from collections.abc import Callable

import torch
from torch import Tensor

from searchmerge.merging.kernels import Chunk
from searchmerge.merging.native import native
from searchmerge.merging.operands import Operands


def applied(function: Callable[..., Tensor], *numbers: Tensor) -> Tensor:
    """Return a function of tensors, computed as C++ entry by entry."""

    def of_chunk(chunk: Chunk) -> tuple[Tensor, ...]:
        return (function(*chunk.kept),)

    base = torch.zeros_like(numbers[0])
    outs = native.compute(of_chunk, Operands(base, (base,), torch.zeros(1, 1), numbers))
    assert outs is not None, "it is not written as C++"
    return outs[0]
