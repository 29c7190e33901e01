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
_N_CLEAR = 32  # plans that tell which examples are answered more clearly than others
_STEPS = tuple((weight, width) for weight in (0.5, 1.0) for width in (1.0, 2.0))
_OF_STEPS = ((0.0, 1.0), *_STEPS)
"""Weight and width of each reading that is weighed up; the first is the metric alone."""

_LEAST_WEIGHT = 0.01  # less is none
_LEAST_PLANS = 5  # of fewer nothing is learnt
_CONTRADICTS = -0.2  # below this correlation with the metric grades say the opposite of it
_BEYOND_CHANCE = 3.0  # standard errors of a correlation by which that is certain


class Step(NamedTuple):
    r"""A part of what an example counts: :math:`w\,(\Phi(g / (h s)) + b)`.

    Attributes:
        weight: w, in [0, 1].
        width: h, above 0: how soft the step is.
        offset: b: what makes the mean over the study's plans that of the metric.
    """

    weight: float
    width: float
    offset: float


class Reading(NamedTuple):
    r"""How a task's examples are read.

    An example with value c and grade g counts as
    :math:`(1 - \sum w)\,c + \sum w\,(\Phi(g / (h s)) + b)`, where s is the plan's own median of
    :math:`|g|`: a plan that is twice as sure of everything is read the same. Of a plan that was
    scored on some of the examples, m being its median there, s is taken for :math:`m / q`, where
    other plans' medians are there q times those on all examples.

    Attributes:
        steps: What grades count; none is the metric alone.
        agreement: The correlation, over the plans, of soft steps on one half of the examples
            with the metric on the other, in [-1, 1]; ``None`` where too few plans are known, or
            all score the same.
    """

    steps: tuple[Step, ...]
    agreement: float | None

    @property
    def weight(self) -> float:
        """What grades count beside the metric, in [0, 1]."""
        return sum(step.weight for step in self.steps)

    @property
    def contradicts(self) -> bool:
        """Whether grades say the opposite of the metric, be it by chance."""
        return self.agreement is not None and self.agreement < _CONTRADICTS

    def __call__(self, values: Vector, grades: Vector, clarity: float = 1.0) -> Vector:
        """Return a plan's observations, ``(n,)``, from its values and grades.

        Args:
            values: Of some examples, ``(n,)``.
            grades: Of the same; none is the metric alone.
            clarity: How clearly these are answered beside all examples, above 0: q.
        """
        if not self.steps or not len(grades):
            return values
        read: Vector = (1 - self.weight) * values
        for weight, width, offset in self.steps:
            read = read + weight * (soft(grades, width / clarity) + offset)
        return read


METRIC = Reading((), None)
"""The metric alone."""


@dataclass(frozen=True)
class Grader:
    """How every task's examples are read.

    Attributes:
        readings: Task to reading; a task that is left out is read by its metric.
        sizes: Task to how large some plans' grades are of the examples that select,
            ``(n_plans, n)``.
    """

    readings: Mapping[str, Reading]
    sizes: Mapping[str, Vector] = field(default_factory=dict)

    def reading(self, task: str) -> Reading:
        """Return how a task's examples are read."""
        return self.readings.get(task, METRIC)

    def observations(
        self,
        task: str,
        values: Sequence[float],
        grades: Sequence[float],
        examples: Sequence[int] | None = None,
    ) -> Vector:
        """Return a plan's observations on examples of a task.

        Args:
            task: The task.
            values: Of its examples.
            grades: Of the same.
            examples: Which of those that select they are, by place; ``None`` for all of a part.
        """
        read = self.reading(task)
        clarity = 1.0 if examples is None else self.clarity(task, examples)
        return read(np.asarray(values, dtype=float), np.asarray(grades, dtype=float), clarity)

    def clarity(self, task: str, examples: Sequence[int]) -> float:
        """Return how large plans' median grade is on some examples, beside that on all.

        It is 1 where nothing is known of a task.
        """
        if task not in self.sizes:
            return 1.0
        sizes = self.sizes[task]
        some, every = np.median(sizes[:, examples], axis=1), np.median(sizes, axis=1)
        telling = (some > 0) & (every > 0)
        if not telling.any():
            return 1.0
        return float(np.exp(np.log(some[telling] / every[telling]).mean()))


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


