"""Refinements of a loss that is known, without a model: what they ask, and what they propose."""

import math
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from searchmerge.errors import EvaluationError
from searchmerge.execution.gradient import LossResult
from searchmerge.merging.method import default_plan
from searchmerge.plan import Groups
from searchmerge.search.refine import Material, Recipe, refinement

EXPERTS = ("math", "code")
NAMES = tuple(f"layers.{i}.w" for i in range(3))
GROUPS = Groups.of_tensors(NAMES)
START = default_plan("task_arithmetic", EXPERTS, groups=GROUPS, coefficient=1.0)
RECIPE = Recipe(GROUPS, n_steps=60, batch=16, rate=0.02)
MATERIAL = Material(dict.fromkeys(EXPERTS, range(64)), {"math": 1.0, "code": 1.0})
TARGET = np.array([[0.8, 1.0], [1.3, 0.9], [1.0, 1.1]])


class Bowl:
    """A loss that is least at a target, moved by noise of each example's own."""

    def __init__(self, target=TARGET, noise=0.0):
        self._target, self._noise = target, noise
        self.asked = []

    def answer(self, plan, request):
        self.asked.append((plan, request))
        at = np.array(plan.values["coefficient"])
        losses, gradient = {}, np.zeros_like(at)
        for task, batches in request.batches.items():
            targets = [np.mean([self._of(task, e) for e in batch], axis=0) for batch in batches]
            losses[task] = tuple(float(((at - target) ** 2).sum()) for target in targets)
            sizes = [len(batch) for batch in batches]
            mean = np.average(targets, axis=0, weights=sizes)
            gradient += request.weights[task] * 2 * (at - mean)
        rows = tuple(map(tuple, gradient.tolist())) if request.gradient else ()
        return LossResult(losses, rows, 0.1, 0.1)

    def _of(self, task, example):
        draw = np.random.default_rng((example, len(task)))
        return self._target + self._noise * draw.normal(size=self._target.shape)


class Cliff(Bowl):
    """A bowl that breaks off: from some question on, some kinds of them get no answer."""

    def __init__(self, fails):
        super().__init__()
        self._fails = fails

    def answer(self, plan, request):
        if self._fails(len(self.asked), request):
            self.asked.append((plan, request))
            raise EvaluationError("the loss is nan")
        return super().answer(plan, request)


def run(recipe=RECIPE, material=MATERIAL, start=START, bowl=None, told=None):
    bowl = bowl or Bowl()
    course = refinement(start, recipe, material, lambda *what: (told or []).append(what))
    ask = next(course)
    while True:
        try:
            try:
                result = bowl.answer(*ask)
            except EvaluationError as error:
                ask = course.throw(error)
            else:
                ask = course.send(result)
        except StopIteration as ended:
            return ended.value, bowl


def distance(plan):
    return np.abs(np.array(plan.values["coefficient"]) - TARGET).max()


def test_coefficients_go_to_where_the_loss_is_least():
    refined, _ = run()
    assert distance(START) == pytest.approx(0.3)
    assert distance(refined.plan) < 0.03
    assert refined.gain > 0
    assert (refined.plan.method, refined.plan.groups) == (START.method, GROUPS)


@pytest.mark.parametrize("scale", [0.1, 0.4, 1.5])
def test_steps_are_as_long_as_the_coefficients_are_large(scale):
    start = default_plan("task_arithmetic", EXPERTS, groups=GROUPS, coefficient=scale)
    at_one = np.array(run()[0].plan.values["coefficient"])
    refined, _ = run(start=start, bowl=Bowl(scale * TARGET))
    assert np.array(refined.plan.values["coefficient"]) == pytest.approx(scale * at_one, abs=2e-3)


def test_from_coefficients_that_are_all_zero_there_are_steps_too():
    start = default_plan("task_arithmetic", EXPERTS, groups=GROUPS, coefficient=0.0)
    refined, _ = run(start=start, bowl=Bowl(0.3 * np.ones((3, 2))))
    assert refined is not None


