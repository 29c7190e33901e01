"""What a merge method may measure of the experts, once."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from searchmerge.merging.chunks import CHUNK
from searchmerge.merging.compiled import MOST_AT_ONCE
from searchmerge.merging.counting import Part
from searchmerge.merging.engine import Engine
from searchmerge.merging.kernels import GRID, Chunk, ChunkFunction
from searchmerge.merging.operands import Operands
from searchmerge.merging.residency import free_bytes
from searchmerge.merging.statistics import Block, OrderStatistics
from searchmerge.merging.task_vectors import TaskVectors

_logger = logging.getLogger(__name__)

_MEASURED_AT_ONCE = {"cpu": 4 * CHUNK}
"""Entries by kind of device; as many as possible where each operation is a launch."""

Scalars = Callable[[str], Tensor]
"""Parameter name to ``(n_scalars, n_experts)`` float32 on the CPU."""

Numbers = Callable[[str, Operands], tuple[Tensor, ...]]
"""A parameter's name and a part of it, without scalars, to tensors ``(m,)`` float32."""

WholeNumbers = Callable[[str, tuple[Tensor, ...]], tuple[Tensor, ...]]
"""A parameter's name and its task vectors in its shape, float32, to tensors of as many entries."""

FINE_GRID = 1000
"""Ranks within a parameter are measured for fractions in this many equal steps, all at once."""


@dataclass
class MemoryBudget:
    """What methods may keep in memory of what they measured.

    Attributes:
        left_bytes: How much more.
        readers: Each is called with what is given back, to forget the tensors.
    """

    left_bytes: int
    readers: list[Callable[[Mapping[str, tuple[Tensor, ...]]], None]] = field(default_factory=list)

    def take(self, size_bytes: int) -> bool:
        """Take ``size_bytes`` and return true, or return false if fewer are left."""
        if size_bytes > self.left_bytes:
            return False
        self.left_bytes -= size_bytes
        return True


