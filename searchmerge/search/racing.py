"""Racing: stopping a candidate once its blocks say that it will not win."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from searchmerge.execution.blocks import BlockKey, BlockValues
from searchmerge.search.objective import Objective
from searchmerge.search.schedule import Places

Vector = npt.NDArray[np.float64]

_SHARED = 0.5  # part of the expected squares that is shared with other plans, in [0, 1)
_PRIOR = 1.0  # weight of the expected squares beside those of the candidate's own blocks


@dataclass(frozen=True, slots=True)
class PlanScores:
    """What a plan scored in full.

    Attributes:
        scores: Task name to score over all blocks.
        values: Task name to its observations, in the order of the task's blocks.
    """

    scores: Mapping[str, float]
    values: Mapping[str, Vector]


@dataclass(frozen=True, slots=True)
class Prior:
    """What is expected of a candidate's differences from an incumbent, before it is scored.

    Attributes:
        squares: Task name to the squared difference expected of each observation.
        others: Task name to how other plans differ from the incumbent, ``(n_plans, n)``.
    """

    squares: Mapping[str, Vector]
    others: Mapping[str, Vector]


class Incumbent(NamedTuple):
    """A plan that candidates are compared with, and what is expected of the differences."""

    plan: PlanScores
    prior: Prior


@dataclass(frozen=True, slots=True)
class Prediction:
    """What tasks' scores will be over all blocks, from those seen, paired with an incumbent's.

    Attributes:
        scores: Task name to the score expected; a task of which nothing is seen is left out.
        covariance: Of the scores' errors, ``(n_tasks, n_tasks)``; 0 where every block is seen.
    """

    scores: Mapping[str, float]
    covariance: Vector

    def upper(self, quantile: float) -> dict[str, float]:
        """Return each task's score plus ``quantile`` standard errors."""
        errors = np.sqrt(np.diag(self.covariance))
        return {
            task: score + quantile * float(error)
            for (task, score), error in zip(self.scores.items(), errors, strict=True)
        }


