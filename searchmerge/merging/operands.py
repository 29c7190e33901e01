"""What the merge of one parameter reads, and how many numbers come back beside what is merged."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from searchmerge.merging.kernels import Chunk, ChunkFunction
from searchmerge.merging.method import Pass

_TALLIES: dict[object, int] = {}
"""How many tallies each function returns, by it and what it reads."""


@dataclass(frozen=True, slots=True)
class Operands:
    """One parameter, or a part of one, with all that its merge reads; 1-D, on one device.

    Attributes:
        base: The base's entries, any float dtype.
        experts: Each expert's, any float dtypes.
        scalars: ``(n_scalars, n_experts)`` float32 on the CPU.
        kept: What the method kept of this parameter, any float dtype.
        keys: One int64 per expert, or ``None``.
        start: Index of the first entry in its parameter.
    """

    base: Tensor
    experts: tuple[Tensor, ...]
    scalars: Tensor
    kept: tuple[Tensor, ...] = ()
    keys: Tensor | None = None
    start: int = 0

    def part(self, start: int, stop: int) -> "Operands":
        """Return entries ``start`` to ``stop``, without copying."""
        return Operands(
            self.base[start:stop],
            tuple(tensor[start:stop] for tensor in self.experts),
            self.scalars,
            tuple(tensor[start:stop] for tensor in self.kept),
            self.keys,
            self.start + start,
        )

    def with_scalars(self, scalars: Tensor) -> "Operands":
        """Return the same with other scalars."""
        return replace(self, scalars=scalars)


class Parameter(NamedTuple):
    """A parameter that stays where it is merged, with all that is read and written, 1-D.

    Attributes:
        name: Its name.
        tensors: The base's entries and each expert's.
        kept: What the method kept of it.
        target: Where it is written.
    """

    name: str
    tensors: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    target: Tensor

    def operands(self, work: Pass) -> Operands:
        """Return what its merge reads in a pass."""
        base, *experts = self.tensors
        keys = None if work.keys is None else work.keys(self.name)
        return Operands(base, tuple(experts), work.scalars(self.name), self.kept, keys)


def count_tallies(function: ChunkFunction, operands: Operands) -> int:
    """Return how many tallies a function returns of such a parameter, beside what is merged."""
    is_random = operands.keys is not None
    n_experts, n_kept = len(operands.experts), len(operands.kept)
    key = (function, n_experts, operands.scalars.shape, n_kept, is_random)
    if key not in _TALLIES:
        zero, place = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        chunk = Chunk(
            tuple(zero.clone() for _ in range(n_experts)),
            torch.zeros(operands.scalars.shape),
            (zero,) * n_kept,
            place if is_random else None,
            place.expand(max(1, n_experts)) if is_random else None,
        )
        _TALLIES[key] = len(function(chunk)) - 1
    return _TALLIES[key]
