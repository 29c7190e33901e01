"""A worker: one resident model, merged and scored plan after plan."""

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from searchmerge.errors import DeviceFault, EvaluationError, SearchMergeError, WorkerError
from searchmerge.evaluators.evaluator import (
    Answer,
    Answering,
    Evaluator,
    Grading,
    TaskInfo,
    Tunable,
)
from searchmerge.execution.blocks import Block, BlockScores, Round
from searchmerge.execution.gradient import Gradients, Losses, LossRequest, LossResult, Merges
from searchmerge.plan import MergePlan


@dataclass(frozen=True, slots=True)
class RoundResult:
    """The scores of one round, and where the time went.

    Attributes:
        scores: One entry per block, in the order asked.
        merge_s: Seconds spent merging; 0 after a plan's first round.
        score_s: Seconds spent scoring.
    """

    scores: tuple[BlockScores, ...]
    merge_s: float
    score_s: float

    @property
    def seconds(self) -> float:
        """Seconds that the worker was at it."""
        return self.merge_s + self.score_s


class MergesWhole(Protocol):
    """Merges models that are not the resident one."""

    def merged(self, plan: MergePlan, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the base by name, merged or as it is, one at a time."""
        ...


Tuning = dict[str, dict[str, Any]]
"""Task to how it is scored, as its evaluator measured it: JSON."""


class Worker:
    """Merges plans into its model and scores them. It knows nothing of Ray or of Optuna.

    Args:
        model: The resident model.
        merger: Writes into that model's parameters.
        evaluators: Task name to the evaluator that scores it; several tasks may share one.
        gradients: Collects gradients by coefficients; ``None`` where none can be had.
        whole: Merges whole models, with what it keeps for ``merger``; ``None`` where it cannot.
    """

    def __init__(
        self,
        model: nn.Module,
        merger: Merges,
        evaluators: Mapping[str, Evaluator],
        gradients: Gradients | None = None,
        whole: MergesWhole | None = None,
    ) -> None:
        self._model = model
        self._merger = merger
        self._whole = whole
        self._evaluators = evaluators
        self._losses = Losses(model, merger, evaluators, gradients)

    def tasks(self) -> dict[str, TaskInfo]:
        """Return what the search must know of each task."""
        return {task: evaluator.tasks[task] for task, evaluator in self._evaluators.items()}

    @property
    def device(self) -> str:
        """Where the model lies: ``cpu``, or what its GPUs are called."""
        devices = {parameter.device for parameter in self._model.parameters()}
        names = {
            torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
            for device in devices
        }
        return ", ".join(sorted(names)) or "cpu"

    def tune(self, blocks: Round) -> Tuning:
        """Return how each task is scored soonest, measured with some blocks and the base.

        What cannot be scored says nothing.
        """
        tuning: Tuning = {}
        for task, group in itertools.groupby(blocks, key=lambda block: block.task):
            evaluator = self._evaluators[task]
            examples = [example for block in group for example in block.examples]
            if not isinstance(evaluator, Tunable):
                continue
            with _faults_named(), contextlib.suppress(EvaluationError):
                if of_task := evaluator.tune(self._model, task, examples):
                    tuning[task] = of_task
        return tuning

    def use(self, tuning: Tuning) -> None:
        """Score each task as was measured, here or elsewhere."""
        for task, evaluator in self._evaluators.items():
            if isinstance(evaluator, Tunable):
                evaluator.use(task, tuning.get(task, {}))

    def score(self, plan: MergePlan, rounds: Sequence[Round]) -> Iterator[RoundResult]:
        """Merge ``plan``, then yield each round's scores; a closed iterator stops at the next.

        Raises:
            EvaluationError: If the merged model cannot be scored.
            DeviceFault: If the device failed, and with it all that this process could compute.
        """
        start = time.perf_counter()
        with _faults_named():
            self._merger.apply(plan)
        merge_s = time.perf_counter() - start
        for blocks in rounds:
            start = time.perf_counter()
            with _faults_named():
                scores = tuple(self._score_round(blocks))
            yield RoundResult(scores, merge_s, time.perf_counter() - start)
            merge_s = 0.0

    def gradient(self, plan: MergePlan, request: LossRequest) -> Iterator[LossResult]:
        """Merge ``plan``, then yield once its losses and their gradient by its coefficients.

        Raises:
            EvaluationError: If a loss is not finite.
            SpecError: If a task has no such loss, or the plan's method is not linear in its
                coefficients.
            DeviceFault: If the device failed.
        """
        with _faults_named():
            result = self._losses.compute(plan, request)
        yield result

    def merged(self, plan: MergePlan, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors of a merged model by name, one at a time, on their devices.

        Args:
            plan: How they are merged.
            dtype: Of those that are floating-point.

        Raises:
            WorkerError: If whole models are not merged, or this device or process fails.
        """
        if self._whole is None:
            raise WorkerError("a worker merges no whole models")
        yield from _guarded(self._whole.merged(plan, dtype))

    def _score_round(self, blocks: Round) -> Iterator[BlockScores]:
        for task, group in itertools.groupby(blocks, key=lambda block: block.task):
            task_blocks, evaluator = list(group), self._evaluators[task]
            examples = [example for block in task_blocks for example in block.examples]
            try:
                values = iter(evaluator.score(self._model, task, examples))
            except SystemExit as error:  # it would end the run as if all had gone well
                raise EvaluationError(
                    f"task {task!r}: what it is scored by called sys.exit({error.code!r})"
                ) from error
            for block in task_blocks:
                wanted = evaluator.tasks[task].kind.n_values(len(block.examples))
                scores = tuple(itertools.islice(values, wanted))
                if len(scores) != wanted:
                    raise EvaluationError(
                        f"task {task!r}: its evaluator gave too few scores "
                        f"for {len(examples)} examples"
                    )
                yield BlockScores(
                    block, scores, _answers(evaluator, block), _grades(evaluator, block)
                )


def _grades(evaluator: Evaluator, block: Block) -> tuple[float, ...]:
    """Return how clearly a block's examples were answered; none where that is not known.

    Raises:
        EvaluationError: If there is not one finite number for each.
    """
    if not isinstance(evaluator, Grading):
        return ()
    grades = evaluator.grades(block.task, block.examples)
    if grades and (len(grades) != len(block.examples) or not all(map(math.isfinite, grades))):
        raise EvaluationError(
            f"task {block.task!r}: its evaluator graded {len(block.examples)} examples by "
            f"{grades}; one finite number each is wanted, or none"
        )
    return grades


def _answers(evaluator: Evaluator, block: Block) -> tuple[Answer, ...]:
    """Return what was said to those of a block's examples of which that is kept."""
    if not block.n_answers or not isinstance(evaluator, Answering):
        return ()
    return evaluator.answers(block.task, block.examples[: block.n_answers])


def _guarded(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors; raise ``WorkerError`` where another process, or device, may do better.

    That is wherever torch fails: for want of memory, or in a library of a GPU's.
    """
    try:
        with _faults_named():
            yield from weights
    except DeviceFault as error:
        raise WorkerError(f"a worker could not merge it: {error}") from error
    except SearchMergeError:
        raise
    except RuntimeError as error:
        raise WorkerError(f"a worker could not merge it: {error}") from error


@contextlib.contextmanager
def _faults_named() -> Iterator[None]:
    """Raise ``DeviceFault`` in place of an error that a device fault has led to."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None:
            if is_device_fault(cause):
                raise DeviceFault(f"the device failed: {cause}") from error
            cause = cause.__cause__
        raise


def is_device_fault(error: BaseException) -> bool:
    """Return whether an error leaves its process's CUDA or HIP context unusable."""
    return isinstance(error, RuntimeError) and str(error).startswith(("CUDA error", "HIP error"))
