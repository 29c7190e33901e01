"""Averaging the weights of the experts."""

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple

from torch import Tensor

from searchmerge.merging.kernels import Chunk, Row, add_scaled, unpack, weighted_sum
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
from searchmerge.plan import MergePlan

if TYPE_CHECKING:
    from searchmerge.merging.measure import Measure


class SumScalars(NamedTuple, Generic[Row]):
    """What a weighted sum reads of each expert.

    Attributes:
        coefficients: The factor on its entries.
    """

    coefficients: Row


@METHODS.register("linear")
class Linear:
    r"""Average: :math:`\sum_t w_t \theta_t / \sum_t w_t`, with the coefficients as w.

    Equal coefficients give the uniform soup of Wortsman et al. (2022, arXiv:2203.05482); their
    common scale does not matter. The base takes no part. The paper has no case for coefficients
    that are all 0: here they leave the base.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        replace(COEFFICIENT, is_linear=False, low=0.0, search=(0.0, 1.0)),
    )
    settings: ClassVar[tuple[Setting, ...]] = (DEPTH_SLOPE,)
    scope: ClassVar[Scope] = "entry"
    published: ClassVar[Published | None] = Published("average", "2203.05482")

    def __init__(self, measure: "Measure") -> None:
        """Measure nothing: an average needs no statistics."""
        self._names = measure.names

    def bind(self, plan: MergePlan) -> Pass:
        """Divide each group's coefficients by their sum."""
        scalars = []
        for row in plan.values["coefficient"]:
            total = sum(row) or 1.0
            scalars.append(SumScalars([number / total for number in row]))
        return Pass(weighted, by_group(plan, self._names, scalars))


def weighted(chunk: Chunk) -> tuple[Tensor]:
    """Return the sum of the task vectors, each times its coefficient, ``(m,)`` float32."""
    scalars: SumScalars[Tensor] = unpack(SumScalars, chunk)
    return (weighted_sum(chunk.deltas, scalars.coefficients),)


def weighted_kept(chunk: Chunk) -> tuple[Tensor]:
    """Return the sum of what was kept, each times its coefficient, ``(m,)`` float32."""
    scalars: SumScalars[Tensor] = unpack(SumScalars, chunk)
    merged = chunk.kept[0] * scalars.coefficients[0]
    for i, part in enumerate(chunk.kept[1:], start=1):
        merged = add_scaled(merged, part, scalars.coefficients[i])
    return (merged,)
