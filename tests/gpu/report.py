"""What the check writes down: figures as they come, and what failed or was left out."""

import faulthandler
import gc
import json
import logging
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, TextIO

import torch

from searchmerge.errors import SearchMergeError
from searchmerge.execution.worker import is_device_fault
from tests.benchmarks.bench_merging import GIB, peak, reset_peak

LEAST_S = 5.0
"""A step is not begun with less time than this."""

_STUCK_S = 20.0

Figures = Iterator[dict[str, Any]]


class OutOfTime(BaseException):
    """A step took longer than it may, or than is left. Compilers catch every ``Exception``."""


class Wrong(Exception):
    """A step found a result that is not what it must be."""


@dataclass(frozen=True)
class Step:
    """Something to be measured.

    Attributes:
        section: What it belongs to.
        name: What it is.
        run: Yields figures, each a line of the report, as they come.
        limit_s: Seconds that it may take at most.
        is_open_ended: Whether it goes as far as there is time, which is no failure.
    """

    section: str
    name: str
    run: Callable[[], Figures]
    limit_s: float = 120.0
    is_open_ended: bool = False

    def __str__(self) -> str:
        return f"{self.section}: {self.name}"


@dataclass
class Report:
    """Prints figures and appends them to a file, one JSON object a line.

    Attributes:
        device: Whose memory is watched.
        budget_s: Seconds after which no step is begun, and the one under way is stopped.
        file: Where figures are appended; ``None`` for nowhere.
        is_patient: Whether a step may take what is left, as where a machine has other work.
    """

    device: str
    budget_s: float
    file: TextIO | None = None
    is_patient: bool = False
    failures: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    is_broken: bool = False

    @property
    def left_s(self) -> float:
        return self.budget_s - (time.monotonic() - self.started)

    def step(self, step: Step) -> None:
        """Run a step; what goes wrong is noted, and the next one may begin."""
        if self.is_broken or self.left_s < LEAST_S:
            self.skip(step, "the device failed" if self.is_broken else "the time was up")
            return
        seconds = self.left_s if self.is_patient else min(step.limit_s, self.left_s)
        begun, in_use = time.monotonic(), reset_peak(self.device)
        print(f"\n{step}", flush=True)
        try:
            with _at_most(seconds), self._warnings_noted(step):
                for figures in step.run():
                    self.figure(step, figures)
        except OutOfTime:
            stopped = f"stopped after {seconds:.0f} s"
            if step.is_open_ended:
                self.skip(step, f"what is not told above: {stopped}")
            else:
                self.fail(step, stopped)
        except Exception as error:  # noqa: BLE001 - one failure is noted, the rest goes on
            told = _told(error)
            self.fail(step, told)
            self.is_broken = is_device_fault(error)
        self._note_end(step, time.monotonic() - begun, in_use)

    def _note_end(self, step: Step, seconds: float, in_use: int) -> None:
        figures: dict[str, Any] = {"what": "step", "seconds": round(seconds, 1)}
        if self.is_broken:
            self.figure(step, figures)
            return
        where = "host" if self.device == "cpu" else "device"
        figures[f"peak {where} GiB"] = round(peak(self.device) / GIB, 2)
        figures[f"{where} GiB at its start"] = round(in_use / GIB, 2)
        if where == "device":
            figures["peak host GiB"] = round(peak("cpu") / GIB, 2)
        self.figure(step, figures)
        free_memory(self.device)

    def figure(self, step: Step, figures: dict[str, Any]) -> None:
        """Print one line of figures, and append it to the file."""
        own = dict(figures)
        target = own.pop("at most", None), own.pop("at least", None)
        what, value = str(own.get("what", "")), own.get("value")
        rest = ", ".join(f"{key} {_shown(v)}" for key, v in own.items() if key != "what")
        print(f"  {what}: {rest}" if what else f"  {rest}", flush=True)
        most, least = target
        if value is not None and (
            (most is not None and value > most) or (least is not None and value < least)
        ):
            bound = f"at most {most}" if most is not None else f"at least {least}"
            self.missed.append(f"{step}: {what} is {_shown(value)}; wanted {bound}")
        self._write({"section": step.section, "step": step.name, **figures})

    def fail(self, step: Step, told: str) -> None:
        """Note a failure."""
        last = told.strip().splitlines()[-1] if told.strip() else "failed"
        self.failures.append(f"{step}: {last}")
        print(f"  FAILED: {told}", flush=True)
        self._write({"section": step.section, "step": step.name, "failed": told})

    def skip(self, step: Step, why: str) -> None:
        """Note that a step was left out."""
        self.skipped.append(f"{step} ({why})")
        self._write({"section": step.section, "step": step.name, "skipped": why})

    def header(self, facts: dict[str, Any]) -> None:
        """Say where this was measured."""
        for name, fact in facts.items():
            print(f"{name}: {fact}", flush=True)
        self._write({"section": "header", **facts})

    def summary(self) -> bool:
        """Say what failed, was missed or left out; return whether nothing failed."""
        elapsed = time.monotonic() - self.started
        print(f"\n{elapsed:.0f} s in all", flush=True)
        told = {"failed": self.failures, "missed": self.missed, "left out": self.skipped}
        for title, lines in told.items():
            print(f"{title}: {len(lines)}", flush=True)
            for line in lines:
                print(f"  {line}", flush=True)
        self._write({"section": "summary", "seconds": round(elapsed, 1), **told})
        return not self.failures

    def _write(self, entry: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self.file.flush()

    @contextmanager
    def _warnings_noted(self, step: Step) -> Iterator[None]:
        """Note what the product warns of: that compiling failed is a failure here."""
        handler = _Noted()
        logger = logging.getLogger("searchmerge")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            for line in dict.fromkeys(handler.lines):
                if "compiling failed" in line:
                    self.fail(step, line)
                else:
                    self.figure(step, {"what": "warning", "text": line})


def _told(error: Exception) -> str:
    """Return what to say of a failure: one line where the error says all that there is to say."""
    if isinstance(error, PackageNotFoundError):
        return (
            f"the package {error.name} is not installed, and a study writes down its version: "
            "pip install it; the tree itself with pip install --no-deps -e ."
        )
    if isinstance(error, Wrong | SearchMergeError):
        return str(error)
    return traceback.format_exc()


class _Noted(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise ``OutOfTime`` in the main thread once it has taken so long.

    Where that thread does not come back to Python, the process ends with every thread's stack.
    """

    def late(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)  # once more where it was swallowed
    faulthandler.dump_traceback_later(seconds + _STUCK_S, exit=True)  # where Python does not run
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def free_memory(device: str) -> None:
    """Give back what the step before held."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def open_file(path: Path | None) -> TextIO | None:
    """Return the file that figures are appended to, empty."""
    if path is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", encoding="utf-8")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
