"""Exact order statistics of whole task vectors, measured without sorting or copying them."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_BINS = 1 << 16
_SIGN = 1 << 31

Chunks = Callable[[], Iterable[Tensor]]
"""Gives the numbers anew, chunk by chunk, each ``(n_experts, m)`` float32."""


class OrderStatistics:
    """The k-th smallest of each expert's numbers, exactly as a sort of all of them would give it.

    A radix histogram in two levels: the high 16 bits of each number's order-preserving key are
    counted once; the low 16 bits only in those bins that hold a rank that was asked for. No
    tensor of the model's size is made.

    Args:
        chunks: The numbers; they must come out the same each time.
        n_experts: Rows of each chunk.
        grid: Ranks that are all measured as soon as one of them is asked for.
    """

    def __init__(self, chunks: Chunks, n_experts: int, grid: Sequence[int] = ()) -> None:
        self._chunks = chunks
        self._grid = tuple(grid)
        self._high = torch.zeros(n_experts, _BINS, dtype=torch.int64)
        for chunk in chunks():
            for row, keys in zip(self._high, _keys(chunk), strict=True):
                row += torch.bincount(keys >> 16, minlength=_BINS).cpu()
        self._below = self._high.cumsum(1)
        self._known: list[dict[int, float]] = [{} for _ in range(n_experts)]

    def at(self, ranks: Sequence[int]) -> list[float]:
        """Return one number per expert: its ``rank``-th smallest, counted from 0.

        Args:
            ranks: One per expert, each in [0, d).
        """
        asked = [{rank} for rank in ranks]
        if any(rank not in known for rank, known in zip(ranks, self._known, strict=True)):
            self._measure([{*own, *self._grid} for own in asked])
        return [known[rank] for rank, known in zip(ranks, self._known, strict=True)]

    def _measure(self, ranks: Sequence[set[int]]) -> None:
        wanted = [sorted(r - known.keys()) for r, known in zip(ranks, self._known, strict=True)]
        bins = [
            torch.searchsorted(below, torch.tensor(own), right=True).unique()
            for below, own in zip(self._below, wanted, strict=True)
        ]
        counts = self._count_low(bins)
        for expert, own in enumerate(wanted):
            where = torch.searchsorted(self._below[expert], torch.tensor(own), right=True)
            for rank, high in zip(own, where.tolist(), strict=True):
                slot = int(torch.searchsorted(bins[expert], high))
                before = int(self._below[expert, high] - self._high[expert, high])
                low = int(torch.searchsorted(counts[expert][slot], rank - before, right=True))
                self._known[expert][rank] = _number((high << 16) | low)

    def _count_low(self, bins: Sequence[Tensor]) -> list[Tensor]:
        """Return, per expert, the running counts of the low halves in each of ``bins``."""
        slots = []
        for own in bins:
            table = torch.full((_BINS,), -1, dtype=torch.int64)
            table[own] = torch.arange(len(own))
            slots.append(table)
        counts = [torch.zeros(len(own) * _BINS, dtype=torch.int64) for own in bins]
        for chunk in self._chunks():
            for expert, keys in enumerate(_keys(chunk)):
                slot = slots[expert].to(keys.device)[keys >> 16]
                inside = slot >= 0
                cells = (slot[inside] << 16) | (keys[inside] & (_BINS - 1))
                counts[expert] += torch.bincount(cells, minlength=len(counts[expert])).cpu()
        return [c.view(-1, _BINS).cumsum(1) for c in counts]


def _keys(numbers: Tensor) -> Tensor:
    """Return int64 keys in [0, 2^32) that order as the float32 ``numbers`` do; -0 is 0."""
    bits = (numbers + 0.0).view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, ~bits & (2 * _SIGN - 1), bits | _SIGN)


def _number(key: int) -> float:
    bits = key & ~_SIGN if key & _SIGN else ~key & (2 * _SIGN - 1)
    signed = bits - 2 * _SIGN if bits >= _SIGN else bits
    return float(torch.tensor(signed, dtype=torch.int32).view(torch.float32))
