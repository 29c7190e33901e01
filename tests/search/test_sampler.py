"""What every registered sampler keeps to, alone with Optuna."""

import re

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from searchmerge.errors import SpecError
from searchmerge.search.sampler import SAMPLERS, SamplerSetting, make_sampler
from searchmerge.search.searched import Range
from searchmerge.search.space import Alternative, SearchSpace

EXPERTS = ("math", "code")
NUMBERS = Alternative(
    "ties",
    "ties",
    values={"coefficient": Range(0.0, 2.0), "density": Range(0.1, 0.9, per="all", step=0.1)},
)
SHARED = Alternative(
    "task_arithmetic", "task_arithmetic", values={"coefficient": Range(0.0, 1.0, per="all")}
)
FLAT = SearchSpace(EXPERTS, [NUMBERS])
CASES = {
    "numbers": (FLAT, 1),
    "one parameter": (SearchSpace(EXPERTS, [SHARED]), 1),
    "choices": (SearchSpace(EXPERTS, [NUMBERS, SHARED]), 1),
    "two objectives": (FLAT, 2),
}
of_every_sampler = pytest.mark.parametrize("name", sorted(SAMPLERS))
of_any_space = pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"staged"}))
"""``staged`` searches a space of its own, and has tests of its own."""


def study_of(sampler, n_objectives=1, storage=None):
    return optuna.create_study(
        directions=["maximize"] * n_objectives,
        sampler=sampler,
        storage=storage,
        study_name="sampled",
        load_if_exists=True,
    )


def sampled(name, space=FLAT, n_objectives=1, n_before=0, seed=0):
    setting = SamplerSetting(seed, space, n_objectives, n_trials=20, n_before=n_before)
    return make_sampler(name, setting)


def run(study, space, n_trials, n_running=3):
    """Keep some trials running; every fourth one fails, every third one breaks a constraint."""
    running, plans = [], []
    for number in range(n_trials):
        while len(running) < n_running:
            running.append(study.ask())
            plans.append(space.suggest(running[-1]))
        trial = running.pop(number % n_running)
        if number % 4 == 3:
            study.tell(trial, state=TrialState.FAIL)
            continue
        trial.set_constraint("bound", 0.5 if number % 3 == 2 else -0.5)
        score = -sum((x - 0.7) ** 2 for x in trial.params.values() if not isinstance(x, str))
        study.tell(trial, [score, *[-score] * (len(study.directions) - 1)])
    return plans


def holds(distribution, value):
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    steps = (value - distribution.low) / (distribution.step or 1e-9)
    on_step = distribution.step is None or abs(steps - round(steps)) < 1e-6
    return on_step and distribution.low <= value <= distribution.high


@of_every_sampler
@pytest.mark.parametrize("case", CASES)
def test_a_study_is_searched_within_its_ranges_or_refused_by_key(name, case):
    space, n_objectives = CASES[case]
    try:
        sampler = sampled(name, space, n_objectives)
    except SpecError as error:
        assert re.match(rf"search\.sampler: {name} .*; use ", str(error))
        return
    study = study_of(sampler, n_objectives)
    plans = run(study, space, 14)
    for trial, plan in zip(study.trials, plans, strict=True):
        assert all(holds(trial.distributions[k], value) for k, value in trial.params.items())
        assert space.plan(trial.params) == plan
    assert len({plan.digest for plan in plans}) > len(plans) / 2


@of_any_space
def test_enqueued_trials_come_first_and_are_told_like_all_others(name):
    study = study_of(sampled(name))
    fixed = {"coefficient.math": 1.0, "coefficient.code": 0.5, "density": 0.3}
    for density in (0.3, 0.4):
        study.enqueue_trial({**fixed, "density": density})
    run(study, FLAT, 14)
    asked = [trial.params for trial in study.trials]
    assert asked[:2] == [fixed, {**fixed, "density": 0.4}]
    assert fixed not in asked[2:]


@of_any_space
def test_the_seed_decides_what_is_proposed(name):
    def asked(seed):
        study = study_of(sampled(name, seed=seed))
        run(study, FLAT, 13)
        return [trial.params for trial in study.trials]

    assert asked(1) == asked(1)
    assert asked(1) != asked(2)


@of_any_space
def test_a_study_that_is_resumed_goes_on_with_other_proposals(name):
    storage = optuna.storages.InMemoryStorage()
    for n_trials in (5, 9):
        n_before = len(study_of(sampled(name), storage=storage).trials)
        study = study_of(sampled(name, n_before=n_before), storage=storage)
        run(study, FLAT, n_trials, n_running=1)
    asked = [tuple(sorted(trial.params.items())) for trial in study.trials]
    assert len(asked) == len(set(asked)) == 14


def test_an_unknown_sampler_is_refused_with_what_was_meant():
    with pytest.raises(SpecError, match="no sampler named 'cma_e'; did you mean 'cma_es'"):
        sampled("cma_e")
