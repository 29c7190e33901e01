"""The models of a study: opened, checked, paired for merging, and saved."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch

from searchmerge.checkpoints.checkpoint import Checkpoint, main_dtype, open_checkpoint, tied
from searchmerge.checkpoints.chosen_tokenizer import (
    chat_template,
    read_template,
    template_doubts,
    with_tokenizer,
)
from searchmerge.checkpoints.compatibility import check_compatible, doubts
from searchmerge.checkpoints.files import default_cache_dir
from searchmerge.checkpoints.heads import exclude_patterns, trained_class, unused_tensors
from searchmerge.checkpoints.model_class import check_class
from searchmerge.checkpoints.tokenizer_files import AddedToken
from searchmerge.checkpoints.tying import untie_where_needed
from searchmerge.checkpoints.vocabulary import with_union
from searchmerge.checkpoints.writer import PLAN_FILE, save_model
from searchmerge.classifier import class_of
from searchmerge.errors import CheckpointError, SpecError
from searchmerge.machine import available_cores
from searchmerge.merging.engine import EngineKind
from searchmerge.merging.groups import assign_groups, depth_positions
from searchmerge.merging.merger import Merger
from searchmerge.merging.residency import Memory
from searchmerge.merging.task_vectors import TaskVectors
from searchmerge.plan import TENSOR, Groups, MergePlan
from searchmerge.spec import ModelSpec
from searchmerge.study import Study

_logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        remarks: What is probably not meant and no tensor tells, one line each.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    dtype: torch.dtype
    auto_class: str | None = None
    not_merged: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def sources(self) -> dict[str, str]:
        """Return each model's name as the user wrote it."""
        return {name: checkpoint.name for name, checkpoint in self.experts.items()}

    def doubts(self) -> list[str]:
        """Return what is probably not meant, one line each: an expert that equals another, ..."""
        return [*self.remarks, *doubts(self.base, self.experts)]

    def fingerprints(self) -> dict[str, str]:
        """Return a hash of each model's content; several are read at once."""
        named, stopped = {"base": self.base, **self.experts}, Event()
        with ThreadPoolExecutor(available_cores()) as threads:
            try:
                whole = {
                    name: threads.submit(checkpoint.fingerprint, stopped)
                    for name, checkpoint in named.items()
                    if checkpoint.is_whole
                }
                hashes = {name: future.result() for name, future in whole.items()}
            except BaseException:  # a signal, say: the others need not end what they read
                stopped.set()
                raise
        hashes |= {n: c.fingerprint() for n, c in named.items() if n not in hashes}
        return {name: hashes[name][:16] for name in named}


def open_models(study: Study, *, resident: bool = True) -> Models:
    """Open the study's checkpoints and check by their headers that they can be merged.

    Args:
        study: The study.
        resident: Whether a model will be loaded, which has to be of the class that tasks need.

    Raises:
        CheckpointError: If one cannot be opened, or they do not fit together.
    """
    spec = study.spec
    base = _open(study, spec.base, None)
    if resident:
        check_class(base, spec.resident_class)
    experts = {name: _open(study, model, base) for name, model in spec.experts.items()}
    auto_class = spec.resident_class if resident else spec.model_class or _trained_as(experts)
    base, experts = untie_where_needed(base, experts, auto_class)
    dtype = _DTYPES.get(spec.dtype) or main_dtype(base)
    added: tuple[AddedToken, ...] = ()
    if spec.vocabulary == "union":
        base, experts, added = with_union(base, experts)
    check_compatible(
        base,
        experts,
        exclude=spec.not_merged,
        vocabulary="base" if spec.vocabulary == "base" else "same",
        tokenizers="any" if spec.vocabulary == "union" else spec.tokenizers,
        may_differ=spec.may_differ,
        auto_class=auto_class,
    )
    unused = exclude_patterns(unused_tensors(base, auto_class), base.headers)
    base = _with_tokenizer(study, base, experts, added)
    remarks = () if spec.chat_template else tuple(template_doubts(base, experts))
    return Models(base, experts, dtype, auto_class, (*spec.not_merged, *unused), remarks)


def _with_tokenizer(
    study: Study,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    added: tuple[AddedToken, ...],
) -> Checkpoint:
    """Return the base with the tokenizer and the chat template that the study chooses."""
    spec, template = study.spec, None
    if spec.chat_template in experts or spec.chat_template == "base":
        source = {"base": base, **experts}[str(spec.chat_template)]
        template = chat_template(source.tokenizer_dir)
        if template is None and spec.chat_template != "base":
            raise CheckpointError(
                f"chat_template: expert {spec.chat_template!r} ({source.name}) has none"
            )
    elif spec.chat_template is not None:
        template = read_template(Path(study.resolve(spec.chat_template)))
    expert = experts.get(spec.tokenizer)
    if template is None and expert is None and not added:
        return base
    return with_tokenizer(base, expert, template=template, added=added)


