"""What a user's function may return and do, and who is told to have done it."""

import numpy as np
import pytest
import torch
from torch import nn

from searchmerge.errors import EvaluationError, SpecError, StudyError
from searchmerge.evaluators.user_code import as_scores, model_kept, user_code


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5],
        (1.0, 0.5),
        np.array([1.0, 0.5]),
        torch.tensor([1.0, 0.5]),
        [torch.tensor(1.0), np.float32(0.5)],
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_list_of_numbers_is_scores(returned):
    scores, grades = as_scores(returned, [3, 4], "task 't': m:f")
    assert scores == (1.0, 0.5)
    assert all(type(score) is float for score in scores)
    assert grades == ()


@pytest.mark.parametrize(
    "returned",
    [
        [0.5],
        [0.5, 0.5, 0.5],
        0.5,
        None,
        "ab",
        [0.5, "good"],
        [0.5, None],
        [0.5, float("nan")],
        [float("inf"), 0.5],
        [True, False],
        [torch.ones(2), torch.ones(2)],
    ],
    ids=repr,
)
def test_anything_else_is_refused_by_the_name_of_what_returned_it(returned):
    with pytest.raises(EvaluationError, match=r"^task 't': m:f \S"):
        as_scores(returned, [3, 4], "task 't': m:f")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("no\nrow"), "raised ValueError: no row"),
        (KeyError("gold"), "raised KeyError: 'gold'"),
        (SystemExit(0), r"called sys\.exit\(0\)"),
    ],
)
def test_whatever_users_code_raises_is_told_as_theirs(error, told):
    with (
        pytest.raises(SpecError, match=f"^m:f {told}$"),
        user_code("m:f", SpecError),
    ):
        raise error


def test_an_interrupt_is_not_the_users_code():
    with pytest.raises(KeyboardInterrupt), user_code("m:f", SpecError):
        raise KeyboardInterrupt


def test_a_model_that_was_only_read_is_kept():
    model = nn.Linear(2, 2)
    with model_kept(model, "m:f"):
        model(torch.ones(1, 2))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: setattr(model, "weight", nn.Parameter(torch.ones(2, 2))),
        lambda model: model.register_parameter("bias", None),
    ],
    ids=["converted", "replaced", "taken away"],
)
def test_a_model_that_was_changed_stops_the_study(change):
    model = nn.Linear(2, 2)
    with pytest.raises(StudyError, match=r"m:f.*(weight|bias)"), model_kept(model, "m:f"):
        change(model)


def test_pairs_are_scores_and_grades():
    told = as_scores([(1, 0.25), (torch.tensor(0.0), -2)], [3, 4], "m:f")
    assert told.scores == (1.0, 0.0)
    assert told.grades == (0.25, -2.0)


@pytest.mark.parametrize("made", [torch.tensor, np.array, list])
def test_pairs_may_be_the_rows_of_a_tensor_an_array_or_a_list(made):
    told = as_scores(made([[1.0, 0.25], [0.0, -2.0]]), [3, 4], "m:f")
    assert told.scores == (1.0, 0.0)
    assert told.grades == (0.25, -2.0)


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ([(1.0, float("nan")), (0.0, 1.0)], "graded example 3 nan"),
        ([(1.0, 0.5), 0.0], "scored example 3"),
        ([(1.0, 0.5, 2.0), (0.0, 1.0, 2.0)], "scored example 3"),
    ],
)
def test_pairs_that_are_none_are_refused(returned, told):
    with pytest.raises(EvaluationError, match=f"^m:f {told}"):
        as_scores(returned, [3, 4], "m:f")
