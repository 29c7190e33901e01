from dataclasses import replace

import pytest

from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.execution.blocks import make_blocks, split_examples
from searchmerge.execution.executor import InProcessExecutor
from searchmerge.execution.worker import Worker
from searchmerge.plan import Groups, MergePlan
from searchmerge.search.budget import Budget
from searchmerge.search.directory import StudyDirectory
from searchmerge.search.dispatch import Dispatcher
from searchmerge.search.objective import Goal, Objective
from searchmerge.search.references import reference_plans
from searchmerge.search.runner import StudyRunner
from searchmerge.search.sampler import SamplerSetting, sampler_after
from searchmerge.search.schedule import Schedule
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.searched import Range
from searchmerge.search.space import Alternative, SearchSpace
from tests.toy import EXPERTS, ToyEvaluator, ToyMerger, ToyModel

SPACE = SearchSpace(
    EXPERTS,
    [Alternative("t", "task_arithmetic", values={"coefficient": Range(0.0, 1.0)})],
)

OPTIMUM = MergePlan(
    "task_arithmetic", EXPERTS, {"coefficient": ((0.9, 0.2, 0.5),) * 2}, Groups(depth=2)
)
"""A plan that is in no space of a toy study, and scores better than all that are."""


class Recorder:
    """An observer that keeps what it sees, and may interrupt."""

    def __init__(self, interrupt_at=None):
        self.trials, self.told, self.steps, self.phases = [], [], [], []
        self._interrupt_at = interrupt_at

    def phase(self, title, total, done=0):
        self.phases.append((title, total, done))

    def step(self, name, scores):
        self.steps.append(name)

    def trial(self, record, *, is_best):
        self.trials.append(record)
        self.told.append((record, is_best))
        if len(self.trials) == self._interrupt_at:
            raise KeyboardInterrupt


def toy_schedule(n_examples=40):
    info = TaskInfo(n_examples)
    blocks = {"select": {}, "hold_out": {}}
    for task in EXPERTS:
        parts = split_examples(task, TaskInfo(n_examples), seed=0, select=None, hold_out=None)
        for part, examples in parts.items():
            blocks[part][task] = make_blocks(task, part, examples, info, 4)
    return Schedule.interleaved(dict.fromkeys(EXPERTS, info), blocks, round_blocks=3, seed=0)


def pilot_schedule():
    """Return the schedule before the references have decided what ``select`` is."""
    schedule = toy_schedule()
    pilot = {
        task: [replace(block, part="pilot") for block in blocks]
        for task, blocks in schedule.blocks["select"].items()
    }
    blocks = {"pilot": pilot, "hold_out": schedule.blocks["hold_out"]}
    return Schedule.interleaved(schedule.tasks, blocks, round_blocks=3, seed=0)


class Toy:
    """One run of a toy study in a directory."""

    def __init__(
        self,
        run_dir,
        sampler="random",
        evaluator=None,
        space=SPACE,
        spec=None,
        n_objectives=1,
        schedule=None,
        storage=None,
    ):
        self.evaluator = evaluator or ToyEvaluator()
        self.model = ToyModel()
        self.merger = ToyMerger(self.model)
        worker = Worker(self.model, self.merger, dict.fromkeys(EXPERTS, self.evaluator))
        setting = SamplerSetting(seed=0, space=space, n_trials=10, n_objectives=n_objectives)
        self.directory = StudyDirectory(
            run_dir,
            name="toy",
            spec=spec or {"space": space.describe()},
            sampler=sampler_after(sampler, setting),
            n_objectives=n_objectives,
            storage=storage,
        )
        self.board = Scoreboard(schedule or toy_schedule(), self.directory.scores)
        self.executor = InProcessExecutor(worker)
        self.objective = Objective("mean", {task: Goal() for task in EXPERTS})
        self.space = space
        self.observer = Recorder()

    def runner(self, references=None):
        return StudyRunner(
            self.directory,
            self.space,
            self.board,
            Dispatcher(self.executor, self.directory.scores, self.directory.run_dir),
            reference_plans(EXPERTS) if references is None else references,
            self.observer,
        )

    def run(self, n_trials, racing=None, observer=None, references=None, seed=None, **budget):
        self.observer = observer or self.observer
        try:
            self.runner(references).run(self.objective, Budget(n_trials, **budget), racing, seed)
        finally:
            self.directory.close()
        return self.directory.study.trials


@pytest.fixture
def toy(tmp_path):
    """Make toy studies in the same directory, one after the other."""

    def make(run_dir="", **options):
        (tmp_path / run_dir).mkdir(exist_ok=True)
        return Toy(tmp_path / run_dir, **options)

    return make