def warn_of_doubts(models: Models) -> None:
    """Log what is probably not meant in a choice of models."""
    for line in models.doubts():
        _logger.warning("%s", line)


def _trained_as(experts: Mapping[str, Checkpoint]) -> str | None:
    """Return the class of classifiers that all experts are; ``None`` is the base's own."""
    kinds = {trained_class(expert) or class_of(expert.config) for expert in experts.values()}
    kind = kinds.pop() if len(kinds) == 1 else None
    return kind if kind is not None and kind.endswith("Classification") else None


def _open(study: Study, model: ModelSpec, base: Checkpoint | None) -> Checkpoint:
    checkpoint = open_checkpoint(
        study.resolve(model.path),
        revision=model.revision,
        base=base,
        trust_remote_code=study.spec.trust_remote_code,
    )
    return checkpoint if base is None else checkpoint.named_as(base)


def merged_names(models: Models) -> list[str]:
    """Return the names of the parameters that are merged, by the base's headers."""
    aliases = tied(models.base)
    return [
        name
        for name, header in models.base.headers.items()
        if header.dtype.is_floating_point
        and name not in aliases
        and not any(re.search(pattern, name) for pattern in models.not_merged)
    ]


def check_groups(study: Study, models: Models) -> None:
    """Check by the base's headers that the groups of a study divide its parameters.

    Raises:
        SpecError: If a pattern overlaps another or matches nothing, or there are fewer layers
            than blocks.
    """
    names = merged_names(models)
    if not names:
        raise SpecError(f"exclude: {study.spec.exclude} leaves no parameter to be merged")
    for alternative in study.space.alternatives.values():
        try:
            assign_groups(names, alternative.groups)
            if "depth_slope" in alternative.settings:
                depth_positions(names)
        except SpecError as error:
            raise SpecError(f"space {alternative.name!r}: {error}") from error
    refine = study.spec.search.refine
    if refine != "off" and refine.groups != TENSOR:
        try:
            assign_groups(names, Groups.from_data(refine.groups))
        except SpecError as error:
            raise SpecError(f"search.refine: {error}") from error


def load_task_vectors(study: Study, models: Models) -> TaskVectors:
    """Map all models into memory and pair their parameters.

    Raises:
        CheckpointError: If a tensor holds NaN or inf, or tensors do not fit.
    """
    return TaskVectors.from_weights(
        models.base.weights(),
        {name: checkpoint.weights() for name, checkpoint in models.experts.items()},
        exclude=models.not_merged,
        vocabulary="base" if study.spec.vocabulary == "base" else "same",
        tied=tied(models.base),
    )


def make_merger(
    models: Models,
    vectors: TaskVectors,
    engine: EngineKind = "auto",
    *,
    memory: Memory | None = None,
    targets: Mapping[str, torch.Tensor] | None = None,
) -> Merger:
    """Return a merger whose statistics are kept on disk, for the next run or study.

    Args:
        models: What ``vectors`` are of.
        vectors: The base and the experts.
        engine: How arithmetic is run.
        memory: Where base and experts lie, and how much methods may keep.
        targets: Name in the base to the tensor that a plan overwrites.
    """
    key = hashlib.sha256(
        json.dumps([models.fingerprints(), sorted(vectors.weights)]).encode()
    ).hexdigest()[:16]
    return Merger(
        vectors,
        targets=targets,
        engine=engine,
        memory=memory,
        cache=default_cache_dir() / "statistics",
        cache_key=key,
    )


def save_merge(
    models: Models,
    weights: Iterator[tuple[str, torch.Tensor]],
    plan: MergePlan,
    out: Path,
    *,
    files: Mapping[str, str | bytes],
    check: Callable[[], None],
) -> None:
    """Write a merged model and its plan, in the study's dtype.

    Args:
        models: The models.
        weights: All tensors by name, as ``plan`` merges them in that dtype, one at a time.
        plan: How they are merged.
        out: The directory to make.
        files: What else is written, e.g. the experts' heads: content by file name.
        check: Raises an error where a file of the models has changed.

    Raises:
        CheckpointError: If it cannot be written, or a model changed before all of it was; what
            was at ``out`` before is kept.
    """
    check()
    save_model(
        _checked(weights, check),
        out,
        like=models.base,
        dtype=models.dtype,
        extra_files={PLAN_FILE: plan.to_yaml(), **files},
    )


def merged_here(
    models: Models, vectors: TaskVectors, plan: MergePlan
) -> Iterator[tuple[str, torch.Tensor]]:
    """Return the tensors of a merged model, in the study's dtype, merged on the CPU.

    Args:
        models: The models.
        vectors: What is merged of them.
        plan: How.
    """
    return make_merger(models, vectors).merged(plan, dtype=models.dtype)


def _checked(
    weights: Iterator[tuple[str, torch.Tensor]], check: Callable[[], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all weights, and check the files that they were read from before the last is done."""
    yield from weights
    check()
