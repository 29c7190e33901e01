"""TIES-Merging: trim, elect signs, merge what agrees."""

from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from searchmerge.merging.kernels import GRID, magnitudes, ratio, thresholds
from searchmerge.merging.method import COEFFICIENT, METHODS, Bound, Choice, Hyperparameter, Rows
from searchmerge.merging.task_vectors import TaskVectors

TRIM_DENSITY = Hyperparameter(
    "density", 0.0, 1.0, default=0.2, search=(0.05, 0.5), step=1 / GRID
)


@METHODS.register("ties")
class Ties:
    """Trim each task vector to its largest entries, elect a sign, merge those that agree.

    Yadav et al., 2023, arXiv:2306.01708, Algorithm 1. Trimming is global over the model and keeps
    ties; a density d of n entries keeps ``int(n * d) + 1`` or more, as the authors' code does,
    and density 1 trims nothing. Signs are elected on trimmed, unweighted task vectors; an entry
    whose trimmed sum is exactly 0 takes the sign that is in the majority over the whole model.
    The paper has one coefficient for all; here each expert's own multiplies its entries after
    the election, and the divisor of ``mean`` stays the number that agree.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        replace(COEFFICIENT, search=(0.0, 2.0)),
        TRIM_DENSITY,
    )
    settings: ClassVar[tuple[Choice, ...]] = (
        Choice("aggregate", default="mean", choices=("mean", "sum", "max")),
    )

    def __init__(self, task_vectors: TaskVectors) -> None:
        """Measure the magnitudes of every task vector."""
        self._d = task_vectors.n_parameters
        self._magnitudes = magnitudes(task_vectors)
        self._majority = 1.0

    def bind(self, rows: Rows) -> Bound:
        """Look the thresholds up; assume the majority sign that was right last time."""
        aggregate = str(rows.settings["aggregate"])
        trims = [thresholds(self._magnitudes, self._d, row["density"]) for row in rows.rows]
        return self._bound(_COMBINE[aggregate], trims, rows, self._majority)

    def _bound(self, combine, trims, rows: Rows, majority: float) -> Bound:  # type: ignore[no-untyped-def]  # noqa: ANN001
        scalars = [
            [trim, list(row["coefficient"]), [majority] * len(trim)]
            for trim, row in zip(trims, rows.rows, strict=True)
        ]

        def settle(tally: Tensor) -> Bound | None:
            """Do the pass again if the assumed majority was wrong, and any entry needed it."""
            found = float(torch.sign(tally[0]))
            self._majority = found
            if found == majority or not tally[1]:
                return None
            return self._bound(combine, trims, rows, found)

        return Bound(combine, scalars, settle)


def merge_ties(
    deltas: Tensor, scalars: Tensor, *, aggregate: str
) -> tuple[Tensor, Tensor]:
    r"""Trim, elect signs and merge (Yadav et al., 2023, arXiv:2306.01708, Algorithm 1).

    .. math:: \tau_m = \frac{1}{|A|} \sum_{t \in A} \lambda_t \hat\tau_t, \qquad
              A = \{t : \operatorname{sgn} \hat\tau_t = \operatorname{sgn} \sum_s \hat\tau_s\}

    Args:
        deltas: Task vectors, ``(n_experts, m)`` float32; overwritten.
        scalars: ``(3, n_experts)``: magnitude below which an entry is trimmed; coefficient;
            sign that an exactly zero sum takes, all alike.
        aggregate: ``mean`` over those that agree, their ``sum``, or the ``max`` in magnitude.

    Returns:
        The merged task vector ``(m,)``, 0 where all was trimmed; and a tally ``(2,)``: entries
        elected positive minus negative, and entries whose zero sum hides unlike signs.
    """
    trims, coefficients, majority = scalars[0, :, None], scalars[1, :, None], scalars[2, 0]
    deltas.mul_(deltas.abs() >= trims)
    elected = deltas.sum(0).sign_()
    undecided = elected == 0
    tally = torch.stack([elected.sum(), (undecided & (deltas != 0).any(0)).sum().float()])
    elected = torch.where(undecided, majority, elected)
    # with no majority either, the authors' comparison picks the negative entries
    chosen = torch.where(elected == 0, -1.0, elected)
    agreeing = deltas * (deltas * chosen > 0)
    if aggregate == "max":
        sizes, largest = agreeing.abs().max(0)
        return elected * sizes * coefficients[largest, 0], tally
    total = (agreeing * coefficients).sum(0)
    if aggregate == "sum":
        return total, tally
    return ratio(total, (agreeing != 0).sum(0).float()), tally


_COMBINE = {name: partial(merge_ties, aggregate=name) for name in ("mean", "sum", "max")}
