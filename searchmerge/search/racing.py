"""Racing: stopping a candidate once its blocks say that it will not win."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from searchmerge.evaluators.blocks import Block
from searchmerge.evaluators.evaluator import Part
from searchmerge.search.objective import Objective

Known = Mapping[tuple[str, Part, int], tuple[float, ...]]
"""Block key to what its examples scored."""

TaskBlocks = Mapping[str, Sequence[Block]]
"""Task name to all of its blocks."""


@dataclass(frozen=True, slots=True)
class Rival:
    """A plan that was scored in full, to compare candidates with.

    Attributes:
        scores: Task name to score over all blocks.
        known: What each block's examples scored.
    """

    scores: Mapping[str, float]
    known: Known


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a task's score will be over all blocks, from those known, paired with a rival's.

    Attributes:
        value: The rival's score plus the mean difference on the shared examples.
        se: Standard error of ``value``; 0 where every block is known.
        n_examples: Shared examples.
    """

    value: float
    se: float
    n_examples: int


@dataclass(frozen=True, slots=True)
class Racing:
    r"""A paired sequential test of a candidate against what was scored in full.

    After every round, the score that the candidate will have once all N examples of a task are
    known is predicted from the n that are: :math:`s_r + \bar d`, with the rival's score
    :math:`s_r` and the mean paired difference :math:`\bar d`, and the standard error
    :math:`\sigma_d \sqrt{1/n - 1/N}` of a sample drawn without replacement from a finite
    population. The error vanishes as n reaches N: the question is not whether the candidate is
    worse on other examples too, but whether it can still win here.

    A candidate is stopped when, with the confidence asked for,

    - the weighted mean (``normalised``, ``mean``) is below the best plan's;
    - one task alone is below the best plan's worst (``worst``);
    - a plan on the front is as good or better in every task (``tasks``);
    - it breaks a constraint that the best plan keeps;
    - it is below the base by ``collapse_margin``; decided from the first round on.

    Attributes:
        p_threshold: Probability of stopping at one look a candidate that would win, in (0, 1).
        min_blocks: Blocks that are scored before anything but a collapse is seen.
        collapse_margin: In units of the objective, 0 or more.
    """

    p_threshold: float = 0.01
    min_blocks: int = 6
    collapse_margin: float = 0.1

    def stops(
        self,
        objective: Objective,
        blocks: TaskBlocks,
        known: Known,
        rivals: Sequence[Rival],
        base: Rival | None,
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
            against = predict(blocks, known, base)
            if (
                len(against) == len(blocks)
                and self._upper_mean(objective, against, base.scores) < -self.collapse_margin
            ):
                return True
        n_blocks = sum(block.key in known for own in blocks.values() for block in own)
        if n_blocks < self.min_blocks:
            return False
        return any(
            self._loses(objective, predict(blocks, known, rival), rival)
            for rival in rivals
            if objective.is_feasible(rival.scores)
        )

    def _loses(
        self, objective: Objective, predicted: Mapping[str, Prediction], rival: Rival
    ) -> bool:
        if self._breaks(objective, predicted):
            return True
        if objective.kind == "worst":
            bound = self._quantile(predicted, n_tests=len(objective.goals))
            worst = objective.scalar(rival.scores)
            return any(
                objective.normalised(task, p.value + bound * p.se) < worst
                for task, p in predicted.items()
            )
        if predicted.keys() != objective.goals.keys():
            return False  # a task of which nothing is known yet may still decide
        if objective.kind == "tasks":
            bound = self._quantile(predicted)
            gains = [p.value + bound * p.se - rival.scores[t] for t, p in predicted.items()]
            return max(gains) <= 0 and min(gains) < 0
        return self._upper_mean(objective, predicted, rival.scores) < 0

    def _breaks(self, objective: Objective, predicted: Mapping[str, Prediction]) -> bool:
        bound = self._quantile(predicted, n_tests=max(1, len(objective.constraints)))
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
        return float(gain + self._quantile(predicted) * se)

    def _quantile(self, predicted: Mapping[str, Prediction], n_tests: int = 1) -> float:
        """Return the quantile of Student's t that bounds a prediction from above."""
        freedom = sum(p.n_examples - 1 for p in predicted.values())
        return float(student.ppf(1 - self.p_threshold / n_tests, max(1, freedom)))


def predict(blocks: TaskBlocks, known: Known, rival: Rival) -> dict[str, Prediction]:
    """Return what each task's score will be; tasks of which no block is known are left out.

    Args:
        blocks: All blocks of every task.
        known: What is known of the candidate.
        rival: What it is paired with.
    """
    found = {}
    for task, own in blocks.items():
        shared = [block.key for block in own if block.key in known]
        if not shared:
            continue
        mine = np.array([value for key in shared for value in known[key]])
        theirs = np.array([value for key in shared for value in rival.known[key]])
        n_all = sum(len(rival.known[block.key]) for block in own)
        difference, n = mine - theirs, len(mine)
        left = max(0.0, 1 / n - 1 / n_all)
        deviation = float(difference.std(ddof=1)) if n > 1 else math.inf if left else 0.0
        value = rival.scores[task] + float(difference.mean())
        found[task] = Prediction(value, deviation * math.sqrt(left) if left else 0.0, n)
    return found
