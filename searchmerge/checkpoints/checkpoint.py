"""Checkpoints: opened by their headers, read through the page cache, told apart by content."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import torch
from torch import Tensor

from searchmerge.checkpoints.embeddings import aliases, untied_config
from searchmerge.checkpoints.files import (
    CONFIG_FILE,
    CONFIG_KEYS,
    default_cache_dir,
    read_json,
)
from searchmerge.checkpoints.fingerprint import fingerprint
from searchmerge.checkpoints.hub import fetch, is_hub_id
from searchmerge.checkpoints.lora import (
    Adapter,
    materialise,
    read_adapter,
    touches_embeddings,
)
from searchmerge.checkpoints.lora_config import ADAPTER_CONFIG
from searchmerge.checkpoints.renames import aligned, tied_names
from searchmerge.checkpoints.tensor_files import MappedTensors, TensorHeader
from searchmerge.checkpoints.weight_files import read_model
from searchmerge.errors import CheckpointError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


class Extension(Protocol):
    """Tensors that take the place of a model's own, in another shape."""

    @property
    def headers(self) -> Mapping[str, TensorHeader]:
        """Return their dtypes and shapes."""
        ...

    def key(self) -> str:
        """Return 64 hexadecimal digits that differ where any of the tensors differs."""
        ...

    def file(self) -> Path:
        """Return the file that holds them, which is made first."""
        ...


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model on disk; nothing is loaded until :meth:`weights` is asked for a tensor.

    Attributes:
        name: The model as the user wrote it, for messages.
        path: The local directory of the model, which transformers can load; an adapter's is its
            base's.
        source_dir: The local directory it was opened from; for an adapter the adapter's own.
        config: What ``config.json`` says; an adapter has its base's.
        headers: Dtype and shape of every tensor, by its name in the checkpoint.
        own_files: The file of each tensor; empty for an adapter, whose file is not
            made before it is needed (:attr:`files`).
        base: The model that an adapter was trained on; ``None`` where this is a whole model.
        adapter: What is added to that base; ``None`` where this is a whole model.
        cache_dir: Where fingerprints are remembered.
        renamed: Name here to the name in the file, where they differ.
        twins: Name of a tensor to the one that its data is read from: what the configuration ties
            and this study holds apart, such as an output embedding.
        trust_remote_code: Whether Python files of the model may run.
        extension: The tensors that have a row for each token of several models; ``None`` where
            the model's own stay.
        chosen_tokenizer: The directory of a tokenizer that takes the place of the model's own,
            with a copy of its configuration; ``None`` where that stays.
    """

    name: str
    path: Path
    source_dir: Path
    config: Mapping[str, Any] = field(repr=False)
    headers: Mapping[str, TensorHeader] = field(repr=False)
    own_files: Mapping[str, Path] = field(repr=False)
    base: "Checkpoint | None" = field(repr=False)
    adapter: Adapter | None = field(repr=False)
    cache_dir: Path = field(repr=False)
    renamed: Mapping[str, str] = field(default_factory=dict, repr=False)
    twins: Mapping[str, str] = field(default_factory=dict, repr=False)
    trust_remote_code: bool = False
    extension: Extension | None = field(default=None, repr=False)
    chosen_tokenizer: Path | None = None

    @property
    def tokenizer_dir(self) -> Path:
        """Return the directory of the tokenizer: an adapter's own where it has one."""
        if self.chosen_tokenizer is not None:
            return self.chosen_tokenizer
        own = any((self.source_dir / name).exists() for name in _TOKENIZER_FILES)
        return self.source_dir if self.base is None or own else self.base.tokenizer_dir

    @property
    def files(self) -> Mapping[str, Path]:
        """Return the file that holds each tensor; an adapter's is made first.

        Raises:
            CheckpointError: If an adapter cannot be added to its base.
        """
        files = dict(self.own_files)
        if self.base is not None and self.adapter is not None:
            changed = materialise(
                self.adapter,
                base_weights=self.base.weights(),
                base_fingerprint=self.base.fingerprint(),
                cache_dir=self.cache_dir,
            )
            files = {**self.base.files, **dict.fromkeys(self.adapter.headers, changed)}
        files |= {name: files[read] for name, read in self.twins.items()}
        if self.extension is None:
            return files
        return {**files, **dict.fromkeys(self.extension.headers, self.extension.file())}

    @property
    def size_bytes(self) -> int:
        """Return the size of all tensors, as stored."""
        return sum(header.size_bytes for header in self.headers.values())

    def weights(self) -> Mapping[str, Tensor]:
        """Return all tensors by their names in the checkpoint, memory-mapped on the CPU.

        A tensor costs memory only where it is touched, and shares it with every process that
        reads the same file. What is written to one never reaches the file, and is seen by
        those who hold this mapping; another call makes another mapping.
        """
        return MappedTensors(self.files, self._names_in_files())

    def _names_in_files(self) -> dict[str, str]:
        names = dict(self.renamed)
        if self.base is not None and self.adapter is not None:
            inherited = self.base._names_in_files()
            names |= {n: i for n, i in inherited.items() if n not in self.adapter.headers}
        names |= {name: names.get(read, read) for name, read in self.twins.items()}
        extended = self.extension.headers if self.extension is not None else {}
        return {name: stored for name, stored in names.items() if name not in extended}

    def untied(self, twins: Mapping[str, str]) -> "Checkpoint":
        """Return the same model with tensors of their own in place of further names.

        Args:
            twins: Name to the tensor that it has been another name of, and that it is equal to.
        """
        return replace(
            self,
            config=untied_config(self.config),
            headers={**self.headers, **{n: self.headers[read] for n, read in twins.items()}},
            twins={**self.twins, **twins},
        )

    def named_as(self, other: "Checkpoint") -> "Checkpoint":
        """Return the same model with the names of another, where only a prefix tells them apart.

        An encoder that was saved under a classifier has names such as ``bert.encoder...``, the
        encoder alone ``encoder...``.
        """
        names = aligned(self.headers, other.headers)
        if self.adapter is not None or all(name == new for name, new in names.items()):
            return self
        return replace(
            self,
            headers={names[name]: header for name, header in self.headers.items()},
            own_files={names[name]: file for name, file in self.own_files.items()},
            renamed={new: name for name, new in names.items() if name != new},
        )

    @property
    def is_whole(self) -> bool:
        """Whether all of its tensors are in files of its own."""
        return self.extension is None and (self.base is None or self.adapter is None)

    def fingerprint(self, stopped: Event | None = None) -> str:
        """Return 64 hexadecimal digits that differ where any tensor differs.

        The first call reads every tensor; later ones, in any process, only look at the
        modification times of the files.

        Args:
            stopped: Set, it ends the reading of a model that is whole.

        Raises:
            CheckpointError: If a file has gone or cannot be read.
            KeyboardInterrupt: If ``stopped`` is set.
        """
        if self.extension is not None:
            return self.extension.key()
        if self.base is None or self.adapter is None:
            files = {self.renamed.get(name, name): f for name, f in self.own_files.items()}
            return fingerprint(files, self.cache_dir, stopped)
        return self.adapter.fingerprint(self.base.fingerprint(), self.cache_dir)


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    base: Checkpoint | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Open a model: its configuration and the headers of its weights, nothing more.

    An adapter is added to its base when its weights are first asked for, once, in float32, and
    kept under ``cache_dir``; only the tensors that it changes are stored, the others are read
    from the base's own files.

    Args:
        source: A directory with a Hugging Face model, in one file or many, of safetensors or of
            PyTorch; a directory with a LoRA adapter, or with one folder that holds one; or
            ``organisation/name`` of either on the hub.
        revision: Branch, tag or commit; only for a model on the hub.
        base: What an adapter is added to; not used for a whole model.
        cache_dir: Where to keep what is worked out once. ``None`` is ``$SEARCHMERGE_CACHE``, or
            ``~/.cache/searchmerge``.
        trust_remote_code: Whether Python files of the model may run, wherever it is loaded.

    Raises:
        CheckpointError: If there is no such model, or it cannot be read or used; the message
            names the file, and the tensor where it is one.
    """
    name = str(source)
    cache_dir = cache_dir or default_cache_dir()
    directory = _adapter_within(_locate(name, revision))
    if (directory / ADAPTER_CONFIG).exists():
        return _open_adapter(name, directory, base, cache_dir)
    config = read_json(directory / CONFIG_FILE, CONFIG_KEYS)
    files, headers = read_model(directory, config)
    return Checkpoint(
        name=name,
        path=directory,
        source_dir=directory,
        config=config,
        headers=headers,
        own_files=files,
        base=None,
        adapter=None,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
    )


def main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the floating-point dtype that most of a checkpoint's bytes have."""
    sizes: dict[torch.dtype, int] = {}
    for header in checkpoint.headers.values():
        if header.dtype.is_floating_point:
            sizes[header.dtype] = sizes.get(header.dtype, 0) + header.size_bytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def tied(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the names that store another tensor once more, each with the name that is used.

    These are the embeddings that the configuration ties, where both are stored and their data
    are equal; where they differ, or are held apart, they count as two. Reads those tensors.
    """
    found = {}
    weights = checkpoint.weights()
    for alias, canonical in aliases(checkpoint.headers, checkpoint.config).items():
        if alias in checkpoint.twins:
            continue
        same_form = checkpoint.headers[alias] == checkpoint.headers[canonical]
        if same_form and torch.equal(weights[alias], weights[canonical]):
            found[alias] = canonical
    return found


def equal_twins(checkpoint: Checkpoint, pairs: Mapping[str, str]) -> dict[str, str]:
    """Return those of these pairs that are one tensor: stored once, or twice and equal."""
    weights = checkpoint.weights()
    return {
        name: used
        for name, used in pairs.items()
        if used in weights
        and (name not in weights or name in checkpoint.twins or _equal(weights, name, used))
    }


def _equal(weights: Mapping[str, Tensor], one: str, other: str) -> bool:
    return weights[one].shape == weights[other].shape and torch.equal(weights[one], weights[other])


def _locate(name: str, revision: str | None) -> Path:
    directory = Path(name).expanduser()
    if directory.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{name}: revision {revision!r} is given for a local directory; "
                "only a model on the hub has one"
            )
        return directory.resolve()
    if directory.exists():
        raise CheckpointError(f"{name}: is a file; give the directory of the model")
    if not is_hub_id(name):
        raise CheckpointError(
            f"{name}: no such directory, and not the name of a model on the hub "
            "(organisation/name)"
        )
    return fetch(name, revision)


def _adapter_within(directory: Path) -> Path:
    """Return the folder of an adapter that PEFT saved under a name, else the directory itself."""
    if (directory / CONFIG_FILE).exists() or (directory / ADAPTER_CONFIG).exists():
        return directory
    within = sorted(file.parent for file in directory.glob(f"*/{ADAPTER_CONFIG}"))
    if len(within) > 1:
        names = ", ".join(folder.name for folder in within)
        raise CheckpointError(f"{directory}: holds several adapters ({names}); name one of them")
    return within[0] if within else directory


def _open_adapter(
    name: str, directory: Path, base: Checkpoint | None, cache_dir: Path
) -> Checkpoint:
    if base is None:
        raise CheckpointError(f"{name}: is an adapter ({ADAPTER_CONFIG}); it needs a base model")
    pairs = tied_names(base.path, base.headers, trust_remote_code=base.trust_remote_code)
    if pairs and touches_embeddings(directory, {*pairs, *pairs.values()}):
        base = base.untied(equal_twins(base, pairs))  # PEFT's layers are apart, whatever is tied
    adapter = read_adapter(
        directory, base.headers, base.path, trust_remote_code=base.trust_remote_code
    )
    return Checkpoint(
        name=name,
        path=base.path,
        source_dir=directory,
        config=base.config,
        headers={**base.headers, **adapter.headers},
        own_files={},
        base=base,
        adapter=adapter,
        cache_dir=cache_dir,
        trust_remote_code=base.trust_remote_code,
    )
