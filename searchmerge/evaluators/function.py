"""Scores from the user's own function."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from torch import Tensor, nn

from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.evaluator import (
    EVALUATORS,
    EvaluationContext,
    EvaluatorKind,
    LossKind,
    NoKeys,
    PartInfo,
    TaskInfo,
    needed,
)
from searchmerge.evaluators.user_code import as_loss, as_scores, model_kept, user_code

UserFunction = Callable[
    [nn.Module, str, Sequence[int]], Sequence[float] | Sequence[tuple[float, float]]
]
"""Takes the resident model, a task and examples; returns one score per example, or one pair: the
score, and how clearly the example was answered, e.g. by which margin."""


@dataclass(frozen=True)
class Counts:
    """How many examples each part of a task is drawn from.

    Attributes:
        select: The first ones.
        hold_out: Those that follow.
    """

    select: Annotated[int, Ge(1)]
    hold_out: Annotated[int, Ge(1)]


UserLoss = Callable[[nn.Module, str, Sequence[int]], Tensor]
"""Takes the same; returns one number, lower is better, that can be differentiated."""


@dataclass(frozen=True)
class FunctionKeys:
    """The keys of a task that a function of the user's scores.

    Attributes:
        function: ``module:function``, in a module of the study's folder or an installed one.
        n_examples: How many examples the task has, 2 or more; or how many ``select`` is drawn
            from, the first ones, and how many that follow them ``hold_out`` is drawn from.
        loss: ``module:function`` of what gives a loss, for coefficients by gradient: it takes the
            same, and returns one number, lower is better, that torch can differentiate.
    """

    function: str = needed("name your function as module:function")
    n_examples: Annotated[int, Ge(2)] | Counts = needed(
        "say how many examples your function can score"
    )
    loss: str | None = None

    @property
    def info(self) -> TaskInfo:
        """Return what is known of the task."""
        losses: tuple[LossKind, ...] = ("labels",) if self.loss else ()
        if isinstance(self.n_examples, int):
            return TaskInfo(self.n_examples, losses=losses)
        select, hold_out = self.n_examples.select, self.n_examples.hold_out
        return TaskInfo.of_parts(
            PartInfo(f"n_examples.select of {self.function}", select),
            PartInfo(f"n_examples.hold_out of {self.function}", hold_out),
            losses=losses,
        )


class FunctionEvaluator:
    """Calls ``function(model, task, examples)`` for every block.

    Args:
        function: ``module:function``.
        tasks: Task name to what is known of it.
        loss: The same, of a function that returns a loss; ``None`` for no such function.
        search_path: A folder to import the module from, beside the usual ones.

    Raises:
        SpecError: If a function cannot be imported.
    """

    def __init__(
        self,
        function: str,
        tasks: Mapping[str, TaskInfo],
        *,
        loss: str | None = None,
        search_path: Path | None = None,
    ) -> None:
        self.tasks = tasks
        self._name, self._loss_name = function, loss or ""
        self._grades: dict[str, dict[int, float]] = {task: {} for task in tasks}
        self._function: UserFunction = import_function(function, search_path)
        self._loss: UserLoss | None = import_function(loss, search_path) if loss else None

    def score(self, model: nn.Module, task: str, examples: Sequence[int]) -> tuple[float, ...]:
        """Return the scores that the user's function returns for these examples.

        Raises:
            EvaluationError: If it raises, or returns anything but one finite number each, or one
                pair of them.
            StudyError: If it changes the model.
        """
        what = f"task {task!r}: {self._name}"
        with model_kept(model, what), user_code(what, EvaluationError):
            returned = self._function(model, task, examples)
            scores, grades = as_scores(returned, examples, what)
        self._grades[task] = dict(zip(examples, grades, strict=bool(grades)))
        return scores

    def grades(self, task: str, examples: Sequence[int]) -> tuple[float, ...]:
        """Return how clearly examples were answered, where the function said so."""
        graded = self._grades[task]
        return tuple(graded[example] for example in examples) if graded else ()

    def loss(self, model: nn.Module, task: str, examples: Sequence[int]) -> Tensor:
        """Return what the user's loss returns for these examples.

        Raises:
            EvaluationError: If it raises, or returns anything but one number that can be
                differentiated.
            StudyError: If it changes the model.
        """
        what = f"task {task!r}: {self._loss_name or 'it has no loss'}"
        with model_kept(model, what), user_code(what, EvaluationError):
            returned = self._loss(model, task, examples) if self._loss else None
        return as_loss(returned, what, len(examples))


def import_function(name: str, search_path: Path | None = None) -> Any:
    """Return the function that ``module:function`` names.

    Raises:
        SpecError: If the module cannot be imported, or has no such function.
    """
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise SpecError(f"function {name!r} is not of the form module:function")
    if search_path is not None and str(search_path) not in sys.path:
        sys.path.insert(0, str(search_path))
    with user_code(f"function {name!r}: importing module {module_name!r}", SpecError):
        module = importlib.import_module(module_name)
    function: Any = getattr(module, attribute, None)
    if not callable(function):
        raise SpecError(f"function {name!r}: module {module_name!r} has no function {attribute!r}")
    return function


def _build(
    tasks: Mapping[str, FunctionKeys], section: NoKeys, context: EvaluationContext
) -> dict[str, FunctionEvaluator]:
    return {
        name: FunctionEvaluator(
            task.function, {name: task.info}, loss=task.loss, search_path=context.folder
        )
        for name, task in tasks.items()
    }


def _modules(tasks: Mapping[str, FunctionKeys], section: NoKeys) -> list[str]:
    modules = [task.function.partition(":")[0] for task in tasks.values()]
    return [f"{module.replace('.', '/')}.py" for module in modules]


EVALUATORS.register("function")(
    EvaluatorKind(
        keys=FunctionKeys,
        section=NoKeys,
        build=_build,
        model_classes=lambda tasks, section: (),
        places=_modules,
        free_keys=("loss",),
    )
)
