"""Weighted averaging of models (Wortsman et al., 2022, arXiv:2203.05482)."""

from dataclasses import replace
from typing import ClassVar

from searchmerge.merging.kernels import weighted_sum
from searchmerge.merging.method import COEFFICIENT, METHODS, Bound, Choice, Hyperparameter, Rows
from searchmerge.merging.task_vectors import TaskVectors


@METHODS.register("linear")
class Linear:
    r"""Average the experts: :math:`\sum_t w_t \theta_t / \sum_t w_t`, with w the coefficients.

    Equal weights give the uniform average of the paper ("model soup"). The base takes no part,
    except that coefficients that are all 0 leave it as it is, which the paper has no case for.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        replace(COEFFICIENT, low=0.0, search=(0.0, 1.0)),
    )
    settings: ClassVar[tuple[Choice, ...]] = ()

    def __init__(self, task_vectors: TaskVectors) -> None:
        """Measure nothing: an average needs no statistics."""

    def bind(self, rows: Rows) -> Bound:
        """Divide the coefficients by their sum."""
        scalars = []
        for row in rows.rows:
            total = sum(row["coefficient"]) or 1.0
            scalars.append([[number / total for number in row["coefficient"]]])
        return Bound(weighted_sum, scalars)
