"""Optuna's storage for the one driver that writes to a study: it need not read what it wrote.

Optuna reads a trial three times, and all unfinished ones once, before it is over. From a database
that takes longer than to write it.
"""

import contextlib
import copy
import json
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState


def mirrored(storage: BaseStorage) -> BaseStorage:
    """Return a storage whose studies are read from memory; a journal is so by itself."""
    return MirroredStorage(storage) if isinstance(storage, RDBStorage) else storage


@dataclass(slots=True)
class _Study:
    """What a database holds of a study.

    What was handed out is never changed, but replaced.

    Attributes:
        name: What it is called.
        directions: One per objective.
        user_attrs: Attributes of ours.
        system_attrs: Attributes of Optuna's.
        trials: By number, in that order.
    """

    name: str
    directions: list[StudyDirection]
    user_attrs: dict[str, Any]
    system_attrs: dict[str, Any]
    trials: dict[int, FrozenTrial]


class MirroredStorage(BaseStorage):
    """A database, and a mirror in memory of its studies, from which they are read.

    A study is read once, when it is first asked for. Each change is written to the database first,
    then to the mirror. Where it cannot be written, or is broken off, the mirror of the study is
    dropped, and read again when it is next asked for: it never holds what the database does not.

    No other process may change a study meanwhile: that would not be seen. One thread alone may use
    it.

    Args:
        storage: The database.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage
        self._studies: dict[int, _Study] = {}
        self._places: dict[int, tuple[int, int]] = {}
        """Id of a trial to its study's and its number, but for those that were finished before."""

    # --- The mirror -----------------------------------------------------------------------------

    def _study(self, study_id: int) -> _Study:
        """Return the mirror of a study, which is read where there is none.

        Raises:
            KeyError: If there is no such study.
        """
        if study_id not in self._studies:
            stored = self._storage
            study = _Study(
                stored.get_study_name_from_id(study_id),
                stored.get_study_directions(study_id),
                stored.get_study_user_attrs(study_id),
                stored.get_study_system_attrs(study_id),
                {trial.number: trial for trial in stored.get_all_trials(study_id, deepcopy=False)},
            )
            for number, trial in study.trials.items():
                if not trial.state.is_finished():
                    trial_id = stored.get_trial_id_from_study_id_trial_number(study_id, number)
                    self._places[trial_id] = study_id, number
            self._studies[study_id] = study
        return self._studies[study_id]

    @contextlib.contextmanager
    def _writing(self, study_id: int) -> Iterator[_Study]:
        """Yield the mirror of a study, which is kept if nothing is raised."""
        study = self._study(study_id)
        del self._studies[study_id]
        yield study
        self._studies[study_id] = study

    @contextlib.contextmanager
    def _writing_trial(self, trial_id: int) -> Iterator[FrozenTrial]:
        """Yield a copy of a trial, which takes its place if nothing is raised."""
        if trial_id not in self._places:  # of a study that is not mirrored, finished, or unknown
            yield self._storage.get_trial(trial_id)
            return
        study_id, number = self._places[trial_id]
        with self._writing(study_id) as study:
            trial = copy.copy(study.trials[number])
            yield trial
            study.trials[number] = trial

    # --- Studies --------------------------------------------------------------------------------

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        """Begin a study and return its id."""
        return self._storage.create_new_study(directions, study_name)

    def delete_study(self, study_id: int) -> None:
        """Delete a study with its trials."""
        self._studies.pop(study_id, None)
        self._places = {id_: place for id_, place in self._places.items() if place[0] != study_id}
        self._storage.delete_study(study_id)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Write an attribute of ours."""
        with self._writing(study_id) as study:
            self._storage.set_study_user_attr(study_id, key, value)
            study.user_attrs = {**study.user_attrs, key: _as_stored(value)}

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Write an attribute of Optuna's."""
        with self._writing(study_id) as study:
            self._storage.set_study_system_attr(study_id, key, value)
            study.system_attrs = {**study.system_attrs, key: _as_stored(value)}

    def get_study_id_from_name(self, study_name: str) -> int:
        """Return the id of the study that is called so."""
        known = (id_ for id_, study in self._studies.items() if study.name == study_name)
        study_id = next(known, None)
        return self._storage.get_study_id_from_name(study_name) if study_id is None else study_id

    def get_study_name_from_id(self, study_id: int) -> str:
        """Return what a study is called."""
        return self._study(study_id).name

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """Return whether each objective is maximized."""
        return self._study(study_id).directions

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """Return the attributes of ours."""
        return self._study(study_id).user_attrs

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Return the attributes of Optuna's."""
        return self._study(study_id).system_attrs

    def get_all_studies(self) -> list[Any]:
        """Return what the database holds of all studies."""
        return self._storage.get_all_studies()

    # --- Trials: written ------------------------------------------------------------------------

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Begin or enqueue a trial and return its id; its number and time are the database's."""
        with self._writing(study_id) as study:
            trial_id = self._storage.create_new_trial(study_id, template_trial)
            trial = self._storage.get_trial(trial_id)
            study.trials[trial.number] = trial
            self._places[trial_id] = study_id, trial.number
        return trial_id

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Begin or end a trial, at the database's time; return whether its state has changed."""
        if trial_id not in self._places:
            return self._storage.set_trial_state_values(trial_id, state, values)
        study_id, number = self._places[trial_id]
        with self._writing(study_id) as study:
            has_changed = self._storage.set_trial_state_values(trial_id, state, values)
            study.trials[number] = self._storage.get_trial(trial_id)
        return has_changed

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """Write a parameter; of two of one name a database keeps the first."""
        with self._writing_trial(trial_id) as trial:
            self._storage.set_trial_param(trial_id, param_name, param_value_internal, distribution)
            if param_name not in trial.params:
                value = distribution.to_external_repr(param_value_internal)
                trial.params = {**trial.params, param_name: value}
                trial.distributions = {**trial.distributions, param_name: distribution}

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        """Write a value before the trial's end."""
        with self._writing_trial(trial_id) as trial:
            self._storage.set_trial_intermediate_value(trial_id, step, intermediate_value)
            trial.intermediate_values = {**trial.intermediate_values, step: intermediate_value}

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Write an attribute of ours."""
        with self._writing_trial(trial_id) as trial:
            self._storage.set_trial_user_attr(trial_id, key, value)
            trial.user_attrs = {**trial.user_attrs, key: _as_stored(value)}

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Write an attribute of Optuna's."""
        with self._writing_trial(trial_id) as trial:
            self._storage.set_trial_system_attr(trial_id, key, value)
            trial.system_attrs = {**trial.system_attrs, key: _as_stored(value)}

    # --- Trials: read ---------------------------------------------------------------------------

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """Return the id of the trial that has this number."""
        return self._storage.get_trial_id_from_study_id_trial_number(study_id, trial_number)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return a trial; Optuna changes the one that it begins as it writes to it."""
        if trial_id not in self._places:
            return self._storage.get_trial(trial_id)
        study_id, number = self._places[trial_id]
        trial = self._study(study_id).trials[number]
        if trial.state.is_finished():
            return trial
        trial = copy.copy(trial)
        trial.params, trial.distributions = dict(trial.params), dict(trial.distributions)
        trial.user_attrs, trial.system_attrs = dict(trial.user_attrs), dict(trial.system_attrs)
        trial.intermediate_values = dict(trial.intermediate_values)
        return trial

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,  # noqa: FBT001, FBT002 - as Optuna calls it
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Return the trials of a study in these states, by number."""
        trials = [
            trial
            for trial in self._study(study_id).trials.values()
            if states is None or trial.state in states
        ]
        return copy.deepcopy(trials) if deepcopy else trials

    def remove_session(self) -> None:
        """Let go of this thread's connection to the database."""
        self._storage.remove_session()


def _as_stored(value: Any) -> Any:
    """Return what is read of an attribute that was written, and is nobody else's."""
    return json.loads(json.dumps(value))
