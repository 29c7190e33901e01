"""From a study and a run config to live objects: wiring, and nothing else."""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from searchmerge.checkpoints.renames import aligned
from searchmerge.checkpoints.resident import load_resident, writable_views
from searchmerge.config import RunConfig
from searchmerge.errors import SpecError, StudyError
from searchmerge.evaluators.evaluator import (
    EvaluationContext,
    Evaluator,
    Follower,
    TaskInfo,
)
from searchmerge.execution.blocks import Block, Part, make_blocks, not_apart, split_examples
from searchmerge.execution.executor import Executor, InProcessExecutor
from searchmerge.execution.followed_merger import FollowedMerger
from searchmerge.execution.gradient import Merges
from searchmerge.execution.int8_merger import Int8Merger
from searchmerge.execution.watched_merger import WatchedMerger, WatchedWhole
from searchmerge.execution.worker import Worker
from searchmerge.fingerprint import fingerprint
from searchmerge.heads import expert_head
from searchmerge.merging.engine import Engine, Way
from searchmerge.merging.gradient import CoefficientGradients
from searchmerge.merging.method import METHODS
from searchmerge.models import Models, load_task_vectors, make_merger, merged_names, open_models
from searchmerge.plan import TENSOR, Groups, MergePlan, SettingValue
from searchmerge.search.budget import Budget
from searchmerge.search.directory import StudyDirectory
from searchmerge.search.racing import Racing
from searchmerge.search.references import reference_plans, slow_methods
from searchmerge.search.refine import Material, Recipe
from searchmerge.search.refinements import Refining, material
from searchmerge.search.sampler import SamplerSetting, sampler_after
from searchmerge.search.schedule import Schedule
from searchmerge.search.warm_start import warm_start_params
from searchmerge.study import Study
from searchmerge.watch import Content, Watch

_logger = logging.getLogger(__name__)
_WAYS: dict[Way, str] = {
    "native": "C++",
    "torch": "torch's compiler",
    "chunks": "torch, uncompiled",
}
_TAKES_LONG = (
    "taking every matrix of models of this size apart takes long; where the space has the method "
    "it is one"
)


def pick_device(config: RunConfig) -> str:
    """Return the torch device that a config means."""
    if config.device != "auto":
        try:
            torch.empty(0, device=config.device)
        except (RuntimeError, AssertionError) as error:
            told = str(error).splitlines()[0]
            raise SpecError(
                f"device {config.device!r} of the config cannot be used: {told}"
            ) from error
        return config.device
    if config.executor == "ray":  # this process may be on a machine without the workers' GPUs
        return "cuda" if config.workers.gpus_per_worker else "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def way_of_merging(config: RunConfig) -> str:
    """Return in words how merges are computed, which decides how they are rounded."""
    device = pick_device(config)
    if device.partition(":")[0] == "cpu" and config.engine != "eager" and not config.is_here:
        return "C++ on workers that have a compiler"
    return _WAYS[Engine(config.engine).way(torch.device(device))]


def make_worker(
    study: Study, models: Models, config: RunConfig, content: Content | None = None
) -> Worker:
    """Load the resident model, map the experts and build the evaluators.

    Args:
        study: The study.
        models: Its models.
        config: What machine this is.
        content: What the models have to hold; ``None`` for whatever they hold now.

    Raises:
        SearchMergeError: If it cannot be loaded here, or the models hold something else.
    """
    watch = Watch(models, content)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = pick_device(config)
    evaluators = make_evaluators(study, models, device)
    vectors = load_task_vectors(study, models)
    model = load_resident(
        models.base,
        dtype=models.dtype,
        device=device,
        n_devices=config.devices_per_worker,
        auto_class=study.spec.resident_class,
        loading=study.spec.loading,
    )
    views = writable_views(model)
    names = aligned(views, models.base.headers)
    targets = {names[name]: view for name, view in views.items()}
    plain = make_merger(models, vectors, config.engine, memory=config.memory, targets=targets)
    merger: Merges = WatchedMerger(plain, watch.check)
    if study.spec.scoring == "int8":
        merged = [targets[name] for name in vectors.weights if name in targets]
        merger = Int8Merger(merger, model, merged)
    followers = {id(e): e for e in evaluators.values() if isinstance(e, Follower)}
    if followers:
        merger = FollowedMerger(merger, model, targets, list(followers.values()))
    watch.check()
    gradients, whole = CoefficientGradients(model, plain), WatchedWhole(plain, watch.check)
    return Worker(model, merger, evaluators, gradients, whole)


