"""What a worker makes of errors."""

import pytest
import torch

from searchmerge.errors import DeviceFault, EvaluationError
from searchmerge.evaluators.evaluator import Answer, TaskInfo
from searchmerge.execution.blocks import Block
from searchmerge.execution.executor import InProcessExecutor
from searchmerge.execution.worker import Worker
from tests.execution.workers import FINE, ROUNDS, plan
from tests.toy import EXPERTS, ToyEvaluator, ToyMerger, ToyModel


class Raises:
    """Raises an error, as it is or as the reason of one of its own."""

    def __init__(self, error, wrapped):
        self.tasks = dict.fromkeys(EXPERTS, TaskInfo(40))
        self._error, self._wrapped = error, wrapped

    def score(self, model, task, examples):
        if not self._wrapped:
            raise self._error
        raise EvaluationError(f"task {task!r}: {self._error}") from self._error


def executor(error, *, wrapped):
    model = ToyModel()
    worker = Worker(model, ToyMerger(model), dict.fromkeys(EXPERTS, Raises(error, wrapped)))
    executor = InProcessExecutor(worker)
    executor.submit(1, plan(FINE), ROUNDS)
    return executor


@pytest.mark.parametrize("wrapped", [False, True], ids=["as it is", "as a reason"])
@pytest.mark.parametrize("text", ["CUDA error: device-side assert triggered", "HIP error: x"])
def test_a_device_fault_is_told_from_a_candidates_failure(text, wrapped):
    with pytest.raises(DeviceFault, match=f"the device failed: {text}"):
        executor(RuntimeError(text), wrapped=wrapped).next_event(0)


def test_a_full_device_is_no_fault():
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    with pytest.raises(torch.OutOfMemoryError):
        executor(full, wrapped=False).next_event(0)


def test_a_candidates_failure_stays_one():
    event = executor(ValueError("CUDA error in the text of an answer"), wrapped=True).next_event(0)
    assert event.reason.endswith("CUDA error in the text of an answer")


def test_answers_come_with_the_scores_of_blocks_that_keep_them():
    class Tells(ToyEvaluator):
        def answers(self, task, examples):
            return tuple(Answer(example, said=(task,)) for example in examples)

    model = ToyModel()
    worker = Worker(model, ToyMerger(model), dict.fromkeys(EXPERTS, Tells()))
    blocks = (Block("math", "hold_out", 0, (3, 4)), Block("math", "hold_out", 1, (1, 2, 0), 2))
    [result] = worker.score(plan(FINE), [blocks])
    assert [scores.answers for scores in result.scores] == [
        (),
        (Answer(1, said=("math",)), Answer(2, said=("math",))),
    ]
    silent = Worker(model, ToyMerger(model), dict.fromkeys(EXPERTS, ToyEvaluator()))
    [result] = silent.score(plan(FINE), [blocks])
    assert [scores.answers for scores in result.scores] == [(), ()]


class Grades(ToyEvaluator):
    def __init__(self, graded):
        super().__init__()
        self._graded = graded

    def grades(self, task, examples):
        return self._graded(examples)


def graded(by):
    model = ToyModel()
    worker = Worker(model, ToyMerger(model), dict.fromkeys(EXPERTS, Grades(by)))
    block = Block(next(iter(EXPERTS)), "select", 0, (3, 1))
    return [scores for result in worker.score(plan(FINE), [(block,)]) for scores in result.scores]


def test_grades_come_with_the_scores():
    [scores] = graded(lambda examples: tuple(float(example) for example in examples))
    assert scores.grades == (3.0, 1.0)
    [without] = graded(lambda examples: ())
    assert without.grades == ()


@pytest.mark.parametrize("grades", [(1.0,), (float("nan"), 1.0)])
def test_grades_that_are_not_one_finite_number_each_are_refused(grades):
    with pytest.raises(EvaluationError, match="graded 2 examples by"):
        graded(lambda examples: grades)


class Tuned(ToyEvaluator):
    """Measures a task by how many examples it is given; takes note of what it is to use."""

    def __init__(self):
        super().__init__()
        self.used = {}

    def tune(self, model, task, examples):
        if task == "chat":
            raise EvaluationError("its logits are not finite")
        return {"n": len(examples)} if task == "math" else {}

    def use(self, task, tuning):
        self.used[task] = tuning


def test_what_evaluators_measure_is_told_by_task_and_used_by_all_tasks():
    model, evaluator = ToyModel(), Tuned()
    executor = InProcessExecutor(
        Worker(model, ToyMerger(model), dict.fromkeys(EXPERTS, evaluator))
    )
    blocks = [Block(task, "pilot", 0, (1, 2, 3)) for task in EXPERTS]
    assert executor.tune(blocks) == {"math": {"n": 3}}
    executor.use({"code": {"n": 7}})
    assert evaluator.used == {"math": {}, "code": {"n": 7}, "chat": {}}


def test_an_evaluator_that_measures_nothing_is_left_alone():
    model = ToyModel()
    worker = Worker(model, ToyMerger(model), dict.fromkeys(EXPERTS, ToyEvaluator()))
    assert worker.tune([Block("math", "pilot", 0, (1,))]) == {}
    worker.use({"math": {"n": 1}})
