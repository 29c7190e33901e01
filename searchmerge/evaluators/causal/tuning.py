"""How texts are run soonest on this machine: measured once, and kept for a whole study.

In 16 bits scores depend a little on what is run beside what, so a way is chosen once, written
down, and taken by every worker and every later run of the study. On a CPU nothing is measured: the
rule of ``packing`` stands there.
"""

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

GROWTH = (2, 4, 8)
"""How many times the usual tokens of a pass are tried, as long as each takes less time."""

_WORTH = 0.95
"""Another way is taken where it takes no more than this of the time."""

_SPARE = 0.8
"""Of the free memory that a pass may take."""


class Way(NamedTuple):
    """How texts are run.

    Attributes:
        packs: Whether several share a row, where the rule says so; else each has its own.
        growth: How many times the usual tokens a pass has.
    """

    packs: bool = True
    growth: int = 1


class Probe(Protocol):
    """Tells time and memory where a model is."""

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the seconds that something takes, all that it launched included."""
        ...

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Return by how much memory in use grows while something runs."""
        ...

    def free_bytes(self) -> int:
        """Return the memory that is free."""
        ...


class GpuProbe:
    """Tells time and memory of a GPU.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the seconds that something takes, all that it launched included."""
        torch.cuda.synchronize(self._device)
        begun = time.perf_counter()
        run()
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - begun

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Return by how much memory in use grows while something runs."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        run()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before

    def free_bytes(self) -> int:
        """Return the memory that is free, what torch holds unused included."""
        unused = torch.cuda.memory_reserved(self._device)
        unused -= torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + unused


def fastest(run: Callable[[Way], object], probe: Probe, *, may_grow: bool) -> dict[Way, float]:
    """Return the seconds that each way took that was tried, the one to take first.

    Each is run once before its time is taken. Passes grow while that pays and what they take,
    by what they took so far, fits into the memory that is free.

    Args:
        run: Scores some texts in a way.
        probe: Tells time and memory.
        may_grow: Whether passes may be larger than usual.
    """
    times: dict[Way, float] = {}

    def take(way: Way) -> int:
        taken = probe.peak_bytes(lambda: run(way))
        times[way] = probe.seconds(lambda: run(way))
        return taken

    peaks = {way: take(way) for way in (Way(), Way(packs=False))}
    best, other = peaks
    if times[other] <= _WORTH * times[best]:
        best = other
    per_usual = peaks[best]
    for growth in GROWTH if may_grow else ():
        larger = best._replace(growth=growth)
        if growth * per_usual > _SPARE * probe.free_bytes():
            break
        take(larger)
        if times[larger] > _WORTH * times[best]:
            break
        best = larger
    return {best: times.pop(best), **times}
