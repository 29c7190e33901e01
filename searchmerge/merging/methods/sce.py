"""SCE: select what varies, calculate matrix-wise coefficients, erase minority signs."""

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple

import torch
from torch import Tensor

from searchmerge.merging.groups import assign_groups
from searchmerge.merging.kernels import (
    Chunk,
    Numbers,
    Row,
    add_up,
    is_at_least,
    is_positive,
    pack,
    unpack,
    weighted_sum,
)
from searchmerge.merging.method import (
    COEFFICIENT,
    DEPTH_SLOPE,
    METHODS,
    Hyperparameter,
    Pass,
    Published,
    Scope,
    Setting,
    setting,
)
from searchmerge.plan import MergePlan

if TYPE_CHECKING:
    from searchmerge.merging.measure import Measure

DENSITY = Setting("density", default=0.1, low=0.0, high=1.0)


class SelectionScalars(NamedTuple, Generic[Row]):
    """What the selection reads.

    Attributes:
        least: The smallest variance that is selected, for all experts alike.
    """

    least: Row


class SceScalars(NamedTuple, Generic[Row]):
    """What the arithmetic reads of each expert.

    Attributes:
        least: The smallest variance that is selected, for all alike.
        weights: What the expert's tensor weighs, the paper's eta.
        coefficients: The factor on its entries.
    """

    least: Row
    weights: Row
    coefficients: Row


class _Weighed(NamedTuple):
    """One tensor's smallest variance that is selected, and each expert's share of its energy."""

    least: float
    weights: Tensor


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
    published: ClassVar[Published | None] = None

    def __init__(self, measure: "Measure") -> None:
        """Prepare to select, which is done at the first plan with each density."""
        self._measure = measure
        self._weighed: dict[float, dict[str, _Weighed]] = {}

    def bind(self, plan: MergePlan) -> Pass:
        """Look up what is selected, and what each tensor weighs."""
        density = float(setting(plan, DENSITY))
        if density not in self._weighed:
            self._weighed[density] = self._weigh(density)
        weighed, group_of = self._weighed[density], assign_groups(self._measure.names, plan.groups)
        rows = torch.tensor(plan.values["coefficient"], dtype=torch.float32)

        def scalars(name: str) -> Tensor:
            least, weights = weighed[name]
            return pack(SceScalars[Numbers](least, weights, rows[group_of[name]]))

        return Pass(merge_selected, scalars)

    def _weigh(self, density: float) -> dict[str, _Weighed]:
        n_experts = len(self._measure.experts)
        least = {name: self._least(name, density) for name in self._measure.names}
        energies = self._measure.sums(
            energy, scalars=lambda name: pack(SelectionScalars([least[name]] * n_experts))
        )
        weighed = {}
        for name in self._measure.names:
            of_experts = energies[name].cpu()
            total = of_experts.sum()
            shares = of_experts / total if total > 0 else torch.zeros(n_experts)
            weighed[name] = _Weighed(least[name], shares.float())
        return weighed

    def _least(self, name: str, density: float) -> float:
        """Return the smallest variance that is selected."""
        if len(self._measure.experts) == 1 or density == 1:
            return 0.0
        variances = self._measure.compute(variance, name)[0]
        n_varying = int(torch.count_nonzero(variances))
        if not n_varying:
            return 0.0
        n_selected = max(1, int(n_varying * density))
        return float(variances.kthvalue(len(variances) - n_selected + 1).values)


def variance(chunk: Chunk) -> tuple[Tensor]:
    """Return n squared times the variance between the experts, ``(m,)`` float32.

    As the sum over pairs of squared differences: exactly 0 where all are equal.
    """
    total = torch.zeros_like(chunk.deltas[0])
    for i, delta in enumerate(chunk.deltas):
        for other in chunk.deltas[i + 1 :]:
            total = total.add_((delta - other).square_())
    return (total,)


def energy(chunk: Chunk) -> tuple[Tensor, ...]:
    """Return each expert's squared entries that are selected, ``(m,)`` float32.

    Args:
        chunk: Task vectors and :class:`SelectionScalars`.
    """
    scalars: SelectionScalars[Tensor] = unpack(SelectionScalars, chunk)
    selected = is_at_least(variance(chunk)[0], scalars.least[0])
    return tuple(delta.square().mul_(selected) for delta in chunk.deltas)


def merge_selected(chunk: Chunk) -> tuple[Tensor]:
    """Return the merged task vector ``(m,)`` float32.

    Args:
        chunk: Task vectors and :class:`SceScalars`.
    """
    scalars: SceScalars[Tensor] = unpack(SceScalars, chunk)
    selected = is_at_least(variance(chunk)[0], scalars.least[0])
    signs = is_at_least(add_up(chunk.deltas), 0.0).mul_(2.0).sub_(1.0)
    agreeing = [(delta * signs).relu_() for delta in chunk.deltas]
    shares = [
        is_positive(delta * signs).mul_(scalars.weights[i]) for i, delta in enumerate(chunk.deltas)
    ]
    divisor = add_up(shares)
    merged = weighted_sum(agreeing, scalars.weights * scalars.coefficients)
    return (merged.div_(divisor.clamp_(min=1e-12)).mul_(signs).mul_(selected),)
