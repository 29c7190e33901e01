"""Consensus merging: keep the entries that matter to enough experts, by TALL masks."""

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple

from torch import Tensor

from searchmerge.merging.kernels import (
    Chunk,
    Numbers,
    Row,
    add_up,
    add_up_,
    is_at_least,
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
    by_group,
    setting,
)
from searchmerge.plan import MergePlan

if TYPE_CHECKING:
    from searchmerge.merging.measure import Measure

AGREEMENT = Setting("agreement", default=2, low=0, high=1000, step=1)


class ConsensusScalars(NamedTuple, Generic[Row]):
    """What the arithmetic reads of each expert.

    Attributes:
        thresholds: The mask's threshold on the others' sum.
        coefficients: The factor on its entries.
        n_needed: How many must have use for an entry, for all alike.
    """

    thresholds: Row
    coefficients: Row
    n_needed: Row


@METHODS.register("consensus")
class Consensus:
    r"""Add task vectors, in the entries alone that enough experts have use for.

    Wang et al., 2024, arXiv:2405.07813, equations 4 to 6: with :math:`\tau_{MTL}` the sum of all
    task vectors, an expert has use for the entries of its TALL mask,

    .. math:: m_t = \mathbb{1}\{|\tau_t| \ge \lambda^{mask}_t |\tau_{MTL} - \tau_t|\}, \qquad
              \tau_m = \mathbb{1}\{\textstyle\sum_t m_t \ge k\} \odot \sum_t \lambda_t \tau_t

    ``threshold`` is the mask's :math:`\lambda^{mask}`, 0.2 to 0.6 in the paper and chosen per
    task; ``agreement`` is k: 2 in the paper removes catastrophic entries, of no use to any, and
    selfish ones, of use to one alone; 0 is task arithmetic, and more than there are experts
    counts as all of them. The paper has one coefficient for all; the sum within the masks is
    without any, as in the paper, so that coefficients do not move the masks. An entry that is 0
    in all counts as of use, which changes nothing. mergekit and PEFT do not have it.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        replace(COEFFICIENT, default=0.4, search=(0.0, 1.0)),
        Hyperparameter("threshold", 0.0, 10.0, default=0.4, search=(0.2, 0.6)),
    )
    settings: ClassVar[tuple[Setting, ...]] = (AGREEMENT, DEPTH_SLOPE)
    scope: ClassVar[Scope] = "entry"
    published: ClassVar[Published | None] = None

    def __init__(self, measure: "Measure") -> None:
        """Measure nothing: masks are computed where they are used."""
        self._names, self._n_experts = measure.names, len(measure.experts)

    def bind(self, plan: MergePlan) -> Pass:
        """Fix the thresholds, how many must agree, and the coefficients."""
        n_needed = min(float(setting(plan, AGREEMENT)), self._n_experts)
        scalars: list[ConsensusScalars[Numbers]] = [
            ConsensusScalars(thresholds, coefficients, n_needed)
            for thresholds, coefficients in zip(
                plan.values["threshold"], plan.values["coefficient"], strict=True
            )
        ]
        return Pass(merge_agreed, by_group(plan, self._names, scalars))


def merge_agreed(chunk: Chunk) -> tuple[Tensor]:
    """Return the merged task vector ``(m,)`` float32.

    Args:
        chunk: Task vectors and :class:`ConsensusScalars`.
    """
    scalars: ConsensusScalars[Tensor] = unpack(ConsensusScalars, chunk)
    total = add_up(chunk.deltas)
    masks = [
        is_at_least(delta.abs().sub_((total - delta).abs_().mul_(scalars.thresholds[i])), 0.0)
        for i, delta in enumerate(chunk.deltas)
    ]
    agreed = is_at_least(add_up_(masks), scalars.n_needed[0])
    return (weighted_sum(chunk.deltas, scalars.coefficients).mul_(agreed),)
