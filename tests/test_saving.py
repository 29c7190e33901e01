"""The winner's model is what a worker merges, or is merged anew where none can."""

import logging

import pytest
import torch
from safetensors.torch import load_file

from searchmerge.config import RunConfig
from searchmerge.errors import CheckpointError, EvaluationError, WorkerError
from searchmerge.models import load_task_vectors, merged_here, open_models
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

    def merged(self, plan, dtype):
        self.asked.append(dtype)
        return self._doubled(plan)

    def _doubled(self, plan):
        for n_given, (name, tensor) in enumerate(merged_here(self._models, self._vectors, plan)):
            if n_given == 2 and self._error is not None:
                raise self._error
            yield name, tensor * 2 if tensor.is_floating_point() else tensor


class GivesNothing:
    def merged(self, plan, dtype):
        return None


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


def test_what_no_worker_merges_is_merged_here(done, save):
    found, wanted = save(GivesNothing()), expected(done)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name])


def test_a_worker_that_fails_half_way_has_the_model_merged_here(done, save, caplog):
    with caplog.at_level(logging.WARNING, logger="searchmerge"):
        found = save(gives(done, WorkerError("a worker was lost as it merged")))
    assert "the model is merged in this process, as a worker was lost as it merged" in caplog.text
    wanted = expected(done)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name])


@pytest.mark.parametrize("error", [EvaluationError("not finite"), CheckpointError("has changed")])
def test_what_would_end_the_same_way_is_not_tried_twice(done, save, tmp_path, error):
    with pytest.raises(type(error), match=str(error)):
        save(gives(done, error))
    assert not (tmp_path / MODEL_DIR).exists()


def test_a_model_that_is_there_already_is_not_merged_again(done, save):
    executor = gives(done)
    save(executor)
    save(executor)
    assert len(executor.asked) == 1
