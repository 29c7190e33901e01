"""Arithmetic that is compiled: one pass over memory, and what this process has compiled so far."""

import logging
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from searchmerge.merging.kernels import Chunk, ChunkFunction
from searchmerge.merging.operands import Operands
from searchmerge.merging.rows import Rows

_logger = logging.getLogger(__name__)

MOST_AT_ONCE = 1 << 24
"""Entries that a function is given at most, so that float32 counts them exactly."""

_Options = dict[str, str | int | bool | Callable[..., Any]]

_ALWAYS: _Options = {"cpp.dynamic_threads": True, "size_asserts": False}
"""Of inductor: threads whatever the first parameter's size, which would decide for all; and no
check of every input in every call, as all are contiguous."""

_IN_ROWS: _Options = {
    "realize_opcount_threshold": 1000,
    "realize_reads_threshold": 1000,
    "realize_acc_reads_threshold": 1000,
    "assert_indirect_indexing": False,
    "emulate_precision_casts": True,
}
"""Of inductor, for kernels on a GPU: one expression from what is read to what is written; no
check of indices that are within by masks; and each operation rounded by itself, as where nothing
is compiled, so that what is equal stays equal."""

RowKernel = Callable[..., None]
"""Takes a function, :class:`~searchmerge.merging.rows.Rows` and the tensors that it writes."""

_COMPILED: dict[object, Callable[..., Any]] = {}
"""What this process compiled, by kernel, function, device and dtypes; every engine shares it."""


