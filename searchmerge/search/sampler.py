"""What a sampler is made from, and the registry of those that a study can name."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import optuna
from optuna.samplers import BaseSampler

from searchmerge.registry import Registry
from searchmerge.search.space import SearchSpace


@dataclass(frozen=True, slots=True)
class SamplerSetting:
    """What a sampler may have to know of its study.

    Attributes:
        seed: Seed of its random numbers.
        space: What it searches.
        n_objectives: How many values a trial is told.
        n_trials: How many trials are planned; ``None`` where only time limits them.
        n_before: How many trials earlier runs of the study have asked for.
    """

    seed: int
    space: SearchSpace
    n_objectives: int = 1
    n_trials: int | None = None
    n_before: int = 0

    @property
    def fresh_seed(self) -> int:
        """Return a seed for samplers whose random numbers begin anew in every run.

        With the study's own, a resumed run would propose once more what the first one began with.
        """
        return (self.seed + 1_000_003 * self.n_before) % 2**32


SAMPLERS: Registry[Callable[[SamplerSetting], BaseSampler]] = Registry(
    "sampler", "searchmerge.search.samplers"
)
"""Name to what makes the sampler of a study; one that cannot search it raises ``SpecError``."""


def make_sampler(name: str, setting: SamplerSetting) -> BaseSampler:
    """Return the sampler of this name.

    Raises:
        SpecError: If there is none, or it cannot search this study's space or objectives.
    """
    make = SAMPLERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return make(setting)


def sampler_after(name: str, setting: SamplerSetting) -> Callable[[int], BaseSampler]:
    """Return what makes the sampler of a study that has a number of trials already."""
    return lambda n_before: make_sampler(name, replace(setting, n_before=n_before))
