"""A sampler that sees the trials of its space alone.

A trial whose plan was refined has no parameters. Samplers of Optuna search what all trials have
in common, so that a single one would leave them nothing to search.
"""

from collections.abc import Container, Sequence
from typing import Any, cast

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from searchmerge.search.samplers.delegating import DelegatingSampler
from searchmerge.search.trials import is_refined


class WithinSpace(DelegatingSampler):
    """A sampler to which trials outside its space are not shown.

    Args:
        sampler: Proposes the parameters of all others.
        storage: Of the study.
    """

    def __init__(self, sampler: BaseSampler, storage: BaseStorage) -> None:
        self._sampler, self._storage = sampler, storage
        self._hides_some: bool | None = None  # until the study is looked at

    def sampler_of(self, trial: FrozenTrial) -> BaseSampler:
        """Return the sampler."""
        return self._sampler

    def shown(self, study: optuna.Study) -> optuna.Study:
        """Return the study as it would be without the trials outside the space.

        The study is looked at once, as that reads its storage: what is outside comes to this
        sampler before it is run.
        """
        if self._hides_some is None:
            self._hides_some = any(map(is_refined, study.get_trials(deepcopy=False)))
        if not self._hides_some:
            return study
        shown = cast("BaseStorage", _Shown(study, self._storage))
        return optuna.load_study(study_name=study.study_name, storage=shown, sampler=self._sampler)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Tell the sampler, where the trial is of its space."""
        if is_refined(trial):
            self._hides_some = True
        else:
            super().before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Tell the sampler, where the trial is of its space."""
        if not is_refined(trial):
            super().after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Reseed the sampler."""
        self._sampler.reseed_rng()


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
