"""The resident model: loaded once, and written through views that have the checkpoint's names."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from searchmerge.checkpoints.checkpoint import Checkpoint
from searchmerge.checkpoints.files import library_errors
from searchmerge.checkpoints.model_class import check_class
from searchmerge.checkpoints.renames import (
    aligned,
    by_checkpoint_names,
    loader_class,
    stored_names,
)
from searchmerge.errors import CheckpointError


def load_resident(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: str,
    n_devices: int = 1,
    auto_class: str = "AutoModelForCausalLM",
    loading: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return the model, ready to be evaluated and to be written over: no gradients, no dropout.

    Each tensor goes from its mapped file straight to where it is to lie: no second copy of the
    model is made in host memory. On a CPU, in the dtype of the files, a parameter is the mapped
    page itself until it is first written to.

    Args:
        checkpoint: What to load; an adapter is loaded merged with its base.
        dtype: Of the parameters, except where transformers keeps some in float32.
        device: A torch device, e.g. ``"cpu"`` or ``"cuda:0"``; of several devices, what they are.
        n_devices: Devices that the model is spread over, layer by layer, all that this process
            may use; parameters are written over where they lie.
        auto_class: The class of transformers to load it with. A task head that the checkpoint
            does not have is made, with random weights.
        loading: What else transformers is given: ``attn_implementation``, or what
            :func:`labelled` returns.

    Raises:
        CheckpointError: If there is no such class, or it cannot load this checkpoint, or a
            weight of the model itself, other than a head, is not in the checkpoint; or if the
            devices have no room for it.
    """
    check_class(checkpoint, auto_class)
    loader = loader_class(auto_class)
    options: dict[str, Any] = {
        "dtype": dtype,
        "local_files_only": True,
        "trust_remote_code": checkpoint.trust_remote_code,
        "device_map": "balanced" if n_devices > 1 else {"": _indexed(device)},
        **(loading or {}),
    }
    with quiet(), library_errors(f"{checkpoint.name}: cannot be loaded as {auto_class}"):
        try:
            model, loading = loader.from_pretrained(
                checkpoint.path, output_loading_info=True, **options
            )
        except torch.OutOfMemoryError as error:
            raise CheckpointError(
                f"{checkpoint.name}: there is no room for it on {device}: {error}"
            ) from error
    _check_loaded(checkpoint, model, loading["missing_keys"], auto_class)
    _change(model, checkpoint)
    check_spread(checkpoint.name, model, device)
    resident: nn.Module = model.eval().requires_grad_(requires_grad=False)
    if dtype == torch.float16:
        _check_range(checkpoint, resident)
    return resident


def _change(model: Any, checkpoint: Checkpoint) -> None:
    """Make of a base's model what the checkpoint is: more rows, tensors apart, an adapter's."""
    if checkpoint.extension is not None:
        n_rows = next(iter(checkpoint.extension.headers.values())).shape[0]
        model.resize_token_embeddings(n_rows, mean_resizing=False)
    twins = {**(checkpoint.base.twins if checkpoint.base else {}), **checkpoint.twins}
    _untie(model, checkpoint, twins)
    changed = {
        **(checkpoint.adapter.headers if checkpoint.adapter else {}),
        **(checkpoint.extension.headers if checkpoint.extension else {}),
    }
    if changed:
        _write_over(model, checkpoint, changed)


def labelled(labels: Sequence[str]) -> dict[str, Any]:
    """Return what a classifier is loaded with that has other classes than its configuration."""
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "ignore_mismatched_sizes": True,  # the base's own head may have other classes
    }


def check_spread(name: str, model: nn.Module, device: str) -> None:
    """Refuse a model of which a part was left on another kind of device than asked for.

    Raises:
        CheckpointError: If so.
    """
    kind = torch.device(device).type
    left = [key for key, own in model.state_dict().items() if own.device.type != kind]
    if left:
        raise CheckpointError(
            f"{name}: there is no room for it on the {kind} devices of a worker: {left[0]!r} and "
            f"{len(left) - 1} more tensors are left over; give each worker more of them"
        )


def _indexed(device: str) -> torch.device:
    """Return the device with its index: that of the GPU in use where none is given."""
    if device == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)


