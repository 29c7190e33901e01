"""Arithmetic where nothing is compiled: over one chunk of a parameter after the other."""

from collections.abc import Iterator

import torch
from torch import Tensor

from searchmerge.merging.kernels import Chunk, ChunkFunction
from searchmerge.merging.operands import Operands

CHUNK = 1 << 18
"""Entries that are worked on at once: a float32 buffer of 1 MiB."""


class Chunks:
    """Runs functions chunk by chunk, in buffers that every chunk uses again."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, int], Tensor] = {}

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

    def compute(self, function: ChunkFunction, operands: Operands) -> tuple[Tensor, ...]:
        """Return what ``function`` returns, ``(m,)`` float32 each, in fresh tensors."""
        parts = []
        for start in range(0, max(1, len(operands.base)), CHUNK):
            chunk, _ = self._chunk(operands.part(start, start + CHUNK))
            parts.append([out.clone() for out in function(chunk)])
        return tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))

    @torch.no_grad()
    def write_merged(self, function: ChunkFunction, operands: Operands, out: Tensor) -> None:
        """Write the merged task vector into ``out``.

        Args:
            function: The method's arithmetic.
            operands: The parameter, on the device of ``out``.
            out: What is overwritten, ``(m,)``, any float dtype.
        """
        for start in range(0, len(out), CHUNK):
            part = operands.part(start, start + CHUNK)
            out[start : start + CHUNK] = function(self._chunk(part)[0])[0]

    def products(
        self, function: ChunkFunction, operands: Operands, scalars: Tensor, numbers: Tensor
    ) -> Iterator[Tensor]:
        """Yield, for each chunk, its inner products with what each set of scalars merges.

        Args:
            function: The method's arithmetic.
            operands: The parameter, whose own scalars do not count.
            scalars: The sets, ``(n_sets, n_scalars, n_experts)`` float32 on the CPU.
            numbers: One per entry, ``(m,)``, any float dtype, on the parameter's device.

        Yields:
            ``(n_sets,)`` float32.
        """
        for start in range(0, len(numbers), CHUNK):
            weights = numbers[start : start + CHUNK].float()
            part = operands.part(start, start + CHUNK)
            merged = (function(self._chunk(part.with_scalars(s))[0])[0] for s in scalars)
            yield torch.stack([torch.dot(of_set, weights) for of_set in merged])

    def _chunk(self, part: Operands) -> tuple[Chunk, Tensor]:
        """Return a chunk whose deltas lie in buffers, and the base: float32, or float64 if it is.

        Task vectors are differences of what experts and base are in float32, as they are measured.
        """
        n_entries, n_experts, device = len(part.base), len(part.experts), part.base.device
        if (device, n_experts) not in self._buffers:
            self._buffers[device, n_experts] = torch.empty(
                n_experts + 1, CHUNK, dtype=torch.float32, device=device
            )
        buffers = [buffer[:n_entries] for buffer in self._buffers[device, n_experts]]
        base = part.base
        if base.dtype != torch.float32:
            base = buffers[-1].copy_(base)
        deltas = tuple(
            buffer.copy_(expert).sub_(base)
            for buffer, expert in zip(buffers, part.experts, strict=False)
        )
        positions = None
        if part.keys is not None:
            positions = torch.arange(part.start, part.start + n_entries, device=device)
        kept = tuple(tensor.float() for tensor in part.kept)
        chunk = Chunk(deltas, part.scalars, kept, positions, part.keys)
        return chunk, part.base if part.base.dtype == torch.float64 else base
