"""Checking a study before its weights are loaded, and estimating what it will cost."""

import time
from collections.abc import Iterator

from searchmerge import assemble
from searchmerge.config import RunConfig
from searchmerge.errors import SpecError
from searchmerge.estimate import describe, needs, refusal, room
from searchmerge.evaluators.causal.model import BATCH_TOKENS
from searchmerge.evaluators.evaluator import Evaluator, Prompting
from searchmerge.execution.blocks import Block
from searchmerge.execution.worker import Worker
from searchmerge.models import Models, check_groups, open_models
from searchmerge.search.references import reference_plans
from searchmerge.search.schedule import Schedule
from searchmerge.study import Study

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
        n_plans = len(assemble.warm_start(study))
        yield f"warm start: {n_plans} plans of {', '.join(study.spec.search.warm_start)}"
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
            f"task {name}: {info.metric}, {info.n_examples} examples, "
            f"{parts['pilot']} to select{sources.get('select', '')}, "
            f"{parts['hold_out']} held out{sources.get('hold_out', '')}"
        )
        yield from _prompts(evaluators[name], name, schedule.blocks["pilot"][name][0])
    yield from _cost(study, assemble.make_worker(study, models, config), schedule)


def _models(study: Study, models: Models, config: RunConfig) -> Iterator[str]:
    """Yield what the models are and what a worker needs; refuse what cannot fit."""
    names = ", ".join(models.experts)
    yield f"models: {len(models.experts)} experts ({names}) fit the base {models.base.name}"
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


def _cost(study: Study, worker: Worker, schedule: Schedule) -> Iterator[str]:
    """Yield what a trial costs, by scoring a few examples of each task."""
    blocks = schedule.blocks["pilot"].values()
    rounds = [(_first_examples(of_task[0], _EXAMPLES),) for of_task in blocks]
    start = time.perf_counter()
    results = list(worker.score(reference_plans(study.experts)["average"], rounds))
    seconds = time.perf_counter() - start - results[0].merge_s
    n_select = sum(len(block.examples) for of_task in blocks for block in of_task)
    n_scored = sum(len(block.examples) for of_round in rounds for block in of_round)
    trial_s = results[0].merge_s + seconds * n_select / n_scored
    yield (
        f"cost: merging {results[0].merge_s:.2f} s; {n_scored} examples took {seconds:.2f} s, "
        f"so a trial of {n_select} takes about {trial_s:.0f} s or less"
    )


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
    space = study.space
    parts = [
        f"{name} with {len(space.distributions(name))} parameters" for name in space.alternatives
    ]
    return ", ".join(parts)
