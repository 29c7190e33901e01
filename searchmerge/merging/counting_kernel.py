"""Counting keys on a GPU without an atomic operation in its memory for each: kernels in Triton.

One launch counts many parameters: where each lies is read from a table, as to launch a kernel for
each would take longer than counting. A program counts some ten thousand numbers and adds its
counts once. On NVIDIA's GPUs it finds a number's segment, counts it and collects its key in the
memory that its threads share, for which Triton has no words: that part is PTX. Elsewhere it counts
in registers, by ``tl.histogram``, which takes longer. Both hold some hundred counters, so numbers
are counted between cuts.
"""

# ruff: noqa: ANN001 - Triton reads annotations of a kernel as types of its own

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from searchmerge.merging.counting import RUN, SEGMENTS, Counters, Part

_BLOCK = 4096
"""Numbers that a program counts at once in registers."""

_BLOCKS = 16
"""Blocks of one program: it adds a count per segment for all of them."""

_SHARED_BLOCK = 2048
"""Numbers that a program counts in shared memory before its threads wait for one another."""

_SHARED_BLOCKS = 8
"""Such blocks of one program."""

_N_STEPS = SEGMENTS.bit_length() - 1  # halvings by which a segment is found

_COUNTS, _FLAGS, _N_KEYS = (4 * SEGMENTS * i for i in (1, 2, 3))
_KEYS = _N_KEYS + 16
_KEYS_AT, _N_KEYS_AT = tl.constexpr(_KEYS), tl.constexpr(_N_KEYS)
"""Where things lie in shared memory: the cuts, then these, in bytes. Of keys there is room for
those of two blocks."""

_RESERVE = tl.constexpr(
    f"""{{
    .shared .align 16 .b8 counters[{_KEYS + 4 * 2 * _SHARED_BLOCK}];
    mov.u32 $0, counters;
    }}"""
)
"""Returns where that memory begins."""

_SIZE_AT, _FIRST_RUN_AT, _FIRST_PROGRAM_AT, _BASE_AT, _ROWS_AT = map(tl.constexpr, range(5))
"""Columns of the table of parts."""

_PUT = tl.constexpr("{ st.shared.b32 [$1], $2; mov.u32 $0, 0; }")
_GET = tl.constexpr("ld.shared.b32 $0, [$1];")

_STEP = """
    shl.b32 at, segment, 2;
    add.u32 at, at, $3;
    ld.shared.s32 cut, [at + {before}];
    setp.le.s32 is_beyond, cut, $1;
    @is_beyond add.u32 segment, segment, {step};"""

_STEPS = "".join(
    _STEP.format(step=step, before=4 * (step - 1))
    for step in (1 << (_N_STEPS - 1 - i) for i in range(_N_STEPS))
)

_COUNT_KEY = tl.constexpr(
    f"""{{
    .reg .u32 at, segment, flag;
    .reg .s32 cut;
    .reg .pred is_beyond, is_chosen;
    mov.u32 segment, 0;{_STEPS}
    shl.b32 at, segment, 2;
    add.u32 at, at, $3;
    red.shared.add.u32 [at + {_COUNTS}], 1;
    ld.shared.u32 flag, [at + {_FLAGS}];
    and.b32 flag, flag, $2;
    setp.ne.u32 is_chosen, flag, 0;
    @is_chosen atom.shared.add.u32 at, [$3 + {_N_KEYS}], 1;
    @is_chosen shl.b32 at, at, 2;
    @is_chosen add.u32 at, at, $3;
    @is_chosen st.shared.b32 [at + {_KEYS}], $1;
    mov.u32 $0, segment;
    }}"""
)
"""Counts the key $1 in its segment; collects it where that is collected, and $2 is 1."""


@triton.jit
def _put(at, number):  # type: ignore[no-untyped-def]  # noqa: ANN202
    tl.inline_asm_elementwise(_PUT, "=r,r,r", [at, number], tl.int32, is_pure=False, pack=1)


@triton.jit
def _get(at):  # type: ignore[no-untyped-def]  # noqa: ANN202
    return tl.inline_asm_elementwise(_GET, "=r,r", [at], tl.int32, is_pure=False, pack=1)


@triton.jit  # type: ignore[untyped-decorator]
def _place_of(  # type: ignore[no-untyped-def]  # noqa: ANN202
    table, owners, source_like, base_like, IS_ALIGNED: tl.constexpr, WIDTH: tl.constexpr
):
    """Return what a program counts, see :func:`_table_of`: some of one row of a part.

    Returns:
        Where the row's numbers begin, and the base's, their number, their first run, and which of
        the part's programs this is.
    """
    table += tl.load(owners + tl.program_id(0)).to(tl.int64) * WIDTH
    n = tl.load(table + _SIZE_AT).to(tl.int32)
    base = tl.load(table + _BASE_AT).to(base_like.dtype)
    source = tl.load(table + _ROWS_AT + tl.program_id(1)).to(source_like.dtype)
    if IS_ALIGNED:
        n = tl.multiple_of(n, 16)
        base = tl.multiple_of(base, 16)
        source = tl.multiple_of(source, 16)
    first_run = tl.load(table + _FIRST_RUN_AT).to(tl.int32)
    index = tl.program_id(0) - tl.load(table + _FIRST_PROGRAM_AT).to(tl.int32)
    return source, base, n, first_run, index


