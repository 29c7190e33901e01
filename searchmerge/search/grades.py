r"""How clearly examples were answered, as far as it tells of the metric.

Right or wrong says little of one example: two merges of which one answers a little better agree
on nearly all. How clearly they answered differs on every example, but need not mean what the
metric means: a merge that is sure of everything is not right more often. So how much it counts is
learnt from the study's own plans: by how well one half of the examples tells the metric on the
other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

Vector = npt.NDArray[np.float64]

_N_SPLITS = 24
_WIDTHS = (2.0, 4.0)
_WEIGHTS = (0.5, 1.0)
_LEAST_PLANS = 5  # of fewer nothing is learnt


class Reading(NamedTuple):
    r"""How a task's examples are read.

    An example with value c and grade g counts as
    :math:`(1 - w)\,c + w\,(\Phi(g / (h s)) + b)`, where s is the plan's own median of
    :math:`|g|`: a plan that is twice as sure of everything is read the same.

    Attributes:
        weight: w, in [0, 1]; 0 is the metric alone.
        width: h, above 0: how soft the step is.
        offset: b: what makes the mean over the study's plans that of the metric.
        agreement: The correlation, over the plans, of the soft steps of one half of the examples
            with the metric on the other, in [-1, 1]; ``None`` where too few plans are known.
    """

    weight: float = 0.0
    width: float = 1.0
    offset: float = 0.0
    agreement: float | None = None

    def __call__(self, values: Vector, grades: Vector) -> Vector:
        """Return a plan's observations, ``(n,)``, from its values and grades."""
        if not self.weight or not len(grades):
            return values
        steps = soft(grades, self.width) + self.offset
        return (1 - self.weight) * values + self.weight * steps


METRIC = Reading()
"""The metric alone."""


@dataclass(frozen=True)
class Grader:
    """How every task's examples are read.

    Attributes:
        readings: Task to reading; a task that is left out is read by its metric.
    """

    readings: Mapping[str, Reading] = field(default_factory=dict)

    def observations(self, task: str, values: Sequence[float], grades: Sequence[float]) -> Vector:
        """Return a plan's observations on examples of a task."""
        reading = self.readings.get(task, METRIC)
        return reading(np.asarray(values, dtype=float), np.asarray(grades, dtype=float))


class Table(NamedTuple):
    """What plans scored on the same examples of a task.

    Attributes:
        values: ``(n_plans, n_examples)``.
        grades: The same shape.
    """

    values: Vector
    grades: Vector


def soft(grades: Vector, width: float) -> Vector:
    r"""Return :math:`\Phi(g / (h s))`, s the median of :math:`|g|` along the last axis."""
    scale = np.median(np.abs(grades), axis=-1, keepdims=True)
    steps: Vector = ndtr(grades / (width * np.maximum(scale, np.finfo(float).tiny)))
    return steps


def learn(table: Table, seed: int = 0) -> Reading:
    r"""Return the reading of one half of the examples that best tells the metric on the other.

    For a reading whose means over one half have, over the plans, the correlation r with the
    metric on the other half, on average over random halves, P plans have the log-likelihood
    :math:`-\frac P2 \log(1 - r^2)` under a linear relation. The reading with the largest is
    taken, the metric alone where none is ahead of it.

    Args:
        table: What plans scored on the examples that select, those of no other part.
        seed: Of the halves.
    """
    n_plans, n_examples = table.values.shape
    if n_plans < _LEAST_PLANS or n_examples < 4:
        return METRIC
    readings = [METRIC, *(Reading(w, h) for w in _WEIGHTS for h in _WIDTHS)]
    observed = [reading(table.values, table.grades) for reading in readings]
    generator = np.random.default_rng(seed)
    correlations = np.zeros(len(readings))
    for _ in range(_N_SPLITS):
        order = generator.permutation(n_examples)
        for half in (order[: n_examples // 2], order[n_examples // 2 :]):
            rest = np.setdiff1d(order, half)
            metric = table.values[:, rest].mean(1)
            correlations += [_correlation(o[:, half].mean(1), metric) for o in observed]
    r = np.clip(correlations / (2 * _N_SPLITS), 0.0, 1 - 1e-6)
    likelihoods = -0.5 * n_plans * np.log1p(-(r**2))
    chosen = readings[int(np.argmax(likelihoods))]
    offset = float((table.values - soft(table.grades, chosen.width)).mean())
    agreement = float(correlations[-1]) / (2 * _N_SPLITS)
    return chosen._replace(offset=offset if chosen.weight else 0.0, agreement=agreement)


def _correlation(one: Vector, other: Vector) -> float:
    one, other = one - one.mean(), other - other.mean()
    size = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / size if size else 0.0
