"""CMA-ES that learns from every finished trial, in whatever order the trials finish."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import cmaes
import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial

from searchmerge.errors import SpecError
from searchmerge.search.sampler import SAMPLERS, SamplerSetting
from searchmerge.search.trials import FINISHED, by_completion, standing_of

_SEED_STRIDE = 1_000_003
_INC_POPSIZE = 2  # IPOP: each restart doubles the population
_STAGNATION = 30  # generations without a better value, plus a term in d and the population size

Vector = npt.NDArray[np.float64]
Loss = tuple[float, float]
"""By how much a trial violates the constraints, and its negative value: smaller is better."""


class AsyncCmaSampler(BaseSampler):
    r"""CMA-ES (Hansen, 2016, arXiv:1604.00772) for workers that never wait for one another.

    The distribution of d parameters is updated with every λ = 4 + int(3 ln d) trials that finish,
    whichever generation they were asked in: equations 41 to 47 hold for points from elsewhere, as
    injected solutions. So no result is left out, enqueued trials count like the sampler's own,
    and a worker is never idle. A failed trial counts as the worst of its λ.

    There is no state but the study: the distribution is made anew from its finished trials, in
    the order in which they finished, and trial n draws from a generator of (seed, n). A resumed
    study goes on exactly as it would have.

    When the search stagnates it begins again with twice the population (IPOP; Auger and Hansen,
    2005) from a mean drawn uniformly. Parameters with steps are searched as real numbers and
    rounded at random to one of the two nearest steps, nearer ones more often, so that a
    distribution narrower than a step still tries both.

    Args:
        distributions: The parameters, all of them floats or integers.
        seed: Of the random numbers, 0 or more.
        start: Parameter name to the first mean, e.g. a published setting; the middle of the
            range where it says nothing. Values outside a range are moved to its end.
        sigma: First standard deviation, as a fraction of each range, in (0, 1].

    Raises:
        SpecError: If there are fewer than two parameters, or one is no number.
    """

    def __init__(
        self,
        distributions: Mapping[str, BaseDistribution],
        *,
        seed: int,
        start: Mapping[str, float] | None = None,
        sigma: float = 1 / 5,
    ) -> None:
        self._axes = {name: _Axis(name, d) for name, d in sorted(distributions.items())}
        if len(self._axes) < 2:  # what the update is defined for
            raise SpecError(
                f"search.sampler: cma_es needs 2 parameters or more, and the space has "
                f"{len(self._axes)}; use gp or tpe"
            )
        self._distributions = dict(distributions)
        self._seed = seed
        self._sigma = sigma
        self._start = np.array(
            [
                axis.unit(start[name]) if start and name in start else 0.5
                for name, axis in self._axes.items()
            ]
        )
        self._others = RandomSampler(seed)
        self._told: set[int] = set()
        self._n_restarts = 0
        self._descent = self._begin(self._start)

    @property
    def n_told(self) -> int:
        """How many finished trials the distribution has been told, or holds for its update."""
        return len(self._told)

    @property
    def n_restarts(self) -> int:
        """How often the search began again."""
        return self._n_restarts

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return all parameters: they are known from the start."""
        return self._distributions

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the parameters of ``trial``."""
        self._catch_up(study)
        self._descent.cma.reseed_rng((self._seed * _SEED_STRIDE + trial.number) % 2**32)
        generator = np.random.default_rng((self._seed, trial.number))
        return {
            name: axis.value(float(unit), float(generator.random()))
            for (name, axis), unit in zip(self._axes.items(), self._descent.cma.ask(), strict=True)
        }

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return a random value of a parameter that is not in the space."""
        return self._others.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """Do nothing: every trial has its own generator."""

    def _catch_up(self, study: optuna.Study) -> None:
        """Tell the trials that have finished since the last one was asked."""
        finished = [
            trial
            for trial in study.get_trials(deepcopy=False, states=FINISHED)
            if trial.number not in self._told and self._axes.keys() <= trial.params.keys()
        ]
        for trial in by_completion(finished):
            self._told.add(trial.number)
            units = [axis.unit(trial.params[name]) for name, axis in self._axes.items()]
            if self._descent.tell(np.array(units), _loss(trial)):
                self._n_restarts += 1
                generator = np.random.default_rng((self._seed, self._n_restarts))
                self._descent = self._begin(generator.random(len(self._axes)))

    def _begin(self, mean: Vector) -> "_Descent":
        first_popsize = 4 + int(3 * math.log(len(self._axes)))  # Hansen, 2016, table 1
        return _Descent(
            cmaes.CMA(
                mean=mean,
                sigma=self._sigma,
                bounds=np.array([[0.0, 1.0]] * len(self._axes)),
                seed=self._seed,
                population_size=first_popsize * _INC_POPSIZE**self._n_restarts,
            )
        )


