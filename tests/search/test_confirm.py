"""Confirmation: intervals that cover, and a verdict that says what they say."""

import re

import numpy as np
import pytest

from searchmerge.evaluators.score_kind import Mean, OfRecords, Whole
from searchmerge.search.confirm import Bootstrap, Contest, confirm
from searchmerge.search.objective import Goal, Objective

GOALS = {"a": Goal(expert="a"), "b": Goal(weight=3.0, expert="b")}
MEANS = dict.fromkeys(GOALS, Mean())
OWN = {"a": "expert a", "b": "expert b"}


def accuracies(rng, p, n=200):
    return tuple(float(x) for x in rng.random(n) < p)


def values(seed, gain):
    rng = np.random.default_rng(seed)
    plans = {"base": 0.4, "expert a": 0.6, "expert b": 0.6, "trial 1": 0.6 + gain, "trial 2": 0.4}
    return {name: {t: accuracies(rng, p) for t in GOALS} for name, p in plans.items()}


def by_mean(data):
    """Return the plans by the mean of all values, best first."""
    return sorted(data, key=lambda name: -np.mean([np.mean(v) for v in data[name].values()]))


def run(data, kind="normalised", kinds=MEANS):
    candidates = [name for name in data if name.startswith("trial")]
    experts = OWN if kind == "normalised" else {}
    bootstrap = Bootstrap(level=0.95, n_resamples=400, seed=0)
    contest = Contest(candidates, by_mean(data))
    return confirm(data, contest, kinds, Objective(kind, GOALS), experts, bootstrap)


def test_a_clear_winner_is_called_better_and_a_clear_loser_worse():
    better = run(values(0, 0.3))
    assert better.winner == "trial 1"
    assert better.gain.low > 0
    assert better.verdict.startswith(
        "Saved is trial 1. The best found merge, trial 1, is better than the best baseline, "
    )
    worse = run(values(0, -0.3))
    assert worse.gain.high < 0
    assert worse.winner == worse.best_reference
    assert f"Saved is {worse.winner}." in worse.verdict
    assert "is worse than the best baseline" in worse.verdict


def test_what_has_values_of_some_tasks_is_compared_with_nothing_and_divides_as_before():
    data = values(0, 0.3)
    partly = {**data, "base": {}, "expert a": {"a": data["expert a"]["a"]}}
    candidates, experts = ["trial 1", "trial 2"], OWN
    compared = {name: its for name, its in data.items() if name not in ("base", "expert a")}
    told = confirm(
        partly,
        Contest(candidates, by_mean(compared)),
        MEANS,
        Objective("normalised", GOALS),
        experts,
        Bootstrap(level=0.95, n_resamples=400, seed=0),
    )
    whole = run(data)
    assert told.objective == {name: whole.objective[name] for name in compared}
    assert told.lead == {name: whole.lead[name] for name in compared if name != "trial 1"}
    assert (told.winner, told.best_reference) == ("trial 1", "expert b")


def test_a_lost_verdict_says_how_many_examples_it_takes():
    data = {name: by_task for name, by_task in values(0, 0.0).items() if name != "trial 2"}
    best = run(data).best_reference
    dropped = range(
        0, 200, 20
    )  # the found merge answers as the best reference does, but for a few
    data["trial 1"] = {
        t: tuple(0.0 if i in dropped else v for i, v in enumerate(its))
        for t, its in data[best].items()
    }
    told = run(data).verdict
    assert re.search(r"more examples \(select\).* about \d+0 examples of each task", told)


