"""Scores from the user's own function."""

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn

from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.evaluator import EVALUATORS, TaskInfo

UserFunction = Callable[[nn.Module, str, Sequence[int]], Sequence[float]]
"""Takes the resident model, a task and examples; returns one score per example."""


@EVALUATORS.register("function")
class FunctionEvaluator:
    """Calls ``function(model, task, examples)`` for every block.

    Args:
        function: ``module:function``.
        tasks: Task name to how many examples it has.
        search_path: A folder to import the module from, beside the usual ones.

    Raises:
        SpecError: If the function cannot be imported.
    """

    def __init__(
        self, function: str, tasks: Mapping[str, int], *, search_path: Path | None = None
    ) -> None:
        self.tasks: Mapping[str, TaskInfo] = {
            task: TaskInfo(n_examples) for task, n_examples in tasks.items()
        }
        self._name = function
        self._function = import_function(function, search_path)

    def score(self, model: nn.Module, task: str, examples: Sequence[int]) -> tuple[float, ...]:
        """Return what the user's function returns for these examples.

        Raises:
            EvaluationError: If it raises, or returns another count, or a number not finite.
        """
        try:
            scores = tuple(float(score) for score in self._function(model, task, examples))
        except Exception as error:  # the user's code may raise anything
            reason = " ".join(str(error).split())
            raise EvaluationError(
                f"task {task!r}: {self._name} raised {type(error).__name__}: {reason}"
            ) from error
        if len(scores) != len(examples):
            raise EvaluationError(
                f"task {task!r}: {self._name} returned {len(scores)} scores "
                f"for {len(examples)} examples"
            )
        for example, score in zip(examples, scores, strict=True):
            if not math.isfinite(score):
                raise EvaluationError(
                    f"task {task!r}: {self._name} scored example {example} {score}"
                )
        return scores


def import_function(name: str, search_path: Path | None = None) -> UserFunction:
    """Return the function that ``module:function`` names.

    Raises:
        SpecError: If the module cannot be imported, or has no such function.
    """
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise SpecError(f"function {name!r} is not of the form module:function")
    if search_path is not None and str(search_path) not in sys.path:
        sys.path.insert(0, str(search_path))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing the user's module runs the user's code
        reason = " ".join(str(error).split())
        raise SpecError(
            f"function {name!r}: module {module_name!r} cannot be imported "
            f"({type(error).__name__}: {reason})"
        ) from error
    function: UserFunction | None = getattr(module, attribute, None)
    if not callable(function):
        raise SpecError(f"function {name!r}: module {module_name!r} has no function {attribute!r}")
    return function
