"""A merger that is followed by evaluators which hold a copy of the resident model's weights."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from searchmerge.evaluators.evaluator import Follower
from searchmerge.execution.gradient import Merges
from searchmerge.plan import MergePlan


class FollowedMerger:
    """Merges as another merger does, and then lets others follow the resident model.

    Args:
        merger: Writes a plan's weights into the model.
        model: The resident model.
        weights: Its weights by their names in the checkpoint.
        followers: What follows.
    """

    def __init__(
        self,
        merger: Merges,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        followers: Sequence[Follower],
    ) -> None:
        self._merger = merger
        self._model = model
        self._weights = weights
        self._followers = followers

    def apply(self, plan: MergePlan) -> None:
        """Overwrite the model's merged parameters, and the followers'."""
        self._merger.apply(plan)
        for follower in self._followers:
            follower.follow(self._model, self._weights)
