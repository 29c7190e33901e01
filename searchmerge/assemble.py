"""From a study and a run config to live objects: the one place that knows them all."""

import functools
import hashlib
import importlib.metadata
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from searchmerge.checkpoints.checkpoint import Checkpoint, main_dtype, open_checkpoint, tied
from searchmerge.checkpoints.compatibility import check_compatible, doubts
from searchmerge.checkpoints.files import default_cache_dir
from searchmerge.checkpoints.heads import exclude_patterns, private_tensors, unused_tensors
from searchmerge.checkpoints.model_class import check_class
from searchmerge.checkpoints.renames import aligned, head_names
from searchmerge.checkpoints.resident import load_resident, writable_views
from searchmerge.checkpoints.tying import untie_where_needed
from searchmerge.checkpoints.writer import PLAN_FILE, save_model
from searchmerge.classifier import SavedHead, class_of, head_files
from searchmerge.config import RunConfig
from searchmerge.errors import SpecError, StudyError
from searchmerge.evaluators.evaluator import Evaluator, Part, TaskInfo
from searchmerge.evaluators.heads import Head, model_head, pooled_head
from searchmerge.evaluators.rows import DataSource
from searchmerge.execution.blocks import Block, make_blocks, make_rounds, split_examples
from searchmerge.execution.executor import Executor, InProcessExecutor
from searchmerge.execution.worker import Merges, Worker
from searchmerge.merging.engine import EngineKind
from searchmerge.merging.groups import assign_groups, depth_positions
from searchmerge.merging.merger import Merger
from searchmerge.merging.task_vectors import TaskVectors
from searchmerge.plan import MergePlan, Setting
from searchmerge.search.objective import Constraint, Goal, Objective
from searchmerge.search.racing import Racing
from searchmerge.search.runner import Budget
from searchmerge.search.samplers import SamplerSetting, sampler_after
from searchmerge.search.schedule import Schedule
from searchmerge.search.study import StudyDirectory
from searchmerge.search.warm_start import warm_start_params
from searchmerge.spec import DataSpec, ModelSpec, StudySpec, TaskSpec, make_space

if TYPE_CHECKING:
    from searchmerge.evaluators.lm_harness.vllm import VllmBackend

_logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BATCH_TOKENS = {"cpu": 512, "cuda": 8192}  # a CPU gains no more by larger passes
_TEXT_TOKENS = {"cpu": 2048, "cuda": 32768}
_BATCH_IMAGES = {"cpu": 8, "cuda": 128}
_VERSIONS = ("searchmerge", "torch", "transformers", "lm-eval")


@dataclass(frozen=True)
class Models:
    """The checkpoints of a study, opened and checked, nothing loaded.

    Attributes:
        base: The base model.
        experts: Expert name to checkpoint, in the study's order.
        dtype: Of the resident model, and of the saved one.
        auto_class: The class of transformers that they are merged as; ``None`` is that which
            the base's configuration names.
        not_merged: Patterns of the tensors that stay the base's: as the study says, and what
            the class has no use for.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    dtype: torch.dtype
    auto_class: str | None = None
    not_merged: tuple[str, ...] = ()

    @property
    def sources(self) -> dict[str, str]:
        """Return each model's name as the user wrote it."""
        return {name: checkpoint.name for name, checkpoint in self.experts.items()}

    def doubts(self) -> list[str]:
        """Return what is probably not meant, one line each: an expert that equals another, ..."""
        return list(doubts(self.base, self.experts))

    def fingerprints(self) -> dict[str, str]:
        """Return a hash of each model's content."""
        named = {"base": self.base, **self.experts}
        return {name: checkpoint.fingerprint()[:16] for name, checkpoint in named.items()}


