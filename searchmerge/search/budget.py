"""How much of its budget a study has used: trials, time over all runs, trials since the best."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import optuna

from searchmerge.interrupts import held_back

_KEEP_S = 5.0  # how often the time so far is kept


@dataclass(frozen=True, slots=True)
class Budget:
    """When a study ends; the first limit that is reached ends it.

    Attributes:
        n_trials: Trials that are finished, failed ones counted unless they are tried again;
            ``None`` for no limit.
        timeout_s: Seconds over all runs of the study; ``None`` for no limit.
        patience: Finished trials since the best one, of those that the sampler proposed; ``None``
            for no limit.
    """

    n_trials: int | None = None
    timeout_s: float | None = None
    patience: int | None = None


class KeepsTime(Protocol):
    """Keeps the seconds that all runs of a study have taken."""

    @property
    def elapsed_s(self) -> float:
        """Seconds that were kept last."""
        ...

    def set_elapsed(self, seconds: float) -> None:
        """Keep the seconds so far."""
        ...


@dataclass(frozen=True)
class KeptTime:
    """Seconds that all runs of a study have taken for something, kept in the study.

    Attributes:
        study: The study.
        attribute: Under which of its user attributes.
    """

    study: optuna.Study
    attribute: str

    @property
    def elapsed_s(self) -> float:
        """Seconds that were kept last."""
        return float(self.study.user_attrs.get(self.attribute, 0.0))

    @held_back()
    def set_elapsed(self, seconds: float) -> None:
        """Keep the seconds so far."""
        self.study.set_user_attr(self.attribute, seconds)


class StudyClock:
    """Counts the seconds of a study over all its runs.

    Args:
        kept: Where earlier runs kept their time, and this one keeps its own.
        now: Returns the present second, on any clock that never goes back.
    """

    def __init__(self, kept: KeepsTime, now: Callable[[], float] = time.monotonic) -> None:
        self._kept = kept
        self._now = now
        self._start = now() - kept.elapsed_s
        self._kept_s = kept.elapsed_s

    @property
    def elapsed_s(self) -> float:
        """Seconds that all runs have taken so far."""
        return self._now() - self._start

    def keep(self) -> None:
        """Keep the time so far."""
        self._kept_s = self.elapsed_s
        self._kept.set_elapsed(self._kept_s)

    def tick(self) -> None:
        """Keep the time so far, unless that was done a moment ago."""
        if self.elapsed_s - self._kept_s > _KEEP_S:
            self.keep()


class Spending:
    """Tells when a budget is used up.

    Args:
        budget: The limits.
        clock: Counts the seconds.
        n_finished: Trials that earlier runs finished.
    """

    def __init__(self, budget: Budget, clock: StudyClock, n_finished: int = 0) -> None:
        self.clock = clock
        self._budget = budget
        self._n_finished = n_finished
        self._n_running = 0
        self._n_since_best = 0

    @property
    def n_finished(self) -> int:
        """How many trials are finished."""
        return self._n_finished

    def begin(self) -> None:
        """Count a trial that begins."""
        self._n_running += 1

    def end(self) -> None:
        """Count a trial that is finished, or has failed."""
        self._n_running -= 1
        self._n_finished += 1

    def scored(self, *, is_best: bool) -> None:
        """Count a trial that the sampler proposed and that has a score, towards the patience."""
        self._n_since_best = 0 if is_best else self._n_since_best + 1

    @property
    def is_over(self) -> bool:
        """Whether no further trial may begin."""
        limits = self._budget
        n_begun = self._n_finished + self._n_running
        return (
            (limits.n_trials is not None and n_begun >= limits.n_trials)
            or (limits.timeout_s is not None and self.clock.elapsed_s >= limits.timeout_s)
            or (limits.patience is not None and self._n_since_best >= limits.patience)
        )
