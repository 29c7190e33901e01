"""What tells whether a file was written to: its size, times and place, without reading it."""

from pathlib import Path
from typing import NamedTuple

from searchmerge.errors import CheckpointError


class Stamp(NamedTuple):
    """A file as it stood at one moment.

    A copy that keeps the modification time (``cp -p``) is another inode, and one that is written
    over this file gives it another change time: no user program can set that.
    """

    size_bytes: int
    modified_ns: int
    changed_ns: int
    inode: int


def stamp(file: Path) -> Stamp:
    """Return how a file stands now; of a link, the file that it leads to.

    Raises:
        CheckpointError: If there is no such file any more.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
