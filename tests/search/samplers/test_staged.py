"""The staged sampler: one number of every method first, more where they pay."""

import math

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from searchmerge.errors import SpecError
from searchmerge.merging.method import DEPTH_SLOPE, default_plan
from searchmerge.search.auto_space import EACH, auto_space
from searchmerge.search.sampler import SamplerSetting, make_sampler
from searchmerge.search.space import Alternative, SearchSpace
from searchmerge.search.trials import enqueue
from tests.benchmarks.bench_spaces import gains

EXPERTS = ("math", "code", "chat")
BEST = {"tsv": 0.96, "ties": 0.945, "pcb": 0.94, "task_arithmetic": 0.92, "dare": 0.92}
"""What methods reach with one number each; the best scale is not quite the published one."""


def truth(plan, gain=0.0):
    """Return a smooth objective; ``gain`` is what a larger coefficient of one expert is worth."""
    published = default_plan(plan.method, EXPERTS)
    logs = np.log(np.maximum(plan.values["coefficient"][0], 1e-3))
    scale = logs.mean() - math.log(published.values["coefficient"][0][0])
    value = BEST[plan.method] - 0.1 * (scale - 0.15) ** 2
    if "density" in plan.values:
        value -= 0.2 * (plan.values["density"][0][0] - published.values["density"][0][0]) ** 2
    shares = logs - logs.mean()
    value -= 0.15 * ((shares - gain * np.array([0.5, -0.5, 0.0])) ** 2).sum()
    value -= 0.02 * float(plan.settings.get(DEPTH_SLOPE.name, 0.0)) ** 2
    return value


def search(space, sampler, n_trials, seed, *, noise=0.008, gain=0.0, unit=1.0):
    """Run a search in noise; return every trial's plan, noisy value and true one."""
    rng = np.random.default_rng(seed)
    study = optuna.create_study(
        direction="maximize", sampler=make_sampler(sampler, SamplerSetting(seed, space))
    )
    if space.is_auto:
        for method in BEST:
            enqueue(study, method, space.params(default_plan(method, EXPERTS)))
    found = []
    for _ in range(n_trials):
        trial = study.ask()
        plan = space.suggest(trial)
        exact = truth(plan, gain)
        told = exact + noise * rng.normal()
        trial.set_user_attr("result", {"se": unit * noise})
        study.tell(trial, unit * told)
        found.append((plan, told, exact))
    return study, found


@pytest.fixture(scope="module")
def space():
    return auto_space(EXPERTS)


def test_published_settings_lie_in_the_space(space):
    for method in BEST:
        plan = default_plan(method, EXPERTS)
        params = space.params(plan)
        assert params["method"] == method
        assert space.plan(params) == plan


def reached(space, sampler, gain):
    """Return the true value of what looked best, on average over some searches."""
    ends = [search(space, sampler, 30, seed, gain=gain)[1] for seed in range(6)]
    return np.mean([max(found, key=lambda row: row[1])[2] for found in ends])


@pytest.mark.parametrize("gain", [0.0, 1.0], ids=["one number is best", "one each is better"])
def test_it_ends_above_a_search_of_one_method_with_a_number_for_each_expert(space, gain):
    fine = space.alternatives[f"ties{EACH}"]
    each = SearchSpace(EXPERTS, [Alternative("ties", "ties", values=fine.values)])
    staged = reached(space, "auto", gain)
    assert staged > reached(each, "random", gain) + 0.015
    assert staged > max(BEST.values()) - 0.012


def test_it_ends_above_random_search_where_there_is_something_to_find(space):
    assert reached(space, "auto", 1.0) > reached(space, "random", 1.0) + 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("n_select", "apart"), [(120, 0.2), (72, 0.0)])
def test_what_is_picked_is_as_good_as_by_other_searches_of_right_or_wrong_examples(
    n_select, apart
):
    found = {
        arm: gains(arm, n_seeds=20, n_select=n_select, apart=apart, n_trials=30)
        for arm in ("auto", "auto, random", "ties each, random", "tsv each, gp")
    }
    means = {arm: its.mean() for arm, its in found.items()}
    assert means["auto"] > -0.1  # of the best published setting, which only the test knows
    assert means["auto"] > means["ties each, random"] + 0.3
    error = (found["auto"] - found["tsv each, gp"]).std(ddof=1) / math.sqrt(20)
    assert means["auto"] > means["tsv each, gp"] - error  # which was told the best method
    error = (found["auto"] - found["auto, random"]).std(ddof=1) / math.sqrt(20)
    assert means["auto"] > means["auto, random"] - error


