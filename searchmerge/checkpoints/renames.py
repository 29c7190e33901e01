"""What transformers calls the tensors of a checkpoint once they are in a model."""

from pathlib import Path

from torch import device


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
    from transformers.core_model_loading import revert_weight_conversion

    try:
        config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError):
        return {}
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if architecture is None:
        return {}
    with device("meta"):
        model = architecture(config)
    resident = model.state_dict()
    stored = revert_weight_conversion(model, dict(resident))
    names = {id(tensor): name for name, tensor in stored.items()}
    return {name: names[id(tensor)] for name, tensor in resident.items() if id(tensor) in names}
