"""Passes over a model that lies on a GPU with its experts: launched once, then played again.

All launches of a pass are recorded as a CUDA graph, and a candidate costs one copy of its numbers
and one launch.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from searchmerge.merging.engine import Engine
from searchmerge.merging.method import Pass
from searchmerge.merging.operands import Operands, Parameter, count_tallies
from searchmerge.merging.rows import (
    ROW,
    SUMMED,
    Rows,
    in_rows,
    keys_of,
    merge_rows,
    n_number_rows,
    new_tallies,
    rows_of,
    spans,
    total_of,
)

_logger = logging.getLogger(__name__)

_ALIGNED = 8  # rows: 16 bytes of a tally

_AT_ONCE = 4  # kernels: one's last blocks leave room for the first of the next

Launch = Callable[[], object]
Recorder = Callable[[Launch], Launch]
"""Takes what launches a pass; returns what plays it again."""


class _Piece(NamedTuple):
    """What one kernel reads and writes: some rows of a parameter.

    Attributes:
        parameter: Index of the parameter.
        start: Index of the first entry in it.
        rows: What is read.
        outs: Where the parameter and its tallies are written.
    """

    parameter: int
    start: int
    rows: Rows
    outs: tuple[Tensor, ...]


class _Sent:
    """Numbers that change from run to run: written on the host, then sent to where they are read.

    Args:
        shape: Of all of them.
        dtype: Theirs.
        device: Where they are read.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.host = torch.zeros(*shape, dtype=dtype, pin_memory=device.type == "cuda")
        self.there = torch.zeros(*shape, dtype=dtype, device=device)

    def send(self) -> None:
        self.there.copy_(self.host, non_blocking=True)


