import optuna
import pytest

from searchmerge.search.sampler import SamplerSetting, make_sampler
from searchmerge.search.samplers.relay import RelaySampler
from searchmerge.search.searched import Range
from searchmerge.search.space import Alternative, SearchSpace

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