@dataclass(frozen=True, slots=True)
class Racing:
    r"""A paired sequential test of a candidate against what was scored in full.

    After every round the score that the candidate will have over all examples is predicted from
    those seen. Its differences from the incumbent, paired by example, are taken for a draw of a
    normal distribution of mean 0 and covariance
    :math:`\frac{\rho}{n} D^\top D + (1 - \rho) V + \sum_t u_t u_t^\top`. D holds how n other
    plans that were scored in full differ from the incumbent: an example that is not seen is
    predicted from those on which other plans did alike, in any task. V (diagonal) holds the
    squares :math:`v_e` expected of each example, and :math:`\rho = \frac12`. With
    :math:`u_t = v / \sqrt{\sum v}` on the examples of task t a candidate may be better or worse
    in all of a task. The distribution of the rest, given what is seen, has a closed form
    (:func:`predict`); its covariance is multiplied by how far the candidate differs in that task
    compared with what was expected, drawn to 1. Examples on which plans differ come first, so
    the error falls fast; it is 0 at the end. The question is not whether the candidate is worse
    on other examples too, but whether it can still win on these.

    A candidate is stopped when, with the confidence asked for,

    - the weighted mean (``normalised``, ``mean``) is below the best plan's;
    - one task alone is below the best plan's worst (``worst``);
    - a plan on the front is as good or better in every task (``tasks``);
    - it breaks a constraint that the best plan keeps;
    - it is below the base by ``collapse_margin``; decided from the first round on.

    Attributes:
        p_threshold: Probability of stopping at one look a candidate that would win, in (0, 0.5).
        min_blocks: Blocks that are scored before anything but a collapse is seen.
        collapse_margin: In units of the objective, 0 or more.
    """

    p_threshold: float = 0.03
    min_blocks: int = 6
    collapse_margin: float = 0.1

    def stops(
        self,
        objective: Objective,
        places: Places,
        observed: BlockValues,
        incumbents: Sequence[Incumbent],
        base: Incumbent | None,
    ) -> bool:
        """Return whether a candidate will not win.

        Args:
            objective: With the experts' scores put in.
            places: Where the blocks' observations stand.
            observed: The candidate's observations so far.
            incumbents: The best plan; with several objectives all plans of the front.
            base: The base model.
        """
        if base is not None:
            against = predict(places, observed, base)
            if (
                len(against.scores) == len(places)
                and self._upper_mean(objective, against, base.plan.scores) < -self.collapse_margin
            ):
                return True
        if n_seen(places, observed) < self.min_blocks:
            return False
        return any(
            self._loses(objective, predict(places, observed, incumbent), incumbent.plan)
            for incumbent in incumbents
            if objective.is_feasible(incumbent.plan.scores)
        )

    def _loses(self, objective: Objective, predicted: Prediction, best: PlanScores) -> bool:
        if self._breaks(objective, predicted):
            return True
        if objective.kind == "worst":
            upper = predicted.upper(self._quantile(n_tests=len(objective.goals)))
            worst = objective.scalar(best.scores)
            return any(objective.normalised(task, bound) < worst for task, bound in upper.items())
        if predicted.scores.keys() != objective.goals.keys():
            return False  # a task of which nothing is seen yet may still decide
        if objective.kind == "tasks":
            upper = predicted.upper(self._quantile())
            gains = [bound - best.scores[task] for task, bound in upper.items()]
            return max(gains) <= 0 and min(gains) < 0
        return self._upper_mean(objective, predicted, best.scores) < 0

    def _breaks(self, objective: Objective, predicted: Prediction) -> bool:
        upper = predicted.upper(self._quantile(n_tests=max(1, len(objective.constraints))))
        return any(
            constraint.task in upper and objective.violation(constraint, upper) > 0
            for constraint in objective.constraints
        )

    def _upper_mean(
        self, objective: Objective, predicted: Prediction, against: Mapping[str, float]
    ) -> float:
        """Return the upper bound of the weighted mean, minus that of the scores ``against``."""
        units = np.array([objective.unit(task) for task in predicted.scores])
        gains = np.array([score - against[task] for task, score in predicted.scores.items()])
        se = math.sqrt(max(0.0, units @ predicted.covariance @ units))
        return float(units @ gains + self._quantile() * se)

    def _quantile(self, n_tests: int = 1) -> float:
        """Return the normal quantile that bounds a prediction from above."""
        return float(norm.ppf(1 - self.p_threshold / n_tests))


def n_seen(places: Places, observed: BlockValues) -> int:
    """Return on how many of the blocks of ``places`` a candidate was scored."""
    return sum(key in observed for blocks in places.values() for key in blocks)


def incumbent_of(plan: PlanScores, pool: Sequence[PlanScores]) -> Incumbent:
    """Return ``plan`` with what is expected of a candidate's differences from it.

    The squares are means over the pool, with one observation added of half the largest that the
    task has: an example on which a few plans agree may still tell others apart.

    Args:
        plan: What candidates are paired with.
        pool: Plans that were scored in full; ``plan`` itself counts for nothing.
    """
    squares, others = {}, {}
    for task, values in plan.values.items():
        differences = [other.values[task] - values for other in pool if other is not plan]
        others[task] = np.array(differences).reshape(-1, len(values))
        seen = others[task] ** 2
        largest = float(seen.max(initial=0.0)) or 1.0
        squares[task] = (seen.sum(0) + 0.5 * largest) / (len(seen) + 1)
    return Incumbent(plan, Prior(squares, others))


class _Paired(NamedTuple):
    """Which of a task's observations are seen, and by how much those differ."""

    seen: npt.NDArray[np.bool_]
    differences: Vector


