"""What tells two sets of weights apart: a hash of every tensor, remembered per file."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any

from searchmerge.checkpoints.stamps import stamp
from searchmerge.checkpoints.tensor_files import MappedTensors, as_bytes
from searchmerge.durable import read_checked, with_checksum, write_atomically

_logger = logging.getLogger(__name__)


def fingerprint(files: Mapping[str, Path], cache_dir: Path, stopped: Event | None = None) -> str:
    """Return the SHA-256 of all tensors: names, dtypes, shapes and data, in order of name.

    How the tensors are divided into files makes no difference. The result is remembered under
    path and stamp of the files, so that a second call reads no tensor.

    Args:
        files: The file that holds each name.
        cache_dir: Where to remember; where it cannot be written, nothing is remembered.
        stopped: Set, it ends this between two tensors.

    Raises:
        CheckpointError: If a file is missing or cannot be read.
        KeyboardInterrupt: If ``stopped`` is set.
    """
    stamps = [[str(file), *stamp(file)] for file in sorted(set(files.values()))]
    key = hashlib.sha256(json.dumps([sorted(files), stamps]).encode()).hexdigest()
    remembered = cache_dir / "fingerprints" / f"{key[:32]}.json"
    if (found := _recall(remembered, stamps)) is not None:
        return found
    digest = _hash_tensors(files, stopped)
    try:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(remembered, with_checksum({"files": stamps, "fingerprint": digest}))
    except OSError as error:
        _logger.warning("%s: cannot be written: %s", remembered, error.strerror)
    return digest


def _recall(remembered: Path, stamps: list[list[Any]]) -> str | None:
    """Return the remembered fingerprint; None where there is none, or its file is damaged."""
    try:
        data = read_checked(remembered)
    except OSError:
        return None
    except ValueError as error:
        _logger.warning("%s: %s; the weights are read again", remembered, error)
        return None
    return str(data["fingerprint"]) if data.get("files") == stamps else None


def _hash_tensors(files: Mapping[str, Path], stopped: Event | None) -> str:
    tensors = MappedTensors(files)  # of its own: what it maps is let go when this returns
    total = hashlib.sha256()
    for name in sorted(files):
        if stopped is not None and stopped.is_set():
            raise KeyboardInterrupt
        tensor = tensors[name]
        head = f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0"
        total.update(head.encode())
        total.update(as_bytes(tensor))
    return total.hexdigest()
