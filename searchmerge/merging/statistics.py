"""Exact order statistics of whole models, measured without sorting or copying them."""

import hashlib
import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from searchmerge.durable import write_atomically
from searchmerge.merging.counting import Counters, Part, count, n_runs, numbers_of
from searchmerge.merging.native.histogram import (
    LOW_BITS,
    N_HIGH,
    N_LOW,
    STRIDE,
    count_high,
    count_low,
)
from searchmerge.merging.selection import select

_logger = logging.getLogger(__name__)

_CHECKSUM = "sha256"  # of what a cache holds, in its metadata

_AT_ONCE = 1 << 15  # entries per operation on a CPU: torch starts no threads of its own for them


_MOST_WAITING = 1 << 26
"""Bytes that may wait to be counted at once, but for what lies in memory anyway."""


class Block(NamedTuple):
    """Some of every row's numbers.

    Attributes:
        size: How many of each row.
        rows: One function per row, from a slice of ``range(size)`` to those numbers, float32,
            where they are counted. Each is called in a thread of its own.
        part: What holds all of them on a GPU; ``None`` where they are read.
        device: Where they are counted.
        is_view: Whether they lie there anyway, so that to wait with them takes no memory.
    """

    size: int
    rows: Sequence[Callable[[slice], Tensor]]
    part: Part | None = None
    device: torch.device = torch.device("cpu")
    is_view: bool = False


Numbers = Callable[[], Iterable[Block]]
"""Yields all numbers from the start, the same ones each time."""


