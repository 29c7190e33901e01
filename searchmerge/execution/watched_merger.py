"""A merger of models whose files are watched while it reads them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from searchmerge.execution.gradient import Merges
from searchmerge.execution.worker import MergesWhole
from searchmerge.plan import MergePlan


class WatchedMerger:
    """Merges as another merger does, from files that are the same before and after.

    Args:
        merger: Writes a plan's weights into the model.
        check: Raises an error where a file has changed.
    """

    def __init__(self, merger: Merges, check: Callable[[], None]) -> None:
        self._merger = merger
        self._check = check

    def apply(self, plan: MergePlan) -> None:
        """Overwrite the model's merged parameters.

        Raises:
            CheckpointError: If a file has changed; what was merged is not to be scored.
        """
        self._check()  # a file that was cut short would end this process
        self._merger.apply(plan)
        self._check()


class WatchedWhole:
    """Merges whole models as another does, from files that are the same before and after.

    Args:
        merger: Merges them.
        check: Raises an error where a file has changed.
    """

    def __init__(self, merger: MergesWhole, check: Callable[[], None]) -> None:
        self._merger = merger
        self._check = check

    def merged(self, plan: MergePlan, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the base by name, merged or as it is, one at a time.

        Raises:
            CheckpointError: If a file has changed; what was merged is not to be saved.
        """
        self._check()
        yield from self._merger.merged(plan, dtype)
        self._check()
