"""From one number to many, over several methods at once, in noise."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from scipy.linalg import solve_triangular
from scipy.spatial.distance import cdist
from scipy.stats import norm

from searchmerge.errors import SpecError
from searchmerge.merging.method import DEPTH_SLOPE, default_plan
from searchmerge.plan import MergePlan, SettingValue
from searchmerge.search.auto_space import EACH
from searchmerge.search.distributions import moved
from searchmerge.search.sampler import SAMPLERS, SamplerSetting
from searchmerge.search.space import SearchSpace
from searchmerge.search.trials import error_of, standing_of

Vector = npt.NDArray[np.float64]

_SCALE = 0.35  # of the logarithm of a coefficient: as much makes some difference
_DENSITY = 0.15
_SHARE = 0.5  # of the logarithm of an expert's coefficient over their geometric mean
_SLOPE = 0.6
_FLOOR = 0.06  # how far below the best values are told apart, in the unit of values
_ERROR = 0.01  # of a value whose error is not known, in that unit
_LEAST_ERROR = 0.002  # in that unit
_COARSE_FIRST = 6  # trials of a method before it gets a coefficient for each expert
_FINE_TRIED = 6  # trials after which finer ones have to have paid
_N_AROUND = 48  # candidates of each kind that are weighed up
_MOST = 240  # trials of a method that its process is made of; its cost grows with their cube
_AMPLITUDES = (0.01, 0.02, 0.04)
_LENGTHS = (0.8, 1.5, 3.0)


@dataclass(frozen=True, slots=True)
class Point:
    """A trial as its method's process sees it.

    Attributes:
        x: Where it is: log scale, density, each expert's log share, slope, in units that matter.
        value: The objective; ``None`` while it is not known.
        error: Standard error of the value; 0 where that is not known.
    """

    x: Vector
    value: float | None
    error: float


def _is_fine(x: Vector) -> bool:
    """Return whether experts have different coefficients at a place, or depth counts."""
    return bool(np.abs(x[2:]).max() > 1e-9)


@dataclass(frozen=True)
class Process:
    r"""A Gaussian process with known errors, over the points of one method.

    Its kernel is Matérn's with :math:`\nu = 5/2`; the mean is what the points say, drawn to
    nothing else.

    Attributes:
        x: ``(n, d)``.
        values: ``(n,)``.
        errors: ``(n,)``, standard errors.
        amplitude: Standard deviation of the function, in units of the objective.
        length: How far it stays alike, in units of ``x``.
    """

    x: Vector
    values: Vector
    errors: Vector
    amplitude: float
    length: float

    def _kernel(self, a: Vector, b: Vector) -> Vector:
        distance = cdist(a, b) * (math.sqrt(5) / self.length)
        shape: Vector = (1 + distance + distance**2 / 3) * np.exp(-distance)
        return self.amplitude**2 * shape

    def _solved(self) -> tuple[Vector, Vector, float]:
        """Return the Cholesky factor, the solved residuals, and the mean."""
        covariance = self._kernel(self.x, self.x) + np.diag(self.errors**2)
        factor: Vector = np.linalg.cholesky(covariance).astype(np.float64)
        ones = solve_triangular(factor, np.ones(len(self.x)), lower=True)
        white = solve_triangular(factor, self.values, lower=True)
        mean = float(ones @ white / (ones @ ones))
        return factor, white - mean * ones, mean

    def log_likelihood(self) -> float:
        """Return the logarithm of the density of the values."""
        factor, white, _ = self._solved()
        return float(-0.5 * white @ white - np.log(np.diag(factor)).sum())

    def predict(self, x: Vector) -> tuple[Vector, Vector]:
        """Return the mean and the standard deviation at ``(m, d)`` places."""
        factor, white, mean = self._solved()
        across = solve_triangular(factor, self._kernel(self.x, x), lower=True)
        variance = self.amplitude**2 - (across**2).sum(0)
        return mean + across.T @ white, np.sqrt(np.maximum(variance, 1e-12))


class StagedSampler(BaseSampler):
    """Weighs up all methods of an automatic space, and what may be better than the best known.

    Every method that has a trial is a Gaussian process of its own, over its scale, its density,
    and the experts' shares; errors of values are known. Proposed is the place with the largest
    expected improvement over the best mean, of any method. Shares and slope enter for the two
    best methods, once their scale has been tried; where they have not paid, for every fourth
    trial. All is computed anew from the study's trials, and drawn by the trial's number.

    Args:
        space: From :func:`auto_space`.
        seed: Of the candidates that are weighed up.
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self._space = space
        self._seed = seed
        self._methods = [name for name in space.alternatives if not name.endswith(EACH)]
        self._told: dict[int, tuple[str, Point]] = {}  # trials that have their value, by number
        self._published = {m: default_plan(m, space.experts) for m in self._methods}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return every parameter of every alternative."""
        names = list(self._space.alternatives)
        space: dict[str, BaseDistribution] = {"method": CategoricalDistribution(names)}
        for name in names:
            space |= self._space.distributions(name)
        return space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the parameters of the alternative that is proposed."""
        points = self._points(study)
        generator = np.random.default_rng([self._seed, trial.number])
        untried = [method for method in self._methods if method not in points]
        if len(untried) == len(self._methods):
            return self._params(untried[0], self._place(self._published[untried[0]]))
        return self._params(*self._proposed(points, trial.number, generator))

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return the middle: what is asked for so belongs to an alternative that is none here."""
        if isinstance(param_distribution, FloatDistribution):
            return (param_distribution.low + param_distribution.high) / 2
        return param_distribution.to_external_repr(0)

    def _points(self, study: optuna.Study) -> dict[str, list[Point]]:
        """Return the trials that have a value, or may get one, by method."""
        points: dict[str, list[Point]] = {}
        states = (TrialState.COMPLETE, TrialState.RUNNING)
        for trial in study.get_trials(deepcopy=False, states=states):
            placed = self._told.get(trial.number) or self._placed(trial)
            if placed is None:
                continue
            method, point = placed
            points.setdefault(method, []).append(point)
            if point.value is not None:
                self._told[trial.number] = placed
        return _in_units(
            {
                method: _most_telling(its)
                for method, its in points.items()
                if any(p.value is not None for p in its)
            }
        )

    def _placed(self, trial: FrozenTrial) -> tuple[str, Point] | None:
        """Return a trial's method and its point; ``None`` while it has no plan."""
        plan = self._plan(trial.params)
        if plan is None:
            return None
        value, error = None, 0.0
        if trial.state == TrialState.COMPLETE:
            standing = standing_of(trial)
            value, error = standing.kept + standing.value, error_of(trial) or 0.0
        return plan.method, Point(self._place(plan), value, error)

    def _plan(self, params: Mapping[str, SettingValue]) -> MergePlan | None:
        """Return the plan of a trial's parameters; ``None`` while some are not drawn."""
        name = params.get("method")
        if name not in self._space.alternatives:
            return None
        if not self._space.distributions(str(name)).keys() <= params.keys():
            return None
        return self._space.plan(params)

    def _place(self, plan: MergePlan) -> Vector:
        """Return where a plan is; the published one of its method has no scale and no shares."""
        published = self._published[plan.method]
        logs = np.log(np.maximum(plan.values["coefficient"][0], 1e-3))
        scale = logs.mean() - math.log(published.values["coefficient"][0][0])
        density = 0.0
        if "density" in plan.values:
            density = plan.values["density"][0][0] - published.values["density"][0][0]
        slope = float(plan.settings.get(DEPTH_SLOPE.name, DEPTH_SLOPE.default))
        shares = (logs - logs.mean()) / _SHARE
        return np.array([scale / _SCALE, density / _DENSITY, *shares, slope / _SLOPE])

    def _params(self, method: str, x: Vector) -> dict[str, SettingValue]:
        """Return the parameters of a place, moved into the space."""
        published = self._published[method]
        coefficient = published.values["coefficient"][0][0] * math.exp(_SCALE * x[0])
        name = f"{method}{EACH}" if _is_fine(x) else method
        prefix = f"{name}."
        params: dict[str, SettingValue] = {}
        for key in self._space.distributions(name):
            inner = key.removeprefix(prefix)
            if inner == "density":
                params[key] = published.values["density"][0][0] + _DENSITY * float(x[1])
            elif inner == DEPTH_SLOPE.name:
                params[key] = _SLOPE * float(x[-1])
            elif inner == "coefficient":
                params[key] = coefficient
            else:
                expert = self._space.experts.index(inner.removeprefix("coefficient."))
                params[key] = coefficient * math.exp(_SHARE * float(x[2 + expert]))
        inside = {k: moved(d, params[k]) for k, d in self._space.distributions(name).items()}
        return {"method": name, **inside}

    def _proposed(
        self, points: Mapping[str, list[Point]], number: int, generator: np.random.Generator
    ) -> tuple[str, Vector]:
        """Return the method and the place with the largest expected improvement."""
        processes = _processes(points)
        means = {m: float(p.predict(p.x)[0].max()) for m, p in processes.items()}
        best = max(means.values())
        strongest = sorted(means, key=lambda method: -means[method])[:2]
        proposed: tuple[float, str, Vector] | None = None
        for method, process in processes.items():
            centre = process.x[int(process.predict(process.x)[0].argmax())]
            fine = method in strongest and _fine_pays(process, number)
            candidates = self._around(method, centre, generator, fine=fine)
            mean, deviation = process.predict(candidates)
            gain = (mean - best) / deviation
            improvement = deviation * (gain * norm.cdf(gain) + norm.pdf(gain))
            at = int(improvement.argmax())
            if proposed is None or improvement[at] > proposed[0]:
                proposed = (float(improvement[at]), method, candidates[at])
        if proposed is None:
            raise SpecError("space: no method of it has been scored")
        return proposed[1], proposed[2]

    def _around(
        self, method: str, centre: Vector, generator: np.random.Generator, *, fine: bool
    ) -> Vector:
        """Return candidates: coarse ones all over and near the best, and fine ones near it."""
        has_density = "density" in self._published[method].values
        wide = generator.normal(0.0, 1.3, (_N_AROUND, len(centre)))
        near = centre + generator.normal(0.0, 0.4, (_N_AROUND, len(centre)))
        for coarse in (wide, near):
            coarse[:, 2:] = 0.0
        kinds = [wide, near]
        if fine:
            shifts = generator.normal(0.0, 0.5, (2 * _N_AROUND, len(centre)))
            shifts *= generator.random(shifts.shape) < 0.6  # a few at a time
            shifts[:, 2:-1] -= shifts[:, 2:-1].mean(1, keepdims=True)
            kinds.append(centre + shifts)
        candidates = np.concatenate(kinds)
        candidates[:, 1] *= has_density
        inside = [
            self._place(self._space.plan(self._params(method, x)))  # moved into the space
            for x in candidates
        ]
        return np.array(inside)


