"""Saving a merged model: one tensor in memory, and a directory that is whole or not there."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from searchmerge.checkpoints.checkpoint import Checkpoint, tied
from searchmerge.checkpoints.companions import companions
from searchmerge.checkpoints.files import (
    CONFIG_FILE,
    INDEX_FILE,
    MODEL_FILE,
    check_free_space,
    describe_write_error,
    read_json,
)
from searchmerge.checkpoints.tensor_files import TensorFileWriter, TensorHeader
from searchmerge.checkpoints.tokenizer_files import is_of_tokenizer
from searchmerge.durable import sync_directory, write_bytes, write_text
from searchmerge.errors import CheckpointError

PLAN_FILE = "merge_plan.yaml"
"""The file by which a model that was saved here is known; nothing else is ever replaced."""


def save_model(
    weights: Iterable[tuple[str, Tensor]],
    out: Path,
    *,
    like: Checkpoint,
    dtype: torch.dtype | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model that transformers can load, and put it at ``out`` in one step.

    What is not in ``weights`` is taken from ``like``: tensors that are not floating, buffers,
    whatever was not merged. An embedding that ``like`` stores under two names is written under
    both. Configuration, tokenizer, chat template, code and the modules of a sentence encoder are
    copied.

    Args:
        weights: Names in the checkpoint and tensors, in any order, one at a time; any device.
        out: The directory to make. A model that was saved here before is replaced: until the
            new one is whole the old one stays.
        like: The base: what the model has besides its weights.
        dtype: Of the floating tensors; ``None`` is each as in ``like``.
        extra_files: Text or bytes by file name, which may be in a folder, written beside the
            model; ``merge_plan.yaml`` makes it known as a model that may be replaced.
        max_shard_bytes: Size above which the weights are divided into several files.

    Raises:
        CheckpointError: If ``out`` holds something else, there is not enough space, writing
            fails, or a tensor does not fit ``like``. Then ``out`` is as it was before.
    """
    out = out.absolute()
    headers = {name: _converted(header, dtype) for name, header in like.headers.items()}
    with (
        _explained(out, headers),
        _beside(out) as directory,
        _explained(out, headers),  # here too, while what was written still takes its space
    ):
        check_free_space(directory, headers, out)
        _write_weights(weights, directory, headers, like, max_shard_bytes)
        _copy_companions(like, directory, dtype)
        for name, content in (extra_files or {}).items():
            file = directory / name
            file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(file, content if isinstance(content, bytes) else content.encode())
            sync_directory(file.parent)
        _put_in_place(directory, out)


