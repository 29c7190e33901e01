"""Losses and gradients of a worker: of every batch, whatever fits at once, and with a teacher."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from searchmerge.errors import EvaluationError, SpecError
from searchmerge.execution import gradient
from searchmerge.execution.gradient import Losses, LossRequest
from searchmerge.execution.worker import Worker
from searchmerge.merging.gradient import CoefficientGradients
from searchmerge.merging.method import default_plan
from tests.execution.gradients import EXPERTS, PLAN, Classes, Counted, made, worker

BATCHES = {"math": ((0, 1, 2), (3, 4)), "code": ((5, 6),)}


def ask(worker, plan=PLAN, **changes):
    [result] = worker.gradient(plan, LossRequest(**{"batches": BATCHES, **changes}))
    return result


def losses(model, task, examples, kind="labels", teacher=None):
    """Return the mean loss of examples from first principles."""
    logits = torch.stack([model(Classes.inputs[e]) for e in examples]).log_softmax(1)
    if kind == "labels":
        return nn.functional.nll_loss(
            logits, torch.tensor([Classes.label(task, e) for e in examples])
        )
    if kind == "entropy":
        return -(logits.exp() * logits).sum(1).mean()
    return (teacher.exp() * (teacher - logits)).sum(1).mean()


def differences(plan, loss, step=1e-2):
    """Return central differences of a loss by every coefficient."""
    model, merger = made()
    rows = []
    for g in range(len(plan.groups)):
        row = []
        for e in range(len(EXPERTS)):
            ends = []
            for by in (step, -step):
                values = [list(r) for r in plan.values["coefficient"]]
                values[g][e] += by
                moved = replace(plan, values={"coefficient": tuple(map(tuple, values))})
                merger.apply(moved)
                with torch.no_grad():
                    ends.append(float(loss(model)))
            row.append((ends[0] - ends[1]) / (2 * step))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def total(model, factors):
    """Return the weighted sum of the tasks' mean losses."""
    every = {t: [e for batch in batches for e in batch] for t, batches in BATCHES.items()}
    return sum(factors[task] * losses(model, task, every[task]) for task in BATCHES)


def test_losses_are_those_of_each_batch_and_the_gradient_that_of_the_weighted_tasks():
    weights = {"math": 0.25, "code": 3.0}
    result, weighed = ask(worker()), ask(worker(), weights=weights)
    model, merger = made()
    merger.apply(PLAN)
    for task, batches in BATCHES.items():
        expected = [losses(model, task, batch).item() for batch in batches]
        assert result.losses[task] == pytest.approx(expected, rel=1e-5)
    for given, factors in ((result, dict.fromkeys(BATCHES, 1.0)), (weighed, weights)):
        rows = torch.tensor(given.rows, dtype=torch.float64)
        assert rows.shape == (len(PLAN.groups), len(EXPERTS))
        wanted = differences(PLAN, lambda model, by=factors: total(model, by))
        torch.testing.assert_close(rows, wanted, rtol=1e-2, atol=1e-3)
    assert weighed.losses == result.losses
    assert result.merge_s > 0
    assert result.loss_s > 0


@pytest.mark.parametrize("kind", ["entropy", "agreement"])
def test_losses_without_labels(kind):
    teachers = {
        task: default_plan("task_arithmetic", EXPERTS, coefficient=[i == 0, i == 1])
        for i, task in enumerate(BATCHES)
    }
    for task, batches in BATCHES.items():
        model, merger = made()
        every = [e for batch in batches for e in batch]
        merger.apply(teachers[task])
        with torch.no_grad():
            teacher = torch.stack([model(Classes.inputs[e]) for e in every]).log_softmax(1)
        wanted = differences(
            PLAN, lambda model, t=task, x=every, y=teacher: losses(model, t, x, kind, y)
        )
        alone = ask(worker(), kind=kind, teachers=teachers, batches={task: batches})
        rows = torch.tensor(alone.rows, dtype=torch.float64)
        torch.testing.assert_close(rows, wanted, rtol=1e-2, atol=1e-3)


def test_a_teacher_is_merged_once():
    teacher = default_plan("task_arithmetic", EXPERTS, coefficient=[1.0, 0.0])
    applied = []
    at_work = worker(applied=applied)
    for _ in range(3):
        request = {"kind": "agreement", "teachers": dict.fromkeys(BATCHES, teacher)}
        ask(at_work, **request)
    assert applied.count(teacher) == len(BATCHES)
    assert applied.count(PLAN) == 3


def test_what_teachers_say_is_asked_anew_where_there_is_no_room_to_keep_it():
    teacher = default_plan("task_arithmetic", EXPERTS, coefficient=[1.0, 0.0])
    request = LossRequest(BATCHES, "agreement", dict.fromkeys(BATCHES, teacher))
    results = []
    for most_taught in (0, 40, 1 << 20):
        (model, merger), applied = made(), []
        counted = Counted(merger, applied)
        evaluators = dict.fromkeys(BATCHES, Classes())
        gradients = CoefficientGradients(model, merger)
        asked = Losses(model, counted, evaluators, gradients, most_taught)
        results += [asked.compute(PLAN, request) for _ in range(2)]
        assert applied.count(teacher) == len(BATCHES) * (1 if most_taught > 40 else 2)
    for task in BATCHES:
        values = [result.losses[task] for result in results]
        assert all(given == pytest.approx(values[0]) for given in values)


