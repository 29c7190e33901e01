"""Checking a study before its weights are loaded, and estimating what it will cost."""

import time
from collections.abc import Iterator
from pathlib import Path

from searchmerge import assemble
from searchmerge.config import RunConfig
from searchmerge.errors import SpecError
from searchmerge.estimate import describe, needs, refusal, room
from searchmerge.search.references import reference_plans
from searchmerge.spec import StudySpec, make_space

_EXAMPLES = 2


def check_study(spec: StudySpec, study_file: Path, config: RunConfig) -> Iterator[str]:
    """Yield what is found, line by line: first by headers alone, then by scoring two examples.

    Raises:
        SearchMergeError: At the first thing that would stop the study.
    """
    models = assemble.open_models(spec, study_file)
    assemble.check_groups(spec, models)
    yield from _describe_models(spec, models, study_file, config)
    if crowded := config.crowding():
        yield f"machine: {crowded}: other processes use it too, and every trial takes longer"
    yield f"space: {_describe_space(spec)}"
    if spec.search.warm_start:
        n_plans = len(assemble.warm_start(spec, study_file))
        yield f"warm start: {n_plans} plans of {', '.join(spec.search.warm_start)}"
    evaluators = assemble.make_evaluators(spec, study_file, models, assemble.pick_device(config))
    tasks = {name: evaluator.tasks[name] for name, evaluator in evaluators.items()}
    schedule = assemble.make_schedule(spec, tasks)
    for name, info in tasks.items():
        parts = {p: sum(len(b.examples) for b in own[name]) for p, own in schedule.blocks.items()}
        yield (
            f"task {name}: {info.metric}, {info.n_examples} examples, "
            f"{parts['survey']} to select, {parts['hold_out']} held out"
        )
    worker = assemble.make_worker(spec, study_file, models, config)
    plan = reference_plans(tuple(spec.experts))["average"]
    rounds = [
        (assemble.first_examples(own[0], _EXAMPLES),) for own in schedule.blocks["survey"].values()
    ]
    start = time.perf_counter()
    results = list(worker.score(plan, rounds))
    seconds = time.perf_counter() - start - results[0].merge_s
    n_select = sum(len(b.examples) for own in schedule.blocks["survey"].values() for b in own)
    n_scored = sum(len(block.examples) for r in rounds for block in r)
    trial_s = results[0].merge_s + seconds * n_select / n_scored
    yield (
        f"cost: merging {results[0].merge_s:.2f} s; {n_scored} examples took {seconds:.2f} s, "
        f"so a trial of {n_select} takes about {trial_s:.0f} s or less"
    )


def _describe_models(
    spec: StudySpec, models: assemble.Models, study_file: Path, config: RunConfig
) -> Iterator[str]:
    """Yield what the models are, what a worker needs, and refuse what cannot fit."""
    names = ", ".join(models.experts)
    yield f"models: {len(models.experts)} experts ({names}) fit the base {models.base.name}"
    device = assemble.pick_device(config)
    n_tokens = spec.lm_harness.batch_tokens or assemble.batch_tokens_for(device)
    need = needs(models.base, tuple(models.experts.values()), models.dtype, n_tokens)
    have = None
    if config.is_here:
        share = config.workers.gpus_per_worker
        have = room(device, share, config.n_workers_here, study_file.parent)
    yield from describe(need, have)
    if have is not None and (why := refusal(need, have)):
        raise SpecError(f"{study_file}: this machine cannot run it: {why}")


def _describe_space(spec: StudySpec) -> str:
    space = make_space(spec)
    parts = [
        f"{name} with {len(space.distributions(name))} parameters" for name in space.alternatives
    ]
    return ", ".join(parts)
