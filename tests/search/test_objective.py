"""From tasks' scores to what is maximised, and to what constraints are broken by."""

from dataclasses import replace

import pytest

from searchmerge.errors import StudyError
from searchmerge.search.objective import Constraint, Goal, Objective

GOALS = {"a": Goal(expert="a"), "b": Goal(weight=3.0, expert="b")}


def test_the_objective_is_what_its_name_says():
    scores = {"a": 0.3, "b": 0.9}
    expert_scores = {"a": 0.6, "b": 0.6}
    assert Objective("mean", GOALS).scalar(scores) == pytest.approx((0.3 + 3 * 0.9) / 4)
    normalised = Objective("normalised", GOALS).relative_to(expert_scores, {})
    assert normalised.scalar(scores) == pytest.approx((0.5 + 3 * 1.5) / 4)
    assert Objective("worst", GOALS, expert_scores).values(scores) == pytest.approx((0.5,))
    assert Objective("tasks", GOALS, expert_scores).values(scores) == pytest.approx((0.5, 1.5))


def test_negative_scores_are_normalised_so_that_higher_stays_better():
    objective = Objective("normalised", {"a": Goal(expert="a")}, {"a": -2.0})
    assert objective.scalar({"a": -2.0}) == 1.0
    assert objective.scalar({"a": -1.0}) > 1.0 > objective.scalar({"a": -3.0})


def test_an_own_expert_that_scores_nothing_normalises_nothing():
    with pytest.raises(StudyError, match=r"tasks\.a: its own expert 'a' scores 0"):
        Objective("normalised", GOALS).relative_to({"a": 0.0, "b": 0.5}, {})
    with pytest.raises(StudyError, match="by it; what a said, or use objective: mean"):
        Objective("normalised", GOALS).relative_to({"a": 0.0}, {}, "what {} said".format)


def test_of_several_objectives_one_value_ranks_by_mean_or_worst():
    scores, expert_scores = {"a": 0.3, "b": 0.9}, {"a": 0.6, "b": 0.6}
    by_mean = Objective("tasks", GOALS, expert_scores)
    assert by_mean.names == ("a", "b")
    assert by_mean.scalar(scores) == pytest.approx((0.5 + 3 * 1.5) / 4)
    assert Objective("tasks", GOALS, expert_scores, pick="worst").scalar(scores) == 0.5


def test_a_constraint_is_broken_by_what_is_missing_to_its_bound():
    constraints = (
        Constraint("a", "expert", 0.9),
        Constraint("a", "base", 2.0),
        Constraint("b", "score", 0.5),
    )
    objective = Objective("mean", GOALS, constraints=constraints)
    relative = objective.relative_to({"a": 0.8, "b": 0.5}, {"a": 0.2, "b": 0.2})
    assert relative.violations({"a": 0.4, "b": 0.75}) == pytest.approx(
        {
            "a at least 0.9 of its own expert's": 0.4,
            "a at least 2 of the base's": 0.0,
            "b at least 0.5": -0.25,
        }
    )
    assert not relative.is_feasible({"a": 0.4, "b": 0.75})
    assert relative.is_feasible({"a": 0.8, "b": 0.5})


def test_a_base_that_scores_nothing_bounds_nothing():
    objective = Objective("mean", GOALS, constraints=(Constraint("a", "base", 1.0),))
    with pytest.raises(StudyError, match=r"the base scores 0\.0 on 'a'"):
        objective.relative_to({}, {"a": 0.0})


@pytest.mark.parametrize("kind", ["normalised", "mean"])
def test_the_unit_of_a_task_is_what_one_more_point_there_adds(kind):
    objective = Objective(kind, GOALS, {"a": 0.5, "b": 0.8})
    before, after = {"a": 0.3, "b": 0.4}, {"a": 0.3, "b": 0.5}
    gain = objective.scalar(after) - objective.scalar(before)
    assert objective.unit("b") * 0.1 == pytest.approx(gain)


def test_what_scores_0_on_other_examples_stays_what_it_was_and_is_named():
    constraints = (Constraint("a", "base", 1.0), Constraint("b", "score", 0.1))
    select = Objective(
        "normalised", GOALS, {"a": 0.5, "b": 0.8}, {"a": 0.2, "b": 0.3}, constraints
    )
    told = {"a": 0.0, "b": 0.4}, {"a": 0.0, "b": 0.0}
    held_out = select.on_other_examples(*told)
    assert held_out.expert_scores == {"a": 0.5, "b": 0.4}
    assert held_out.base_scores == {"a": 0.2, "b": 0.3}
    assert select.undivided(*told) == ("its own expert on a", "the base on a")
    assert select.undivided({}, {"a": 0.1}) == ("its own expert on a", "its own expert on b")
    assert replace(select, kind="mean").undivided(*told) == ("the base on a",)
