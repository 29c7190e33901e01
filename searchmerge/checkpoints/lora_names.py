"""How PEFT names the tensors of an adapter: by the base's modules, and what they are of these."""

import re
from collections.abc import Container, Iterable

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?$")
_PARTS = {
    "magnitude": re.compile(r"^(?P<module>.+)\.lora_magnitude_vector(\.weight)?$"),
    "addend": re.compile(r"^(?P<module>.+)\.lora_B\.bias$"),
    "rows": re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta$"),
}
"""What an adapter may hold of a module beside its two factors."""
_WRAPPERS = re.compile(r"\.((token_adapter\.)?base_layer|modules_to_save)\.")
"""Parts of names that PEFT puts around the base's modules and what takes their place."""
_UNUSED = ".original_module."
"""Part of the names of what ``modules_to_save`` stands in for, saved where tokens were added."""
_NAMED = re.compile(r"\.modules_to_save\.[^.]+\.")
"""What PEFT puts around the biases of such modules, where it saves all biases once more."""


def plain_name(key: str) -> str:
    """Return the name of a tensor as it is without PEFT's layers around the model's."""
    return _WRAPPERS.sub(".", key.removeprefix(_PREFIX))


def part_of_module(key: str) -> tuple[str, str] | None:
    """Return the module that a tensor of an adapter belongs to, and what it is of it.

    That is ``A`` or ``B`` of its factors, ``magnitude``, ``addend`` or ``rows``.
    """
    name = plain_name(key)
    if match := _FACTOR.match(name):
        return match["module"], match["side"]
    for part, pattern in _PARTS.items():
        if match := pattern.match(name):
            return match["module"], part
    return None


def factor_of(key: str) -> str | None:
    """Return the module that a tensor is a factor of; ``None`` if it is none."""
    match = _FACTOR.match(plain_name(key))
    return match["module"] if match else None


def is_inside(key: str, modules: Iterable[str]) -> bool:
    """Return whether PEFT keeps a tensor within its layer around one of some modules."""
    inside = tuple(f"{name}.{part}" for name in modules for part in ("lora_", "base_layer."))
    return key.removeprefix(_PREFIX).startswith(inside)


def is_saved_twice(key: str, keys: Container[str]) -> bool:
    """Return whether a tensor is the base's, or stored under the model's name for it too."""
    plain = _NAMED.sub(".", key)
    return _UNUSED in key or (plain != key and plain in keys)
