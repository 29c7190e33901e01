"""Scoring a candidate as it will be deployed: its linear layers' weights rounded to int8."""

import logging
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from searchmerge.errors import SpecError
from searchmerge.execution.gradient import Merges
from searchmerge.plan import MergePlan

_logger = logging.getLogger(__name__)

_LEVELS = 127
"""Largest magnitude of a symmetric int8 weight."""


class Int8Merger:
    r"""Merges as another merger does, then rounds the resident model's linear layers to int8.

    Every output channel has one scale, :math:`s = \max_j |w_j| / 127`, and its weights become
    :math:`s \cdot \mathrm{round}(w_j / s)` in the model's own dtype, ties to even: int8
    weight-only quantisation without calibration, as it is after dequantisation. Embeddings, the
    output embedding, norms, biases and private heads stay as they are, and so do weights that
    are no layer's own, such as the joined experts of a mixture. What is saved is not rounded.

    Args:
        merger: Writes a plan's weights into the model.
        model: The resident model.
        merged: The tensors that the merger writes to, each time anew; other linear weights are
            rounded here, once.

    Raises:
        SpecError: If the model has no linear layer.
    """

    def __init__(self, merger: Merges, model: nn.Module, merged: Collection[Tensor]) -> None:
        self._merger = merger
        weights = list(linear_weights(model))
        if not weights:
            raise SpecError(f"scoring: int8 rounds linear layers; {type(model).__name__} has none")
        written = {tensor.untyped_storage().data_ptr() for tensor in merged}
        self._weights = []
        for weight in weights:
            if weight.untyped_storage().data_ptr() in written:
                self._weights.append(weight)
            else:
                round_to_int8(weight)
        _logger.info("scoring with %d linear layers in int8", len(weights))

    def apply(self, plan: MergePlan) -> None:
        """Overwrite the model's merged parameters, rounded where they are linear weights."""
        self._merger.apply(plan)
        for weight in self._weights:
            round_to_int8(weight)


def linear_weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield the weight of each linear layer, ``(n_outputs, n_inputs)``, shared ones once.

    The output embedding is left out: it is often the input embedding too.
    """
    from transformers.pytorch_utils import Conv1D

    find = getattr(model, "get_output_embeddings", None)
    output = find() if find is not None else None
    seen = set() if output is None else {output.weight.data_ptr()}
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module.weight.data_ptr() not in seen:
            seen.add(module.weight.data_ptr())
            weight = module.weight.detach()
            yield (
                weight if isinstance(module, nn.Linear) else weight.T
            )  # Conv1D: (inputs, outputs)


@torch.no_grad()
def round_to_int8(weight: Tensor) -> None:
    """Round a weight in place to what int8 can hold with one scale per row.

    Args:
        weight: ``(n_outputs, n_inputs)``, any float dtype; a row of zeros stays one, and a row
            that holds NaN or inf becomes NaN, so that the candidate fails.
    """
    for rows in torch.split(weight, max(1, (1 << 22) // max(1, weight.shape[1]))):
        wide = rows.float()
        scale = wide.abs().amax(1, keepdim=True) / _LEVELS
        scale = torch.where(scale == 0, 1.0, scale)
        rows.copy_(wide.div_(scale).round_().mul_(scale))
