"""What lies within a distribution, and what is moved into it."""

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from searchmerge.search.distributions import is_within, moved, suggest

STEPPED = FloatDistribution(0.1, 0.9, step=0.2)
CHOICE = CategoricalDistribution(("mean", "sum"))


@pytest.mark.parametrize(
    ("distribution", "value", "within"),
    [
        (STEPPED, 0.3, True),
        (STEPPED, 0.1 + 2 * 0.2, True),
        (STEPPED, 0.35, False),
        (STEPPED, 1.1, False),
        (FloatDistribution(0.1, 0.9), 0.9 + 1e-12, True),
        (FloatDistribution(0.1, 0.9), 0.91, False),
        (CHOICE, "sum", True),
        (CHOICE, "max", False),
        (IntDistribution(0, 3), 1, False),
    ],
)
def test_a_value_is_within_a_distribution_up_to_rounding(distribution, value, within):
    assert is_within({"x": value, "other": 9}, {"x": distribution}) is within


@pytest.mark.parametrize(
    ("distribution", "value", "nearest"),
    [
        (STEPPED, 0.38, 0.3),
        (STEPPED, 5.0, 0.9),
        (FloatDistribution(0.1, 0.9), -1.0, 0.1),
        (FloatDistribution(0.1, 0.9), 0.123, 0.123),
        (CHOICE, "max", "max"),
    ],
)
def test_a_number_is_moved_into_its_range_and_a_choice_is_not(distribution, value, nearest):
    assert moved(distribution, value) == pytest.approx(nearest)


def test_what_is_suggested_has_the_distribution():
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    for name, distribution in (("x", STEPPED), ("how", CHOICE)):
        suggest(trial, name, distribution)
        assert trial.distributions[name] == distribution
    assert is_within(trial.params, trial.distributions)
