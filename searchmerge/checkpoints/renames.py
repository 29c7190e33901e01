"""What one tensor is called in different places: a checkpoint, another, a loaded model."""

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, device, nn
from torch.overrides import TorchFunctionMode

from searchmerge.checkpoints.files import CONFIG_FILE, library_errors
from searchmerge.checkpoints.model_config import load_config
from searchmerge.errors import CheckpointError


def aligned(names: Collection[str], reference: Collection[str]) -> dict[str, str]:
    """Return each name as the reference has it: with a prefix more, or one less.

    An encoder saved alone has ``embeddings.weight`` where the same encoder under a classifier
    has ``bert.embeddings.weight``. One prefix is found for all names, that which makes most of
    them names of the reference; a name that it does not make one stays as it is. What older
    versions of transformers called otherwise is known under both of its names.
    """
    if set(reference).issuperset(names):
        return {name: name for name in names}
    modern = _modern({*names, *reference})
    known = {modern[name]: name for name in reference}
    given = {modern[name]: name for name in names}
    prefixes = {name.partition(".")[0] + "." for name in (*given, *known)}
    candidates = [
        {name: name for name in given},
        *({name: name.removeprefix(prefix) for name in given} for prefix in sorted(prefixes)),
        *({name: prefix + name for name in given} for prefix in sorted(prefixes)),
    ]
    best = max(candidates, key=lambda renamed: len(known.keys() & renamed.values()))
    found = {
        given[name]: known[new]
        for name, new in best.items()
        if new in known and (new == name or new not in given)
    }
    return {name: found.get(name, name) for name in names}


def _modern(names: Collection[str]) -> dict[str, str]:
    """Return each name as transformers has it today, e.g. a norm's ``gamma`` as ``weight``."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import apply_renamings

    legacy = get_checkpoint_conversion_mapping("legacy")
    return {name: apply_renamings(name, legacy) for name in names}


def head_names(
    model_dir: Path,
    stored: Collection[str],
    auto_class: str,
    *,
    trust_remote_code: bool = False,
) -> tuple[dict[str, str], str]:
    """Return the tensors that a class of transformers needs beyond those that are stored.

    Args:
        model_dir: A directory that transformers can load.
        stored: The names of the tensors that the checkpoint has.
        auto_class: A class such as ``AutoModelForSequenceClassification``.
        trust_remote_code: Whether Python files of the model may run.

    Returns:
        Name in a checkpoint to name in the loaded model; and the class that it is loaded as.

    Raises:
        CheckpointError: If the class cannot make a model of this configuration.
    """
    model = empty_model(model_dir, auto_class, trust_remote_code=trust_remote_code)
    names = stored_names(model)
    as_stored = aligned(list(names.values()), stored)
    missing = {
        as_stored[name]: resident
        for resident, name in names.items()
        if as_stored[name] not in stored
    }
    return missing, type(model).__name__


def stored_names(model: nn.Module) -> Mapping[str, str]:
    """Return checkpoint names by resident names, of tensors that have one of their own."""
    from transformers.core_model_loading import revert_weight_conversion

    resident = model.state_dict()
    stored = revert_weight_conversion(model, dict(resident))
    names = {id(tensor): name for name, tensor in stored.items()}
    return {name: names[id(tensor)] for name, tensor in resident.items() if id(tensor) in names}


def by_checkpoint_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a loaded model under their names in a checkpoint, as views if that can be.

    Args:
        model: The model, which may be without data.
        tensors: By their names in it, all or some.

    Raises:
        CheckpointError: If transformers cannot name them.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with _NoCopies():
            views: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    except (ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{type(model).__name__} cannot be written in place: its parameters cannot be named "
            f"as in its checkpoint: {error}"
        ) from error
    return views


class _NoCopies(TorchFunctionMode):
    """Makes ``tensor.contiguous()`` return the tensor itself.

    Splitting a parameter gives views of it; transformers then makes each contiguous, for files.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.contiguous:
            return args[0]
        return func(*args, **(kwargs or {}))


def resident_names(model_dir: Path, *, trust_remote_code: bool = False) -> dict[str, str]:
    """Return checkpoint names by the names that the same tensors have in a loaded model.

    Adapters are saved under the names of modules, which in transformers 5 are not those of
    every checkpoint. Nothing is loaded: the model is made without data. Tensors that a model
    holds joined with others have no name of their own and are left out.

    Args:
        model_dir: A directory that transformers can load.
        trust_remote_code: Whether Python files of the model may run.

    Returns:
        Empty where transformers cannot tell: unknown architectures, code outside transformers.
    """
    model = without_data(model_dir, trust_remote_code=trust_remote_code)
    return {} if model is None else dict(stored_names(model))


