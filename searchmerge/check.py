"""Checking a study before its weights are loaded, and estimating what it will cost."""

import shutil
import time
from collections.abc import Iterator

from searchmerge import assemble
from searchmerge.config import RunConfig
from searchmerge.execution.blocks import Block
from searchmerge.models import check_groups, open_models
from searchmerge.search.references import reference_plans
from searchmerge.study import Study

_EXAMPLES = 2


def check_study(study: Study, config: RunConfig) -> Iterator[str]:
    """Yield what is found, line by line: first by headers alone, then by scoring two examples.

    Raises:
        SearchMergeError: At the first thing that would stop the study.
    """
    models = open_models(study)
    check_groups(study, models)
    names = ", ".join(models.experts)
    yield f"models: {len(models.experts)} experts ({names}) fit the base {models.base.name}"
    n_parameters = sum(_numel(header.shape) for header in models.base.headers.values())
    resident = n_parameters * models.dtype.itemsize
    stored = models.base.size_bytes + sum(e.size_bytes for e in models.experts.values())
    yield (
        f"memory: {_gib(resident)} for the resident model in {models.dtype}, and "
        f"{_gib(stored)} of mapped files that are read in every merge"
    )
    free = shutil.disk_usage(study.folder).free
    yield f"disk: {_gib(resident)} for the saved model, {_gib(free)} are free"
    yield f"space: {_describe_space(study)}"
    if study.spec.search.warm_start:
        n_plans = len(assemble.warm_start(study))
        yield f"warm start: {n_plans} plans of {', '.join(study.spec.search.warm_start)}"
    evaluators = assemble.make_evaluators(study, models, assemble.pick_device(config))
    tasks = {name: evaluator.tasks[name] for name, evaluator in evaluators.items()}
    schedule = assemble.make_schedule(study, tasks)
    for name, info in tasks.items():
        parts = {p: sum(len(b.examples) for b in own[name]) for p, own in schedule.blocks.items()}
        yield (
            f"task {name}: {info.metric}, {info.n_examples} examples, "
            f"{parts['survey']} to select, {parts['hold_out']} held out"
        )
    worker = assemble.make_worker(study, models, config)
    plan = reference_plans(study.experts)["average"]
    rounds = [(_first_examples(own[0], _EXAMPLES),) for own in schedule.blocks["survey"].values()]
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


def _first_examples(block: Block, n_examples: int) -> Block:
    return Block(block.task, block.part, block.index, block.examples[:n_examples])


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"


def _describe_space(study: Study) -> str:
    space = study.space
    parts = [
        f"{name} with {len(space.distributions(name))} parameters" for name in space.alternatives
    ]
    return ", ".join(parts)