def test_scores_in_per_cent_are_searched_as_parts_of_one_are(space):
    found = {unit: search(space, "auto", 24, seed=0, unit=unit)[1] for unit in (1.0, 100.0)}
    worth = {unit: np.mean([exact for *_, exact in its[5:]]) for unit, its in found.items()}
    assert worth[100.0] > worth[1.0] - 0.02


def test_most_trials_go_to_methods_that_may_win(space):
    _, found = search(space, "auto", 30, seed=0)
    methods = [plan.method for plan, _, _ in found[len(BEST) :]]
    assert methods.count("tsv") > 10
    assert methods.count("task_arithmetic") + methods.count("dare") < 6


def test_experts_get_numbers_of_their_own_where_that_pays(space):
    n_fine = {}
    for gain in (0.0, 1.0):
        _, found = search(space, "auto", 45, seed=1, noise=0.004, gain=gain)
        rows = [plan.values["coefficient"][0] for plan, _, _ in found]
        n_fine[gain] = sum(len(set(row)) > 1 for row in rows)
        if gain:
            best = max(found, key=lambda row: row[1])[0]
            assert len(set(best.values["coefficient"][0])) > 1
    assert n_fine[1.0] > n_fine[0.0]


def test_a_resumed_study_goes_on_as_if_it_had_not_stopped(space):
    study, found = search(space, "auto", 12, seed=3)
    again = optuna.create_study(
        direction="maximize", sampler=make_sampler("auto", SamplerSetting(3, space))
    )
    again.add_trials(study.get_trials())
    assert space.suggest(again.ask()) == space.suggest(study.ask())
    assert len(found) == 12


def test_trials_that_still_run_are_not_proposed_again(space):
    study, _ = search(space, "auto", 10, seed=4)
    plans = [space.suggest(study.ask()) for _ in range(4)]
    assert len({plan.digest for plan in plans}) == 4
    assert len(study.get_trials(states=(TrialState.RUNNING,))) == 4


def test_a_method_without_a_trial_is_left_out(space):
    """Its reference was too slow to be made, or could not be scored."""
    study = optuna.create_study(
        direction="maximize", sampler=make_sampler("auto", SamplerSetting(0, space))
    )
    enqueue(study, "TIES", space.params(default_plan("ties", EXPERTS)))
    for _ in range(8):
        trial = study.ask()
        plan = space.suggest(trial)
        assert plan.method == "ties"
        study.tell(trial, truth(plan))


def test_other_spaces_and_several_objectives_are_refused(space):
    other = SearchSpace(EXPERTS, [space.alternatives["ties"]])
    with pytest.raises(SpecError, match="searches `space: auto` alone; use auto"):
        make_sampler("staged", SamplerSetting(0, other))
    with pytest.raises(SpecError, match="takes one objective"):
        make_sampler("staged", SamplerSetting(0, space, n_objectives=2))


def test_trials_that_still_run_do_not_hide_that_numbers_for_each_expert_pay(space):
    """Those that are slowest are told last, behind others that were begun after them."""
    study = optuna.create_study(
        direction="maximize", sampler=make_sampler("auto", SamplerSetting(1, space))
    )
    for method in BEST:
        enqueue(study, method, space.params(default_plan(method, EXPERTS)))
    running, exact = [], []
    for number in range(45):
        while len(running) < 4:
            trial = study.ask()
            running.append((trial, space.suggest(trial)))
        trial, plan = running.pop(0 if number % 3 == 0 else -1)
        trial.set_user_attr("result", {"se": 0.004})
        study.tell(trial, truth(plan, gain=1.0))
        exact.append(truth(plan, gain=1.0))
    assert max(exact) > max(BEST.values()) - 0.012


def test_the_cost_of_a_proposal_stops_growing_with_the_trials(space, monkeypatch):
    sizes, cholesky = [], np.linalg.cholesky

    def noted(matrix):
        sizes.append(len(matrix))
        return cholesky(matrix)

    study, _ = search(space, "auto", 40, seed=0)
    draw, told = np.random.default_rng(0), study.get_trials()[8]
    for _ in range(400):
        value = [0.8 + draw.normal(0, 0.01)]
        study.add_trial(
            optuna.trial.create_trial(
                params=told.params, distributions=told.distributions, values=value
            )
        )
    monkeypatch.setattr(np.linalg, "cholesky", noted)
    study.ask(space.distributions(str(told.params["method"])))
    assert 200 < max(sizes) < 300
