"""Optuna's distributions: drawing from one, and what of a value lies within it."""

import math
from collections.abc import Mapping

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from searchmerge.plan import SettingValue

Params = Mapping[str, SettingValue]
"""What a trial's parameters are, by name."""

DIGITS = 12
"""A stepped float is rounded to this many digits, so that equal plans are equal."""

CLOSE = 1e-9
"""What two numbers may differ by and count as equal."""


def suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> None:
    """Let the sampler choose one parameter of ``trial``."""
    match distribution:
        case FloatDistribution(low=low, high=high, step=step, log=log):
            trial.suggest_float(name, low, high, step=step, log=log)
        case CategoricalDistribution(choices=choices):
            trial.suggest_categorical(name, choices)


def is_within(params: Params, distributions: Mapping[str, BaseDistribution]) -> bool:
    """Return whether every parameter lies within its distribution, up to rounding."""
    return all(_holds(distribution, params[name]) for name, distribution in distributions.items())


def _holds(distribution: BaseDistribution, value: SettingValue) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    if not isinstance(distribution, FloatDistribution):
        return False
    number = float(value)
    steps = (number - distribution.low) / distribution.step if distribution.step else 0.0
    on_step = math.isclose(steps, round(steps), abs_tol=1e-6)
    return on_step and distribution.low - CLOSE <= number <= distribution.high + CLOSE


def moved(distribution: BaseDistribution, value: SettingValue) -> SettingValue:
    """Return the number of a range that is nearest to ``value``; a choice as it is."""
    if not isinstance(distribution, FloatDistribution):
        return value
    inside = min(distribution.high, max(distribution.low, float(value)))
    if distribution.step is None:
        return inside
    n_steps = round((inside - distribution.low) / distribution.step)
    return round(distribution.low + n_steps * distribution.step, DIGITS)