def writable_views(model: nn.Module) -> dict[str, Tensor]:
    """Return tensors under their checkpoint names that alias the parameters of a loaded model.

    In transformers 5 a resident model may have other names than its checkpoint, and hold several
    of its tensors as one (the experts of a mixture). What is written to a view is in the model
    at once. Tensors that are tied appear under one name, that which the checkpoint uses.

    Args:
        model: A model of transformers.

    Returns:
        Every parameter and persistent buffer, each element in exactly one view.

    Raises:
        CheckpointError: If this architecture stores a weight in a form that no view can have.
    """
    resident = _without_aliases(model)
    views = by_checkpoint_names(model, resident)
    _check_aliasing(model, resident, views)
    return views


def _without_aliases(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state, each tensor once, under the name that its checkpoint uses."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    state = model.state_dict()
    seen: dict[tuple[Any, ...], str] = {}
    for name in sorted(state, key=lambda name: name in tied):  # stable: canonical names first
        tensor = state[name]
        place = (
            (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
        )
        seen.setdefault((place,), name)
    kept = set(seen.values())
    return {name: tensor for name, tensor in state.items() if name in kept}


def _check_aliasing(
    model: nn.Module, resident: Mapping[str, Tensor], views: Mapping[str, Tensor]
) -> None:
    """Refuse views that do not reach every element of the model's storage exactly once."""
    unseen: dict[int, int] = {}
    for tensor in resident.values():
        place = tensor.untyped_storage().data_ptr()
        unseen[place] = unseen.get(place, 0) + tensor.numel()
    for name, view in views.items():
        place = view.untyped_storage().data_ptr()
        if place not in unseen:
            raise CheckpointError(
                f"{type(model).__name__} cannot be written in place: {name!r} of its checkpoint "
                "is stored in another order in the loaded model"
            )
        unseen[place] -= view.numel()
    if any(unseen.values()):
        raise CheckpointError(
            f"{type(model).__name__} cannot be written in place: the names of its checkpoint "
            "do not cover its parameters"
        )


def _untie(model: Any, checkpoint: Checkpoint, twins: Mapping[str, str]) -> None:
    """Give the model tensors of their own under names that the checkpoint holds apart."""
    if not twins:
        return
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    stored = stored_names(model)
    as_stored = aligned(list(stored.values()), checkpoint.headers)
    names = {as_stored[name]: resident for resident, name in stored.items()}
    for twin in twins:
        resident = names[twin]
        module, _, attribute = resident.rpartition(".")
        shared = model.get_parameter(resident)
        setattr(model.get_submodule(module), attribute, nn.Parameter(shared.detach().clone()))
        tied.pop(resident, None)
    if not getattr(model.config, "is_encoder_decoder", False):
        model.config.tie_word_embeddings = False


def _check_loaded(
    checkpoint: Checkpoint, model: nn.Module, missing: set[str], auto_class: str
) -> None:
    """Refuse a model that lacks a weight of its own; a head for a task may be an expert's."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    find = getattr(model, "get_output_embeddings", None)
    output = getattr(find(), "weight", None) if find is not None else None
    needed = {name for name, weight in model.named_parameters() if weight is output}
    inner = sorted(name for name in missing if name.startswith(prefix) or name in needed)
    if inner:
        raise CheckpointError(
            f"{checkpoint.name}: has no weights for {inner[0]!r} of {type(model).__name__} "
            f"({len(inner)} missing), so it cannot be loaded as {auto_class}"
        )


def _check_range(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuse weights that float16, which ends at 65504, does not hold."""
    for name, tensor in model.named_parameters():
        if tensor.numel() and not bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
            raise CheckpointError(
                f"{checkpoint.name}: {name!r} is not finite in {tensor.dtype}; "
                "use dtype: bfloat16 or float32"
            )


@torch.no_grad()
def _write_over(model: nn.Module, checkpoint: Checkpoint, names: Collection[str]) -> None:
    """Write tensors of a checkpoint into a model that was loaded without them."""
    views, weights = writable_views(model), checkpoint.weights()
    stored = aligned(views, checkpoint.headers)
    for name, view in views.items():
        if stored[name] in names:
            view.copy_(weights[stored[name]])


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from reporting on the terminal what it loads."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
