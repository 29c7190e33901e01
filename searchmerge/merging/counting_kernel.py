"""Counting keys on a GPU without an atomic operation for each: a kernel in Triton.

A program counts some thousands of numbers in its registers, by ``tl.histogram``, and adds its
counts once. That holds up to some hundred counters, so numbers are counted between cuts.
"""

# ruff: noqa: ANN001 - Triton reads annotations of a kernel as types of its own

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from searchmerge.merging.counting import RUN, SEGMENTS, Counters

_ROWS = 4
"""Rows of one launch."""

_BLOCK = 4096
"""Numbers that a program counts at once."""

_BLOCKS = 16
"""Blocks of one program: it adds a count per segment for all of them."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@triton.jit(do_not_specialize=["first_run", "first_row", "n_steps", "capacity"])  # type: ignore[untyped-decorator]
def _count(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0915, ANN202 - a kernel
    source_0,
    source_1,
    source_2,
    source_3,
    base,
    n,
    first_run,
    first_row,
    n_steps,
    capacity,
    cuts,
    starts,
    collects,
    limits,
    counts,
    n_collected,
    collected,
    OF_MAGNITUDES: tl.constexpr,
    HAS_CUTS: tl.constexpr,
    N_SEGMENTS: tl.constexpr,
    N_STARTS: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RUN_SIZE: tl.constexpr,
):
    """Count the keys of one row's numbers between its cuts, and collect some.

    Every program takes ``N_BLOCKS`` blocks of one row. See ``Counters`` for the tensors.
    """
    place = tl.program_id(0)
    source = tl.where(place == 0, source_0, tl.where(place == 1, source_1, source_2))
    source = tl.where(place == 3, source_3, source)
    row = first_row + place
    limit = tl.load(limits + row)
    cuts += row * (2 * N_SEGMENTS)
    starts += row * N_STARTS
    collects += row * N_SEGMENTS
    segments = tl.arange(0, N_SEGMENTS)
    total = tl.zeros([N_SEGMENTS], tl.int32)
    for i in range(N_BLOCKS):
        start = (tl.program_id(1) * N_BLOCKS + i) * BLOCK_SIZE
        at = start + tl.arange(0, BLOCK_SIZE)
        drawn = ((first_run + at // RUN_SIZE).to(tl.uint32) * 0x9E3779B1) >> 8
        is_there = at < n
        chosen = is_there & (drawn.to(tl.int32) < limit)
        is_read = is_there if HAS_CUTS else chosen
        if tl.max(is_read.to(tl.int32), 0) > 0:
            numbers = tl.load(source + at, mask=is_read, other=0.0).to(tl.float32)
            if OF_MAGNITUDES:
                numbers = numbers - tl.load(base + at, mask=is_read, other=0.0).to(tl.float32)
                keys = numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            else:
                keys = (numbers + 0.0).to(tl.int32, bitcast=True)
                keys = keys ^ ((keys >> 31) & 0x7FFFFFFF)
            if HAS_CUTS:
                segment = tl.load(starts + (keys >> 16) + N_STARTS // 2).to(tl.int32)
                for step in range(n_steps):
                    further = segment + (1 << (n_steps - 1 - step))
                    is_beyond = tl.load(cuts + further - 1) <= keys
                    segment = tl.where(is_beyond, further, segment)
                total += tl.histogram(tl.where(is_there, segment, N_SEGMENTS - 1), N_SEGMENTS)
                chosen = chosen & (tl.load(collects + segment) != 0)
            taken = chosen.to(tl.int32)
            n_taken = tl.sum(taken, 0)
            if n_taken > 0:
                first = tl.atomic_add(n_collected + row, n_taken, sem="relaxed")
                room = first + tl.cumsum(taken, 0) - 1
                fits = chosen & (room < capacity)
                tl.store(collected + row.to(tl.int64) * capacity + room, keys, mask=fits)
    if HAS_CUTS:
        to = counts + row * N_SEGMENTS + segments
        tl.atomic_add(to, total.to(tl.int64), mask=total > 0, sem="relaxed")


def count(
    sources: Sequence[Tensor], base: Tensor | None, counters: Counters, first_run: int
) -> None:
    """Count the keys of some numbers of each row, on a GPU.

    Args:
        sources: Of each row, ``(m,)`` of any float dtype; fewer than 2^31.
        base: What is subtracted before magnitudes are taken; ``None`` for the numbers themselves.
        counters: What is added to.
        first_run: How many runs were counted before: by it they are drawn.
    """
    n = len(sources[0])
    for first_row in range(0, len(sources), _ROWS):
        some = sources[first_row : first_row + _ROWS]
        pointers = [some[min(i, len(some) - 1)] for i in range(_ROWS)]
        if len({source.dtype for source in some}) > 1:
            pointers = [source.float() for source in pointers]
        _count[(len(some), -(-n // (_BLOCK * _BLOCKS)))](
            *pointers,
            pointers[0] if base is None else base,
            n,
            first_run,
            first_row,
            counters.n_steps,
            counters.collected.shape[1],
            counters.cuts,
            counters.starts,
            counters.collects,
            counters.limits,
            counters.counts,
            counters.n_collected,
            counters.collected,
            OF_MAGNITUDES=base is not None,
            HAS_CUTS=counters.has_cuts,
            N_SEGMENTS=SEGMENTS,
            N_STARTS=counters.starts.shape[1],
            N_BLOCKS=_BLOCKS,
            BLOCK_SIZE=_BLOCK,
            RUN_SIZE=RUN,
            num_warps=8,
        )
