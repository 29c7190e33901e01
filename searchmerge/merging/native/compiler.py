"""Compiling C++ for this very processor, and loading it."""

import ctypes
import logging
import os
import platform
import re
import shlex
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
    "-fno-tree-pre",  # these make branches of what was none, which are not vectorised
    "-fno-thread-jumps",
    "-fopt-info-vec-optimized",
    "-fdiagnostics-color=never",
)

_LONGEST_S = 300.0  # it takes a fraction of a second, and more where others are at work

_PLACE = "smallest.cpp"

_SMALLEST = f"""
#line 1 "{_PLACE}"
extern "C" void run(float* numbers, int n) {{ for (int i = 0; i < n; i++) numbers[i] *= 2; }}
"""

_X86_FLAGS = ("-mprefer-vector-width=512",)


@cache
def has_compiler() -> bool:
    """Return whether there is g++, or a like compiler that ``CXX`` names, and it works."""
    try:
        load(_SMALLEST, vectorised=_PLACE)
    except NoSourceError as error:
        told = str(error).splitlines()[0]
        _logger.info("merging on a CPU takes several times as long, as C++ %s", told)
        return False
    return True


def _compiler() -> list[str]:
    """Return the compiler's command.

    Raises:
        NoSourceError: If ``CXX`` is none.
    """
    named = os.environ.get("CXX", "")
    try:
        return shlex.split(named) or ["g++"]
    except ValueError as error:
        raise NoSourceError(f"cannot be compiled: CXX is {named!r}: {error}") from error


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
    compiler = _compiler()
    try:
        with tempfile.TemporaryDirectory(prefix="searchmerge-") as folder:
            source, library = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
            source.write_text(text, encoding="utf-8")
            told = _run([*compiler, *flags, str(source), "-o", str(library), "-lm"])
            if vectorised is not None and not re.search(
                rf"^{re.escape(vectorised)}:.*loop vectorized", told, re.MULTILINE
            ):
                raise NoSourceError(f"is not vectorised by {compiler[0]}")
            return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        raise NoSourceError(f"is refused by {compiler[0]}: {error.stderr.strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoSourceError(f"cannot be compiled: {error}") from error


def _run(command: list[str]) -> str:
    """Run a compiler; return what it says, in English."""
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},
        timeout=_LONGEST_S,
    )
    return done.stderr
