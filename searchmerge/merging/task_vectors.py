"""Task vectors: what fine-tuning changed, held as the models themselves."""

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from searchmerge.errors import CheckpointError, SpecError

_logger = logging.getLogger(__name__)

Weights = Mapping[str, Tensor]

_CHECKED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class TaskVectors:
    """Several experts of one base model (Ilharco et al., 2023, arXiv:2212.04089).

    Tensors are held as they were loaded, in their dtype, on their device, mapped from a file or
    not. A task vector is formed in float32 where it is needed: ``expert.float() - base.float()``.

    Attributes:
        experts: Expert names, in the order of every tuple of tensors.
        base: Every tensor of the base model by name, merged or not.
        weights: Parameter name to each expert's tensor; only the parameters that are merged, a
            tied one once.
        tied: Name of a tensor to the one that it is another name of.
        heads: Expert name to the tensors that only experts have, such as a classifier.
    """

    experts: tuple[str, ...]
    base: Weights
    weights: Mapping[str, tuple[Tensor, ...]]
    tied: Mapping[str, str] = field(default_factory=dict)
    heads: Mapping[str, Weights] = field(default_factory=dict)

    @classmethod
    def from_weights(
        cls,
        base: Weights,
        experts: Mapping[str, Weights],
        *,
        exclude: Sequence[str] = (),
        vocabulary: Literal["same", "base"] = "same",
        tied: Mapping[str, str] | None = None,
    ) -> "TaskVectors":
        """Pair each parameter of the base with the experts', and check that they can be merged.

        Every floating-point tensor is read once, to refuse NaN and inf.

        Args:
            base: The base model's tensors by name. Those that are not floating point stay as
                they are.
            experts: Each expert's tensors by name.
            exclude: Regular expressions searched in names; what matches stays the base's.
            vocabulary: Whether tensors that differ in their number of rows alone, as embeddings
                do where tokens were added, are an error (``same``), or merged in the rows that
                base and expert share (``base``); a row that an expert lacks has no task vector.
            tied: Further names that stand for the same parameter, alias to name used; ``None``
                for those that share all their storage. A name under which an expert has
                something else is a parameter in its own right, which the other models have
                from the name used.

        Raises:
            CheckpointError: If an expert lacks a parameter, or has it in another shape; or if a
                tensor holds NaN or inf.
            SpecError: If a pattern of ``exclude`` is no regular expression or matches nothing.
        """
        if not experts:
            raise CheckpointError("there is no expert to merge; give one or more")
        further = _resolve(_sharing_storage(base) if tied is None else tied, base)
        apart = {name for tensors in experts.values() for name in _held_apart(tensors, further)}
        aliases = {name: used for name, used in further.items() if name not in apart}
        base = {**base, **{name: base[further[name]] for name in sorted(apart - base.keys())}}
        excluded = _excluded(
            exclude, [n for tensors in (base, *experts.values()) for n in tensors]
        )
        weights = {
            name: tuple(
                _matching(
                    _find(name, further, expert, tensors), weight, (name, expert, vocabulary)
                )
                for expert, tensors in experts.items()
            )
            for name, weight in base.items()
            if weight.is_floating_point() and name not in excluded and name not in aliases
        }
        shared = {*base, *aliases, *excluded}
        heads = {
            expert: {name: tensors[name] for name in tensors if name not in shared}
            for expert, tensors in experts.items()
        }
        vectors = cls(tuple(experts), base, weights, aliases, heads)
        vectors.check_finite()
        return vectors

    @property
    def n_parameters(self) -> int:
        """Return d, the number of entries of one task vector; tied ones count once."""
        return sum(self.base[name].numel() for name in self.weights)

    def are_flat_on(self, device: Callable[[str], torch.device]) -> bool:
        """Return whether all that is merged lies on its device, entry after entry.

        Args:
            device: Parameter name to the device asked for.
        """
        return all(
            tensor.device == device(name) and tensor.is_contiguous()
            for name, experts in self.weights.items()
            for tensor in (self.base[name], *experts)
        )

    def of(self, experts: Sequence[str]) -> "TaskVectors":
        """Return the task vectors of these experts only, in this order.

        Raises:
            SpecError: If one of them is not among those loaded.
        """
        if tuple(experts) == self.experts:
            return self
        if missing := [expert for expert in experts if expert not in self.experts]:
            raise SpecError(
                f"plan: expert {missing[0]!r} is not loaded (there are: {', '.join(self.experts)})"
            )
        order = [self.experts.index(expert) for expert in experts]
        weights = {name: tuple(w[i] for i in order) for name, w in self.weights.items()}
        heads = {expert: self.heads.get(expert, {}) for expert in experts}
        return replace(self, experts=tuple(experts), weights=weights, heads=heads)

    def is_zero(self, expert: str) -> bool:
        """Return whether an expert equals the base in every parameter that is merged."""
        i = self.experts.index(expert)
        return all(
            torch.equal(part.float(), origin.float())
            for name, experts in self.weights.items()
            for part, origin in zip(_parts(experts[i]), _parts(self.base[name]), strict=True)
        )

    def check_finite(self) -> None:
        """Read every tensor once, and refuse NaN and inf.

        Raises:
            CheckpointError: If one holds any; it names the tensor and the model.
        """
        for name, experts in self.weights.items():
            models = zip(("the base", *self.experts), (self.base[name], *experts), strict=True)
            for model, tensor in models:
                if not _is_finite(tensor):
                    whose = model if model == "the base" else f"expert {model!r}"
                    raise CheckpointError(
                        f"tensor {name!r} of {whose} holds NaN or inf; all must be finite"
                    )


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    return iter(torch.split(tensor.detach().reshape(-1), _CHECKED_AT_ONCE))


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    for part in _parts(tensor):
        wide = part if part.dtype.itemsize > 1 else part.float()  # 8 bits: no min and max
        ends = torch.stack(torch.aminmax(wide))
        if not bool(torch.isfinite(ends).all()):
            return False
    return True


