"""The files that belong to a model besides its own weights: configuration, tokenizer, modules."""

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from searchmerge.checkpoints.files import COMPANIONS, MODEL_FILE
from searchmerge.errors import CheckpointError

MODULES_FILE = "modules.json"
"""Where sentence-transformers lists what stands on an encoder, each part in its own folder."""

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_OTHER_FRAMEWORKS = (".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite", ".xml", ".pb")
_OF_TRAINING = ("optimizer*", "scheduler*", "rng_state*", "training_args*", "trainer_state*")


def companions(directory: Path) -> list[Path]:
    """Return what is to be saved beside a merged model, as paths within its base's folder.

    Of the folder itself these are the files of ``COMPANIONS``, without weights. The folders
    that ``modules.json`` names are whole, with the weights of their layers, but for what belongs
    to a training or to another framework.

    Raises:
        CheckpointError: If ``modules.json`` cannot be read, or names a folder elsewhere.
    """
    found = {
        file
        for pattern in COMPANIONS
        for file in directory.glob(pattern)
        if file.is_file() and file.suffix not in _WEIGHT_SUFFIXES
    }
    for folder in module_folders(directory):
        found.update(_files_of_module(directory / folder))
    return sorted(file.relative_to(directory) for file in found)


def module_folders(directory: Path) -> list[str]:
    """Return the folders of what stands on an encoder, as ``modules.json`` names them.

    Raises:
        CheckpointError: If that file cannot be read, or names a folder elsewhere.
    """
    file = directory / MODULES_FILE
    if not file.exists():
        return []
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
        paths = [str(module["path"]) for module in modules]
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: is no list of modules, each with its path: {error!r}"
        ) from error
    for path in paths:
        if PurePosixPath(path).is_absolute() or ".." in Path(path).parts or "\\" in path:
            raise CheckpointError(f"{file}: module path {path!r} is not within the model's folder")
    return [path for path in paths if Path(path) != Path()]


def _files_of_module(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        twice = file.name == "pytorch_model.bin" and file.with_name(MODEL_FILE).exists()
        foreign = file.suffix in _OTHER_FRAMEWORKS or any(map(file.match, _OF_TRAINING))
        if file.is_file() and not (hidden or twice or foreign):
            yield file
