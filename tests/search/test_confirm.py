"""Confirmation: intervals that cover, and a verdict that says what they say."""

import numpy as np
import pytest

from searchmerge.errors import StudyError
from searchmerge.search.confirm import confirm
from searchmerge.search.objective import Goal, Objective

GOALS = {"a": Goal(expert="a"), "b": Goal(weight=3.0, expert="b")}
OWN = {"a": "expert a", "b": "expert b"}


def accuracies(rng, p, n=200):
    return tuple(float(x) for x in rng.random(n) < p)


def values(seed, gain):
    rng = np.random.default_rng(seed)
    plans = {"base": 0.4, "expert a": 0.6, "expert b": 0.6, "trial 1": 0.6 + gain, "trial 2": 0.4}
    return {name: {t: accuracies(rng, p) for t in GOALS} for name, p in plans.items()}


def run(data, kind="normalised"):
    candidates = [name for name in data if name.startswith("trial")]
    own = OWN if kind == "normalised" else {}
    return confirm(
        data, candidates, Objective(kind, GOALS), own, level=0.95, n_resamples=400, seed=0
    )


def test_a_clear_winner_is_called_better_and_a_clear_loser_worse():
    better = run(values(0, 0.3))
    assert better.winner == "trial 1"
    assert better.gain.low > 0
    assert "is better than the best baseline" in better.verdict
    worse = run(values(0, -0.3))
    assert worse.gain.high < 0
    assert "is worse than the best baseline" in worse.verdict


def test_no_difference_is_called_indistinguishable_about_as_often_as_its_level_says():
    verdicts = [run(values(seed, 0.0)).verdict for seed in range(20)]
    assert sum("is better" in verdict for verdict in verdicts) <= 2


def test_a_score_that_is_no_mean_has_an_interval_where_examples_have_records():
    """The geometric mean of accuracies on even and odd examples, coded 0 to 3."""

    def geometric(records):
        coded = np.array(records)
        rates = [(coded[coded // 2 == half] % 2).mean() for half in (0, 1)]
        return float(np.sqrt(rates[0] * rates[1]))

    def recorded(seed, gain):
        data = values(seed, gain)
        for plan in data.values():
            plan["b"] = tuple(2 * (i % 2) + x for i, x in enumerate(plan["b"]))
        return data

    def judge(data):
        options = {"level": 0.95, "n_resamples": 400, "seed": 0, "aggregates": {"b": geometric}}
        return confirm(data, ["trial 1"], Objective("mean", GOALS), {}, **options)

    better = judge(recorded(0, 0.3))
    assert "is better than the best baseline" in better.verdict
    assert better.gain.low < better.gain.value < better.gain.high
    exact = values(0, 0.3)["trial 1"]
    assert better.objective["trial 1"].value == pytest.approx(
        (np.mean(exact["a"]) + 3 * geometric(recorded(0, 0.3)["trial 1"]["b"])) / 4
    )
    # what an earlier version has kept of a plan is the score alone
    old = recorded(0, 0.3)
    old["base"]["b"] = (0.4,)
    assert "No interval can be given: of b there is one number" in judge(old).verdict


def test_equal_plans_differ_by_exactly_nothing():
    data = values(1, 0.0)
    data["trial 1"] = data["expert b"]
    found = run({name: data[name] for name in ("base", "expert a", "expert b", "trial 1")})
    assert found.gain.value <= 0
    assert found.objective["trial 1"] == found.objective["expert b"]


def test_the_objective_is_what_its_name_says():
    scores = {"a": 0.3, "b": 0.9}
    references = {"a": 0.6, "b": 0.6}
    assert Objective("mean", GOALS).scalar(scores) == pytest.approx((0.3 + 3 * 0.9) / 4)
    found = Objective("normalised", GOALS).referring_to(references)
    assert found.scalar(scores) == pytest.approx((0.5 + 3 * 1.5) / 4)
    assert Objective("worst", GOALS, references).values(scores) == pytest.approx((0.5,))
    assert Objective("tasks", GOALS, references).values(scores) == pytest.approx((0.5, 1.5))


def test_negative_scores_are_normalised_so_that_higher_stays_better():
    objective = Objective("normalised", {"a": Goal(expert="a")}, {"a": -2.0})
    assert objective.scalar({"a": -2.0}) == 1.0
    assert objective.scalar({"a": -1.0}) > 1.0 > objective.scalar({"a": -3.0})


def test_an_own_expert_that_scores_nothing_normalises_nothing():
    with pytest.raises(StudyError, match=r"tasks\.a: its own expert 'a' scores 0"):
        Objective("normalised", GOALS).referring_to({"a": 0.0, "b": 0.5})
