"""Toy workers that misbehave on purpose; a worker's own process must be able to import them."""

import json
import os
import signal
import time
from pathlib import Path

import torch

from searchmerge.errors import EvaluationError, StudyError
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.execution.blocks import make_blocks, make_rounds
from searchmerge.execution.worker import Worker
from searchmerge.plan import MergePlan
from tests.toy import EXPERTS, ToyEvaluator, ToyMerger, ToyModel

ROUNDS = make_rounds(
    {task: make_blocks(task, "select", range(20), TaskInfo(40), 4) for task in EXPERTS},
    round_blocks=3,
    seed=0,
)
FIRST_ROUND = {(block.task, example) for block in ROUNDS[0] for example in block.examples}

FINE = 0.5
FAILS = 0.01
BREAKS = 0.02
DEVICE_FAULT = 0.03
DIES = 0.04
HANGS = 0.05
STOPS = 0.06


def plan(first, second=0.2):
    """Return a plan whose first coefficient says how it behaves."""
    return MergePlan("task_arithmetic", EXPERTS, {"coefficient": ((first, second, 0.1),)})


class Misbehaving(ToyEvaluator):
    """Scores as the toy does, but does what the first coefficient says after the first round."""

    def __init__(self, folder=None, delay_s=0.0):
        super().__init__()
        self._folder = folder
        self._delay_s = delay_s

    def score(self, model, task, examples):
        if self._folder is not None:
            self._note("at", f"{os.getpid()} {model.coefficients[0]}")
            with (self._folder / f"scores-{os.getpid()}").open("a") as log:
                print(json.dumps([time.time(), model.coefficients, task, examples]), file=log)
        if not {(task, example) for example in examples} <= FIRST_ROUND:
            self._misbehave(model.coefficients[0])
        time.sleep(self._delay_s)
        return super().score(model, task, examples)

    def _note(self, name, text):
        partial = self._folder / f"{name}-{os.getpid()}.part"
        partial.write_text(text)
        partial.replace(partial.with_suffix(""))

    def _misbehave(self, kind):
        if kind == FAILS:
            self._fails = lambda coefficients: coefficients[0] == FAILS
        elif kind == BREAKS:
            raise KeyError("a mistake in the evaluator")
        elif kind == DEVICE_FAULT:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        elif kind == DIES:
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == HANGS:
            if self._folder is not None:
                self._note("hangs", str(os.getpid()))
            time.sleep(3600)
        elif kind == STOPS:
            os.kill(os.getpid(), signal.SIGSTOP)


def make(folder=None, delay_s=0.0, load_s=0.0):
    """Load a toy worker, which notes in ``folder`` what it does."""
    if load_s:
        (folder / f"loads-{os.getpid()}").touch()
        time.sleep(load_s)
    model = ToyModel()
    evaluator = Misbehaving(folder, delay_s)
    return Worker(model, ToyMerger(model), dict.fromkeys(EXPERTS, evaluator))


class Tuned(Misbehaving):
    """Says how its first task is scored soonest, or misbehaves; notes how it is told to score."""

    def __init__(self, folder, kind):
        super().__init__(folder)
        self._kind = kind

    def tune(self, model, task, examples):
        self._misbehave(self._kind)
        return {"growth": 2} if task == "math" else {}

    def use(self, task, tuning):
        if task == "math":
            self._note("used", str(tuning))


def make_tuned(folder, kind=FINE):
    """Load a toy worker that measures, and does what ``kind`` says as it does so."""
    model = ToyModel()
    evaluator = Tuned(folder, kind)
    return Worker(model, ToyMerger(model), dict.fromkeys(EXPERTS, evaluator))


def make_broken(error):
    """Fail to load a worker."""
    raise error


