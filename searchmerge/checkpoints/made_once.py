"""Tensors that are worked out once and kept: the next who asks, in any process, finds the file."""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from searchmerge.checkpoints.files import (
    MODEL_FILE,
    check_free_space,
    describe_write_error,
)
from searchmerge.checkpoints.fingerprint import fingerprint
from searchmerge.checkpoints.tensor_files import TensorFileWriter, TensorHeader, read_headers
from searchmerge.durable import read_checked, sync_directory, with_checksum, write_atomically
from searchmerge.errors import CheckpointError

_logger = logging.getLogger(__name__)

_CONTENT_FILE = "content.json"  # beside the tensors: their fingerprint


def made_once(
    folder: Path,
    headers: Mapping[str, TensorHeader],
    make: Callable[[], Iterable[tuple[str, Tensor]]],
    *,
    cache_dir: Path,
) -> Path:
    """Return the file in a folder that holds these tensors, after making it where it is not.

    Two processes that ask for it at once make it once; it is whole as soon as it has its name.
    One that is not as it was written is made again.

    Args:
        folder: Named after all that the tensors depend on.
        headers: Their dtypes and shapes.
        make: Returns the tensors, one at a time.
        cache_dir: Where fingerprints are remembered.

    Raises:
        CheckpointError: If the file cannot be written, or the tensors cannot be made.
    """
    from filelock import FileLock

    target = folder / MODEL_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not _is_whole(target, cache_dir):
                _write(target, headers, make())
                content = {"fingerprint": _content(target, cache_dir)}
                write_atomically(target.with_name(_CONTENT_FILE), with_checksum(content))
    except OSError as error:
        raise CheckpointError(describe_write_error(target, headers, error)) from error
    return target


def _content(file: Path, cache_dir: Path) -> str:
    return fingerprint(dict.fromkeys(read_headers(file), file), cache_dir)


def _is_whole(file: Path, cache_dir: Path) -> bool:
    """Return whether a file was made before and is as it was written."""
    if not file.exists():
        return False
    try:
        noted = read_checked(file.with_name(_CONTENT_FILE))
        if noted.get("fingerprint") == _content(file, cache_dir):
            return True
        reason = "it is not as it was written"
    except (OSError, ValueError) as error:  # a CheckpointError is a ValueError
        reason = str(error)
    _logger.warning("%s: damaged, and made again: %s", file, reason)
    return False


def _write(
    target: Path, headers: Mapping[str, TensorHeader], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    check_free_space(target.parent, headers, target)
    part = target.with_name(f"{MODEL_FILE}.part")
    try:
        with TensorFileWriter(part, headers) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor)
        part.replace(target)
        sync_directory(target.parent)
    finally:
        part.unlink(missing_ok=True)
