"""A mirror of a database says what the database says, and reads it seldom."""

import shutil
from collections import Counter

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.testing.pytest_storages import StorageTestCase
from optuna.trial import TrialState, create_trial

from searchmerge.search.directory import stored_study
from searchmerge.search.mirrored_storage import MirroredStorage, mirrored
from searchmerge.search.storage import close_storage

UNIT = FloatDistribution(0.0, 1.0)


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A database without a study: to make its tables takes longer than a test."""
    file = tmp_path_factory.mktemp("empty") / "study.db"
    close_storage(RDBStorage(f"sqlite:///{file}"))
    return file


@pytest.fixture
def database(tmp_path, empty):
    file = shutil.copyfile(empty, tmp_path / "study.db")
    database = RDBStorage(f"sqlite:///{file}")
    yield database
    close_storage(database)


@pytest.fixture
def storage(database):
    return MirroredStorage(database)


class TestContract(StorageTestCase):
    """What Optuna asks of any storage."""


class Spied:
    """A database that counts its calls, and may break off before or after it has written."""

    def __init__(self, database):
        self._database = database
        self.calls = Counter()
        self.breaks, self.breaks_after = "", ""

    def __getattr__(self, name):
        method = getattr(self._database, name)

        def call(*args, **kwargs):
            self.calls[name] += 1
            if name == self.breaks:
                raise StorageInternalError("nothing was written")
            result = method(*args, **kwargs)
            if name == self.breaks_after:
                raise StorageInternalError("it was written, and the connection lost")
            return result

        return call


def begun(storage, n_objectives=1):
    optuna.create_study(
        storage=storage,
        study_name="s",
        directions=["maximize"] * n_objectives,
        load_if_exists=True,
    )
    sampler = optuna.samplers.RandomSampler(seed=0)
    return optuna.load_study(study_name="s", storage=storage, sampler=sampler)


def all_reads(storage):
    """Return all that a storage says of its study."""
    study_id = storage.get_study_id_from_name("s")
    numbers = range(storage.get_n_trials(study_id))
    ids = [storage.get_trial_id_from_study_id_trial_number(study_id, n) for n in numbers]
    said = {
        "study": (
            storage.get_study_name_from_id(study_id),
            storage.get_study_directions(study_id),
            storage.get_study_user_attrs(study_id),
            storage.get_study_system_attrs(study_id),
            storage.get_all_studies(),
        ),
        "trials": [storage.get_trial(trial_id) for trial_id in ids],
        "all": storage.get_all_trials(study_id),
        "params": [list(t.params) for t in storage.get_all_trials(study_id, deepcopy=False)],
        "numbers": [storage.get_trial_number_from_id(trial_id) for trial_id in ids],
        "attributes": [
            (storage.get_trial_user_attrs(id_), storage.get_trial_system_attrs(id_)) for id_ in ids
        ],
        "internal": [
            storage.get_trial_param(trial_id, name)
            for trial_id in ids
            for name in storage.get_trial_params(trial_id)
        ],
    }
    for state in TrialState:
        said[state] = storage.get_all_trials(study_id, deepcopy=False, states=(state,))
        said[f"n {state}"] = storage.get_n_trials(study_id, state)
    is_single = len(storage.get_study_directions(study_id)) == 1
    if is_single and said[f"n {TrialState.COMPLETE}"]:
        said["best"] = storage.get_best_trial(study_id)
    return said


def suggested(study):
    trial = study.ask()
    trial.suggest_float("coefficient", 0.0, 1.0, step=0.05)
    trial.suggest_categorical("variant", ["nlp", "vision", 3, True])
    trial.suggest_int("n", 1, 9)
    return trial


def steps(study):
    """Do what a study may do, step by step."""
    yield from first_steps(study)
    yield from later_steps(study)


def first_steps(study):
    values = [0.25] * len(study.directions)
    study.set_user_attr("spec", {"experts": ("math", "code")})
    yield
    study.enqueue_trial({"coefficient": 0.35}, user_attrs={"kind": "uniform"})
    study.enqueue_trial({}, user_attrs={"refines": "trial 0", "plan": {"values": [[0.1]]}})
    yield
    first, second = suggested(study), suggested(study)
    yield
    first.set_user_attr("plan", {"values": {"coefficient": ((0.1, 0.2),)}, 1: None})
    first.set_constraint("math", 0.5)
    yield
    if len(values) == 1:
        first.report(0.5, 3)
    study.tell(first, values)
    yield
    second.set_user_attr("failure", "out of memory")
    study.tell(second, state=TrialState.FAIL)
    yield


def later_steps(study):
    values = [0.5] * len(study.directions)
    third = suggested(study)
    third.set_user_attr("cut_off", (1, 2))
    third.set_user_attr("cut_off", (2, 2))
    yield
    study.add_trial(create_trial(state=TrialState.COMPLETE, values=values))
    study.set_metric_names([f"metric {i}" for i in range(len(values))])
    study.set_user_attr("spec", "changed")
    yield
    study.enqueue_trial({"coefficient": 0.6}, skip_if_exists=True)
    study.enqueue_trial({"coefficient": 0.6}, skip_if_exists=True)
    study.tell(third, values)
    suggested(study)
    study.enqueue_trial({"coefficient": 0.9})
    yield


@pytest.mark.parametrize("n_objectives", [1, 2])
def test_all_that_is_read_is_what_the_database_holds(storage, database, n_objectives):
    for _ in steps(begun(storage, n_objectives)):
        assert all_reads(storage) == all_reads(database)


def test_a_study_that_was_begun_before_goes_on(storage, database):
    for _ in steps(begun(storage)):
        pass
    resumed = MirroredStorage(database)
    assert all_reads(resumed) == all_reads(database)
    study = begun(resumed)
    [running] = study.get_trials(states=(TrialState.RUNNING,))
    study.tell(running.number, 0.75)
    popped = suggested(study)
    assert popped.params["coefficient"] == 0.9
    study.tell(popped, 0.8)
    assert all_reads(resumed) == all_reads(database)
    assert study.best_trial.number == popped.number


def test_what_was_finished_before_cannot_be_changed(storage, database):
    study = begun(database)
    study.tell(suggested(study), 0.5)
    study_id = storage.get_study_id_from_name("s")
    assert storage.get_n_trials(study_id) == 1
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, 0)
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_user_attr(trial_id, "a", 1)
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_state_values(trial_id, TrialState.FAIL)
    assert all_reads(storage) == all_reads(database)


def test_a_trial_is_begun_once(storage, database):
    begun(storage).enqueue_trial({})
    study_id = storage.get_study_id_from_name("s")
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, 0)
    assert storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    assert not storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    assert all_reads(storage) == all_reads(database)


def test_of_a_parameter_that_is_written_twice_the_first_stays(storage, database):
    begun(storage)
    trial_id = storage.create_new_trial(storage.get_study_id_from_name("s"))
    storage.set_trial_param(trial_id, "x", 0.25, UNIT)
    storage.set_trial_param(trial_id, "x", 0.75, UNIT)
    assert all_reads(storage) == all_reads(database)
    assert storage.get_trial_params(trial_id) == {"x": 0.25}
    with pytest.raises(ValueError, match="kind"):
        storage.set_trial_param(trial_id, "x", 0.0, CategoricalDistribution([1]))


WRITES = {
    "create_new_trial": lambda storage, study_id, _: storage.create_new_trial(study_id),
    "set_study_user_attr": lambda storage, study_id, _: storage.set_study_user_attr(
        study_id, "a", [1]
    ),
    "set_study_system_attr": lambda storage, study_id, _: storage.set_study_system_attr(
        study_id, "a", [1]
    ),
    "set_trial_param": lambda storage, _, trial_id: storage.set_trial_param(
        trial_id, "x", 0.5, UNIT
    ),
    "set_trial_user_attr": lambda storage, _, trial_id: storage.set_trial_user_attr(
        trial_id, "a", [1]
    ),
    "set_trial_system_attr": lambda storage, _, trial_id: storage.set_trial_system_attr(
        trial_id, "a", [1]
    ),
    "set_trial_intermediate_value": lambda storage, _, trial_id: (
        storage.set_trial_intermediate_value(trial_id, 1, 0.5)
    ),
    "set_trial_state_values": lambda storage, _, trial_id: storage.set_trial_state_values(
        trial_id, TrialState.COMPLETE, [0.5]
    ),
}


@pytest.mark.parametrize("when", ["breaks", "breaks_after"])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_that_fails_leaves_what_the_database_holds(database, name, when):
    spied = Spied(database)
    storage = MirroredStorage(spied)
    begun(storage)
    study_id = storage.get_study_id_from_name("s")
    trial_id = storage.create_new_trial(study_id)
    before = all_reads(storage)
    setattr(spied, when, name)
    with pytest.raises(StorageInternalError):
        WRITES[name](storage, study_id, trial_id)
    assert all_reads(storage) == all_reads(database)
    assert (all_reads(storage) == before) == (when == "breaks")
    setattr(spied, when, "")
    if name != "set_trial_state_values":
        WRITES[name](storage, study_id, trial_id)
        assert all_reads(storage) == all_reads(database)


def test_a_value_that_no_database_takes_is_in_neither(storage, database):
    trial = suggested(begun(storage))
    with pytest.raises(TypeError):
        trial.set_user_attr("plan", object())
    assert all_reads(storage) == all_reads(database)


def test_a_trial_is_read_as_it_begins_and_as_it_ends_alone(database):
    spied = Spied(database)
    study = begun(MirroredStorage(spied))
    for _ in range(6):
        before = spied.calls.copy()
        trial = suggested(study)
        trial.set_user_attr("plan", {})
        trial.set_constraint("math", -0.5)
        study.tell(trial, 0.5)
        study.set_user_attr("best", trial.number)
        assert study.best_trial.number == 0
        assert len(study.trials) == trial.number + 1
        assert spied.calls - before == {
            "create_new_trial": 1,
            "get_trial": 2,
            "set_trial_param": 3,
            "set_trial_user_attr": 1,
            "set_trial_system_attr": 1,
            "set_trial_state_values": 1,
            "set_study_user_attr": 1,
        }


def test_what_was_handed_out_does_not_change(storage):
    study = begun(storage)
    plan = {"values": [0.5]}
    trial = study.ask()
    storage.set_trial_system_attr(1, "first", 0)
    [listed] = listing = study.get_trials(deepcopy=False)
    read, attributes = storage.get_trial(1), storage.get_study_user_attrs(1)
    trial.suggest_float("x", 0.0, 1.0)
    trial.set_user_attr("plan", plan)
    trial.report(0.5, 1)
    study.set_user_attr("best", 0)
    study.ask()
    assert len(listing) == 1
    assert not (attributes or read.params or read.user_attrs or listed.intermediate_values)
    assert not (listed.params or listed.distributions or listed.user_attrs)
    plan["values"].append(0.75)
    assert study.trials[0].user_attrs == {"plan": {"values": [0.5]}}


def test_a_journal_holds_all_in_memory_by_itself(tmp_path, database):
    journal = JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))
    assert mirrored(journal) is journal
    assert isinstance(mirrored(database), MirroredStorage)


def test_what_a_driver_knew_at_its_end_is_what_the_next_one_reads(toy, tmp_path):
    trials = toy().run(6)
    with stored_study(tmp_path) as study:
        assert study.trials == trials
