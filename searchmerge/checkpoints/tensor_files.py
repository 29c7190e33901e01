"""Files of weights: headers without data, tensors without copies, writing one at a time."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from searchmerge.checkpoints.torch_files import is_torch_file, load_torch_file
from searchmerge.errors import CheckpointError

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_OTHER = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading a header ends in that is not one."""
_CHUNK = 1 << 20  # elements that are converted at once
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a file says of a tensor before its data is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Return the size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_headers(file: Path) -> dict[str, TensorHeader]:
    """Return the header of every tensor of a file, in the order of their data.

    Only the start of a safetensors file is read, and nothing is mapped, so a file larger than
    the memory can be looked at. Of a file of PyTorch no data is read.

    Raises:
        CheckpointError: If the file is missing, truncated, or of no such format.
    """
    if is_torch_file(file):
        return {
            name: TensorHeader(_stored_dtype(file, name, tensor), tuple(tensor.shape))
            for name, tensor in load_torch_file(file, device="meta").items()
        }
    try:
        with file.open("rb") as opened:
            start = opened.read(8)
            length = int.from_bytes(start, "little")
            size = os.fstat(opened.fileno()).st_size
            if len(start) < 8 or 8 + length > size:
                raise CheckpointError(f"{file}: {_why_unreadable(start)}")
            entries = json.loads(opened.read(length))
            entries.pop("__metadata__", None)
            found = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
            headers = {name: _header(file, name, entry) for name, entry in found}
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{file}: {_system_error(error)}") from error
    except _OTHER as error:  # no JSON, or another
        raise CheckpointError(f"{file}: {_why_unreadable(start)}") from error
    if 8 + length + sum(header.size_bytes for header in headers.values()) != size:
        raise CheckpointError(f"{file}: {_why_unreadable(start)}")
    return headers


class MappedTensors(Mapping[str, Tensor]):
    """Named tensors that alias memory-mapped files, each mapped when it is first asked for.

    The mapping is private and copy-on-write: processes that read the same file share its pages,
    a page costs memory only once it is touched, and writing to a tensor never reaches the file.

    Args:
        files: The file that holds each name.
        renamed: Name here to the name in the file, where they differ.
    """

    def __init__(
        self, files: Mapping[str, Path], renamed: Mapping[str, str] | None = None
    ) -> None:
        self._files = files
        self._renamed = renamed or {}
        self._handles: dict[Path, Callable[[str], Tensor]] = {}
        self._tensors: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            file = self._files[name]
            if file not in self._handles:
                self._handles[file] = _open(file)
            self._tensors[name] = self._handles[file](self._renamed.get(name, name))
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class TensorFileWriter:
    """Writes one safetensors file, tensor by tensor, in any order.

    The header goes first, so dtype and shape of every tensor must be known; the data of each
    goes to its place when it comes. No more than one tensor is in memory.

    Args:
        file: The file to make.
        headers: What the file will hold.

    Raises:
        OSError: From any method, where the file cannot be written.
    """

    def __init__(self, file: Path, headers: Mapping[str, TensorHeader]) -> None:
        text, self._offsets = _layout(headers)
        self._headers = headers
        self._missing = dict.fromkeys(headers)
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._file = file.open("wb")
        self._file.write(text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the data of one tensor, converted to the dtype that the header says.

        Args:
            name: One of the names of the header.
            tensor: Any device and dtype; of the header's shape.
        """
        header = self._headers[name]
        if tuple(tensor.shape) != header.shape:
            raise CheckpointError(
                f"{name!r} has shape {list(tensor.shape)}; {list(header.shape)} was announced"
            )
        self._file.seek(self._offsets[name])
        for data in self._in_chunks(tensor.detach().contiguous(), header.dtype):
            self._file.write(as_bytes(data))
        self._missing.pop(name, None)

    def _in_chunks(self, tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the data on the CPU and in ``dtype``: as it is, or converted in one buffer.

        The buffer is one for all tensors: were each converted to a new one, the allocator
        would keep most of them (measured: memory grew by the size of the whole model).
        """
        if tensor.dtype == dtype and tensor.device.type == "cpu":
            yield tensor
            return
        if dtype not in self._buffers:
            self._buffers[dtype] = torch.empty(_CHUNK, dtype=dtype)
        buffer = self._buffers[dtype]
        for chunk in torch.split(tensor.reshape(-1), _CHUNK):
            yield buffer[: len(chunk)].copy_(chunk)

    def close(self) -> None:
        """Flush everything to the disk itself.

        Raises:
            CheckpointError: If a tensor was announced and never written.
        """
        if self._missing:
            raise CheckpointError(f"{self._file.name}: {next(iter(self._missing))!r} is missing")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    def abandon(self) -> None:
        """Close the file as it is, where writing failed; the caller removes it."""
        with suppress(OSError):  # what is buffered cannot be written: the error we are here for
            self._file.close()


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the data of a contiguous CPU tensor of any dtype and shape, without a copy."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _header(file: Path, name: str, entry: Mapping[str, Any]) -> TensorHeader:
    code = entry["dtype"]
    if code not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise CheckpointError(f"{file}: {name!r} is stored as {code} (known: {known})")
    return TensorHeader(_DTYPES[code], tuple(int(length) for length in entry["shape"]))


def _stored_dtype(file: Path, name: str, tensor: Tensor) -> torch.dtype:
    if tensor.dtype not in _CODES:
        known = ", ".join(str(dtype) for dtype in _CODES)
        raise CheckpointError(f"{file}: {name!r} is stored as {tensor.dtype} (known: {known})")
    return tensor.dtype


def _open(file: Path) -> Callable[[str], Tensor]:
    """Map a file and return the function that gives a tensor of it."""
    if is_torch_file(file):
        return load_torch_file(file).__getitem__
    try:
        opened: Any = safe_open(file, framework="pt")
    except OSError as error:
        raise CheckpointError(f"{file}: {_system_error(error)}") from error
    except (SafetensorError, RuntimeError) as error:  # RuntimeError: it cannot be mapped
        raise CheckpointError(f"{file}: cannot be read: {error}") from error

    def tensor(name: str) -> Tensor:
        try:
            return opened.get_tensor(name)  # type: ignore[no-any-return]
        except SafetensorError as error:
            raise CheckpointError(f"{file}: {name!r} cannot be read: {error}") from error

    return tensor


def _system_error(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return f"cannot be read: {error.strerror or error}"


def _why_unreadable(start: bytes) -> str:
    if start == b"version ":
        return "a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
    return "truncated, or not a safetensors file"


def _layout(headers: Mapping[str, TensorHeader]) -> tuple[bytes, dict[str, int]]:
    """Return the start of the file, and where in the file each tensor's data begins."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    # Widest first, as readers want: every tensor is then aligned to its own item size.
    for name in sorted(headers, key=lambda name: (-headers[name].dtype.itemsize, name)):
        header = headers[name]
        begins[name], end = end, end + header.size_bytes
        entries[name] = {
            "dtype": _CODES[header.dtype],
            "shape": list(header.shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    prefix = len(text).to_bytes(8, "little") + text
    return prefix, {name: start + begin for name, begin in begins.items()}
