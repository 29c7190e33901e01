"""PCB-Merging: parameters compete within a task and between tasks."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple

import numpy as np
import torch
from torch import Tensor

from searchmerge.errors import SpecError
from searchmerge.merging.kernels import (
    GRID,
    Chunk,
    Numbers,
    Row,
    add_scaled,
    add_up,
    clamp_between,
    excess,
    exponential,
    is_on_gpu,
    pack,
    signed,
    unpack,
)
from searchmerge.merging.method import (
    COEFFICIENT,
    DENSITY,
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
from searchmerge.merging.methods.linear import SumScalars, weighted_kept
from searchmerge.plan import MergePlan

if TYPE_CHECKING:
    from searchmerge.merging.measure import Measure
    from searchmerge.merging.operands import Operands
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
    return [(delta * total).tanh_() for delta in deltas]


def _with_scaled_sum(deltas: Sequence[Tensor], scaled: Sequence[Tensor]) -> list[Tensor]:
    total = add_up([delta.sign() * size for delta, size in zip(deltas, scaled, strict=True)])
    return [(delta * total).tanh_() for delta in deltas]


def _pairwise(deltas: Sequence[Tensor], scaled: Sequence[Tensor]) -> list[Tensor]:
    entries = [delta.sign() * size for delta, size in zip(deltas, scaled, strict=True)]
    return [add_up([(entry * other).tanh_() for other in entries]) for entry in entries]


VARIANTS = {
    "reference": Variant(1e-4, _with_sum),
    "nlp": Variant(1e-2, _with_sum),
    "vision": Variant(1e-2, _with_scaled_sum),
    "vision_es": Variant(1e-2, _pairwise),
}

VARIANT = Setting("variant", default="reference", choices=tuple(VARIANTS))


class Ends(NamedTuple, Generic[Row]):
    """What scales each expert's magnitudes to [0, 1].

    Attributes:
        low: The magnitude that smaller ones are raised to.
        high: The magnitude that larger ones are lowered to.
        distance: ``high - low``, or 1 where that is 0.
    """

    low: Row
    high: Row
    distance: Row


class Bounds(NamedTuple):
    """Which balances a density drops, and how it scales the others, one number per expert.

    Attributes:
        lightest: The heaviest balance that is dropped.
        factors: 1 / its distance to the heaviest of all.
    """

    lightest: tuple[float, ...]
    factors: tuple[float, ...]


class PcbScalars(NamedTuple, Generic[Row]):
    """What merging reads of each expert.

    Attributes:
        low: See :class:`Ends`.
        high: See there.
        distance: See there.
        lightest: See :class:`Bounds`.
        factors: See there.
        coefficients: The factor on its entries.
    """

    low: Row
    high: Row
    distance: Row
    lightest: Row
    factors: Row
    coefficients: Row


@dataclass(frozen=True)
class _Measured:
    """What is measured of the balances of one variant.

    Attributes:
        ends: The ends of magnitudes.
        balances: Order statistics of each expert's balances over the whole model.
        kept: The balances themselves, where memory allows.
    """

    ends: Ends[list[float]]
    balances: "OrderStatistics"
    kept: Mapping[str, tuple[Tensor, ...]] | None

    @property
    def raises(self) -> bool:
        """Return whether clamping raises small magnitudes; not where many entries are 0."""
        return any(self.ends.low)

    def scalars(self, bounds: Bounds, coefficients: Sequence[float]) -> PcbScalars[Numbers]:
        """Return what merging reads, under the bounds of a density."""
        return PcbScalars(**self.ends._asdict(), **bounds._asdict(), coefficients=coefficients)


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
        replace(DENSITY, default=0.1, search=(0.01, 0.5)),
    )
    settings: ClassVar[tuple[Setting, ...]] = (VARIANT, DEPTH_SLOPE)
    scope: ClassVar[Scope] = "entry"
    published: ClassVar[Published | None] = Published("PCB", "2410.02396")

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
            zeros = [SumScalars([0.0])] * len(plan.groups)
            return Pass(nothing, by_group(plan, names, zeros), (0,))
        variant = str(setting(plan, VARIANT))
        measured = self._of(variant)
        bounds = tuple(self._bounds(measured, row) for row in plan.values["density"])
        coefficients = [[row[i] for i in self._active] for row in plan.values["coefficient"]]
        shares = self._repeated((variant, bounds, plan.groups), plan, measured)
        if shares is not None:
            of_shares = [SumScalars(row) for row in coefficients]
            return Pass(weighted_kept, by_group(plan, names, of_shares), (), shares)
        scalars = by_group(
            plan, names, [measured.scalars(*of) for of in zip(bounds, coefficients, strict=True)]
        )
        if measured.kept is not None:
            return Pass(_MERGE_KEPT[measured.raises], scalars, self._active, measured.kept)
        return Pass(_MERGE[variant, measured.raises], scalars, self._active)

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
        scalars = pack(ends)

        def compute(name: str, part: "Operands") -> tuple[Tensor, ...]:
            part = part.with_scalars(scalars)
            return self._measure.engine.compute(_BALANCES[variant], part)

        kept = self._measure.keep(compute, n_active, experts=self._active)

        def read(name: str, part: "Operands") -> tuple[Tensor, ...]:
            whole = () if kept is None else kept[name]
            return _part_of(whole, part)

        balances = self._measure.order_statistics(
            f"pcb-{variant}",
            compute if kept is None else read,
            n_active,
            grid=[*(_dropped_rank(d, step / GRID) for step in range(GRID + 1)), d - 1],
            experts=self._active,
        )
        return _Measured(ends, balances, kept)

    def _ends(self, clamp: float) -> Ends[list[float]]:
        d, everyone = self._measure.n_parameters, range(len(self._measure.experts))
        low = self._measure.magnitudes([int(d * clamp) for _ in everyone])
        high = self._measure.magnitudes([int(d * (1 - clamp) - 1) for _ in everyone])
        low, high = [low[i] for i in self._active], [high[i] for i in self._active]
        return Ends(low, high, _distances(low, high))

    def _bounds(self, measured: _Measured, densities: Sequence[float]) -> Bounds:
        d = self._measure.n_parameters
        lightest = measured.balances.at([_dropped_rank(d, densities[i]) for i in self._active])
        heaviest = measured.balances.at([d - 1] * len(self._active))
        factors = (min(1 / distance, _LARGEST) for distance in _distances(lightest, heaviest))
        return Bounds(tuple(lightest), tuple(factors))

    def _repeated(
        self, key: tuple[object, ...], plan: MergePlan, measured: _Measured
    ) -> Mapping[str, tuple[Tensor, ...]] | None:
        """Return the share of each expert in each entry, if nothing but coefficients changed."""
        if key != self._last:
            self._last = key
            if self._shares is not None:
                self._measure.release(self._shares)
            self._shares = None
        elif self._shares is None:
            self._shares = self._keep_shares(str(key[0]), plan, measured)
        return self._shares

    def _keep_shares(
        self, variant: str, plan: MergePlan, measured: _Measured
    ) -> Mapping[str, tuple[Tensor, ...]] | None:
        ones = [1.0] * len(self._active)
        of_groups = [self._bounds(measured, row) for row in plan.values["density"]]
        scalars = by_group(
            plan, self._measure.names, [measured.scalars(bounds, ones) for bounds in of_groups]
        )
        function = _SHARES_KEPT[measured.raises]
        if measured.kept is None:
            function = _SHARES[variant, measured.raises]

        def compute(name: str, part: "Operands") -> tuple[Tensor, ...]:
            whole = () if measured.kept is None else measured.kept[name]
            part = replace(part, scalars=scalars(name), kept=_part_of(whole, part))
            return self._measure.engine.compute(function, part)

        return self._measure.keep(compute, len(self._active), experts=self._active)


def _part_of(tensors: tuple[Tensor, ...], part: "Operands") -> tuple[Tensor, ...]:
    """Return the entries of whole parameters that a part of them has."""
    return tuple(tensor[part.start : part.start + len(part.base)] for tensor in tensors)


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
        chunk: Task vectors and :class:`Ends`.
        variant: A key of ``VARIANTS``.
    """
    ends: Ends[Tensor] = unpack(Ends, chunk)
    return _balances(chunk.deltas, ends, variant)


