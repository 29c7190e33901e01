"""Racing: stopping a candidate once its blocks say that it will not win."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from searchmerge.execution.blocks import Block, Part
from searchmerge.search.objective import Objective

Known = Mapping[tuple[str, Part, int], tuple[float, ...]]
"""Block key to what its examples scored."""

TaskBlocks = Mapping[str, Sequence[Block]]
"""Task name to all of its blocks."""

Vector = npt.NDArray[np.float64]

_SHARED = 0.5  # part of the expected squares that is shared with other plans, in [0, 1)
_PRIOR = 1.0  # weight of the expected squares beside those of the candidate's own blocks


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
class Outlook:
    """What is expected of a candidate's differences from a rival, before it is scored.

    Attributes:
        squares: Task name to the squared difference expected of each example.
        others: Task name to how other plans differ from the rival, ``(n_plans, n_examples)``.
    """

    squares: Mapping[str, Vector]
    others: Mapping[str, Vector]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What tasks' scores will be over all blocks, from those known, paired with a rival's.

    Attributes:
        scores: Task name to the score expected; a task of which nothing is known is left out.
        covariance: Of the scores' errors, ``(n_tasks, n_tasks)``; 0 where every block is known.
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
    those known. Its differences from the rival, paired by example, are taken for a draw of a
    normal distribution of mean 0 and covariance
    :math:`\frac{\rho}{n} D^\top D + (1 - \rho) V + \sum_t u_t u_t^\top`. D holds how n other
    plans that were scored in full differ from the rival: an example that is not known is
    predicted from those on which other plans did alike, in any task. V (diagonal) holds the
    squares :math:`v_e` expected of each example, and :math:`\rho = \frac12`. With
    :math:`u_t = v / \sqrt{\sum v}` on the examples of task t a candidate may be better or worse
    in all of a task. The distribution of the rest, given what is known, has a closed form
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
        blocks: TaskBlocks,
        known: Known,
        rivals: Sequence[tuple[Rival, Outlook]],
        base: tuple[Rival, Outlook] | None,
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
                len(against.scores) == len(blocks)
                and self._upper_mean(objective, against, base[0].scores) < -self.collapse_margin
            ):
                return True
        n_blocks = sum(block.key in known for own in blocks.values() for block in own)
        if n_blocks < self.min_blocks:
            return False
        return any(
            self._loses(objective, predict(blocks, known, rival, outlook), rival)
            for rival, outlook in rivals
            if objective.is_feasible(rival.scores)
        )

    def _loses(self, objective: Objective, predicted: Prediction, rival: Rival) -> bool:
        if self._breaks(objective, predicted):
            return True
        if objective.kind == "worst":
            upper = predicted.upper(self._quantile(n_tests=len(objective.goals)))
            worst = objective.scalar(rival.scores)
            return any(objective.normalised(task, own) < worst for task, own in upper.items())
        if predicted.scores.keys() != objective.goals.keys():
            return False  # a task of which nothing is known yet may still decide
        if objective.kind == "tasks":
            upper = predicted.upper(self._quantile())
            gains = [own - rival.scores[task] for task, own in upper.items()]
            return max(gains) <= 0 and min(gains) < 0
        return self._upper_mean(objective, predicted, rival.scores) < 0

    def _breaks(self, objective: Objective, predicted: Prediction) -> bool:
        upper = predicted.upper(self._quantile(n_tests=max(1, len(objective.constraints))))
        return any(
            constraint.task in upper and objective.violation(constraint, upper) > 0
            for constraint in objective.constraints
        )

    def _upper_mean(
        self, objective: Objective, predicted: Prediction, rival_scores: Mapping[str, float]
    ) -> float:
        """Return the upper bound of the weighted mean, minus the rival's."""
        units = np.array([objective.unit(task) for task in predicted.scores])
        gains = np.array([own - rival_scores[task] for task, own in predicted.scores.items()])
        se = math.sqrt(max(0.0, units @ predicted.covariance @ units))
        return float(units @ gains + self._quantile() * se)

    def _quantile(self, n_tests: int = 1) -> float:
        """Return the normal quantile that bounds a prediction from above."""
        return float(norm.ppf(1 - self.p_threshold / n_tests))


def outlook_of(pool: Sequence[Rival], rival: Rival) -> Outlook:
    """Return what is expected of a candidate's differences from ``rival``.

    The squares are means over the pool, with one observation added of half the largest that the
    task has: an example on which a few plans agree may still tell others apart.

    Args:
        pool: Plans that were scored in full; ``rival`` itself counts for nothing.
        rival: What candidates are paired with.
    """
    squares, others = {}, {}
    for task, own in rival.values.items():
        found = [plan.values[task] - own for plan in pool if plan is not rival]
        others[task] = np.array(found).reshape(-1, len(own))
        seen = others[task] ** 2
        largest = float(seen.max(initial=0.0)) or 1.0
        squares[task] = (seen.sum(0) + 0.5 * largest) / (len(seen) + 1)
    return Outlook(squares, others)


