"""PCB-Merging: parameters compete within a task and between tasks."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from searchmerge.errors import SpecError
from searchmerge.merging.kernels import GRID, Chunk, add_scaled, add_up, clamp_between, signed
from searchmerge.merging.method import (
    COEFFICIENT,
    DEPTH_SLOPE,
    METHODS,
    Hyperparameter,
    Pass,
    Scope,
    Setting,
    by_group,
    setting,
)
from searchmerge.merging.methods.linear import weighted_kept
from searchmerge.plan import MergePlan

if TYPE_CHECKING:
    from searchmerge.merging.engine import Operands
    from searchmerge.merging.measure import Measure
    from searchmerge.merging.statistics import OrderStatistics

_logger = logging.getLogger(__name__)

_LARGEST = float(np.finfo(np.float32).max)
_MOST_EXPERTS = 88  # exp(n) is beyond float32 from 89 on


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the formulas that the authors released.

    Attributes:
        clamp: Fraction of magnitudes that is clamped at either end.
        inter: The balance between tasks, from all task vectors and all scaled magnitudes.
    """

    clamp: float
    inter: Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


def _with_sum(deltas: Sequence[Tensor], scaled: Sequence[Tensor]) -> list[Tensor]:
    total = add_up(deltas)
    return [(own * total).tanh_() for own in deltas]


def _with_scaled_sum(deltas: Sequence[Tensor], scaled: Sequence[Tensor]) -> list[Tensor]:
    total = add_up([own.sign() * size for own, size in zip(deltas, scaled, strict=True)])
    return [(own * total).tanh_() for own in deltas]


def _pairwise(deltas: Sequence[Tensor], scaled: Sequence[Tensor]) -> list[Tensor]:
    signed = [own.sign() * size for own, size in zip(deltas, scaled, strict=True)]
    return [add_up([(own * other).tanh_() for other in signed]) for own in signed]


VARIANTS = {
    "reference": Variant(1e-4, _with_sum),
    "nlp": Variant(1e-2, _with_sum),
    "vision": Variant(1e-2, _with_scaled_sum),
    "vision_es": Variant(1e-2, _pairwise),
}

VARIANT = Setting("variant", default="reference", choices=tuple(VARIANTS))


@dataclass(frozen=True)
class _Measured:
    """What is known of the balances of one variant.

    Attributes:
        ends: Rows of scalars: smallest and largest magnitude, and their distance (or 1).
        balances: Order statistics of each expert's balances over the whole model.
        kept: The balances themselves, where memory allows.
    """

    ends: list[list[float]]
    balances: "OrderStatistics"
    kept: Mapping[str, tuple[Tensor, ...]] | None

    @property
    def raises(self) -> bool:
        """Return whether clamping raises small magnitudes; not where many entries are 0."""
        return any(self.ends[0])


