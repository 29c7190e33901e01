"""Files that are whole or absent, outlive a power cut, and show when they were damaged."""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CHECKSUM = "checksum"


def write_bytes(file: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk itself.

    Raises:
        OSError: If it cannot be written.
    """
    with file.open("wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())


def write_text(file: Path, text: str) -> None:
    """Write a file and wait until it is on the disk itself.

    Raises:
        OSError: If it cannot be written.
    """
    write_bytes(file, text.encode())


def write_atomically(file: Path, data: str | bytes) -> None:
    """Write a file so that a reader finds the old one or the new one, never a part.

    Raises:
        OSError: If it cannot be written.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        write_bytes(part, data.encode() if isinstance(data, str) else data)
        part.replace(file)
        sync_directory(file.parent)
    finally:
        part.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable, where the system can (not on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def with_checksum(data: Mapping[str, Any]) -> str:
    """Return an object as JSON text that :func:`read_checked` knows to be undamaged."""
    return json.dumps({**data, _CHECKSUM: _checksum(data)}, indent=1) + "\n"


def read_checked(file: Path) -> dict[str, Any]:
    """Return what a file of :func:`with_checksum` holds.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not as it was written; says in what way.
    """
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError("it is cut off or overwritten") from error
    if not isinstance(data, dict) or data.pop(_CHECKSUM, None) != _checksum(data):
        raise ValueError("it is not as it was written")
    return data


def _checksum(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
