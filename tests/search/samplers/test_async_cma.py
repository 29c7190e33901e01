import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from searchmerge.errors import SpecError
from searchmerge.search.sampler import SamplerSetting, make_sampler
from searchmerge.search.samplers.async_cma import AsyncCmaSampler
from searchmerge.search.searched import Range
from searchmerge.search.space import Alternative, SearchSpace

SPACE = {f"x{i}": FloatDistribution(0.0, 2.0) for i in range(4)}


def value(params):
    return -sum((number - 0.7) ** 2 for number in params.values())


def study_of(sampler, storage=None):
    return optuna.create_study(
        direction="maximize",
        sampler=sampler,
        storage=storage,
        study_name="cma",
        load_if_exists=True,
    )


def run(study, n_trials, n_workers=3, told=value):
    """Keep n_workers trials running; the oldest but one finishes first."""
    running = []
    for _ in range(n_trials):
        while len(running) < n_workers:
            running.append(study.ask(SPACE))
        trial = running.pop(min(1, len(running) - 1))
        study.tell(trial, told(trial.params))
    return running


def test_every_finished_trial_is_told_whatever_it_was_asked_in():
    sampler = AsyncCmaSampler(SPACE, seed=1)
    study = study_of(sampler)
    study.enqueue_trial(dict.fromkeys(SPACE, 0.1))
    run(study, 50, n_workers=16)
    study.ask(SPACE)
    assert sampler.n_told == 50


def test_it_comes_near_the_best_point():
    study = study_of(AsyncCmaSampler(SPACE, seed=1))
    run(study, 240, n_workers=8)
    assert -study.best_value < 1e-3


def test_an_enqueued_trial_moves_the_distribution():
    asked = []
    for enqueued in (0.05, 1.95):
        study = study_of(AsyncCmaSampler(SPACE, seed=1))
        for shift in range(8):
            study.enqueue_trial(dict.fromkeys(SPACE, enqueued + 0.001 * shift))
        run(study, 8, n_workers=1, told=lambda params: 1.0 - 0.1 * params["x0"])
        asked.append(study.ask(SPACE).params["x0"])
    assert asked[0] < asked[1] - 0.2


def test_a_resumed_study_asks_exactly_what_an_uninterrupted_one_asks(tmp_path):
    params = {}
    for name, cuts in {"whole": (40,), "resumed": (7, 1, 13, 19)}.items():
        storage = f"sqlite:///{tmp_path / name}.db"
        for n_trials in cuts:
            study = study_of(AsyncCmaSampler(SPACE, seed=3), storage)
            run(study, n_trials, n_workers=1)
        params[name] = [trial.params for trial in study.trials]
    assert params["whole"] == params["resumed"]


def test_a_failed_trial_counts_as_the_worst():
    def asked(fails):
        study = study_of(AsyncCmaSampler(SPACE, seed=1))
        for _ in range(24):
            trial = study.ask(SPACE)
            if fails and trial.params["x0"] > 1.0:
                study.tell(trial, state=TrialState.FAIL)
            else:
                study.tell(trial, 1.0 if trial.params["x0"] > 1.0 else 0.9)
        return sum(study.ask(SPACE).params["x0"] for _ in range(20)) / 20

    assert asked(fails=True) < 0.8 < 1.2 < asked(fails=False)


def test_it_starts_at_the_published_setting():
    sampler = AsyncCmaSampler(SPACE, seed=1, start={"x0": 1.6, "x1": 99.0}, sigma=0.01)
    study = study_of(sampler)
    params = [study.ask(SPACE).params for _ in range(30)]
    means = {name: sum(p[name] for p in params) / 30 for name in SPACE}
    assert means["x0"] == pytest.approx(1.6, abs=0.02)
    assert means["x1"] == pytest.approx(2.0, abs=0.03)
    assert means["x2"] == pytest.approx(1.0, abs=0.02)


def test_a_search_that_stagnates_begins_again_with_twice_the_population():
    sampler = AsyncCmaSampler(SPACE, seed=1)
    study = study_of(sampler)
    run(study, 700, n_workers=2, told=lambda params: 0.5)
    study.ask(SPACE)
    assert sampler.n_restarts == 1
    assert sampler.n_told == 700


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    low=st.floats(-3, 3),
    n_steps=st.integers(1, 40),
    step=st.sampled_from([0.01, 0.1, 0.25]),
)
def test_proposals_keep_to_steps_and_bounds(seed, low, n_steps, step):
    low = round(low, 2)
    space = {
        "stepped": FloatDistribution(low, round(low + n_steps * step, 10), step=step),
        "whole": IntDistribution(0, 7),
        "log": FloatDistribution(0.01, 10.0, log=True),
        "fixed": FloatDistribution(0.5, 0.5),
    }
    study = optuna.create_study(direction="maximize", sampler=AsyncCmaSampler(space, seed=seed))
    for _ in range(15):
        trial = study.ask(space)
        for name, distribution in space.items():
            number = trial.params[name]
            assert distribution.low - 1e-9 <= number <= distribution.high + 1e-9
            if distribution.step:
                steps = (number - distribution.low) / distribution.step
                assert steps == pytest.approx(round(steps), abs=1e-6)
        study.tell(trial, -abs(trial.params["stepped"] - low))


def test_a_narrow_distribution_still_tries_both_neighbouring_steps():
    space = {name: FloatDistribution(0.0, 1.0, step=0.1) for name in ("a", "b")}
    sampler = AsyncCmaSampler(space, seed=0, start={"a": 0.47, "b": 0.5}, sigma=1e-4)
    study = study_of(sampler)
    tried = [round(study.ask(space).params["a"], 6) for _ in range(60)]
    assert {0.4, 0.5} == set(tried)
    assert tried.count(0.5) > tried.count(0.4)


def test_a_choice_or_too_few_parameters_are_refused():
    with pytest.raises(SpecError, match="'how' is a choice; use tpe"):
        AsyncCmaSampler({**SPACE, "how": CategoricalDistribution(("a", "b"))}, seed=0)
    with pytest.raises(SpecError, match="needs 2 parameters or more, and the space has 1"):
        AsyncCmaSampler({"x": FloatDistribution(0.0, 1.0)}, seed=0)


def test_several_objectives_and_several_methods_are_refused_by_key():
    flat = [Alternative("t", "task_arithmetic", values={"coefficient": Range(0.0, 2.0)})]
    space = SearchSpace(("math", "code"), flat)
    with pytest.raises(SpecError, match=r"search\.sampler: cma_es takes one objective; use nsga2"):
        make_sampler("cma_es", SamplerSetting(0, space, n_objectives=2))
    mixed = SearchSpace(("math", "code"), [*flat, Alternative("p", "pcb")])
    with pytest.raises(SpecError, match=r"search\.sampler: cma_es .* this space holds choices"):
        make_sampler("cma_es", SamplerSetting(0, mixed))
