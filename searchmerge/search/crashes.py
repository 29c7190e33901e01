"""Counting what ends abruptly over one plan: workers that die at it, runs that are killed."""

from typing import NamedTuple


class Crashes(NamedTuple):
    """How often in a row something ended abruptly over a plan without one block more scored.

    Attributes:
        n: How often.
        n_blocks: Blocks of the plan that were scored at the last time.
    """

    n: int = 0
    n_blocks: int = 0

    def again(self, n_blocks: int) -> "Crashes":
        """Return the count after one more, when ``n_blocks`` of the plan are scored."""
        went_on = n_blocks != self.n_blocks
        return Crashes(1 if went_on else self.n + 1, n_blocks)
