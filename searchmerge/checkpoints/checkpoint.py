"""Opening checkpoints: a local directory, a hub id, or a LoRA adapter on a base."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from searchmerge.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]


def default_cache_dir() -> Path:
    """Return ``$SEARCHMERGE_CACHE``, or ``~/.cache/searchmerge``."""
    return Path(os.environ.get("SEARCHMERGE_CACHE") or Path.home() / ".cache" / "searchmerge")


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a file says of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Return the size of the tensor."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors have not been read yet.

    Attributes:
        name: As the user wrote it, for messages.
        path: Directory of its configuration and tokenizer.
        headers: Tensor name to header.
        find: Returns tensor name to the file that holds it; may make files first.
        fingerprint: A hash of the content of all tensors, 16 hexadecimal digits.
    """

    name: str
    path: Path
    headers: Mapping[str, TensorHeader]
    find: Callable[[], Mapping[str, Path]] = field(repr=False)
    hash_content: Callable[[], str] = field(repr=False)

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of the content of all tensors, 16 hexadecimal digits."""
        return self.hash_content()

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Return what ``config.json`` holds; empty where there is none."""
        return read_json(self.path / "config.json") if (self.path / "config.json").exists() else {}

    @property
    def size_bytes(self) -> int:
        """Return the size of all tensors."""
        return sum(header.size_bytes for header in self.headers.values())

    def weights(self) -> dict[str, Tensor]:
        """Return every tensor by name, memory-mapped: nothing is read until it is used."""
        by_file: dict[Path, list[str]] = {}
        for name, file in self.find().items():
            by_file.setdefault(file, []).append(name)
        tensors = {}
        for file, names in by_file.items():
            with safe_open(file, "pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in names}
        return {name: tensors[name] for name in self.headers}


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    base: Checkpoint | None = None,
    cache_dir: Path | None = None,
) -> Checkpoint:
    """Open a checkpoint and read its headers.

    Args:
        source: A directory of safetensors files, a hub id ``owner/name``, or the directory of
            a LoRA adapter.
        revision: Branch, tag or commit of a hub id.
        base: The base model, which an adapter needs.
        cache_dir: Where hashes and materialised adapters are kept.

    Raises:
        CheckpointError: If there is no such checkpoint, or it cannot be read.
    """
    cache_dir = cache_dir or default_cache_dir()
    path = Path(source).expanduser()
    if not path.is_dir():
        path = _download(str(source), revision)
    if (path / "adapter_config.json").exists():
        from searchmerge.checkpoints.lora import open_adapter

        return open_adapter(str(source), path, base, cache_dir)
    files = shards(path, str(source))
    headers, where = read_headers(files)
    return Checkpoint(
        str(source), path, headers, lambda: where, lambda: hash_files(files, cache_dir)
    )


def _download(source: str, revision: str | None) -> Path:
    owner, _, name = source.partition("/")
    if not name or "/" in name or owner in (".", "..", "~", ""):
        raise CheckpointError(
            f"{source}: no such directory, and no hub id, which has the form owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(source, revision=revision, allow_patterns=_HUB_FILES)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"{source}: no such directory, and the hub does not give it: {first_line}"
        ) from error
    return Path(found)


def shards(path: Path, name: str) -> list[Path]:
    """Return the safetensors files of a directory, those its index names if it has one.

    Raises:
        CheckpointError: If there is none, or one that the index names is missing.
    """
    index = path / "model.safetensors.index.json"
    if index.exists():
        files = sorted({path / file for file in read_json(index).get("weight_map", {}).values()})
        if missing := [file.name for file in files if not file.exists()]:
            raise CheckpointError(f"{name}: {index.name} names {missing[0]}, which is not there")
        return files
    files = sorted(path.glob("*.safetensors"))
    if not files:
        has_bin = any(path.glob("*.bin"))
        advice = "; convert its .bin files to safetensors first" if has_bin else ""
        raise CheckpointError(f"{name}: no safetensors file in {path}{advice}")
    return files


def read_headers(files: list[Path]) -> tuple[dict[str, TensorHeader], dict[str, Path]]:
    """Return each tensor's header, and the file that holds it.

    Raises:
        CheckpointError: If a file is damaged; it names the file.
    """
    headers, where = {}, {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (no mapping)
                    tensor = opened.get_slice(name)
                    dtype = _DTYPES[tensor.get_dtype()]
                    headers[name] = TensorHeader(dtype, tuple(tensor.get_shape()))
                    where[name] = file
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error
    return headers, where


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    return data


def hash_files(files: list[Path], cache_dir: Path) -> str:
    """Return a hash of the files' content; hashes of unchanged files are remembered."""
    remembered = cache_dir / "hashes.json"
    known: dict[str, str] = read_json(remembered) if remembered.exists() else {}
    digests, is_new = [], False
    for file in files:
        stat = file.stat()
        key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in known:
            is_new = True
            with file.open("rb") as opened:
                known[key] = hashlib.file_digest(opened, "sha256").hexdigest()
        digests.append(known[key])
    if is_new:
        cache_dir.mkdir(parents=True, exist_ok=True)
        unfinished = remembered.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(known, indent=1), encoding="utf-8")
        unfinished.replace(remembered)
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def tied_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the names that are the same parameter as another, by the checkpoint's own config.

    Only names that stand in the file beside the one they are tied to: the input embeddings.
    """
    if not checkpoint.config.get("tie_word_embeddings", False):
        return {}
    heads = [
        name
        for name in checkpoint.headers
        if name.endswith(("lm_head.weight", "embed_out.weight"))
    ]
    inputs = [
        name
        for name in checkpoint.headers
        if name.endswith(("embed_tokens.weight", "wte.weight", "shared.weight", "embed_in.weight"))
    ]
    found = {head: name for head in heads for name in inputs[:1]}
    if "shared.weight" in checkpoint.headers:
        found |= {name: "shared.weight" for name in inputs if name != "shared.weight"}
    return {
        alias: name
        for alias, name in found.items()
        if checkpoint.headers[alias] == checkpoint.headers[name]
    }
