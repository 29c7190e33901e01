"""What a plan will do on examples that are not seen yet, by what it did on the others."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

_SHARED = 0.5  # part of the expected squares that is shared with other plans, in [0, 1)
_PRIOR = 1.0  # weight of the expected squares beside those of the plan's own examples
_TRIED_AT = (6, 3, 2)  # a prior is tried on one in so many of each task's examples
_TWINS = 0.1  # part of the mean squared distance of plans below which two are nearly one
_MOST_OFF = 4.0  # squared errors count up to this: a plan that collapsed is not what is predicted
_UNTRIED = 1.0  # weight, in plans, of the spread expected beside the spread found by trying


@dataclass(frozen=True, slots=True)
class Prior:
    """What is expected of a plan's differences from a reference point, before any is seen.

    Attributes:
        squares: Task name to the squared difference expected of each example.
        others: Task name to how other plans differ from that point, ``(n_plans, n)``.
        spread: What the covariance of predictions is multiplied by, above 0.
    """

    squares: Mapping[str, Vector]
    others: Mapping[str, Vector]
    spread: float = 1.0

    @classmethod
    def of(cls, others: Mapping[str, Vector]) -> "Prior":
        """Return what is expected of a plan by how other plans differ.

        The squares are means over those, with one added of half the largest that the task has:
        an example on which a few plans agree may still tell others apart.
        """
        squares = {}
        for task, differences in others.items():
            seen = differences**2
            largest = float(seen.max(initial=0.0)) or 1.0
            squares[task] = (seen.sum(0) + 0.5 * largest) / (len(seen) + 1)
        return cls(squares, others)

    def found_spread(self, units: Mapping[str, float]) -> float:
        r"""Return by how much predictions are off, squared, for what they say of that.

        Each of the other plans is predicted from the rest of them, seen on the first sixth, third
        and half of each task's examples; those that do nearly as it does are left out, as a plan
        that is new has no twin. With z its error in units of the standard error that it was
        predicted with, of all tasks together, the spread is the mean of :math:`\min(z^2, 4)` over
        the plans, and one plan more of which it is 1.

        Args:
            units: Task to what one of its examples counts for, in the objective.
        """
        weighted = [units[task] * others for task, others in self.others.items()]
        distances = _distances(np.concatenate(weighted, axis=1))
        total, count = _UNTRIED, _UNTRIED
        for i, squares in enumerate(distances):
            own = {task: others[i] for task, others in self.others.items()}
            if any(differences.any() for differences in own.values()):
                apart = squares > _TWINS * distances.mean()
                rest = Prior.of({task: others[apart] for task, others in self.others.items()})
                total += float(np.mean([_off(rest, own, units, part) for part in _TRIED_AT]))
                count += 1
        return total / count


class Part(NamedTuple):
    """Which of a task's examples are seen, and by how much a plan differs on those."""

    seen: npt.NDArray[np.bool_]
    differences: Vector


class Rest(NamedTuple):
    """What the examples of each task that are not seen come to.

    Attributes:
        sums: The sum expected of their differences, ``(n_tasks,)``.
        covariance: Of the sums' errors, ``(n_tasks, n_tasks)``; 0 where every example is seen.
        weights: By how much each sum grows with each difference that is seen,
            ``(n_tasks, n_seen)``.
    """

    sums: Vector
    covariance: Vector
    weights: Vector


