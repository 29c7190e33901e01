"""The samplers that a study can name."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import FrozenTrial, TrialState

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
    """Gaussian process for numbers, CMA-ES from the 200th trial on; TPE for mixed spaces."""
    is_long = setting.n_trials is None or setting.n_trials > _MANY_TRIALS
    if not setting.space.is_flat or (is_long and setting.n_objectives > 1):
        return _tpe(setting)
    if not is_long or len(setting.space.distributions()) < 2:
        return _gp(setting)
    return RelaySampler(_gp(setting), _cma_es(setting), _MANY_TRIALS)


class RelaySampler(BaseSampler):
    """One sampler for the first trials, another for all later ones, which has learnt from them.

    Args:
        first: Proposes trials 0 to ``n_first - 1``.
        second: Proposes the others.
        n_first: How many trials are the first one's.
    """

    def __init__(self, first: BaseSampler, second: BaseSampler, n_first: int) -> None:
        self._first, self._second, self._n_first = first, second, n_first

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        return self._first if trial.number < self._n_first else self._second

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return what that sampler says."""
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return what that sampler proposes."""
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return what that sampler proposes."""
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Tell that sampler."""
        self._of(trial).before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Tell that sampler."""
        self._of(trial).after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Reseed both."""
        for sampler in (self._first, self._second):
            sampler.reseed_rng()


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
