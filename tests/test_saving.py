"""The winner's model is what a worker merges, or is merged anew where none can."""

import logging

import pytest
import torch
from safetensors.torch import load_file

from searchmerge.config import RunConfig
from searchmerge.errors import CheckpointError, EvaluationError, StudyError, WorkerError
from searchmerge.models import load_task_vectors, merged_here, open_models
from searchmerge.report.results import REPORT_FILE, Results
from searchmerge.run import run_study
from searchmerge.saving import MODEL_DIR, save_results
from searchmerge.study import read_study
from searchmerge.watch import Watch
from tests.search.conftest import Recorder
from tests.tiny import make_study


class Gives:
    """An executor whose worker merges some tensors, doubled, and then ends with an error."""

    def __init__(self, models, vectors, error=None):
        self._models, self._vectors, self._error = models, vectors, error
        self.asked = []

    def write_merged(self, plan, dtype, write):
        self.asked.append(dtype)
        write(self._doubled(plan))

    def _doubled(self, plan):
        for n_given, (name, tensor) in enumerate(merged_here(self._models, self._vectors, plan)):
            if n_given == 2 and self._error is not None:
                raise self._error
            yield name, tensor * 2 if tensor.is_floating_point() else tensor


class GivesNothing:
    def write_merged(self, plan, dtype, write):
        raise WorkerError("no worker was free")


class GivesTwice(Gives):
    """An executor whose first worker ends with an error, so that the next is asked."""

    def write_merged(self, plan, dtype, write):
        with pytest.raises(WorkerError):
            super().write_merged(plan, dtype, write)
        write(merged_here(self._models, self._vectors, plan))


@pytest.fixture(scope="module")
def done(models, tmp_path_factory):
    """A small study that was run, and its models."""
    folder = tmp_path_factory.mktemp("run")
    for name in models.iterdir():
        (folder / name.name).symlink_to(name)
    study = read_study(make_study(folder, search={"sampler": "random", "n_trials": 5}))
    results = run_study(study, RunConfig(engine="eager", device="cpu"), folder / "run", Recorder())
    return study, results, Watch(open_models(study)), folder / "run"


@pytest.fixture
def save(done, tmp_path):
    """Save what was found once more, from an executor; return the weights."""
    study, results, watch, _ = done

    def go(executor):
        save_results(results, study, watch, tmp_path, Recorder(), executor)
        return load_file(tmp_path / MODEL_DIR / "model.safetensors")

    return go


def expected(done):
    return load_file(done[3] / MODEL_DIR / "model.safetensors")


def gives(done, error=None):
    study, _, watch, _ = done
    return Gives(watch.models, load_task_vectors(study, watch.models), error)


def test_what_a_worker_merges_is_saved(done, save):
    executor = gives(done)
    found, wanted = save(executor), expected(done)
    assert executor.asked == [done[2].models.dtype]
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 2 * wanted[name])


def test_what_no_worker_merges_is_merged_here(done, save, caplog):
    found, wanted = save(GivesNothing()), expected(done)
    assert "the model is merged in this process, as no worker was free" in caplog.text
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name])


def test_what_is_saved_is_of_one_worker_alone(done, save, tmp_path):
    study, _, watch, _ = done
    lost = WorkerError("a worker was lost as it merged")
    found = save(GivesTwice(watch.models, load_task_vectors(study, watch.models), lost))
    wanted = expected(done)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name])
    assert not (tmp_path / f".{MODEL_DIR}.part").exists()


def test_a_worker_that_fails_half_way_has_the_model_merged_here(done, save, caplog):
    with caplog.at_level(logging.WARNING, logger="searchmerge"):
        found = save(gives(done, WorkerError("a worker was lost as it merged")))
    assert "the model is merged in this process, as a worker was lost as it merged" in caplog.text
    wanted = expected(done)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name])


@pytest.mark.parametrize("error", [EvaluationError("not finite"), CheckpointError("has changed")])
def test_what_would_end_the_same_way_is_not_tried_twice(done, save, tmp_path, error):
    executor = gives(done, error)
    with pytest.raises(type(error), match=str(error)):
        save(executor)
    assert len(executor.asked) == 1
    assert not (tmp_path / MODEL_DIR).exists()


class Killed(BaseException):
    """What ends a process without a word of it."""


@pytest.mark.parametrize("error", [CheckpointError("disk full"), KeyboardInterrupt(), Killed()])
def test_a_report_says_that_its_model_is_not_saved_until_it_is(done, save, tmp_path, error):
    with pytest.raises(type(error)):
        save(gives(done, error))
    told = (tmp_path / REPORT_FILE).read_text().splitlines()
    assert told[2] == "The model is not saved yet; the same `searchmerge run` saves it."
    assert not Results.load(tmp_path).is_saved
    assert not (tmp_path / MODEL_DIR).exists()
    save(gives(done))
    assert "not saved yet" not in (tmp_path / REPORT_FILE).read_text()
    assert Results.load(tmp_path) == done[1]


def test_a_card_that_cannot_be_written_is_an_error_of_the_study(done, save, tmp_path):
    save(gives(done))
    (tmp_path / MODEL_DIR / "README.md").unlink()
    (tmp_path / MODEL_DIR / "README.md").mkdir()
    with pytest.raises(StudyError, match=f"{MODEL_DIR}: cannot be written: "):
        save(gives(done))


def test_a_model_that_is_there_already_is_not_merged_again(done, save):
    executor = gives(done)
    save(executor)
    save(executor)
    assert len(executor.asked) == 1