def _balances(
    deltas: Sequence[Tensor], ends: Ends[Tensor] | PcbScalars[Tensor], variant: str
) -> tuple[Tensor, ...]:
    scaled = [
        clamp_between(delta.abs(), ends.low[i], ends.high[i])
        .sub_(ends.low[i])
        .div_(ends.distance[i])
        for i, delta in enumerate(deltas)
    ]
    inter = VARIANTS[variant].inter(deltas, scaled)
    n_experts = float(len(scaled))
    return tuple(
        exponential(size.square_(), n_experts).mul_(other)
        for size, other in zip(scaled, inter, strict=True)
    )


def _weigh(
    chunk: Chunk, scalars: PcbScalars[Tensor], *, raises: bool
) -> tuple[list[Tensor], Tensor]:
    """Return ``T_t s_t`` of each expert and the sum of ``s_t``, at least 1e-12."""
    weights = [
        excess(balance, scalars.lightest[i]).mul_(scalars.factors[i])
        for i, balance in enumerate(chunk.kept)
    ]
    total = add_up(weights).clamp_min_(1e-12)
    low, high = scalars.low, scalars.high
    if is_on_gpu(chunk.deltas[0]) and not raises:  # the balance has clamped magnitudes already
        clamped = [
            torch.copysign(clamp_between(delta.abs(), low[i], high[i]), delta)
            for i, delta in enumerate(chunk.deltas)
        ]
    else:
        clamped = [
            signed(clamp_between(delta.abs(), low[i], high[i]), delta)
            if raises
            else clamp_between(delta, -high[i], high[i])
            for i, delta in enumerate(chunk.deltas)
        ]
    return [entry.mul_(weight) for entry, weight in zip(clamped, weights, strict=True)], total


