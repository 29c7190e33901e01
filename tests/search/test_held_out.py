"""What is scored on which held-out examples."""

from searchmerge.search.held_out import tasks_held_out
from searchmerge.search.objective import Constraint, Goal, Objective
from searchmerge.search.references import reference_plans

GOALS = {"a": Goal(expert="first"), "b": Goal(expert="second"), "c": Goal(expert="first")}
OWN = {"a": "expert first", "b": "expert second", "c": "expert first"}
PLANS = [*reference_plans(["first", "second", "third"]), "trial 3", "refined TIES"]


def tasks(extent, ahead=(), against=()):
    constraints = tuple(Constraint(task, what, 0.9) for task, what in against)
    objective = Objective("normalised", GOALS, constraints=constraints)
    return tasks_held_out(extent, PLANS, objective, OWN, ahead)


def test_all_is_scored_unless_less_is_asked_for():
    assert tasks("all") == dict.fromkeys(PLANS, ("a", "b", "c"))


def test_an_expert_is_scored_on_what_it_normalises_and_a_merge_on_all():
    found = tasks("own")
    assert found.pop("expert first") == ("a", "c")
    assert found.pop("expert second") == ("b",)
    assert found.pop("expert third") == ()
    assert found.pop("base") == ()
    assert set(found.values()) == {("a", "b", "c")}
    assert {"average", "TSV-M", "trial 3", "refined TIES"} < found.keys()


def test_the_base_is_scored_where_a_constraint_is_held_against_it():
    assert tasks("own", against=[("b", "base"), ("a", "expert"), ("c", "score")])["base"] == ("b",)


def test_what_is_ahead_of_the_merges_is_scored_on_all():
    found = tasks("own", ["expert third", "base"])
    assert found["base"] == found["expert third"] == ("a", "b", "c")
    assert found["expert first"] == ("a", "c")