@dataclass
class Measure:
    """Measures task vectors for merge methods, without ever holding them all in float32.

    Attributes:
        vectors: The experts to be merged.
        engine: Runs arithmetic.
        budget: What may be kept in memory.
        cache: File-name prefix for what is kept on disk; ``None`` for nothing.
        everyone: The measure of all experts that are loaded, if these are some of them: what is
            measured of each expert alone is measured there, once.
        devices: Parameter name to where it is merged, and so measured, wherever it lies; where
            its base lies if nothing is said.
    """

    vectors: TaskVectors
    engine: Engine
    budget: MemoryBudget
    cache: Path | None = None
    everyone: "Measure | None" = None
    devices: Mapping[str, torch.device] = field(default_factory=dict)
    _magnitudes: list[OrderStatistics] = field(default_factory=list, init=False)
    _blocks: list[Block] = field(default_factory=list, init=False)
    _products: dict[str, np.ndarray] = field(default_factory=dict, init=False)
    _sorted: dict[tuple[str, int], dict[int, float]] = field(default_factory=dict, init=False)

    @property
    def experts(self) -> tuple[str, ...]:
        """Return the experts' names, in the order of axis 0."""
        return self.vectors.experts

    @property
    def n_parameters(self) -> int:
        """Return d, the number of entries of a task vector."""
        return self.vectors.n_parameters

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the parameters that are merged."""
        return tuple(self.vectors.weights)

    def device(self, name: str) -> torch.device:
        """Return where a parameter is merged and measured."""
        return self.devices.get(name, self.vectors.base[name].device)

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a parameter."""
        return self.vectors.base[name].shape

    def is_zero(self, expert: str) -> bool:
        """Return whether an expert equals the base."""
        return self.vectors.is_zero(expert)

    def deltas(self, name: str) -> tuple[Tensor, ...]:
        """Return each expert's task vector of one parameter, float32, where it is merged."""
        device = self.device(name)
        base = self.vectors.base[name].detach().to(device).float()
        return tuple(
            expert.detach().to(device, torch.float32, copy=True).sub_(base)
            for expert in self.vectors.weights[name]
        )

    def magnitudes(self, ranks: Sequence[int]) -> list[float]:
        """Return, per expert, the ``rank``-th smallest magnitude of its whole task vector.

        Args:
            ranks: One per expert, counted from 0.
        """
        everyone = self.everyone or self
        rows = [everyone.experts.index(expert) for expert in self.experts]
        return everyone._all_magnitudes().at(ranks, rows)

    def _all_magnitudes(self) -> OrderStatistics:
        if not self._magnitudes:
            d = self.n_parameters
            self._magnitudes.append(
                OrderStatistics(
                    self._magnitude_blocks,
                    len(self.experts),
                    d,
                    grid=[d - 1 - int(d * (step / GRID)) for step in range(GRID)],
                    cache=self._file("magnitudes"),
                    on_gpu=self._is_on_gpu,
                )
            )
        return self._magnitudes[0]

    def order_statistics(
        self,
        label: str,
        numbers: Numbers,
        n_rows: int,
        *,
        grid: Sequence[int] = (),
        experts: Sequence[int] | None = None,
    ) -> OrderStatistics:
        """Return the order statistics of some numbers per entry, over the whole model.

        Args:
            label: What they are, in a few words; tells their cache from others.
            numbers: Makes them, ``n_rows`` tensors a call.
            n_rows: How many numbers there are per entry.
            grid: Ranks that will be asked for.
            experts: Indices of the experts read; ``None`` for all.
        """

        def blocks() -> Iterator[Block]:
            for name, part in self.parts(experts):
                yield _block(numbers(name, part), part.base.device)

        return OrderStatistics(
            blocks,
            n_rows,
            self.n_parameters,
            grid=grid,
            cache=self._file(f"{label}-{'-'.join(self.experts)}"),
            on_gpu=self._is_on_gpu,
        )

    def keep(
        self,
        numbers: Numbers,
        n_rows: int,
        *,
        experts: Sequence[int] | None = None,
    ) -> dict[str, tuple[Tensor, ...]] | None:
        """Compute numbers per entry and keep them, ``(numel,)`` float32 each, if memory allows.

        Where a kernel on a GPU computes them as it merges they are not kept: reading them would
        take longer.

        Args:
            numbers: Makes them, ``n_rows`` tensors a call.
            n_rows: How many numbers there are per entry.
            experts: Indices of the experts read; ``None`` for all.

        Returns:
            Parameter name to what is kept; ``None`` if it does not fit.
        """
        if any(self._is_compiled_on_gpu(self.device(name)) for name in self.names):
            return None
        size_bytes = 4 * n_rows * self.n_parameters
        if not self.budget.take(size_bytes):
            return None
        kept = {
            name: tuple(
                torch.empty(self.shape(name).numel(), device=self.device(name))
                for _ in range(n_rows)
            )
            for name in self.names
        }
        for name, part in self.parts(experts):
            for row, values in zip(kept[name], numbers(name, part), strict=True):
                row[part.start : part.start + len(values)] = values
        return kept

    def keep_whole(
        self, numbers: WholeNumbers, n_rows: int, *, as_weights: bool = False
    ) -> Mapping[str, tuple[Tensor, ...]]:
        """Compute numbers per entry from whole parameters, and keep them if memory allows.

        What does not fit on a GPU is kept in its host's memory, page-locked.

        Args:
            numbers: Makes them, ``n_rows`` tensors a call, from a parameter's name and task
                vectors.
            n_rows: How many numbers there are per entry.
            as_weights: Whether they are kept on a GPU as weights are, in the base's dtype.

        Returns:
            Parameter name to ``(numel,)`` each, float32 unless kept as weights are; where there
            is no room to keep them they are computed each time they are looked up.
        """
        computed = _Computed(self, numbers)
        on_gpu = any(self.device(name).type == "cuda" for name in self.names)
        dtypes = {
            name: self.vectors.base[name].dtype if as_weights and on_gpu else torch.float32
            for name in self.names
        }
        size_bytes = n_rows * sum(self.shape(n).numel() * d.itemsize for n, d in dtypes.items())
        fits = self.budget.take(size_bytes)
        if not fits and not (on_gpu and size_bytes <= free_bytes(torch.device("cpu")) // 2):
            _logger.warning("there is no memory to keep what is measured: each merge does it anew")
            return computed
        kept = {}
        for name, dtype in dtypes.items():
            rows = tuple(row.to(dtype) for row in computed[name])
            kept[name] = rows if fits else tuple(row.cpu().pin_memory() for row in rows)
        return kept

    def release(self, kept: Mapping[str, tuple[Tensor, ...]]) -> None:
        """Give back the budget of what was kept; the caller and all readers forget the tensors."""
        if isinstance(kept, dict):
            for name, tensors in kept.items():
                here = [t for t in tensors if t.device.type == self.device(name).type]
                self.budget.left_bytes += sum(tensor.nbytes for tensor in here)
        for forget in self.budget.readers:
            forget(kept)

    def compute(self, function: ChunkFunction, name: str) -> tuple[Tensor, ...]:
        """Return what ``function`` returns of one whole parameter, without scalars."""
        return self.engine.compute(function, self.operands(name))

    def inner_products(self) -> dict[str, np.ndarray]:
        """Return, per parameter, all inner products of two task vectors, ``(n, n)`` float64."""
        if not self._products:
            n_experts = len(self.experts)
            rows, columns = np.triu_indices(n_experts)
            for name, sums in self.sums(_products).items():
                products = np.zeros((n_experts, n_experts))
                products[rows, columns] = products[columns, rows] = sums.cpu().numpy()
                self._products[name] = products
        return self._products

    def tensor_magnitudes(self, name: str, ranks: Sequence[int]) -> list[float]:
        """Return, per expert, the ``rank``-th smallest magnitude within one parameter.

        Args:
            name: Of the parameter; it has one entry or more.
            ranks: One per expert, counted from 0.
        """
        everyone = self.everyone or self
        rows = [everyone.experts.index(expert) for expert in self.experts]
        return [
            everyone._tensor_magnitude(name, row, rank)
            for row, rank in zip(rows, ranks, strict=True)
        ]

    def _tensor_magnitude(self, name: str, row: int, rank: int) -> float:
        measured = self._sorted.setdefault((name, row), {})
        if rank not in measured:
            base = self.vectors.base[name].detach().to(self.device(name))
            expert = self.vectors.weights[name][row].detach().to(base.device)
            ordered = _sort(_magnitude(expert.reshape(-1), base.reshape(-1))(slice(None)))
            n = len(ordered)
            low = {int(n * (step / FINE_GRID)) for step in range(FINE_GRID)}
            wanted = sorted({*low, *(n - 1 - rank for rank in low), rank})
            measured.update(zip(wanted, ordered[wanted].tolist(), strict=True))
        return measured[rank]

    def sums(
        self, function: ChunkFunction, *, scalars: Scalars | None = None
    ) -> dict[str, Tensor]:
        """Return, per parameter, the sum of each tensor that ``function`` returns, in float64.

        Args:
            function: Arithmetic entry by entry, e.g. the products of two experts.
            scalars: Parameter name to the scalars of the function; ``None`` for none.
        """
        none = torch.empty(0, len(self.experts))
        totals: dict[str, Tensor] = {}
        for name, part in self.parts():
            numbers = none if scalars is None else scalars(name)
            outs = self.engine.compute(function, part.with_scalars(numbers))
            part_sums = torch.stack([out.sum(dtype=torch.float64) for out in outs])
            totals[name] = totals[name] + part_sums if name in totals else part_sums
        return totals

    def parts(self, experts: Sequence[int] | None = None) -> Iterator[tuple[str, Operands]]:
        """Yield every parameter part by part, with its name; each has at least one part."""
        for name in self.names:
            whole = self.operands(name, experts)
            step = _MEASURED_AT_ONCE.get(whole.base.device.type, MOST_AT_ONCE)
            for start in range(0, max(1, len(whole.base)), step):
                yield name, whole.part(start, start + step)

    def operands(self, name: str, experts: Sequence[int] | None = None) -> Operands:
        """Return one whole parameter, 1-D, where it is merged; without scalars."""
        every = self.vectors.weights[name]
        chosen = every if experts is None else tuple(every[i] for i in experts)
        base, *flat = (
            tensor.detach().to(self.device(name)).reshape(-1)
            for tensor in (self.vectors.base[name], *chosen)
        )
        return Operands(base, tuple(flat), torch.empty(0, len(chosen)))

    @property
    def _is_on_gpu(self) -> bool:
        return any(self.device(name).type == "cuda" for name in self.names)

    def _is_compiled_on_gpu(self, device: torch.device) -> bool:
        return device.type == "cuda" and self.engine.is_compiled(device)

    def _magnitude_blocks(self) -> Iterable[Block]:
        """Return where all magnitudes are; made once where that copies nothing."""
        if not self._blocks and not self.vectors.are_flat_on(self.device):
            return self._new_magnitude_blocks()
        if not self._blocks:
            blocks = self._new_magnitude_blocks()
            self._blocks.extend(b._replace(is_view=b.part is not None) for b in blocks)
        return self._blocks

    def _new_magnitude_blocks(self) -> Iterator[Block]:
        for _, part in self.parts():
            device = part.base.device
            rows = [_magnitude(expert, part.base) for expert in part.experts]
            there = Part(part.experts, part.base) if device.type == "cuda" else None
            yield Block(len(part.base), rows, there, device)

    def _file(self, label: str) -> Path | None:
        """Return the cache file of what is measured, of this layout, and computed in this way."""
        if self.cache is None:
            return None
        layout = [(name, tuple(self.shape(name))) for name in self.names]
        device = next(map(self.device, self.names), torch.device("cpu"))
        way = (torch.__version__, device.type, self.engine.way(device))
        digest = hashlib.sha256(repr((label, self.experts, layout, way)).encode()).hexdigest()
        return self.cache.with_name(f"{self.cache.name}-{digest[:24]}.safetensors")


class _Computed(Mapping[str, tuple[Tensor, ...]]):
    """Numbers per entry of each parameter, made from its task vectors when they are looked up."""

    def __init__(self, measure: Measure, numbers: WholeNumbers) -> None:
        self._measure, self._numbers = measure, numbers

    def __getitem__(self, name: str) -> tuple[Tensor, ...]:
        rows = self._numbers(name, self._measure.deltas(name))
        return tuple(row.reshape(-1).contiguous() for row in rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._measure.names)

    def __len__(self) -> int:
        return len(self._measure.names)


def _products(chunk: Chunk) -> tuple[Tensor, ...]:
    """Return the product of every two task vectors, in the order of ``np.triu_indices``."""
    deltas = chunk.deltas
    return tuple(deltas[i] * deltas[j] for i in range(len(deltas)) for j in range(i, len(deltas)))


def _sort(numbers: Tensor) -> Tensor:
    if numbers.device.type != "cpu":
        return numbers.sort().values
    return torch.from_numpy(np.sort(numbers.numpy()))  # several times faster than torch's


def _block(numbers: tuple[Tensor, ...], device: torch.device) -> Block:
    there = Part(numbers) if device.type == "cuda" else None
    return Block(len(numbers[0]), [row.__getitem__ for row in numbers], there, device)


def _magnitude(expert: Tensor, base: Tensor) -> Callable[[slice], Tensor]:
    return lambda where: (expert[where].float() - base[where].float()).abs_()
