"""Params and plans are each other's inverse, and every range is legal."""

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchmerge.errors import SpecError
from searchmerge.merging.method import METHODS, default_plan, validate_plan
from searchmerge.plan import Groups, MergePlan
from searchmerge.search.searched import Choices, Fixed, Interval, Range, Shares
from searchmerge.search.space import Alternative, SearchSpace

EXPERTS = ("math", "code", "chat")
TIES = Alternative(
    "t",
    "ties",
    values={"coefficient": Range(0.0, 2.0), "density": Range(0.1, 0.9, per="all", step=0.01)},
    settings={"aggregate": Choices(("mean", "sum")), "depth_slope": Interval(-0.5, 1.0)},
)
DEEP = Alternative(
    "deep",
    "pcb",
    Groups(depth=3),
    {
        "coefficient": Range(0.1, 2.0, per="expert_and_group", log=True),
        "density": Range(0.05, 0.5, per="group", step=0.05),
    },
)
SHARED = Alternative("shared", "task_arithmetic", values={"coefficient": Shares(0.1, 1.0)})
SPACES = {
    "flat": SearchSpace(EXPERTS, [TIES]),
    "groups": SearchSpace(EXPERTS, [DEEP]),
    "shares": SearchSpace(EXPERTS, [SHARED]),
    "mixed": SearchSpace(EXPERTS, [TIES, DEEP, SHARED]),
}


@pytest.mark.parametrize("name", SPACES)
def test_params_and_plan_are_each_others_inverse(name):
    space = SPACES[name]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(40):
        trial = study.ask()
        plan = space.suggest(trial)
        validate_plan(plan)
        back = space.params(plan)
        assert back.keys() == trial.params.keys()
        for key, value in trial.params.items():
            expected = value if isinstance(value, str) else pytest.approx(value, abs=1e-6)
            assert back[key] == expected
        study.tell(trial, 0.0)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_search_range_of_a_method_makes_a_legal_space(method):
    values = {h.name: Range(*h.search, step=h.step) for h in METHODS[method].hyperparameters}
    space = SearchSpace(EXPERTS, [Alternative(method, method, values=values)])
    assert space.is_flat
    validate_plan(default_plan(method, EXPERTS))


def test_a_published_plan_is_in_the_space_whatever_its_groups_and_order():
    plan = MergePlan(
        "pcb", EXPERTS[::-1], {"coefficient": ((1.0,) * 3,), "density": ((0.1,) * 3,)}
    )
    params = SPACES["groups"].params(plan)
    assert set(params.values()) == {1.0, 0.1}
    assert SPACES["flat"].params(plan) is None
    assert SPACES["mixed"].params(plan)["method"] == "deep"


def test_a_plan_outside_the_ranges_is_not_in_the_space():
    inside = default_plan("ties", EXPERTS, coefficient=1.5, density=0.2)
    assert SPACES["flat"].params(inside) is not None
    for wrong in ({"coefficient": 2.5}, {"density": 0.95}, {"density": 0.205}):
        plan = default_plan("ties", EXPERTS, **{"coefficient": 1.5, "density": 0.2, **wrong})
        assert SPACES["flat"].params(plan) is None


@pytest.mark.parametrize(
    ("alternative", "message"),
    [
        (Alternative("x", "tis"), "did you mean 'ties'"),
        (Alternative("x", "linear", values={"density": Fixed((1.0,) * 3)}), "no hyper-parameter"),
        (Alternative("x", "ties", values={"density": Range(0.9, 0.1)}), "is empty"),
        (Alternative("x", "ties", values={"density": Range(0.5, 1.5)}), "is not within"),
        (
            Alternative("x", "ties", values={"coefficient": Range(0.0, 1.0, log=True)}),
            "a log range",
        ),
        (Alternative("x", "ties", values={"coefficient": Shares(0.1, 5.0)}), "the whole sum"),
        (Alternative("x", "ties", values={"coefficient": Shares(-5.0, 1.0)}), "the whole sum"),
        (Alternative("x", "ties", values={"density": Range(0.1, 0.2, step=0.2)}), "one value"),
        (Alternative("x", "ties", settings={"aggregate": Choices(("sum",) * 2)}), "stands twice"),
        (Alternative("x", "ties", settings={"aggregate": Choices(())}), "is an empty list"),
        (Alternative("x", "ties", settings={"aggregate": Choices(("mean", "median"))}), "median"),
        (Alternative("x", "ties", settings={"variant": Choices(("nlp",))}), "variant"),
        (Alternative("x", "ties", values={"density": Fixed((2.0,) * 3)}), "density"),
    ],
)
def test_a_bad_space_is_refused(alternative, message):
    with pytest.raises(SpecError, match=message):
        SearchSpace(EXPERTS, [alternative])


