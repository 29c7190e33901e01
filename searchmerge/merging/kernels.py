"""Arithmetic that merge methods share. Axis 0 is always the experts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from searchmerge.merging.engine import delta_chunks
from searchmerge.merging.statistics import OrderStatistics
from searchmerge.merging.task_vectors import TaskVectors

GRID = 100
"""Densities are stepped by one in so many."""


def weighted_sum(deltas: Tensor, scalars: Tensor) -> tuple[Tensor, None]:
    """Return each entry's sum over the experts, each times its scalar; no tally.

    Args:
        deltas: ``(n_experts, m)`` float32; overwritten.
        scalars: The factors, ``(1, n_experts)``.
    """
    return deltas.mul_(scalars[0, :, None]).sum(0), None


def magnitudes(task_vectors: TaskVectors) -> OrderStatistics:
    """Return the order statistics of each expert's |task vector| over the whole model."""
    d = task_vectors.n_parameters
    grid = [trim_rank(d, step / GRID) for step in range(1, GRID)]
    return OrderStatistics(
        lambda: (chunk.abs_() for chunk in delta_chunks(task_vectors)),
        len(task_vectors.experts),
        [rank for rank in grid if rank is not None],
    )


def trim_rank(d: int, density: float) -> int | None:
    """Return the rank, from 0, of the smallest of d magnitudes that is kept; ``None`` for all.

    The authors of TIES keep what is at least the k-th smallest, ``k = d - int(d * density)``
    counted from 1, in double precision; ties are all kept.
    """
    n_kept = int(d * density)
    return None if n_kept >= d else max(0, d - n_kept - 1)


def thresholds(
    statistics: OrderStatistics, d: int, densities: Sequence[float]
) -> list[float]:
    """Return the magnitude below which each expert is trimmed; 0 trims nothing."""
    ranks = [trim_rank(d, density) for density in densities]
    found = statistics.at([rank or 0 for rank in ranks])
    return [0.0 if rank is None else value for rank, value in zip(ranks, found, strict=True)]


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient, 0 where the denominator is 0."""
    safe = torch.where(denominator == 0, 1.0, denominator)
    return torch.where(denominator == 0, 0.0, numerator / safe)