def test_steps_never_see_the_examples_that_are_watched():
    _, bowl = run()
    for task in EXPERTS:
        seen, watched = set(), set()
        for _, request in bowl.asked:
            examples = {e for batch in request.batches[task] for e in batch}
            (seen if request.gradient else watched).update(examples)
        assert not seen & watched
        assert seen | watched == set(range(64))
        assert len(watched) == 16


def test_the_same_seed_asks_the_same_and_another_does_not():
    first, again = run()[1].asked, run()[1].asked
    other = run(replace(RECIPE, seed=1))[1].asked
    assert first == again
    assert [r.batches for _, r in first] != [r.batches for _, r in other]


def test_where_it_does_not_pay_nothing_is_proposed():
    refined, bowl = run(bowl=Bowl(target=np.ones((3, 2)), noise=0.5))
    assert refined is None
    assert sum(request.gradient for _, request in bowl.asked) < 60  # it did not go to the end


def test_a_start_that_is_best_is_left_alone():
    assert run(bowl=Bowl(target=np.ones((3, 2))))[0] is None


def test_of_a_way_that_went_too_far_a_part_is_kept():
    far = replace(RECIPE, rate=0.5, n_steps=2)
    refined, _ = run(far)
    assert refined.shrink < 1
    assert refined.gain > 0
    whole, _ = run(replace(far, shrink=1.0))
    assert whole is None or whole.gain < refined.gain


def test_how_much_is_kept_may_be_said():
    refined, _ = run(replace(RECIPE, shrink=0.5))
    assert refined.shrink == 0.5
    half = 1 + (TARGET - 1) / 2
    np.testing.assert_allclose(refined.plan.values["coefficient"], half, atol=0.02)


def test_a_task_counts_by_its_weight():
    class Apart(Bowl):
        def _of(self, task, example):
            return np.full((3, 2), 2.0 if task == "math" else 1.0)

    material = replace(MATERIAL, weights={"math": 3.0, "code": 1.0})
    refined, _ = run(replace(RECIPE, n_steps=200), material, bowl=Apart())
    np.testing.assert_allclose(refined.plan.values["coefficient"], 1.75, atol=0.05)


def test_every_example_that_is_not_watched_is_seen_as_often():
    _, bowl = run(replace(RECIPE, n_steps=12), bowl=Bowl())
    seen = [e for _, r in bowl.asked if r.gradient for batch in r.batches["math"] for e in batch]
    counts = {e: seen.count(e) for e in set(seen)}
    assert len(counts) == 48
    assert set(counts.values()) == {2}


def test_teachers_and_the_kind_of_loss_are_passed_on():
    teachers = dict.fromkeys(EXPERTS, START)
    material = replace(MATERIAL, teachers=teachers)
    _, bowl = run(replace(RECIPE, loss="agreement"), material)
    assert {request.kind for _, request in bowl.asked} == {"agreement"}
    assert all(request.teachers == teachers for _, request in bowl.asked)


N_BEFORE = 1 + 12 + 1 + 12 + 1
"""Questions up to the second look on the way: the start, and twice some steps and a look."""


@pytest.mark.parametrize("n_more", [0, 5, 12])
def test_where_there_is_no_finite_loss_any_more_the_steps_end_and_the_best_is_kept(n_more):
    n_answers, told = N_BEFORE + n_more, [None]
    cliff = Cliff(lambda n_asked, request: n_asked == n_answers)
    refined, bowl = run(bowl=cliff, told=told)
    assert refined.n_steps == 24
    assert refined.gain > 0
    assert told[-1] == (25 + n_more if n_more < 12 else 36, "goes no further: the loss is nan")
    assert [what for _, what in told[1:-1]] == sorted((w for _, w in told[1:-1]), reverse=True)
    assert not any(request.gradient for _, request in bowl.asked[n_answers + 1 :])


@pytest.mark.parametrize("n_answers", [0, 1, 7, 13])
def test_where_nothing_better_was_seen_before_the_reason_comes_out(n_answers):
    with pytest.raises(EvaluationError, match="the loss is nan"):
        run(bowl=Cliff(lambda n_asked, request: n_asked == n_answers))


