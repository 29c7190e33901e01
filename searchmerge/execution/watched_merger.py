"""A merger of models whose files are watched while it reads them."""

from collections.abc import Callable

from searchmerge.execution.gradient import Merges
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