def tied_names(
    model_dir: Path,
    stored: Collection[str],
    auto_class: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> dict[str, str]:
    """Return the tensors that a model has under further names, each with the one that is used.

    Args:
        model_dir: A directory that transformers can load.
        stored: The names of the tensors that the checkpoint has.
        auto_class: The class that the model is loaded as; ``None`` is that which its
            configuration names.
        trust_remote_code: Whether Python files of the model may run.

    Returns:
        Names as in the checkpoint. Of those that are one, that is used which is stored.
    """
    model = without_data(model_dir, auto_class, trust_remote_code=trust_remote_code)
    resident: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    if model is None or not resident:
        return {}
    names = stored_names(model)
    as_stored = aligned(list(names.values()), stored)
    groups: dict[str, list[str]] = {}
    for alias, used in resident.items():
        if alias in names and used in names:
            group = groups.setdefault(used, [as_stored[names[used]]])
            group.append(as_stored[names[alias]])
    found: dict[str, str] = {}
    for group in groups.values():
        used = next((name for name in group if name in stored), group[0])
        found.update((name, used) for name in group if name != used)
    return found


def transposed_weights(model_dir: Path, *, trust_remote_code: bool = False) -> set[str] | None:
    """Return the weights that a model stores as ``(n_in, n_out)``, by their resident names.

    Args:
        model_dir: A directory that transformers can load.
        trust_remote_code: Whether Python files of the model may run.

    Returns:
        ``None`` where transformers cannot tell: unknown architectures, code outside transformers.
    """
    from transformers.pytorch_utils import Conv1D

    model = without_data(model_dir, trust_remote_code=trust_remote_code)
    if model is None:
        return None
    modules: Mapping[str, nn.Module] = dict(model.named_modules())
    return {f"{name}.weight" for name, module in modules.items() if isinstance(module, Conv1D)}


def without_data(
    model_dir: Path,
    auto_class: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> Any:
    """Return a model on the device ``meta``; ``None`` where transformers cannot make it.

    Args:
        model_dir: A directory that transformers can load.
        auto_class: The class of transformers; ``None`` is that which the configuration names.
        trust_remote_code: Whether Python files of the model may run.
    """
    try:
        return empty_model(model_dir, auto_class, trust_remote_code=trust_remote_code)
    except CheckpointError:
        return None


def empty_model(
    model_dir: Path, auto_class: str | None = None, *, trust_remote_code: bool = False
) -> Any:
    """Return a model on the device ``meta``: its modules and their names, without data.

    Args:
        model_dir: A directory that transformers can load.
        auto_class: The class of transformers; ``None`` is that which the configuration names.
        trust_remote_code: Whether Python files of the model may run.

    Raises:
        CheckpointError: If transformers cannot make it.
    """
    stamp = (model_dir / CONFIG_FILE).stat().st_mtime_ns if model_dir.is_dir() else 0
    return _empty_model(model_dir, auto_class, trust_remote_code, stamp)


@lru_cache(maxsize=8)
def _empty_model(
    model_dir: Path,
    auto_class: str | None,
    trust_remote_code: bool,  # noqa: FBT001
    stamp: int,  # the same folder may come to hold another model
) -> Any:
    config = load_config(model_dir, trust_remote_code=trust_remote_code)
    name = auto_class or _own_class(config, trust_remote_code=trust_remote_code)
    loader = loader_class(name)
    with library_errors(f"{model_dir}: cannot be loaded as {name}"), device("meta"):
        if hasattr(loader, "from_config"):
            return loader.from_config(config, trust_remote_code=trust_remote_code)
        return loader(config)


def loader_class(name: str) -> Any:
    """Return a class of transformers that a model can be loaded as.

    Raises:
        CheckpointError: If there is none of this name.
    """
    import transformers

    loader = getattr(transformers, name, None)
    if not hasattr(loader, "from_pretrained"):
        raise CheckpointError(f"transformers has no class {name!r} to load a model with")
    return loader


def _own_class(config: Any, *, trust_remote_code: bool) -> str:
    """Return the class that a configuration names; of code beside it, that which stands for it."""
    name = (config.architectures or [""])[0]
    places: Mapping[str, str] = getattr(config, "auto_map", None) or {}
    for auto_class, place in places.items():
        if trust_remote_code and str(place).endswith(f".{name}"):
            return auto_class
    return str(name)
