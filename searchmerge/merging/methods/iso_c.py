"""Iso-C: give the summed task matrix one singular value throughout."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from searchmerge.merging.groups import assign_groups
from searchmerge.merging.method import (
    COEFFICIENT,
    DEPTH_SLOPE,
    METHODS,
    Hyperparameter,
    Pass,
    Published,
    Scope,
    Setting,
    by_group,
)
from searchmerge.merging.methods.linear import SumScalars, weighted_kept
from searchmerge.merging.singular import singular_vectors
from searchmerge.plan import MergePlan

if TYPE_CHECKING:
    from searchmerge.merging.measure import Measure


@METHODS.register("iso_c")
class IsoC:
    r"""Add task matrices up, and replace all singular values of the sum by their mean.

    Marczak et al., 2025, arXiv:2502.04959, Algorithm 1: for each matrix,

    .. math:: \sum_t \lambda_t \tau_t = U \Sigma V^\top, \quad
              \tau_m = \bar\sigma U V^\top, \quad \bar\sigma = \tfrac1r \sum_{i=1}^r \Sigma_{ii}

    The paper has one coefficient, after the sum, which is the same thing. Tensors that are no
    matrix are averaged, each expert's entries times its coefficient. Left open: directions of
    singular value 0 stay 0, as U and V are arbitrary there; the mean counts them.

    All is decomposed once for each ratio of the coefficients, and kept while memory allows:
    plans that differ in their common scale alone cost one pass over memory, a new ratio costs a
    decomposition of every matrix.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        replace(COEFFICIENT, is_linear=False, search=(0.0, 3.0)),
    )
    settings: ClassVar[tuple[Setting, ...]] = (DEPTH_SLOPE,)
    scope: ClassVar[Scope] = "tensor"
    published: ClassVar[Published | None] = None

    def __init__(self, measure: "Measure") -> None:
        """Prepare to decompose matrices, at the first plan."""
        self._measure = measure
        self._last: object = None
        self._kept: Mapping[str, tuple[Tensor, ...]] = {}

    def bind(self, plan: MergePlan) -> Pass:
        """Fix the scale; decompose unless the coefficients' ratios were those of the last plan."""
        coefficients = plan.values["coefficient"]
        scales = [max(row, key=abs) for row in coefficients]
        ratios = tuple(_ratios(row) for row in coefficients)
        if (ratios, plan.groups) != self._last:
            self._measure.release(self._kept)
            self._kept = self._decompose(plan, ratios)
            self._last = (ratios, plan.groups)
        of_sum = [SumScalars([scale]) for scale in scales]
        return Pass(weighted_kept, by_group(plan, self._measure.names, of_sum), (), self._kept)

    def _decompose(
        self, plan: MergePlan, ratios: Sequence[Sequence[float]]
    ) -> Mapping[str, tuple[Tensor, ...]]:
        group_of = assign_groups(self._measure.names, plan.groups)

        def flatten(name: str, deltas: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            row = ratios[group_of[name]]
            scaled = [delta * ratio for delta, ratio in zip(deltas, row, strict=True)]
            total = torch.stack(scaled).sum(0)
            return (isotropic(total) if total.ndim == 2 else total / len(deltas),)

        return self._measure.keep_whole(flatten, 1, as_weights=True)


def _ratios(row: Sequence[float]) -> tuple[float, ...]:
    """Return a row divided by its largest coefficient, rounded so that its scale does not show."""
    largest = max(row, key=abs)
    return tuple(round(number / largest, 12) if largest else 0.0 for number in row)


def isotropic(matrix: Tensor) -> Tensor:
    """Return the matrix with all singular values that are not 0 replaced by the mean of all."""
    if not matrix.any():
        return matrix
    left, sizes, right = singular_vectors(matrix, min(matrix.shape))
    return (left @ right.T).mul_(sizes.mean())
