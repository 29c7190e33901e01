"""Counting what ends abruptly over one plan: workers that die at it, runs that are killed."""

from collections import Counter
from typing import NamedTuple

MAX_CUT_OFF = 3
"""Runs that may end abruptly in a row over a trial or a refinement before it is given up."""
MAX_DEATHS = 10
"""Workers that may die in a row at one plan, however many others die too."""
MAX_SPARED = 10
"""Workers that a plan may lose in a row through no fault of its own, as their node went away."""
_UNLIKELY = 1e-4  # what is less likely than this is no bad luck
_DEATH, _TRIES = 1, 25  # what is expected before a study has shown it: a death in as many tries


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


class LostWorkers:
    """Tells plans that kill their workers from good ones whose workers something else kills.

    A plan that is scored to its end had no part in the deaths before it. How many of those there
    were among all tries says how likely a good plan is to lose so many workers in a row; where
    that is below 1 in 10,000, or ``MAX_DEATHS`` died, it is the plan that kills. Where nothing
    else dies three deaths are enough, and two once 75 tries went well.

    A loss that the plan cannot have caused is no death; after ``MAX_SPARED`` of them in a row it
    is given up too, so that a plan that takes whole nodes down comes to an end.
    """

    def __init__(self) -> None:
        self._died: dict[str, Crashes] = {}
        self._spared: dict[str, Crashes] = {}
        self._n_deaths: Counter[str] = Counter()
        self._n_excused = 0
        self._n_tries = 0

    def begin(self) -> None:
        """Count a try of any plan."""
        self._n_tries += 1

    def end(self, digest: str) -> None:
        """Take note that a plan was scored to its end: what died before died of something else."""
        self._died.pop(digest, None)
        self._spared.pop(digest, None)
        self._n_excused += self._n_deaths.pop(digest, 0)

    def lose(self, digest: str, n_blocks: int, *, blameless: bool) -> int:
        """Count a worker that a plan lost when ``n_blocks`` of it were scored.

        Returns:
            How many it lost so in a row.
        """
        rows = self._spared if blameless else self._died
        rows[digest] = rows.get(digest, Crashes(0, n_blocks)).again(n_blocks)
        self._n_deaths[digest] += not blameless
        return rows[digest].n

    def n_lost(self, digest: str) -> int:
        """Return how many workers a plan lost in a row, whether or not it may have killed them."""
        return max(rows.get(digest, Crashes()).n for rows in (self._died, self._spared))

    def is_hopeless(self, digest: str) -> bool:
        """Return whether a plan is not to be tried again."""
        n = self._died.get(digest, Crashes()).n
        chance = (self._n_excused + _DEATH) / (self._n_tries + _TRIES)
        is_to_blame = n >= MAX_DEATHS or (n > 1 and chance**n <= _UNLIKELY)
        return is_to_blame or self._spared.get(digest, Crashes()).n > MAX_SPARED
