"""Counting numbers between cuts, and collecting some of them, on the device where they are."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

SEGMENTS = 256
"""Counters of a row. The last one takes what is no number, so there are two cuts fewer."""

MOST_CUTS = SEGMENTS - 2

RUN = 32
"""Numbers that follow one another and are drawn together: what a GPU reads at once, and so few
that what lies side by side in a matrix, and is alike, makes up little of a sample."""

_AT_ONCE = 1 << 22  # numbers, where each operation is a pass of its own

_END = 0x7FFFFFFF  # above the key of every finite number
_MAGNITUDE = 0x7FFFFFFF


class Counters(NamedTuple):
    """What is counted of each row on one device, and what of it is collected.

    Keys are int32 that order as the numbers do. Segment ``i`` of a row holds the keys from its
    cut ``i - 1`` on, below its cut ``i``.

    Attributes:
        cuts: Each row's cuts in order, and behind them more than every key,
            ``(n_rows, SEGMENTS)`` int32.
        has_cuts: Whether there is anything to count.
        collects: Which segments are collected, ``(n_rows, SEGMENTS)`` int32.
        limits: How many of 2^24 runs are collected, drawn evenly, ``(n_rows,)`` int32.
        counts: Numbers in each segment, ``(n_rows, SEGMENTS)`` int64.
        n_collected: How many keys were, those for which there was no room too, ``(n_rows,)``
            int32.
        collected: Their keys, in no order, ``(n_rows, capacity)`` int32.
    """

    cuts: Tensor
    has_cuts: bool
    collects: Tensor
    limits: Tensor
    counts: Tensor
    n_collected: Tensor
    collected: Tensor

    def keys(self, row: int) -> Tensor:
        """Return what was collected of a row, on its device."""
        return self.collected[row, : int(self.n_collected[row])]


class Wanted(NamedTuple):
    """What is to be counted of a row.

    Attributes:
        cuts: Keys in order, at most ``MOST_CUTS``.
        collects: Whether each segment is collected, one more than there are cuts.
        every: One of how many runs is; 1 for all.
    """

    cuts: npt.NDArray[np.int64]
    collects: npt.NDArray[np.bool_]
    every: int


def new_counters(rows: Sequence[Wanted], capacity: int, device: torch.device) -> Counters:
    """Return counters that are all 0, with room for ``capacity`` keys of each row."""
    n_rows = len(rows)
    cuts = np.full((n_rows, SEGMENTS), _END, np.int32)
    collects = np.zeros((n_rows, SEGMENTS), np.int32)
    for i, row in enumerate(rows):
        cuts[i, : len(row.cuts)] = row.cuts
        collects[i, : len(row.collects)] = row.collects
    limits = [max(1, (1 << 24) // row.every) for row in rows]
    return Counters(
        torch.from_numpy(cuts).to(device),
        any(len(row.cuts) for row in rows),
        torch.from_numpy(collects).to(device),
        torch.tensor(limits, dtype=torch.int32, device=device),
        torch.zeros(n_rows, SEGMENTS, dtype=torch.int64, device=device),
        torch.zeros(n_rows, dtype=torch.int32, device=device),
        torch.empty(n_rows, capacity, dtype=torch.int32, device=device),
    )


class Part(NamedTuple):
    """Some of every row's numbers, where they lie on one device.

    Attributes:
        rows: Each row's, ``(m,)`` of any float dtype; fewer than 2^31.
        base: What is subtracted before magnitudes are taken, ``(m,)``; ``None`` where the numbers
            themselves are counted.
        first_run: How many runs were counted before: by it they are drawn.
    """

    rows: Sequence[Tensor]
    base: Tensor | None = None
    first_run: int = 0

    @property
    def size_bytes(self) -> int:
        """What all that is read of it takes."""
        return sum(tensor.nbytes for tensor in (*self.rows, *self.bases))

    @property
    def bases(self) -> tuple[Tensor, ...]:
        """The base, where there is one."""
        return () if self.base is None else (self.base,)


def n_runs(n_numbers: int) -> int:
    """Return in how many runs so many numbers are."""
    return -(-n_numbers // RUN)


def count(parts: Sequence[Part], counters: Counters) -> None:
    """Add up the numbers of some parts, on their device.

    Args:
        parts: Of as many rows as there are counters of, all on their device.
        counters: What is added to.
    """
    parts = [part for part in parts if len(part.rows[0])]
    if not parts or _KERNEL.count(parts, counters):
        return
    for part in parts:
        _count_by_operations(part, counters)


class _Kernel:
    """The kernel of ``counting_kernel``, for as long as it can be compiled."""

    def __init__(self) -> None:
        self._is_broken = False

    def count(self, parts: Sequence[Part], counters: Counters) -> bool:
        """Count by it where it runs; return whether it was so."""
        device = counters.counts.device
        if self._is_broken or not self._is_for(device):
            return False
        before = counters.counts.clone(), counters.n_collected.clone()
        try:
            from searchmerge.merging import counting_kernel

            with torch.cuda.device(device):
                counting_kernel.count(parts, counters)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - Triton's errors have no base but this
            self._is_broken = True
            counters.counts.copy_(before[0])  # some parts may have been counted
            counters.n_collected.copy_(before[1])
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            _logger.warning("statistics take longer, as compiling failed: %s", reason)
            return False
        return True

    def _is_for(self, device: torch.device) -> bool:
        return device.type == "cuda"


_KERNEL = _Kernel()


def _count_by_operations(part: Part, counters: Counters) -> None:
    wide = None if part.base is None else part.base.float()
    for i, row in enumerate(part.rows):
        numbers = row if wide is None else (row.float() - wide).abs_()
        for start in range(0, len(numbers), _AT_ONCE):
            some = numbers[start : start + _AT_ONCE]
            _count_some(some, counters, i, part.first_run + start // RUN)


def _count_some(numbers: Tensor, counters: Counters, row: int, first_run: int) -> None:
    keys = keys_of(numbers)
    segments = torch.searchsorted(counters.cuts[row, :MOST_CUTS], keys, right=True)
    counters.counts[row] += torch.bincount(segments, minlength=SEGMENTS)
    runs = torch.arange(len(keys), device=keys.device) // RUN + first_run
    is_drawn = ((runs * 0x9E3779B1 & 0xFFFFFFFF) >> 8) < counters.limits[row]
    chosen = keys[is_drawn & (counters.collects[row][segments] != 0)]
    start = int(counters.n_collected[row])
    room = counters.collected[row, start : start + len(chosen)]
    room.copy_(chosen[: len(room)])
    counters.n_collected[row] += len(chosen)


def keys_of(numbers: Tensor) -> Tensor:
    """Return fresh int32 keys that order as the float32 ``numbers`` do; -0 counts as 0."""
    bits = (numbers + 0.0).view(torch.int32)
    flip = (bits >> 31).bitwise_and_(_MAGNITUDE)  # a negative number's magnitude bits
    return bits.bitwise_xor_(flip)


def numbers_of(keys: Tensor) -> Tensor:
    """Return the float32 numbers of int64 keys, the inverse of the above."""
    bits = keys ^ torch.where(keys < 0, _MAGNITUDE, 0)
    return bits.to(torch.int32).view(torch.float32)
