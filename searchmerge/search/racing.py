"""Racing: stopping a candidate once its blocks say that it will not win."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from searchmerge.evaluators.blocks import Block
from searchmerge.evaluators.evaluator import Part
from searchmerge.search.objective import Objective

Known = Mapping[tuple[str, Part, int], tuple[float, ...]]
"""Block key to what its examples scored."""

TaskBlocks = Mapping[str, Sequence[Block]]
"""Task name to all of its blocks."""

Vector = npt.NDArray[np.float64]
Spread = Mapping[str, Vector]
"""Task name to the squared difference from a rival that is expected of each example."""

_SHRINKAGE = 0.5  # how much of the difference seen is expected to go on in what is not seen yet
_PRIOR = 1.0  # weight of the expected spread beside that of the candidate's own blocks


@dataclass(frozen=True, slots=True)
class Rival:
    """A plan that was scored in full, to compare candidates with.

    Attributes:
        scores: Task name to score over all blocks.
        values: Task name to its values, in the order of the task's blocks.
    """

    scores: Mapping[str, float]
    values: Mapping[str, Vector]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a task's score will be over all blocks, from those known, paired with a rival's.

    Attributes:
        value: Expected score.
        se: Standard error of ``value``; 0 where every block is known.
    """

    value: float
    se: float


@dataclass(frozen=True, slots=True)
class Racing:
    r"""A paired sequential test of a candidate against what was scored in full.

    After every round the score that the candidate will have over all examples is predicted from
    those known. Their paired differences from the rival, :math:`d_e`, are certain. Of each example
    that is not known the expected squared difference :math:`v_e` is estimated from the plans that
    were scored in full; with :math:`V_k` and :math:`V_u` its sums over the known and the unknown,
    the unknown are expected to add :math:`\frac12 \frac{V_u}{V_k} \sum d_e`, with variance
    :math:`c V_u + (\frac12 \frac{V_u}{V_k})^2 \sum d_e^2`, where c is how far the candidate
    differs from the rival compared with what was expected, :math:`\sum d_e^2 / V_k`, drawn to 1.
    Examples on which plans differ come first, so the error falls fast; it is 0 at the end. The
    question is not whether the candidate is worse on other examples too, but whether it can still
    win on these.

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

    p_threshold: float = 0.05
    min_blocks: int = 6
    collapse_margin: float = 0.1

    def stops(
        self,
        objective: Objective,
        blocks: TaskBlocks,
        known: Known,
        rivals: Sequence[tuple[Rival, Spread]],
        base: tuple[Rival, Spread] | None,
    ) -> bool:
        """Return whether a candidate will not win.

        Args:
            objective: With the own experts' scores put in.
            blocks: All blocks of every task.
            known: What is known of the candidate.
            rivals: The best plan; with several objectives all plans of the front.
            base: The base model.
        """
        if base is not None:
            against = predict(blocks, known, *base)
            if (
                len(against) == len(blocks)
                and self._upper_mean(objective, against, base[0].scores) < -self.collapse_margin
            ):
                return True
        n_blocks = sum(block.key in known for own in blocks.values() for block in own)
        if n_blocks < self.min_blocks:
            return False
        return any(
            self._loses(objective, predict(blocks, known, rival, spread), rival)
            for rival, spread in rivals
            if objective.is_feasible(rival.scores)
        )

    def _loses(
        self, objective: Objective, predicted: Mapping[str, Prediction], rival: Rival
    ) -> bool:
        if self._breaks(objective, predicted):
            return True
        if objective.kind == "worst":
            bound = self._quantile(n_tests=len(objective.goals))
            worst = objective.scalar(rival.scores)
            return any(
                objective.normalised(task, p.value + bound * p.se) < worst
                for task, p in predicted.items()
            )
        if predicted.keys() != objective.goals.keys():
            return False  # a task of which nothing is known yet may still decide
        if objective.kind == "tasks":
            bound = self._quantile()
            gains = [p.value + bound * p.se - rival.scores[t] for t, p in predicted.items()]
            return max(gains) <= 0 and min(gains) < 0
        return self._upper_mean(objective, predicted, rival.scores) < 0

    def _breaks(self, objective: Objective, predicted: Mapping[str, Prediction]) -> bool:
        bound = self._quantile(n_tests=max(1, len(objective.constraints)))
        upper = {task: p.value + bound * p.se for task, p in predicted.items()}
        return any(
            constraint.task in upper and objective.violation(constraint, upper) > 0
            for constraint in objective.constraints
        )

    def _upper_mean(
        self,
        objective: Objective,
        predicted: Mapping[str, Prediction],
        rival_scores: Mapping[str, float],
    ) -> float:
        """Return the upper bound of the weighted mean, minus the rival's."""
        units = {task: objective.unit(task) for task in predicted}
        gain = sum(units[task] * (p.value - rival_scores[task]) for task, p in predicted.items())
        se = math.sqrt(sum((units[task] * p.se) ** 2 for task, p in predicted.items()))
        return float(gain + self._quantile() * se)

    def _quantile(self, n_tests: int = 1) -> float:
        """Return the normal quantile that bounds a prediction from above."""
        return float(norm.ppf(1 - self.p_threshold / n_tests))


def spread_of(pool: Sequence[Rival], rival: Rival) -> Spread:
    """Return the squared difference from ``rival`` that is expected of each example.

    The mean over the pool, with half an observation added of the largest difference that the
    task has: an example on which a few plans agree may still tell others apart.

    Args:
        pool: Plans that were scored in full; ``rival`` itself counts for nothing.
        rival: What candidates are paired with.
    """
    found = {}
    for task, own in rival.values.items():
        others = [plan.values[task] - own for plan in pool if plan is not rival]
        squares = np.array(others).reshape(-1, len(own)) ** 2
        largest = float(squares.max(initial=0.0)) or 1.0
        found[task] = (squares.sum(0) + 0.5 * largest) / (len(squares) + 1)
    return found


def predict(
    blocks: TaskBlocks, known: Known, rival: Rival, spread: Spread
) -> dict[str, Prediction]:
    """Return what each task's score will be; tasks of which no block is known are left out.

    Args:
        blocks: All blocks of every task.
        known: What is known of the candidate.
        rival: What it is paired with.
        spread: From :func:`spread_of`.
    """
    found = {}
    for task, own in blocks.items():
        theirs, expected = rival.values[task], spread[task]
        seen = np.zeros(len(theirs), dtype=bool)
        start = 0
        mine: list[float] = []
        for block in own:
            # a score that is no mean is one number for its one block
            end = start + len(block.examples) if len(own) > 1 else len(theirs)
            if block.key in known:
                seen[start:end] = True
                mine += known[block.key]
            start = end
        if mine:
            difference = np.array(mine) - theirs[seen]
            found[task] = _extrapolate(
                rival.scores[task], difference, expected[seen], expected[~seen]
            )
    return found


def _extrapolate(score: float, known: Vector, v_known: Vector, v_unknown: Vector) -> Prediction:
    """Return the prediction from the known differences and both parts' expected squares."""
    n_examples = len(v_known) + len(v_unknown)
    v_k, v_u, squares = float(v_known.sum()), float(v_unknown.sum()), float((known**2).sum())
    more = _SHRINKAGE * v_u / v_k
    scale = (squares + _PRIOR * v_k) / ((1 + _PRIOR) * v_k)
    gain = float(known.sum()) * (1 + more) / n_examples
    return Prediction(score + gain, math.sqrt(scale * v_u + more**2 * squares) / n_examples)