def _most_telling(points: Sequence[Point]) -> list[Point]:
    """Return a method's points in order; of many, the best, the latest and those that run."""
    values = [(p.value, i) for i, p in enumerate(points) if p.value is not None]
    if len(values) <= _MOST:
        return list(points)
    best = {i for _, i in sorted(values)[-_MOST // 2 :]}
    latest = [i for _, i in values if i not in best][-_MOST // 2 :]
    kept = best.union(latest)
    return [p for i, p in enumerate(points) if i in kept or p.value is None]


def _in_units(points: Mapping[str, list[Point]]) -> dict[str, list[Point]]:
    """Return points whose best value is 1 at most, so that scores in per cent are searched alike.

    Values of which the best is smaller stay what they are.
    """
    values = [p.value for its in points.values() for p in its if p.value is not None]
    unit = max(1.0, abs(max(values, default=1.0)))
    return {
        method: [
            replace(
                p,
                value=None if p.value is None else p.value / unit,
                error=max(p.error / unit or _ERROR, _LEAST_ERROR),
            )
            for p in its
        ]
        for method, its in points.items()
    }


def _fine_pays(process: Process, number: int) -> bool:
    """Return whether a method's trials may have a coefficient for each expert."""
    fine = np.array([_is_fine(x) for x in process.x])
    if (~fine).sum() < _COARSE_FIRST:
        return False
    if fine.sum() < _FINE_TRIED or number % 4 == 0:
        return True
    mean, deviation = process.predict(process.x)
    lead = mean[fine].max() - mean[~fine].max()
    return bool(lead > 0.5 * deviation[fine].min())


def _processes(points: Mapping[str, list[Point]]) -> dict[str, Process]:
    """Return each method's process, all with the amplitude and length that values speak for."""
    values = [p.value for its in points.values() for p in its if p.value is not None]
    floor = max(values) - _FLOOR
    told: dict[str, list[Point]] = {m: [p for p in i if p.value is not None] for m, i in
                                    points.items()}  # fmt: skip

    def made(amplitude: float, length: float) -> dict[str, Process]:
        return {
            method: Process(
                np.array([p.x for p in its]),
                np.array([max(floor, p.value or 0.0) for p in its]),
                np.array([p.error for p in its]),
                amplitude,
                length,
            )
            for method, its in told.items()
        }

    chosen = max(
        (made(amplitude, length) for amplitude in _AMPLITUDES for length in _LENGTHS),
        key=lambda processes: sum(p.log_likelihood() for p in processes.values()),
    )
    return {method: _with_pending(p, points[method]) for method, p in chosen.items()}


def _with_pending(process: Process, points: Sequence[Point]) -> Process:
    """Return the process as if trials that still run had been worth what is expected of them."""
    pending = np.array([point.x for point in points if point.value is None])
    if not len(pending):
        return process
    mean, _ = process.predict(pending)
    return Process(
        np.concatenate([process.x, pending]),
        np.concatenate([process.values, mean]),
        np.concatenate([process.errors, np.full(len(pending), _ERROR)]),
        process.amplitude,
        process.length,
    )


@SAMPLERS.register("staged")
def staged(setting: SamplerSetting) -> BaseSampler:
    """Search ``space: auto``: one number of every method first, more where they pay.

    Raises:
        SpecError: If the space is another, or there are several objectives.
    """
    if not setting.space.is_auto:
        raise SpecError(
            "search.sampler: staged searches `space: auto` alone; use auto for other spaces"
        )
    if setting.n_objectives > 1:
        raise SpecError("search.sampler: staged takes one objective; use tpe for several")
    return StagedSampler(setting.space, setting.seed)
