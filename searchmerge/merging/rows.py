"""Arithmetic on a GPU: one kernel for rows of entries, whose length is known when it is compiled.

A kernel that takes any number of entries reads them two bytes at a time, as it cannot tell that
several lie in a row. Where the last dimension is fixed it reads 16 bytes at once, and a sum over
each row is formed beside what is written, in the same pass over memory.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from searchmerge.merging.kernels import Chunk, ChunkFunction
from searchmerge.merging.operands import Operands

ROW = 32
"""Entries of a row: so few that little of a small parameter is left over."""

AT_ONCE = 1 << 28
"""Entries that a kernel is given at most: indices stay within 32 bits."""

_TALLY = torch.bfloat16  # exact for whole numbers up to 256, and a row has no more

SUMMED = 4096
"""Rows whose tallies are summed in float32, exactly whatever the order: they stay below 2^24."""


class Rows(NamedTuple):
    """A parameter, or a part of one, as kernels read it; all on one device.

    Attributes:
        base: ``(n_rows, ROW)``, any float dtype.
        experts: Each expert's, the same.
        kept: What the method kept, the same.
        numbers: What :func:`numbers_of` returns.
        keys: What :func:`keys_of` returns; ``None`` where nothing is random.
    """

    base: Tensor
    experts: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    numbers: Tensor
    keys: Tensor | None


def rows_of(part: Operands, numbers: Tensor, keys: Tensor | None = None) -> Rows:
    """Return what a kernel reads of some entries, a whole number of rows, without copying.

    Args:
        part: The entries.
        numbers: What ``numbers_of`` returns of its scalars, on its device.
        keys: What ``keys_of`` returns of its keys, there; ``None`` to have it made.
    """
    if keys is None and part.keys is not None:
        keys = keys_of(part.keys, part.start).to(part.base.device)
    return Rows(
        part.base.view(-1, ROW),
        tuple(tensor.view(-1, ROW) for tensor in part.experts),
        tuple(tensor.view(-1, ROW) for tensor in part.kept),
        numbers,
        keys,
    )


def in_rows(n_entries: int) -> int:
    """Return how many of a parameter's first entries are taken in rows: two rows, or none."""
    whole = n_entries // ROW * ROW
    return whole if whole >= 2 * ROW else 0  # a single row would be compiled for itself


def spans(n_entries: int) -> Iterator[tuple[int, int]]:
    """Yield from where to where a kernel is given a parameter's rows at once: parts alike."""
    n_rows = in_rows(n_entries) // ROW
    n_parts = -(-n_rows * ROW // AT_ONCE)
    for i in range(n_parts):
        yield n_rows * i // n_parts * ROW, n_rows * (i + 1) // n_parts * ROW


def n_number_rows(n_scalars: int, n_experts: int) -> int:
    """Return the rows of :func:`numbers_of`: so many that 16 bytes divide them."""
    n_rows = n_scalars + 1
    while n_rows * n_experts % 4:
        n_rows += 1
    return n_rows


def numbers_of(scalars: Tensor, scale: float) -> Tensor:
    """Return the numbers of one parameter: the scalars, and in the last row the scale.

    Args:
        scalars: ``(n_scalars, n_experts)`` float32.
        scale: The factor on the merged task vector.
    """
    n_scalars, n_experts = scalars.shape
    numbers = torch.full((n_number_rows(n_scalars, n_experts), n_experts), scale)
    numbers[:n_scalars] = scalars
    return numbers


def keys_of(keys: Tensor, start: int) -> Tensor:
    """Return the keys of one parameter, and behind them the index of its first entry."""
    return torch.cat([keys, keys.new_tensor([start])])


def new_tallies(n_tallies: int, n_rows: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return where a kernel writes each tally's sum over every row, ``(n_rows,)`` each."""
    return tuple(torch.empty(n_rows, dtype=_TALLY, device=device) for _ in range(n_tallies))


def total_of(tallies: Sequence[Tensor]) -> Tensor:
    """Return the sum of each tally over all rows, ``(n_tallies,)`` float64, exactly."""
    return torch.stack([_total_of(tally) for tally in tallies])


def _total_of(tally: Tensor) -> Tensor:
    """Return the sum of a tally, read once: a sum in float64 alone would copy it first."""
    whole = len(tally) // SUMMED * SUMMED
    some = tally[:whole].view(-1, SUMMED).sum(1, dtype=torch.float32)
    total = some.sum(dtype=torch.float64)
    return total + tally[whole:].sum(dtype=torch.float64) if whole < len(tally) else total


def merge_rows(function: ChunkFunction, rows: Rows, out: Tensor, *tallies: Tensor) -> None:
    """Write what a parameter becomes to ``out``, and the sum of each tally over each row.

    Args:
        function: The method's arithmetic.
        rows: The parameter.
        out: ``(n_rows, ROW)``, any float dtype.
        *tallies: What :func:`new_tallies` returns.
    """
    merged, *of_rows = compute_rows(function, rows)
    base = rows.base
    origin = base if base.dtype == torch.float64 else base.float()
    out.copy_(origin + rows.numbers[-1, 0] * merged)
    for sums, tally in zip(tallies, of_rows, strict=True):
        sums.copy_(tally)


def write_rows(function: ChunkFunction, rows: Rows, *outs: Tensor) -> None:
    """Write each tensor that ``function`` returns to one of ``outs``, ``(n_rows, ROW)``."""
    for out, numbers in zip(outs, compute_rows(function, rows), strict=True):
        out.copy_(numbers)


@cache
def multiply_rows(n_sets: int) -> Callable[..., None]:
    """Return the kernel that merges under so many sets of numbers, and multiplies.

    It takes a function, rows whose ``numbers`` are those of all sets, ``(n_sets, n, n_experts)``,
    what they are multiplied by, ``(n_rows, ROW)``, and where it writes the sum of the products
    over each row, ``(n_rows,)`` float32 for each set.
    """

    def kernel(function: ChunkFunction, rows: Rows, weights: Tensor, *sums: Tensor) -> None:
        factors = weights.float()
        for i in range(n_sets):
            merged = compute_rows(function, rows._replace(numbers=rows.numbers[i]))[0]
            sums[i].copy_((merged * factors).sum(1))

    return kernel


def new_sums(n_sets: int, n_rows: int, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return memory for a sum over each row for each set, all 0, and each set's part of it."""
    n_aligned = -(-n_rows // 4) * 4  # 16 bytes
    sums = torch.zeros(n_sets, n_aligned, device=device)
    return sums, tuple(of_set[:n_rows] for of_set in sums)


def compute_rows(function: ChunkFunction, rows: Rows) -> tuple[Tensor, ...]:
    """Return what ``function`` returns, ``(n_rows, ROW)`` float32; of a tally, ``(n_rows,)``."""
    base = rows.base.float()
    deltas = tuple(expert.float() - base for expert in rows.experts)
    kept = tuple(tensor.float() for tensor in rows.kept)
    positions = None
    if rows.keys is not None:
        positions = rows.keys[-1] + places(base, torch.int64)
    return function(Chunk(deltas, rows.numbers, kept, positions, rows.keys))


def places(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the index of each entry of some rows."""
    n_rows, n_columns = rows.shape
    along = torch.arange(n_rows, device=rows.device, dtype=dtype)
    across = torch.arange(n_columns, device=rows.device, dtype=dtype)
    return along[:, None] * n_columns + across
