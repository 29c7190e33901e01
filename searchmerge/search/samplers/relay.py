"""Two samplers, one after the other."""

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState


class RelaySampler(BaseSampler):
    """One sampler for the first trials, another for all later ones, which has learnt from them.

    Args:
        first: Proposes trials 0 to ``n_first - 1``.
        second: Proposes the others.
        n_first: How many trials are the first one's.
    """

    def __init__(self, first: BaseSampler, second: BaseSampler, n_first: int) -> None:
        self._first, self._second, self._n_first = first, second, n_first

    def _sampler_of(self, trial: FrozenTrial) -> BaseSampler:
        return self._first if trial.number < self._n_first else self._second

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return what that sampler says."""
        return self._sampler_of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return what that sampler proposes."""
        return self._sampler_of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return what that sampler proposes."""
        return self._sampler_of(trial).sample_independent(
            study, trial, param_name, param_distribution
        )

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Tell that sampler."""
        self._sampler_of(trial).before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Tell that sampler."""
        self._sampler_of(trial).after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Reseed both."""
        for sampler in (self._first, self._second):
            sampler.reseed_rng()
