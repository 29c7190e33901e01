"""Calling the user's code: what it raises, what it returns, and what it does to the model."""

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from searchmerge.errors import EvaluationError, StudyError
from searchmerge.wording import counted

_NO_LIST = (str, bytes, Mapping, Set)


@contextmanager
def user_code(what: str, error_type: type[Exception]) -> Iterator[None]:
    """Raise an error that names the user's code in place of whatever that raises.

    ``sys.exit`` is no exception to this: it would end the run as if all had gone well. What is
    said of what the code returned is raised as it is.

    Args:
        what: The code, and where it is used.
        error_type: Of the error that is raised instead.
    """
    try:
        yield
    except (KeyboardInterrupt, EvaluationError):
        raise
    except SystemExit as error:
        raise error_type(f"{what} called sys.exit({error.code!r})") from error
    except BaseException as error:  # the user's code may raise anything
        reason = " ".join(str(error).split())
        raise error_type(f"{what} raised {type(error).__name__}: {reason}") from error


class Scored(NamedTuple):
    """What the user's function said of examples.

    Attributes:
        scores: One each.
        grades: How clearly each was answered; none where the function does not say.
    """

    scores: tuple[float, ...]
    grades: tuple[float, ...] = ()


def as_scores(returned: Any, examples: Sequence[int], what: str) -> Scored:
    """Return what the user's function returned, if it is a number, or a pair, per example.

    Args:
        returned: A list, tuple, array or tensor; or what gives numbers, or pairs of a score and
            a grade, when it is iterated over.
        examples: The examples that it was asked for.
        what: The function, and where it is used.

    Raises:
        EvaluationError: If it is anything else, or a number is not finite.
    """
    if isinstance(returned, _NO_LIST) or not hasattr(returned, "__iter__"):
        raise EvaluationError(
            f"{what} returned {_shown(returned)}; a list of one number, or one "
            "pair (score, grade), per example is needed"
        )
    with user_code(what, EvaluationError):
        scores = list(returned)
        if getattr(returned, "ndim", 1) == 2:  # rows of an array or tensor
            scores = [tuple(row) for row in scores]
    if len(scores) != len(examples):
        raise EvaluationError(
            f"{what} returned {counted(len(scores), 'score')} "
            f"for {counted(len(examples), 'example')}"
        )
    if not all(isinstance(score, tuple | list) and len(score) == 2 for score in scores):
        return Scored(_numbers(scores, examples, f"{what} scored"))
    return Scored(
        _numbers([score for score, _ in scores], examples, f"{what} scored"),
        _numbers([grade for _, grade in scores], examples, f"{what} graded"),
    )


def _numbers(given: Sequence[Any], examples: Sequence[int], what: str) -> tuple[float, ...]:
    """Return what was given for examples as finite numbers."""
    numbers = []
    for example, value in zip(examples, given, strict=True):
        number = _number(value)
        if number is None:
            raise EvaluationError(
                f"{what} example {example} {_shown(value)}; a finite number is needed"
            )
        numbers.append(number)
    return tuple(numbers)


def as_loss(returned: Any, what: str, n_examples: int) -> Tensor:
    """Return what the user's function returned as a loss: one number, or one for each example.

    Args:
        returned: A tensor; where gradients are enabled it has to have one.
        what: The function, and where it is used.
        n_examples: Of how many examples.

    Raises:
        EvaluationError: If it is anything else.
    """
    if not isinstance(returned, Tensor) or returned.numel() not in (1, n_examples):
        raise EvaluationError(
            f"{what} returned {_shown(returned)}; a tensor of one number is needed, the mean over "
            f"the examples, or of {n_examples}, one for each"
        )
    if torch.is_grad_enabled() and not returned.requires_grad:
        raise EvaluationError(
            f"{what} returned a loss that does not depend on the model's weights"
        )
    return returned.reshape(()) if returned.numel() == 1 else returned.flatten()


def _number(score: Any) -> float | None:
    """Return a score as a finite number; ``None`` where it is none, a truth value included."""
    if isinstance(score, Tensor) and score.numel() != 1:
        return None
    value = score.item() if hasattr(score, "item") else score
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if number - number == 0 else None  # NaN or inf


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:80] + '...'} ({type(value).__name__})"


class _Place(NamedTuple):
    """Where a parameter or buffer is, and in what form."""

    data_ptr: int
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]


@contextmanager
def model_kept(model: nn.Module, what: str) -> Iterator[None]:
    """Let the user's code have the resident model, and see that it is the same afterwards.

    Merges write into the memory of its parameters: a model that was converted, moved or taken
    apart would never be reached again, and every later score would be that of one plan. What
    can be put right is: training modes, gradients, torch's defaults.

    Args:
        model: The resident model.
        what: The user's code, and where it is used.

    Raises:
        StudyError: If a parameter or buffer is not where or what it was.
    """
    places = _places(model)
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for parameter, _, _ in gradients:
        parameter.grad = None
    default, enabled = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        torch.set_grad_enabled(enabled)
        _check_places(places, _places(model), what)
        for module, training in modes:
            if module.training != training:
                module.training = training
        for parameter, required, gradient in gradients:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _places(model: nn.Module) -> dict[str, _Place]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: _Place(t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for name, t in named
    }


def _check_places(before: Mapping[str, _Place], now: Mapping[str, _Place], what: str) -> None:
    advice = "it may read the model it is given; to change one it needs a copy of its own"
    for name, place in before.items():
        if name not in now:
            raise StudyError(f"{what} took {name!r} out of the model; {advice}")
        if now[name] != place:
            was, became = (f"{p.dtype} {list(p.shape)} on {p.device}" for p in (place, now[name]))
            became = became if became != was else "the same in another place"
            raise StudyError(f"{what} made of the model's {name!r}, {was}, {became}; {advice}")
    for name in now:
        if name not in before:
            raise StudyError(f"{what} put {name!r} into the model; {advice}")
