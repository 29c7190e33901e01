"""Running a bound method over parameters: one pass, chunk by chunk or compiled."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from searchmerge.merging.task_vectors import CHUNK, TaskVectors

_logger = logging.getLogger(__name__)

EngineKind = Literal["auto", "compiled", "eager"]
Combine = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


def delta_chunks(task_vectors: TaskVectors) -> Iterator[Tensor]:
    """Yield the task vectors chunk by chunk, each ``(n_experts, m)`` float32, in a fresh tensor."""
    for name, tensors in task_vectors.weights.items():
        base = task_vectors.base[name].detach().reshape(-1)
        flat = [tensor.detach().reshape(-1) for tensor in tensors]
        for start in range(0, len(base), CHUNK):
            yield deltas(base[start : start + CHUNK], [t[start : start + CHUNK] for t in flat])


def deltas(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """Return ``expert - base`` in float32, ``(n_experts, m)``, from 1-D tensors of any dtype."""
    stacked = torch.empty(len(experts), len(base), dtype=torch.float32, device=base.device)
    for row, expert in zip(stacked, experts, strict=True):
        row.copy_(expert)
    return stacked.sub_(base)


class Engine:
    """Writes merged parameters, by compiled code or chunk by chunk.

    Compiled code is several times faster once it is there, and takes some seconds to make:
    ``auto`` compiles on a GPU and runs chunk by chunk on a CPU. Without a compiler, or where
    compiling fails, everything runs chunk by chunk, after one warning.
    """

    def __init__(self, kind: EngineKind = "auto") -> None:
        self._kind = kind
        self._broken = False
        self._compiled: dict[Combine, Callable[..., tuple[Tensor, Tensor | None]]] = {}

    @torch.no_grad()
    def merge(
        self, combine: Combine, base: Tensor, experts: Sequence[Tensor], scalars: Tensor, out: Tensor
    ) -> Tensor | None:
        """Write ``base + combine(deltas, scalars)`` to ``out``; return the tally.

        Args:
            combine: See ``Bound.combine``.
            base: The base's parameter, any shape and float dtype.
            experts: Each expert's, of the same shape, on any device.
            scalars: ``(n_scalars, n_experts)`` float32.
            out: Where to write, of the same shape, any float dtype.
        """
        flat_out = out.view(-1) if out.is_contiguous() else torch.empty_like(out).view(-1)
        device = out.device
        flat = [tensor.detach().to(device).reshape(-1) for tensor in (base, *experts)]
        scalars = scalars.to(device)
        if self._compiles(device):
            tally = self._run_compiled(combine, flat, scalars, flat_out)
        else:
            tally = _run_chunks(combine, flat, scalars, flat_out)
        if not out.is_contiguous():
            out.copy_(flat_out.view(out.shape))
        return tally

    def _compiles(self, device: torch.device) -> bool:
        if self._broken or self._kind == "eager":
            return False
        return self._kind == "compiled" or device.type == "cuda"

    def _run_compiled(
        self, combine: Combine, flat: Sequence[Tensor], scalars: Tensor, out: Tensor
    ) -> Tensor | None:
        if combine not in self._compiled:
            self._compiled[combine] = torch.compile(_fused(combine), dynamic=True)
        try:
            return _run_pass(self._compiled[combine], flat, scalars, out)
        except (RuntimeError, OSError, ImportError) as error:  # torch's compile errors
            self._broken = True
            first_line = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            _logger.warning("merging runs uncompiled, since compiling failed: %s", first_line)
            return _run_chunks(combine, flat, scalars, out)


def _fused(combine: Combine) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def fused(
        base: Tensor, experts: list[Tensor], scalars: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        base = base.float()
        stacked = torch.stack([expert.float() - base for expert in experts])
        merged, tally = combine(stacked, scalars)
        return base + merged, tally

    return fused


def _run_pass(
    run: Callable[..., tuple[Tensor, Tensor | None]],
    flat: Sequence[Tensor],
    scalars: Tensor,
    out: Tensor,
) -> Tensor | None:
    merged, tally = run(flat[0], list(flat[1:]), scalars)
    out.copy_(merged)
    return tally


def _run_chunks(
    combine: Combine, flat: Sequence[Tensor], scalars: Tensor, out: Tensor
) -> Tensor | None:
    total: Tensor | None = None
    for start in range(0, len(out), CHUNK):
        base, *experts = (tensor[start : start + CHUNK] for tensor in flat)
        merged, tally = combine(deltas(base, experts), scalars)
        out[start : start + CHUNK].copy_(merged.add_(base))
        if tally is not None:
            total = tally if total is None else total + tally
    return total
