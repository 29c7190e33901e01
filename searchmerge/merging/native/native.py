"""Running merge functions as C++ on a CPU."""

import ctypes
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from searchmerge.merging.kernels import ChunkFunction
from searchmerge.merging.native.body import PART, Layout
from searchmerge.merging.native.compiler import load
from searchmerge.merging.native.operations import NoSourceError
from searchmerge.merging.native.source import (
    ENTRIES,
    Source,
    compute_source,
    merge_source,
    products_source,
)
from searchmerge.merging.operands import Operands

_logger = logging.getLogger(__name__)

_ALONE = 8 * PART
"""Entries that are not worth a second thread."""


_WRITING = threading.Lock()
"""Torch follows one function at a time."""

_POINTER, _WHOLE = ctypes.c_void_p, ctypes.c_int64

_ARGUMENTS = (
    *(_POINTER, _POINTER, _POINTER, _WHOLE, _POINTER, _WHOLE, ctypes.c_float, _WHOLE, _POINTER),
    ctypes.c_int,
)
"""Of a kernel: see the source's function ``run``."""


class _Kernel(NamedTuple):
    """What was compiled; see :mod:`searchmerge.merging.native.source`."""

    run: Any
    n_outs: int
    n_sums: int


_KERNELS: dict[object, _Kernel | None] = {}
"""What this process compiled, by what it was written for; ``None`` where it could not be."""


_REFUSED: set[ChunkFunction] = set()
"""Functions that are left to others."""


def refuses(function: ChunkFunction | None) -> bool:
    """Return whether a function was found not to be expressed as C++, or not to be vectorised."""
    return function in _REFUSED


def merge(
    function: ChunkFunction, operands: Operands, scale: float, out: Tensor
) -> tuple[bool, Tensor | None]:
    """Write ``base + scale * merged task vector`` to ``out``.

    Args:
        function: The method's arithmetic.
        operands: The parameter, on the CPU.
        scale: The factor on the merged task vector.
        out: Where to write, 1-D and contiguous, any float dtype.

    Returns:
        Whether it could be done, and the tally, float64.
    """
    if not _are_plain(operands, out):
        return False, None
    layout = _layout(operands)
    kernel = _kernel(
        ("merge", function, layout, out.dtype), lambda: merge_source(function, layout, out.dtype)
    )
    if kernel is None:
        return False, None
    sums = _run(kernel, operands, operands.scalars, (), (out,), scale)
    return True, sums if kernel.n_sums else None


def compute(function: ChunkFunction, operands: Operands) -> tuple[Tensor, ...] | None:
    """Return what ``function`` returns, ``(m,)`` float32 each; ``None`` if it cannot be done.

    Args:
        function: The method's arithmetic.
        operands: The parameter, on the CPU.
    """
    if not _are_plain(operands):
        return None
    layout = _layout(operands)
    kernel = _kernel(("compute", function, layout), lambda: compute_source(function, layout))
    if kernel is None:
        return None
    shape = kernel.n_outs, len(operands.base)
    outs = tuple(torch.empty(shape, dtype=torch.float32, device="cpu"))
    _run(kernel, operands, operands.scalars, (), outs, 1.0)
    return outs


def products(
    function: ChunkFunction, operands: Operands, sets: Tensor, numbers: Tensor
) -> Tensor | None:
    """Return the inner products of numbers with what is merged under each set of scalars.

    All sets are merged in one pass over memory, and nothing is written.

    Args:
        function: The method's arithmetic.
        operands: The parameter, on the CPU, whose own scalars do not count.
        sets: ``(n_sets, n_scalars, n_experts)`` float32.
        numbers: One per entry, ``(m,)``, any float dtype.

    Returns:
        ``(n_sets,)`` float64; ``None`` if it cannot be done.
    """
    if not _are_plain(operands, numbers):
        return None
    layout, n_sets, dtype = _layout(operands), len(sets), numbers.dtype
    kernel = _kernel(
        ("products", function, layout, n_sets, dtype),
        lambda: products_source(function, layout, n_sets, dtype),
    )
    if kernel is None:
        return None
    return _run(kernel, operands, sets, (numbers,), (), 1.0)


def _kernel(
    key: tuple[str, ChunkFunction, *tuple[object, ...]], write: Callable[[], Source]
) -> _Kernel | None:
    """Return what is compiled, at the first call, for a use, function and layout."""
    if key not in _KERNELS:
        with _WRITING:
            if key not in _KERNELS:
                _KERNELS[key] = _made(write)
                if _KERNELS[key] is None:
                    _REFUSED.add(key[1])
    return _KERNELS[key]


def _made(write: Callable[[], Source]) -> _Kernel | None:
    """Return what is compiled, or ``None`` where a function is left to others."""
    try:
        source = write()
        run = load(source.text, vectorised=ENTRIES).run
    except NoSourceError as error:
        _logger.info("a merge function %s", error)
        return None
    run.restype, run.argtypes = None, _ARGUMENTS
    return _Kernel(run, source.n_outs, source.n_sums)


def _layout(operands: Operands) -> Layout:
    return Layout(
        operands.base.dtype,
        tuple([tensor.dtype for tensor in operands.experts]),
        tuple([tensor.dtype for tensor in operands.kept]),
        (operands.scalars.shape[-2], operands.scalars.shape[-1]),
        0 if operands.keys is None else len(operands.keys),
    )


def _are_plain(operands: Operands, *more: Tensor) -> bool:
    """Return whether all entries lie in memory as a kernel reads them."""
    n_entries = operands.base.numel()
    for tensor in (operands.base, *operands.experts, *operands.kept, *more):
        if tensor.numel() != n_entries or not tensor.is_contiguous():
            return False
        if tensor.is_neg() or not tensor.is_cpu:
            return False
    return True


def _run(
    kernel: _Kernel,
    operands: Operands,
    sets: Tensor,
    more: Sequence[Tensor],
    outs: Sequence[Tensor],
    scale: float,
) -> Tensor:
    """Run a kernel; return its sums over all entries, ``(n_sums,)`` float64.

    Those of the parts are added in their order, however many threads there are.
    """
    n_entries = operands.base.numel()
    sets = _plain(sets, torch.float32)
    keys = None if operands.keys is None else _plain(operands.keys, torch.int64)
    n_parts = -(-n_entries // PART)
    of_parts = torch.empty(n_parts, kernel.n_sums, dtype=torch.float64, device="cpu")
    kernel.run(
        _addresses((operands.base, *operands.experts, *operands.kept, *more)),
        _addresses(outs),
        sets.data_ptr(),
        sets.shape[-2] * sets.shape[-1],
        None if keys is None else keys.data_ptr(),
        operands.start,
        scale,
        n_entries,
        of_parts.data_ptr(),
        torch.get_num_threads() if n_entries > _ALONE else 1,
    )
    return of_parts[0] if n_parts == 1 else torch.from_numpy(of_parts.numpy().sum(0))


def _plain(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return some numbers as a kernel reads them."""
    if numbers.dtype == dtype and numbers.is_cpu and not numbers.is_neg():
        return numbers.contiguous()
    return numbers.resolve_neg().to("cpu", dtype).contiguous()


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (_POINTER * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
