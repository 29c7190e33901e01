"""Paths, free space, and files that are either whole or absent."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from searchmerge.checkpoints.tensor_files import TensorHeader
from searchmerge.errors import CheckpointError

MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

COMPANIONS = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "*processor_config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
"""Shell patterns of the files that belong to a model, besides its weights."""


def default_cache_dir() -> Path:
    """Return ``$SEARCHMERGE_CACHE``, or ``~/.cache/searchmerge`` where that is not set."""
    named = os.environ.get("SEARCHMERGE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "searchmerge"


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        CheckpointError: If the file is missing or does not hold a JSON object; it names the file.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: holds a {type(data).__name__}; an object is needed")
    return data


def write_text(file: Path, text: str) -> None:
    """Write a file and wait until it is on the disk itself.

    Raises:
        OSError: If it cannot be written.
    """
    write_bytes(file, text.encode())


def write_bytes(file: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk itself.

    Raises:
        OSError: If it cannot be written.
    """
    with file.open("wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one, never a part.

    Raises:
        OSError: If it cannot be written.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        write_text(part, text)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def check_free_space(directory: Path, headers: Mapping[str, TensorHeader], target: Path) -> None:
    """Refuse to start writing tensors that cannot fit.

    Args:
        directory: An existing directory on the file system that will be written to.
        headers: What will be written.
        target: What to name in the error.

    Raises:
        CheckpointError: If there is less free space than that.
    """
    free = shutil.disk_usage(directory).free
    if free < (needed := _size(headers)):
        raise CheckpointError(
            f"{target}: not enough disk space: {in_words(needed)} needed, {in_words(free)} free"
        )


def describe_write_error(target: Path, headers: Mapping[str, TensorHeader], error: OSError) -> str:
    """Return a message for tensors that could not be written: path, reason and space."""
    existing = next(place for place in target.absolute().parents if place.exists())
    return (
        f"{target}: cannot be written: {error.strerror or error} "
        f"({in_words(_size(headers))} needed, {in_words(shutil.disk_usage(existing).free)} free)"
    )


def _size(headers: Mapping[str, TensorHeader]) -> int:
    return sum(header.size_bytes for header in headers.values())


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable, where the system can (not on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def in_words(size_bytes: float) -> str:
    """Return a size for people: ``"1.5 GB"``, in powers of 1000."""
    for unit in ("bytes", "kB", "MB"):
        if size_bytes < 999.95:
            return f"{size_bytes:.4g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.4g} GB"
