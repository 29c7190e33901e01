"""Refinements on an executor: side by side, past lost workers, to whatever end."""

from collections import deque

import pytest

from searchmerge.execution.executor import Differentiated, Failed, Finished, Lost
from searchmerge.merging.method import default_plan
from searchmerge.search.refine import refinement
from searchmerge.search.refiner import GivenUp, Refiner
from tests.search.test_refine import (
    EXPERTS,
    GROUPS,
    MATERIAL,
    N_BEFORE,
    RECIPE,
    START,
    Bowl,
    Cliff,
    run,
)

OTHER = default_plan("task_arithmetic", EXPERTS, groups=GROUPS, coefficient=0.5)


class Workers:
    """An executor of some workers that answer at once, unless an event is put in their way."""

    def __init__(self, n_workers=2, instead=()):
        self.bowl = Bowl()
        self._n_workers = n_workers
        self._instead = deque(instead)
        self._events = deque()
        self.live, self.stopped, self.most_at_once = {}, [], 0

    @property
    def n_free(self):
        return self._n_workers - len(self.live)

    def submit_gradient(self, job, plan, request):
        assert job not in self.live
        self.live[job] = (plan, request)
        self.most_at_once = max(self.most_at_once, len(self.live))
        event = self._instead.popleft() if self._instead else None
        if event is not None:
            self._events.append(event(job))
            return
        self._events.append(Differentiated(job, self.bowl.answer(plan, request)))
        self._events.append(Finished(job))

    def next_event(self, timeout_s):
        event = self._events.popleft() if self._events else None
        if event is not None and not isinstance(event, Differentiated):
            del self.live[event.job]
        return event

    def stop(self, job):
        self.stopped.append(job)


def both():
    return {
        "trial 3": refinement(START, RECIPE, MATERIAL),
        "TIES": refinement(OTHER, RECIPE, MATERIAL),
    }


def alone():
    return {"trial 3": run(start=START)[0], "TIES": run(start=OTHER)[0]}


@pytest.mark.parametrize("n_workers", [1, 2, 5])
def test_side_by_side_they_propose_what_each_does_alone(n_workers):
    workers, told = Workers(n_workers), []
    assert Refiner(workers).run(both(), lambda *end: told.append(end)) == alone()
    assert workers.most_at_once == min(n_workers, 2)
    assert dict(told) == alone()


def test_what_a_lost_worker_was_asked_goes_to_another(caplog):
    def lost(job):
        return Lost(job, "the worker died")

    workers = Workers(1, [None, lost, lost, None, lost])
    with caplog.at_level("WARNING"):
        assert Refiner(workers).run(both()) == alone()
    assert "lost its worker, and goes on: the worker died" in caplog.text


def test_one_at_which_workers_die_again_and_again_is_given_up(caplog):
    deaths = [lambda job: Lost(job, "the worker died")] * 3
    with caplog.at_level("WARNING"):
        proposed = Refiner(Workers(1, deaths)).run({"TIES": refinement(OTHER, RECIPE, MATERIAL)})
    assert proposed == {"TIES": GivenUp("the worker died (3 workers in a row)")}
    assert "TIES cannot be refined: the worker died (3 workers in a row)" in caplog.text


def test_workers_whose_node_went_away_do_not_count():
    deaths = [lambda job: Lost(job, "its node was taken away", blameless=True)] * 5
    refinements = {"TIES": refinement(OTHER, RECIPE, MATERIAL)}
    assert Refiner(Workers(1, deaths)).run(refinements) == {"TIES": alone()["TIES"]}


def test_one_that_fails_leaves_the_others_alone():
    workers = Workers(1, [lambda job: Failed(job, "the loss is nan")])
    proposed = Refiner(workers).run(both())
    assert proposed == {"trial 3": GivenUp("the loss is nan"), "TIES": alone()["TIES"]}


def test_one_that_fails_late_ends_where_it_is_best():
    refined, told = run(bowl=Cliff(lambda n_asked, request: n_asked == N_BEFORE)), []
    workers = Workers(1, [*[None] * N_BEFORE, lambda job: Failed(job, "the loss is nan")])
    course = refinement(START, RECIPE, MATERIAL, lambda *what: told.append(what))
    assert Refiner(workers).run({"trial 3": course}) == {"trial 3": refined[0]}
    assert told[-1] == (25, "goes no further: the loss is nan")


def test_what_is_interrupted_is_stopped():
    def interrupted(name, refined):
        raise KeyboardInterrupt

    workers = Workers(2)
    with pytest.raises(KeyboardInterrupt):
        Refiner(workers).run(both(), interrupted)
    assert workers.stopped == list(workers.live)


def test_it_is_told_of_every_answer_while_refinements_go_on():
    workers, n_answers = Workers(1), []
    Refiner(workers).run(both(), answered=lambda: n_answers.append(len(workers.bowl.asked)))
    assert sorted(set(n_answers)) == list(range(1, len(workers.bowl.asked) + 1))


def test_one_that_asks_nothing_ends_at_once():
    def settled():
        return alone()["TIES"]
        yield

    workers = Workers()
    assert Refiner(workers).run({"TIES": settled()}) == {"TIES": alone()["TIES"]}
    assert not workers.bowl.asked


def test_nothing_to_refine_asks_nothing():
    assert Refiner(Workers()).run({}) == {}
