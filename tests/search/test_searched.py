"""Each kind of what is searched turns parameters into numbers of a plan, and back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchmerge.plan import WHOLE, Groups
from searchmerge.search.searched import (
    Choices,
    Fixed,
    Interval,
    PlanShape,
    Range,
    Shares,
    shares_of,
    uniform_of,
)

EXPERTS = ("math", "code", "chat")
SHAPES = {
    "whole": PlanShape(EXPERTS, WHOLE),
    "deep": PlanShape(EXPERTS, Groups(depth=2)),
    "alone": PlanShape(("math",), WHOLE),
}
ROWS = {
    "fixed": lambda shape: Fixed((0.5,) * len(shape.experts)),
    "range": lambda shape: Range(0.0, 2.0, "expert_and_group"),
    "stepped": lambda shape: Range(0.1, 0.9, "group", step=0.1),
    "log": lambda shape: Range(0.01, 1.0, "all", log=True),
    "shares": lambda shape: Shares(0.1, 0.5),
}
SETTINGS = {
    "choices": Choices(("mean", "sum", True)),
    "single": Choices(("mean",)),
    "interval": Interval(-0.5, 1.0),
    "stepped": Interval(0, 9, step=1),
}


def drawn(draw, distribution):
    if hasattr(distribution, "choices"):
        return draw(st.sampled_from(distribution.choices))
    if distribution.step is None:
        return draw(st.floats(distribution.low, distribution.high))
    n_steps = round((distribution.high - distribution.low) / distribution.step)
    return distribution.low + draw(st.integers(0, n_steps)) * distribution.step


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ROWS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_rows_and_parameters_of_a_hyperparameter_are_each_others_inverse(kind, shape, data):
    shape = SHAPES[shape]
    searched = ROWS[kind](shape)
    params = {k: drawn(data.draw, d) for k, d in searched.distributions("c", shape).items()}
    rows = searched.rows("c", shape, params)
    assert [len(row) for row in rows] == [len(shape.experts)] * len(shape.groups)
    back = searched.params("c", shape, rows)
    assert back.keys() == params.keys()
    for row, again in zip(rows, searched.rows("c", shape, back), strict=True):
        assert again == pytest.approx(row, abs=1e-6)
    assert (searched.fixed is None) == bool(params)


@pytest.mark.parametrize("kind", SETTINGS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_value_and_parameter_of_a_setting_are_each_others_inverse(kind, data):
    chosen = SETTINGS[kind]
    params = {k: drawn(data.draw, d) for k, d in chosen.distributions("s").items()}
    value = chosen.value("s", params)
    assert chosen.params("s", value) == params
    assert chosen.fixed == (None if params else value)


@pytest.mark.parametrize(
    ("per", "names"),
    [
        ("all", ["c"]),
        ("expert", ["c.math", "c.code", "c.chat"]),
        ("group", ["c.depth0", "c.depth1"]),
        ("expert_and_group", [f"c.depth{i}.{e}" for i in range(2) for e in EXPERTS]),
    ],
)
def test_a_range_has_a_parameter_for_each_number_of_its_own(per, names):
    assert list(Range(0.0, 1.0, per).distributions("c", SHAPES["deep"])) == names


def test_shares_have_a_scale_and_a_parameter_for_each_expert_but_the_last():
    names = list(Shares(0.1, 0.5).distributions("c", SHAPES["deep"]))
    assert names == ["c.scale", "c.share.math", "c.share.code"]


def test_the_scale_of_shares_is_the_experts_mean():
    params = {"c.scale": 0.3, "c.share.math": 0.2, "c.share.code": 0.9}
    first, second = Shares(0.1, 0.5).rows("c", SHAPES["deep"], params)
    assert first == second
    assert sum(first) / 3 == pytest.approx(0.3)


@settings(max_examples=50)
@given(st.lists(st.floats(0.0, 0.999), min_size=1, max_size=6))
def test_shares_sum_to_one_and_go_back_to_what_made_them(uniform):
    shares = shares_of(uniform)
    assert sum(shares) == pytest.approx(1.0)
    assert min(shares) >= 0
    assert uniform_of(shares) == pytest.approx(uniform, abs=1e-6)