def test_examples_that_are_looked_at_together_count_in_their_own_batches():
    class Means(Classes):
        def loss(self, model, task, examples):
            return super().loss(model, task, examples).mean()

    class Each(Classes):
        def loss(self, model, task, examples):
            return torch.stack([super(Each, self).loss(model, task, [e]) for e in examples])

    given = []
    for evaluator in (Means(), Each()):
        (model, merger) = made()
        asked = Losses(model, merger, dict.fromkeys(BATCHES, evaluator), None)
        request = LossRequest(BATCHES, gradient=False)
        given.append(asked.compute(PLAN, request).losses)
    for task in BATCHES:
        assert given[0][task] == pytest.approx(given[1][task])


def test_without_a_gradient_there_are_losses_alone():
    result = ask(worker(), gradient=False)
    assert result.rows == ()
    expected = ask(worker())
    for task in BATCHES:
        assert result.losses[task] == pytest.approx(expected.losses[task])


def test_what_does_not_fit_is_computed_in_parts_to_the_same_end(caplog):
    expected = ask(worker())
    given = ask(worker(most_at_once=1))
    for task in BATCHES:
        assert given.losses[task] == pytest.approx(expected.losses[task])
    torch.testing.assert_close(torch.tensor(given.rows), torch.tensor(expected.rows))
    assert "going on with 1/" in caplog.text


@pytest.mark.parametrize(("most_at_once", "is_recomputed"), [(64, False), (8, False), (7, True)])
def test_activations_are_kept_where_an_eighth_of_a_batch_fits(
    monkeypatch, most_at_once, is_recomputed
):
    recomputed = []
    monkeypatch.setattr(gradient, "recomputed_activations", lambda model: counting(recomputed))
    batches = {"math": (tuple(i % 7 for i in range(64)),)}
    expected = ask(worker(), batches=batches)
    given = ask(worker(most_at_once=most_at_once), batches=batches)
    assert bool(recomputed) == is_recomputed
    assert given.losses["math"] == pytest.approx(expected.losses["math"])
    torch.testing.assert_close(torch.tensor(given.rows), torch.tensor(expected.rows))


@contextmanager
def counting(entered):
    entered.append(1)
    yield True


def test_what_fits_in_no_part_is_the_candidates_failure():
    with pytest.raises(
        EvaluationError, match="its loss and gradient do not fit into the device's"
    ):
        ask(worker(most_at_once=0))


@pytest.mark.parametrize(
    ("changes", "plan", "message"),
    [
        ({"batches": {"law": ((0,),)}}, PLAN, "task 'law' has no loss 'labels' .it has: none"),
        ({"kind": "agreement"}, PLAN, "task 'math' names no expert of its own to agree with"),
        ({}, default_plan("karcher", EXPERTS), "method 'karcher' is not linear"),
    ],
)
def test_what_has_no_gradient_says_so(changes, plan, message):
    with pytest.raises(SpecError, match=message):
        ask(worker(), plan, **changes)


def test_a_worker_may_have_no_gradients():
    model, merger = made()
    bare = Worker(model, merger, dict.fromkeys(BATCHES, Classes()))
    assert ask(bare, gradient=False).losses.keys() == BATCHES.keys()
    with pytest.raises(SpecError, match="this worker's merger has none"):
        ask(bare)


def test_a_loss_that_is_not_finite_is_the_candidates_failure():
    with pytest.raises(EvaluationError, match="task 'math', examples 0 to 2: the loss is nan"):
        ask(worker(broken=True))


def test_small_gradients_survive_float16():
    small = {"loss_scale": 1e-5}
    wide, narrow = ask(worker(**small)), ask(worker(dtype=torch.float16, **small))
    rows = torch.tensor(narrow.rows)
    assert rows.abs().min() > 0
    torch.testing.assert_close(rows, torch.tensor(wide.rows), rtol=5e-2, atol=1e-7)


@pytest.mark.parametrize(("loss_scale", "n_passes"), [(1.0, 1), (1500.0, 3), (75000.0, 6)])
def test_large_gradients_survive_float16_and_the_scale_that_they_need_is_kept(
    loss_scale, n_passes
):
    asked, large = [], {"loss_scale": loss_scale}
    wide, narrow = worker(**large), worker(dtype=torch.float16, asked=asked, **large)
    for n_before, n_more in [(0, n_passes), (n_passes, 1)]:
        rows = torch.tensor(ask(narrow, batches={"math": ((0, 1, 2),)}).rows)
        expected = torch.tensor(ask(wide, batches={"math": ((0, 1, 2),)}).rows)
        torch.testing.assert_close(rows, expected, rtol=5e-2, atol=5e-3 * loss_scale)
        assert len(asked) == n_before + n_more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gradient_that_is_not_finite_is_the_candidates_failure(dtype):
    with pytest.raises(
        EvaluationError, match="the gradient of the loss of math, code is not fini"
    ):
        ask(worker(steep=True, dtype=dtype))


def test_scores_stay_what_they_are_and_parameters_need_no_gradient_afterwards():
    at_work = worker()
    ask(at_work)
    model, merger = made()
    assert not any(p.requires_grad for p in model.parameters())
    del merger, at_work
