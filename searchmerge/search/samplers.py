"""The samplers that a study can name."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import optuna
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)

from searchmerge.errors import SpecError
from searchmerge.registry import Registry
from searchmerge.search.async_cma import AsyncCmaSampler
from searchmerge.search.space import SearchSpace

_MANY_TRIALS = 200  # from here on a Gaussian process costs more than it gains


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


SAMPLERS: Registry[Callable[[SamplerSetting], BaseSampler]] = Registry("sampler")


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


@SAMPLERS.register("auto")
def _auto(setting: SamplerSetting) -> BaseSampler:
    """Gaussian process for few trials of numbers; TPE for mixed spaces, CMA-ES for long runs."""
    is_long = setting.n_trials is None or setting.n_trials > _MANY_TRIALS
    if not setting.space.is_flat or (is_long and setting.n_objectives > 1):
        return _tpe(setting)
    return _cma_es(setting) if is_long and len(setting.space.distributions()) > 1 else _gp(setting)


@SAMPLERS.register("tpe")
def _tpe(setting: SamplerSetting) -> BaseSampler:
    return TPESampler(seed=setting.fresh_seed, multivariate=setting.n_objectives == 1, group=False)


@SAMPLERS.register("gp")
def _gp(setting: SamplerSetting) -> BaseSampler:
    return GPSampler(seed=setting.fresh_seed, deterministic_objective=True)


@SAMPLERS.register("cma_es")
def _cma_es(setting: SamplerSetting) -> BaseSampler:
    if setting.n_objectives > 1:
        raise SpecError("search.sampler: cma_es takes one objective; use nsga2, tpe or gp")
    if not setting.space.is_flat:
        raise SpecError(
            "search.sampler: cma_es searches numbers of one method, and this space holds choices; "
            "use tpe"
        )
    return AsyncCmaSampler(
        setting.space.distributions(), seed=setting.seed, start=setting.space.start()
    )


@SAMPLERS.register("nsga2")
def _nsga2(setting: SamplerSetting) -> BaseSampler:
    return NSGAIISampler(seed=setting.fresh_seed)


@SAMPLERS.register("qmc")
def _qmc(setting: SamplerSetting) -> BaseSampler:
    return QMCSampler(seed=setting.seed, scramble=True)


@SAMPLERS.register("random")
def _random(setting: SamplerSetting) -> BaseSampler:
    return RandomSampler(seed=setting.fresh_seed)
