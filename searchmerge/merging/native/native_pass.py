"""Passes over parameters that lie in host memory with their experts: one call for all of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from searchmerge.merging.method import Pass
from searchmerge.merging.native.native import Merges, layout_of
from searchmerge.merging.operands import Parameter

_ENTRIES = 1 << 26
"""What one call goes over, or a single parameter: nothing interrupts it, and what is mapped from
files may first have to be read."""


class _Alike(NamedTuple):
    """Parameters of one layout, by name, and what merges them."""

    names: tuple[str, ...]
    merges: Merges


class NativePass:
    """One function over all parameters, as C++.

    Args:
        groups: The parameters, by layout.
    """

    def __init__(self, groups: Sequence[_Alike]) -> None:
        self._groups = groups

    @classmethod
    def of(cls, work: Pass, parameters: Sequence[Parameter]) -> "NativePass | None":
        """Return the pass over some parameters; ``None`` if it cannot be done.

        Args:
            work: A pass; others that are run have the same function, experts and kept tensors.
            parameters: What it reads and writes, on the CPU.
        """
        groups = []
        for alike in _alike(work, parameters):
            operands = [parameter.operands(work) for parameter in alike]
            outs = [parameter.target for parameter in alike]
            if (merges := Merges.of(work.function, operands, outs)) is None:
                return None
            groups.append(_Alike(tuple(parameter.name for parameter in alike), merges))
        return cls(groups)

    def run(self, work: Pass, scales: Mapping[str, float]) -> tuple[bool, Tensor | None]:
        """Merge under the numbers of a pass; return that it is done, and the tally, float64.

        Args:
            work: A pass like the one given first.
            scales: Parameter name to the factor on the merged task vector.
        """
        tallies = []
        for names, merges in self._groups:
            scalars = torch.stack([work.scalars(name) for name in names])
            keys = torch.stack([work.keys(name) for name in names]) if work.keys else None
            tally = merges.run(scalars, keys, [scales[name] for name in names])
            tallies += [] if tally is None else [tally]
        return True, torch.stack(tallies).sum(0) if tallies else None


def _alike(work: Pass, parameters: Sequence[Parameter]) -> Iterator[list[Parameter]]:
    """Yield parameters that lie alike, as many as one call goes over."""
    by_layout: dict[object, list[Parameter]] = {}
    for parameter in parameters:
        kind = layout_of(parameter.operands(work)), parameter.target.dtype
        by_layout.setdefault(kind, []).append(parameter)
    for alike in by_layout.values():
        some, n_entries = list[Parameter](), 0
        for parameter in alike:
            n_entries += len(parameter.target)
            if some and n_entries > _ENTRIES:
                yield some
                some, n_entries = [], len(parameter.target)
            some.append(parameter)
        yield some
