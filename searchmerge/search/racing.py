"""Racing: stopping a candidate once its blocks say that it will not win."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.linalg import block_diag
from scipy.stats import norm

from searchmerge.execution.blocks import BlockKey, BlockValues
from searchmerge.search.objective import Objective
from searchmerge.search.schedule import Places
from searchmerge.search.unseen import Part, Prior, predict_rest

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PlanScores:
    """What a plan scored in full.

    Attributes:
        scores: Task name to score over all blocks.
        values: Task name to its observations, in the order of the task's blocks.
    """

    scores: Mapping[str, float]
    values: Mapping[str, Vector]


class Observed(NamedTuple):
    """What is seen of a candidate.

    Attributes:
        values: Its observations.
        shifts: Of blocks whose grades are read in a unit that is an estimate: by how much the
            observations grow where that is one standard error off, in all of a task at once.
    """

    values: BlockValues
    shifts: BlockValues = MappingProxyType({})


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
    those seen, by its differences from the incumbent, paired by example, and by how other plans
    that were scored in full differ from that (:func:`~searchmerge.search.unseen.predict_rest`);
    how far such predictions are off is tried on those plans.
    Where grades are read in a unit that is an estimate (:class:`Observed`), its error counts too.
    Examples on which plans differ come first, so the error falls fast; it is 0 at the end. The
    question is not whether the candidate is worse on other examples too, but whether it can
    still win on these.

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
        observed: Observed,
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


def n_seen(places: Places, observed: Observed) -> int:
    """Return on how many of the blocks of ``places`` a candidate was scored."""
    return sum(key in observed.values for blocks in places.values() for key in blocks)


def incumbent_of(plan: PlanScores, pool: Sequence[PlanScores], spread: float = 1.0) -> Incumbent:
    """Return ``plan`` with what is expected of a candidate's differences from it.

    Args:
        plan: What candidates are paired with.
        pool: Plans that were scored in full; ``plan`` itself counts for nothing.
        spread: As :class:`~searchmerge.search.unseen.Prior` has it.
    """
    others = [other for other in pool if other is not plan]
    differences = {
        task: np.array([other.values[task] - own for other in others]).reshape(-1, len(own))
        for task, own in plan.values.items()
    }
    return Incumbent(plan, replace(Prior.of(differences), spread=spread))


def predict(places: Places, observed: Observed, incumbent: Incumbent) -> Prediction:
    """Return what each task's score will be; tasks of which no block is seen are left out.

    Where grades are read in a unit that is an estimate, all of a task is off at once: what one
    standard error of it would make of the scores adds to their covariance.

    Args:
        places: Where the blocks' observations stand.
        observed: The candidate's observations so far.
        incumbent: What it is paired with.
    """
    plan, prior = incumbent
    parts = {t: _pair(blocks, observed.values, plan.values[t]) for t, blocks in places.items()}
    parts = {task: part for task, part in parts.items() if len(part.differences)}
    if not parts:
        return Prediction({}, np.zeros((0, 0)))
    rest = predict_rest(prior, parts)
    n_examples = np.array([len(part.seen) for part in parts.values()])
    scores = {
        task: plan.scores[task] + (float(part.differences.sum()) + float(more)) / len(part.seen)
        for (task, part), more in zip(parts.items(), rest.sums, strict=True)
    }
    shifts = block_diag(*(_shifts(places[task], observed) for task in parts))  # (n_seen, n_tasks)
    sums = np.array([part.differences.size for part in parts.values()])
    of_seen = np.repeat(np.eye(len(parts)), sums, axis=1)  # (n_tasks, n_seen)
    moved = (of_seen + rest.weights) @ shifts / n_examples[:, None]
    covariance = rest.covariance / np.outer(n_examples, n_examples)
    return Prediction(scores, covariance + moved @ moved.T)


def _pair(blocks: Mapping[BlockKey, slice], observed: BlockValues, theirs: Vector) -> Part:
    """Pair a task's observations with the incumbent's."""
    seen = np.zeros(len(theirs), dtype=bool)
    values: list[float] = []
    for key, place in blocks.items():
        if key in observed:
            seen[place] = True
            values += observed[key]
    return Part(seen, np.array(values) - theirs[seen])


def _shifts(blocks: Mapping[BlockKey, slice], observed: Observed) -> Vector:
    """Return the shifts of a task's observations, ``(n_seen, 1)``; 0 where they hang on none."""
    shifts: list[float] = []
    for key in blocks:
        if key in observed.values:
            shifts += observed.shifts.get(key) or [0.0] * len(observed.values[key])
    return np.array(shifts)[:, None]
