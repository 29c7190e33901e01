"""Losses of a merged model and their gradient by the coefficients of its plan."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.activations import recomputed_activations
from searchmerge.evaluators.causal.fitting import Fitting
from searchmerge.evaluators.evaluator import Differentiable, Evaluator, LossKind, Predicting
from searchmerge.evaluators.loss import disagreement, entropy
from searchmerge.plan import MergePlan, Rows

Batch = tuple[int, ...]
"""Examples of one task whose mean loss is computed at once: one forward and backward pass."""


class Merges(Protocol):
    """Writes a plan's merged weights into the resident model."""

    def apply(self, plan: MergePlan) -> None:
        """Overwrite the model's merged parameters with what ``plan`` asks for."""
        ...


class Gradients(Protocol):
    """Collects the gradients of the resident model's parameters by a plan's coefficients."""

    def prepare(self, plan: MergePlan) -> None:
        """Have a plan merged alike, whatever was merged before."""
        ...

    def collecting(
        self, plan: MergePlan, *, several: bool = False
    ) -> AbstractContextManager[Callable[[], Rows]]:
        """Collect them; what is yielded returns those of all passes since its last call.

        Args:
            plan: The plan.
            several: Whether several backward passes are to come.
        """
        ...


@dataclass(frozen=True, slots=True)
class LossRequest:
    """Of what a loss is asked.

    Attributes:
        batches: Task name to batches of its examples.
        kind: Which loss.
        teachers: Task name to the plan of its own expert, for ``agreement``.
        gradient: Whether the gradient is asked for too.
        weights: Task name to the factor on its loss in what is differentiated; 1 for others.
    """

    batches: Mapping[str, tuple[Batch, ...]]
    kind: LossKind = "labels"
    teachers: Mapping[str, MergePlan] = field(default_factory=dict)
    gradient: bool = True
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LossResult:
    """What a request came to.

    Attributes:
        losses: Task name to the mean loss over each batch's examples.
        rows: The gradient of the weighted sum of the tasks' mean losses by the plan's
            coefficients: a row per group, a number per expert; none where it was not asked for.
        merge_s: Seconds spent merging.
        loss_s: Seconds spent on the losses and their gradient.
    """

    losses: Mapping[str, tuple[float, ...]]
    rows: Rows
    merge_s: float
    loss_s: float

    @property
    def seconds(self) -> float:
        """Seconds that the worker was at it."""
        return self.merge_s + self.loss_s


_HALF_SCALE = 1024.0
"""The factor on losses of a model in float16, where most gradients are below what that can tell
from 0. Where a gradient is above what it can hold the factor is made smaller; a power of two, it
changes nothing else."""

_SMALLER = 4.0  # what the factor is divided by then, until it is 1

_AT_ONCE: Mapping[LossKind, int] = {"labels": 64, "entropy": 16, "agreement": 16}
"""Examples whose losses are computed together where no gradient is asked for. Without labels all
that may come next counts, at every token of a text: that takes memory."""

_LEAST_KEPT = 1 / 8
"""Of a batch: where less than that is run at once, activations are computed again for the backward
pass. Smaller parts cost little more than one; what is computed again costs a third more, and
texts that share a beginning no longer share its pass."""

_MOST_TAUGHT = 1 << 30
"""Bytes of what experts answered that are kept; beyond them they are asked anew each time."""


def _finite(loss: Tensor, task: str, examples: Sequence[int]) -> float:
    """Return the mean loss of examples as a number.

    Raises:
        EvaluationError: If it is not finite.
    """
    value = float(loss)
    if not math.isfinite(value):
        raise EvaluationError(
            f"task {task!r}, examples {examples[0]} to {examples[-1]}: the loss is {value}, not a "
            "finite number"
        )
    return value


