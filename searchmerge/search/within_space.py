"""A sampler that sees the trials of its space alone.

A trial whose plan was refined has no parameters. Samplers of Optuna search what all trials have
in common, so that a single one would leave them nothing to search.
"""

from collections.abc import Container, Sequence
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from searchmerge.search.trials import is_refined


class WithinSpace(BaseSampler):
    """A sampler to which trials outside its space are not shown.

    Args:
        sampler: Proposes the parameters of all others.
        storage: Of the study.
    """

    def __init__(self, sampler: BaseSampler, storage: BaseStorage) -> None:
        self._sampler, self._storage = sampler, storage

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return what the sampler says of the trials of its space."""
        return self._sampler.infer_relative_search_space(self._shown(study), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return what the sampler proposes."""
        return self._sampler.sample_relative(self._shown(study), trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return what the sampler proposes."""
        return self._sampler.sample_independent(
            self._shown(study), trial, param_name, param_distribution
        )

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Tell the sampler, where the trial is of its space."""
        if not is_refined(trial):
            self._sampler.before_trial(self._shown(study), trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Tell the sampler, where the trial is of its space."""
        if not is_refined(trial):
            self._sampler.after_trial(self._shown(study), trial, state, values)

    def reseed_rng(self) -> None:
        """Reseed the sampler."""
        self._sampler.reseed_rng()

    def _shown(self, study: optuna.Study) -> optuna.Study:
        """Return the study as it would be without the trials outside the space."""
        if not any(map(is_refined, study.get_trials(deepcopy=False))):
            return study
        shown = cast("BaseStorage", _Shown(study, self._storage))
        return optuna.load_study(study_name=study.study_name, storage=shown, sampler=self._sampler)


class _Shown:
    """A study's storage, but for the trials outside the space."""

    def __init__(self, study: optuna.Study, storage: BaseStorage) -> None:
        self._study, self._storage = study, storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,  # noqa: FBT001, FBT002 - as Optuna calls it
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Return the trials of the space; the study itself keeps those that are finished."""
        trials = self._study.get_trials(deepcopy=deepcopy, states=states)
        return [trial for trial in trials if not is_refined(trial)]