@dataclass(slots=True)
class _Descent:
    """One search from one mean, until it stagnates.

    Attributes:
        cma: The distribution.
        waiting: Trials that finished since the last update.
        best: The best loss of this search.
        n_stale: Updates since it was found.
    """

    cma: cmaes.CMA
    waiting: list[tuple[Vector, Loss]] = field(default_factory=list)
    best: Loss = (math.inf, math.inf)
    n_stale: int = 0

    def tell(self, x: Vector, loss: Loss) -> bool:
        """Take one trial in, move the distribution with every λ; return whether to restart."""
        self.waiting.append((x, loss))
        if len(self.waiting) < self.cma.population_size:
            return False
        ranked = sorted(self.waiting, key=lambda waiting: waiting[1])
        self.waiting = []
        self.cma.tell([(x, float(rank)) for rank, (x, _) in enumerate(ranked)])
        best = ranked[0][1]
        self.n_stale = 0 if best < self.best else self.n_stale + 1
        self.best = min(best, self.best)
        patience = _STAGNATION + 30 * self.cma.dim / self.cma.population_size
        return self.n_stale > patience or bool(self.cma.should_stop())


class _Axis:
    """One parameter, between its own range and [0, 1].

    Raises:
        SpecError: If it is no number.
    """

    def __init__(self, name: str, distribution: BaseDistribution) -> None:
        if not isinstance(distribution, FloatDistribution | IntDistribution):
            raise SpecError(
                f"search.sampler: cma_es searches numbers, and {name!r} is a choice; "
                "use tpe, or fix it"
            )
        self._log = distribution.log
        self._low, self._high = self._forward(distribution.low), self._forward(distribution.high)
        self._step = None if self._log else distribution.step
        self._distribution = distribution

    def _forward(self, value: float) -> float:
        return math.log(value) if self._log else float(value)

    def unit(self, value: float) -> float:
        """Return where in [0, 1] a value is; one outside the range is moved to its end."""
        if self._high == self._low:
            return 0.5
        if self._log and value <= 0:
            return 0.0
        where = (self._forward(value) - self._low) / (self._high - self._low)
        return min(1.0, max(0.0, where))

    def value(self, unit: float, draw: float) -> float | int:
        """Return the value at ``unit``; ``draw``, in [0, 1), decides between two steps."""
        value = self._low + min(1.0, max(0.0, unit)) * (self._high - self._low)
        if self._log:
            value = math.exp(value)
        elif self._step is not None:
            n_steps = math.floor((value - self._low) / self._step + draw)
            value = min(self._high, self._low + n_steps * self._step)
        bounded = min(float(self._distribution.high), max(float(self._distribution.low), value))
        return round(bounded) if isinstance(self._distribution, IntDistribution) else bounded


def _loss(trial: FrozenTrial) -> Loss:
    """Return what trials are ordered by; a failed one comes last."""
    standing = standing_of(trial)
    return (-standing.kept, -standing.value)


@SAMPLERS.register("cma_es")
def cma_es(setting: SamplerSetting) -> BaseSampler:
    """Search the numbers of one method, from its published setting on."""
    if setting.n_objectives > 1:
        raise SpecError("search.sampler: cma_es takes one objective; use nsga2, tpe or gp")
    if not setting.space.is_flat:
        raise SpecError(
            "search.sampler: cma_es searches numbers of one method, and this space holds choices; "
            "use tpe"
        )
    return AsyncCmaSampler(
        setting.space.distributions(), seed=setting.seed, start=setting.space.start()
    )
