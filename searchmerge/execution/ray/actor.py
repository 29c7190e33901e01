"""The actor of one worker, and what it says."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import ray
import torch
from torch import Tensor

from searchmerge.errors import DeviceFault, SearchMergeError
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.execution.blocks import Round
from searchmerge.execution.gradient import LossRequest, LossResult
from searchmerge.execution.worker import RoundResult, Tuning, Worker
from searchmerge.plan import MergePlan

_REPORT_S = 0.005  # what a dying process needs to send off its last report: 1 ms, measured


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Placed:
    """What a worker says once it has a node and begins to load.

    Attributes:
        node: Ray's name of it.
        host: What its machine is called.
    """

    node: str
    host: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a worker says once it can work.

    Attributes:
        tasks: What the search must know of each task.
        device: Where its model lies, in words.
    """

    tasks: dict[str, TaskInfo]
    device: str


@dataclass(frozen=True, slots=True)
class Begun:
    """A worker took up a job: from here on, its death may be the plan's doing."""


class RayWorker:
    """A worker in a process of its own. Ray keeps it until it is killed."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        self._worker: Worker | None = None
        self._weights: Iterator[tuple[str, Tensor]] = iter(())

    def load(self, make_worker: Callable[[], Worker]) -> Iterator[Placed | Loaded]:
        """Yield where it is, then load the model and yield what can be done with it."""
        here = ray.get_runtime_context()
        yield Placed(here.get_node_id(), socket.gethostname())
        time.sleep(_REPORT_S)
        worker = self._worker = make_worker()
        numbers = ", ".join(here.get_accelerator_ids().get("GPU", ()))
        yield Loaded(
            dict(worker.tasks()), f"GPU {numbers} ({worker.device})" if numbers else worker.device
        )

    def tune(self, blocks: Round) -> Iterator[Tuning]:
        """Yield how each task is scored soonest."""
        yield self._loaded().tune(blocks)

    def score(
        self, plan: MergePlan, rounds: Sequence[Round], tuning: Tuning
    ) -> Iterator[Begun | RoundResult | DeviceFault]:
        """Yield that the job is taken up, then each round's scores; a fault ends them."""
        worker = self._loaded()
        worker.use(tuning)
        yield from _taken_up(worker.score(plan, rounds))

    def gradient(
        self, plan: MergePlan, request: LossRequest
    ) -> Iterator[Begun | LossResult | DeviceFault]:
        """Yield that the job is taken up, then its losses and gradient, or a fault."""
        yield from _taken_up(self._loaded().gradient(plan, request))

    def begin_merging(self, plan: MergePlan, dtype: torch.dtype) -> None:
        """Have :meth:`next_weight` give the tensors of a merged model from the first on."""
        self._weights = self._loaded().merged(plan, dtype)

    def next_weight(self) -> tuple[str, Tensor] | SearchMergeError | None:
        """Return the next tensor's name and it, on the CPU; ``None`` at the end, or an error."""
        try:
            named = next(self._weights, None)
        except SearchMergeError as error:
            return error
        return None if named is None else (named[0], named[1].cpu())

    def _loaded(self) -> Worker:
        if self._worker is None:
            raise RuntimeError("a job was given to a worker that has loaded no model")
        return self._worker


def _taken_up(results: Iterator[T]) -> Iterator[Begun | T | DeviceFault]:
    """Yield that a job is taken up, then its results; a fault ends them."""
    yield Begun()
    time.sleep(_REPORT_S)
    try:
        yield from results
    except DeviceFault as fault:
        yield fault
