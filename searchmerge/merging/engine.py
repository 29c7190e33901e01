"""Running a method's arithmetic over parameters: compiled, or chunk by chunk."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from searchmerge.merging.kernels import Chunk, ChunkFunction
from searchmerge.merging.rows import (
    ROW,
    Rows,
    in_rows,
    keys_of,
    merge_rows,
    new_tallies,
    numbers_of,
    spans,
    write_rows,
)

_logger = logging.getLogger(__name__)

EngineKind = Literal["auto", "compiled", "eager"]

CHUNK = 1 << 18
"""Entries that are worked on at once where nothing is compiled: a float32 buffer of 1 MiB."""

MOST_AT_ONCE = 1 << 24
"""Entries that a function is given at most, so that float32 counts them exactly."""

_TOO_SMALL = 64  # entries: not worth compiled code, and sizes it would be specialised for

_Options = dict[str, str | int | bool | Callable[..., Any]]

_INLINED: _Options = {
    "realize_opcount_threshold": 1000,
    "realize_reads_threshold": 1000,
    "realize_acc_reads_threshold": 1000,
}
"""Of inductor, where no tally is taken: one expression from what is read to what is written.

Intermediate results that it would set apart, and that read no 16-bit tensor, make all of the loop
go over half as many entries at once on a CPU. Tallies would compute the expression once more.
"""

_ALWAYS: _Options = {"cpp.dynamic_threads": True, "size_asserts": False}
"""Of inductor: threads whatever the first parameter's size, which would decide for all; and no
check of every input in every call, as all are contiguous."""

_IN_ROWS: _Options = {
    **_INLINED,
    "assert_indirect_indexing": False,
    "emulate_precision_casts": True,
}
"""Of inductor, for kernels on a GPU: one; no check of indices that are within by masks; and each
operation rounded by itself, as where nothing is compiled, so that what is equal stays equal."""

RowKernel = Callable[..., None]
"""Takes a function, :class:`~searchmerge.merging.rows.Rows` and the tensors that it writes."""

_TALLIES: dict[object, int] = {}
"""How many tallies each function returns, by it and what it reads."""

_COMPILED: dict[object, Callable[..., Any]] = {}
"""What this process compiled, by kernel, function, device and dtypes; every engine shares it."""


@dataclass(frozen=True, slots=True)
class Operands:
    """One parameter, or a part of one, with all that its merge reads; 1-D, on one device.

    Attributes:
        base: The base's entries, any float dtype.
        experts: Each expert's, any float dtypes.
        scalars: ``(n_scalars, n_experts)`` float32 on the CPU.
        kept: What the method kept of this parameter, any float dtype.
        keys: One int64 per expert, or ``None``.
        start: Index of the first entry in its parameter.
    """

    base: Tensor
    experts: tuple[Tensor, ...]
    scalars: Tensor
    kept: tuple[Tensor, ...] = ()
    keys: Tensor | None = None
    start: int = 0

    def part(self, start: int, stop: int) -> "Operands":
        """Return entries ``start`` to ``stop``, without copying."""
        return Operands(
            self.base[start:stop],
            tuple(tensor[start:stop] for tensor in self.experts),
            self.scalars,
            tuple(tensor[start:stop] for tensor in self.kept),
            self.keys,
            self.start + start,
        )

    def with_scalars(self, scalars: Tensor) -> "Operands":
        """Return the same with other scalars."""
        return replace(self, scalars=scalars)


class Engine:
    """Computes what merge functions return, and writes merged parameters in place.

    Compiled code makes one pass over memory, several times faster than chunk by chunk, and takes
    about 15 s to make the first time on a machine, 2 s afterwards. ``auto`` compiles on a GPU
    and runs chunk by chunk on a CPU; a caller with many trials ahead asks for ``compiled``. Where
    compiling fails, as without a C++ compiler, everything runs chunk by chunk after one warning.
    Both ways agree up to the rounding of float32.

    Args:
        kind: Which way to run.
    """

    def __init__(self, kind: EngineKind = "auto") -> None:
        self._kind = kind
        self._broken = False
        self._buffers: dict[tuple[torch.device, int], Tensor] = {}
        self._ones: dict[torch.device, Tensor] = {}

    def is_compiled(self, device: torch.device) -> bool:
        """Return whether arithmetic on ``device`` is compiled, as far as is known so far."""
        wanted = self._kind == "compiled" or (self._kind == "auto" and device.type != "cpu")
        return wanted and not self._broken

    def merge(
        self, function: ChunkFunction, operands: Operands, scale: float, out: Tensor
    ) -> Tensor | None:
        """Write ``base + scale * merged task vector`` to ``out``; return the tally.

        Args:
            function: The method's arithmetic.
            operands: The parameter.
            scale: The factor on the merged task vector.
            out: Where to write, 1-D and contiguous, any float dtype.
        """
        if self._takes_rows(len(out), out.device):
            done, tally = self._merge_in_rows(function, operands, scale, out)
            if done:
                return tally
        elif len(out) >= _TOO_SMALL and self.is_compiled(out.device):
            done, tally = self._merge_compiled(function, operands, scale, out)
            if done:
                return tally
        return self.merge_chunks(function, operands, scale, out)

    def compute(self, function: ChunkFunction, operands: Operands) -> tuple[Tensor, ...]:
        """Return what ``function`` returns, ``(m,)`` float32 each, in fresh tensors."""
        n_entries, device = len(operands.base), operands.base.device
        if self._takes_rows(n_entries, device):
            outs = self._compute_in_rows(function, operands)
            if outs is not None:
                return outs
        elif n_entries >= _TOO_SMALL and self.is_compiled(device):
            done = self._run_compiled(_compute, function, operands)
            if done is not None:
                return done
        return self._compute_chunks(function, operands)

    def products(
        self, function: ChunkFunction, operands: Operands, scalars: Tensor, numbers: Tensor
    ) -> Tensor:
        """Return the inner products of numbers with what is merged under each set of scalars.

        Compiled, all sets are merged in one pass over memory, and nothing is written.

        Args:
            function: The method's arithmetic.
            operands: The parameter, whose own scalars do not count.
            scalars: The sets, ``(n_sets, n_scalars, n_experts)`` float32 on the CPU.
            numbers: One per entry, ``(m,)``, any float dtype, on the parameter's device.

        Returns:
            ``(n_sets,)`` float64 on that device, from products summed in float32.
        """
        total = torch.zeros(len(scalars), dtype=torch.float64, device=numbers.device)
        compiled = len(numbers) >= _TOO_SMALL and self.is_compiled(numbers.device)
        step = MOST_AT_ONCE if compiled else CHUNK
        for start in range(0, len(numbers), step):
            stop = min(start + step, len(numbers))
            part, weights = operands.part(start, stop), numbers[start:stop]
            done: Iterable[Tensor] | None = None
            if compiled and self.is_compiled(numbers.device):
                kernel = _products(len(scalars))
                done = self._run_compiled(kernel, function, part.with_scalars(scalars), (weights,))
            if done is None:
                done = self._products_of_chunks(function, part, scalars, weights)
            for sums in done:
                total += sums
        return total

    @torch.no_grad()
    def merged_of_chunks(self, function: ChunkFunction, operands: Operands, out: Tensor) -> None:
        """Write into ``out``, ``(m,)``, any float dtype, what is merged, chunk by chunk.

        Args:
            function: The method's arithmetic.
            operands: The parameter, on the device of ``out``.
            out: What is overwritten.
        """
        for start in range(0, len(out), CHUNK):
            part = operands.part(start, start + CHUNK)
            out[start : start + CHUNK] = function(self._chunk(part)[0])[0]

    def _products_of_chunks(
        self, function: ChunkFunction, operands: Operands, scalars: Tensor, numbers: Tensor
    ) -> Iterator[Tensor]:
        """Yield, for each chunk, the inner product with what each set of scalars merges."""
        for start in range(0, len(numbers), CHUNK):
            weights = numbers[start : start + CHUNK].float()
            part = operands.part(start, start + CHUNK)
            merged = (function(self._chunk(part.with_scalars(s))[0])[0] for s in scalars)
            yield torch.stack([torch.dot(of_set, weights) for of_set in merged])

    def _takes_rows(self, n_entries: int, device: torch.device) -> bool:
        return device.type == "cuda" and bool(in_rows(n_entries)) and self.is_compiled(device)

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

    def _merge_in_rows(
        self, function: ChunkFunction, operands: Operands, scale: float, out: Tensor
    ) -> tuple[bool, Tensor | None]:
        """Return whether it could be done, and the tally."""
        n_tallies = count_tallies(function, operands)
        numbers = numbers_of(operands.scalars, scale).to(out.device, non_blocking=True)
        totals = []
        for start, stop in spans(len(operands.base)):
            part = operands.part(start, stop)
            rows = rows_of(part, numbers)
            tallies = new_tallies(n_tallies, len(rows.base), out.device)
            target = out[start:stop].view(-1, ROW)
            if not self.run_rows(merge_rows, function, rows, (target, *tallies)):
                return False, None
            totals += [total_of(tallies)] if tallies else []
        whole = in_rows(len(out))
        if whole < len(out):
            rest = operands.part(whole, len(out))
            tally = self.merge_chunks(function, rest, scale, out[whole:])
            totals += [tally.double()] if tally is not None else []
        return True, torch.stack(totals).sum(0) if totals else None

    def _compute_in_rows(
        self, function: ChunkFunction, operands: Operands
    ) -> tuple[Tensor, ...] | None:
        n_entries, device = len(operands.base), operands.base.device
        n_outs = count_tallies(function, operands) + 1
        outs = tuple(torch.empty(n_entries, device=device) for _ in range(n_outs))
        numbers = numbers_of(operands.scalars, 1.0).to(device, non_blocking=True)
        for start, stop in spans(len(operands.base)):
            part = operands.part(start, stop)
            targets = [out[start:stop].view(-1, ROW) for out in outs]
            if not self.run_rows(write_rows, function, rows_of(part, numbers), tuple(targets)):
                return None
        whole = in_rows(n_entries)
        if whole < n_entries:
            rest = self._compute_chunks(function, operands.part(whole, n_entries))
            for out, numbers in zip(outs, rest, strict=True):
                out[whole:] = numbers
        return outs

    def _merge_compiled(
        self, function: ChunkFunction, operands: Operands, scale: float, out: Tensor
    ) -> tuple[bool, Tensor | None]:
        """Return whether it could be done, and the tally."""
        factor = self._factor(scale, out.device)
        if len(out) <= MOST_AT_ONCE:
            done = self._run_compiled(_merge, function, operands, (factor, out))
            return done is not None, torch.stack(done) if done else None
        total: Tensor | None = None
        for start in range(0, len(out), MOST_AT_ONCE):
            stop = min(start + MOST_AT_ONCE, len(out))
            part = operands.part(start, stop)
            done = self._run_compiled(_merge, function, part, (factor, out[start:stop]))
            if done is None:
                return False, None
            if done:
                of_part = torch.stack(done)
                total = of_part if total is None else total + of_part
        return True, total

    def _factor(self, scale: float, device: torch.device) -> Tensor:
        """Return ``scale`` as compiled code takes it; 1, the usual one, is made once."""
        if scale != 1.0:
            return torch.full((1,), scale, device=device)
        if device not in self._ones:
            self._ones[device] = torch.ones(1, device=device)
        return self._ones[device]

    def _run_compiled(
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
        first, _ = self._chunk(operands.part(0, 1))
        alone = kernel is _merge and len(function(first)) == 1
        run = _compile(kernel, function, len(_COMPILED), _INLINED if alone else {}, dynamic=True)
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
            self._broken = True
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            _logger.warning("merging runs uncompiled, as compiling failed: %s", reason)
            return None
        _COMPILED[key] = run
        return done or ()

    def merge_chunks(
        self, function: ChunkFunction, operands: Operands, scale: float, out: Tensor
    ) -> Tensor | None:
        """Do what :meth:`merge` does, chunk by chunk."""
        total: Tensor | None = None
        for start in range(0, len(out), CHUNK):
            stop = min(start + CHUNK, len(out))
            chunk, origin = self._chunk(operands.part(start, stop))
            merged, *tally = function(chunk)
            if scale != 1.0:
                merged = merged.mul_(scale)
            if origin.dtype == torch.float64:
                out[start:stop].copy_(merged.double().add_(origin))
            else:
                out[start:stop].copy_(merged.add_(origin))
            if tally:
                of_chunk = torch.stack(tally)
                total = of_chunk if total is None else total + of_chunk
        return total

    def _compute_chunks(self, function: ChunkFunction, operands: Operands) -> tuple[Tensor, ...]:
        parts = []
        for start in range(0, max(1, len(operands.base)), CHUNK):
            chunk, _ = self._chunk(operands.part(start, start + CHUNK))
            parts.append([out.clone() for out in function(chunk)])
        return tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))

    def _chunk(self, part: Operands) -> tuple[Chunk, Tensor]:
        """Return a chunk whose deltas lie in buffers that every chunk uses again, and the base."""
        n_entries, n_experts, device = len(part.base), len(part.experts), part.base.device
        if (device, n_experts) not in self._buffers:
            self._buffers[device, n_experts] = torch.empty(n_experts + 1, CHUNK, device=device)
        buffers = [buffer[:n_entries] for buffer in self._buffers[device, n_experts]]
        narrow = part.base.dtype.itemsize < buffers[-1].dtype.itemsize
        base = buffers[-1].copy_(part.base) if narrow else part.base
        deltas = tuple(
            buffer.copy_(expert).sub_(base)
            for buffer, expert in zip(buffers, part.experts, strict=False)
        )
        positions = None
        if part.keys is not None:
            positions = torch.arange(part.start, part.start + n_entries, device=device)
        kept = tuple(tensor.float() for tensor in part.kept)
        return Chunk(deltas, part.scalars, kept, positions, part.keys), base


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


def count_tallies(function: ChunkFunction, operands: Operands) -> int:
    """Return how many tallies a function returns of such a parameter, beside what is merged."""
    is_random = operands.keys is not None
    n_experts, n_kept = len(operands.experts), len(operands.kept)
    key = (function, n_experts, operands.scalars.shape, n_kept, is_random)
    if key not in _TALLIES:
        zero, place = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        chunk = Chunk(
            tuple(zero.clone() for _ in range(n_experts)),
            torch.zeros(operands.scalars.shape),
            (zero,) * n_kept,
            place if is_random else None,
            place.expand(max(1, n_experts)) if is_random else None,
        )
        _TALLIES[key] = len(function(chunk)) - 1
    return _TALLIES[key]


def total_of(tallies: Sequence[Tensor]) -> Tensor:
    """Return the sum of each tally over all rows, ``(n_tallies,)`` float64, exactly."""
    return torch.stack([tally.sum(dtype=torch.float64) for tally in tallies])


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