def shares_kept(chunk: Chunk, *, raises: bool) -> tuple[Tensor, ...]:
    """Return ``T_t s_t / sum s`` of each expert, ``(m,)`` float32, from the kept balances.

    Args:
        chunk: Task vectors and :class:`PcbScalars`; kept: the balances.
        raises: Whether a smallest magnitude is above 0.
    """
    scalars: PcbScalars[Tensor] = unpack(PcbScalars, chunk)
    parts, total = _weigh(chunk, scalars, raises=raises)
    return tuple(part.div_(total) for part in parts)


def merge_kept(chunk: Chunk, *, raises: bool) -> tuple[Tensor]:
    """Return the merged task vector ``(m,)`` float32 from the kept balances.

    Args:
        chunk: As for :func:`shares_kept`.
        raises: As there.
    """
    scalars: PcbScalars[Tensor] = unpack(PcbScalars, chunk)
    parts, total = _weigh(chunk, scalars, raises=raises)
    merged = parts[0].mul_(scalars.coefficients[0])
    for i, part in enumerate(parts[1:], start=1):
        merged = add_scaled(merged, part, scalars.coefficients[i])
    return (merged.div_(total),)


def merge_computed(chunk: Chunk, *, variant: str, raises: bool) -> tuple[Tensor]:
    """Return the merged task vector as :func:`merge_kept`, computing the balances."""
    return merge_kept(_with_balances(chunk, variant), raises=raises)


def shares_computed(chunk: Chunk, *, variant: str, raises: bool) -> tuple[Tensor, ...]:
    """Return what :func:`shares_kept` returns, computing the balances."""
    return shares_kept(_with_balances(chunk, variant), raises=raises)


def _with_balances(chunk: Chunk, variant: str) -> Chunk:
    scalars: PcbScalars[Tensor] = unpack(PcbScalars, chunk)
    return chunk._replace(kept=_balances(chunk.deltas, scalars, variant))


_BALANCES = {name: partial(balances, variant=name) for name in VARIANTS}
_WAYS = [(name, raises) for name in VARIANTS for raises in (True, False)]
_MERGE = {way: partial(merge_computed, variant=way[0], raises=way[1]) for way in _WAYS}
_SHARES = {way: partial(shares_computed, variant=way[0], raises=way[1]) for way in _WAYS}
_MERGE_KEPT = {raises: partial(merge_kept, raises=raises) for raises in (True, False)}
_SHARES_KEPT = {raises: partial(shares_kept, raises=raises) for raises in (True, False)}
