"""A worker elsewhere gives a merged model's tensors, or the reason why it does not."""

import functools
import time

import pytest
import torch

from searchmerge.errors import EvaluationError, WorkerError
from tests.execution import workers
from tests.execution.conftest import STORE_BYTES
from tests.execution.workers import BREAKS, DIES, FAILS, plan

pytestmark = pytest.mark.ray


@pytest.fixture
def weights(cluster):
    """Return what an actor of some kind gives."""
    import ray

    from searchmerge.execution.ray.actor import RayWorker
    from searchmerge.execution.ray.weights import weights_of

    actors = []

    def give(make, timeout_s=60.0):
        actors.append(ray.remote(RayWorker).options(num_cpus=0.1).remote({}))
        list(actors[-1].load.options(num_returns="streaming").remote(make))
        return weights_of(actors[-1], plan(0.5), torch.float32, timeout_s)

    yield give
    for actor in actors:
        ray.kill(actor)


def test_tensors_come_one_by_one_those_too_that_are_larger_than_rays_store(weights):
    [(first, large), (second, small)] = weights(workers.make_whole)
    assert (first, second) == ("large", "small")
    assert large.nbytes > STORE_BYTES
    assert torch.equal(large, torch.full_like(large, 0.5))
    assert torch.equal(small, torch.arange(3.0))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (DIES, WorkerError, "a worker was lost as it merged: .*died"),
        (BREAKS, WorkerError, "a worker could not merge it: no memory for it"),
        (FAILS, EvaluationError, "'small' is not finite"),
    ],
)
def test_what_ends_them_is_said(weights, kind, error, message):
    given = weights(functools.partial(workers.make_whole, kind))
    assert next(given)[0] == "large"
    with pytest.raises(error, match=message):
        next(given)


def test_a_worker_that_hangs_is_not_waited_for_for_ever(cluster):
    import ray

    from searchmerge.execution.ray.weights import weights_of

    class Hangs:
        def begin_merging(self, plan, dtype):
            time.sleep(3600)

    actor = ray.remote(Hangs).options(num_cpus=0.1).remote()
    try:
        with pytest.raises(WorkerError, match=r"a worker gave no tensor within 0\.5 s"):
            next(weights_of(actor, plan(0.5), torch.float32, 0.5))
    finally:
        ray.kill(actor)


def test_a_worker_that_merges_no_whole_models_says_so(weights):
    with pytest.raises(WorkerError, match="merges no whole models"):
        next(weights(workers.make))