@triton.jit  # type: ignore[untyped-decorator]
def _keys_of(source, base, at, is_read, OF_MAGNITUDES: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN202
    """Return the keys of some numbers: int32 that order as they do."""
    numbers = tl.load(source + at, mask=is_read, other=0.0).to(tl.float32)
    if OF_MAGNITUDES:
        numbers = numbers - tl.load(base + at, mask=is_read, other=0.0).to(tl.float32)
        keys = numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        keys = (numbers + 0.0).to(tl.int32, bitcast=True)
        keys = keys ^ ((keys >> 31) & 0x7FFFFFFF)
    return keys


@triton.jit  # type: ignore[untyped-decorator]
def _is_drawn(at, first_run, limit, RUN_SIZE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN202
    """Return whether the run that a number is in is drawn."""
    drawn = ((first_run + at // RUN_SIZE).to(tl.uint32) * 0x9E3779B1) >> 8
    return drawn.to(tl.int32) < limit


@triton.jit(do_not_specialize=["capacity"])  # type: ignore[untyped-decorator]
def _count(  # type: ignore[no-untyped-def]  # noqa: PLR0913, ANN202 - a kernel
    table,
    owners,
    source_like,
    base_like,
    capacity,
    cuts,
    collects,
    limits,
    counts,
    n_collected,
    collected,
    OF_MAGNITUDES: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_CUTS: tl.constexpr,
    N_SEGMENTS: tl.constexpr,
    N_STEPS: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RUN_SIZE: tl.constexpr,
):
    """Count the keys of one row's numbers between its cuts, and collect some, in registers.

    Every program takes ``N_BLOCKS`` blocks of one row of a part. See ``Counters`` for the tensors.
    """
    row = tl.program_id(1)
    source, base, n, first_run, index = _place_of(
        table, owners, source_like, base_like, IS_ALIGNED, WIDTH
    )
    limit = tl.load(limits + row)
    cuts += row * N_SEGMENTS
    collects += row * N_SEGMENTS
    segments = tl.arange(0, N_SEGMENTS)
    total = tl.zeros([N_SEGMENTS], tl.int32)
    for i in range(N_BLOCKS):
        at = (index * N_BLOCKS + i) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        is_there = at < n
        chosen = is_there & _is_drawn(at, first_run, limit, RUN_SIZE)
        is_read = is_there if HAS_CUTS else chosen
        if tl.max(is_read.to(tl.int32), 0) > 0:
            keys = _keys_of(source, base, at, is_read, OF_MAGNITUDES)
            if HAS_CUTS:
                segment = tl.zeros([BLOCK_SIZE], tl.int32)
                for step in tl.static_range(N_STEPS):
                    further = segment + (1 << (N_STEPS - 1 - step))
                    segment = tl.where(tl.load(cuts + further - 1) <= keys, further, segment)
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


@triton.jit  # type: ignore[untyped-decorator]
def _hand_over(n_keys, shared, n_collected, collected, capacity, ROOM: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN202
    """Write the keys that a program collected behind all others of the row."""
    first = tl.atomic_add(n_collected, n_keys, sem="relaxed")
    at = tl.arange(0, ROOM)
    is_there = (at < n_keys) & (first + at < capacity)
    tl.store(collected + first + at, _get(shared + _KEYS_AT + 4 * at), mask=is_there)
    tl.debug_barrier()
    _put(shared + _N_KEYS_AT, 0)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["capacity"])  # type: ignore[untyped-decorator]
def _count_shared(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0915, ANN202 - a kernel
    table,
    owners,
    source_like,
    base_like,
    capacity,
    cuts,
    collects,
    limits,
    counts,
    n_collected,
    collected,
    OF_MAGNITUDES: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    N_SEGMENTS: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RUN_SIZE: tl.constexpr,
):
    """Do what ``_count`` does where there are cuts, in the memory that a program's threads share.

    They wait for one another between what is counted and what is read of it.
    """
    row = tl.program_id(1)
    source, base, n, first_run, index = _place_of(
        table, owners, source_like, base_like, IS_ALIGNED, WIDTH
    )
    limit = tl.load(limits + row)
    n_collected += row
    collected += row.to(tl.int64) * capacity
    shared = tl.inline_asm_elementwise(_RESERVE, "=r,r", [row], tl.int32, is_pure=False, pack=1)
    segments = tl.arange(0, N_SEGMENTS)
    of_segment = shared + 4 * segments
    _put(of_segment, tl.load(cuts + row * N_SEGMENTS + segments))
    _put(of_segment + 4 * N_SEGMENTS, tl.zeros([N_SEGMENTS], tl.int32))
    _put(of_segment + 8 * N_SEGMENTS, tl.load(collects + row * N_SEGMENTS + segments))
    _put(shared + _N_KEYS_AT, 0)
    tl.debug_barrier()
    for i in range(N_BLOCKS):
        start = (index * N_BLOCKS + i) * BLOCK_SIZE
        if start < n:
            at = start + tl.arange(0, BLOCK_SIZE)
            is_there = at < n
            keys = _keys_of(source, base, at, is_there, OF_MAGNITUDES)
            keys = tl.where(is_there, keys, 0x7FFFFFFF)  # of no number: the last segment's
            is_drawn = (is_there & _is_drawn(at, first_run, limit, RUN_SIZE)).to(tl.int32)
            operands = [keys, is_drawn, shared]
            tl.inline_asm_elementwise(
                _COUNT_KEY, "=r,r,r,r", operands, tl.int32, is_pure=False, pack=1
            )
            tl.debug_barrier()
            n_keys = _get(shared + _N_KEYS_AT)
            tl.debug_barrier()  # none counts on before all have read it
            if n_keys >= BLOCK_SIZE:
                _hand_over(n_keys, shared, n_collected, collected, capacity, 2 * BLOCK_SIZE)
    n_keys = _get(shared + _N_KEYS_AT)
    if n_keys > 0:
        _hand_over(n_keys, shared, n_collected, collected, capacity, 2 * BLOCK_SIZE)
    total = _get(of_segment + 4 * N_SEGMENTS)
    to = counts + row * N_SEGMENTS + segments
    tl.atomic_add(to, total.to(tl.int64), mask=total > 0, sem="relaxed")


def count(parts: Sequence[Part], counters: Counters) -> None:
    """Count the keys of the numbers of some parts, on a GPU: one launch for all that are alike.

    Args:
        parts: One or more, of 1 number or more each.
        counters: What is added to.
    """
    groups: dict[object, list[Part]] = defaultdict(list)
    for part in parts:
        if len({row.dtype for row in part.rows}) > 1:
            part = part._replace(rows=[row.float() for row in part.rows])
        dtypes = tuple(tensor.dtype for tensor in (part.rows[0], *part.bases))
        groups[dtypes, _is_aligned(part)].append(part)
    for alike in groups.values():
        _launch(alike, counters)


def _launch(parts: Sequence[Part], counters: Counters) -> None:
    first, device = parts[0], counters.counts.device
    n_rows = len(first.rows)
    kernel, block, n_blocks, n_warps = _count, _BLOCK, _BLOCKS, 8
    more: dict[str, object] = {"HAS_CUTS": counters.has_cuts, "N_STEPS": _N_STEPS}
    if counters.has_cuts and device.type == "cuda" and torch.version.hip is None:
        kernel, block, n_blocks, n_warps = _count_shared, _SHARED_BLOCK, _SHARED_BLOCKS, 16
        more = {}
    table, owners = _table_of(parts, block * n_blocks)
    kernel[(len(owners), n_rows)](
        torch.from_numpy(table).to(device),
        torch.from_numpy(owners).to(device),
        first.rows[0],
        first.rows[0] if first.base is None else first.base,
        counters.collected.shape[1],
        counters.cuts,
        counters.collects,
        counters.limits,
        counters.counts,
        counters.n_collected,
        counters.collected,
        OF_MAGNITUDES=first.base is not None,
        IS_ALIGNED=_is_aligned(first),
        WIDTH=table.shape[1],
        N_SEGMENTS=SEGMENTS,
        N_BLOCKS=n_blocks,
        BLOCK_SIZE=block,
        RUN_SIZE=RUN,
        num_warps=n_warps,
        **more,
    )


def _table_of(parts: Sequence[Part], n_each: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where parts lie, and which of them each program counts ``n_each`` numbers of.

    Returns:
        A row per part, int64: its size, its first run, its first program, and the addresses of its
        base and rows. Then the index of its part for each program, int32.
    """
    sizes = np.array([len(part.rows[0]) for part in parts])
    n_programs = -(-sizes // n_each)
    table = np.empty((len(parts), _ROWS_AT.value + len(parts[0].rows)), np.int64)
    table[:, _SIZE_AT.value] = sizes
    table[:, _FIRST_RUN_AT.value] = [part.first_run for part in parts]
    table[:, _FIRST_PROGRAM_AT.value] = np.cumsum(n_programs) - n_programs
    for row, part in zip(table, parts, strict=True):
        base = part.rows[0] if part.base is None else part.base
        row[_BASE_AT.value :] = [tensor.data_ptr() for tensor in (base, *part.rows)]
    return table, np.repeat(np.arange(len(parts), dtype=np.int32), n_programs)


def _is_aligned(part: Part) -> bool:
    """Return whether a kernel may read several numbers of a part at once: 16 bytes."""
    tensors = (*part.rows, *part.bases)
    return not len(part.rows[0]) % 16 and all(not t.data_ptr() % 16 for t in tensors)
