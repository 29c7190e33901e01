"""What every executor must do, in this process and on Ray."""

import socket
import time
from dataclasses import replace

import pytest
import torch

from searchmerge.errors import CheckpointError, EvaluationError, SpecError, WorkerError
from searchmerge.execution.executor import (
    Differentiated,
    Failed,
    Finished,
    InProcessExecutor,
    Scored,
    WorkerState,
)
from searchmerge.execution.gradient import LossRequest
from searchmerge.search.refine import Material, Recipe, refinement
from searchmerge.search.refiner import Refiner
from tests.execution import gradients, workers
from tests.execution.workers import BREAKS, FAILS, FINE, ROUNDS, plan
from tests.toy import EXPERTS


def in_process(request, make):
    return InProcessExecutor(make())


def on_ray(request, make):
    request.getfixturevalue("cluster")
    from searchmerge.execution.ray.cluster import RaySettings
    from searchmerge.execution.ray.pool import RayExecutor

    return RayExecutor(make, RaySettings(workers=1, deadline_s=60.0))


@pytest.fixture(scope="module", params=[in_process, pytest.param(on_ray, marks=pytest.mark.ray)])
def executor(request):
    executor = request.param(request, workers.make)
    executor.tasks()
    yield executor
    executor.close()


def until_it_ends(executor, job):
    """Return all events until a job has ended."""
    events = []
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        if (event := executor.next_event(1.0)) is not None:
            events.append(event)
            if event.job == job and not isinstance(event, Scored | Differentiated):
                return events
    raise TimeoutError(f"job {job} did not end: {events}")


def test_it_knows_the_tasks(executor):
    assert {name: info.n_examples for name, info in executor.tasks().items()} == dict.fromkeys(
        EXPERTS, 40
    )


def test_it_tells_what_its_worker_is_at(executor):
    [worker] = executor.workers()
    assert worker == WorkerState(worker.name, socket.gethostname(), "cpu", "idle")
    executor.submit(7, plan(FINE), ROUNDS)
    assert executor.workers() == [replace(worker, doing="working", job=7)]
    until_it_ends(executor, 7)
    assert executor.workers() == [worker]


def test_a_job_gives_every_round_in_order_and_then_ends(executor):
    executor.submit(7, plan(FINE), ROUNDS)
    *scored, last = until_it_ends(executor, 7)
    assert last == Finished(7)
    expected = list(workers.make().score(plan(FINE), ROUNDS))
    assert [event.result.scores for event in scored] == [result.scores for result in expected]
    assert all(event.result.score_s > 0 for event in scored)
    assert scored[0].result.merge_s > 0
    assert {event.result.merge_s for event in scored[1:]} == {0.0}


def test_a_worker_is_free_before_and_after_a_job_and_takes_one_at_a_time(executor):
    assert executor.n_free == 1
    executor.submit(1, plan(FINE), ROUNDS)
    assert executor.n_free == 0
    with pytest.raises(RuntimeError, match="job 2 was submitted while"):
        executor.submit(2, plan(FINE), ROUNDS)
    until_it_ends(executor, 1)
    assert executor.n_free == 1


def test_nothing_more_is_heard_of_a_job_that_was_stopped(executor):
    executor.submit(1, plan(FINE), ROUNDS)
    assert isinstance(executor.next_event(30.0), Scored)
    executor.stop(1)
    assert executor.n_free == 1
    executor.submit(2, plan(0.7), ROUNDS)
    events = until_it_ends(executor, 2)
    assert {event.job for event in events} == {2}
    expected = [result.scores for result in workers.make().score(plan(0.7), ROUNDS)]
    assert [event.result.scores for event in events[:-1]] == expected


def test_a_candidate_that_cannot_be_scored_fails_and_its_worker_goes_on(executor):
    executor.submit(1, plan(FAILS), ROUNDS)
    *scored, failed = until_it_ends(executor, 1)
    assert len(scored) == 1
    assert isinstance(failed, Failed)
    assert "has NaN logits" in failed.reason
    executor.submit(2, plan(FINE), ROUNDS)
    assert until_it_ends(executor, 2)[-1] == Finished(2)


def test_an_error_that_is_not_the_candidates_is_raised(executor):
    executor.submit(1, plan(BREAKS), ROUNDS)
    with pytest.raises(Exception, match="a mistake in the evaluator"):
        until_it_ends(executor, 1)
    assert executor.n_free == 1


def test_a_job_of_no_rounds_ends_at_once(executor):
    executor.submit(1, plan(FINE), ())
    assert until_it_ends(executor, 1) == [Finished(1)]


