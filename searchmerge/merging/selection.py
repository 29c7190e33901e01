"""Order statistics by few passes over the numbers, none of which counts each by itself.

A histogram whose bins are fine enough to tell ranks apart has too many counters for the memory
that a GPU's threads share, and in the other they would be waited for: an atomic operation a
number takes longer than reading it a dozen times. Here a sample says between which two numbers
each rank lies, but for bad luck. A pass over all counts exactly how many numbers are below these,
by some hundred counters, and collects what lies between, or a sample of it where that is too
much; the next pass goes on from there. A rank is known when all that lies between was collected,
or when nothing but equal numbers does. What a sample suggests is never trusted: counts alone
decide, and the result is that of a sort whatever was drawn.

For a grid of 100 ranks the first pass reads one number in 256. It leaves a rank within 12 standard
deviations of its place, 0.2 % of 10^9 numbers; the second reads all of them and collects a sample
of what lies there; the third reads them again and collects the rest, 0.5 %. Where numbers tie, as
those of 16-bit weights do, what lies between is soon a single number, and nothing is sorted but
the sample. ``studies/benchmarks`` says how long it takes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from searchmerge.merging.counting import MOST_CUTS, Counters, Wanted, new_counters, numbers_of

AT_ONCE = MOST_CUTS // 2
"""Ranks that are narrowed down at once: each takes two cuts."""

_WIDE = 6.0
"""Standard deviations of a rank's place in a sample to either side: to miss one costs a pass."""

_FEWEST = 64
"""Keys of a sample that a rank needs to be narrowed down."""

_HALVED = MOST_CUTS // 3  # segments at once

_HEAVY = 1000
"""A key that a sample has in one of so many of its places or more is counted by itself."""

_LEAST = 1024  # keys there is room for

_LOWEST, _HIGHEST = -(1 << 31), 1 << 31

_Ints = npt.NDArray[np.int64]

CountAll = Callable[[Callable[[torch.device], Counters]], None]
"""Goes over all numbers once: adds those of each device to its counters, which it asks for."""


@dataclass(frozen=True)
class Room:
    """How many keys are collected.

    Attributes:
        most: Of one, at most.
        in_all: In all rows together, at most.
        least: A sample's, at least.
        share: One number of so many is a sample's, if that is within the others.
    """

    most: int = 1 << 24
    in_all: int = 1 << 26
    least: int = 1 << 16
    share: int = 256


@dataclass
class _Row:
    """What is known of one row.

    Attributes:
        edges: Keys in order, from below the lowest to above the highest.
        below: How many numbers are below each, exactly.
        unknown: Ranks that are asked for and not known yet, in order.
        sample: Keys in order, on a device: some of every segment that was collected last.
        known: Rank to key.
    """

    edges: _Ints
    below: _Ints
    unknown: list[int]
    sample: Tensor
    known: dict[int, int]


def select(
    count_all: CountAll, n_numbers: int, ranks: Sequence[Sequence[int]], room: Room | None = None
) -> list[dict[int, float]]:
    """Return, per row, the number at each rank, exactly as sorting all of them would give it.

    Args:
        count_all: Goes over the numbers, the same ones each time, all finite.
        n_numbers: Numbers of each row, 1 or more.
        ranks: Those asked for in each row, from 0, each below ``n_numbers``.
        room: For what is collected.
    """
    room = room or Room()
    values: list[dict[int, float]] = [{} for _ in ranks]
    for start in range(0, max(map(len, ranks)), AT_ONCE):
        some = [sorted(of_row)[start : start + AT_ONCE] for of_row in ranks]
        keys_of_rows = _Selection(count_all, n_numbers, some, room).run()
        for row, keys in zip(values, keys_of_rows, strict=True):
            numbers = numbers_of(torch.tensor(list(keys.values()), dtype=torch.int64))
            row.update(zip(keys, numbers.tolist(), strict=True))
    return values


