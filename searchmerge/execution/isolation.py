"""Which examples have no finite loss or gradient, and what those of the others come to."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from searchmerge.errors import EvaluationError
from searchmerge.plan import Rows

LeftOut = Mapping[str, Mapping[int, str]]
"""Task name to those of its examples that are left out, each with why."""

_SMALLER = 4.0  # what the factor on losses is divided by where gradients are not finite

_MOST_LEFT_OUT = 1 / 2
"""Of a request's examples: where more of them have no finite loss, the plan has none."""


@dataclass(slots=True)
class Sum:
    """What some examples came to.

    Attributes:
        n: How many they are, without those that are left out.
        loss: The sum of their losses.
        rows: The gradient of that sum times a factor, ``(n_groups, n_experts)``; 0 of none.
    """

    n: int = 0
    loss: float = 0.0
    rows: npt.NDArray[np.float64] | float = 0.0

    def __add__(self, other: "Sum") -> "Sum":
        return Sum(self.n + other.n, self.loss + other.loss, self.rows + other.rows)

    @property
    def mean(self) -> float:
        """The mean loss; NaN of no example."""
        return self.loss / self.n if self.n else math.nan


@dataclass(frozen=True, slots=True)
class Isolation:
    """Halves examples until those without a finite loss or gradient stand alone.

    Halves are run by themselves: within one pass what is not finite spreads, as 0 times NaN does
    where the loss is that of the others alone.

    Attributes:
        mean: Returns the mean loss of examples of a task.
        rows: Returns the gradient of the backward passes since its last call; ``None`` where no
            gradient is asked for.
        scale: The factor on what is differentiated, 1 or more: smaller where that overflows.
        n_examples: How many there are in all tasks.
        left_out: Task name to the examples that are left out, each with why.
    """

    mean: Callable[[str, Sequence[int]], Tensor]
    rows: Callable[[], Rows] | None
    scale: float
    n_examples: int
    left_out: dict[str, dict[int, str]] = field(default_factory=dict, init=False)

    def sum_of(self, task: str, examples: Sequence[int], at_once: int, factor: float) -> Sum:
        """Return what a task's examples come to, without those that are left out.

        Args:
            task: The task.
            examples: Of that task, one or more.
            at_once: How many of them are run together at most.
            factor: On the gradient.

        Raises:
            EvaluationError: If too many of all tasks' examples are left out.
        """
        if len(examples) <= at_once:
            found = self._together(task, examples, factor)
            if isinstance(found, Sum):
                return found
            if len(examples) == 1:
                self._leave_out(task, examples[0], found)
                return Sum()
        middle = len(examples) // 2
        halves = (examples[:middle], examples[middle:])
        first, second = (self.sum_of(task, half, at_once, factor) for half in halves)
        return first + second

    def _together(self, task: str, examples: Sequence[int], factor: float) -> Sum | str:
        """Return what examples come to in one pass, or what of it is not finite."""
        n = len(examples)
        for scale in scales(self.scale):
            loss = self.mean(task, examples)
            value = float(loss.detach())
            if not math.isfinite(value):
                return f"its loss is {value}"
            if self.rows is None:
                return Sum(n, n * value)
            (loss * (n * factor * scale)).backward()  # type: ignore[no-untyped-call]
            rows = np.array(self.rows())
            if np.isfinite(rows).all():
                return Sum(n, n * value, rows / scale)
        return "the gradient of its loss is not finite"

    def _leave_out(self, task: str, example: int, why: str) -> None:
        self.left_out.setdefault(task, {})[example] = why
        n = sum(map(len, self.left_out.values()))
        if n > _MOST_LEFT_OUT * self.n_examples:
            raise EvaluationError(
                f"{n} or more of {self.n_examples} examples have no finite loss and gradient; "
                f"{told(self.left_out)[0]}"
            )


def scales(largest: float) -> Iterator[float]:
    """Yield factors on a loss from the largest down to 1."""
    while largest >= 1:
        yield largest
        largest /= _SMALLER


def told(left_out: LeftOut) -> list[str]:
    """Return what is left out, each example with its task and why, in words."""
    return [
        f"task {task!r}, example {example}: {why}"
        for task, examples in left_out.items()
        for example, why in examples.items()
    ]
