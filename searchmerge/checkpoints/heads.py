"""Tensors that an expert has beyond its base: its own head, or a sign that they do not fit."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from searchmerge.checkpoints.checkpoint import Checkpoint
from searchmerge.checkpoints.embeddings import aliases
from searchmerge.checkpoints.files import CONFIG_FILE, read_json
from searchmerge.checkpoints.layout import Layout, ignored_when_loaded, is_buffer, layout
from searchmerge.checkpoints.lora_config import ADAPTER_CONFIG
from searchmerge.checkpoints.tensor_files import TensorHeader
from searchmerge.errors import CheckpointError

_TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""What PEFT calls a task, and the class that it stands for."""


class Beyond(NamedTuple):
    """What an expert has and its base, as it is used, does not.

    Attributes:
        head: The tensors of its head, in the order of the checkpoint.
        of_model: Tensors of the model itself, such as more layers.
        unknown: Tensors that no class of transformers accounts for.
    """

    head: tuple[str, ...] = ()
    of_model: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def private_tensors(
    base: Checkpoint, expert: Checkpoint, auto_class: str | None = None
) -> tuple[str, ...]:
    """Return the tensors of an expert's own head, in order; see :func:`beyond_base`."""
    return beyond_base(base, expert, auto_class).head


def label_config(expert: Checkpoint) -> Mapping[str, Any]:
    """Return the configuration that names an expert's classes: an adapter's own, if it has one."""
    file = expert.source_dir / CONFIG_FILE
    return read_json(file) if expert.adapter is not None and file.exists() else expert.config


def unused_tensors(base: Checkpoint, auto_class: str | None = None) -> tuple[str, ...]:
    """Return what a base stores and a class of transformers has no use for, in order.

    Such are buffers that older versions stored, and the head of a language model where a
    classifier is wanted. Nobody need have them, and nothing is merged into them.

    Args:
        base: The base model.
        auto_class: The class; ``None`` is that which the base's configuration names.
    """
    use = _layout(base, base.headers, auto_class)
    return () if use is None else tuple(name for name in base.headers if name not in use.roles)


def beyond_base(base: Checkpoint, expert: Checkpoint, auto_class: str | None = None) -> Beyond:
    """Return what an expert has beyond its base, by what it is; no tensor is read.

    A head is what a class of transformers, the expert's own or that which the models are loaded
    as, puts on a model for a task; or, where they are loaded without a head, one linear layer
    beside the model. What transformers passes over, or has no use for, is left out.

    Args:
        base: The base model.
        expert: The expert, with the base's names.
        auto_class: The class that models are loaded as; ``None`` is that which the base's
            configuration names.
    """
    further = _further(expert, base.headers)
    use = _layout(base, [*base.headers, *further], auto_class)
    unused = set() if use is None else base.headers.keys() - use.roles.keys()
    candidates = _further(expert, base.headers.keys() - unused)
    if not candidates:
        return Beyond()
    own = _layout(expert, candidates, trained_class(expert))
    head = set() if own is None else set(own.heads)
    accounted = set() if own is None else set(own.roles)
    used = {} if use is None else use.roles
    head |= set() if use is None or use.is_bare else used.keys() & candidates.keys()
    rest = _unknown(
        expert, {n: h for n, h in candidates.items() if n not in accounted | used.keys()}
    )
    if (use is None or use.is_bare) and _is_linear(rest, base.headers):
        head |= rest.keys()
        rest = {}
    there = _layout(expert, further, auto_class) or own  # of the expert's own layers and sizes
    of_model = [] if there is None else [n for n, role in there.roles.items() if role == "model"]
    return Beyond(
        tuple(name for name in expert.headers if name in head),
        tuple(n for n in of_model if n in further and n not in head and n not in used),
        tuple(name for name in rest if name in further),
    )


def advice(names: Iterable[str], others: Collection[str]) -> str:
    """Return what a study says to exclude these names, and none of the others, in YAML."""
    patterns = ", ".join(f"'{pattern}'" for pattern in exclude_patterns(names, others))
    return f"`exclude: [{patterns}]`"