def _sharing_storage(base: Weights) -> dict[str, str]:
    seen: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name, tensor in base.items():
        if not tensor.numel() or tensor.device.type == "meta":
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if place in seen:
            aliases[name] = seen[place]
        else:
            seen[place] = name
    return aliases


def _resolve(tied: Mapping[str, str], base: Weights) -> dict[str, str]:
    """Return every alias with the name in ``base`` that its parameter is merged under."""
    groups: dict[str, list[str]] = {}
    for alias in tied:
        name, steps = alias, 0
        while name in tied and steps <= len(tied):
            name, steps = tied[name], steps + 1
        groups.setdefault(name, [name]).append(alias)
    aliases = {}
    for members in groups.values():
        used = next((name for name in members if name in base), None)
        if used is not None:
            aliases.update({name: used for name in members if name != used})
    return aliases


def _held_apart(tensors: Weights, aliases: Mapping[str, str]) -> list[str]:
    """Return the further names under which an expert has something else."""
    return [
        name
        for name, used in aliases.items()
        if name in tensors and used in tensors and not _is_same(tensors[name], tensors[used])
    ]


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    if tensor.shape != other.shape:
        return False
    return tensor.data_ptr() == other.data_ptr() or torch.equal(tensor, other)


def _excluded(patterns: Sequence[str], names: Collection[str]) -> set[str]:
    excluded: set[str] = set()
    for pattern in patterns:
        try:
            matches = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise SpecError(f"exclude: {pattern!r} is no regular expression: {error}") from error
        if not matches:
            raise SpecError(f"exclude: {pattern!r} matches no tensor")
        excluded |= matches
    return excluded


def _find(name: str, aliases: Mapping[str, str], expert: str, tensors: Weights) -> Tensor:
    """Return an expert's tensor, which may have it under another of its names."""
    used = aliases.get(name, name)
    names: Iterable[str] = (name, used, *(n for n, other in aliases.items() if other == used))
    for candidate in names:
        if candidate in tensors:
            return tensors[candidate]
    raise CheckpointError(
        f"expert {expert!r} has no tensor {name!r}, which the base has; "
        "to keep the base's, exclude it"
    )


def _matching(tensor: Tensor, weight: Tensor, where: tuple[str, str, str]) -> Tensor:
    """Return an expert's tensor in the shape of the base's, as far as that is allowed."""
    name, expert, vocabulary = where
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"tensor {name!r} is {tensor.dtype} in expert {expert!r} but {weight.dtype} in the "
            "base; both must be floating point"
        )
    if tensor.shape == weight.shape:
        return tensor
    rows_differ = tensor.ndim == weight.ndim > 0 and tensor.shape[1:] == weight.shape[1:]
    if vocabulary == "base" and rows_differ:
        n_shared = min(len(tensor), len(weight))
        _logger.warning(
            "tensor %r: merged in %d of %d rows, as expert %r has %d",
            *(name, n_shared, len(weight), expert, len(tensor)),
        )
        if n_shared == len(weight):
            return tensor[:n_shared]
        wide = torch.promote_types(tensor.dtype, weight.dtype)  # the base's rows stay exact
        rest = weight.detach()[n_shared:].to(tensor.device, wide)
        return torch.cat([tensor[:n_shared].to(wide), rest])
    raise CheckpointError(
        f"tensor {name!r} has shape {tuple(tensor.shape)} in expert {expert!r} but "
        f"{tuple(weight.shape)} in the base; to keep the base's, exclude it"
        + (", or set vocabulary: base" if rows_differ else "")
    )