class _OnDevices:
    """The counters of one pass, on every device that has numbers.

    Args:
        wanted: What they count, and collect, of each row.
        capacity: Keys that each has room for, by row.
    """

    def __init__(self, wanted: Sequence[Wanted], capacity: int) -> None:
        self._wanted, self._capacity = wanted, capacity
        self._counters: dict[torch.device, Counters] = {}

    def on(self, device: torch.device) -> Counters:
        """Return those of a device."""
        if device not in self._counters:
            self._counters[device] = new_counters(self._wanted, self._capacity, device)
        return self._counters[device]

    def all(self) -> list[Counters]:
        """Return those of all devices."""
        return list(self._counters.values())


class _Selection:
    """Narrows down some ranks of each row.

    Args:
        count_all: Goes over the numbers.
        n_numbers: Numbers of each row.
        ranks: Of each row, in order.
        room: For what is collected.
    """

    def __init__(
        self, count_all: CountAll, n_numbers: int, ranks: Sequence[list[int]], room: Room
    ) -> None:
        self._count_all = count_all
        none = torch.empty(0, dtype=torch.int32)
        ends = np.array([_LOWEST, _HIGHEST]), np.array([0, n_numbers])
        self._rows = [_Row(*ends, list(of_row), none, {}) for of_row in ranks]
        self._most = max(1, min(room.most, room.in_all // len(ranks)))
        self._sampled = min(max(room.least, n_numbers // room.share), int(0.7 * self._most))

    def run(self) -> list[dict[int, int]]:
        """Return the key of each rank, by row."""
        while any(row.unknown for row in self._rows):
            wanted, sizes = zip(*map(self._wanted, self._rows), strict=True)
            capacity = min(self._most, max(_LEAST, 2 * math.ceil(max(sizes))))
            counters = _OnDevices(wanted, capacity)
            self._count_all(counters.on)
            for i, row in enumerate(self._rows):
                _learn(row, wanted[i].cuts, i, counters.all())
                _settle(row)
        return [row.known for row in self._rows]

    def _wanted(self, row: _Row) -> tuple[Wanted, float]:
        """Return what is counted and collected next, and how many keys that will be, about."""
        if not row.unknown:
            return Wanted(np.empty(0, np.int64), np.zeros(1, np.bool_), 1), 0
        low, high = _narrowed(row, max(1, self._sampled // _FEWEST))
        ends = np.unique(np.concatenate([low, high, _heavy(row, low, high)]))
        cuts = ends[(ends > _LOWEST) & (ends < _HIGHEST)]
        edges = np.concatenate([[_LOWEST], cuts, [_HIGHEST]])
        covered = np.zeros(len(edges), np.int64)
        np.add.at(covered, np.searchsorted(edges, low), 1)
        np.add.at(covered, np.searchsorted(edges, high), -1)
        is_wide = np.diff(edges) > 1  # of a single key the count tells all
        collects = (covered.cumsum()[:-1] > 0) & is_wide
        expected = _expected(row, edges, collects)
        every = 1
        if expected > 0.8 * self._most:
            every = math.ceil(expected / self._sampled)
        return Wanted(cuts, collects, every), expected / every


def _narrowed(row: _Row, at_once: int) -> tuple[_Ints, _Ints]:
    """Return keys between which unknown ranks are likely to lie, the higher ones not in it.

    Where nothing is narrowed down the segments that ranks lie in are halved, so that each pass
    leaves less.

    Args:
        row: What is known.
        at_once: How many ranks are narrowed down, at most.
    """
    ranks = np.array(row.unknown[:at_once])
    segment = np.searchsorted(row.below, ranks, "right") - 1
    low, high = row.edges[segment], row.edges[segment + 1]
    first, last = _places(row.sample, low, high)
    n_drawn, n_there = last - first, row.below[segment + 1] - row.below[segment]
    share = (ranks - row.below[segment] + 0.5) / n_there
    spread = _WIDE * np.sqrt(n_drawn * share * (1 - share)) + 3
    before = np.floor(first + share * n_drawn - spread).astype(np.int64)
    after = np.ceil(first + share * n_drawn + spread).astype(np.int64)
    of_sample = _at(row.sample, np.stack([before, after]))
    below = np.where(before >= first, of_sample[0], low)
    above = np.where(after < last, of_sample[1] + 1, high)
    if ((below > low) | (above < high)).any() or len(row.edges) == 2:
        return below, above
    low, high = low[:_HALVED], high[:_HALVED]
    middle = (low + high) // 2
    return np.concatenate([low, middle]), np.concatenate([middle, high])


def _heavy(row: _Row, low: _Ints, high: _Ints) -> _Ints:
    """Return the ends of those keys, among the first and last of spans, that many numbers have."""
    n_drawn = len(row.sample)
    keys = np.unique(np.concatenate([low, high - 1]))
    first, last = _places(row.sample, keys, keys + 1)
    times = last - first
    order = np.argsort(-times, kind="stable")
    heaviest = keys[order][times[order] > max(2, n_drawn // _HEAVY)]
    room = MOST_CUTS - len(np.unique(np.concatenate([low, high])))
    chosen = heaviest[: max(0, room // 2)]
    return np.concatenate([chosen, chosen + 1])


def _expected(row: _Row, edges: _Ints, collects: npt.NDArray[np.bool_]) -> float:
    """Return how many numbers lie in the segments that are collected, as the sample has it."""
    start, stop = edges[:-1][collects], edges[1:][collects]
    whole = np.searchsorted(row.edges, start, "right") - 1
    n_there = row.below[whole + 1] - row.below[whole]
    ends = row.edges[whole], row.edges[whole + 1], start, stop
    first, last, first_within, last_within = _places(row.sample, *ends)
    n_drawn, n_within = last - first, last_within - first_within
    share = np.where(n_drawn > 0, n_within / np.maximum(n_drawn, 1), 1.0)
    return float((n_there * share).sum())


def _learn(row: _Row, cuts: _Ints, number: int, counters: Sequence[Counters]) -> None:
    """Take over what was counted and collected of a row."""
    if not row.unknown:
        return
    if len(cuts):
        counts = sum(on.counts[number].cpu().numpy() for on in counters)
        edges = np.concatenate([row.edges, cuts])
        below = np.concatenate([row.below, np.cumsum(counts)[: len(cuts)]])
        row.edges, places = np.unique(edges, return_index=True)
        row.below = below[places]
    there = [on.keys(number) for on in counters]
    row.sample = torch.cat([keys.to(there[0].device) for keys in there]).sort().values


def _settle(row: _Row) -> None:
    """Take note of the ranks that are known by now."""
    ranks = np.array(row.unknown, dtype=np.int64)
    segment = np.searchsorted(row.below, ranks, "right") - 1
    low, high = row.edges[segment], row.edges[segment + 1]
    first, last = _places(row.sample, low, high)
    n_there = row.below[segment + 1] - row.below[segment]
    is_whole = last - first == n_there
    is_single = high - low == 1
    of_sample = _at(row.sample, first + ranks - row.below[segment])
    keys = np.where(is_single, low, of_sample)
    is_known = is_single | is_whole
    row.known.update(zip(ranks[is_known].tolist(), keys[is_known].tolist(), strict=True))
    row.unknown = ranks[~is_known].tolist()


def _places(sample: Tensor, *keys: _Ints) -> list[_Ints]:
    """Return how many keys of a sample are below each of ``keys``; a GPU is asked once for all."""
    together = np.clip(np.concatenate(keys), _LOWEST, _HIGHEST - 1)
    wanted = torch.from_numpy(together).int().to(sample.device)
    places = torch.searchsorted(sample, wanted).cpu().numpy()
    return np.split(places, np.cumsum([len(some) for some in keys])[:-1])


def _at(sample: Tensor, places: _Ints) -> _Ints:
    """Return the keys at places of a sample; any where it has none."""
    if not len(sample):
        return np.zeros_like(places)
    within = torch.from_numpy(np.clip(places, 0, len(sample) - 1)).to(sample.device)
    return sample[within].long().cpu().numpy()