def open_models(spec: StudySpec, study_file: Path, *, resident: bool = True) -> Models:
    """Open the study's checkpoints and check by their headers that they can be merged.

    Args:
        spec: The study.
        study_file: What paths are relative to.
        resident: Whether a model will be loaded, which has to be of the class that tasks need.

    Raises:
        CheckpointError: If one cannot be opened, or they do not fit together.
    """
    auto_class = spec.resident_class if resident else spec.model_class
    trust = spec.trust_remote_code
    base = _open(spec.base, study_file, None, trust=trust)
    if resident:
        check_class(base, spec.resident_class)
    experts = {
        name: _open(model, study_file, base, trust=trust) for name, model in spec.experts.items()
    }
    base, experts = untie_where_needed(base, experts, auto_class)
    check_compatible(
        base,
        experts,
        exclude=spec.not_merged,
        vocabulary=spec.vocabulary,
        tokenizers=spec.tokenizers,
        may_differ=spec.may_differ,
        auto_class=auto_class,
    )
    unused = exclude_patterns(unused_tensors(base, auto_class), base.headers)
    dtype = _DTYPES.get(spec.dtype) or main_dtype(base)
    return Models(base, experts, dtype, auto_class, (*spec.not_merged, *unused))


def warn_of_doubts(models: Models) -> None:
    """Log what is probably not meant in a choice of models."""
    for line in models.doubts():
        _logger.warning("%s", line)


def _open(
    model: ModelSpec, study_file: Path, base: Checkpoint | None, *, trust: bool
) -> Checkpoint:
    beside = study_file.parent / Path(model.path).expanduser()
    source: str | Path = beside if beside.exists() else model.path
    found = open_checkpoint(source, revision=model.revision, base=base, trust_remote_code=trust)
    return found if base is None else found.named_as(base)


def check_groups(spec: StudySpec, models: Models) -> None:
    """Check by the base's headers that the space's groups divide its parameters.

    Raises:
        SpecError: If a pattern overlaps another or matches nothing, or there are fewer layers
            than blocks.
    """
    aliases = tied(models.base)
    names = [
        name
        for name, header in models.base.headers.items()
        if header.dtype.is_floating_point
        and name not in aliases
        and not any(re.search(pattern, name) for pattern in models.not_merged)
    ]
    if not names:
        raise SpecError(f"exclude: {spec.exclude} leaves no parameter to be merged")
    for alternative in make_space(spec).alternatives.values():
        try:
            assign_groups(names, alternative.groups)
            if "depth_slope" in alternative.settings:
                depth_positions(names)
        except SpecError as error:
            raise SpecError(f"space {alternative.name!r}: {error}") from error


