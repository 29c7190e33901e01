"""The experts' own classification heads: which tensors they are, and which are saved."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from searchmerge.checkpoints.heads import label_config, private_tensors, trained_class
from searchmerge.checkpoints.renames import head_names
from searchmerge.classifier import SavedHead, class_of
from searchmerge.errors import SpecError
from searchmerge.evaluators.heads import (
    ExpertHead,
    HeadUse,
    Pooling,
    model_head,
    n_logits,
    pooled_head,
)
from searchmerge.models import Models
from searchmerge.study import Study


def expert_head(study: Study, models: Models, expert: str, pooling: Pooling | None) -> ExpertHead:
    """Return an expert's head, and the names of its classes.

    Args:
        study: The study.
        models: Its models.
        expert: Name of the expert.
        pooling: Of a linear head on a pooled output; ``None`` for the head of the model's class.

    Raises:
        SpecError: If the expert has no head, or the base no pooled output.
    """
    needed = _needed(study, models, study.spec.resident_class)
    if needed and pooling == "pooler":
        raise SpecError(
            f"classification.pooling: {models.base.name} has no {next(iter(needed))!r}, which "
            "its pooled output needs; choose mean, cls or max"
        )
    checkpoint = models.experts[expert]
    where = f"experts.{expert} ({checkpoint.name})"
    tensors = head_tensors(study, models, expert)
    head = (
        pooled_head(tensors, pooling, where)
        if pooling
        else model_head(tensors, needed, n_classes(checkpoint.config), where)
    )
    labels = class_names(label_config(checkpoint))
    return ExpertHead(head, labels if len(labels) == head.n_classes else ())


def head_tensors(study: Study, models: Models, expert: str) -> dict[str, torch.Tensor]:
    """Return what is an expert's alone: what the base does not have, and its heads."""
    checkpoint, patterns = models.experts[expert], study.spec.private
    weights = checkpoint.weights()
    private = private_tensors(models.base, checkpoint, models.auto_class)
    return {n: weights[n] for n in checkpoint.headers if n in private or _matches(patterns, n)}


def saved_heads(study: Study, models: Models) -> dict[str, SavedHead]:
    """Return what is saved beside the merged model: the heads of experts that classify."""
    uses = {
        expert: use
        for name, kind in study.spec.kinds.items()
        for expert, use in kind.heads(study.spec.keys_of(name), study.spec.section(name)).items()
    }
    heads = {}
    for expert, checkpoint in models.experts.items():
        tensors = head_tensors(study, models, expert)
        own_class = trained_class(checkpoint) or class_of(checkpoint.config)
        model_class = study.spec.resident_class if uses else own_class
        is_other = not uses and model_class and not model_class.endswith("Classification")
        if tensors and not is_other:  # a language model's untied output embedding is no head
            use = uses.get(expert) or next(iter(uses.values()), HeadUse())
            use = use if expert in uses else HeadUse(use.pooling)
            alone = model_class is None or use.pooling is not None  # one linear layer
            names = [] if alone else _needed(study, models, str(model_class))
            n = n_logits(tensors, [name for name in names if name in tensors])
            labels = class_names(label_config(checkpoint))
            heads[expert] = SavedHead(tensors, model_class, use.pooling, _named(n, use, labels))
    return heads


def _needed(study: Study, models: Models, model_class: str) -> dict[str, str]:
    """Return what a class needs beyond what is merged, by names in a checkpoint and loaded."""
    private = study.spec.private
    shared = [name for name in models.base.headers if not _matches(private, name)]
    trust = study.spec.trust_remote_code
    return head_names(models.base.path, shared, model_class, trust_remote_code=trust)[0]


def _named(n: int, use: HeadUse, labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return a name for each of so many classes: the first that are as many, else numbers."""
    candidates = [use.labels, labels, tuple(f"LABEL_{i}" for i in range(n))]
    return next(names for names in candidates if len(names) == n)


def n_classes(config: Mapping[str, Any]) -> int:
    """Return how many classes a model's configuration gives it; 2 where it does not say."""
    return len(config.get("id2label") or ()) or int(config.get("num_labels") or 2)


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a model's classes in order; none where they are only numbered."""
    names = config.get("id2label") or {}
    ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    numbered = all(name == f"LABEL_{i}" for i, name in enumerate(ordered))
    return () if numbered else ordered


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