@METHODS.register("pcb")
class Pcb:
    r"""Balance how parameters compete, drop the weak, and rescale (Du et al., 2024).

    arXiv:2410.02396, in the form of all code that its authors released:

    .. math:: \beta_t = \exp(n N_t^2) \, I_t, \qquad
              s_t = \frac{\max(\beta_t, b_t) - b_t}{\max \beta_t - b_t}, \qquad
              \tau_m = \frac{\sum_t \lambda_t T_t s_t}{\sum_t s_t}

    with N the clamped magnitude scaled to [0, 1] within its task, T the clamped task vector, I
    the balance between tasks, b the order statistic that the density sets, and n the number of
    experts. The paper has softmax for exp, no clamping, and :math:`\beta` itself for s; its code
    differs also among itself, which ``variant`` chooses: ``reference`` (``PCB_merge``: 0.01 %
    clamped at either end, :math:`I_t = \tanh(\tau_t \sum_s \tau_s)`); ``nlp`` (the same with
    1 %); ``vision`` (1 %, :math:`\tanh(\tau_t \sum_s \operatorname{sgn}(\tau_s) N_s)`);
    ``vision_es`` (1 %, :math:`\sum_s \tanh(\operatorname{sgn}(\tau_t) N_t
    \operatorname{sgn}(\tau_s) N_s)`). Statistics are global over the model. Entries equal to b
    are dropped. Where all are dropped the base stays. A density above the share of entries
    that agree with the sum (about 0.6) keeps entries in conflict.

    For an expert equal to the base the formula is undefined: it is left out, with a warning, and
    n counts the others.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        replace(COEFFICIENT, search=(0.5, 3.0)),
        Hyperparameter("density", 0.0, 1.0, default=0.1, search=(0.01, 0.5), step=0.01),
    )
    settings: ClassVar[tuple[Setting, ...]] = (VARIANT, DEPTH_SLOPE)
    scope: ClassVar[Scope] = "entry"

    def __init__(self, measure: "Measure") -> None:
        """Find the experts to leave out; balances are measured at the first plan."""
        self._measure = measure
        self._active = tuple(
            i for i, expert in enumerate(measure.experts) if not measure.is_zero(expert)
        )
        for i, expert in enumerate(measure.experts):
            if i not in self._active:
                _logger.warning("pcb leaves out expert %r: it is equal to the base", expert)
        if len(self._active) > _MOST_EXPERTS:
            raise SpecError(
                f"pcb: {len(self._active)} experts; allowed are up to {_MOST_EXPERTS}, as its "
                "exponential is beyond float32 for more"
            )
        self._measured: tuple[str, _Measured] | None = None
        self._last: object = None
        self._shares: Mapping[str, tuple[Tensor, ...]] | None = None

    def bind(self, plan: MergePlan) -> Pass:
        """Look up the balances to drop below, and fix the coefficients."""
        names = self._measure.names
        if not self._active:
            return Pass(nothing, by_group(plan, names, [[[0.0]]] * len(plan.groups)), (0,))
        variant = str(setting(plan, VARIANT))
        known = self._of(variant)
        bounds = tuple(self._bounds(known, row) for row in plan.values["density"])
        coefficients = [[row[i] for i in self._active] for row in plan.values["coefficient"]]
        shares = self._repeated((variant, bounds, plan.groups), plan, known)
        if shares is not None:
            alone = [[row] for row in coefficients]
            return Pass(weighted_kept, by_group(plan, names, alone), (), shares)
        rows: list[list[Sequence[float]]] = [
            [*known.ends, *own, row] for own, row in zip(bounds, coefficients, strict=True)
        ]
        scalars = by_group(plan, names, rows)
        if known.kept is not None:
            return Pass(_MERGE_KNOWN[known.raises], scalars, self._active, known.kept)
        return Pass(_MERGE[variant, known.raises], scalars, self._active)

    def _of(self, variant: str) -> _Measured:
        if self._measured is None or self._measured[0] != variant:
            if self._measured is not None and self._measured[1].kept is not None:
                self._measure.release(self._measured[1].kept)
            self._measured = None
            self._measured = (variant, self._measure_balances(variant))
        return self._measured[1]

    def _measure_balances(self, variant: str) -> _Measured:
        d, n_active = self._measure.n_parameters, len(self._active)
        ends = self._ends(VARIANTS[variant].clamp)
        scalars = torch.tensor(ends)

        def compute(name: str, part: "Operands") -> tuple[Tensor, ...]:
            part = part.with_scalars(scalars)
            return self._measure.engine.compute(_BALANCES[variant], part)

        kept = self._measure.keep(compute, n_active, experts=self._active)

        def read(name: str, part: "Operands") -> tuple[Tensor, ...]:
            own = () if kept is None else kept[name]
            return tuple(t[part.start : part.start + len(part.base)] for t in own)

        balances = self._measure.order_statistics(
            f"pcb-{variant}",
            compute if kept is None else read,
            n_active,
            grid=[*(_dropped_rank(d, step / GRID) for step in range(GRID + 1)), d - 1],
            experts=self._active,
        )
        return _Measured(ends, balances, kept)

    def _ends(self, clamp: float) -> list[list[float]]:
        d, everyone = self._measure.n_parameters, range(len(self._measure.experts))
        low = self._measure.magnitudes([int(d * clamp) for _ in everyone])
        high = self._measure.magnitudes([int(d * (1 - clamp) - 1) for _ in everyone])
        low, high = [low[i] for i in self._active], [high[i] for i in self._active]
        return [low, high, _distances(low, high)]

    def _bounds(
        self, known: _Measured, densities: Sequence[float]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the balance dropped with all below it, and 1 / its distance to the largest."""
        d = self._measure.n_parameters
        lightest = known.balances.at([_dropped_rank(d, densities[i]) for i in self._active])
        heaviest = known.balances.at([d - 1] * len(self._active))
        factors = (min(1 / own, _LARGEST) for own in _distances(lightest, heaviest))
        return tuple(lightest), tuple(factors)

    def _repeated(
        self, key: tuple[object, ...], plan: MergePlan, known: _Measured
    ) -> Mapping[str, tuple[Tensor, ...]] | None:
        """Return the share of each expert in each entry, if nothing but coefficients changed."""
        if key != self._last:
            self._last = key
            if self._shares is not None:
                self._measure.release(self._shares)
            self._shares = None
        elif self._shares is None:
            self._shares = self._keep_shares(str(key[0]), plan, known)
        return self._shares

    def _keep_shares(
        self, variant: str, plan: MergePlan, known: _Measured
    ) -> Mapping[str, tuple[Tensor, ...]] | None:
        rows: list[list[Sequence[float]]] = [
            [*known.ends, *self._bounds(known, row)] for row in plan.values["density"]
        ]
        scalars = by_group(plan, self._measure.names, rows)
        function = _SHARES_KNOWN[known.raises]
        if known.kept is None:
            function = _SHARES[variant, known.raises]

        def compute(name: str, part: "Operands") -> tuple[Tensor, ...]:
            own = () if known.kept is None else known.kept[name]
            stop = part.start + len(part.base)
            kept = tuple(tensor[part.start : stop] for tensor in own)
            part = replace(part, scalars=scalars(name), kept=kept)
            return self._measure.engine.compute(function, part)

        return self._measure.keep(compute, len(self._active), experts=self._active)


