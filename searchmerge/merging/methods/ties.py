"""TIES-Merging: trim, elect signs, merge what agrees."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple

from torch import Tensor

from searchmerge.merging.election import Majority, merge_elected, positive_bound
from searchmerge.merging.kernels import Chunk, Numbers, Row, keep_at_least, unpack
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
    by_group,
    setting,
)
from searchmerge.plan import MergePlan

if TYPE_CHECKING:
    from searchmerge.merging.measure import Measure

AGGREGATE = Setting("aggregate", default="mean", choices=("mean", "sum", "max"))


class TiesScalars(NamedTuple, Generic[Row]):
    """What the arithmetic reads of each expert.

    Attributes:
        thresholds: The magnitude below which an entry is trimmed.
        coefficients: The factor on what agrees.
        majority: See :class:`~searchmerge.merging.election.ElectionScalars`.
        bound: See there.
    """

    thresholds: Row
    coefficients: Row
    majority: Row
    bound: Row


@METHODS.register("ties")
class Ties:
    """Trim each task vector to its largest entries, elect signs, and merge those that agree.

    Yadav et al., 2023, arXiv:2306.01708, Algorithm 1. What the paper leaves open is as in the
    authors' code: trimming is global over the model, by rank, and keeps all that are equal to
    the smallest kept, so that of d entries at least ``int(d * density) + 1`` stay; an exactly
    zero sum takes the sign that was elected most often in the model. Density 1 trims nothing.
    Signs are elected on trimmed task vectors before any coefficient. The paper has one
    coefficient, on the merged task vector; here each expert's own multiplies its entries after
    the election, while the divisor of ``mean`` stays the number of entries that agree. ``max``
    takes the entry of largest magnitude, times its expert's coefficient.

    mergekit trims per tensor to an exact count, multiplies before the election, and gives a zero
    sum the sign +1.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        replace(COEFFICIENT, search=(0.0, 2.5)),
        replace(DENSITY, default=0.2, search=(0.05, 0.5)),
    )
    settings: ClassVar[tuple[Setting, ...]] = (AGGREGATE, DEPTH_SLOPE)
    scope: ClassVar[Scope] = "entry"
    published: ClassVar[Published | None] = Published("TIES", "2306.01708")

    def __init__(self, measure: "Measure") -> None:
        """Prepare to look up magnitudes, which are measured at the first plan."""
        self._measure = measure
        self._majority = Majority()

    def bind(self, plan: MergePlan) -> Pass:
        """Look the thresholds up; assume a majority sign where it is not known."""
        trims = tuple(tuple(self.thresholds(row)) for row in plan.values["density"])
        return self._majority.settle(
            (trims, plan.groups),
            plan.values["density"],
            lambda majority: self._pass(plan, trims, majority),
        )

    def thresholds(self, densities: Sequence[float]) -> list[float]:
        """Return the magnitude below which each expert is trimmed.

        The authors' ``k = d - int(d * density)`` in double precision, counted from 1.
        """
        d = self._measure.n_parameters
        n_kept = [int(d * density) for density in densities]
        smallest = self._measure.magnitudes([d - 1 - min(n, d - 1) for n in n_kept])
        return [0.0 if n >= d else value for n, value in zip(n_kept, smallest, strict=True)]

    def _pass(self, plan: MergePlan, trims: Sequence[Sequence[float]], majority: float) -> Pass:
        aggregate = str(setting(plan, AGGREGATE))
        # with no majority, the authors' mean and sum merge the negative entries, their max none
        sign = majority or (0.0 if aggregate == "max" else -1.0)
        scalars: list[TiesScalars[Numbers]] = [
            TiesScalars(trim, coefficients, majority=sign, bound=positive_bound(sign))
            for trim, coefficients in zip(trims, plan.values["coefficient"], strict=True)
        ]
        return Pass(_MERGE[aggregate], by_group(plan, self._measure.names, scalars))


def merge_ties(chunk: Chunk, *, aggregate: str) -> tuple[Tensor, Tensor, Tensor]:
    """Trim, elect signs and merge; return what :func:`merge_elected` does.

    Args:
        chunk: Task vectors and :class:`TiesScalars`.
        aggregate: ``mean`` of those that agree, their ``sum``, or the ``max`` in magnitude.
    """
    scalars: TiesScalars[Tensor] = unpack(TiesScalars, chunk)
    trimmed = [keep_at_least(delta, scalars.thresholds[i]) for i, delta in enumerate(chunk.deltas)]
    return merge_elected(trimmed, scalars, aggregate)


_MERGE: dict[str, Callable[[Chunk], tuple[Tensor, ...]]] = {
    str(aggregate): partial(merge_ties, aggregate=str(aggregate))
    for aggregate in AGGREGATE.choices
}
