"""Task vectors: what fine-tuning changed, held as the models themselves."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from searchmerge.errors import CheckpointError

_logger = logging.getLogger(__name__)

CHUNK = 1 << 18
"""Entries that are worked on at once: a float32 buffer of 1 MiB."""


@dataclass(frozen=True)
class TaskVectors:
    """Several experts of one base model (Ilharco et al., 2023, arXiv:2212.04089).

    Tensors are held as they were loaded; a task vector is formed in float32 where it is needed:
    ``expert.float() - base.float()``.

    Attributes:
        experts: Expert names; axis 0 of every stacked tensor follows this order.
        base: Every tensor of the base model by name, merged or not.
        weights: Parameter name to each expert's tensor, in the order of ``experts``; only the
            parameters that are merged, each tied one once.
        tied: Name of a parameter to the one that it is the same as.
        heads: Expert name to the tensors that only this expert has.
    """

    experts: tuple[str, ...]
    base: Mapping[str, Tensor]
    weights: Mapping[str, tuple[Tensor, ...]]
    tied: Mapping[str, str] = field(default_factory=dict)
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def from_weights(
        cls,
        base: Mapping[str, Tensor],
        experts: Mapping[str, Mapping[str, Tensor]],
        *,
        exclude: Sequence[str] = (),
        vocabulary: Literal["same", "base"] = "same",
        tied: Mapping[str, str] | None = None,
    ) -> "TaskVectors":
        """Pair each parameter of the base with the experts'.

        Args:
            base: The base model's tensors by name; those that are not floating point come out
                as they are.
            experts: Each expert's tensors by name.
            exclude: Regular expressions, searched in names; what matches stays the base's.
            vocabulary: ``base`` leaves out embeddings and heads with another number of rows;
                ``same`` makes them an error.
            tied: Names that are the same parameter as another one, beside those that share
                their storage in ``base``.

        Raises:
            CheckpointError: If an expert lacks a parameter, has it in another shape, or any
                tensor holds NaN or inf; it names the tensor and the models.
        """
        aliases = {**_shared_storage(base), **(tied or {})}
        merged = {}
        for name, weight in base.items():
            excluded = any(re.search(pattern, name) for pattern in exclude)
            if not weight.is_floating_point() or excluded:
                continue
            if name in aliases:
                _check_tied(name, aliases[name], experts)
                continue
            tensors = tuple(_pick(name, weight, e, w, vocabulary) for e, w in experts.items())
            kept = [tensor for tensor in tensors if tensor is not None]
            if len(kept) == len(tensors):
                merged[name] = tuple(kept)
        heads = {
            expert: {name: tensor for name, tensor in tensors.items() if name not in base}
            for expert, tensors in experts.items()
        }
        return cls(tuple(experts), base, merged, aliases, heads)

    @property
    def n_parameters(self) -> int:
        """Return d, the number of entries of one task vector; tied ones count once."""
        return sum(self.base[name].numel() for name in self.weights)

    def of(self, experts: Sequence[str]) -> "TaskVectors":
        """Return the task vectors of these experts only, in this order.

        Raises:
            CheckpointError: If one of them is not among those loaded.
        """
        if tuple(experts) == self.experts:
            return self
        if missing := [expert for expert in experts if expert not in self.experts]:
            raise CheckpointError(
                f"the plan merges expert {missing[0]!r}; loaded are: {', '.join(self.experts)}"
            )
        order = [self.experts.index(expert) for expert in experts]
        weights = {name: tuple(w[i] for i in order) for name, w in self.weights.items()}
        heads = {expert: self.heads.get(expert, {}) for expert in experts}
        return replace(self, experts=tuple(experts), weights=weights, heads=heads)

    def check_finite(self) -> None:
        """Read every tensor once, and refuse NaN and inf.

        Raises:
            CheckpointError: Naming the tensor and the model.
        """
        for name, tensors in self.weights.items():
            models = zip(("base", *self.experts), (self.base[name], *tensors), strict=True)
            for model, tensor in models:
                for chunk in tensor.detach().reshape(-1).split(4 * CHUNK):
                    # NaN and inf survive a sum of zeros times each entry; a sum is one pass
                    if not bool(torch.isfinite((chunk.float() * 0.0).sum())):
                        raise CheckpointError(f"tensor {name!r} of {model!r} holds NaN or inf")


def _shared_storage(base: Mapping[str, Tensor]) -> dict[str, str]:
    seen: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name, tensor in base.items():
        if not tensor.numel():
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if place in seen:
            aliases[name] = seen[place]
        else:
            seen[place] = name
    return aliases


def _check_tied(
    alias: str, canonical: str, experts: Mapping[str, Mapping[str, Tensor]]
) -> None:
    for expert, tensors in experts.items():
        if alias not in tensors or canonical not in tensors:
            continue
        one, other = tensors[alias], tensors[canonical]
        if one.data_ptr() != other.data_ptr() and not torch.equal(one, other):
            raise CheckpointError(
                f"tensors {alias!r} and {canonical!r} are tied in the base model but differ in "
                f"expert {expert!r}; exclude {alias!r}, or untie the base"
            )


def _pick(
    name: str,
    weight: Tensor,
    expert: str,
    tensors: Mapping[str, Tensor],
    vocabulary: Literal["same", "base"],
) -> Tensor | None:
    if name not in tensors:
        raise CheckpointError(
            f"expert {expert!r} lacks tensor {name!r}, which the base model has; "
            "exclude it to keep the base's"
        )
    found = tensors[name]
    if found.shape == weight.shape:
        return found
    if vocabulary == "base" and found.shape[1:] == weight.shape[1:] and weight.ndim:
        _logger.warning("tensor %r is not merged: %r has another vocabulary", name, expert)
        return None
    raise CheckpointError(
        f"tensor {name!r} has shape {tuple(found.shape)} in expert {expert!r} but "
        f"{tuple(weight.shape)} in the base model; exclude it, or, for embeddings, "
        "set vocabulary: base"
    )
