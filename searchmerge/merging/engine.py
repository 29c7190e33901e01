"""Running a method's arithmetic over parameters: compiled, or chunk by chunk."""

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from searchmerge.merging.chunks import CHUNK, Chunks
from searchmerge.merging.compiled import MOST_AT_ONCE, Compiled
from searchmerge.merging.kernels import ChunkFunction
from searchmerge.merging.native import native
from searchmerge.merging.native.compiler import has_compiler
from searchmerge.merging.operands import Operands, count_tallies
from searchmerge.merging.rows import (
    ROW,
    in_rows,
    merge_rows,
    multiply_rows,
    new_sums,
    new_tallies,
    numbers_of,
    rows_of,
    spans,
    total_of,
    write_rows,
)

EngineKind = Literal["auto", "compiled", "eager"]

Way = Literal["native", "torch", "chunks"]
"""C++ on a CPU, torch's compiler, or chunk by chunk."""

_TOO_SMALL = 64  # entries: not worth compiled code, and sizes it would be specialised for


class Engine:
    """Computes what merge functions return, and writes merged parameters in place.

    Compiled code makes one pass over memory, several times faster than chunk by chunk. On a CPU
    it is plain C++, made in a fraction of a second; what that does not express, and all on a GPU,
    is left to torch's compiler, which takes about 15 s the first time on a machine. ``auto``
    runs what would take so long on a CPU chunk by chunk; a caller with many trials ahead asks for
    ``compiled``. Where compiling fails, as without a C++ compiler, everything runs chunk by
    chunk, after one warning if it was asked for. All ways agree up to the rounding of float32.

    Args:
        kind: Which way to run.

    Attributes:
        compiled: Runs compiled, whatever the kind.
        chunks: Runs chunk by chunk, whatever the kind.
    """

    def __init__(self, kind: EngineKind = "auto") -> None:
        self._kind = kind
        self.compiled = Compiled()
        self.chunks = Chunks()

    def is_compiled(self, device: torch.device, function: ChunkFunction | None = None) -> bool:
        """Return whether arithmetic on ``device`` is compiled, as far as is known so far.

        Args:
            device: Where it is computed.
            function: The arithmetic; ``None`` for what methods usually do.
        """
        return self.way(device, function) != "chunks"

    def way(self, device: torch.device, function: ChunkFunction | None = None) -> Way:
        """Return how arithmetic runs on ``device``, as far as is known: no two ways round alike.

        Args:
            device: Where it is computed.
            function: The arithmetic; ``None`` for what methods usually do.
        """
        if self._is_native(device) and not native.refuses(function):
            return "native"
        return "torch" if self._is_torch_compiled(device) else "chunks"

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
        if self._is_native(out.device):
            done, tally = native.merge(function, operands, scale, out)
            if done:
                return tally
        if self._takes_rows(len(out), out.device):
            done, tally = self._merge_in_rows(function, operands, scale, out)
            if done:
                return tally
        elif len(out) >= _TOO_SMALL and self._is_torch_compiled(out.device):
            done, tally = self.compiled.merge(function, operands, scale, out)
            if done:
                return tally
        return self.chunks.merge(function, operands, scale, out)

    def compute(self, function: ChunkFunction, operands: Operands) -> tuple[Tensor, ...]:
        """Return what ``function`` returns, ``(m,)`` float32 each, in fresh tensors."""
        n_entries, device = len(operands.base), operands.base.device
        outs: tuple[Tensor, ...] | None = None
        if self._is_native(device):
            outs = native.compute(function, operands)
        elif self._takes_rows(n_entries, device):
            outs = self._compute_in_rows(function, operands)
        if outs is None and n_entries >= _TOO_SMALL and self._is_torch_compiled(device):
            outs = self.compiled.compute(function, operands)
        return self.chunks.compute(function, operands) if outs is None else outs

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
        total, begin = None, 0
        if self._is_native(numbers.device):
            total, begin = native.products(function, operands, scalars, numbers), len(numbers)
        elif self._takes_rows(len(numbers), numbers.device):
            total = self._products_in_rows(function, operands, scalars, numbers)
            begin = in_rows(len(numbers))  # what is left over is too little to be compiled for
        if total is None:
            total = torch.zeros(len(scalars), dtype=torch.float64, device=numbers.device)
            begin = 0
        rest = operands.part(begin, len(numbers))
        for sums in self._products_of_parts(function, rest, scalars, numbers[begin:]):
            total += sums
        return total

    def _products_of_parts(
        self, function: ChunkFunction, operands: Operands, scalars: Tensor, numbers: Tensor
    ) -> Iterator[Tensor]:
        """Yield what :meth:`products` returns of each part, where entries are not in rows."""
        compiled = len(numbers) >= _TOO_SMALL and self._is_torch_compiled(numbers.device)
        step = MOST_AT_ONCE if compiled else CHUNK
        for start in range(0, len(numbers), step):
            stop = min(start + step, len(numbers))
            part, weights = operands.part(start, stop), numbers[start:stop]
            done: Iterable[Tensor] | None = None
            if compiled and self._is_torch_compiled(numbers.device):
                done = self.compiled.products(function, part, scalars, weights)
            if done is None:
                done = self.chunks.products(function, part, scalars, weights)
            yield from done

    def _products_in_rows(
        self, function: ChunkFunction, operands: Operands, scalars: Tensor, numbers: Tensor
    ) -> Tensor | None:
        """Return what :meth:`products` does, of the entries that are in rows alone.

        ``None`` where it cannot be compiled.
        """
        of_sets = torch.stack([numbers_of(of_set, 1.0) for of_set in scalars])
        of_sets = of_sets.to(numbers.device, non_blocking=True)
        kernel, of_spans = multiply_rows(len(scalars)), []
        for start, stop in spans(len(numbers)):
            rows = rows_of(operands.part(start, stop), of_sets)
            weights = numbers[start:stop].view(-1, ROW)
            sums, outs = new_sums(len(scalars), len(weights), numbers.device)
            if not self.compiled.run_rows(kernel, function, rows, (weights, *outs)):
                return None
            of_spans.append(sums.sum(1))
        return torch.stack(of_spans).sum(0, dtype=torch.float64)

    def _is_native(self, device: torch.device) -> bool:
        return device.type == "cpu" and self._kind != "eager" and has_compiler()

    def _is_torch_compiled(self, device: torch.device) -> bool:
        wanted = self._kind == "compiled" or (self._kind == "auto" and device.type != "cpu")
        return wanted and not self.compiled.is_broken

    def _takes_rows(self, n_entries: int, device: torch.device) -> bool:
        return device.type == "cuda" and bool(in_rows(n_entries)) and self.is_compiled(device)

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
            if not self.compiled.run_rows(merge_rows, function, rows, (target, *tallies)):
                return False, None
            totals += [total_of(tallies)] if tallies else []
        whole = in_rows(len(out))
        if whole < len(out):
            rest = operands.part(whole, len(out))
            tally = self.chunks.merge(function, rest, scale, out[whole:])
            totals += [tally.double()] if tally is not None else []
        return True, torch.stack(totals).sum(0) if totals else None

    def _compute_in_rows(
        self, function: ChunkFunction, operands: Operands
    ) -> tuple[Tensor, ...] | None:
        """Return what ``function`` returns, or ``None`` if it cannot be compiled."""
        n_entries, device = len(operands.base), operands.base.device
        n_outs = count_tallies(function, operands) + 1
        outs = tuple(torch.empty(n_entries, device=device) for _ in range(n_outs))
        numbers = numbers_of(operands.scalars, 1.0).to(device, non_blocking=True)
        for start, stop in spans(n_entries):
            rows = rows_of(operands.part(start, stop), numbers)
            targets = tuple(out[start:stop].view(-1, ROW) for out in outs)
            if not self.compiled.run_rows(write_rows, function, rows, targets):
                return None
        whole = in_rows(n_entries)
        if whole < n_entries:
            of_rest = self.chunks.compute(function, operands.part(whole, n_entries))
            for out, entries in zip(outs, of_rest, strict=True):
                out[whole:] = entries
        return outs
