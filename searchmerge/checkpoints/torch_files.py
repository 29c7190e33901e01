"""Weights in PyTorch's own format: read as tensors alone, so that no code of a file ever runs."""

import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from searchmerge.errors import CheckpointError

_SUFFIXES = (".bin", ".pt", ".pth")
_DAMAGE = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)
"""What the reader of a damaged file may end in."""


def is_torch_file(file: Path) -> bool:
    """Return whether a file's name says that ``torch.save`` wrote it."""
    return file.suffix in _SUFFIXES


def load_torch_file(file: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Return the tensors of a file that ``torch.save`` wrote, by name.

    They are mapped privately, as those of a safetensors file are; the format before PyTorch 1.6
    cannot be mapped and is read whole.

    Args:
        file: A dictionary of tensors.
        device: ``cpu``, or ``meta`` for dtypes and shapes alone.

    Raises:
        CheckpointError: If it cannot be read, or holds anything but tensors: what a pickle
            holds beside them could run code.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's versions: what is wrong is refused
            found: Any = torch.load(
                file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file)
            )
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except pickle.UnpicklingError as error:
        reason = "a Git LFS pointer; fetch the weights with `git lfs pull`"
        if not _is_pointer(file):
            reason = (
                "truncated, or not a dictionary of tensors that torch.save wrote; anything else "
                "is not loaded, as it could run code"
            )
        raise CheckpointError(f"{file}: {reason}") from error
    except _DAMAGE as error:
        reason = getattr(error, "strerror", None) or "truncated, or not a file of PyTorch"
        raise CheckpointError(f"{file}: cannot be read: {reason}") from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{file}: holds a {type(found).__name__}; needed are named tensors")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{file}: {name!r} is a {type(tensor).__name__}; needed are tensors alone"
            )
    return {str(name): tensor.detach() for name, tensor in found.items()}


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(8) == b"version "
