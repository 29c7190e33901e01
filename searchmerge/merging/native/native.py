"""Running merge functions as C++ on a CPU."""

import ctypes
import itertools
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

_ARGUMENTS: Any = (_WHOLE, *[_POINTER] * 10, ctypes.c_int)
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


class Merges:
    """The merges of parameters that stay where they lie in memory: one call for all of them.

    Args:
        kernel: What was compiled for their layout.
        parameters: What is read, whose own scalars and keys do not count.
        outs: Where each is written.
    """

    def __init__(
        self, kernel: _Kernel, parameters: Sequence[Operands], outs: Sequence[Tensor]
    ) -> None:
        self._call = _Call(kernel, parameters, [()] * len(parameters), [(out,) for out in outs])
        self._counts = bool(kernel.n_sums)

    @classmethod
    def of(
        cls, function: ChunkFunction, parameters: Sequence[Operands], outs: Sequence[Tensor]
    ) -> "Merges | None":
        """Return the merges of parameters of one layout; ``None`` if they cannot be done.

        Args:
            function: The method's arithmetic.
            parameters: At least one, on the CPU, each of the same :func:`layout_of`.
            outs: Where to write each, 1-D and contiguous, all of one float dtype.
        """
        if not all(map(_are_plain, parameters, outs)):
            return None
        layout, dtype = layout_of(parameters[0]), outs[0].dtype
        kernel = _kernel(
            ("merge", function, layout, dtype), lambda: merge_source(function, layout, dtype)
        )
        return None if kernel is None else cls(kernel, parameters, outs)

    def run(self, scalars: Tensor, keys: Tensor | None, scales: Sequence[float]) -> Tensor | None:
        """Write ``base + scale * merged task vector`` of each; return the tally of all, float64.

        Args:
            scalars: ``(n_parameters, n_scalars, n_experts)``.
            keys: ``(n_parameters, n_keys)``; ``None`` where nothing is random.
            scales: Of each, the factor on the merged task vector.
        """
        sums = self._call.run(scalars, keys, scales)
        return sums if self._counts else None


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
    merges = Merges.of(function, (operands,), (out,))
    if merges is None:
        return False, None
    return True, merges.run(operands.scalars, operands.keys, (scale,))


def compute(function: ChunkFunction, operands: Operands) -> tuple[Tensor, ...] | None:
    """Return what ``function`` returns, ``(m,)`` float32 each; ``None`` if it cannot be done.

    Args:
        function: The method's arithmetic.
        operands: The parameter, on the CPU.
    """
    if not _are_plain(operands):
        return None
    layout = layout_of(operands)
    kernel = _kernel(("compute", function, layout), lambda: compute_source(function, layout))
    if kernel is None:
        return None
    shape = kernel.n_outs, len(operands.base)
    outs = tuple(torch.empty(shape, dtype=torch.float32, device="cpu"))
    _Call(kernel, (operands,), ((),), (outs,)).run(operands.scalars, operands.keys, (1.0,))
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
    layout, n_sets, dtype = layout_of(operands), len(sets), numbers.dtype
    kernel = _kernel(
        ("products", function, layout, n_sets, dtype),
        lambda: products_source(function, layout, n_sets, dtype),
    )
    if kernel is None:
        return None
    return _Call(kernel, (operands,), ((numbers,),), ((),)).run(sets, operands.keys, (1.0,))


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


def layout_of(operands: Operands) -> Layout:
    """Return what of a parameter a kernel is written for."""
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


class _Call:
    """A kernel with the places of all that it reads and writes.

    Args:
        kernel: What was compiled.
        parameters: What is read, whose own scalars and keys do not count.
        more: What else is read of each.
        outs: What is written of each.
    """

    def __init__(
        self,
        kernel: _Kernel,
        parameters: Sequence[Operands],
        more: Sequence[Sequence[Tensor]],
        outs: Sequence[Sequence[Tensor]],
    ) -> None:
        self._kernel = kernel
        self._tensors = [  # they stay in memory as long as this does
            [each.base, *each.experts, *each.kept, *others]
            for each, others in zip(parameters, more, strict=True)
        ]
        self._outs = outs
        sizes = [len(each.base) for each in parameters]
        parts = itertools.accumulate((-(-size // PART) for size in sizes), initial=0)
        self._in, self._out = _addresses(self._tensors), _addresses(outs)
        self._firsts = _wholes([each.start for each in parameters])
        self._sizes, self._starts = _wholes(sizes), _wholes(list(parts))
        self._is_large = sum(sizes) > _ALONE

    def run(self, sets: Tensor, keys: Tensor | None, scales: Sequence[float]) -> Tensor:
        """Return the kernel's sums over all entries, ``(n_sums,)`` float64.

        Those of the parts are added in their order, however many threads there are.

        Args:
            sets: Scalars, all that there are of each parameter, one behind the other.
            keys: The same of keys.
            scales: Of each parameter.
        """
        sets = _plain(sets, torch.float32)
        keys = None if keys is None else _plain(keys, torch.int64)
        sums = torch.empty(self._kernel.n_sums, dtype=torch.float64, device="cpu")
        of_parts = torch.empty(self._starts[-1] * len(sums), dtype=torch.float64, device="cpu")
        self._kernel.run(
            len(scales),
            self._in,
            self._out,
            sets.data_ptr(),
            None if keys is None else keys.data_ptr(),
            self._firsts,
            (ctypes.c_float * len(scales))(*scales),
            self._sizes,
            self._starts,
            of_parts.data_ptr(),
            sums.data_ptr(),
            torch.get_num_threads() if self._is_large else 1,
        )
        return sums


def _plain(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return some numbers as a kernel reads them."""
    if numbers.dtype == dtype and numbers.is_cpu and not numbers.is_neg():
        return numbers.contiguous()
    return numbers.resolve_neg().to("cpu", dtype).contiguous()


def _addresses(tensors: Sequence[Sequence[Tensor]]) -> Any:
    """Return where tensors lie, one behind the other, as C reads it."""
    places = [tensor.data_ptr() for of_one in tensors for tensor in of_one]
    return (_POINTER * len(places))(*places)


def _wholes(numbers: Sequence[int]) -> Any:
    return (_WHOLE * len(numbers))(*numbers)