def _dropped_rank(d: int, density: float) -> int:
    """Return the rank, from 0, of the heaviest balance that is dropped."""
    return min(d - 1, int(d * (1 - density)))


def _distances(low: Sequence[float], high: Sequence[float]) -> list[float]:
    """Return ``high - low`` in float32, 1 where they are equal: 0 divided by it stays 0."""
    distances = np.asarray(high, np.float32) - np.asarray(low, np.float32)
    return [float(distance) or 1.0 for distance in distances]


def nothing(chunk: Chunk) -> tuple[Tensor]:
    """Return a merged task vector of zeros."""
    return (torch.zeros_like(chunk.deltas[0]),)


def balances(chunk: Chunk, *, variant: str) -> tuple[Tensor, ...]:
    """Return how each expert's entries compete, ``(m,)`` float32 each; negative where they lose.

    Args:
        chunk: Task vectors; scalars ``(3 or more, n_experts)``: smallest and largest magnitude,
            and their distance.
        variant: A key of ``VARIANTS``.
    """
    low, high, distance = chunk.scalars[0], chunk.scalars[1], chunk.scalars[2]
    scaled = [
        clamp_between(own.abs(), low[i], high[i]).sub_(low[i]).div_(distance[i])
        for i, own in enumerate(chunk.deltas)
    ]
    inter = VARIANTS[variant].inter(chunk.deltas, scaled)
    n_experts = float(len(scaled))
    return tuple(
        size.square_().mul_(n_experts).exp_().mul_(other)
        for size, other in zip(scaled, inter, strict=True)
    )


def _weigh(chunk: Chunk, *, raises: bool) -> tuple[list[Tensor], Tensor]:
    """Return ``T_t s_t`` of each expert and the sum of ``s_t``, at least 1e-12."""
    low, high, _, lightest, factor = chunk.scalars[:5]
    kept = [(own - lightest[i]).relu_().mul_(factor[i]) for i, own in enumerate(chunk.kept)]
    total = add_up(kept).clamp_min_(1e-12)
    clamped = (
        signed(clamp_between(own.abs(), low[i], high[i]), own)
        if raises
        else clamp_between(own, -high[i], high[i])
        for i, own in enumerate(chunk.deltas)
    )
    return [own.mul_(share) for own, share in zip(clamped, kept, strict=True)], total


def shares_known(chunk: Chunk, *, raises: bool) -> tuple[Tensor, ...]:
    """Return ``T_t s_t / sum s`` of each expert, ``(m,)`` float32, from the kept balances.

    Args:
        chunk: Task vectors; scalars ``(5 or more, n_experts)``: those of :func:`balances`, then
            the balance that is dropped, and 1 / its distance to the largest; kept: the balances.
        raises: Whether a smallest magnitude is above 0.
    """
    parts, total = _weigh(chunk, raises=raises)
    return tuple(part.div_(total) for part in parts)


def merge_known(chunk: Chunk, *, raises: bool) -> tuple[Tensor]:
    """Return the merged task vector ``(m,)`` float32 from the kept balances.

    Args:
        chunk: As for :func:`shares_known`; a sixth row of scalars holds the coefficients.
        raises: As there.
    """
    parts, total = _weigh(chunk, raises=raises)
    merged = parts[0].mul_(chunk.scalars[5, 0])
    for i, part in enumerate(parts[1:], start=1):
        merged = add_scaled(merged, part, chunk.scalars[5, i])
    return (merged.div_(total),)


def merge_computed(chunk: Chunk, *, variant: str, raises: bool) -> tuple[Tensor]:
    """Return the merged task vector as :func:`merge_known`, computing the balances."""
    return merge_known(chunk._replace(kept=balances(chunk, variant=variant)), raises=raises)


def shares_computed(chunk: Chunk, *, variant: str, raises: bool) -> tuple[Tensor, ...]:
    """Return what :func:`shares_known` returns, computing the balances."""
    return shares_known(chunk._replace(kept=balances(chunk, variant=variant)), raises=raises)


_BALANCES = {name: partial(balances, variant=name) for name in VARIANTS}
_WAYS = [(name, raises) for name in VARIANTS for raises in (True, False)]
_MERGE = {own: partial(merge_computed, variant=own[0], raises=own[1]) for own in _WAYS}
_SHARES = {own: partial(shares_computed, variant=own[0], raises=own[1]) for own in _WAYS}
_MERGE_KNOWN = {raises: partial(merge_known, raises=raises) for raises in (True, False)}
_SHARES_KNOWN = {raises: partial(shares_known, raises=raises) for raises in (True, False)}