class Losses:
    """Computes losses of the resident model, and their gradients as backward passes go.

    Args:
        model: The resident model.
        merger: Writes into it.
        evaluators: Task name to what has its loss.
        gradients: Collects gradients; ``None`` where none can be had.
        most_taught: Bytes of what experts answered that are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        merger: Merges,
        evaluators: Mapping[str, Evaluator],
        gradients: Gradients | None,
        most_taught: int = _MOST_TAUGHT,
    ) -> None:
        self._model = model
        self._merger = merger
        self._evaluators = evaluators
        self._gradients = gradients
        self._fitting = Fitting()
        self._means_alone: set[str] = set()  # tasks without a loss for each example
        dtypes = {parameter.dtype for parameter in model.parameters()}
        self._scale = _HALF_SCALE if torch.float16 in dtypes else 1.0
        self._taught: dict[tuple[str, str, int], Tensor] = {}
        self._now_taught: dict[tuple[str, str, int], Tensor] = {}
        self._taught_room = most_taught

    def compute(self, plan: MergePlan, request: LossRequest) -> LossResult:
        """Merge ``plan`` and return its losses.

        Raises:
            EvaluationError: If a loss or its gradient is not finite, or does not fit into memory.
            SpecError: If a task has no such loss, or the plan's method is not linear in its
                coefficients.
        """
        for task in request.batches:
            self._check(task, request)
        start = time.perf_counter()
        self._learn(request)
        if self._gradients is not None:
            self._gradients.prepare(plan)
        self._merger.apply(plan)
        merged = time.perf_counter()
        try:
            losses, rows = self._fitting.run(lambda part: self._losses(plan, request, part))
        except torch.OutOfMemoryError as error:  # scores take less, and go on
            what = "its loss and gradient do not" if request.gradient else "its loss does not"
            raise EvaluationError(f"{what} fit into the device's memory: {error}") from error
        return LossResult(losses, rows, merged - start, time.perf_counter() - merged)

    def _check(self, task: str, request: LossRequest) -> None:
        losses = self._evaluators[task].tasks[task].losses
        if request.kind not in losses:
            raise SpecError(
                f"task {task!r} has no loss {request.kind!r} "
                f"(it has: {', '.join(losses) or 'none'})"
            )
        if request.kind == "agreement" and task not in request.teachers:
            raise SpecError(f"task {task!r} names no expert of its own to agree with")

    def _learn(self, request: LossRequest) -> None:
        """Have each task's own expert answer those of the examples whose answers are not kept."""
        self._now_taught.clear()
        if request.kind != "agreement":
            return
        for task, batches in request.batches.items():
            teacher, evaluator = request.teachers[task], self._evaluators[task]
            asked = dict.fromkeys(example for batch in batches for example in batch)
            wanted = [e for e in asked if (task, teacher.digest, e) not in self._taught]
            if not wanted or not isinstance(evaluator, Predicting):
                continue
            self._merger.apply(teacher)
            step = _AT_ONCE[request.kind]
            for its in (wanted[first : first + step] for first in range(0, len(wanted), step)):
                with torch.no_grad():
                    given = evaluator.log_probabilities(self._model, task, its)
                for example, answer in zip(its, given, strict=True):
                    self._keep_taught((task, teacher.digest, example), answer)

    def _keep_taught(self, key: tuple[str, str, int], answer: Tensor) -> None:
        """Keep what an expert answered: for good while there is room, else for this request."""
        fits = answer.nbytes <= self._taught_room
        self._taught_room -= answer.nbytes if fits else 0
        (self._taught if fits else self._now_taught)[key] = answer.clone()

    def _losses(
        self, plan: MergePlan, request: LossRequest, part: float
    ) -> tuple[dict[str, tuple[float, ...]], Rows]:
        """Return all losses and their gradient, computed on a part of each batch at once."""
        with ExitStack() as stack:
            rows: Callable[[], Rows] = tuple
            if request.gradient:
                if part < _LEAST_KEPT:
                    stack.enter_context(recomputed_activations(self._model))
                n_passes = sum(map(len, request.batches.values()))
                several = n_passes > 1 and part == 1
                rows = stack.enter_context(self._collecting(plan, several=several))
            else:
                stack.enter_context(torch.no_grad())
            return self._scaled(request, part, rows)

    def _scaled(
        self, request: LossRequest, part: float, rows: Callable[[], Rows]
    ) -> tuple[dict[str, tuple[float, ...]], Rows]:
        """Return losses, and their gradient by way of a multiple that the model's dtype can hold.

        Raises:
            EvaluationError: If one is not finite, or the gradient is not.
        """
        tasks, scale = request.batches, self._scale
        while True:
            losses = {task: tuple(self._values(task, request, part, scale)) for task in tasks}
            scaled = rows()
            if all(math.isfinite(number) for row in scaled for number in row):
                break
            if scale <= 1:
                raise EvaluationError(
                    f"the gradient of the loss of {', '.join(tasks)} is not finite"
                )
            scale /= _SMALLER
        self._scale = scale
        return losses, tuple(tuple(number / scale for number in row) for row in scaled)

    def _collecting(
        self, plan: MergePlan, *, several: bool
    ) -> AbstractContextManager[Callable[[], Rows]]:
        if self._gradients is None:
            raise SpecError("gradient: this worker's merger has none")
        return self._gradients.collecting(plan, several=several)

    def _values(self, task: str, request: LossRequest, part: float, scale: float) -> list[float]:
        """Return the mean loss of each batch, differentiated on the way where that is asked.

        What is differentiated is the loss times ``scale``.
        """
        batches = request.batches[task]
        if not request.gradient and (together := self._together(task, request, part)) is not None:
            return together
        factor = scale * request.weights.get(task, 1.0) / sum(map(len, batches))
        values = []
        for batch in batches:
            step = max(1, math.ceil(part * len(batch)))
            total = 0.0
            for first in range(0, len(batch), step):
                examples = batch[first : first + step]
                loss = self._loss(task, request, examples).mean()
                total += _finite(loss.detach(), task, examples) * len(examples)
                if request.gradient:
                    (loss * factor * len(examples)).backward()  # type: ignore[no-untyped-call]
            values.append(total / len(batch))
        return values

    def _together(self, task: str, request: LossRequest, part: float) -> list[float] | None:
        """Return the mean loss of each batch, of all batches' examples run together.

        That takes fewer passes, with less padding.

        Returns:
            None where the evaluator gives no loss for each example.
        """
        batches = request.batches[task]
        examples = [example for batch in batches for example in batch]
        step = max(1, math.ceil(part * _AT_ONCE[request.kind]))
        losses: list[float] = []
        for first in range(0, len(examples), step):
            its = examples[first : first + step]
            if task in self._means_alone:
                return None
            loss = self._loss(task, request, its)
            if len(its) > 1 and loss.numel() == 1:
                self._means_alone.add(task)
                return None
            _finite(loss.mean(), task, its)
            losses += loss.flatten().tolist()
        each = iter(losses)
        return [sum(next(each) for _ in batch) / len(batch) for batch in batches]

    def _loss(self, task: str, request: LossRequest, examples: Sequence[int]) -> Tensor:
        evaluator = self._evaluators[task]
        if request.kind == "labels" and isinstance(evaluator, Differentiable):
            return evaluator.loss(self._model, task, examples)
        if request.kind != "labels" and isinstance(evaluator, Predicting):
            given = evaluator.log_probabilities(self._model, task, examples)
            if request.kind == "entropy":
                return entropy(given)
            teacher = request.teachers[task].digest
            keys = [(task, teacher, example) for example in examples]
            taught = [self._taught.get(k, self._now_taught.get(k)) for k in keys]
            return disagreement(given, [answer for answer in taught if answer is not None])
        raise SpecError(f"task {task!r}: its evaluator computes no loss {request.kind!r}")