def test_without_a_job_there_is_no_event(executor):
    start = time.monotonic()
    assert executor.next_event(0.2) is None
    assert time.monotonic() - start < 10


def test_many_jobs_in_a_row_keep_to_their_numbers(executor):
    for job in range(10):
        executor.submit(job, plan(FINE, job / 10), ROUNDS)
        events = until_it_ends(executor, job)
        assert {event.job for event in events} == {job}
        assert len(events) == len(ROUNDS) + 1


@pytest.fixture(scope="module", params=[in_process, pytest.param(on_ray, marks=pytest.mark.ray)])
def differentiating(request):
    executor = request.param(request, gradients.worker)
    executor.tasks()
    yield executor
    executor.close()


ALIKE = replace(gradients.PLAN, values={"coefficient": ((0.5, 0.5), (0.5, 0.5))})
REQUEST = LossRequest({"math": ((0, 1, 2), (3,)), "code": ((5, 6),)})


def test_a_gradient_is_a_job_like_any_other(differentiating):
    [expected] = gradients.worker().gradient(gradients.PLAN, REQUEST)
    for job in (1, 2):
        differentiating.submit_gradient(job, gradients.PLAN, REQUEST)
        assert differentiating.n_free == 0
        differentiated, last = until_it_ends(differentiating, job)
        assert isinstance(differentiated, Differentiated)
        assert differentiated.result.losses == expected.losses
        assert differentiated.result.rows == expected.rows
        assert differentiated.result.seconds > 0
        assert last == Finished(job)
    assert differentiating.n_free == 1


def test_losses_that_are_not_there_are_no_failure_of_the_candidates(differentiating):
    request = LossRequest({"law": ((0,),)})
    differentiating.submit_gradient(1, gradients.PLAN, request)
    with pytest.raises(SpecError, match="task 'law' has no loss 'labels'"):
        until_it_ends(differentiating, 1)
    assert differentiating.n_free == 1


def test_a_refinement_proposes_the_same_on_every_executor(differentiating):
    recipe = Recipe(gradients.PLAN.groups, n_steps=20, batch=12, rate=0.05)
    material = Material(
        dict.fromkeys(("math", "code"), range(40)), dict.fromkeys(("math", "code"), 1.0)
    )

    def proposed(executor):
        return Refiner(executor).run(
            {
                name: refinement(plan, recipe, material)
                for name, plan in (("one", gradients.PLAN), ("two", ALIKE))
            }
        )

    expected = proposed(InProcessExecutor(gradients.worker()))
    assert any(expected.values())
    assert proposed(differentiating) == expected


@pytest.fixture(scope="module", params=[in_process, pytest.param(on_ray, marks=pytest.mark.ray)])
def merging(request):
    executor = request.param(request, workers.make_whole)
    executor.tasks()
    yield executor
    executor.close()


def test_a_merged_models_tensors_come_from_the_worker(merging):
    given = []
    merging.write_merged(plan(0.5), torch.float32, given.extend)
    [(first, large), (second, small)] = given
    assert (first, second) == ("large", "small")
    assert torch.equal(large, torch.full_like(large, 0.5))
    assert torch.equal(small, torch.arange(3.0))
    assert merging.n_free == 1


def test_what_cannot_be_written_is_not_asked_of_another_worker(merging):
    given = []

    def fail(weights):
        given.append(next(weights))
        raise CheckpointError("out: cannot be written: No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        merging.write_merged(plan(0.5), torch.float32, fail)
    assert len(given) == 1
    merging.write_merged(plan(0.5), torch.float32, given.extend)
    assert [name for name, _ in given] == ["large", "large", "small"]


def test_a_worker_here_that_is_at_a_job_or_merges_no_whole_models_says_so():
    executor = InProcessExecutor(workers.make())
    with pytest.raises(WorkerError, match="merges no whole models"):
        executor.write_merged(plan(0.5), torch.float32, list)
    executor.submit(1, plan(FINE), ROUNDS)
    with pytest.raises(WorkerError, match="the one worker is at job 1"):
        executor.write_merged(plan(0.5), torch.float32, list)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (FAILS, EvaluationError, "'small' is not finite"),
        (workers.DEVICE_FAULT, WorkerError, "could not merge it: the device failed: CUDA error"),
        (BREAKS, WorkerError, "could not merge it: no memory for it"),
    ],
)
def test_what_ends_a_merged_models_tensors_is_said(kind, error, message):
    given = []
    executor = InProcessExecutor(workers.make_whole(kind))
    with pytest.raises(error, match=message):
        executor.write_merged(plan(0.5), torch.float32, given.extend)
    assert [name for name, _ in given] == ["large"]