class _Branches:
    """Streams of a GPU on which kernels that do not wait for one another run side by side.

    Args:
        device: The device; one that is no GPU has no streams.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = [
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for _ in range(_AT_ONCE if device.type == "cuda" else 0)
        ]

    def launch(self, kernels: Iterable[Callable[[], bool]]) -> bool:
        """Launch until one says that it could not be; what is launched next waits for all."""
        if not self._streams:
            return all(kernel() for kernel in kernels)
        current = torch.cuda.current_stream(self._device)
        for stream in self._streams:
            stream.wait_stream(current)
        done = True
        for stream, kernel in zip(itertools.cycle(self._streams), kernels, strict=False):
            with torch.cuda.stream(stream):
                done = kernel()
            if not done:
                break
        for stream in self._streams:
            current.wait_stream(stream)
        return done


class RecordedPass:
    """One function over all parameters that lie on one GPU.

    The first run launches every kernel, which compiles it; the second records; from then on the
    recording is played. Where recording fails every run launches every kernel. A run waits for
    nothing, so the device is to be waited for before the next.

    Args:
        engine: Runs arithmetic.
        work: A pass; others that are run have the same function, experts and kept tensors.
        parameters: What it reads and writes.
        record: How launches are recorded.
    """

    def __init__(
        self,
        engine: Engine,
        work: Pass,
        parameters: Sequence[Parameter],
        record: Recorder,
    ) -> None:
        self._engine, self._function, self._parameters = engine, work.function, parameters
        self._record, self._n_runs = record, 0
        self._play: Launch | None = None
        every = [parameter.operands(work) for parameter in parameters]
        device, scalars, first_keys = parameters[0].target.device, every[0].scalars, every[0].keys
        sizes = (len(parameters), n_number_rows(*scalars.shape), scalars.shape[1])
        self._numbers = _Sent(sizes, torch.float32, device)
        self._branches = _Branches(device)
        cuts = [
            (i, start, stop)
            for i, parameter in enumerate(parameters)
            for start, stop in spans(len(parameter.target))
        ]
        cuts.sort(key=lambda cut: cut[1] - cut[2])  # it is compiled for the largest
        self._keys: _Sent | None = None
        if first_keys is not None:
            n_keys = len(first_keys) + 1
            self._keys = _Sent((len(cuts), n_keys + n_keys % 2), torch.int64, device)
        n_rows = [-(-(stop - start) // (ROW * _ALIGNED)) * _ALIGNED for _, start, stop in cuts]
        n_tallies = count_tallies(work.function, every[0])
        n_all = -(-sum(n_rows) // SUMMED) * SUMMED
        self._tallies = new_tallies(n_tallies, n_all, device)
        for tally in self._tallies:
            tally.zero_()  # what lies between two parameters, and at the end, is never written
        self._total = torch.zeros(n_tallies, dtype=torch.float64, device=device)
        self._rests = [
            (parameter, in_rows(len(parameter.target)))
            for parameter in parameters
            if in_rows(len(parameter.target)) < len(parameter.target)
        ]
        ends = itertools.accumulate(n_rows, initial=0)
        self._pieces = [
            self._piece(i, every[cut[0]], cut, place)
            for i, (cut, place) in enumerate(zip(cuts, ends, strict=False))
        ]

    def _piece(self, index: int, whole: Operands, cut: tuple[int, int, int], place: int) -> _Piece:
        (parameter, start, stop), keys = cut, None
        part = whole.part(start, stop)
        if self._keys is not None and part.keys is not None:
            keys = self._keys.there[index, : len(part.keys) + 1]
        rows = rows_of(part, self._numbers.there[parameter], keys)
        target = self._parameters[parameter].target[start:stop].view(-1, ROW)
        tallies = tuple(tally[place : place + len(target)] for tally in self._tallies)
        return _Piece(parameter, start, rows, (target, *tallies))

    def run(self, work: Pass, scales: Mapping[str, float]) -> tuple[bool, Tensor | None]:
        """Merge under the numbers of a pass; return whether it could be done, and the tally.

        Args:
            work: A pass like the one given first.
            scales: Parameter name to the factor on the merged task vector.
        """
        self._send(work, scales)
        if self._play is None and self._n_runs == 1:
            self._play = self._recorded()
        self._n_runs += 1
        if self._play is not None:
            self._play()
        elif not self._launch():
            return False, None
        tallies = [self._total] if self._tallies else []
        for parameter, whole in self._rests:
            rest = parameter.operands(work).part(whole, len(parameter.target))
            scale, out = scales[parameter.name], parameter.target[whole:]
            tally = self._engine.chunks.merge(self._function, rest, scale, out)
            tallies += [tally.double()] if tally is not None else []
        return True, torch.stack(tallies).sum(0) if tallies else None

    def _send(self, work: Pass, scales: Mapping[str, float]) -> None:
        names = [parameter.name for parameter in self._parameters]
        scalars = torch.stack([work.scalars(name) for name in names])
        self._numbers.host[:, : scalars.shape[1]] = scalars
        self._numbers.host[:, -1] = torch.tensor([scales[name] for name in names])[:, None]
        self._numbers.send()
        if self._keys is None or work.keys is None:
            return
        keys = [work.keys(name) for name in names]
        for row, piece in zip(self._keys.host, self._pieces, strict=True):
            row[: len(keys[0]) + 1] = keys_of(keys[piece.parameter], piece.start)
        self._keys.send()

    def _recorded(self) -> Launch | None:
        """Return what plays the launches of all kernels; ``None`` where it cannot be recorded."""
        try:
            return self._record(self._launch)
        except RuntimeError as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            _logger.info("each kernel is launched by itself, as recording failed: %s", reason)
            return None

    def _launch(self) -> bool:
        """Launch every kernel; return whether all could be compiled."""

        def launch(piece: _Piece) -> bool:
            run = self._engine.compiled.run_rows
            return run(merge_rows, self._function, piece.rows, piece.outs)

        if not self._branches.launch(partial(launch, piece) for piece in self._pieces):
            return False
        if self._tallies:
            self._total.copy_(total_of(self._tallies))
        return True


def record_graph(launch: Launch, device: torch.device) -> Launch:
    """Return what plays again what ``launch`` launches on a GPU, as one CUDA graph.

    All of it was launched before, so that nothing is compiled while it is recorded.
    """
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(device),
        torch.cuda.graph(graph, capture_error_mode="thread_local"),  # others go on meanwhile
    ):
        launch()

    def play() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return play