def learn(tables: Mapping[str, Table], seed: int) -> Grader:
    r"""Return the readings of one half of the examples that best tell the metric on the other.

    A reading is the metric alone, or soft steps of some weight and width beside it. If its means
    over one half have, over P plans, the correlation r with the metric on the other half, on
    average over random halves, its log-likelihood under a linear relation is
    :math:`\ell = -\frac P2 \log(1 - r^2)`. Readings count by how far they are ahead of the metric:
    it counts 1, they count :math:`e^{\ell - \ell_0} - 1`, and nothing where that is negative.
    For a task :math:`\ell` is half its own and half the sum of all tasks'; but grades that
    contradict its metric beyond chance count nothing, however well they do elsewhere.

    Args:
        tables: Task to what plans scored on the examples that select, those of no other part.
        seed: Of the halves.
    """
    told = {task: _correlations(table, seed) for task, table in tables.items()}
    likelihoods = {
        task: -0.5 * len(tables[task].values) * np.log1p(-(np.clip(r, 0.0, 1 - 1e-6) ** 2))
        for task, r in told.items()
        if r is not None
    }
    of_all = np.sum(list(likelihoods.values()), axis=0)
    readings = {}
    for task, table in tables.items():
        r = told[task]
        if r is None:
            readings[task] = METRIC
            continue
        logs = (likelihoods[task] + of_all) / 2
        parts = np.expm1(np.maximum(0.0, logs - logs[0]))  # 0 of what is not ahead of the metric
        parts[0] = 1.0
        agreement = float(r[_OF_STEPS.index((1.0, 2.0))])
        reading = Reading((), agreement)
        if agreement > -_BEYOND_CHANCE / np.sqrt(len(table.values)):
            reading = reading._replace(steps=_steps(parts / parts.sum(), table))
        readings[task] = reading
    sizes = {task: np.abs(table.grades[-_N_CLEAR:]) for task, table in tables.items()}
    return Grader(readings, sizes)


def _steps(parts: Vector, table: Table) -> tuple[Step, ...]:
    """Return what readings come to that count by their parts; none where grades hardly count."""
    widths = sorted({width for _, width in _STEPS})
    weights = {
        h: float(sum(p * w for p, (w, width) in zip(parts, _OF_STEPS, strict=True) if width == h))
        for h in widths
    }
    if sum(weights.values()) < _LEAST_WEIGHT:
        return ()
    return tuple(
        Step(weight, h, float((table.values - soft(table.grades, h)).mean()))
        for h, weight in weights.items()
    )


def _correlations(table: Table, seed: int) -> Vector | None:
    """Return each reading's correlation with the metric on other examples, over the plans.

    ``None`` where too little is known to learn from, or the plans all score the same.
    """
    n_plans, n_examples = table.values.shape
    if n_plans < _LEAST_PLANS or n_examples < 4 or not np.ptp(table.values.mean(1)):
        return None
    steps = {width: soft(table.grades, width) for _, width in _STEPS}
    observed = [(1 - weight) * table.values + weight * steps[width] for weight, width in _OF_STEPS]
    generator = np.random.default_rng(seed)
    total = np.zeros(len(_OF_STEPS))
    for _ in range(_N_SPLITS):
        order = generator.permutation(n_examples)
        one, other = order[: n_examples // 2], order[n_examples // 2 :]
        for half, rest in ((one, other), (other, one)):
            metric = table.values[:, rest].mean(1)
            total += [_correlation(o[:, half].mean(1), metric) for o in observed]
    return total / (2 * _N_SPLITS)


def _correlation(one: Vector, other: Vector) -> float:
    one, other = one - one.mean(), other - other.mean()
    size = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / size if size else 0.0
