"""TSV-Merge: keep each matrix's leading singular directions, and take apart those that overlap."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

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
from searchmerge.merging.singular import nearest_orthogonal, singular_vectors
from searchmerge.plan import MergePlan

if TYPE_CHECKING:
    from searchmerge.merging.measure import Measure


@METHODS.register("tsv")
class Tsv:
    r"""Merge matrices from 1/n of each one's singular vectors, made orthogonal to one another.

    Gargiulo et al., 2024, arXiv:2412.00081, Algorithm 1 (TSV-M). Of each expert's matrix
    :math:`\tau_t = U_t \Sigma_t V_t^\top` the leading 1/n of the singular values stay. With U and
    V all that is left, side by side, and :math:`U_\perp, V_\perp` the nearest matrices with
    orthonormal columns (``P Q^T`` of the singular value decomposition ``U = P D Q^T``),

    .. math:: \tau_m = \sum_t \lambda_t \, U_{\perp,t} \Sigma_t V_{\perp,t}^\top

    The paper has one coefficient, for which 1 is close to best. Tensors that are no matrix are
    averaged, each expert's entries times its coefficient. Left open: of a matrix of lower rank
    than there are experts one direction is kept; directions of singular value 0 are left out;
    what experts have exactly in common counts once, divided among them. All is decomposed once,
    whatever the coefficients, and kept while memory allows.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        replace(COEFFICIENT, search=(0.0, 2.0)),
    )
    settings: ClassVar[tuple[Setting, ...]] = (DEPTH_SLOPE,)
    scope: ClassVar[Scope] = "tensor"
    published: ClassVar[Published | None] = Published("TSV-M", "2412.00081", decomposes=True)

    def __init__(self, measure: "Measure") -> None:
        """Prepare to decompose matrices, at the first plan."""
        self._measure = measure
        self._parts: Mapping[str, tuple[Tensor, ...]] | None = None

    def bind(self, plan: MergePlan) -> Pass:
        """Fix the coefficients."""
        if self._parts is None:
            self._parts = self._measure.keep_whole(_separate, len(plan.experts), as_weights=True)
        scalars = [SumScalars(row) for row in plan.values["coefficient"]]
        return Pass(weighted_kept, by_group(plan, self._measure.names, scalars), (), self._parts)


def _separate(name: str, deltas: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return each expert's part of the merged task vector, in its shape, float32."""
    n_experts = len(deltas)
    if deltas[0].ndim != 2 or not any(delta.any() for delta in deltas):
        return tuple(delta / n_experts for delta in deltas)
    n_most = max(1, min(deltas[0].shape) // n_experts)
    left, sizes, right = zip(*(singular_vectors(delta, n_most) for delta in deltas), strict=True)
    ranks = [vectors.shape[1] for vectors in left]
    lefts = torch.split(nearest_orthogonal(torch.cat(left, 1)), ranks, 1)
    rights = torch.split(nearest_orthogonal(torch.cat(right, 1)), ranks, 1)
    return tuple(
        (u * values[:rank]) @ v.T
        for u, values, v, rank in zip(lefts, sizes, rights, ranks, strict=True)
    )