def exclude_patterns(names: Iterable[str], others: Collection[str]) -> list[str]:
    """Return regular expressions that match these names, and none of the others.

    Each begins at the start of a name, and is as general as that allows.
    """
    left = dict.fromkeys(names)
    strangers = [name for name in others if name not in left]
    patterns: list[str] = []
    while left:
        name = next(iter(left))
        pattern = next(
            each
            for each in _patterns(name)
            if not any(re.search(each, other) for other in strangers)
        )
        patterns.append(pattern)
        left = {each: None for each in left if each != name and not re.search(pattern, each)}
    return patterns


def _patterns(name: str) -> Iterable[str]:
    """Yield patterns for a name: what stands in front of it, any layer's, it alone."""
    parts = [re.escape(part) for part in name.split(".")]
    for n_parts in range(1, len(parts)):
        yield "^" + r"\.".join(parts[:n_parts]) + r"\."
    yield "^" + r"\.".join(r"\d+" if part.isdigit() else part for part in parts) + "$"
    yield "^" + r"\.".join(parts) + "$"


def _further(expert: Checkpoint, known: Collection[str]) -> dict[str, TensorHeader]:
    once_more = aliases(expert.headers, expert.config)
    return {
        name: header
        for name, header in expert.headers.items()
        if name not in known and name not in once_more and not is_buffer(name, header)
    }


def _layout(model: Checkpoint, names: Collection[str], auto_class: str | None) -> Layout | None:
    return layout(model.path, names, auto_class, trust_remote_code=model.trust_remote_code)


def trained_class(expert: Checkpoint) -> str | None:
    """Return the class that an adapter was trained on; ``None`` is the configuration's own."""
    if expert.adapter is None:
        return None
    config = read_json(expert.source_dir / ADAPTER_CONFIG)
    mapping = config.get("auto_mapping") or {}
    return _TASKS.get(str(config.get("task_type"))) or mapping.get("base_model_class")


def _is_linear(tensors: Mapping[str, TensorHeader], base: Collection[str]) -> bool:
    """Return whether tensors are one linear layer that stands beside the base's modules."""
    modules = {name.rpartition(".")[0] for name in tensors}
    shapes = sorted((header.shape for header in tensors.values()), key=len)
    if len(modules) != 1 or {name.partition(".")[0] for name in tensors} & {
        name.partition(".")[0] for name in base
    }:
        return False
    return [len(shape) for shape in shapes] in ([2], [1, 2]) and shapes[0][0] == shapes[-1][0]


def _unknown(expert: Checkpoint, rest: Mapping[str, TensorHeader]) -> Mapping[str, TensorHeader]:
    """Return those tensors that transformers does not pass over by itself."""
    if not rest:
        return rest
    passed_over = ignored_when_loaded(
        expert.path, rest, trust_remote_code=expert.trust_remote_code
    )
    pretrained = _layout(expert, rest, "AutoModelForPreTraining")
    if pretrained is not None:
        passed_over |= {name for name, role in pretrained.roles.items() if role == "head"}
    return {name: header for name, header in rest.items() if name not in passed_over}


def refuse_foreign(name: str, base: Checkpoint, expert: Checkpoint, found: Beyond) -> None:
    """Refuse an expert that has more than its base and a head.

    Raises:
        CheckpointError: If so; it names the tensor, and says what can be done.
    """
    if found.of_model:
        raise CheckpointError(
            f"expert {name!r} ({expert.name}) has {_first(found.of_model)} in the model itself, "
            f"which the base ({base.name}) does not have, so it was not trained from it; give "
            "the base that it was trained from"
        )
    if found.unknown:
        way_out = advice(found.unknown, {*base.headers, *expert.headers})
        raise CheckpointError(
            f"expert {name!r} ({expert.name}) has {_first(found.unknown)}, which the base "
            f"({base.name}) does not have, and which is no head of a class of transformers; "
            f"leave it out with {way_out}"
        )


def _first(names: tuple[str, ...]) -> str:
    return f"{names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
