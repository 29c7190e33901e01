"""PCB-Merging: weigh entries by how they compete within and across tasks, drop the lightest."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from searchmerge.merging.engine import delta_chunks
from searchmerge.merging.kernels import GRID, ratio
from searchmerge.merging.method import COEFFICIENT, METHODS, Bound, Choice, Hyperparameter, Rows
from searchmerge.merging.statistics import OrderStatistics
from searchmerge.merging.task_vectors import TaskVectors

_logger = logging.getLogger(__name__)

PCB_DENSITY = Hyperparameter("density", 0.0, 1.0, default=0.1, search=(0.05, 0.5), step=1 / GRID)


@dataclass(frozen=True, slots=True)
class _Variant:
    """One of the formulas that the authors released.

    Attributes:
        clamp: Fraction of magnitudes clamped at either end.
        across: Balance across tasks, from deltas ``(n, m)`` and scaled magnitudes ``(n, m)``.
    """

    clamp: float
    across: Callable[[Tensor, Tensor], Tensor]


def _with_sum(deltas: Tensor, scaled: Tensor) -> Tensor:
    return torch.tanh(deltas * deltas.sum(0))


def _with_scaled_sum(deltas: Tensor, scaled: Tensor) -> Tensor:
    return torch.tanh(deltas * (deltas.sign() * scaled).sum(0))


def _pairwise(deltas: Tensor, scaled: Tensor) -> Tensor:
    signed = deltas.sign() * scaled
    return torch.stack([torch.tanh(row * signed).sum(0) for row in signed])


VARIANTS = {
    "reference": _Variant(1e-4, _with_sum),
    "nlp": _Variant(1e-2, _with_sum),
    "vision": _Variant(1e-2, _with_scaled_sum),
    "vision_es": _Variant(1e-2, _pairwise),
}


@METHODS.register("pcb")
class Pcb:
    r"""Balance the competition between parameters (Du et al., 2024, arXiv:2410.02396).

    .. math:: \beta_t = \exp(n N_t^2) \odot \operatorname{inter}_t, \qquad
              \tau_m = \sum_t \lambda_t T_t s_t \,/\, \sum_t s_t

    N is the clamped magnitude scaled to [0, 1] within its task, T the clamped task vector, and s
    the part of :math:`\beta` above the threshold that the density sets, scaled to [0, 1]. The
    paper's softmax is an exponential in all code the authors released, which differs in clamping
    and in the inter-task term; ``variant`` chooses: ``reference`` is their ``PCB_merge`` with
    :math:`\tanh(\tau_t \sum_s \tau_s)`, ``nlp`` the same with 1 % clamped, ``vision`` takes
    :math:`\tanh(\tau_t \sum_s \operatorname{sgn}(\tau_s) N_s)` and ``vision_es``
    :math:`\sum_s \tanh(\tilde N_t \tilde N_s)` with signed N. Statistics are global over the
    model. The entry at the threshold, and its ties, are dropped. The paper's formula is undefined
    for an expert equal to the base: it is left out, with a warning, and n counts the rest.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        replace(COEFFICIENT, search=(0.0, 2.5)),
        PCB_DENSITY,
    )
    settings: ClassVar[tuple[Choice, ...]] = (
        Choice("variant", default="reference", choices=tuple(VARIANTS)),
    )

    def __init__(self, task_vectors: TaskVectors) -> None:
        """Measure the magnitudes; the balances are measured once a variant is asked for."""
        self._n_experts = len(task_vectors.experts)
        n_parameters = max(1, task_vectors.n_parameters)
        magnitudes = OrderStatistics(
            lambda: (chunk.abs_() for chunk in delta_chunks(task_vectors)), self._n_experts
        )
        largest = magnitudes.at([n_parameters - 1] * self._n_experts)
        self._active = [i for i, size in enumerate(largest) if size > 0]
        for i, expert in enumerate(task_vectors.experts):
            if i not in self._active:
                _logger.warning("PCB leaves expert %r out: it is equal to the base", expert)
        self._task_vectors = task_vectors.of([task_vectors.experts[i] for i in self._active])
        self._magnitudes = magnitudes
        self._d = n_parameters
        self._measured: dict[str, tuple[Tensor, OrderStatistics]] = {}

    def bind(self, rows: Rows) -> Bound:
        """Look the balances to drop below up, and fix the coefficients."""
        if not self._active:
            return Bound(_nothing, [[[0.0] * self._n_experts] for _ in rows.rows])
        name = str(rows.settings["variant"])
        ends, balances = self._measure(name)
        heaviest = balances.at([self._d - 1] * len(self._active))
        scalars = []
        for row in rows.rows:
            densities = [row["density"][i] for i in self._active]
            lightest = balances.at([_drop_rank(self._d, density) for density in densities])
            coefficients = [row["coefficient"][i] for i in self._active]
            scalars.append([*ends.tolist(), lightest, heaviest, coefficients])
        return Bound(self._combine(name), scalars)

    def _combine(self, name: str) -> Callable[[Tensor, Tensor], tuple[Tensor, None]]:
        active = tuple(self._active) if len(self._active) < self._n_experts else None
        return partial(merge_pcb, across=VARIANTS[name].across, active=active)

    def _measure(self, name: str) -> tuple[Tensor, OrderStatistics]:
        if name not in self._measured:
            variant, d = VARIANTS[name], self._d
            ranks = [min(d - 1, int(d * variant.clamp)), max(0, int(d * (1 - variant.clamp) - 1))]
            both = [self._magnitudes.at([rank] * self._n_experts) for rank in ranks]
            ends = torch.tensor([[values[i] for i in self._active] for values in both])
            grid = [_drop_rank(d, step / GRID) for step in range(1, GRID)]
            balances = OrderStatistics(
                lambda: (
                    balance(chunk, ends, variant.across)[0]
                    for chunk in delta_chunks(self._task_vectors)
                ),
                len(self._active),
                [*grid, d - 1],
            )
            self._measured[name] = (ends, balances)
        return self._measured[name]