class OrderStatistics:
    """The k-th smallest of each row's numbers, exactly as sorting all of them would give it.

    A radix histogram of two levels: the high 19 bits of each number's order-preserving key are
    counted once; the low 13 bits in those bins alone that hold a rank that was asked for. It
    holds 4 MiB per row, and while measuring 32 KiB more per rank and row; no tensor of the
    model's size is made. Rows are counted in parallel. Where numbers are on a GPU they are
    selected there, see ``selection``.

    Args:
        numbers: The numbers; they come out the same each time, all finite.
        n_rows: Rows of each block.
        n_numbers: Numbers of each row.
        grid: Ranks that are measured along with the first that is not known yet.
        cache: File to keep what was measured in; ``None`` for none. One that cannot be read, or
            belongs to something else, is measured anew and overwritten.
        on_gpu: Whether numbers are on a GPU, some of them at least.
    """

    def __init__(
        self,
        numbers: Numbers,
        n_rows: int,
        n_numbers: int,
        *,
        grid: Iterable[int] = (),
        cache: Path | None = None,
        on_gpu: bool = False,
    ) -> None:
        self._on_gpu = on_gpu
        self._numbers, self._n_rows, self._n_numbers = numbers, n_rows, n_numbers
        self._grid = set(grid)
        self._cache = cache
        self._high: np.ndarray | None = None  # (n_rows, N_HIGH) int64, counts
        self._measured: list[dict[int, float]] = [{} for _ in range(n_rows)]
        self._load()

    def at(self, ranks: Sequence[int], rows: Sequence[int] | None = None) -> list[float]:
        """Return one number per row: its ``rank``-th smallest, counted from 0.

        Args:
            ranks: One per row; one that is not in [0, n_numbers) counts as the nearest in it.
            rows: The rows asked for; ``None`` for all.
        """
        if not self._n_numbers:
            return [0.0] * len(ranks)
        rows = range(self._n_rows) if rows is None else rows
        asked = [
            (row, min(max(rank, 0), self._n_numbers - 1))
            for row, rank in zip(rows, ranks, strict=True)
        ]
        unknown: list[set[int]] = [set() for _ in range(self._n_rows)]
        for row, rank in asked:
            if rank not in self._measured[row]:
                unknown[row].add(rank)
        if any(unknown):
            self._measure(unknown)
            self._save()
        return [self._measured[row][rank] for row, rank in asked]

    def _measure(self, asked: Sequence[set[int]]) -> None:
        wanted = [
            np.array(sorted((row_ranks | self._grid) - measured.keys()), dtype=np.int64)
            for row_ranks, measured in zip(asked, self._measured, strict=True)
        ]
        if self._on_gpu:
            ranks = [row_ranks.tolist() for row_ranks in wanted]
            selected = select(self._count_between, self._n_numbers, ranks)
            for measured, of_row in zip(self._measured, selected, strict=True):
                measured.update(of_row)
            return
        if self._high is None:
            self._high = self._count_high()
        below = self._high.cumsum(1)
        places = [
            np.searchsorted(row, row_ranks, "right")
            for row, row_ranks in zip(below, wanted, strict=True)
        ]
        bins = [np.unique(place) for place in places]
        for row, counts in enumerate(self._count_low(bins)):
            for slot, high in enumerate(bins[row]):
                ranks = wanted[row][places[row] == high]
                before = below[row, high] - int(self._high[row, high])
                low = np.searchsorted(counts[slot].cumsum(), ranks - before, "right")
                cells = (int(high) << LOW_BITS) | torch.from_numpy(low)
                values = numbers_of(cells - (1 << 31))
                self._measured[row].update(zip(ranks.tolist(), values.tolist(), strict=True))

    def _count_between(self, counters_on: Callable[[torch.device], Counters]) -> None:
        """Go over all numbers once, and count them between cuts where they are."""
        first_run, size_bytes = 0, 0
        waiting: dict[torch.device, list[Part]] = defaultdict(list)
        for block in self._numbers():
            whole = slice(0, block.size)
            part = block.part or Part([row(whole) for row in block.rows])
            waiting[block.device].append(Part(part.rows, part.base, first_run=first_run))
            first_run += n_runs(block.size)
            size_bytes += 0 if block.is_view else part.size_bytes
            if size_bytes > _MOST_WAITING:
                _count_waiting(waiting, counters_on)
                size_bytes = 0
        _count_waiting(waiting, counters_on)

    def _count_high(self) -> np.ndarray:
        counts = self._new_counts([N_HIGH] * self._n_rows)
        self._each_row(lambda row, numbers: count_high(numbers, counts[row]))
        return np.stack([row_counts.numpy().astype(np.int64) for row_counts in counts])

    def _count_low(self, bins: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return, per row, counts ``(len(bins[row]), N_LOW)`` of the low halves in those bins."""
        tables = []  # slot 0 takes what is in none of the bins
        for row_bins in bins:
            table = np.zeros(N_HIGH, np.int32)
            table[row_bins] = np.arange(1, len(row_bins) + 1)
            tables.append(torch.from_numpy(table))
        counts = self._new_counts([(len(row_bins) + 1) * STRIDE for row_bins in bins])
        self._each_row(lambda row, numbers: count_low(numbers, tables[row], counts[row]))
        return [row_counts.view(-1, STRIDE)[1:, :N_LOW].numpy() for row_counts in counts]

    def _new_counts(self, sizes: Sequence[int]) -> list[Tensor]:
        dtype = np.int32 if self._n_numbers < 2**31 else np.int64
        # numpy's zeros take no memory before they are counted up; torch's do
        return [torch.from_numpy(np.zeros(size, dtype)) for size in sizes]

    def _each_row(self, count: Callable[[int, Tensor], None]) -> None:
        def count_all(row: int, block: Block) -> None:
            for start in range(0, block.size, _AT_ONCE):
                count(row, block.rows[row](slice(start, start + _AT_ONCE)))

        rows = range(self._n_rows)
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            for block in self._numbers():
                for _ in threads.map(count_all, rows, itertools.repeat(block)):
                    pass  # for the errors it may raise

    def _load(self) -> None:
        if self._cache is None or not self._cache.exists():
            return
        try:
            stored = _read_cache(self._cache)
            bins, counts = stored["bins"].numpy(), stored["counts"].numpy()
            places, values = stored["places"].tolist(), stored["values"].tolist()
            high = np.zeros((self._n_rows, N_HIGH), np.int64)
            high.reshape(-1)[bins] = counts
            if stored["size"].tolist() != [self._n_rows, self._n_numbers]:
                raise ValueError("it is of something else")
            for (row, rank), value in zip(places, values, strict=True):
                self._measured[row][rank] = value
        except (OSError, KeyError, ValueError, IndexError, SafetensorError) as error:
            _logger.warning("statistics are measured anew, %s is unusable: %s", self._cache, error)
            self._measured = [{} for _ in range(self._n_rows)]
            return
        self._high = high if len(bins) else None

    def _save(self) -> None:
        if self._cache is None:
            return
        places = [(row, rank) for row, measured in enumerate(self._measured) for rank in measured]
        values = [value for measured in self._measured for value in measured.values()]
        high = np.zeros(0, np.int64) if self._high is None else self._high.reshape(-1)
        bins = high.nonzero()[0]
        tensors = {
            "size": torch.tensor([self._n_rows, self._n_numbers]),
            "bins": torch.from_numpy(bins),
            "counts": torch.from_numpy(high[bins]),
            "places": torch.tensor(places, dtype=torch.int64),  # row and rank
            "values": torch.tensor(values, dtype=torch.float32),
        }
        try:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._cache, save(tensors, {_CHECKSUM: _checksum(tensors)}))
        except OSError as error:
            _logger.warning("%s: cannot be written: %s", self._cache, error.strerror)


def _count_waiting(
    waiting: dict[torch.device, list[Part]], counters_on: Callable[[torch.device], Counters]
) -> None:
    for device, parts in waiting.items():
        count(parts, counters_on(device))
    waiting.clear()


def _read_cache(file: Path) -> dict[str, Tensor]:
    """Return what a cache holds.

    Raises:
        ValueError: If it is not as it was written.
    """
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        written = (opened.metadata() or {}).get(_CHECKSUM)
    if written != _checksum(tensors):
        raise ValueError("it is not as it was written")
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
