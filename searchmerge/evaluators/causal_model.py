"""What scoring and generating both ask of a causal language model of transformers."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from searchmerge.evaluators.packing import Tokens

Prefix = list[tuple[Tensor, Tensor]]
"""Keys and values of a prefix, each ``(1, n_heads, n_tokens, head_size)``, by layer."""


def takes(model: nn.Module, argument: str) -> bool:
    """Return whether the model's forward pass has an argument of this name."""
    return argument in _arguments(type(model).forward)


@cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def device_of(model: nn.Module) -> torch.device:
    """Return where the model is."""
    return next(model.parameters()).device


def run_prefix(model: nn.Module, prefix: Tokens) -> Prefix:
    """Return the keys and values of a prefix, for rows that go on from it."""
    from transformers import DynamicCache

    cache = DynamicCache()
    inputs: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if takes(model, "logits_to_keep"):
        inputs["logits_to_keep"] = 1
    model(input_ids=torch.tensor([prefix], device=device_of(model)), **inputs)
    return [(keys, values) for keys, values, *_ in cache]


def cache_of(prefix: Prefix, n_rows: int) -> Any:
    """Return a ``DynamicCache`` that holds a prefix, which may be empty, in every row."""
    from transformers import DynamicCache

    if not prefix:
        return DynamicCache()
    return DynamicCache(
        [
            (keys.expand(n_rows, -1, -1, -1), values.expand(n_rows, -1, -1, -1))
            for keys, values in prefix
        ]
    )


def n_tokens(prefix: Prefix) -> int:
    """Return how many tokens a prefix has."""
    return prefix[0][0].shape[2] if prefix else 0