def predict(places: Places, observed: BlockValues, incumbent: Incumbent) -> Prediction:
    r"""Return what each task's score will be; tasks of which no block is seen are left out.

    The differences are :math:`F w + \varepsilon`, F from :func:`_factors`, w standard normal,
    :math:`\varepsilon` independent with variances :math:`s = (1 - \rho) v`. From the seen d, with
    :math:`A = 1 + F_k^\top S_k^{-1} F_k`, w has mean :math:`A^{-1} F_k^\top S_k^{-1} d` and
    covariance :math:`A^{-1}`. What a task is still to add is the sum of its unseen rows of
    :math:`F w + \varepsilon`.

    Args:
        places: Where the blocks' observations stand.
        observed: The candidate's observations so far.
        incumbent: What it is paired with.
    """
    plan, prior = incumbent
    pairs = {t: _pair(blocks, observed, plan.values[t]) for t, blocks in places.items()}
    pairs = {task: pair for task, pair in pairs.items() if len(pair.differences)}
    if not pairs:
        return Prediction({}, np.zeros((0, 0)))
    factors = _factors(prior, list(pairs))
    noise = {task: (1 - _SHARED) * prior.squares[task] for task in pairs}
    factor = np.concatenate([factors[task][pair.seen] for task, pair in pairs.items()])
    variance = np.concatenate([noise[task][pair.seen] for task, pair in pairs.items()])
    difference = np.concatenate([pair.differences for pair in pairs.values()])
    scaled = factor / variance[:, None]  # S^-1 F, (n_seen, n_plans + n_tasks)
    precision = np.eye(factor.shape[1]) + factor.T @ scaled
    rest = np.array([factors[task][~pair.seen].sum(0) for task, pair in pairs.items()])
    solved = np.linalg.solve(precision, rest.T)  # (n_plans + n_tasks, n_tasks)
    more = solved.T @ (scaled.T @ difference)
    covariance = rest @ solved
    covariance += np.diag([noise[task][~pair.seen].sum() for task, pair in pairs.items()])
    scores = {
        task: plan.scores[task] + (float(pair.differences.sum()) + float(rest_of)) / len(pair.seen)
        for (task, pair), rest_of in zip(pairs.items(), more, strict=True)
    }
    units = [
        math.sqrt(_scale(pair.differences, prior.squares[task][pair.seen])) / len(pair.seen)
        for task, pair in pairs.items()
    ]
    return Prediction(scores, covariance * np.outer(units, units))


def _pair(blocks: Mapping[BlockKey, slice], observed: BlockValues, theirs: Vector) -> _Paired:
    """Pair a task's observations with the incumbent's."""
    seen = np.zeros(len(theirs), dtype=bool)
    values: list[float] = []
    for key, place in blocks.items():
        if key in observed:
            seen[place] = True
            values += observed[key]
    return _Paired(seen, np.array(values) - theirs[seen])


def _factors(prior: Prior, tasks: Sequence[str]) -> dict[str, Vector]:
    r"""Return F of each task, ``(n, n_plans + n_tasks)``.

    Its columns are :math:`\sqrt{\rho / n} D^\top`, and for each task
    :math:`v_e / \sqrt{\sum v_e}` on its examples: a candidate may be better or worse in all of a
    task, by as much as its examples come to by chance.
    """
    factors = {}
    for i, task in enumerate(tasks):
        others, squares = prior.others[task], prior.squares[task]
        throughout = np.zeros((len(squares), len(tasks)))
        throughout[:, i] = squares / math.sqrt(squares.sum())
        alike = math.sqrt(_SHARED / max(1, len(others))) * others.T
        factors[task] = np.concatenate([alike, throughout], axis=1)
    return factors


def _scale(differences: Vector, expected: Vector) -> float:
    """Return how large the squares of the differences are for those expected."""
    squares, total = float((differences**2).sum()), float(expected.sum())
    return (squares + _PRIOR * total) / ((1 + _PRIOR) * total)