def _drop_rank(d: int, density: float) -> int:
    """Return the rank, from 0, of the heaviest balance that is dropped."""
    return min(d - 1, int(d * (1 - density)))


def _nothing(deltas: Tensor, scalars: Tensor) -> tuple[Tensor, None]:
    return torch.zeros_like(deltas[0]), None


def balance(
    deltas: Tensor, ends: Tensor, across: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return how each entry competes, and the clamped task vectors.

    Args:
        deltas: Task vectors, ``(n_experts, m)`` float32.
        ends: Smallest and largest magnitude, ``(2, n_experts)``; others are clamped to them.
        across: The balance across tasks.

    Returns:
        Balances and clamped task vectors, each ``(n_experts, m)`` float32.
    """
    low, high = ends.to(deltas.device)[:, :, None]
    clamped = torch.clamp(torch.clamp(deltas.abs(), min=low), max=high)
    scaled = ratio(clamped - low, (high - low).expand_as(clamped))
    within = torch.exp(len(deltas) * scaled.square())
    return within * across(deltas, scaled), deltas.sign() * clamped


def merge_pcb(
    deltas: Tensor,
    scalars: Tensor,
    *,
    across: Callable[[Tensor, Tensor], Tensor],
    active: Sequence[int] | None,
) -> tuple[Tensor, None]:
    """Drop, rescale and merge (Du et al., 2024, arXiv:2410.02396); no tally.

    Args:
        deltas: Task vectors, ``(n_experts, m)`` float32.
        scalars: ``(5, n_active)``: smallest and largest magnitude, balance that is dropped,
            heaviest balance, coefficient.
        across: The balance across tasks.
        active: The experts that take part; ``None`` for all.

    Returns:
        The merged task vector ``(m,)``, 0 where every expert was dropped.
    """
    if active is not None:
        deltas = deltas[list(active)]
    balances, clamped = balance(deltas, scalars[:2], across)
    lightest, heaviest, coefficients = scalars[2:, :, None]
    excess = torch.maximum(balances, lightest) - lightest
    weights = ratio(excess, (heaviest - lightest).expand_as(excess))
    total = (coefficients * clamped * weights).sum(0)
    return total / weights.sum(0).clamp(min=1e-12), None
