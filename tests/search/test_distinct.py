"""Of plans that are nearly the same, or that nothing tells apart, the best gets the place."""

import pytest

from searchmerge.plan import Groups, MergePlan
from searchmerge.search.distinct import distinct
from searchmerge.search.trials import TrialRecord

EXPERTS = ("math", "code")


def ties(*coefficients, density=0.2, method="ties", settings=None):
    values = {"coefficient": (coefficients,), "density": ((density, density),)}
    return MergePlan(method, EXPERTS, values, settings=settings or {})


def chosen(plans, n, answers=None):
    """Return which plans are chosen: their places among ``plans``, best first."""
    answers = answers or [(float(i),) for i in range(len(plans))]
    records = [
        TrialRecord(i, plan, scores={"t": sum(own)})
        for i, (plan, own) in enumerate(zip(plans, answers, strict=True))
    ]
    known = {
        plan.digest: {("t", "select", 0): own, ("t", "hold_out", 0): (float(i),)}
        for i, (plan, own) in enumerate(zip(plans, answers, strict=True))
    }
    return [r.number for r in distinct(records, n, lambda plan: known[plan.digest])]


@pytest.mark.parametrize(
    ("other", "is_near"),
    [
        (ties(1.02, 0.5), True),
        (ties(1.02, 0.52), True),
        (ties(1.03, 0.5), False),
        (ties(1.0, 0.53), False),
        (ties(1.0, 0.5, density=0.203), True),
        (ties(1.0, 0.5, density=0.21), False),
        (ties(1.0, 0.5, settings={"aggregate": "sum"}), False),
        (ties(1.0, 0.5, method="dare"), False),
    ],
)
def test_plans_whose_numbers_all_but_agree_are_one(other, is_near):
    third = ties(2.0, 2.0)
    assert chosen([ties(1.0, 0.5), other, third], 2) == ([0, 2] if is_near else [0, 1])


def test_no_copy_takes_a_place_that_is_left():
    assert chosen([ties(1.0, 1.0), ties(1.01, 1.0), ties(1.0, 1.01)], 3) == [0]


def test_coefficients_of_zero_are_near_each_other_alone():
    assert chosen([ties(0.0, 0.0), ties(0.0, 0.001), ties(-0.001, 0.0)], 3) == [0, 1, 2]


def test_each_group_of_parameters_counts():
    def by_depth(last):
        rows = ((1.0, 1.0), (1.0, last))
        return MergePlan("linear", EXPERTS, {"coefficient": rows}, Groups(depth=2))

    assert chosen([by_depth(0.5), by_depth(0.51), by_depth(0.6)], 2) == [0, 2]


def test_plans_that_answer_alike_get_the_places_that_are_left():
    plans = [ties(1.0, number) for number in (0.1, 0.2, 0.3, 0.4)]
    answers = [(1.0, 1.0, 0.0), (1.0, 1.0, 0.0), (1.0, 0.0, 1.0), (0.0, 0.0, 0.0)]
    assert chosen(plans, 1, answers) == [0]
    assert chosen(plans, 2, answers) == [0, 2]  # as good as the second, and it differs
    assert chosen(plans, 3, answers) == [0, 2, 3]
    assert chosen(plans, 4, answers) == [0, 1, 2, 3]
    copies = [*plans[:2], ties(1.0, 0.205)]
    assert chosen(copies, 3, [(1.0,)] * 3) == [0, 1]