class Compiled:
    """Runs functions compiled; each is compiled when it is first run.

    Attributes:
        is_broken: Whether compiling has failed, as without a C++ compiler; why, is logged.
    """

    def __init__(self) -> None:
        self.is_broken = False
        self._ones: dict[torch.device, Tensor] = {}

    def merge(
        self, function: ChunkFunction, operands: Operands, scale: float, out: Tensor
    ) -> tuple[bool, Tensor | None]:
        """Write ``base + scale * merged task vector`` to ``out``.

        Returns:
            Whether it could be compiled, and the tally.
        """
        factor = self._factor(scale, out.device)
        if len(out) <= MOST_AT_ONCE:
            done = self._run(_merge, function, operands, (factor, out))
            return done is not None, torch.stack(done) if done else None
        total: Tensor | None = None
        for start in range(0, len(out), MOST_AT_ONCE):
            stop = min(start + MOST_AT_ONCE, len(out))
            part = operands.part(start, stop)
            done = self._run(_merge, function, part, (factor, out[start:stop]))
            if done is None:
                return False, None
            if done:
                of_part = torch.stack(done)
                total = of_part if total is None else total + of_part
        return True, total

    def compute(self, function: ChunkFunction, operands: Operands) -> tuple[Tensor, ...] | None:
        """Return what ``function`` returns, or ``None`` if it cannot be compiled."""
        return self._run(_compute, function, operands)

    def products(
        self, function: ChunkFunction, operands: Operands, scalars: Tensor, numbers: Tensor
    ) -> tuple[Tensor, ...] | None:
        """Return the inner products of numbers with what is merged under each set of scalars.

        Returns:
            One tensor, ``(n_sets,)`` float32; ``None`` if it cannot be compiled.
        """
        kernel = _products(len(scalars))
        return self._run(kernel, function, operands.with_scalars(scalars), (numbers,))

    def run_rows(
        self,
        kernel: RowKernel,
        function: ChunkFunction,
        rows: Rows,
        outs: tuple[Tensor, ...],
    ) -> bool:
        """Run a kernel that writes ``outs``; return whether it could be compiled.

        Args:
            kernel: Takes ``function``, ``rows`` and ``outs``.
            function: The method's arithmetic.
            rows: What it reads, two rows or more.
            outs: What it writes, of any length.
        """
        tensors = (rows.base, *rows.experts, *rows.kept, *outs)
        dtypes = tuple([tensor.dtype for tensor in tensors])
        layout = (len(rows.experts), len(rows.kept), rows.numbers.shape, rows.keys is None)
        key = (kernel, function, rows.base.device, layout, dtypes)
        if key in _COMPILED:
            _COMPILED[key](rows, *outs)
            return True
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 0)
        run = _compile(kernel, function, len(_COMPILED), _IN_ROWS, dynamic=None)
        return self._first_run(key, run, (rows, *outs)) is not None

    def _factor(self, scale: float, device: torch.device) -> Tensor:
        """Return ``scale`` as compiled code takes it; 1, the usual one, is made once."""
        if scale != 1.0:
            return torch.full((1,), scale, device=device)
        if device not in self._ones:
            self._ones[device] = torch.ones(1, device=device)
        return self._ones[device]

    def _run(
        self,
        kernel: Callable[..., tuple[Tensor, ...]],
        function: ChunkFunction,
        operands: Operands,
        more: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...] | None:
        """Return what the compiled kernel returns; ``None`` if it cannot be compiled."""
        inputs = _inputs(operands)
        tensors = (inputs.base, *inputs.experts, *more, *inputs.kept)
        dtypes = tuple([tensor.dtype for tensor in tensors])
        layout = (len(inputs.experts), len(inputs.scalars), inputs.keys is None)
        key = (kernel, function, inputs.base.device, layout, dtypes)
        if key in _COMPILED:
            done: tuple[Tensor, ...] = _COMPILED[key](inputs, *more)
            return done
        options = _vector_width() if inputs.base.device.type == "cpu" else {}
        run = _compile(kernel, function, len(_COMPILED), options, dynamic=True)
        return self._first_run(key, run, (inputs, *more))

    def _first_run(
        self, key: object, run: Callable[..., tuple[Tensor, ...]], inputs: tuple[Any, ...]
    ) -> tuple[Tensor, ...] | None:
        """Return what is returned by code that is compiled now, and keep it if it can be."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what torch thinks of its own compiler
                done = run(*inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, OSError, ImportError) as error:
            self.is_broken = True
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            _logger.warning("merging runs uncompiled, as compiling failed: %s", reason)
            return None
        _COMPILED[key] = run
        return done or ()


class _Inputs(NamedTuple):
    """What compiled code takes of the operands: tensors of one device only."""

    base: Tensor
    experts: tuple[Tensor, ...]
    scalars: Tensor
    kept: tuple[Tensor, ...]
    keys: Tensor | None
    start: Tensor | None


def _inputs(operands: Operands) -> _Inputs:
    device = operands.base.device
    scalars = operands.scalars.to(device, non_blocking=True)
    keys = start = None
    if operands.keys is not None:
        keys = operands.keys.to(device)
        start = torch.tensor([operands.start], device=device)
    return _Inputs(operands.base, operands.experts, scalars, operands.kept, keys, start)


def _compile(
    kernel: Callable[..., Any],
    function: ChunkFunction,
    number: int,
    options: _Options,
    *,
    dynamic: bool | None,
) -> Callable[..., Any]:
    """Return ``kernel`` of ``function``, compiled at the first call.

    Dynamo keeps what it compiled by code object, and gives up after some variants of one: each
    gets a code object of its own.

    Args:
        kernel: What is run.
        function: Its first argument.
        number: Tells what was compiled apart.
        options: Of inductor.
        dynamic: Whether it is for every size; ``None`` where inputs say which of theirs vary.
    """

    def run(inputs: Any, *more: Tensor) -> Any:
        return kernel(function, inputs, *more)

    run.__code__ = run.__code__.replace(co_name=f"run_{number}")
    compiled: Callable[..., Any] = torch.compile(
        run, dynamic=dynamic, fullgraph=True, options={**_ALWAYS, **options}
    )
    return compiled


def _vector_width() -> _Options:
    """Return the width of the vectors that inductor chooses here, as an option of its own.

    What it keeps on disk it finds by options, and not by the processor: code for wider vectors
    than this one has would be taken from a folder that machines share, and skip every other entry.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    try:
        width = pick_vec_isa().bit_width()
    except (RuntimeError, OSError):  # without a C++ compiler, which is told where it is needed
        return {}
    return {"cpp.simdlen": width} if width else {}


def _merge(
    function: ChunkFunction, inputs: _Inputs, scale: Tensor, out: Tensor
) -> tuple[Tensor, ...]:
    merged, *tally = _compute(function, inputs)
    base = inputs.base
    origin = base if base.dtype == torch.float64 else base.float()
    out.copy_(origin + scale * merged)
    return tuple(tally)


@cache
def _products(n_sets: int) -> Callable[..., tuple[Tensor, ...]]:
    """Return the kernel that merges under so many sets of scalars, and multiplies."""

    def kernel(function: ChunkFunction, inputs: _Inputs, numbers: Tensor) -> tuple[Tensor, ...]:
        weights = numbers.float()
        sums = []
        for i in range(n_sets):
            merged = _compute(function, inputs._replace(scalars=inputs.scalars[i]))[0]
            sums.append((merged * weights).sum())
        return (torch.stack(sums),)

    return kernel


def _compute(function: ChunkFunction, inputs: _Inputs) -> tuple[Tensor, ...]:
    base = inputs.base.float()
    deltas = tuple(expert.float() - base for expert in inputs.experts)
    positions = None
    if inputs.start is not None:
        positions = inputs.start + torch.arange(base.shape[0], device=base.device)
    kept = tuple(tensor.float() for tensor in inputs.kept)
    return function(Chunk(deltas, inputs.scalars, kept, positions, inputs.keys))
