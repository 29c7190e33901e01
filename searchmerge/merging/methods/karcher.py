"""The mean of task vectors on a sphere: spherical interpolation, of any number of experts."""

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

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

_MOST_STEPS = 100
_NEAR = 1e-10  # radians


@METHODS.register("karcher")
class Karcher:
    r"""Average directions on the sphere; with two experts this is spherical interpolation (slerp).

    For two, as in WARP (Ramé et al., 2024, arXiv:2406.16768, equation 3), tensor by tensor with
    :math:`\Omega` the angle between the task vectors:

    .. math:: \tau_m = \frac{\sin((1 - w) \Omega)}{\sin\Omega} \tau_1
              + \frac{\sin(w \Omega)}{\sin\Omega} \tau_2, \qquad
              w = \lambda_2 / (\lambda_1 + \lambda_2)

    For more, the paper interpolates again and again, which depends on the order; here the unit
    vector :math:`\sum_t c_t \tau_t / |\tau_t|` is the weighted Karcher mean of the directions (the
    point of least weighted squared angles; Karcher, 1977), and :math:`\tau_m = \sum_t c_t \tau_t`.
    The common scale of the coefficients does not matter; where all are 0 the base stays. A task
    vector that is 0 in a tensor has no direction and takes no part in it; where directions
    cancel, so that the mean is not defined, the plain average is taken.

    mergekit's ``slerp`` and ``karcher`` turn the weights themselves instead of task vectors, whose
    angles are so small that it comes close to averaging.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        replace(COEFFICIENT, is_linear=False, low=0.0, search=(0.0, 1.0)),
    )
    settings: ClassVar[tuple[Setting, ...]] = (DEPTH_SLOPE,)
    scope: ClassVar[Scope] = "tensor"
    published: ClassVar[Published | None] = None

    def __init__(self, measure: "Measure") -> None:
        """Prepare to look up angles, which are measured at the first plan."""
        self._measure = measure

    def bind(self, plan: MergePlan) -> Pass:
        """Find the mean's coordinates in each tensor."""
        names = self._measure.names
        measured = self._measure.inner_products()
        products = np.stack([measured[name] for name in names])
        group_of = assign_groups(names, plan.groups)
        rows = np.array([plan.values["coefficient"][group_of[name]] for name in names])
        means = torch.from_numpy(coordinates(products, rows)).float()
        places = {name: i for i, name in enumerate(names)}
        return Pass(weighted, lambda name: pack(SumScalars(means[places[name]])))


def coordinates(products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return c, ``(n_tensors, n_experts)``, such that the mean direction is a weighted sum.

    It goes from the normalised average along the mean of the logarithms, until that is 0.

    Args:
        products: Inner products of the task vectors of each tensor, ``(n_tensors, n, n)``.
        weights: 0 or more, ``(n_tensors, n_experts)``.
    """
    norms = np.sqrt(np.diagonal(products, axis1=1, axis2=2))
    moved = norms > 0
    safe = np.where(moved, norms, 1.0)
    cosines = products / safe[:, :, None] / safe[:, None, :]
    weights = np.where(moved, weights, 0.0)
    total = weights.sum(1, keepdims=True)
    weights = weights / np.where(total > 0, total, 1.0)
    length = _length(cosines, weights)
    defined = (length > 1e-6)[:, 0]
    mean = weights / np.where(defined[:, None], length, 1.0)
    for _ in range(_MOST_STEPS):
        step = _mean_logarithm(cosines, weights, mean)
        angle = _length(cosines, step) * defined[:, None]
        if (angle < _NEAR).all():
            break
        mean = np.cos(angle) * mean + np.sinc(angle / np.pi) * step * defined[:, None]
        mean = mean / np.where(defined[:, None], _length(cosines, mean), 1.0)
    return mean


def _mean_logarithm(cosines: np.ndarray, weights: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the coordinates of the weighted mean of all directions' logarithms at a point."""
    cosine = np.clip((cosines @ at[:, :, None])[:, :, 0], -1.0, 1.0)
    sine = np.sqrt(1 - cosine**2)
    stretched = np.where(sine > 1e-9, np.arccos(cosine) / np.maximum(sine, 1e-9), 1.0)
    pull = weights * stretched
    logarithm: np.ndarray = pull - (pull * cosine).sum(1, keepdims=True) * at
    return logarithm


def _length(cosines: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    squares = (coordinates[:, None, :] @ cosines @ coordinates[:, :, None])[:, :, 0]
    length: np.ndarray = np.sqrt(np.maximum(squares, 0.0))
    return length
