"""DELLA: drop entries at random, the small ones more often."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple

import torch
from torch import Tensor

from searchmerge.merging.election import Majority, merge_elected, positive_bound
from searchmerge.merging.kernels import Chunk, ChunkFunction, Numbers, Row, unpack, weighted_sum
from searchmerge.merging.method import (
    COEFFICIENT,
    DENSITY,
    DEPTH_SLOPE,
    METHODS,
    SEED,
    Hyperparameter,
    Pass,
    Published,
    Scope,
    Setting,
    by_group,
    setting,
)
from searchmerge.merging.randomness import N_DRAWS, keep_drawn, random_keys
from searchmerge.plan import MergePlan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from searchmerge.merging.measure import Measure

ELECTION = Setting("election", default="ties", choices=("ties", "none"))


class DellaScalars(NamedTuple, Generic[Row]):
    """What the arithmetic reads of each expert.

    Attributes:
        smallest: The smallest chance of being kept, in draws.
        widths: Its distance to the largest, in draws.
        coefficients: The factor on what is left.
        majority: See :class:`~searchmerge.merging.election.ElectionScalars`; 0 without election.
        bound: See there.
    """

    smallest: Row
    widths: Row
    coefficients: Row
    majority: Row
    bound: Row


@METHODS.register("della")
class Della:
    r"""Keep each entry by a chance that grows with its rank, divide by it, elect and merge.

    Deep et al., 2024, arXiv:2406.11617 (MAGPRUNE, then the steps of TIES after trimming): the
    entries of a row are ranked by magnitude, r from 0 for the smallest to 1 for the largest, and

    .. math:: \hat\tau = m \odot \tau / p, \qquad m \sim \mathrm{Bernoulli}(p), \qquad
              p = d + (r - \tfrac12) \, \varepsilon

    with d the density and :math:`\varepsilon` the window. What is left is merged as ``ties`` does
    (mean of the entries of the elected sign), or added up with ``election: none``. The paper
    counts ranks in steps of 1/m, which makes the chances' mean differ from the density by
    :math:`\varepsilon / 2m`; here the mean is the density. A window that would reach below 0 or
    above 1 is narrowed to what fits. Entries of equal magnitude are ranked in their order. A
    tensor of one dimension is one row; one of more than two has rows along its last.

    mergekit's ``epsilon`` is half of the window; it rescales each tensor to the L1 norm it had.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        replace(COEFFICIENT, search=(0.0, 2.0)),
        replace(DENSITY, default=0.5, search=(0.1, 0.9)),
        Hyperparameter("window", 0.0, 1.0, default=0.2, search=(0.0, 0.4)),
    )
    settings: ClassVar[tuple[Setting, ...]] = (ELECTION, SEED, DEPTH_SLOPE)
    scope: ClassVar[Scope] = "tensor"
    published: ClassVar[Published | None] = None

    def __init__(self, measure: "Measure") -> None:
        """Prepare to rank entries, at the first plan."""
        self._measure = measure
        self._majority = Majority()
        self._ranks: Mapping[str, tuple[Tensor, ...]] | None = None

    def bind(self, plan: MergePlan) -> Pass:
        """Fix the chances, and the keys that the draws are made from."""
        if setting(plan, ELECTION) == "none":
            return self._pass(plan, 0.0, merge_ranked)
        values = {name: rows for name, rows in plan.values.items() if name != "coefficient"}
        key = repr((values, plan.groups, plan.settings.items()))
        return self._majority.settle(
            key,
            plan.values["density"],
            lambda majority: self._pass(plan, majority or -1.0, merge_ranked_elected),
        )

    def _pass(self, plan: MergePlan, sign: float, function: ChunkFunction) -> Pass:
        if self._ranks is None:
            self._ranks = self._measure.keep_whole(ranks, len(plan.experts))
        seed, experts = int(setting(plan, SEED)), self._measure.experts
        scalars: list[DellaScalars[Numbers]] = []
        for coefficients, densities, windows in zip(
            *(plan.values[name] for name in ("coefficient", "density", "window")), strict=True
        ):
            widths = _widths(densities, windows)
            scalars.append(
                DellaScalars(
                    _smallest(densities, widths),
                    [N_DRAWS * width for width in widths],
                    coefficients,
                    majority=sign,
                    bound=positive_bound(sign),
                )
            )
        return Pass(
            function,
            by_group(plan, self._measure.names, scalars),
            kept=self._ranks,
            keys=lambda name: random_keys(seed, experts, name),
        )


def _widths(densities: Sequence[float], windows: Sequence[float]) -> list[float]:
    """Return the windows, narrowed to what fits."""
    return [
        min(window, 2 * density, 2 * (1 - density))
        for density, window in zip(densities, windows, strict=True)
    ]


def _smallest(densities: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Return the smallest chance of being kept, in draws."""
    return [
        N_DRAWS * (density - width / 2) for density, width in zip(densities, widths, strict=True)
    ]


def ranks(name: str, deltas: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the rank of each entry's magnitude in its row, from 0 to 1; 1/2 where it is alone."""
    return tuple(_ranks(delta) for delta in deltas)


def _ranks(delta: Tensor) -> Tensor:
    if not delta.numel() or not delta.ndim or delta.shape[-1] == 1:
        return torch.full_like(delta, 0.5)
    order = delta.abs().sort(dim=-1, stable=True).indices
    steps = torch.arange(delta.shape[-1], device=delta.device, dtype=torch.float32)
    steps = (steps / (delta.shape[-1] - 1)).expand(delta.shape)
    return torch.empty_like(delta).scatter_(-1, order, steps)


def _left(chunk: Chunk, scalars: DellaScalars[Tensor]) -> list[Tensor]:
    """Return what is kept of each task vector, divided by its chance."""
    if chunk.positions is None or chunk.keys is None:
        raise ValueError("della needs keys: the pass has none")
    left = []
    for i, delta in enumerate(chunk.deltas):
        chance = (chunk.kept[i] * scalars.widths[i]).add_(scalars.smallest[i])
        kept = keep_drawn(delta, chunk.positions, chunk.keys[i], chance)
        left.append(kept.div_(chance.clamp_(min=1.0)).mul_(float(N_DRAWS)))
    return left


def merge_ranked(chunk: Chunk) -> tuple[Tensor]:
    """Return the weighted sum of what is left, ``(m,)`` float32.

    Args:
        chunk: Task vectors and :class:`DellaScalars`; kept: ranks.
    """
    scalars: DellaScalars[Tensor] = unpack(DellaScalars, chunk)
    return (weighted_sum(_left(chunk, scalars), scalars.coefficients),)


def merge_ranked_elected(chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`merge_elected` does of what is left.

    Args:
        chunk: As for :func:`merge_ranked`.
    """
    scalars: DellaScalars[Tensor] = unpack(DellaScalars, chunk)
    return merge_elected(_left(chunk, scalars), scalars, "mean")