def test_no_number_of_examples_is_named_that_nobody_has():
    told = run(values(0, -0.3))
    assert told.winner == told.best_reference
    assert told.verdict.endswith(
        "merges that differ by 1 point cannot be told apart with any realistic number of examples."
    )


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
        kinds = {"a": Mean(), "b": OfRecords(geometric)}
        return run({n: p for n, p in data.items() if n != "trial 2"}, "mean", kinds)

    better = judge(recorded(0, 0.3))
    assert "is better than the best baseline" in better.verdict
    assert better.gain.low < better.gain.value < better.gain.high
    exact = values(0, 0.3)["trial 1"]
    assert better.objective["trial 1"].value == pytest.approx(
        (np.mean(exact["a"]) + 3 * geometric(recorded(0, 0.3)["trial 1"]["b"])) / 4
    )


def test_of_a_score_that_is_one_number_no_interval_is_given():
    data = values(0, 0.3)
    for plan in data.values():
        plan["b"] = (float(np.mean(plan["b"])),)
    told = run(data, "mean", {"a": Mean(), "b": Whole()})
    assert told.single == ("b",)
    assert "No interval can be given: of b there is one number" in told.verdict
    assert told.objective["base"].low < told.objective["base"].high  # of a alone


@pytest.mark.parametrize("is_scored", [True, False])
def test_an_own_expert_that_scores_0_held_out_counts_by_what_trials_see(is_scored):
    data = values(0, 0.3)
    data["expert b"]["b"] = (0.0,) * 200
    if not is_scored:
        del data["expert b"]
    objective = Objective("normalised", GOALS, {"a": 0.9, "b": 0.5})
    contest = Contest(["trial 1", "trial 2"], by_mean(data))
    told = confirm(data, contest, MEANS, objective, OWN, Bootstrap(0.95, 400, 0))
    held_out = {name: {t: np.mean(v) for t, v in plan.items()} for name, plan in data.items()}
    a, b = (held_out["trial 1"][t] for t in GOALS)
    expected = (a / held_out["expert a"]["a"] + 3 * b / 0.5) / 4
    interval = told.objective["trial 1"]
    assert interval.value == pytest.approx(expected)
    assert interval.low < expected < interval.high < 1.2 * expected


def test_a_resample_in_which_an_own_expert_scores_0_keeps_the_score_of_all():
    """It answers one of 40 rightly, so that 0.975 ** 40 = 36 % of the resamples draw it never."""
    data = values(0, 0.3)
    for plan in data.values():
        plan.update({task: v[:40] for task, v in plan.items()})
    data["expert a"]["a"] = (1.0,) + (0.0,) * 39
    told = run(data)
    rate = np.mean(data["trial 1"]["a"])
    assert told.objective["trial 1"].high < (1.3 * rate / 0.025 + 3 * 3) / 4
    assert told.objective["trial 1"].low > 0.2 * rate / 0.025 / 4


def test_equal_plans_differ_by_exactly_nothing():
    data = values(1, 0.0)
    data["trial 1"] = data["expert b"]
    told = run({name: data[name] for name in ("base", "expert a", "expert b", "trial 1")})
    assert told.gain.value <= 0
    assert told.objective["trial 1"] == told.objective["expert b"]


def test_intervals_are_those_of_a_bootstrap_written_out():
    data, n_resamples = values(3, 0.1), 400
    told = run(data)
    generator = np.random.default_rng(0)
    drawn = {}
    for task in GOALS:
        counts = generator.multinomial(200, [1 / 200] * 200, n_resamples)
        drawn[task] = {name: counts @ np.array(plan[task]) / 200 for name, plan in data.items()}
    objective = {
        name: (drawn["a"][name] / drawn["a"]["expert a"]
               + 3 * drawn["b"][name] / drawn["b"]["expert b"]) / 4
        for name in data
    }  # fmt: skip
    for name, interval in told.objective.items():
        expected = np.quantile(objective[name], [0.025, 0.975])
        assert [interval.low, interval.high] == pytest.approx(list(expected))
    gains = objective[told.best_found] - objective[told.best_reference]
    expected = np.quantile(gains, [0.0125, 0.9875])  # two candidates
    assert [told.gain.low, told.gain.high] == pytest.approx(list(expected))
    for name, lead in told.lead.items():
        ahead = objective[told.winner] - objective[name]
        expected = np.quantile(ahead, [0.025, 0.975])  # a single comparison
        assert [lead.low, lead.high] == pytest.approx(list(expected))
        difference = told.objective[told.winner].value - told.objective[name].value
        assert lead.value == pytest.approx(difference)


