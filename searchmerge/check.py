"""Checking a study before its weights are loaded, and estimating what it will cost."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from searchmerge import assemble
from searchmerge.config import RunConfig
from searchmerge.errors import SearchMergeError, SpecError
from searchmerge.estimate import describe, needs, refusal, room
from searchmerge.evaluators.causal.model import BATCH_TOKENS
from searchmerge.evaluators.evaluator import Evaluator, Prompting, TaskInfo
from searchmerge.evaluators.score_kind import Mean
from searchmerge.execution.blocks import Block
from searchmerge.execution.worker import Worker
from searchmerge.merging.native.compiler import has_compiler
from searchmerge.models import Models, check_groups, open_models
from searchmerge.search.directory import SCORES_FILE
from searchmerge.search.references import BASE, merges, reference_plans
from searchmerge.search.resolution import (
    DISAGREE,
    N_ERRORS,
    REALISTIC,
    WANTED,
    examples_wanted,
    expected_error,
    recorded_error,
    trials_wanted,
)
from searchmerge.search.schedule import Schedule
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.scores import ScoreStore
from searchmerge.study import Study, kept_study
from searchmerge.wording import counted

_EXAMPLES = 2


def check_study(study: Study, config: RunConfig) -> Iterator[str]:
    """Yield what is found, line by line: first by headers alone, then by scoring two examples.

    Raises:
        SearchMergeError: At the first thing that would stop the study.
    """
    models = open_models(study)
    check_groups(study, models)
    yield from _models(study, models, config)
    yield f"space: {_describe_space(study)}"
    if study.spec.search.warm_start:
        plans = counted(len(assemble.warm_start(study)), "plan")
        yield f"warm start: {plans} of {', '.join(study.spec.search.warm_start)}"
    yield f"references: {', '.join(assemble.references(study, models))}"
    evaluators = assemble.make_evaluators(study, models, assemble.pick_device(config))
    infos = {name: evaluator.tasks[name] for name, evaluator in evaluators.items()}
    schedule = assemble.make_schedule(study, infos)
    for name, info in infos.items():
        parts = {
            part: sum(len(block.examples) for block in by_task[name])
            for part, by_task in schedule.blocks.items()
        }
        sources = {part: f" from {its.source}" for part, its in info.parts.items()}
        yield (
            f"task {name}: {info.metric}, {counted(info.n_examples, 'example')}"
            f"{_and_unlabelled(info)}, "
            f"{parts['pilot']} to select{sources.get('select', '')}, "
            f"{parts['hold_out']} held out{sources.get('hold_out', '')}"
        )
        yield from _prompts(evaluators[name], name, schedule.blocks["pilot"][name][0])
    yield from _refinement(study, models, schedule)
    sample = _sample(study, assemble.make_worker(study, models, config), schedule)
    yield _cost(sample, schedule)
    yield from _resolution(study, config, schedule, sample)


def _refinement(study: Study, models: Models, schedule: Schedule) -> Iterator[str]:
    """Yield what refinements learn from; refuse what they cannot."""
    refining = assemble.make_refining(study, models)
    if refining is None:
        return
    references = assemble.references(study, models)
    learnt, recipe = assemble.make_material(study, refining, schedule, references), refining.recipe
    left = ", ".join(task for task in schedule.tasks if task not in learnt.examples)
    yield (
        f"refine: {counted(len(recipe.groups), 'group')}, loss {recipe.loss} of "
        f"{', '.join(learnt.examples)}{f'; left to the search: {left}' if left else ''}"
        f"{f'; {learnt.told}' if learnt.told else ''}"
    )


def _and_unlabelled(info: TaskInfo) -> str:
    return f" and {info.n_unlabelled} without a label" if info.n_unlabelled else ""


def _models(study: Study, models: Models, config: RunConfig) -> Iterator[str]:
    """Yield what the models are and what a worker needs; refuse what cannot fit."""
    names = ", ".join(models.experts)
    n_fitting = counted(len(models.experts), f"expert ({names}) fits", f"experts ({names}) fit")
    yield f"models: {n_fitting} the base {models.base.name}"
    yield from (f"doubtful: {line}" for line in models.doubts())
    device = assemble.pick_device(config)
    sections = [study.spec.section(name) for name in study.spec.kinds]
    asked = [getattr(section, "batch_tokens", None) or 0 for section in sections]
    usual = BATCH_TOKENS.get(device.partition(":")[0], BATCH_TOKENS["cpu"])
    need = needs(models.base, tuple(models.experts.values()), models.dtype, max(asked) or usual)
    have = None
    if config.is_here:
        share = config.workers.gpus_per_worker
        have = room(device, share, config.n_workers_here, study.folder)
    yield from describe(need, have)
    if have is not None and (why := refusal(need, have)):
        raise SpecError(f"{study.file}: this machine cannot run it: {why}")
    if crowded := config.crowding():
        yield f"machine: {crowded}: other processes use it too, and every trial takes longer"
    if device == "cpu" and config.is_here and config.engine != "eager" and not has_compiler():
        yield (
            "machine: there is no g++ that works, nor a like compiler that CXX names: merging "
            "takes several times as long"
        )


class _Sample(NamedTuple):
    """What scoring a few examples of each task took, and what they scored.

    Attributes:
        merge_s: Seconds that merging took.
        score_s: Seconds that scoring took.
        n_scored: How many examples were scored.
        values: Task name to what they scored.
    """

    merge_s: float
    score_s: float
    n_scored: int
    values: dict[str, tuple[float, ...]]

    def trial_s(self, n_select: float) -> float:
        """Return about how long a trial of so many examples takes, or less."""
        return self.merge_s + self.score_s * n_select / self.n_scored


def _sample(study: Study, worker: Worker, schedule: Schedule) -> _Sample:
    """Score a few examples of each task under the average."""
    blocks = schedule.blocks["pilot"].values()
    rounds = [(_first_examples(of_task[0], _EXAMPLES),) for of_task in blocks]
    start = time.perf_counter()
    results = list(worker.score(reference_plans(study.experts)["average"], rounds))
    seconds = time.perf_counter() - start - results[0].merge_s
    values = {s.block.task: s.values for result in results for s in result.scores}
    n_scored = sum(len(block.examples) for of_round in rounds for block in of_round)
    return _Sample(results[0].merge_s, seconds, n_scored, values)


def _cost(sample: _Sample, schedule: Schedule) -> str:
    """Return what a trial costs."""
    n_select = schedule.n_examples("pilot")
    return (
        f"cost: merging {sample.merge_s:.2f} s; {counted(sample.n_scored, 'example')} took "
        f"{sample.score_s:.2f} s, so a trial of {n_select} takes about "
        f"{sample.trial_s(n_select):.0f} s or less"
    )


def _resolution(
    study: Study, config: RunConfig, schedule: Schedule, sample: _Sample
) -> Iterator[str]:
    """Yield how far apart plans have to be to be told apart, and what is proposed."""
    counts = {
        task: sum(len(block.examples) for block in blocks)
        for task, blocks in schedule.blocks["pilot"].items()
    }
    run_dir = Path(config.runs_dir) / study.name
    error, basis = (
        _recorded_error(study, schedule, run_dir),
        f"by the published settings in {run_dir}",
    )
    if error is None:
        if graded := [task for task in counts if not _is_accuracy(schedule, sample, task)]:
            yield (
                f"resolution: what is told apart is known once plans are scored, as "
                f"{', '.join(graded)} is not scored by a number from 0 to 1 per example"
            )
            return
        error = expected_error(study.objective, counts)
        basis = f"if two good plans differ on {100 * DISAGREE:.0f} % of the examples"
    told, objective = 100 * N_ERRORS * error, study.objective.kind
    yield (
        f"resolution: {counted(sum(counts.values()), 'example tells', 'examples tell')} plans "
        f"apart that differ by {told:.1f} points of {objective} "
        f"({N_ERRORS} standard errors, {basis})"
    )
    yield _proposal(study, schedule, sample, counts, error)


def _proposal(
    study: Study, schedule: Schedule, sample: _Sample, counts: Mapping[str, int], error: float
) -> str:
    """Return how many examples and trials are proposed, and what they take."""
    size, n_trials = study.spec.search.block_size, trials_wanted(study.space)
    wanted = {task: examples_wanted(error, n, size) for task, n in counts.items()}
    rooms = {
        task: info.n_of("select") - (0 if info.parts else _n_held_out(schedule, task))
        for task, info in schedule.tasks.items()
    }
    proposed = {task: min(n, max(counts[task], rooms[task])) for task, n in wanted.items()}
    n_select = sum(proposed.values())
    minutes = n_trials * sample.trial_s(n_select) / 60
    short = ""
    if proposed != wanted:
        short = f"; {_counted(wanted)} would be needed, and there are no more than these"
    if max(wanted.values()) > REALISTIC:
        short = "; no realistic number of examples would be enough"
    return (
        f"proposed, to tell {100 * WANTED:g} points apart: select {_counted(proposed)}{short}; "
        f"n_trials {n_trials}, which take about {minutes:.0f} min or less on one worker"
    )


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{task} {n}" for task, n in counts.items())


def _recorded_error(study: Study, schedule: Schedule, run_dir: Path) -> float | None:
    """Return the error of a difference in an earlier run of the study; ``None`` without one."""
    scores_file, references = run_dir / SCORES_FILE, reference_plans(study.experts)
    try:
        if kept_study(run_dir).spec.canonical() != study.spec.canonical():
            return None
        if not scores_file.exists():
            return None
        with contextlib.closing(ScoreStore(scores_file)) as store:
            board = Scoreboard(schedule, store)
            names = (BASE, *study.task_experts.values())
            if not all(board.is_full(references[name], "pilot") for name in names):
                return None
            alone = {name: board.scores(references[name], "pilot") for name in names}
            own = {task: alone[name][task] for task, name in study.task_experts.items()}
            objective = study.objective.relative_to(own, alone[BASE])
            return recorded_error(board, merges(references), objective)
    except SearchMergeError:
        return None  # nothing there that can be read, which is said when it is run


def _is_accuracy(schedule: Schedule, sample: _Sample, task: str) -> bool:
    is_mean = isinstance(schedule.tasks[task].kind, Mean)
    return is_mean and all(0 <= value <= 1 for value in sample.values[task])


def _n_held_out(schedule: Schedule, task: str) -> int:
    return sum(len(block.examples) for block in schedule.blocks["hold_out"][task])


def _prompts(evaluator: Evaluator, task: str, block: Block) -> Iterator[str]:
    """Yield what the model is given for a task's first examples, where its evaluator can tell."""
    if not isinstance(evaluator, Prompting):
        return
    for example in block.examples[:_EXAMPLES]:
        yield f"  prompt of example {example}:"
        yield from (f"  | {line}" for line in evaluator.shown(task, example).splitlines())
    yield from (f"  note: {doubt}" for doubt in evaluator.doubts(task))


def _first_examples(block: Block, n_examples: int) -> Block:
    return Block(block.task, block.part, block.index, block.examples[:n_examples])


def _describe_space(study: Study) -> str:
    sizes = {name: len(study.space.distributions(name)) for name in study.space.alternatives}
    return ", ".join(f"{name} with {counted(n, 'parameter')}" for name, n in sizes.items())