def load_task_vectors(models: Models, spec: StudySpec) -> TaskVectors:
    """Map all models into memory and pair their parameters.

    Raises:
        CheckpointError: If a tensor holds NaN or inf, or tensors do not fit.
    """
    return TaskVectors.from_weights(
        models.base.weights(),
        {name: checkpoint.weights() for name, checkpoint in models.experts.items()},
        exclude=models.not_merged,
        vocabulary=spec.vocabulary,
        tied=tied(models.base),
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


def make_worker(spec: StudySpec, study_file: Path, models: Models, config: RunConfig) -> Worker:
    """Load the resident model, map the experts and build the evaluators."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    engine = make_engine(spec, models)
    evaluators = make_evaluators(spec, study_file, models, pick_device(config), engine)
    vectors = load_task_vectors(models, spec)
    model = load_resident(
        models.base,
        dtype=models.dtype,
        device=pick_device(config),
        auto_class=spec.resident_class,
    )
    views = writable_views(model)
    names = aligned(views, models.base.headers)
    targets = {names[name]: view for name, view in views.items()}
    merger: Merges = make_merger(models, vectors, config.engine, targets=targets)
    if spec.scoring == "int8":
        from searchmerge.execution.int8_merger import Int8Merger

        merger = Int8Merger(merger, model, [targets[n] for n in vectors.weights if n in targets])
    if engine is not None:
        from searchmerge.execution.followed_merger import FollowedMerger

        merger = FollowedMerger(merger, model, targets, engine)
    return Worker(model, merger, evaluators)


def make_engine(spec: StudySpec, models: Models) -> "VllmBackend | None":
    """Return the engine that language models are run by, where it is not transformers."""
    if spec.lm_harness.engine == "transformers":
        return None
    from searchmerge.evaluators.lm_harness.vllm import VllmBackend, VllmSettings

    own = spec.lm_harness
    return VllmBackend(
        VllmSettings(
            models.base.path,
            models.dtype,
            own.max_length,
            own.vllm_memory,
            models.base.trust_remote_code,
        )
    )


def make_merger(
    models: Models,
    vectors: TaskVectors,
    engine: EngineKind,
    targets: Mapping[str, torch.Tensor] | None = None,
) -> Merger:
    """Return a merger whose statistics are kept on disk, for the next run or study."""
    key = hashlib.sha256(
        json.dumps([models.fingerprints(), sorted(vectors.weights)]).encode()
    ).hexdigest()[:16]
    cache = default_cache_dir() / "statistics"
    return Merger(vectors, targets=targets, engine=engine, cache=cache, cache_key=key)


def make_evaluators(
    spec: StudySpec,
    study_file: Path,
    models: Models,
    device: str,
    engine: "VllmBackend | None" = None,
) -> dict[str, Evaluator]:
    """Return each task's evaluator; tasks of one kind share one.

    Raises:
        SpecError: If a task, split, metric or function does not exist.
    """
    found: dict[str, Evaluator] = {}
    lm_tasks = {n: t for n, t in spec.tasks.items() if t.evaluator == "lm_harness"}
    if lm_tasks:
        lm_harness = _lm_harness(spec, study_file, models, device, engine)
        found |= dict.fromkeys(lm_tasks, lm_harness)
    classified = {n: t for n, t in spec.tasks.items() if t.evaluator == "classification"}
    if classified:
        found |= dict.fromkeys(classified, _classification(spec, study_file, models, device))
    texts = {n: t for n, t in spec.tasks.items() if t.evaluator == "perplexity"}
    if texts:
        found |= dict.fromkeys(texts, _perplexity(spec, study_file, models, device))
    for name, task in spec.tasks.items():
        if task.evaluator == "function":
            from searchmerge.evaluators.function import FunctionEvaluator

            found[name] = FunctionEvaluator(
                str(task.function), {name: task.n_examples or 0}, search_path=study_file.parent
            )
    return {name: found[name] for name in spec.tasks}


def _lm_harness(
    spec: StudySpec,
    study_file: Path,
    models: Models,
    device: str,
    engine: "VllmBackend | None",
) -> Evaluator:
    from searchmerge.evaluators.lm_harness.catalogue import LmTask
    from searchmerge.evaluators.lm_harness.evaluator import LmHarness
    from searchmerge.evaluators.tokenizer import load_tokenizer

    own = spec.lm_harness
    return LmHarness(
        {
            name: LmTask(
                task.task or name,
                str(task.split),
                metric=task.metric,
                num_fewshot=task.num_fewshot,
            )
            for name, task in spec.tasks.items()
            if task.evaluator == "lm_harness"
        },
        tokenizer=load_tokenizer(
            models.base.tokenizer_dir, trust_remote_code=spec.trust_remote_code
        ),
        include_path=study_file.parent / own.include_path if own.include_path else None,
        batch_tokens=own.batch_tokens or _for(device, _BATCH_TOKENS),
        max_length=own.max_length,
        fewshot_seed=own.fewshot_seed,
        backend=engine,
    )


def _classification(spec: StudySpec, study_file: Path, models: Models, device: str) -> Evaluator:
    from searchmerge.evaluators.classification import Classification, ClassificationTask

    own = spec.classification
    heads = _heads(spec, models)
    tasks = {
        name: ClassificationTask(
            _data_source(task, study_file),
            heads[str(task.expert)],
            text=task.text or (),
            image=task.image,
            label=task.label or "label",
            class_names=task.labels or _class_names(models, str(task.expert), heads),
            metric="macro_f1" if task.metric == "macro_f1" else "acc",
        )
        for name, task in spec.tasks.items()
        if task.evaluator == "classification"
    }
    return Classification(
        tasks,
        model_dir=models.base.tokenizer_dir,
        trust_remote_code=spec.trust_remote_code,
        batch_tokens=own.batch_tokens or _for(device, _TEXT_TOKENS),
        batch_images=own.batch_images or _for(device, _BATCH_IMAGES),
        max_length=own.max_length,
    )


def _perplexity(spec: StudySpec, study_file: Path, models: Models, device: str) -> Evaluator:
    from searchmerge.evaluators.perplexity import Perplexity, TextTask

    own = spec.perplexity
    return Perplexity(
        {
            name: TextTask(_data_source(task, study_file), (task.text or ("text",))[0])
            for name, task in spec.tasks.items()
            if task.evaluator == "perplexity"
        },
        model_dir=models.base.tokenizer_dir,
        trust_remote_code=spec.trust_remote_code,
        batch_tokens=own.batch_tokens or _for(device, _BATCH_TOKENS),
        max_length=own.max_length,
        stride=own.stride,
    )


def _for(device: str, sizes: Mapping[str, int]) -> int:
    """Return the size for a kind of device; that of a CPU where there is none."""
    return sizes.get(device.partition(":")[0], sizes["cpu"])


def _heads(spec: StudySpec, models: Models) -> dict[str, Head]:
    """Return the head of every expert whose task is a classification.

    Raises:
        SpecError: If an expert has no head.
    """
    own = spec.classification
    shared = [name for name in models.base.headers if not _is_head(spec, name)]
    needed, _ = head_names(
        models.base.path,
        shared,
        spec.resident_class,
        trust_remote_code=spec.trust_remote_code,
    )
    if needed and own.pooling == "pooler":
        raise SpecError(
            f"classification.pooling: {models.base.name} has no {next(iter(needed))!r}, which "
            "its pooled output needs; choose mean, cls or max"
        )
    found: dict[str, Head] = {}
    wanted = [t.expert for t in spec.tasks.values() if t.evaluator == "classification"]
    for expert in dict.fromkeys(map(str, wanted)):
        checkpoint = models.experts[expert]
        where = f"experts.{expert} ({checkpoint.name})"
        tensors = _own_tensors(spec, models, expert)
        found[expert] = (
            pooled_head(tensors, own.pooling, where)
            if own.pooling
            else model_head(tensors, needed, n_classes(checkpoint.config), where)
        )
    return found


def _is_head(spec: StudySpec, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in spec.classification.heads)


def _own_tensors(spec: StudySpec, models: Models, expert: str) -> dict[str, torch.Tensor]:
    """Return what is an expert's alone: what the base does not have, and its heads."""
    checkpoint = models.experts[expert]
    weights, private = (
        checkpoint.weights(),
        private_tensors(models.base, checkpoint, models.auto_class),
    )
    return {n: weights[n] for n in checkpoint.headers if n in private or _is_head(spec, n)}


def saved_heads(spec: StudySpec, models: Models) -> dict[str, SavedHead]:
    """Return what is saved beside the merged model: the heads of experts that classify."""
    found = {}
    classified = {n: t for n, t in spec.tasks.items() if t.evaluator == "classification"}
    for expert, checkpoint in models.experts.items():
        tensors, config = _own_tensors(spec, models, expert), checkpoint.config
        model_class = spec.resident_class if classified else class_of(config)
        is_other = not classified and model_class and not model_class.endswith("Classification")
        if not tensors or is_other:  # a language model's untied output embedding is no head
            continue
        named = [t.labels for t in classified.values() if t.expert == expert and t.labels]
        sizes = [len(t) for t in tensors.values() if t.ndim == 2]
        pooled = spec.classification.pooling if classified else None
        n = sizes[0] if pooled and len(sizes) == 1 else n_classes(config)
        candidates = [*named, class_names(config), tuple(f"LABEL_{i}" for i in range(n))]
        found[expert] = SavedHead(
            tensors,
            model_class,
            pooled,
            next(labels for labels in candidates if len(labels) == n),
        )
    return found


def n_classes(config: Mapping[str, Any]) -> int:
    """Return how many classes a model's configuration gives it; 2 where it does not say."""
    return len(config.get("id2label") or ()) or int(config.get("num_labels") or 2)


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a model's classes in order; none where they are only numbered."""
    names = config.get("id2label") or {}
    ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    numbered = all(name == f"LABEL_{i}" for i, name in enumerate(ordered))
    return () if numbered else ordered


def _class_names(models: Models, expert: str, heads: Mapping[str, Head]) -> tuple[str, ...]:
    """Return the names of a head's classes; none where the configuration speaks of others."""
    names = class_names(models.experts[expert].config)
    return names if len(names) == heads[expert].n_classes else ()


def _data_source(task: TaskSpec, study_file: Path) -> DataSource:
    data = task.data or DataSpec(path="")
    beside = study_file.parent / Path(data.path).expanduser()
    path = str(beside) if beside.exists() else data.path
    return DataSource(path, task.split, data.subset, data.revision)


def make_schedule(spec: StudySpec, tasks: Mapping[str, TaskInfo]) -> Schedule:
    """Return what every candidate is scored on, before the references decide the order.

    Raises:
        SpecError: If a task has too few examples for its parts.
    """
    blocks: dict[Part, dict[str, tuple[Block, ...]]] = {"survey": {}, "hold_out": {}}
    for name, info in tasks.items():
        task = spec.tasks[name]
        parts = split_examples(
            name,
            info.n_examples,
            seed=spec.search.seed,
            select=task.select,
            hold_out=task.hold_out,
        )
        for part, examples in zip(blocks, (parts["select"], parts["hold_out"]), strict=True):
            blocks[part][name] = make_blocks(name, part, examples, info, spec.search.block_size)
    round_blocks = spec.search.round_blocks
    rounds = {
        part: make_rounds(own, round_blocks=round_blocks, seed=spec.search.seed)
        for part, own in blocks.items()
    }
    metrics = {name: info.metric for name, info in tasks.items()}
    aggregates = {n: info.aggregate for n, info in tasks.items() if info.aggregate is not None}
    return Schedule(blocks, rounds, round_blocks, metrics, aggregates)


def make_objective(spec: StudySpec) -> Objective:
    """Return the study's objective, without the own experts' scores."""
    goals = {name: Goal(task.weight, task.expert) for name, task in spec.tasks.items()}
    constraints = tuple(
        Constraint(task, constraint.against, constraint.at_least)
        for constraint in spec.constraints
        for task in spec.constrained(constraint)
    )
    return Objective(spec.objective, goals, constraints=constraints, pick=spec.confirm.pick)


def make_racing(spec: StudySpec) -> Racing | None:
    """Return the study's racing, or ``None`` where it is off."""
    racing = spec.search.racing
    if racing == "off":
        return None
    return Racing(racing.p_threshold, racing.min_blocks, racing.collapse_margin)


def warm_start(spec: StudySpec, study_file: Path) -> list[dict[str, Setting]]:
    """Return the parameters of the earlier studies' best plans, as near as the space comes.

    Raises:
        SpecError: If no plan of an earlier study fits the space.
        StudyError: If a run directory holds no study.
    """
    found = [study_file.parent / Path(name).expanduser() for name in spec.search.warm_start]
    run_dirs = [
        beside if beside.exists() else Path(name).expanduser()
        for beside, name in zip(found, spec.search.warm_start, strict=True)
    ]
    return warm_start_params(run_dirs, make_space(spec), spec.search.warm_start_plans)


def make_budget(spec: StudySpec) -> Budget:
    """Return when the study ends."""
    return Budget(spec.search.n_trials, spec.search.timeout, spec.search.patience)


def make_executor(
    spec: StudySpec, study_file: Path, models: Models, config: RunConfig
) -> Executor:
    """Return the executor that a config names, its workers ready or on their way.

    Raises:
        SearchMergeError: If there is no place for a worker, or it cannot be loaded.
    """
    if config.executor == "local":
        return InProcessExecutor(make_worker(spec, study_file, models, config))
    try:
        from searchmerge.execution.ray.cluster import RaySettings
        from searchmerge.execution.ray.pool import RayExecutor
    except ModuleNotFoundError as error:
        raise SpecError(
            f"executor: ray needs the package {error.name}: pip install 'searchmerge[ray]'"
        ) from error
    own = config.workers
    return RayExecutor(
        functools.partial(load_worker, spec, study_file.resolve(), config),
        RaySettings(
            own.address, own.workers, own.cpus_per_worker, own.gpus_per_worker, own.deadline
        ),
    )


def load_worker(spec: StudySpec, study_file: Path, config: RunConfig) -> Worker:
    """Open the study's checkpoints here and load a worker: what a Ray worker begins with.

    Raises:
        SearchMergeError: If it cannot be loaded here.
    """
    threads = config.threads or max(1, int(config.workers.cpus_per_worker))
    config = config.model_copy(update={"threads": threads})
    return make_worker(spec, study_file, open_models(spec, study_file), config)


def study_name(spec: StudySpec, study_file: Path) -> str:
    """Return the study's name: its own, or that of its folder or file."""
    if spec.name:
        return spec.name
    file = study_file.resolve()
    return file.parent.name if file.name == "study.yaml" else file.stem


def canonical_study(
    spec: StudySpec, study_file: Path, models: Models, config: RunConfig
) -> dict[str, Any]:
    """Return all that may change a score, as plain data: what guards a resume."""
    return {
        "study": spec.canonical(),
        "space": make_space(spec).describe(),
        "checkpoints": models.fingerprints(),
        "task_files": _hash_task_files(spec, study_file),
        "device": pick_device(config).partition(":")[0],
        "versions": versions(),
        "engine": [spec.lm_harness.engine, *_engine_version(spec)],
    }


def versions() -> dict[str, str]:
    """Return the versions of what merges and scores."""
    return {name: importlib.metadata.version(name) for name in _VERSIONS}


def _engine_version(spec: StudySpec) -> list[str]:
    if spec.lm_harness.engine == "transformers":
        return []
    try:
        return [importlib.metadata.version(spec.lm_harness.engine)]
    except importlib.metadata.PackageNotFoundError as error:
        raise SpecError(
            f"lm_harness.engine: {error.name} is not installed: "
            f"pip install 'searchmerge[{error.name}]'"
        ) from error


def _hash_task_files(spec: StudySpec, study_file: Path) -> str:
    """Return a hash of the local task definitions and of all local data."""
    places = [
        Path(_data_source(task, study_file).path) for task in spec.tasks.values() if task.data
    ]
    modules = [str(task.function).partition(":")[0] for task in spec.tasks.values()]
    places += [study_file.parent / f"{module.replace('.', '/')}.py" for module in modules]
    if spec.lm_harness.include_path is not None:
        folder = study_file.parent / spec.lm_harness.include_path
        if not folder.is_dir():
            raise SpecError(f"{study_file}: lm_harness.include_path: no folder {folder}")
        places.append(folder)
    digest = hashlib.sha256()
    for place in dict.fromkeys(place for place in places if place.exists()):
        files = [place] if place.is_file() else sorted(f for f in place.rglob("*") if f.is_file())
        for file in files:
            if "__pycache__" not in file.parts:
                name = file.name if file == place else str(file.relative_to(place))
                digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def open_directory(
    spec: StudySpec, study_file: Path, models: Models, config: RunConfig, run_dir: Path
) -> StudyDirectory:
    """Open the run directory, refusing a study that has changed.

    Raises:
        StudyError: If it has.
    """
    space, objective = make_space(spec), make_objective(spec)
    n_objectives = len(objective.names)
    setting = SamplerSetting(spec.search.seed, space, n_objectives, spec.search.n_trials)
    return StudyDirectory(
        run_dir,
        name=study_name(spec, study_file),
        spec=canonical_study(spec, study_file, models, config),
        sampler=sampler_after(spec.search.sampler, setting),
        n_objectives=n_objectives,
        storage=config.storage,
    )


def save_merge(
    models: Models,
    vectors: TaskVectors,
    plan: MergePlan,
    out: Path,
    *,
    heads: Mapping[str, SavedHead],
    card: str | None = None,
) -> None:
    """Merge ``plan`` and write the model, its plan and the experts' heads, in the study's dtype.

    Raises:
        CheckpointError: If it cannot be written; what was at ``out`` before is kept.
    """
    merger = make_merger(models, vectors, "auto")
    extra = {
        PLAN_FILE: plan.to_yaml(),
        **head_files(heads, models.dtype),
        **({"README.md": card} if card else {}),
    }
    save_model(
        merger.merged(plan, dtype=models.dtype),
        out,
        like=models.base,
        dtype=models.dtype,
        extra_files=extra,
    )


def check_own_experts(spec: StudySpec, scored: set[str], names: Mapping[str, str]) -> None:
    """Refuse to go on where a task's own expert cannot be scored.

    Raises:
        StudyError: If so.
    """
    for task, name in names.items():
        if name not in scored:
            raise StudyError(
                f"tasks.{task}: its own expert {spec.tasks[task].expert!r} cannot be scored, "
                "so nothing can be normalised by it"
            )


def first_examples(block: Block, n_examples: int) -> Block:
    """Return the block cut to its first examples."""
    return Block(block.task, block.part, block.index, block.examples[:n_examples])
