"""Activations that are computed again in the backward pass, where they do not fit into memory."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_logger = logging.getLogger(__name__)


@contextmanager
def recomputed_activations(model: nn.Module) -> Iterator[bool]:
    """Have each layer keep its inputs alone, and compute the rest again when it is needed.

    Gradients stay what they are. transformers does so where a layer is in training; a layer that
    would then drop activations at random is left alone.

    Yields:
        Whether the model can do it; else nothing is changed.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and not _drops(module)
    ]
    if not layers or not getattr(model, "supports_gradient_checkpointing", False):
        yield False
        return
    resident: Any = model
    resident.activation_checkpointing_enable()
    try:
        for layer in layers:
            layer.training = True  # of the layer, not of what is in it: dropout stays off
        yield True
    finally:
        for layer in layers:
            layer.training = False
        resident.disable_input_require_grads()
        resident.activation_checkpointing_disable()


def _drops(layer: nn.Module) -> bool:
    """Return whether a layer drops activations itself where it is in training."""
    return any(
        "drop" in name and isinstance(value, int | float) and value > 0
        for name, value in vars(layer).items()
    )
