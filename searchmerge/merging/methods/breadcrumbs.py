"""Model breadcrumbs: leave out what is small, and what is too large."""

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple

from torch import Tensor

from searchmerge.merging.groups import assign_groups
from searchmerge.merging.kernels import (
    Chunk,
    Numbers,
    Row,
    is_at_least,
    pack,
    unpack,
    weighted_sum,
)
from searchmerge.merging.method import (
    COEFFICIENT,
    DENSITY,
    DEPTH_SLOPE,
    METHODS,
    Hyperparameter,
    Pass,
    Published,
    Scope,
    Setting,
)
from searchmerge.plan import MergePlan

if TYPE_CHECKING:
    from searchmerge.merging.measure import Measure


class BreadcrumbsScalars(NamedTuple, Generic[Row]):
    """What the arithmetic reads of each expert.

    Attributes:
        smallest: The smallest magnitude that is kept.
        largest: The largest.
        coefficients: The factor on what is kept.
    """

    smallest: Row
    largest: Row
    coefficients: Row


@METHODS.register("breadcrumbs")
class Breadcrumbs:
    r"""Keep, in each tensor, the entries of middling magnitude, and add them up.

    Davari and Belilovsky, 2023, arXiv:2312.06795, equation 3:
    :math:`\tau_m = \sum_t \lambda_t \, m_t \odot \tau_t`, where the mask m leaves out the
    smallest fraction :math:`\beta` of a layer's entries and those above the fraction
    :math:`\gamma`. Here ``outliers`` is :math:`1 - \gamma` and ``density`` what is between the
    two, :math:`\gamma - \beta`; the paper's 90 % and 99 % are the defaults. Nothing is rescaled.
    The paper has one coefficient and leaves open how fractions of small tensors are rounded:
    here ``int(n * beta)`` are too small and ``int(n * outliers)`` too large, and entries equal to
    the smallest or the largest kept are kept; so is one entry at least.

    mergekit keeps an exact count, choosing among equal entries by their order, and has a variant
    that elects signs.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        replace(COEFFICIENT, default=0.3, search=(0.0, 1.0)),
        replace(DENSITY, default=0.09, search=(0.05, 0.9)),
        Hyperparameter("outliers", 0.0, 1.0, default=0.01, search=(0.0, 0.05), step=0.001),
    )
    settings: ClassVar[tuple[Setting, ...]] = (DEPTH_SLOPE,)
    scope: ClassVar[Scope] = "tensor"
    published: ClassVar[Published | None] = None

    def __init__(self, measure: "Measure") -> None:
        """Prepare to look up magnitudes, which are measured at the first plan."""
        self._measure = measure

    def bind(self, plan: MergePlan) -> Pass:
        """Look up the ends of what is kept of each tensor."""
        group_of = assign_groups(self._measure.names, plan.groups)
        scalars = {name: self._scalars(name, plan, group_of[name]) for name in group_of}
        return Pass(merge_between, scalars.__getitem__)

    def _scalars(self, name: str, plan: MergePlan, group: int) -> Tensor:
        coefficients = plan.values["coefficient"][group]
        n = self._measure.shape(name).numel()
        if not n:
            return pack(BreadcrumbsScalars[Numbers](0.0, 0.0, coefficients))
        low, high = [], []
        for density, outliers in zip(
            plan.values["density"][group], plan.values["outliers"][group], strict=True
        ):
            beta = max(0.0, round(1 - density - outliers, 9))  # so that it is on the grid
            low.append(min(int(n * beta), n - 1))
            high.append(max(n - 1 - int(n * outliers), low[-1]))
        smallest, largest = (self._measure.tensor_magnitudes(name, r) for r in (low, high))
        return pack(BreadcrumbsScalars[Numbers](smallest, largest, coefficients))


def merge_between(chunk: Chunk) -> tuple[Tensor]:
    """Return the weighted sum of what is kept, ``(m,)`` float32.

    Args:
        chunk: Task vectors and :class:`BreadcrumbsScalars`.
    """
    scalars: BreadcrumbsScalars[Tensor] = unpack(BreadcrumbsScalars, chunk)
    kept = []
    for i, delta in enumerate(chunk.deltas):
        magnitude = delta.abs()
        large = is_at_least(magnitude, scalars.smallest[i])
        small = is_at_least(magnitude.neg_(), -scalars.largest[i])
        kept.append(delta.mul_(large).mul_(small))
    return (weighted_sum(kept, scalars.coefficients),)
