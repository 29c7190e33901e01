"""What scoring and generating both ask of a causal language model of transformers."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from searchmerge.evaluators.causal.documents import Tokens

MODEL_CLASS = "AutoModelForCausalLM"
"""What transformers loads such a model as."""

BATCH_TOKENS = {"cpu": 512, "cuda": 16384}
"""Tokens of one forward pass, by kind of device.

A CPU gains no more by larger passes. On an H100 the kernels of a pass of a 1B model (16 layers)
take 20 ms to launch and 7 µs a token to run: passes are several times as long as their launches.
"""


@dataclass(frozen=True)
class Prefix:
    """Tokens that stand before several rows, which a model has run once.

    Attributes:
        n_tokens: How many they are; 0 for none.
        cache: The model's ``DynamicCache`` of them, one row; ``None`` for none.
    """

    n_tokens: int = 0
    cache: Any = None

    def rows(self, n_rows: int) -> Any:
        """Return a ``DynamicCache`` that holds the prefix in every row, for one forward pass.

        Keys and values are not copied: a pass puts longer ones in their place.
        """
        from transformers import DynamicCache

        if self.cache is None:
            return DynamicCache()
        cache = copy(self.cache)
        cache.layers = [copy(layer) for layer in cache.layers]
        for layer in cache.layers:
            if layer.keys is not None:  # a layer may use those of another
                layer.keys = layer.keys.expand(n_rows, -1, -1, -1)
                layer.values = layer.values.expand(n_rows, -1, -1, -1)
        return cache


def takes(model: nn.Module, argument: str) -> bool:
    """Return whether the model's forward pass has an argument of this name."""
    return argument in _arguments(type(model).forward)


@cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def encodes(model: Any) -> bool:
    """Return whether a model reads a prompt with an encoder, and continues it with a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def device_of(model: nn.Module) -> torch.device:
    """Return where a model takes its inputs: where its first parameter, the embedding, lies.

    A model that is spread over several devices moves what goes from one to the next itself; its
    logits come out on the device of its head.
    """
    return next(model.parameters()).device


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return what a model computes in: the dtype of its first parameter of floats."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; from a CPU to a GPU it is on its way, and nothing waits."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def head_of(
    model: nn.Module, shape: tuple[int, int], rows: Tensor
) -> Iterator[Callable[[], bool]]:
    """Have the head of a model compute the logits of some rows only, in the next forward pass.

    All logits of a batch are the largest tensor that a pass makes, and few of them are read.

    Args:
        model: A model of transformers.
        shape: Rows and tokens of what its head is given.
        rows: Which of these are wanted, row after row, ``(n,)``.

    Yields:
        What tells after the pass whether it was so: the logits are then ``(1, n, vocabulary)``.
        They are not where the model's head is given something else.
    """
    used: list[bool] = []

    def choose(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = arguments[0] if arguments else None
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[:2] != shape:
            return None
        used.append(True)
        return hidden.flatten(0, 1)[sent(rows, hidden.device)][None], *arguments[1:]

    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    head: nn.Module | None = find()
    handle = None if head is None else head.register_forward_pre_hook(choose)
    try:
        yield lambda: bool(used)
    finally:
        if handle is not None:
            handle.remove()


def run_prefix(model: nn.Module, prefix: Tokens) -> Prefix:
    """Run tokens, which may be none, for rows that go on from them."""
    from transformers import DynamicCache

    if not prefix:
        return Prefix()
    cache = DynamicCache()
    inputs: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if takes(model, "logits_to_keep"):
        inputs["logits_to_keep"] = 1
    model(input_ids=sent(torch.tensor([prefix]), device_of(model)), **inputs)
    return Prefix(len(prefix), cache)