def make_dying(folder: Path, n_deaths):
    """Die as long as fewer than ``n_deaths`` workers have died in ``folder``."""
    n_died = len(list(folder.iterdir()))
    if n_died < n_deaths:
        (folder / f"died-{n_died}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return make()


def make_slow(folder: Path, n_hangs):
    """Hang as long as fewer than ``n_hangs`` workers have hung in ``folder``."""
    n_hung = len(list(folder.iterdir()))
    if n_hung < n_hangs:
        (folder / f"hung-{n_hung}").touch()
        time.sleep(3600)
    return make()


class HangsAsItArrives:
    """Makes workers; hangs as it is unpickled while fewer than ``n_hangs`` did in ``folder``."""

    def __init__(self, folder: Path, n_hangs):
        self._folder, self._n_hangs = folder, n_hangs

    def __reduce__(self):
        return arrive, (self._folder, self._n_hangs)


def arrive(folder: Path, n_hangs):
    """Hang as long as fewer than ``n_hangs`` have hung in ``folder``; return ``make``."""
    n_hung = len(list(folder.iterdir()))
    if n_hung < n_hangs:
        (folder / f"hung-{n_hung}").touch()
        time.sleep(3600)
    return make


def make_missing(folder: Path):
    """Load the first worker and from the third on; the second misses a file."""
    n_asked = len(list(folder.iterdir()))
    (folder / f"asked-{n_asked}").touch()
    if n_asked == 1:
        raise StudyError(f"{folder}/base: no such directory")
    return make()


def make_faulty(folder: Path, n_faults):
    """Find a broken device as long as fewer than ``n_faults`` workers have found one."""
    n_found = len(list(folder.iterdir()))
    if n_found < n_faults:
        (folder / f"found-{n_found}").touch()
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
    return make()


def scored(folder):
    """Return when each call of an evaluator began, with its coefficients, task and examples."""
    lines = [line for file in folder.glob("scores-*") for line in file.read_text().splitlines()]
    return [
        (at, tuple(coefficients), task, tuple(examples))
        for at, coefficients, task, examples in map(json.loads, lines)
    ]


def busy(folder):
    """Return the processes that score at present, and the first coefficient of each."""
    notes = [file.read_text().split() for file in folder.glob("at-*") if not file.suffix]
    return {int(pid): float(first) for pid, first in notes if Path(f"/proc/{pid}").exists()}


class Whole:
    """Yields a large tensor and a small one, and misbehaves before the second."""

    def __init__(self, kind, size=50_000_000):
        self._kind, self._size = kind, size

    def merged(self, plan, dtype=None):
        yield "large", torch.full((self._size,), plan.values["coefficient"][0][0], dtype=dtype)
        if self._kind == DIES:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._kind == FAILS:
            raise EvaluationError("merged tensor 'small' is not finite")
        if self._kind == DEVICE_FAULT:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self._kind == BREAKS:
            raise torch.OutOfMemoryError("no memory for it")
        if self._kind == HANGS:
            time.sleep(3600)
        yield "small", torch.arange(3, dtype=dtype)


def make_whole(kind=FINE):
    """Load a toy worker that merges whole models as ``kind`` says."""
    model = ToyModel()
    evaluators = dict.fromkeys(EXPERTS, ToyEvaluator())
    return Worker(model, ToyMerger(model), evaluators, whole=Whole(kind))


class Numbered:
    """Yields tensors that hold how many have merged before; the first ``n_bad`` misbehave."""

    def __init__(self, folder: Path, kind, n_bad):
        self._folder, self._kind, self._n_bad = folder, kind, n_bad

    def merged(self, plan, dtype=None):
        number = len(list(self._folder.glob("merges-*")))
        (self._folder / f"merges-{number}").touch()
        whole = Whole(self._kind if number < self._n_bad else FINE, size=2)
        for name, tensor in whole.merged(plan, dtype):
            yield name, torch.full_like(tensor, number)


def make_numbered(folder: Path, kind=FINE, n_bad=0):
    """Load a toy worker that notes in ``folder`` that it does, and that it merges."""
    (folder / f"loads-{os.getpid()}").touch()
    model = ToyModel()
    evaluators = dict.fromkeys(EXPERTS, ToyEvaluator())
    return Worker(model, ToyMerger(model), evaluators, whole=Numbered(folder, kind, n_bad))
