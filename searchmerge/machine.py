"""The processors that this process may use, how its threads wait for one another, and the load."""

import math
import os
import time
from pathlib import Path

SOON_ASLEEP = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "0"}
"""For GNU's OpenMP, which torch's wheels bring, and for LLVM's and Intel's, as in conda's.

GNU's spins 300,000 times by default. 3,000 cost nothing on a quiet machine; sleeping at once,
which is its passive policy, cost a tenth of scoring and merging on one, and on another a fifth of
scoring while a merge took three times as long.
"""

ASLEEP_AT_ONCE = {**SOON_ASLEEP, "GOMP_SPINCOUNT": "0"}
"""Where others are at work: to spin takes their time, and they take that of whom is waited for."""

_SHARED = 0.5
"""Of the processors: so many threads of other processes make a machine a shared one."""

_LOAD, _LOOKS = Path("/proc/loadavg"), 5
"""Where Linux tells how many threads run, and how often that is looked at."""

_CROWDED = 1.25
"""Runnable threads per processor from which others are said to slow this process down: its own
are one per processor."""


def wait_asleep() -> None:
    """Have threads soon sleep where they wait for one another, unless the environment says.

    By default they spin for milliseconds at every barrier, which takes the processor from the
    very thread that they wait for where others use the machine too: where they do now, threads
    sleep at once. To be called before torch is imported: its OpenMP reads the environment once.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        return
    is_shared = others_running() >= _SHARED * (os.cpu_count() or 1)
    for name, value in (ASLEEP_AT_ONCE if is_shared else SOON_ASLEEP).items():
        os.environ.setdefault(name, value)


def others_running() -> int:
    """Return how many threads run or want to, beside this one, most of the time of some looks.

    It is known on Linux alone; elsewhere 0.
    """
    found = []
    for _ in range(_LOOKS):
        try:
            running, _, _ = _LOAD.read_text(encoding="ascii").split()[3].partition("/")
            found.append(int(running) - 1)
        except (OSError, ValueError, IndexError):
            return 0
        time.sleep(0.004)
    return max(0, sorted(found)[_LOOKS // 2])


def use_allowed_cores() -> None:
    """Have torch start as many threads as it may run at once, unless the environment says.

    To be called before torch is imported.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))


def available_cores(groups: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc/self")) -> int:
    """Return how many processors this process may use at once: by its affinity, and its quota.

    Args:
        groups: Where control groups are mounted.
        proc: Where the kernel tells of this process.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        allowed = os.cpu_count() or 1
    return max(1, int(min(allowed, cpu_quota(groups, proc))))


def cpu_quota(groups: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc/self")) -> float:
    """Return how many processors' time the control groups of this process allow; inf for no limit.

    Args:
        groups: See :func:`available_cores`.
        proc: See :func:`available_cores`.
    """
    quotas = [math.inf]
    for folder in _own_groups(groups, proc):
        quota, period = _numbers(folder / "cpu.max")
        if quota is None:  # the first version
            (quota, _), (period, _) = (
                _numbers(folder / f"cpu.cfs_{what}_us") for what in ("quota", "period")
            )
        if quota is not None and period is not None and quota > 0 < period:
            quotas.append(quota / period)
    return min(quotas)


def _own_groups(groups: Path, proc: Path) -> list[Path]:
    """Return the folders of the control groups that this process is in, and of those around."""
    try:
        lines = (proc / "cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = groups / controllers if controllers else groups
        inner = mount / path.lstrip("/")
        # a container sees its own group as the mount itself, whatever its path outside
        around = (folder for folder in inner.parents if folder.is_relative_to(mount))
        folders += [inner, *around, mount]
    return folders


def _numbers(file: Path) -> tuple[float | None, float | None]:
    """Return the first two numbers of a file; ``None`` for a word that is no number."""
    try:
        words = file.read_text(encoding="ascii").split()
    except OSError:
        return None, None
    numbers = [float(word) if word.lstrip("-").isdigit() else None for word in words]
    first, second, *_ = [*numbers, None, None]
    return first, second


def crowding(load: float | None = None, n_cores: int | None = None) -> str:
    """Return a few words if more threads want to run than there are processors.

    Args:
        load: Runnable threads over the last minute; ``None`` to ask the machine.
        n_cores: Processors of the whole machine; ``None`` to ask it.

    Returns:
        ``"load 8.1 on 2 processors"``; empty if the machine is not crowded.
    """
    if load is None:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    n_cores = n_cores or os.cpu_count() or 1
    if load <= _CROWDED * n_cores:
        return ""
    return f"load {load:.1f} on {n_cores} processors"
