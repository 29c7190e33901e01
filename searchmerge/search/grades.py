r"""How clearly examples were answered, as far as it tells of the metric.

Right or wrong says little of one example: two merges of which one answers a little better agree
on nearly all. How clearly they answered differs on every example, but need not mean what the
metric means: a merge that is sure of everything is not right more often. So how much it counts is
learnt from the study's own plans: by how well one half of the examples tells the metric on the
other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from searchmerge.search.unseen import Part, Prior, predict_rest

Vector = npt.NDArray[np.float64]

_N_SPLITS = 24
_N_CLEAR = 32  # plans that tell how clearly examples are answered
_STEPS = tuple((weight, width) for weight in (0.5, 1.0) for width in (1.0, 2.0))
_OF_STEPS = ((0.0, 1.0), *_STEPS)
"""Weight and width of each reading that is weighed up; the first is the metric alone."""

_LEAST_WEIGHT = 0.01  # less is none
_LEAST_PLANS = 5  # of fewer nothing is learnt
_LEAST_EXAMPLES = 4  # of either half, for a plan that was stopped early to tell
_UNTOLD = 3.0  # logarithm of a factor by which a unit may be off of which nothing is known
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
    :math:`(1 - \sum w)\,c + \sum w\,(\Phi(g / (h s)) + b)`, where s is the plan's own unit, the
    square of the mean of :math:`\sqrt{|g|}`: a plan that is twice as sure of everything is read
    the same. A mean, as what it is over all examples is predicted well from some of them.

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

    def __call__(self, values: Vector, grades: Vector, size: float | None = None) -> Vector:
        """Return a plan's observations, ``(n,)``, from its values and grades.

        Args:
            values: Of some examples, ``(n,)``.
            grades: Of the same; none is the metric alone.
            size: The plan's unit s; ``None`` for that of these grades.
        """
        if not self.steps or not len(grades):
            return values
        read: Vector = (1 - self.weight) * values
        for weight, width, offset in self.steps:
            read = read + weight * (soft(grades, width, size) + offset)
        return read


METRIC = Reading((), None)
"""The metric alone."""


class Unit(NamedTuple):
    """How large a plan's grades of all examples are, as far as some tell.

    Attributes:
        size: What its unit is taken for, 0 or more.
        error: Standard error of the logarithm of that.
    """

    size: float
    error: float


class Sizes(NamedTuple):
    r"""How large grades are of the examples that select: the roots :math:`\sqrt{|g|}`.

    Attributes:
        usual: Task to the mean of each example over the merges, ``(n,)``.
        prior: How plans differ from that.
    """

    usual: Mapping[str, Vector]
    prior: Prior


class Graded(NamedTuple):
    """What is seen of a plan's grades of a task.

    Attributes:
        places: Which of the examples that select they are of.
        grades: Of these.
    """

    places: Sequence[int]
    grades: Sequence[float]


class Read(NamedTuple):
    """What a plan's examples count as.

    Attributes:
        values: Its observations, ``(n,)``.
        shifts: By how much they grow where its unit is one standard error smaller than it is
            taken for, ``(n,)``.
    """

    values: Vector
    shifts: Vector


@dataclass(frozen=True)
class Grader:
    """How every task's examples are read.

    Attributes:
        readings: Task to reading; a task that is left out is read by its metric.
        sizes: How large some plans' grades are; ``None`` where that is not known.
    """

    readings: Mapping[str, Reading]
    sizes: Sizes | None = None

    def reading(self, task: str) -> Reading:
        """Return how a task's examples are read."""
        return self.readings.get(task, METRIC)

    def read(
        self,
        task: str,
        values: Sequence[float],
        grades: Sequence[float],
        unit: Unit | None = None,
    ) -> Read:
        """Return what a plan's examples of a task count as.

        Args:
            task: The task.
            values: Of its examples.
            grades: Of the same.
            unit: What the plan's unit is taken for; ``None`` for that of these grades.
        """
        reading = self.reading(task)
        c, g = np.asarray(values, dtype=float), np.asarray(grades, dtype=float)
        if unit is None:
            return Read(reading(c, g), np.zeros(len(c)))
        size, error = unit
        less, more = (reading(c, g, size * np.exp(by)) for by in (-error, error))
        return Read(reading(c, g, size), (less - more) / 2)

    def units(self, seen: Mapping[str, Graded]) -> dict[str, Unit]:
        r"""Return what a plan's units are taken for, of each task of which some is seen.

        The mean of :math:`\sqrt{|g|}` is predicted like a score: from the roots that are seen, and
        how those of other plans hang together. Tasks of which nothing is known are left out.
        """
        if self.sizes is None:
            return {}
        usual, prior = self.sizes
        parts = {}
        for task, (places, grades) in seen.items():
            if task in usual:
                mask = np.zeros(len(usual[task]), dtype=bool)
                mask[places] = True
                roots = np.full(len(mask), np.nan)
                roots[places] = np.sqrt(np.abs(grades))
                parts[task] = Part(mask, (roots - usual[task])[mask])
        if not parts:
            return {}
        rest = predict_rest(prior, parts)
        units = {}
        for (task, part), more, variance in zip(
            parts.items(), rest.sums, np.diag(rest.covariance), strict=True
        ):
            n_examples = len(part.seen)
            so_far = float((part.differences + usual[task][part.seen]).sum())
            total = max(so_far, so_far + float(usual[task][~part.seen].sum()) + float(more))
            error = 2 * math.sqrt(max(0.0, variance)) / total if total else 0.0
            units[task] = Unit((total / n_examples) ** 2, min(_UNTOLD, error))
        return units


