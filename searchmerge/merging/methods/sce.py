"""SCE: select what varies, calculate matrix-wise coefficients, erase minority signs."""

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from searchmerge.merging.groups import assign_groups
from searchmerge.merging.kernels import Chunk, add_up, is_at_least, is_positive, weighted_sum
from searchmerge.merging.method import (
    COEFFICIENT,
    DEPTH_SLOPE,
    METHODS,
    Hyperparameter,
    Pass,
    Scope,
    Setting,
    setting,
)
from searchmerge.plan import MergePlan

if TYPE_CHECKING:
    from searchmerge.merging.measure import Measure
DENSITY = Setting("density", default=0.1, low=0.0, high=1.0)


@METHODS.register("sce")
class Sce:
    r"""Select the entries that vary most, weigh tensors by their energy, drop minority signs.

    Wan et al., 2024 (FuseChat), arXiv:2408.07990, section 3.2. In each tensor, S are the entries
    whose variance between the experts is among the largest ``density``; then

    .. math:: \eta_t = \frac{\sum_{p \in S} (\tau_t^p)^2}{\sum_s \sum_{p \in S} (\tau_s^p)^2},
              \qquad \tau_m^p = \frac{\sum_{t \in A_p} \lambda_t \eta_t \tau_t^p}
                                     {\sum_{t \in A_p} \eta_t}, \quad p \in S

    with A the experts whose sign is that of the sum. The paper states the sum without the
    divisor; its authors' implementation in mergekit divides, as here. The paper has no
    coefficients: 1 is its merge. Left open, and here as in mergekit: ``density`` is a fraction of
    the entries whose variance is not 0, and a zero sum elects +. Otherwise than there, entries
    equal to the smallest variance selected are selected, and at least one is. An expert alone
    has no variance: all its entries are selected, as are all of a tensor in which none varies.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        replace(COEFFICIENT, search=(0.0, 2.0)),
    )
    settings: ClassVar[tuple[Setting, ...]] = (DENSITY, DEPTH_SLOPE)
    scope: ClassVar[Scope] = "tensor"

    def __init__(self, measure: "Measure") -> None:
        """Prepare to select, which is done at the first plan with each density."""
        self._measure = measure
        self._known: dict[float, dict[str, Tensor]] = {}

    def bind(self, plan: MergePlan) -> Pass:
        """Look up what is selected, and what each tensor weighs."""
        density = float(setting(plan, DENSITY))
        if density not in self._known:
            self._known[density] = self._weigh(density)
        known, group_of = self._known[density], assign_groups(self._measure.names, plan.groups)
        rows = torch.tensor(plan.values["coefficient"], dtype=torch.float32)
        return Pass(
            merge_selected,
            lambda name: torch.cat([known[name], rows[group_of[name]][None]]),
        )

    def _weigh(self, density: float) -> dict[str, Tensor]:
        """Return the first two rows of scalars of each tensor."""
        n_experts = len(self._measure.experts)
        least = {name: self._least(name, density) for name in self._measure.names}
        thresholds = {name: torch.full((1, n_experts), own) for name, own in least.items()}
        energies = self._measure.sums(energy, scalars=thresholds.__getitem__)
        weights = {}
        for name, threshold in thresholds.items():
            own = energies[name].cpu()
            shares = own / own.sum() if own.sum() > 0 else torch.zeros(n_experts)
            weights[name] = torch.cat([threshold, shares[None].float()])
        return weights

    def _least(self, name: str, density: float) -> float:
        """Return the smallest variance that is selected."""
        if len(self._measure.experts) == 1 or density == 1:
            return 0.0
        found = self._measure.compute(variance, name)[0]
        n_varying = int(torch.count_nonzero(found))
        if not n_varying:
            return 0.0
        n_selected = max(1, int(n_varying * density))
        return float(found.kthvalue(len(found) - n_selected + 1).values)


def variance(chunk: Chunk) -> tuple[Tensor]:
    """Return n squared times the variance between the experts, ``(m,)`` float32.

    As the sum over pairs of squared differences: exactly 0 where all are equal.
    """
    own = chunk.deltas
    total = torch.zeros_like(own[0])
    for i, one in enumerate(own):
        for other in own[i + 1 :]:
            total = total.add_((one - other).square_())
    return (total,)


def energy(chunk: Chunk) -> tuple[Tensor, ...]:
    """Return each expert's squared entries that are selected, ``(m,)`` float32.

    Args:
        chunk: Task vectors; scalars ``(1 or more, n_experts)``: the smallest variance selected.
    """
    selected = is_at_least(variance(chunk)[0], chunk.scalars[0, 0])
    return tuple(own.square().mul_(selected) for own in chunk.deltas)


def merge_selected(chunk: Chunk) -> tuple[Tensor]:
    """Return the merged task vector ``(m,)`` float32.

    Args:
        chunk: Task vectors; scalars ``(3, n_experts)``: the smallest variance selected, in all
            columns; the tensor's weight; coefficient.
    """
    weights, coefficients = chunk.scalars[1], chunk.scalars[2]
    selected = is_at_least(variance(chunk)[0], chunk.scalars[0, 0])
    signs = is_at_least(add_up(chunk.deltas), 0.0).mul_(2.0).sub_(1.0)
    agreeing = [(own * signs).relu_() for own in chunk.deltas]
    shares = [is_positive(own * signs).mul_(weights[i]) for i, own in enumerate(chunk.deltas)]
    divisor = add_up(shares)
    merged = weighted_sum(agreeing, weights * coefficients)
    return (merged.div_(divisor.clamp_(min=1e-12)).mul_(signs).mul_(selected),)
