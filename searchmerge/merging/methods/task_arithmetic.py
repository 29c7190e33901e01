"""Task arithmetic: a weighted sum of task vectors."""

from dataclasses import replace
from typing import ClassVar

from searchmerge.merging.kernels import weighted_sum
from searchmerge.merging.method import COEFFICIENT, METHODS, Bound, Choice, Hyperparameter, Rows
from searchmerge.merging.task_vectors import TaskVectors


@METHODS.register("task_arithmetic")
class TaskArithmetic:
    r"""Merge to :math:`\sum_t \lambda_t \tau_t` (Ilharco et al., 2023, arXiv:2212.04089).

    The paper uses one coefficient for all, 0.3 to 0.5 for many tasks; here each has its own.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        replace(COEFFICIENT, default=0.4, search=(0.0, 1.5)),
    )
    settings: ClassVar[tuple[Choice, ...]] = ()

    def __init__(self, task_vectors: TaskVectors) -> None:
        """Measure nothing: a sum needs no statistics."""

    def bind(self, rows: Rows) -> Bound:
        """Fix the coefficients."""
        return Bound(weighted_sum, [[row["coefficient"]] for row in rows.rows])
