"""A sampler that leaves every answer to another one."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState


class DelegatingSampler(BaseSampler):
    """A sampler that leaves every answer to another one, and may show it less of the study."""

    @abstractmethod
    def sampler_of(self, trial: FrozenTrial) -> BaseSampler:
        """Return the sampler that a trial is left to."""

    def shown(self, study: optuna.Study) -> optuna.Study:
        """Return what samplers see of a study: all of it."""
        return study

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return what the trial's sampler says."""
        return self.sampler_of(trial).infer_relative_search_space(self.shown(study), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return what the trial's sampler proposes."""
        return self.sampler_of(trial).sample_relative(self.shown(study), trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return what the trial's sampler proposes."""
        return self.sampler_of(trial).sample_independent(
            self.shown(study), trial, param_name, param_distribution
        )

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Tell the trial's sampler."""
        self.sampler_of(trial).before_trial(self.shown(study), trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Tell the trial's sampler."""
        self.sampler_of(trial).after_trial(self.shown(study), trial, state, values)
