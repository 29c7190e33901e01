"""Two samplers, one after the other."""

from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from searchmerge.search.samplers.delegating import DelegatingSampler


class RelaySampler(DelegatingSampler):
    """One sampler for the first trials, another for all later ones, which has learnt from them.

    Args:
        first: Proposes trials 0 to ``n_first - 1``.
        second: Proposes the others.
        n_first: How many trials are the first one's.
    """

    def __init__(self, first: BaseSampler, second: BaseSampler, n_first: int) -> None:
        self._first, self._second, self._n_first = first, second, n_first

    def sampler_of(self, trial: FrozenTrial) -> BaseSampler:
        """Return the first sampler for the first trials, then the second."""
        return self._first if trial.number < self._n_first else self._second

    def reseed_rng(self) -> None:
        """Reseed both."""
        for sampler in (self._first, self._second):
            sampler.reseed_rng()