def make_evaluators(study: Study, models: Models, device: str) -> dict[str, Evaluator]:
    """Return each task's evaluator; tasks of one kind may share one.

    Raises:
        SpecError: If a task, split, metric or function does not exist.
    """
    refine = study.spec.search.refine
    context = EvaluationContext(
        folder=study.folder,
        resolve=study.resolve,
        model_dir=models.base.tokenizer_dir,
        device=device,
        dtype=models.dtype,
        head=functools.partial(expert_head, study, models),
        trust_remote_code=study.spec.trust_remote_code,
        base_dir=None if models.base.extension else models.base.path,
        seed=study.spec.search.seed,
        is_graded=study.spec.scores == "graded",
        learns=None if refine == "off" else refine.loss,
    )
    evaluators: dict[str, Evaluator] = {}
    for name, kind in study.spec.kinds.items():
        tasks, section = study.spec.keys_of(name), study.spec.section(name)
        with study.errors_at_keys():
            evaluators.update(kind.build(tasks, section, context))
    return {name: evaluators[name] for name in study.spec.tasks}


def make_schedule(study: Study, tasks: Mapping[str, TaskInfo]) -> Schedule:
    """Return what every candidate is scored on, before the references decide the order.

    Raises:
        SpecError: If a task has too few examples for its parts.
    """
    search = study.spec.search
    blocks: dict[Part, dict[str, tuple[Block, ...]]] = {"pilot": {}, "hold_out": {}}
    with study.errors_at_keys():
        split = _split(study, tasks)
    for name, parts in split.items():
        for part, examples in zip(blocks, (parts["select"], parts["hold_out"]), strict=True):
            made = make_blocks(name, part, examples, tasks[name], search.block_size)
            blocks[part][name] = made
    return Schedule.interleaved(tasks, blocks, round_blocks=search.round_blocks, seed=search.seed)


def _split(study: Study, tasks: Mapping[str, TaskInfo]) -> dict[str, dict[Part, tuple[int, ...]]]:
    """Return the examples of each task's parts: tasks with the same examples are divided alike.

    Raises:
        SpecError: If a task has too few.
    """
    split: dict[str, dict[Part, tuple[int, ...]]] = {}
    for name, info in tasks.items():
        task = study.spec.tasks[name]
        same = [n for n in split if info.origins and tasks[n].origins == info.origins]
        split[name] = split_examples(
            name,
            info,
            seed=study.spec.search.seed,
            select=_count(task.select, info.n_of("select")),
            hold_out=_count(task.hold_out, info.n_of("hold_out")),
            alike=next(iter(same), None),
        )
    for said in not_apart(tasks, split):
        _logger.warning("%s", said)
    return split


def _count(share: float | None, n_examples: int) -> int | None:
    """Return how many examples are meant: as many, or a part of all, and 1 at least."""
    if share is None or isinstance(share, int):
        return share
    return max(1, round(share * n_examples))


def make_racing(study: Study) -> Racing | None:
    """Return the study's racing, or ``None`` where it is off."""
    racing = study.spec.search.racing
    if racing == "off":
        return None
    return Racing(racing.p_threshold, racing.min_blocks, racing.collapse_margin)


def make_refining(study: Study, models: Models) -> Refining | None:
    """Return how the study's best plans are refined, or ``None`` where they are not."""
    refine, seed = study.spec.search.refine, study.spec.search.seed
    if refine == "off":
        return None
    names = tuple(merged_names(models))
    whole = refine.groups == TENSOR
    groups = Groups.of_tensors(names) if whole else Groups.from_data(refine.groups)
    recipe = Recipe(
        groups, refine.steps, refine.batch, refine.shrink, refine.loss, refine.rate, seed
    )
    losses = {name: getattr(task, "loss", None) for name, task in study.spec.tasks.items()}
    functions = {name: str(loss) for name, loss in losses.items() if loss is not None}
    return Refining(recipe, refine.starts, names, functions)


def make_material(
    study: Study, refining: Refining, schedule: Schedule, references: Mapping[str, MergePlan]
) -> Material:
    """Return what refinements learn from.

    Args:
        study: The study.
        refining: How its plans are refined.
        schedule: Its examples.
        references: Name to plan, those of the experts included.

    Raises:
        SpecError: If there is nothing, or too little.
    """
    experts = study.task_experts
    teachers = {task: references[name] for task, name in experts.items() if name in references}
    return material(schedule, study.objective, refining.recipe, teachers)


