"""Electing signs: entries of several task vectors agree on one, and those that differ are left."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from searchmerge.merging.kernels import (
    add_scaled,
    add_up,
    add_up_,
    exact_sum,
    is_positive,
    is_zero,
    weighted_sum,
)

if TYPE_CHECKING:
    from searchmerge.merging.method import Pass

_SMALLEST = float(np.finfo(np.float32).smallest_subnormal)


class ElectionScalars(Protocol):
    """What an election reads of a method's scalars, ``(n_experts,)`` each."""

    @property
    def coefficients(self) -> Tensor:
        """The factor on what agrees."""

    @property
    def majority(self) -> Tensor:
        """The sign of a zero sum, for all alike: 1, -1, or 0."""

    @property
    def bound(self) -> Tensor:
        """What :func:`positive_bound` returns of it, for all alike."""


def merge_elected(
    deltas: Sequence[Tensor], scalars: ElectionScalars, aggregate: str
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Elect signs and merge (Yadav et al., 2023, arXiv:2306.01708, Algorithm 1, steps 2 and 3).

    .. math:: \tau_m = \frac{1}{|A|} \sum_{t \in A} \lambda_t \tau_t, \qquad
              A = \{t : \operatorname{sgn} \tau_t = \operatorname{sgn} \sum_s \tau_s\}

    Args:
        deltas: What is left of each task vector, ``(m,)`` float32; overwritten.
        scalars: The coefficients, and what a zero sum becomes.
        aggregate: ``mean`` of those that agree, their ``sum``, or the ``max`` in magnitude.

    Returns:
        The merged task vector ``(m,)``, 0 where nothing is left; and two tallies: entries elected
        positive minus negative; and a number above 0 if there is a zero sum of entries that are
        not 0.
    """
    if torch.compiler.is_compiling() and aggregate != "max":
        return _merge_chosen(deltas, scalars, is_mean=aggregate == "mean")
    signs, zeros, balance = _elect(add_up(deltas), scalars.majority[0])
    agreeing = [delta.mul_(signs).relu_() for delta in deltas]  # magnitudes
    if aggregate == "max":
        merged = _largest(agreeing, scalars.coefficients)
    else:
        merged = agreeing[0] * scalars.coefficients[0]
        for i, magnitude in enumerate(agreeing[1:], start=1):
            merged = add_scaled(merged, magnitude, scalars.coefficients[i])
    n_agreeing = add_up_([is_positive(magnitude) for magnitude in agreeing])
    ambiguous = exact_sum(zeros.mul_(n_agreeing))
    if aggregate == "mean":
        merged = merged.div_(n_agreeing.sub_(1.0).relu_().add_(1.0))
    return merged.mul_(signs), balance, ambiguous


def positive_bound(majority: float) -> float:
    """Return the bound that a sum has to be above to be elected positive.

    Args:
        majority: The sign of a zero sum: 1, -1, or 0.
    """
    return -_SMALLEST if majority > 0 else 0.0


def _merge_chosen(
    deltas: Sequence[Tensor], scalars: ElectionScalars, *, is_mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`merge_elected` does with as few operations as can be: it is compiled.

    A GPU that reads memory as fast as it can has time for some hundred operations an entry, and
    a CPU for fewer.
    """
    total, coefficients = add_up(deltas), scalars.coefficients
    is_positive_, is_zero_ = total > scalars.bound[0], total == 0
    agree = [torch.where(is_positive_, delta, -delta) > 0 for delta in deltas]
    chosen = [torch.where(agrees, delta, 0.0) for agrees, delta in zip(agree, deltas, strict=True)]
    merged = weighted_sum(chosen, coefficients)
    n_agreeing = add_up([torch.where(agrees, 1.0, 0.0) for agrees in agree])
    if is_mean:
        merged = merged / torch.where(n_agreeing > 1, n_agreeing, 1.0)
    balance = torch.where(is_zero_, 0.0, torch.where(is_positive_, 1.0, -1.0))
    ambiguous = torch.where(is_zero_, n_agreeing, 0.0)
    return merged, exact_sum(balance), exact_sum(ambiguous)


def _elect(total: Tensor, majority: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the elected signs; 1 where the sum is 0; and elected positive minus negative."""
    zeros = is_zero(total)
    signs = total.sign() if torch.compiler.is_compiling() else total.sign_()
    balance = exact_sum(signs)
    return add_scaled(signs, zeros, majority), zeros, balance


def _largest(magnitudes: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """Return the largest magnitude times its expert's coefficient, their mean where equal."""
    largest = magnitudes[0]
    for magnitude in magnitudes[1:]:
        largest = torch.maximum(largest, magnitude)
    merged, n_ties = torch.zeros_like(largest), torch.zeros_like(largest)
    for i, magnitude in enumerate(magnitudes):
        ties = is_zero(magnitude - largest)
        merged = add_scaled(merged, ties, coefficients[i])
        n_ties = n_ties.add_(ties)
    return merged.div_(n_ties).mul_(largest)


class Majority:
    """The sign elected most often in a whole model, which exact zero sums take.

    Only a pass over the model tells it. It is guessed at first, to be what the most similar plan
    elected, and the pass done again where the guess was wrong and mattered.
    """

    def __init__(self) -> None:
        self._elected: dict[object, tuple[npt.NDArray[np.float64], float]] = {}

    def settle(
        self,
        key: object,
        densities: Sequence[Sequence[float]],
        make: "Callable[[float], Pass]",
    ) -> "Pass":
        """Return the pass to do first; it revises itself.

        Args:
            key: All that the election depends on.
            densities: By which plans are alike, a row for each group.
            make: The pass, given 1, -1, or 0 where as many signs are positive as negative. Its
                function returns the tally of :func:`merge_elected`.
        """
        if key in self._elected:
            return make(self._elected[key][1])
        place = np.array(densities)
        assumed = self._guess(place)

        def revise(tally: Tensor) -> "Pass | None":
            majority, is_ambiguous = float(torch.sign(tally[0])), bool(tally[1])
            self._elected[key] = place, majority
            if majority == assumed or not is_ambiguous:
                return None
            return make(majority)

        return replace(make(assumed), revise=revise)

    def _guess(self, place: npt.NDArray[np.float64]) -> float:
        """Return what the plan with the nearest densities elected."""
        alike = [
            (float(np.abs(other - place).sum()), majority)
            for other, majority in self._elected.values()
            if other.shape == place.shape and majority
        ]
        return min(alike)[1] if alike else 1.0
