"""Compiling C++ for this very processor, and loading it."""

import ctypes
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from searchmerge.merging.native.operations import NoSourceError

_logger = logging.getLogger(__name__)

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",  # each operation rounds by itself
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fwrapv",
    "-fno-tree-pre",  # it makes branches of what was none, which are not vectorised
    "-fopt-info-vec-optimized",
)

_X86_FLAGS = ("-mprefer-vector-width=512",)


@cache
def has_compiler() -> bool:
    """Return whether there is a C++ compiler: the one that ``CXX`` names, or else ``g++``."""
    name = _compiler()[0]
    if shutil.which(name) is None:
        _logger.info("there is no compiler %s: merging on a CPU takes several times as long", name)
        return False
    return True


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def load(text: str, *, vectorised: str | None = None) -> ctypes.CDLL:
    """Compile C++ and load it.

    Nothing is kept for other processes, which may run on another processor: it takes a tenth of
    a second.

    Args:
        text: The source.
        vectorised: What its lines call the file in which a loop has to be vectorised.

    Raises:
        NoSourceError: If there is no C++ compiler, it refuses the source, or that loop stays as
            it is.
    """
    flags = _FLAGS + (_X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())
    with tempfile.TemporaryDirectory(prefix="searchmerge-") as folder:
        source, library = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        source.write_text(text)
        command = [*_compiler(), *flags, str(source), "-o", str(library), "-lm"]
        try:
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            if vectorised is not None and not re.search(
                rf"^{re.escape(vectorised)}:.*loop vectorized", done.stderr, re.MULTILINE
            ):
                raise NoSourceError(f"is not vectorised by {command[0]}")
            return ctypes.CDLL(str(library))
        except subprocess.CalledProcessError as error:
            raise NoSourceError(f"is refused by {command[0]}: {error.stderr.strip()}") from error
        except OSError as error:
            raise NoSourceError(f"cannot be compiled: {error}") from error
