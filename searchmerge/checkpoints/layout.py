"""What a tensor is to a class of transformers: of the model within, of a head, or nothing."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from searchmerge.checkpoints.renames import without_data
from searchmerge.checkpoints.resident import quiet
from searchmerge.checkpoints.tensor_files import TensorHeader

Role = Literal["model", "head"]
"""Whether a tensor is of the model within, or of what a class puts on it for a task."""

_FOR_LANGUAGE = re.compile(
    r"(LM|LMHead\w*|PreTraining|ConditionalGeneration|Prediction|Generation)$"
)
_BUFFER = re.compile(r"(^|\.)(masked_bias|position_ids|inv_freq|(cos|sin)_cached)$")
_CAUSAL_MASK = re.compile(r"(^|\.)\w*att(n|ention)\.bias$")


class Layout(NamedTuple):
    """How a class of transformers uses the tensors of a checkpoint.

    Attributes:
        kind: The class.
        roles: What the tensors are that it uses, by their names in the checkpoint.
        is_bare: Whether it is a model without a head.
    """

    kind: str
    roles: Mapping[str, Role]
    is_bare: bool

    @property
    def heads(self) -> frozenset[str]:
        """Return the tensors of a head for a task; predicting tokens is the model's own."""
        if _FOR_LANGUAGE.search(self.kind):
            return frozenset()
        return frozenset(name for name, role in self.roles.items() if role == "head")


def layout(
    model_dir: Path,
    names: Collection[str],
    auto_class: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> Layout | None:
    """Return what a class of transformers does with tensors of these names; nothing is loaded.

    Names that transformers changes when it loads a checkpoint are understood, such as those of
    an older version, or with the name of the model in front.

    Args:
        model_dir: A directory that transformers can load.
        names: The names in the checkpoint, or in another one of the same kind.
        auto_class: The class; ``None`` is that which the configuration names.
        trust_remote_code: Whether Python files of the model may run.

    Returns:
        ``None`` where transformers cannot make such a model.
    """
    model = without_data(model_dir, auto_class, trust_remote_code=trust_remote_code)
    if model is None:
        return None
    bare = without_data(model_dir, "AutoModel", trust_remote_code=trust_remote_code)
    heads = _head_of(model, bare)
    state = model.state_dict()
    roles: dict[str, Role] = {
        name: "head" if resident in heads else "model"
        for name, resident in _names_when_loaded(model, names).items()
        if resident in state
    }
    return Layout(type(model).__name__, roles, not heads)


def _head_of(model: Any, bare: Any) -> frozenset[str]:
    """Return what a class has beyond the model within, by the names in the loaded model."""
    prefix = f"{model.base_model_prefix}."
    state = model.state_dict()
    if bare is None:
        inner = {name for name in state if name.startswith(prefix)}
        return frozenset(state) - inner if inner else frozenset()
    within = bare.state_dict()
    return frozenset(n for n in state if n not in within and n.removeprefix(prefix) not in within)


def _names_when_loaded(model: Any, names: Collection[str]) -> dict[str, str]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if not isinstance(each, WeightRenaming)]
    prefix, state = model.base_model_prefix, model.state_dict()
    return {
        name: rename_source_key(name, renamings, converters, prefix, state)[0]
        for name in sorted(names)
    }


def is_buffer(name: str, header: TensorHeader) -> bool:
    """Return whether a tensor is what older versions stored and a model works out by itself."""
    if not header.dtype.is_floating_point or _BUFFER.search(name):
        return True
    return _CAUSAL_MASK.search(name) is not None and len(header.shape) == 4


def ignored_when_loaded(
    model_dir: Path, headers: Mapping[str, TensorHeader], *, trust_remote_code: bool = False
) -> frozenset[str]:
    """Return those tensors that the class of a model knows it does not need.

    Transformers is asked to load them, without data, and names those that it does not expect.
    """
    model = without_data(model_dir, trust_remote_code=trust_remote_code)
    if model is None:
        return frozenset()
    state = {name: torch.empty(h.shape, device="meta") for name, h in headers.items()}
    with quiet():
        _, report = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=state,
            device_map="meta",
            output_loading_info=True,
        )
    return frozenset(headers).difference(report["unexpected_keys"])
