import optuna
from optuna.distributions import FloatDistribution

from searchmerge.search.samplers.async_cma import AsyncCmaSampler
from searchmerge.search.samplers.relay import RelaySampler

SPACE = {"x": FloatDistribution(0.0, 2.0), "y": FloatDistribution(0.0, 2.0)}


def test_the_second_sampler_of_a_relay_knows_the_first_ones_trials():
    second = AsyncCmaSampler(SPACE, seed=0)
    sampler = RelaySampler(optuna.samplers.RandomSampler(seed=0), second, n_first=12)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for number in range(30):
        trial = study.ask(SPACE)
        assert second.n_told == (number if number >= 12 else 0)
        study.tell(trial, -sum((x - 0.7) ** 2 for x in trial.params.values()))
