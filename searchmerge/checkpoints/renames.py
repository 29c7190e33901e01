"""What one tensor is called in different places: a checkpoint, another, a loaded model."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import device, nn

from searchmerge.checkpoints.files import library_errors
from searchmerge.errors import CheckpointError


def aligned(names: Collection[str], reference: Collection[str]) -> dict[str, str]:
    """Return each name as the reference has it: with a prefix more, or one less.

    An encoder saved alone has ``embeddings.weight`` where the same encoder under a classifier
    has ``bert.embeddings.weight``. One prefix is found for all names, that which makes most of
    them names of the reference; a name that it does not make one stays as it is.
    """
    known = set(reference)
    prefixes = {name.partition(".")[0] + "." for name in (*names, *reference)}
    candidates = [
        {name: name for name in names},
        *({name: name.removeprefix(prefix) for name in names} for prefix in sorted(prefixes)),
        *({name: prefix + name for name in names} for prefix in sorted(prefixes)),
    ]
    best = max(candidates, key=lambda renamed: len(known.intersection(renamed.values())))
    return {
        name: new if new in known and (new == name or new not in names) else name
        for name, new in best.items()
    }


def head_names(
    model_dir: Path, stored: Collection[str], auto_class: str
) -> tuple[dict[str, str], str]:
    """Return the tensors that a class of transformers needs beyond those that are stored.

    Args:
        model_dir: A directory that transformers can load.
        stored: The names of the tensors that the checkpoint has.
        auto_class: A class such as ``AutoModelForSequenceClassification``.

    Returns:
        Name in a checkpoint to name in the loaded model; and the class that it is loaded as.

    Raises:
        CheckpointError: If the class cannot make a model of this configuration.
    """
    import transformers

    loader: Any = getattr(transformers, auto_class, None)
    if not hasattr(loader, "from_config"):
        raise CheckpointError(f"transformers has no class {auto_class!r} to load a model with")
    with library_errors(f"{model_dir}: cannot be loaded as {auto_class}"):
        config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True)
        with device("meta"):
            model: nn.Module = loader.from_config(config)
    names = _stored_names(model)
    as_stored = aligned(list(names.values()), stored)
    missing = {
        as_stored[name]: resident
        for resident, name in names.items()
        if as_stored[name] not in stored
    }
    return missing, type(model).__name__


def _stored_names(model: nn.Module) -> Mapping[str, str]:
    """Return checkpoint names by resident names, of tensors that have one of their own."""
    from transformers.core_model_loading import revert_weight_conversion

    resident = model.state_dict()
    stored = revert_weight_conversion(model, dict(resident))
    names = {id(tensor): name for name, tensor in stored.items()}
    return {name: names[id(tensor)] for name, tensor in resident.items() if id(tensor) in names}


def resident_names(model_dir: Path) -> dict[str, str]:
    """Return checkpoint names by the names that the same tensors have in a loaded model.

    Adapters are saved under the names of modules, which in transformers 5 are not those of
    every checkpoint. Nothing is loaded: the model is made without data. Tensors that a model
    holds joined with others have no name of their own and are left out.

    Args:
        model_dir: A directory that transformers can load.

    Returns:
        Empty where transformers cannot tell: unknown architectures, code outside transformers.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError):
        return {}
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if architecture is None:
        return {}
    with device("meta"):
        model = architecture(config)
    return dict(_stored_names(model))
