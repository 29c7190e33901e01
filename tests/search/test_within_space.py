"""Trials that are outside a sampler's space change nothing of what it proposes."""

import optuna
import pytest
from optuna.trial import TrialState

from searchmerge.search.auto_space import auto_space
from searchmerge.search.sampler import SAMPLERS
from searchmerge.search.trials import enqueue_failed, enqueue_refined, next_due
from searchmerge.search.within_space import WithinSpace
from tests.search.conftest import OPTIMUM
from tests.search.test_sampler import EXPERTS, FLAT, run, sampled, study_of

SPACES = dict.fromkeys(SAMPLERS, FLAT) | {"staged": auto_space(EXPERTS)}


def proposed(name, n_before, outside):
    """Return what a sampler proposes after some trials and one of which it is to see nothing."""
    space, storage = SPACES[name], optuna.storages.InMemoryStorage()
    sampler = WithinSpace(sampled(name, space), storage)
    study = study_of(sampler, storage=storage)
    run(study, space, n_before, n_running=1)
    outside(study, storage)
    run(study, space, 8, n_running=1)
    return [trial.params for trial in study.trials[n_before + 1 :]]


def refined(study, storage):
    enqueue_refined(study, "trial 3", OPTIMUM, {"key": "a"})
    study.tell(next_due(study, storage), 99.0)


UNSEEN = optuna.create_trial(state=TrialState.FAIL)
"""A trial that no sampler looks at, so that all later ones have the same numbers."""


def unseen(study, storage):
    study.add_trial(UNSEEN)


@pytest.mark.parametrize("n_before", [3, 16])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sampler_proposes_what_it_would_without_refined_trials(name, n_before):
    with_refined = proposed(name, n_before, refined)
    assert all(with_refined)
    assert with_refined == proposed(name, n_before, unseen)


def proposed_after_failures(name, *, are_seen):
    """Return what a sampler proposes once trials that had failed were tried again.

    Args:
        name: Of the sampler.
        are_seen: Whether it sees the parameters with which they had failed.
    """
    space, storage = SPACES[name], optuna.storages.InMemoryStorage()
    drawn = study_of(optuna.samplers.RandomSampler(0))
    run(drawn, space, 20, n_running=1)
    study = study_of(WithinSpace(sampled(name, space), storage), storage=storage)
    failed = [trial for trial in drawn.trials if trial.state == TrialState.FAIL]
    for trial in drawn.trials:
        study.add_trial(trial if are_seen or trial not in failed else UNSEEN)
    if are_seen:
        assert enqueue_failed(study) == len(failed)
    else:
        for trial in failed:
            study.enqueue_trial(trial.params)
    for i in range(len(failed)):
        trial = next_due(study, storage) if are_seen else study.ask()
        space.suggest(trial)
        trial.set_constraint("bound", -0.5)
        study.tell(trial, float(i))
    run(study, space, 8, n_running=1)
    return [trial.params for trial in study.trials[20:]]


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sampler_proposes_what_it_would_had_no_trial_failed_that_is_tried_again(name):
    told = proposed_after_failures(name, are_seen=True)
    assert len(told) == 5 + 8
    assert told == proposed_after_failures(name, are_seen=False)


def test_without_it_a_refined_trial_leaves_optunas_samplers_nothing_to_search():
    study = study_of(sampled("gp"))
    run(study, FLAT, 3, n_running=1)
    study.add_trial(optuna.create_trial(value=99.0))
    assert study.sampler.infer_relative_search_space(study, study.trials[0]) == {}
