"""Whether the parts of an adapter fit the tensors of the base that they change, and how."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from searchmerge.checkpoints.lora_config import SUPPORTED
from searchmerge.checkpoints.lora_update import Update
from searchmerge.checkpoints.tensor_files import TensorHeader
from searchmerge.errors import CheckpointError


def orient(
    file: Path,
    updates: Mapping[str, Update],
    headers: Mapping[str, TensorHeader],
    base: Mapping[str, TensorHeader],
    are_transposed: Callable[[str], bool],
) -> dict[str, Update]:
    """Settle which weights are stored transposed, and refuse those that do not fit.

    A shape that is not square answers for itself. A square one is as the other weights are;
    where there are none, the model is asked: PEFT may write one setting for layers of both kinds.

    Args:
        file: The adapter's, for messages.
        updates: By the base's name of each tensor that is changed.
        headers: Of the adapter's tensors.
        base: Of the base's tensors.
        are_transposed: Asks the model whether it stores a weight as ``(n_in, n_out)``.

    Raises:
        CheckpointError: For the first that does not fit.
    """
    shapes = {
        name: _shapes(file, name, update, headers, base)
        for name, update in updates.items()
        if update.factors
    }
    others = [
        found != made
        for name, (found, made) in shapes.items()
        if len(set(made)) > 1 and not _is_embedding(updates[name])
    ]
    oriented = dict(updates)
    for name, (found, made) in shapes.items():
        if _is_embedding(updates[name]):
            flip = True
        elif len(set(made)) > 1:
            flip = found != made
        else:
            flip = any(others) if others else are_transposed(name)
        if found != (made[::-1] if flip else made):
            raise CheckpointError(
                f"{file}: the update of {name!r} has shape {list(made)}; "
                f"the base's tensor has shape {list(found)}"
            )
        if flip and updates[name].start == "olora":
            raise CheckpointError(f"{file}: olora of {name!r}, which is stored transposed")
        oriented[name] = replace(updates[name], transposed=flip)
    return oriented


def check_parts(
    file: Path,
    name: str,
    update: Update,
    headers: Mapping[str, TensorHeader],
    base: Mapping[str, TensorHeader],
) -> None:
    """Refuse magnitudes, biases and rows that do not fit the base's tensor.

    Raises:
        CheckpointError: For the first that does not; it names the file and the tensor.
    """
    if not (update.magnitude or update.addend or update.rows):
        return
    found = (headers[update.replacement] if update.replacement else base[name]).shape
    if update.rows:
        outside = [token for token in update.tokens if not 0 <= token < found[0]]
        if outside:
            raise CheckpointError(
                f"{file}: trains token {outside[0]} of {name!r}, which has {found[0]} rows"
            )
    key = str(update.magnitude or update.addend or update.rows)
    n_out = found[-1] if update.transposed else found[0]
    needed = (len(update.tokens), *found[1:]) if update.rows else (n_out,)
    if headers[key].shape != needed:
        raise CheckpointError(
            f"{file}: {key!r} has shape {list(headers[key].shape)}; {list(needed)} is needed for "
            f"{name!r}"
        )


def _is_embedding(update: Update) -> bool:
    return update.factors is not None and ".lora_embedding_" in update.factors[0]


def _shapes(
    file: Path,
    name: str,
    update: Update,
    headers: Mapping[str, TensorHeader],
    base: Mapping[str, TensorHeader],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of the tensor that is changed, and of ``B @ A``."""
    found = (headers[update.replacement] if update.replacement else base[name]).shape
    first, second = (headers[key].shape for key in update.factors or ())
    if len(first) != 2 or len(second) != 2 or first[0] != second[1]:
        raise CheckpointError(
            f"{file}: lora_A and lora_B of {name!r} have shapes {list(first)} and "
            f"{list(second)}; {SUPPORTED}"
        )
    if first[0] != update.rank:
        raise CheckpointError(
            f"{file}: lora_A of {name!r} has {first[0]} rows; its rank is {update.rank} by "
            "adapter_config.json, with which it is scaled"
        )
    return found, (second[0], first[1])


def changed_header(
    name: str,
    update: Update,
    headers: Mapping[str, TensorHeader],
    base: Mapping[str, TensorHeader],
) -> TensorHeader:
    """Return the dtype and the shape of a tensor once it is changed."""
    start = headers[update.replacement] if update.replacement else base[name]
    if update.rows:
        return replace(start, dtype=torch.promote_types(start.dtype, headers[update.rows].dtype))
    return replace(start, dtype=torch.float32) if update.factors or update.addend else start
