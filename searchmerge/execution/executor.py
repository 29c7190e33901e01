"""Where plans are run: the executor protocol, and the executor that runs them here and now."""

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from searchmerge.errors import EvaluationError, WorkerError
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.execution.blocks import Round
from searchmerge.execution.gradient import LossRequest, LossResult
from searchmerge.execution.worker import RoundResult, Tuning, Worker
from searchmerge.plan import MergePlan


@dataclass(frozen=True, slots=True)
class Scored:
    """A round of a job was scored."""

    job: int
    result: RoundResult


@dataclass(frozen=True, slots=True)
class Differentiated:
    """The losses of a job are computed, and their gradient."""

    job: int
    result: LossResult


@dataclass(frozen=True, slots=True)
class Finished:
    """A job's last round was scored, and its worker is free."""

    job: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A job's candidate cannot be scored; another try would end the same way."""

    job: int
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """A job's worker died or hung; another may do better.

    Attributes:
        job: The job that the worker was at.
        reason: What became of the worker.
        blameless: Whether the job cannot have caused it, e.g. its node was taken away.
        was_begun: Whether the worker took the job up at all; a job that was not is blameless.
    """

    job: int
    reason: str
    blameless: bool = False
    was_begun: bool = True


Event = Scored | Differentiated | Finished | Failed | Lost

Write = Callable[[Iterator[tuple[str, Tensor]]], None]
"""Takes all tensors of a merged model by name, one at a time, on any device."""


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker as it is at a moment.

    Attributes:
        name: What it is called; no other of its executor is or was called the same.
        node: The machine it runs on; empty until it has one.
        device: Where its model lies, in words; empty until it has loaded.
        doing: ``waiting`` for room on a node, ``loading``, ``idle`` or ``working``.
        job: What it works on, where that is known.
    """

    name: str
    node: str
    device: str
    doing: Literal["waiting", "loading", "idle", "working"]
    job: int | None = None


class Executor(Protocol):
    """Runs jobs on workers, each a plan and what to do with it: score it, or differentiate.

    A job ends with ``Finished``, ``Failed`` or ``Lost``, when it is stopped, or when
    ``next_event`` raises what it ended with and is no fault of its candidate.
    """

    def tasks(self) -> Mapping[str, TaskInfo]:
        """Return what the search must know of each task."""
        ...

    @property
    def n_free(self) -> int:
        """How many jobs could be submitted now; may change as workers come and go."""
        ...

    def workers(self) -> Sequence[WorkerState]:
        """Return each worker that there is, as it is now."""
        ...

    def tune(self, blocks: Round) -> Tuning:
        """Return how each task is scored soonest, as one worker measured it."""
        ...

    def use(self, tuning: Tuning) -> None:
        """Let every worker score each task so from now on."""
        ...

    def submit(self, job: int, plan: MergePlan, rounds: Sequence[Round]) -> None:
        """Start a job on a free worker; ``job`` is a number not in use."""
        ...

    def submit_gradient(self, job: int, plan: MergePlan, request: LossRequest) -> None:
        """Start a job that computes losses and their gradient; the same of its number."""
        ...

    def write_merged(self, plan: MergePlan, dtype: torch.dtype, write: Write) -> None:
        """Have a worker merge a whole model, once all jobs have ended.

        Args:
            plan: How it is merged.
            dtype: Of its tensors that are floating-point.
            write: Is given one worker's tensors. Where they end with ``WorkerError``, which it
                has to let pass, it is called anew with those of another.

        Raises:
            WorkerError: If no worker can; another process may do better.
            SearchMergeError: What ``write`` raises, or :meth:`Merger.merged`: another worker
                would end the same way.
        """
        ...

    def stop(self, job: int) -> None:
        """Give up a job; nothing more is heard of it."""
        ...

    def next_event(self, timeout_s: float) -> Event | None:
        """Wait for the next event.

        Returns:
            The event; ``None`` where there is none within ``timeout_s``, or where a worker has
            become free in the meantime without one.
        """
        ...

    def close(self) -> None:
        """Let go of all workers."""
        ...


def event_of(job: int, result: RoundResult | LossResult) -> Scored | Differentiated:
    """Return the event that a worker's result is."""
    if isinstance(result, LossResult):
        return Differentiated(job, result)
    return Scored(job, result)


class InProcessExecutor:
    """One worker in this very process: for one GPU, for tests, and for a debugger."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._job: int | None = None
        self._results: Iterator[RoundResult | LossResult] = iter(())

    def tasks(self) -> Mapping[str, TaskInfo]:
        """Return what the search must know of each task."""
        return self._worker.tasks()

    @property
    def n_free(self) -> int:
        """One where nothing runs, else none."""
        return int(self._job is None)

    def workers(self) -> list[WorkerState]:
        """Return the one worker."""
        doing: Literal["idle", "working"] = "idle" if self._job is None else "working"
        return [
            WorkerState("worker 1", socket.gethostname(), self._worker.device, doing, self._job)
        ]

    def tune(self, blocks: Round) -> Tuning:
        """Return how each task is scored soonest."""
        return self._worker.tune(blocks)

    def use(self, tuning: Tuning) -> None:
        """Let the worker score each task so from now on."""
        self._worker.use(tuning)

    def submit(self, job: int, plan: MergePlan, rounds: Sequence[Round]) -> None:
        """Start a job; its work is done inside :meth:`next_event`."""
        self._start(job, self._worker.score(plan, rounds))

    def submit_gradient(self, job: int, plan: MergePlan, request: LossRequest) -> None:
        """Start a job; its work is done inside :meth:`next_event`."""
        self._start(job, self._worker.gradient(plan, request))

    def write_merged(self, plan: MergePlan, dtype: torch.dtype, write: Write) -> None:
        """Merge a whole model here."""
        if self._job is not None:
            raise WorkerError(f"the one worker is at job {self._job}")
        write(self._worker.merged(plan, dtype))

    def _start(self, job: int, results: Iterator[RoundResult | LossResult]) -> None:
        if self._job is not None:
            raise RuntimeError(f"job {job} was submitted while job {self._job} runs")
        self._job, self._results = job, results

    def stop(self, job: int) -> None:
        """Give up the job."""
        if self._job == job:
            self._job = None

    def next_event(self, timeout_s: float) -> Event | None:
        """Score one round of the job, or differentiate."""
        if (job := self._job) is None:
            return None
        self._job = None  # whatever is raised ends the job
        try:
            result = next(self._results)
        except StopIteration:
            return Finished(job)
        except EvaluationError as error:
            return Failed(job, str(error))
        self._job = job
        return event_of(job, result)

    def close(self) -> None:
        """Forget the job, if there is one."""
        self._job = None
