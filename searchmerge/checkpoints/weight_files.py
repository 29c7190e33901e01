"""Which files of a model's directory hold its weights: those that transformers loads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from searchmerge.checkpoints.files import FILES, INDEX_FILE, MODEL_FILE, read_json
from searchmerge.checkpoints.tensor_files import TensorHeader, read_headers
from searchmerge.errors import CheckpointError

_CHOICES = (MODEL_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers looks for them."""
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")


def read_model(
    directory: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Path], dict[str, TensorHeader]]:
    """Return the file and the header of every tensor of a model; no data is read.

    Args:
        directory: A model's directory.
        config: What its ``config.json`` says, which may name the file of the weights.

    Raises:
        CheckpointError: If transformers would find no weights, or a file is missing, damaged, or
            holds anything but tensors.
    """
    chosen = _choose(directory, config)
    index = _weight_map(chosen) if chosen is not None and chosen.suffix == ".json" else {}
    shards = [directory / name for name in sorted(set(index.values()))]
    if chosen is not None and not index:
        shards = [chosen]
    files: dict[str, Path] = {}
    headers: dict[str, TensorHeader] = {}
    for shard in shards or _shards_without_index(directory):
        for name, header in read_headers(shard).items():
            if name in files:
                raise CheckpointError(f"{shard}: {name!r} is also in {files[name].name}")
            files[name], headers[name] = shard, header
    for name, shard_name in index.items():
        if name not in files:
            raise CheckpointError(
                f"{directory / shard_name}: {name!r} is missing, which "
                f"{chosen.name if chosen else INDEX_FILE} says it holds"
            )
    return files, headers


def _choose(directory: Path, config: Mapping[str, Any]) -> Path | None:
    named = config.get("transformers_weights")
    choices = [str(named)] if named else list(_CHOICES)
    found = next((name for name in choices if (directory / name).is_file()), None)
    if named and found is None:
        raise CheckpointError(
            f"{directory}: has no {named}, which config.json names as its weights"
        )
    return None if found is None else directory / found


def _weight_map(index: Path) -> dict[str, str]:
    names: dict[str, str] | None = read_json(index, {"weight_map": FILES}).get("weight_map")
    if not names:
        raise CheckpointError(f"{index}: weight_map is missing")
    return names


def _shards_without_index(directory: Path) -> list[Path]:
    shards = [file for file in sorted(directory.glob("*.safetensors")) if _SHARD.search(file.name)]
    counts = {match[2] for file in shards if (match := _SHARD.search(file.name))}
    if len(counts) == 1 and len(shards) == int(counts.pop()):
        return shards
    others = sorted(
        file.name
        for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
        for file in directory.glob(pattern)
    )
    there = f" (there is {', '.join(others)})" if others else ""
    raise CheckpointError(
        f"{directory}: has no weights under a name that transformers loads: "
        f"{' or '.join(_CHOICES)}{there}"
    )