def warm_start(study: Study) -> list[dict[str, SettingValue]]:
    """Return the parameters of the earlier studies' best plans, as near as the space comes.

    Raises:
        SpecError: If no plan of an earlier study fits the space.
        StudyError: If a run directory holds no study.
    """
    search = study.spec.search
    run_dirs = [Path(study.resolve(name)).expanduser() for name in search.warm_start]
    return warm_start_params(run_dirs, study.space, search.warm_start_plans)


def references(study: Study, models: Models) -> dict[str, MergePlan]:
    """Return the plans that a study's winner is compared with, by what they are called.

    A published setting that takes long to merge is one of them where the models are small, or
    where the study's own space has its method, so that the time is spent anyway.
    """
    slow = _slow(study, models)
    if slow:
        _logger.warning("not among the references: %s, as %s", ", ".join(slow), _TAKES_LONG)
    return reference_plans(study.experts, slow)


def left_out(study: Study, models: Models) -> dict[str, str]:
    """Return the published settings that are no references of a study, and why."""
    published = {method: METHODS[method].published for method in _slow(study, models)}
    return {setting.name: _TAKES_LONG for setting in published.values() if setting}


def _slow(study: Study, models: Models) -> list[str]:
    """Return the methods whose published setting takes too long to be a reference."""
    shapes = [header.shape for header in models.base.headers.values()]
    searched: set[str] = set()
    if not study.space.is_auto:  # which goes by the references that there are
        searched = {alternative.method for alternative in study.space.alternatives.values()}
    return [m for m in slow_methods(shapes, len(models.experts)) if m not in searched]


def make_budget(study: Study) -> Budget:
    """Return when the study ends."""
    search = study.spec.search
    return Budget(search.n_trials, search.timeout, search.patience)


def make_executor(study: Study, models: Models, config: RunConfig, content: Content) -> Executor:
    """Return the executor that a config names, its workers ready or on their way.

    Args:
        study: The study.
        models: Its models.
        config: What machine this is.
        content: What the models hold, here and wherever a worker is.

    Raises:
        SearchMergeError: If there is no place for a worker, or it cannot be loaded.
    """
    if config.executor == "local":
        return InProcessExecutor(make_worker(study, models, config, content))
    try:
        from searchmerge.execution.ray.cluster import RaySettings
        from searchmerge.execution.ray.pool import RayExecutor
    except ModuleNotFoundError as error:
        raise SpecError(
            f"executor: ray needs the package {error.name}: pip install 'searchmerge[ray]'"
        ) from error
    workers, elsewhere = config.workers, config.model_copy(update={"storage": None})
    return RayExecutor(
        functools.partial(load_worker, study.elsewhere(), elsewhere, content),
        RaySettings(
            workers.address,
            workers.workers,
            workers.cpus_per_worker,
            workers.gpus_per_worker,
            workers.deadline,
            workers.loading_deadline,
        ),
    )


def load_worker(study: Study, config: RunConfig, content: Content) -> Worker:
    """Open the study's checkpoints here and load a worker: what a Ray worker begins with.

    Raises:
        SearchMergeError: If it cannot be loaded here.
    """
    config = config.model_copy(update={"threads": config.worker_threads()})
    return make_worker(study, open_models(study), config, content)


def open_directory(
    study: Study, content: Content, config: RunConfig, run_dir: Path
) -> StudyDirectory:
    """Open the run directory, refusing a study that has changed.

    Raises:
        StudyError: If it has.
    """
    search, n_objectives = study.spec.search, len(study.objective.names)
    setting = SamplerSetting(search.seed, study.space, n_objectives, search.n_trials)
    return StudyDirectory(
        run_dir,
        name=study.name,
        spec=fingerprint(study, content, pick_device(config)),
        sampler=sampler_after(search.sampler, setting),
        n_objectives=n_objectives,
        storage=config.storage,
    )


def check_own_experts(study: Study, scored: set[str], names: Mapping[str, str]) -> None:
    """Refuse to go on where a task's own expert cannot be scored.

    Raises:
        StudyError: If so.
    """
    for task, name in names.items():
        if name not in scored:
            raise StudyError(
                f"tasks.{task}: its own expert {study.spec.tasks[task].expert!r} cannot be "
                "scored, so nothing can be normalised by it"
            )
