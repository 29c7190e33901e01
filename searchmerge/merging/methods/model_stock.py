"""Model Stock: how far to go from the base, by the angle between the experts."""

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from searchmerge.merging.groups import assign_groups
from searchmerge.merging.kernels import pack
from searchmerge.merging.method import (
    COEFFICIENT,
    DEPTH_SLOPE,
    METHODS,
    Hyperparameter,
    Pass,
    Published,
    Scope,
    Setting,
)
from searchmerge.merging.methods.linear import SumScalars, weighted
from searchmerge.plan import MergePlan

if TYPE_CHECKING:
    from searchmerge.merging.measure import Measure


@METHODS.register("model_stock")
class ModelStock:
    r"""Go from the base towards the experts' average, the less so the more they differ.

    Jang et al., 2024, arXiv:2403.19522, equations 2 and 5; for each tensor, with N experts and
    :math:`\theta` the angle between two task vectors,

    .. math:: \tau_m = \frac{t}{N} \sum_t \lambda_t \tau_t, \qquad
              t = \frac{N \cos\theta}{1 + (N - 1) \cos\theta}

    The paper assumes the same angle for every two; here, as in mergekit, the cosine is the mean
    over all pairs of task vectors that are not 0, and N counts those. The paper has no
    coefficients: 1 is its merge. It leaves open a negative cosine, for which t would be negative
    or large: here t is kept within [0, 1]. The angle does not depend on coefficients.

    mergekit does not limit t, and may take angles per row.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        replace(COEFFICIENT, search=(0.0, 2.0)),
    )
    settings: ClassVar[tuple[Setting, ...]] = (DEPTH_SLOPE,)
    scope: ClassVar[Scope] = "tensor"
    published: ClassVar[Published | None] = None

    def __init__(self, measure: "Measure") -> None:
        """Prepare to look up angles, which are measured at the first plan."""
        self._measure = measure
        self._factors: dict[str, float] = {}

    def bind(self, plan: MergePlan) -> Pass:
        """Look up how far to go in each tensor."""
        if not self._factors:
            products = self._measure.inner_products()
            self._factors = {name: factor(inner) for name, inner in products.items()}
        group_of = assign_groups(self._measure.names, plan.groups)
        rows = torch.tensor(plan.values["coefficient"], dtype=torch.float32)

        def scalars(name: str) -> Tensor:
            return pack(SumScalars(rows[group_of[name]] * self._factors[name]))

        return Pass(weighted, scalars)


def factor(products: np.ndarray) -> float:
    """Return :math:`t / N` from the inner products of task vectors, ``(n, n)``; 0 without any."""
    norms = np.sqrt(np.diag(products))
    norms = norms[norms > 0]
    n = len(norms)
    if n < 2:
        return float(n)
    moved = np.diag(products) > 0
    cosines = products[np.ix_(moved, moved)] / norms / norms[:, None]
    cosine = (cosines.sum() - n) / (n * (n - 1))
    if cosine <= 0:
        return 0.0
    return float(min(1.0, n * cosine / (1 + (n - 1) * cosine)) / n)
