"""What an evaluator is, the examples it scores, and the registry of those there are."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import nn

from searchmerge.registry import Registry

Part = Literal["survey", "select", "hold_out"]
"""``select`` is what trials see; ``hold_out`` is what only the confirmation sees. ``survey`` is
the same examples as ``select``, cut into blocks at random: the references are scored on it first,
and what they score decides how ``select`` is cut."""

Aggregate = Callable[[Sequence[float]], float]
"""Makes the score of any examples, drawn twice or not at all, from one record of each."""


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What the search must know of a task before anything is scored.

    Attributes:
        n_examples: How many examples the task has, in a fixed order.
        mean: Whether the task's score is the mean of its examples' scores. Where it is not,
            the task is scored in one block, whose score is one number.
        metric: Name of the score, for reports: ``"acc"``.
        aggregate: Where the score is no mean, what makes it from one record per example, so
            that the confirmation can resample examples; ``None`` where only the score is known.
            It is sent between processes.
    """

    n_examples: int
    mean: bool = True
    metric: str = "score"
    aggregate: Aggregate | None = None


class Evaluator(Protocol):
    """Scores whatever weights are in a model now, and leaves them as they were."""

    tasks: Mapping[str, TaskInfo]

    def score(self, model: nn.Module, task: str, examples: Sequence[int]) -> tuple[float, ...]:
        """Return one number per example, higher is better.

        Of a task whose score is no mean it is one record per example, for the task's
        ``aggregate`` to make a score from; or one number in all where it has none.

        The same weights and the same ``examples`` give the same scores, in any process and
        after any other call.

        Args:
            model: The resident model.
            task: One of ``tasks``.
            examples: Positions in the task's fixed order, each in [0, n_examples).

        Raises:
            EvaluationError: If the model cannot be scored, e.g. its logits are not finite; it
                names the task and the example.
        """
        ...


EVALUATORS: Registry[type[Evaluator]] = Registry("evaluator")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep dropout off, and leave the model's mode as it was."""
    if not model.training:  # to set it once more would visit every module
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
