import optuna
import pytest

from searchmerge.search.async_cma import AsyncCmaSampler
from searchmerge.search.samplers import RelaySampler, SamplerSetting, make_sampler
from searchmerge.search.space import Alternative, Range, SearchSpace

EXPERTS = ("math", "code")
FLAT = SearchSpace(
    EXPERTS, [Alternative("t", "task_arithmetic", values={"coefficient": Range(0.0, 2.0)})]
)
MIXED = SearchSpace(EXPERTS, [*FLAT.alternatives.values(), Alternative("p", "pcb")])


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        (SamplerSetting(0, FLAT, n_trials=50), optuna.samplers.GPSampler),
        (SamplerSetting(0, FLAT, n_trials=50, n_objectives=2), optuna.samplers.GPSampler),
        (SamplerSetting(0, FLAT, n_trials=500, n_objectives=2), optuna.samplers.TPESampler),
        (SamplerSetting(0, MIXED, n_trials=50), optuna.samplers.TPESampler),
    ],
)
def test_auto_picks_by_space_objectives_and_length(setting, kind):
    assert isinstance(make_sampler("auto", setting), kind)


def test_auto_hands_a_long_study_over():
    assert isinstance(make_sampler("auto", SamplerSetting(0, FLAT, n_trials=None)), RelaySampler)


def test_the_second_sampler_of_a_relay_knows_the_first_ones_trials():
    second = AsyncCmaSampler(FLAT.distributions(), seed=0)
    sampler = RelaySampler(optuna.samplers.RandomSampler(seed=0), second, n_first=12)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for number in range(30):
        trial = study.ask(FLAT.distributions())
        assert second.n_told == (number if number >= 12 else 0)
        study.tell(trial, -sum((number - 0.7) ** 2 for number in trial.params.values()))