class Table(NamedTuple):
    """What plans scored on the examples of a task.

    Attributes:
        values: ``(n_plans, n_examples)``; NaN where a plan was not scored, in the grades too.
            A plan may have been scored on none of them.
        grades: The same shape.
    """

    values: Vector
    grades: Vector

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Where plans were scored, of the same shape."""
        return ~np.isnan(self.values)

    @property
    def full(self) -> "Table":
        """Those plans that were scored on all."""
        is_full = self.known.all(1)
        return Table(self.values[is_full], self.grades[is_full])


def soft(grades: Vector, width: float, size: float | Vector | None = None) -> Vector:
    r"""Return :math:`\Phi(g / (h s))`.

    Args:
        grades: g, of any shape.
        width: h.
        size: s, that goes with their shape; ``None`` for that of the grades along the last axis:
            the square of the mean of :math:`\sqrt{|g|}`.
    """
    scale = np.sqrt(np.abs(grades)).mean(-1, keepdims=True) ** 2 if size is None else size
    steps: Vector = ndtr(grades / (width * np.maximum(scale, np.finfo(float).tiny)))
    return steps


def learn(
    tables: Mapping[str, Table], seed: int, extremes: Mapping[str, Vector] | None = None
) -> Grader:
    r"""Return the readings of one half of the examples that best tell the metric on the other.

    A reading is the metric alone, or soft steps of some weight and width beside it. If its means
    over one half have, over P plans, the correlation r with the metric on the other half, on
    average over random halves, its log-likelihood under a linear relation is
    :math:`\ell = -\frac P2 \log(1 - r^2)`. Readings count by how far they are ahead of the metric:
    it counts 1, they count :math:`e^{\ell - \ell_0} - 1`, and nothing where that is negative.
    For a task :math:`\ell` is half its own and half the sum of all tasks'; but grades that
    contradict its metric beyond chance count nothing, however well they do elsewhere. A plan that
    was stopped early tells by the examples that it was scored on.

    Args:
        tables: Task to what plans scored on the examples that select, those of no other part;
            the same plans for every task.
        seed: Of the halves.
        extremes: Task to the grades of the base and the experts on the same examples,
            ``(n_plans, n)``, the same plans for every task: of their metric nothing is learnt,
            but how clearly a merge answers an example is in between.
    """
    told = {task: _correlations(table, seed) for task, table in tables.items()}
    likelihoods = {
        task: -0.5 * its.n_plans * np.log1p(-(np.clip(its.r, 0.0, 1 - 1e-6) ** 2))
        for task, its in told.items()
        if its is not None
    }
    of_all = np.sum(list(likelihoods.values()), axis=0)
    readings = {}
    for task, table in tables.items():
        its = told[task]
        if its is None:
            readings[task] = METRIC
            continue
        logs = (likelihoods[task] + of_all) / 2
        parts = np.expm1(np.maximum(0.0, logs - logs[0]))  # 0 of what is not ahead of the metric
        parts[0] = 1.0
        agreement = float(its.r[_OF_STEPS.index((1.0, 2.0))])
        reading = Reading((), agreement)
        if agreement > -_BEYOND_CHANCE / np.sqrt(its.n_plans):
            reading = reading._replace(steps=_steps(parts / parts.sum(), table.full))
        readings[task] = reading
    return Grader(readings, _sizes(tables, extremes or {}))


def _sizes(tables: Mapping[str, Table], extremes: Mapping[str, Vector]) -> Sizes | None:
    """Return how large plans' grades are; ``None`` where there are none.

    Of plans that were scored on all of every task, so that rows are the same plans in each.
    """
    if not tables:
        return None
    is_full = np.all([table.known.all(1) for table in tables.values()], axis=0)
    if not is_full.any():
        return None
    usual, others = {}, {}
    for task, table in tables.items():
        roots = np.sqrt(np.abs(table.grades[is_full][-_N_CLEAR:]))
        usual[task] = roots.mean(0)
        beside = np.sqrt(np.abs(extremes.get(task, np.empty((0, roots.shape[1])))))
        others[task] = np.concatenate([roots, beside]) - usual[task]
    return Sizes(usual, Prior.of(others))


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


class _Told(NamedTuple):
    """How readings of one half of the examples tell the metric on the other.

    Attributes:
        r: Each reading's correlation with it over the plans, the mean over the halves.
        n_plans: How many plans that was over, on average.
    """

    r: Vector
    n_plans: float


def _correlations(table: Table, seed: int) -> _Told | None:
    """Return each reading's correlation with the metric on other examples, over the plans.

    ``None`` where too little is known to learn from, or the plans all score the same.
    """
    known, full = table.known, table.full
    n_plans, n_examples = full.values.shape
    if n_plans < _LEAST_PLANS or n_examples < 4 or not np.ptp(full.values.mean(1)):
        return None
    sizes = _sizes_of(table)
    steps = {width: soft(table.grades, width, sizes) for _, width in _STEPS}
    observed = [(1 - weight) * table.values + weight * steps[width] for weight, width in _OF_STEPS]
    is_full = known.all(1)  # what is hard for all is no difference where some are not seen
    differences = [np.where(known, o - o[is_full].mean(0), 0.0) for o in observed]
    generator = np.random.default_rng(seed)
    total, n_told = np.zeros(len(_OF_STEPS)), 0
    for _ in range(_N_SPLITS):
        order = generator.permutation(n_examples)
        halves = [order[: n_examples // 2], order[n_examples // 2 :]]
        n_known = [known[:, half].sum(1) for half in halves]
        is_told = np.minimum(*n_known) >= min(_LEAST_EXAMPLES, n_examples // 2)
        n_told += int(is_told.sum())
        means = [
            [d[is_told][:, half].sum(1) / n[is_told] for d in differences]
            for half, n in zip(halves, n_known, strict=True)
        ]
        for by_half, [metric, *_] in (means, means[::-1]):
            total += [_correlation(mean, metric) for mean in by_half]
    return _Told(total / (2 * _N_SPLITS), n_told / _N_SPLITS)


def _sizes_of(table: Table) -> Vector:
    """Return each plan's unit, ``(n_plans, 1)``, as the examples tell that it was scored on.

    A plan that answers as clearly as plans usually do where it was scored does so elsewhere.
    """
    known, roots = table.known, np.sqrt(np.abs(table.grades))
    usual = np.sqrt(np.abs(table.full.grades)).mean(0)
    expected = np.where(known, usual, 0.0).sum(1)
    told = np.where(known, roots, 0.0).sum(1)
    clear = np.divide(told, expected, out=np.ones_like(told), where=expected > 0)
    sizes: Vector = (clear * usual.mean())[:, None] ** 2
    return sizes


def _correlation(one: Vector, other: Vector) -> float:
    one, other = one - one.mean(), other - other.mean()
    size = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / size if size else 0.0
