"""A merger that an engine follows, which holds a copy of the resident model's weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from searchmerge.evaluators.lm_harness.vllm import VllmBackend
from searchmerge.plan import MergePlan


class FollowedMerger:
    """Merges as another merger does, and then lets an engine follow the resident model.

    Args:
        merger: Writes a plan's weights into the model.
        model: The resident model.
        weights: Its weights by their names in the checkpoint.
        backend: What follows.
    """

    def __init__(
        self, merger: Any, model: nn.Module, weights: Mapping[str, Tensor], backend: VllmBackend
    ) -> None:
        self._merger = merger
        self._model = model
        self._weights = weights
        self._backend = backend

    def apply(self, plan: MergePlan) -> None:
        """Overwrite the model's merged parameters, and the engine's."""
        self._merger.apply(plan)
        self._backend.follow(self._model, self._weights)