def predict(blocks: TaskBlocks, known: Known, rival: Rival, outlook: Outlook) -> Prediction:
    r"""Return what each task's score will be; tasks of which no block is known are left out.

    The differences are :math:`F w + \varepsilon`, F from :func:`_factors`, w standard normal,
    :math:`\varepsilon` independent with variances :math:`s = (1 - \rho) v`. From the known d, with
    :math:`A = 1 + F_k^\top S_k^{-1} F_k`, w has mean :math:`A^{-1} F_k^\top S_k^{-1} d` and
    covariance :math:`A^{-1}`. What a task is still to add is the sum of its unknown rows of
    :math:`F w + \varepsilon`.

    Args:
        blocks: All blocks of every task.
        known: What is known of the candidate.
        rival: What it is paired with.
        outlook: From :func:`outlook_of`.
    """
    pairs = {task: _pair(own, known, rival.values[task]) for task, own in blocks.items()}
    pairs = {task: own for task, own in pairs.items() if len(own[1])}
    if not pairs:
        return Prediction({}, np.zeros((0, 0)))
    factors = _factors(outlook, list(pairs))
    noise = {task: (1 - _SHARED) * outlook.squares[task] for task in pairs}
    factor = np.concatenate([factors[task][seen] for task, (seen, _) in pairs.items()])
    variance = np.concatenate([noise[task][seen] for task, (seen, _) in pairs.items()])
    difference = np.concatenate([own for _, own in pairs.values()])
    scaled = factor / variance[:, None]  # S^-1 F, (n_known, n_plans + n_tasks)
    precision = np.eye(factor.shape[1]) + factor.T @ scaled
    rest = np.array([factors[task][~seen].sum(0) for task, (seen, _) in pairs.items()])
    solved = np.linalg.solve(precision, rest.T)  # (n_plans + n_tasks, n_tasks)
    more = solved.T @ (scaled.T @ difference)
    covariance = rest @ solved
    covariance += np.diag([noise[task][~seen].sum() for task, (seen, _) in pairs.items()])
    scales = [_scale(own, outlook.squares[task][seen]) for task, (seen, own) in pairs.items()]
    sizes = np.array([len(seen) for seen, _ in pairs.values()])
    scores = {
        task: rival.scores[task] + (float(own.sum()) + float(rest_of)) / len(seen)
        for (task, (seen, own)), rest_of in zip(pairs.items(), more, strict=True)
    }
    units = np.sqrt(scales) / sizes
    return Prediction(scores, covariance * np.outer(units, units))


def _pair(
    blocks: Sequence[Block], known: Known, theirs: Vector
) -> tuple[npt.NDArray[np.bool_], Vector]:
    """Return which of a task's values are known, and by how much they differ from a rival's."""
    seen = np.zeros(len(theirs), dtype=bool)
    mine: list[float] = []
    start = 0
    for block in blocks:
        # a score that is no mean is one number for its one block
        end = start + len(block.examples) if len(blocks) > 1 else len(theirs)
        if block.key in known:
            seen[start:end] = True
            mine += known[block.key]
        start = end
    return seen, np.array(mine) - theirs[seen]


def _factors(outlook: Outlook, tasks: Sequence[str]) -> dict[str, Vector]:
    r"""Return F of each task, ``(n_examples, n_plans + n_tasks)``.

    Its columns are :math:`\sqrt{\rho / n} D^\top`, and for each task
    :math:`v_e / \sqrt{\sum v_e}` on its examples: a candidate may be better or worse in all of a
    task, by as much as its examples come to by chance.
    """
    found = {}
    for i, task in enumerate(tasks):
        others, squares = outlook.others[task], outlook.squares[task]
        throughout = np.zeros((len(squares), len(tasks)))
        throughout[:, i] = squares / math.sqrt(squares.sum())
        alike = math.sqrt(_SHARED / max(1, len(others))) * others.T
        found[task] = np.concatenate([alike, throughout], axis=1)
    return found


def _scale(known: Vector, expected: Vector) -> float:
    """Return how large the squares of the known differences are for those expected."""
    squares, total = float((known**2).sum()), float(expected.sum())
    return (squares + _PRIOR * total) / ((1 + _PRIOR) * total)