def predict_rest(prior: Prior, parts: Mapping[str, Part]) -> Rest:
    r"""Return what the rest of each task comes to, of which something is seen.

    A plan's differences are taken for a draw of a normal distribution of mean 0 and covariance
    :math:`\frac{\rho}{n} D^\top D + (1 - \rho) V + \sum_t u_t u_t^\top`. D holds how n other
    plans differ: an example that is not seen is predicted from those on which other plans did
    alike, in any task. V (diagonal) holds the squares :math:`v_e` expected of each example, and
    :math:`\rho = \frac12`. With :math:`u_t = v / \sqrt{\sum v}` on the examples of task t a plan
    may differ in all of a task.

    So the differences are :math:`F w + \varepsilon`, F from :func:`_factors`, w standard normal,
    :math:`\varepsilon` independent with variances :math:`s = (1 - \rho) v`. From the seen d, with
    :math:`A = 1 + F_k^\top S_k^{-1} F_k`, w has mean :math:`A^{-1} F_k^\top S_k^{-1} d` and
    covariance :math:`A^{-1}`. What a task is still to add is the sum of its unseen rows of
    :math:`F w + \varepsilon`. The covariance is multiplied by the prior's spread, and by how far
    the plan differs in that task compared with what was expected, drawn to 1.

    Args:
        prior: What is expected.
        parts: Task to what is seen of it; one task or more.
    """
    factors = _factors(prior, parts)
    noise = {task: (1 - _SHARED) * prior.squares[task] for task in parts}
    factor = np.concatenate([factors[task][part.seen] for task, part in parts.items()])
    variance = np.concatenate([noise[task][part.seen] for task, part in parts.items()])
    difference = np.concatenate([part.differences for part in parts.values()])
    scaled = factor / variance[:, None]  # S^-1 F, (n_seen, n_plans + n_tasks)
    precision = np.eye(factor.shape[1]) + factor.T @ scaled
    rest = np.array([factors[task][~part.seen].sum(0) for task, part in parts.items()])
    solved = np.linalg.solve(precision, rest.T)  # (n_plans + n_tasks, n_tasks)
    weights = solved.T @ scaled.T
    covariance = rest @ solved
    covariance += np.diag([noise[task][~part.seen].sum() for task, part in parts.items()])
    units = [
        math.sqrt(_scale(part.differences, prior.squares[task][part.seen]))
        for task, part in parts.items()
    ]
    covariance *= prior.spread * np.outer(units, units)
    return Rest(weights @ difference, covariance, weights)


def _distances(differences: Vector) -> Vector:
    """Return the squared distance of any two plans, ``(n_plans, n_plans)``."""
    products = differences @ differences.T
    squares = np.diag(products)
    distances: Vector = np.maximum(0.0, squares[:, None] + squares - 2 * products)
    return distances


def _off(
    prior: Prior, differences: Mapping[str, Vector], units: Mapping[str, float], part: int
) -> float:
    """Return the squared error of a prediction from one in ``part`` examples, for its variance."""
    parts = {}
    for task, own in differences.items():
        seen = np.arange(len(own)) < max(1, len(own) // part)
        parts[task] = Part(seen, own[seen])
    rest = predict_rest(prior, parts)
    weights = np.array([units[task] for task in parts])
    unseen = [float(own[~parts[task].seen].sum()) for task, own in differences.items()]
    error = float(weights @ (np.array(unseen) - rest.sums))
    variance = float(weights @ rest.covariance @ weights)
    return min(_MOST_OFF, error**2 / variance) if variance > 0 else 1.0


def _factors(prior: Prior, parts: Mapping[str, Part]) -> dict[str, Vector]:
    r"""Return F of each task, ``(n, n_plans + n_tasks)``.

    Its columns are :math:`\sqrt{\rho / n} D^\top`, and for each task
    :math:`v_e / \sqrt{\sum v_e}` on its examples: a plan may differ in all of a task, by as much
    as its examples come to by chance.
    """
    factors = {}
    for i, task in enumerate(parts):
        others, squares = prior.others[task], prior.squares[task]
        throughout = np.zeros((len(squares), len(parts)))
        throughout[:, i] = squares / math.sqrt(squares.sum())
        alike = math.sqrt(_SHARED / max(1, len(others))) * others.T
        factors[task] = np.concatenate([alike, throughout], axis=1)
    return factors


def _scale(differences: Vector, expected: Vector) -> float:
    """Return how large the squares of the differences are for those expected."""
    squares, total = float((differences**2).sum()), float(expected.sum())
    return (squares + _PRIOR * total) / ((1 + _PRIOR) * total)
