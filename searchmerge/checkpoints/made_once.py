"""Tensors that are worked out once and kept: the next who asks, in any process, finds the file."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from searchmerge.checkpoints.files import (
    MODEL_FILE,
    check_free_space,
    describe_write_error,
    sync_directory,
)
from searchmerge.checkpoints.tensor_files import TensorFileWriter, TensorHeader
from searchmerge.errors import CheckpointError


def made_once(
    folder: Path,
    headers: Mapping[str, TensorHeader],
    make: Callable[[], Iterable[tuple[str, Tensor]]],
) -> Path:
    """Return the file in a folder that holds these tensors, after making it where it is not.

    Two processes that ask for it at once make it once; it is whole as soon as it has its name.

    Args:
        folder: Named after all that the tensors depend on.
        headers: Their dtypes and shapes.
        make: Returns the tensors, one at a time.

    Raises:
        CheckpointError: If the file cannot be written, or the tensors cannot be made.
    """
    from filelock import FileLock

    target = folder / MODEL_FILE
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not target.exists():
                _write(target, headers, make())
    except OSError as error:
        raise CheckpointError(describe_write_error(target, headers, error)) from error
    return target


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
