"""Task arithmetic: adding task vectors."""

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

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
from searchmerge.merging.methods.linear import SumScalars, weighted
from searchmerge.plan import MergePlan

if TYPE_CHECKING:
    from searchmerge.merging.measure import Measure


@METHODS.register("task_arithmetic")
class TaskArithmetic:
    r"""Add task vectors to the base: :math:`\theta_0 + \sum_t \lambda_t \tau_t`.

    Ilharco et al., 2023, arXiv:2212.04089. The paper has one coefficient for all task vectors,
    chosen on validation data and most often 0.3 to 0.4; here each has its own.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        replace(COEFFICIENT, default=0.4, search=(0.0, 1.0)),
    )
    settings: ClassVar[tuple[Setting, ...]] = (DEPTH_SLOPE,)
    scope: ClassVar[Scope] = "entry"
    published: ClassVar[Published | None] = Published("task arithmetic", "2212.04089")

    def __init__(self, measure: "Measure") -> None:
        """Measure nothing: a sum needs no statistics."""
        self._names = measure.names

    def bind(self, plan: MergePlan) -> Pass:
        """Fix the coefficients."""
        scalars = [SumScalars(row) for row in plan.values["coefficient"]]
        return Pass(weighted, by_group(plan, self._names, scalars))