@contextmanager
def _explained(out: Path, headers: Mapping[str, TensorHeader]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(describe_write_error(out, headers, error)) from error


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """Make an empty directory beside ``out``; remove it at the end, unless it was moved."""
    _check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    directory = _hidden(out, "part")
    _remove(directory)  # what a process that was killed left behind
    directory.mkdir()
    try:
        yield directory
    finally:
        _remove(directory)


def _check_replaceable(out: Path) -> None:
    former = _hidden(out, "old")
    if former.exists() and not out.exists():  # killed between the two renames
        former.rename(out)
    if not out.exists():
        return
    if not out.is_dir():
        raise CheckpointError(f"{out}: is a file; a directory is needed to save a model")
    if any(out.iterdir()) and not (out / PLAN_FILE).exists():
        raise CheckpointError(
            f"{out}: is not empty, and not a model that was saved here (no {PLAN_FILE}); "
            "give another directory"
        )


def _put_in_place(directory: Path, out: Path) -> None:
    """Move the new model to ``out``; a former one makes way only now, by its name."""
    former = _hidden(out, "old")
    _remove(former)
    sync_directory(directory)
    if out.exists():
        out.rename(former)
    try:
        directory.rename(out)
    except OSError:
        if former.exists():
            former.rename(out)
        raise
    sync_directory(out.parent)
    _remove(former)


def _hidden(out: Path, kind: str) -> Path:
    return out.with_name(f".{out.name}.{kind}")


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


def _converted(header: TensorHeader, dtype: torch.dtype | None) -> TensorHeader:
    if dtype is None or not header.dtype.is_floating_point:
        return header
    return replace(header, dtype=dtype)


def _write_weights(
    weights: Iterable[tuple[str, Tensor]],
    directory: Path,
    headers: Mapping[str, TensorHeader],
    like: Checkpoint,
    max_shard_bytes: int,
) -> None:
    """Write all tensors of ``headers``: those given, the others as they are in ``like``."""
    shards = _divide(headers, max_shard_bytes)
    once_more = tied(like)
    missing = dict.fromkeys(headers)
    with ExitStack() as stack:
        writers: dict[str, TensorFileWriter] = {}
        for file, names in shards.items():
            part = {name: headers[name] for name in names}
            writer = stack.enter_context(TensorFileWriter(directory / file, part))
            writers.update(dict.fromkeys(names, writer))
        for name, tensor in weights:
            _check_tensor(name, tensor, like)
            if name in once_more:
                continue  # its twin is what counts
            for each in (name, *(alias for alias, twin in once_more.items() if twin == name)):
                writers[each].write(each, tensor)
                missing.pop(each, None)
        own = like.weights()
        for name in missing:
            writers[name].write(name, own[name])
    if len(shards) > 1:
        _write_index(directory, shards, headers)


def _check_tensor(name: str, tensor: Tensor, like: Checkpoint) -> None:
    if name not in like.headers:
        raise CheckpointError(f"{name!r} cannot be saved: {like.name} has no such tensor")
    if tuple(tensor.shape) != like.headers[name].shape:
        raise CheckpointError(
            f"{name!r} cannot be saved: its shape is {list(tensor.shape)}; "
            f"{list(like.headers[name].shape)} in {like.name}"
        )


def _divide(headers: Mapping[str, TensorHeader], max_shard_bytes: int) -> dict[str, list[str]]:
    """Return the tensors of each file, in order; a larger tensor has a file to itself."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, header in headers.items():
        if shards[-1] and size + header.size_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += header.size_bytes
    if len(shards) == 1:
        return {MODEL_FILE: shards[0]}
    n_shards = len(shards)
    return {
        f"model-{number:05d}-of-{n_shards:05d}.safetensors": names
        for number, names in enumerate(shards, start=1)
    }


def _write_index(
    directory: Path, shards: Mapping[str, list[str]], headers: Mapping[str, TensorHeader]
) -> None:
    index = {
        "metadata": {"total_size": sum(header.size_bytes for header in headers.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    write_text(directory / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _copy_companions(like: Checkpoint, directory: Path, dtype: torch.dtype | None) -> None:
    """Copy what belongs to a model besides its weights; its configuration says what changed."""
    sources = dict.fromkeys(companions(like.path), like.path)
    if (chosen := like.chosen_tokenizer) is not None:
        sources = {f: path for f, path in sources.items() if not is_of_tokenizer(f.as_posix())}
        sources |= dict.fromkeys(companions(chosen), chosen)
    for file, source in sources.items():
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        _copy(source / file, directory / file)
        sync_directory((directory / file).parent)
    stored = read_json(directory / CONFIG_FILE)
    config = deepcopy(dict(like.config))
    if dtype is not None:
        _set_dtype(config, str(dtype).removeprefix("torch."))
    if config != stored:
        write_text(directory / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def _copy(file: Path, target: Path) -> None:
    with file.open("rb") as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy)
        copy.flush()
        os.fsync(copy.fileno())


def _set_dtype(config: dict[str, Any], name: str) -> None:
    """Set the dtype under the keys that are there (``torch_dtype`` is the older one)."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.update((key, name) for key in ("dtype", "torch_dtype") if key in part)
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = name