@pytest.mark.parametrize("gain", [0.3, -0.3])
def test_what_is_saved_is_compared_with_every_other_plan_and_not_with_itself(gain):
    data = values(0, gain)
    told = run(data)
    assert set(told.lead) == data.keys() - {told.winner}
    assert told.lead["base"].low > 0
    if told.winner == told.best_found:  # then the verdict's is the wider interval of the two
        lead = told.lead[told.best_reference]
        assert lead.value == told.gain.value
        assert told.gain.low < lead.low < lead.high < told.gain.high


def test_an_interval_of_a_lead_is_narrower_than_those_of_the_plans():
    """The plans answer the same examples, most of them alike."""
    rng = np.random.default_rng(5)
    easy = {task: rng.random(400) for task in GOALS}
    data = {
        name: {task: tuple((u < p).astype(float)) for task, u in easy.items()}
        for name, p in {"base": 0.4, "expert a": 0.6, "expert b": 0.6, "trial 1": 0.65}.items()
    }
    told = run(data, "mean")
    lead, alone = told.lead["expert a"], told.objective["trial 1"]
    assert lead.low > 0
    assert lead.high - lead.low < 0.6 * (alone.high - alone.low)


def test_where_nothing_was_found_it_is_said_why_and_how_it_goes_on():
    data = {name: its for name, its in values(0, 0.3).items() if not name.startswith("trial")}
    contest = Contest([], by_mean(data), absent="it ended among the references")
    told = confirm(data, contest, MEANS, Objective("mean", GOALS), {}, Bootstrap(0.95, 100, 0))
    assert (told.best_found, told.gain, told.n_candidates) == ("", None, 0)
    assert told.winner == told.best_reference == by_mean(data)[0]
    assert set(told.lead) == data.keys() - {told.winner}
    assert told.verdict == (
        f"Saved is {told.winner}. Nothing that the search found is compared with it: it ended "
        "among the references. The same `searchmerge run` goes on from here; raise "
        "search.n_trials or search.timeout where they are used up."
    )


def test_a_saved_plan_that_breaks_a_constraint_is_called_that():
    data = values(0, 0.3)
    broken = dict.fromkeys(data, ("a at least 1",))
    contest = Contest(["trial 1", "trial 2"], by_mean(data), broken)
    told = confirm(data, contest, MEANS, Objective("mean", GOALS), {}, Bootstrap(0.95, 100, 0))
    assert told.verdict.startswith(
        "Saved is trial 1, though it breaks a at least 1: no plan keeps every constraint. "
    )
    assert told.breaking == ()


def test_a_merge_that_breaks_a_constraint_lacks_no_evidence():
    data = values(0, 0.3)
    ranked = ["expert a", *(name for name in by_mean(data) if name != "expert a")]
    broken = {name: ["a at least 1"] for name in data if name != "expert a"}
    contest = Contest(["trial 1", "trial 2"], ranked, broken)
    told = confirm(data, contest, MEANS, Objective("mean", GOALS), {}, Bootstrap(0.95, 100, 0))
    assert told.winner == "expert a"
    assert "The best found merge, trial 1 (which breaks a constraint), is " in told.verdict
    assert told.verdict.endswith("keeps all constraints; more trials or another space may help.")
    assert "evidence" not in told.verdict
    assert set(told.breaking) == set(broken)


def test_plans_that_all_score_the_same_are_told_apart_by_nothing():
    data = {name: dict.fromkeys(GOALS, (1.0,) * 20) for name in values(0, 0.0)}
    told = run(data).verdict
    assert "All plans score the same on held-out examples" in told
    assert "enough evidence" not in told
