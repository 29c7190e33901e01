"""Which layers an adapter is put on: PEFT leaves out what its file holds of others."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from searchmerge.checkpoints.embeddings import is_vocabulary
from searchmerge.checkpoints.files import Kind, is_pattern

_ALL_LINEAR = "all-linear"
_EMBEDDINGS = ("embed_tokens", "lm_head")
"""What PEFT calls embeddings, where it keeps them tied."""


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) and is_pattern(value)


def _are_patterns(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_pattern, value))


def _are_names(value: Any) -> bool:
    names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return names or _is_pattern(value)


def _is_index(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_indices(value: Any) -> bool:
    return _is_index(value) or (isinstance(value, list) and all(map(_is_index, value)))


_NAMES = Kind("a list of names, or a regular expression", _are_names)
NAMES = Kind(
    "a list of names", lambda v: isinstance(v, list) and all(isinstance(n, str) for n in v)
)
TARGET_KEYS = {
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "modules_to_save": Kind("a list of names", _are_patterns),
    "layers_to_transform": Kind("a whole number from 0, or a list of them", _are_indices),
    "layers_pattern": Kind(
        "a regular expression, or a list of them", lambda v: _is_pattern(v) or _are_patterns(v)
    ),
}
"""What the keys of ``adapter_config.json`` hold that select layers."""


def selects(config: Mapping[str, Any], module: str) -> bool:
    """Return whether an adapter is put on a layer, as PEFT decides it on loading.

    Args:
        config: What ``adapter_config.json`` says.
        module: The layer's name in the model that the adapter was trained on.
    """
    excluded, targets = config.get("exclude_modules"), config.get("target_modules") or []
    if _follows_embeddings(config, targets, module):
        return True
    if excluded and _names(excluded, module):
        return False
    whole = config.get("modules_to_save") or ()
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in whole):
        return False
    if isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
        return not is_vocabulary(f"{module}.weight")
    if isinstance(targets, str) or module in targets or not _names(targets, module):
        return _names(targets, module)
    return _is_of_layers(config, module)


def _follows_embeddings(
    config: Mapping[str, Any], targets: str | Iterable[str], module: str
) -> bool:
    """Return whether a layer has the factors of the embedding that it is tied to."""
    if not config.get("ensure_weight_tying") or not is_vocabulary(f"{module}.weight"):
        return False
    if isinstance(targets, str):
        return any(re.fullmatch(targets, name) for name in _EMBEDDINGS)
    return any(name.split(".")[-1] in _EMBEDDINGS for name in targets)


def _names(names: str | Iterable[str], module: str) -> bool:
    """Return whether a regular expression matches a whole name, or one of a list ends it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_of_layers(config: Mapping[str, Any], module: str) -> bool:
    """Return whether a module is in one of the layers that are chosen by number."""
    indices, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or ()
    if indices is None or indices == []:
        return True
    expressions = [
        rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\."
        for pattern in ([patterns] if isinstance(patterns, str) else patterns)
    ] or [r".*?\.[^.]*\.(?P<index>\d+)\."]
    matches = (re.match(expression, module) for expression in expressions)
    match = next((match for match in matches if match), None)
    chosen = [indices] if isinstance(indices, int) else indices
    return match is not None and int(match["index"]) in chosen