def test_a_part_of_the_way_that_has_no_finite_loss_is_not_taken():
    far = replace(RECIPE, rate=0.5, n_steps=2)  # of which a part would be kept
    told = [None]
    whole, bowl = run(far, bowl=Cliff(lambda n_asked, request: n_asked == 5), told=told)
    assert whole.shrink == 1.0
    assert told[-1] == (whole.n_steps, "0.75 of the way is not looked at: the loss is nan")
    assert len(bowl.asked) == 6
    with pytest.raises(EvaluationError):
        run(replace(far, shrink=0.5), bowl=Cliff(lambda n_asked, request: n_asked == 5))


class Holes(Bowl):
    """A bowl of which some examples have no loss, from some question on."""

    def __init__(self, holes, first=0):
        super().__init__(noise=0.1)
        self._holes, self._first = holes, first

    def answer(self, plan, request):
        holes = self._holes if len(self.asked) >= self._first else ()
        asked = {task: [*chain(*batches)] for task, batches in request.batches.items()}
        left_out = {t: {e: "its loss is nan" for e in es if e in holes} for t, es in asked.items()}
        whole = {
            task: [tuple(e for e in batch if e not in holes) for batch in batches]
            for task, batches in request.batches.items()
        }
        some = {task: tuple(filter(None, batches)) for task, batches in whole.items()}
        batches = {task: its for task, its in some.items() if its}
        answer = super().answer(plan, replace(request, batches=batches))
        self.asked[-1] = (plan, request)
        left = {task: iter(losses) for task, losses in answer.losses.items()}
        losses = {
            t: tuple(next(left[t]) if b else math.nan for b in its) for t, its in whole.items()
        }
        named = {task: its for task, its in left_out.items() if its}
        return replace(answer, losses=losses, left_out=named)


def asked_of(bowl, task):
    """Return the examples of each question."""
    return [[*chain(*request.batches[task])] for _, request in bowl.asked]


def test_examples_without_a_loss_are_named_left_out_and_asked_for_once():
    watched = asked_of(run()[1], "math")[0]
    holes = (watched[3], next(e for e in range(64) if e not in watched))
    told = [None]
    refined, bowl = run(bowl=Holes(holes), told=told)
    assert distance(refined.plan) < 0.1
    for hole in holes:
        for task in EXPERTS:
            assert sum(hole in examples for examples in asked_of(bowl, task)) == 1
    lines = [(n_steps, line) for n_steps, line in told[1:] if isinstance(line, str)]
    assert (0, f"left out: task 'math', example {holes[0]}: its loss is nan") in lines
    assert len(lines) == 2 * len(EXPERTS)
    n_watched = [len(examples) for examples in asked_of(bowl, "math")]
    assert (n_watched[0], n_watched[-1]) == (16, 15)


def test_a_whole_block_without_a_loss_is_left_out():
    blocks = run()[1].asked[0][1].batches["math"]
    told = [None]
    refined, bowl = run(bowl=Holes(blocks[0]), told=told)
    assert refined is not None
    assert bowl.asked[-1][1].batches["math"] == blocks[1:]
    assert isinstance(told[1 + len(blocks[0])], tuple)


def test_a_task_of_which_nothing_has_a_loss_is_named():
    watched = asked_of(run()[1], "math")[0]
    with pytest.raises(EvaluationError, match=r"task 'math', example \d+: its loss is nan"):
        run(bowl=Holes(watched))


def test_of_a_task_with_one_block_left_it_is_not_known_how_far_losses_vary():
    few = replace(MATERIAL, examples={"math": range(64), "code": range(8)})
    assert len(run(material=few)[1].asked[0][1].batches["code"]) == 2
    watched = asked_of(run(material=few)[1], "code")[0]
    with pytest.raises(EvaluationError, match=rf"too few .* task 'code', example {watched[0]}: "):
        run(material=few, bowl=Holes(watched[:1]))


def test_where_the_steps_leave_an_example_without_a_loss_they_end():
    watched = asked_of(run()[1], "math")[0]
    told = [None]
    refined, _ = run(bowl=Holes(watched[:1], first=N_BEFORE), told=told)
    assert refined.n_steps == 24
    reason = f"task 'math', example {watched[0]}: its loss is nan"
    assert (36, f"goes no further: {reason}") in told
