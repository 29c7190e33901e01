"""A sampler that sees the trials of its space alone.

A trial whose plan was refined has no parameters. Samplers of Optuna search what all trials have
in common, so that a single one would leave them nothing to search. A failed trial that is tried
again says nothing of its plan, which a sampler may take for a bad one.
"""

from collections.abc import Collection, Container, Sequence
from typing import Any, cast

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from searchmerge.search.samplers.delegating import DelegatingSampler
from searchmerge.search.trials import is_refined, repeated


class WithinSpace(DelegatingSampler):
    """A sampler to which trials outside its space, and failed ones tried again, are not shown.

    Args:
        sampler: Proposes the parameters of all others.
        storage: Of the study.
    """

    def __init__(self, sampler: BaseSampler, storage: BaseStorage) -> None:
        self._sampler, self._storage = sampler, storage
        self._hides_some = False
        self._repeated: set[int] | None = None  # until the study is looked at

    def sampler_of(self, trial: FrozenTrial) -> BaseSampler:
        """Return the sampler."""
        return self._sampler

    def shown(self, study: optuna.Study) -> optuna.Study:
        """Return the study as it would be without the trials that are not shown.

        The study is looked at once, as that reads its storage: what is outside comes to this
        sampler before it is run, and failed trials are enqueued again before any is.
        """
        if self._repeated is None:
            trials = study.get_trials(deepcopy=False)
            self._repeated = repeated(trials)
            self._hides_some |= bool(self._repeated) or any(map(is_refined, trials))
        if not self._hides_some:
            return study
        shown = cast("BaseStorage", _Shown(study, self._storage, self._repeated))
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
    """A study's storage, but for the trials outside the space and some others."""

    def __init__(self, study: optuna.Study, storage: BaseStorage, others: Collection[int]) -> None:
        self._study, self._storage, self._others = study, storage, others

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
        return [t for t in trials if not is_refined(t) and t.number not in self._others]
