"""Trials that are outside a sampler's space change nothing of what it proposes."""

import optuna
import pytest
from optuna.trial import TrialState

from searchmerge.search.auto_space import auto_space
from searchmerge.search.sampler import SAMPLERS
from searchmerge.search.trials import enqueue_refined, next_refined
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
    study.tell(next_refined(study, storage), 99.0)


def unseen(study, storage):
    """A trial that no sampler looks at, so that all later ones have the same numbers."""
    study.add_trial(optuna.create_trial(state=TrialState.FAIL))


@pytest.mark.parametrize("n_before", [3, 16])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sampler_proposes_what_it_would_without_refined_trials(name, n_before):
    with_refined = proposed(name, n_before, refined)
    assert all(with_refined)
    assert with_refined == proposed(name, n_before, unseen)


def test_without_it_a_refined_trial_leaves_optunas_samplers_nothing_to_search():
    study = study_of(sampled("gp"))
    run(study, FLAT, 3, n_running=1)
    study.add_trial(optuna.create_trial(value=99.0))
    assert study.sampler.infer_relative_search_space(study, study.trials[0]) == {}
