"""How a task's score comes from its examples: as their mean, from records, or all at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Aggregate = Callable[[Sequence[float]], float]
"""Makes the score of any examples, drawn twice or not at all, from one record of each."""

Counts = npt.NDArray[np.int64]
"""How often each example is in each resample, ``(n_resamples, n_examples)``."""


class ScoreKind(Protocol):
    """How a task's score comes from the values of its blocks. It is sent between processes."""

    def block_size(self, n_examples: int, size: int) -> int:
        """Return how many of ``n_examples`` are a block, where blocks of ``size`` are wanted."""
        ...

    def n_values(self, n_examples: int) -> int:
        """Return how many numbers an evaluator gives for a block of ``n_examples``."""
        ...

    def n_observations(self, n_examples: int) -> int:
        """Return how many observations a block of ``n_examples`` is."""
        ...

    def observations(self, values: Sequence[float]) -> tuple[float, ...]:
        """Return a block's values as observations, by which plans are paired.

        The mean of a task's observations is its score.
        """
        ...

    def score(self, values: Sequence[float]) -> float:
        """Return the task's score from the values of all its blocks, one after the other."""
        ...

    def resampled(self, values: Sequence[float], counts: Counts) -> list[float]:
        """Return the task's score on each resample of its examples."""
        ...


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of one number per example."""

    def block_size(self, n_examples: int, size: int) -> int:
        """Return ``size``: any few examples tell something of the mean."""
        return size

    def n_values(self, n_examples: int) -> int:
        """Return one for each example."""
        return n_examples

    def n_observations(self, n_examples: int) -> int:
        """Return one for each example."""
        return n_examples

    def observations(self, values: Sequence[float]) -> tuple[float, ...]:
        """Return the values as they are."""
        return tuple(values)

    def score(self, values: Sequence[float]) -> float:
        """Return the mean."""
        return sum(values) / len(values)

    def resampled(self, values: Sequence[float], counts: Counts) -> list[float]:
        """Return the mean on each resample."""
        means: list[float] = (counts @ np.asarray(values, dtype=float) / len(values)).tolist()
        return means


@dataclass(frozen=True, slots=True)
class OfRecords:
    """No mean, but made from one record per example, so that examples can be resampled.

    Attributes:
        aggregate: Makes the score from records.
    """

    aggregate: Aggregate

    def block_size(self, n_examples: int, size: int) -> int:
        """Return all: the score of a few examples says little of that of all."""
        return n_examples

    def n_values(self, n_examples: int) -> int:
        """Return one for each example: its record."""
        return n_examples

    def n_observations(self, n_examples: int) -> int:
        """Return one: the score."""
        return 1

    def observations(self, values: Sequence[float]) -> tuple[float, ...]:
        """Return the score alone: a difference of records means nothing."""
        return (self.aggregate(values),)

    def score(self, values: Sequence[float]) -> float:
        """Return what the records come to."""
        return self.aggregate(values)

    def resampled(self, values: Sequence[float], counts: Counts) -> list[float]:
        """Return what each resample's records come to."""
        return [self.aggregate(np.repeat(values, drawn).tolist()) for drawn in counts]


@dataclass(frozen=True, slots=True)
class Whole:
    """One number for all examples at once; it cannot be resampled."""

    def block_size(self, n_examples: int, size: int) -> int:
        """Return all: there is one number for them."""
        return n_examples

    def n_values(self, n_examples: int) -> int:
        """Return one."""
        return 1

    def n_observations(self, n_examples: int) -> int:
        """Return one: the score."""
        return 1

    def observations(self, values: Sequence[float]) -> tuple[float, ...]:
        """Return the score."""
        return tuple(values)

    def score(self, values: Sequence[float]) -> float:
        """Return the one number."""
        [score] = values
        return score

    def resampled(self, values: Sequence[float], counts: Counts) -> list[float]:
        """Return the score for every resample: it stays what it is."""
        return [self.score(values)] * len(counts)
