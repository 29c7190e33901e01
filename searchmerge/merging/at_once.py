"""Passes over all parameters at once, where these lie with their experts where they are merged.

Nothing but numbers changes from one candidate to the next: every address stays. What is known of
the addresses is prepared once, so that a candidate costs one call, or one launch, for all. It is
prepared anew where one has changed nonetheless, as when a model is shared with other processes.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from searchmerge.merging.engine import Engine
from searchmerge.merging.method import Pass
from searchmerge.merging.native.native_pass import NativePass
from searchmerge.merging.operands import Parameter
from searchmerge.merging.replay import RecordedPass, record_graph

_MOST_KEPT = 8  # functions whose calls are kept: those used last

Inputs = Sequence[tuple[str, tuple[Tensor, ...]]]
"""Each parameter's name, base and experts, 1-D, where it is merged."""


class _Prepared(NamedTuple):
    """The passes over the parameters of each device.

    Attributes:
        passes: One a device.
        kept: The kept tensors that they read.
        there: Tensors in host memory that they read and write.
        places: Where these lay.
    """

    passes: Sequence[NativePass | RecordedPass]
    kept: Mapping[str, tuple[Tensor, ...]]
    there: Sequence[Tensor]
    places: Sequence[int]

    def serves(self, work: Pass) -> bool:
        """Return whether a pass of the same function reads what these were made for."""
        is_kept = work.kept is self.kept or not (work.kept or self.kept)
        return is_kept and self.places == _places(self.there)


class AtOnce:
    """Merges all parameters into their targets by what was prepared for their function.

    Args:
        engine: Runs arithmetic.
        targets: Parameter name to where it is written first.
    """

    def __init__(self, engine: Engine, targets: Mapping[str, Tensor]) -> None:
        self._engine, self._targets = engine, targets
        self._prepared: dict[object, _Prepared] = {}

    def run(
        self, experts: tuple[str, ...], work: Pass, inputs: Inputs, scales: Mapping[str, float]
    ) -> list[Tensor | None] | None:
        """Write all parameters; return the tallies, ``None`` where it cannot be done.

        Args:
            experts: Whose measurements a pass is of.
            work: A pass.
            inputs: All parameters, the same tensors each time.
            scales: Parameter name to the factor on the merged task vector.
        """
        key = (experts, work.experts, work.function, *_sizes(work, inputs))
        prepared = self._prepared.pop(key, None)
        if prepared is None or not prepared.serves(work):
            if (prepared := self._prepare(work, inputs)) is None:
                return None
            while len(self._prepared) >= _MOST_KEPT:
                del self._prepared[next(iter(self._prepared))]
        self._prepared[key] = prepared  # behind all others
        runs = [each.run(work, scales) for each in prepared.passes]
        return [tally for _, tally in runs] if all(done for done, _ in runs) else None

    def forget(self, kept: Mapping[str, tuple[Tensor, ...]]) -> None:
        """Let go of what was prepared to read tensors that are not kept any more."""
        for key, prepared in list(self._prepared.items()):
            if prepared.kept is kept:
                del self._prepared[key]

    def _prepare(self, work: Pass, inputs: Inputs) -> _Prepared | None:
        if work.kept and not isinstance(work.kept, dict):
            return None  # it is computed when it is asked for
        on_device: dict[torch.device, list[Parameter]] = {}
        for name, tensors in inputs:
            kept, target = work.kept.get(name, ()), self._targets[name]
            if not target.is_contiguous() or any(t.device != target.device for t in kept):
                return None
            parameter = Parameter(name, tensors, kept, target.view(-1))
            on_device.setdefault(target.device, []).append(parameter)
        passes = []
        for device, some in on_device.items():
            if (prepared := self._pass_on(device, work, some)) is None:
                return None
            passes.append(prepared)
        on_host = on_device.get(torch.device("cpu"), [])
        there = [t for _, tensors, kept, target in on_host for t in (*tensors, *kept, target)]
        return _Prepared(passes, work.kept, there, _places(there))

    def _pass_on(
        self, device: torch.device, work: Pass, parameters: Sequence[Parameter]
    ) -> NativePass | RecordedPass | None:
        if self._engine.way(device, work.function) == "native":
            return NativePass.of(work, parameters)
        if device.type == "cuda" and self._engine.is_compiled(device):
            record = partial(record_graph, device=device)
            return RecordedPass(self._engine, work, parameters, record)
        return None


def _places(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _sizes(work: Pass, inputs: Inputs) -> tuple[object, ...]:
    """Return how many numbers a pass has of a parameter; of all it has as many."""
    for name, _ in inputs:
        return work.scalars(name).shape, None if work.keys is None else len(work.keys(name))
    return ()