def test_steps_are_counted_from_the_low_end_and_never_pass_the_high_one():
    values = {"density": Range(0.1, 0.95, per="all", step=0.2)}
    space = SearchSpace(EXPERTS, [Alternative("x", "ties", values=values)])
    assert space.distributions()["density"].high == pytest.approx(0.9)
    plan = default_plan("ties", EXPERTS, density=0.9)
    assert space.params(plan) == {"density": pytest.approx(0.9)}


def test_an_empty_space_and_a_name_given_twice_are_refused():
    with pytest.raises(SpecError, match="it is empty"):
        SearchSpace(EXPERTS, [])
    with pytest.raises(SpecError, match="a name stands twice"):
        SearchSpace(EXPERTS, [TIES, TIES])


def _number(draw, legal, *, per):
    low, high = sorted(draw(st.lists(st.floats(*legal.search), min_size=2, max_size=2)))
    if legal.step is not None:
        steps = [round(end / legal.step) for end in (low, high)]
        low, high = (round(n * legal.step, 10) for n in steps)
        low, high = max(low, legal.low), min(high, legal.high)
    if low > 0 and draw(st.booleans()):
        return Range(low, high, per=per, log=True)
    step = draw(st.sampled_from([legal.step, 0.07]))  # the latter hits no end of any range
    return Range(low, high, per=per, step=step if high - low >= (step or 0) else None)


def _settings(draw, method):
    found = {}
    for setting in METHODS[method].settings:
        if setting.choices and draw(st.booleans()):
            found[setting.name] = Choices(tuple(setting.choices))
        elif setting.name == "depth_slope" and draw(st.booleans()):
            found[setting.name] = Interval(-0.5, 0.5)
    return found


@st.composite
def spaces(draw):
    """Any space: some methods, each with some of its numbers searched, fixed or left alone."""
    names = draw(st.lists(st.sampled_from(sorted(METHODS)), min_size=1, max_size=3, unique=True))
    alternatives = []
    for name in names:
        patterns = Groups(patterns=("self_attn", r"layers\.\d+\.mlp", "rest"))
        groups = draw(st.sampled_from([Groups(), Groups(depth=2), patterns]))
        values = {}
        for legal in METHODS[name].hyperparameters:
            kind = draw(st.sampled_from(["range", "fixed", "default", "shares"]))
            if kind == "range":
                per = draw(st.sampled_from(["all", "expert", "group", "expert_and_group"]))
                values[legal.name] = _number(draw, legal, per=per)
            elif kind == "fixed":
                values[legal.name] = Fixed((legal.default,) * 3)
            elif kind == "shares" and legal.name == "coefficient":
                values[legal.name] = Shares(0.1, legal.search[1] / 3)
        alternatives.append(Alternative(name, name, groups, values, _settings(draw, name)))
    return SearchSpace(EXPERTS, alternatives)


@settings(max_examples=60, deadline=None)
@given(space=spaces(), seed=st.integers(0, 1000))
def test_in_any_space_params_and_plan_are_inverse_and_every_value_is_legal(space, seed):
    for name, alternative in space.alternatives.items():
        legal = {h.name: h for h in METHODS[alternative.method].hyperparameters}
        for parameter, distribution in space.distributions(name).items():
            key = parameter.removeprefix(f"{name}.").split(".")[0]
            if (
                key in legal
                and ".share." not in parameter
                and isinstance(alternative.values[key], Range)
            ):
                assert legal[key].low <= distribution.low <= distribution.high <= legal[key].high
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(4):
        trial = study.ask()
        plan = space.suggest(trial)
        validate_plan(plan)
        back = space.params(plan)
        assert back is not None
        assert back.keys() == trial.params.keys()
        assert space.plan(back).digest == plan.digest or all(
            back[k] == v or back[k] == pytest.approx(v, abs=1e-6) for k, v in trial.params.items()
        )
        assert space.nearest(plan) == back


def test_the_nearest_parameters_of_a_plan_outside_are_at_the_ends_of_the_ranges():
    space = SPACES["flat"]
    plan = default_plan("ties", EXPERTS, coefficient=3.0, density=0.953)
    assert space.params(plan) is None
    nearest = space.nearest(plan)
    assert nearest["coefficient.math"] == 2.0
    assert nearest["density"] == 0.9
    assert space.params(space.plan(nearest)) is not None
    assert space.nearest(default_plan("linear", EXPERTS)) is None
    assert SPACES["mixed"].nearest(plan)["method"] == "t"
