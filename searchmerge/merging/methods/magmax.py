"""MagMax: of each entry, take the expert that changed it most."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from searchmerge.merging.kernels import Chunk, add_scaled, is_zero, unpack
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
from searchmerge.merging.methods.linear import SumScalars
from searchmerge.plan import MergePlan

if TYPE_CHECKING:
    from searchmerge.merging.measure import Measure


@METHODS.register("magmax")
class MagMax:
    r"""Take each entry from the task vector in which it is largest in magnitude.

    Marczak et al., 2024, arXiv:2407.06322, section 4:

    .. math:: \tau_m^p = \lambda_{t^*} \tau_{t^*}^p, \qquad t^* = \arg\max_t |\tau_t^p|

    The paper has one coefficient, 0.5 to 1, on the merged task vector; here each expert's
    multiplies the entries taken from it, after they were chosen. It leaves open what becomes of
    entries equal in magnitude: here their mean. Neither mergekit nor PEFT has it.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        replace(COEFFICIENT, default=0.5, search=(0.0, 1.5)),
    )
    settings: ClassVar[tuple[Setting, ...]] = (DEPTH_SLOPE,)
    scope: ClassVar[Scope] = "entry"
    published: ClassVar[Published | None] = None

    def __init__(self, measure: "Measure") -> None:
        """Measure nothing: entries are compared where they are merged."""
        self._names = measure.names

    def bind(self, plan: MergePlan) -> Pass:
        """Fix the coefficients."""
        scalars = [SumScalars(row) for row in plan.values["coefficient"]]
        return Pass(merge_largest, by_group(plan, self._names, scalars))


def merge_largest(chunk: Chunk) -> tuple[Tensor]:
    """Return the merged task vector ``(m,)`` float32.

    Args:
        chunk: Task vectors and :class:`~searchmerge.merging.methods.linear.SumScalars`.
    """
    scalars: SumScalars[Tensor] = unpack(SumScalars, chunk)
    largest = _largest_magnitude(chunk.deltas)
    merged, n_ties = torch.zeros_like(largest), torch.zeros_like(largest)
    for i, delta in enumerate(chunk.deltas):
        ties = is_zero(delta.abs().sub_(largest))
        n_ties = n_ties.add_(ties)
        merged = add_scaled(merged, delta.mul_(ties), scalars.coefficients[i])
    return (merged.div_(n_ties),)


def _largest_magnitude(deltas: Sequence[Tensor]) -> Tensor:
    largest = deltas[0].abs()
    for delta in deltas[1:]:
        largest = torch.maximum(largest, delta.abs())
    return largest
