"""DARE: drop entries at random, and rescale the rest."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple

from torch import Tensor

from searchmerge.merging.election import Majority, merge_elected, positive_bound
from searchmerge.merging.kernels import Chunk, Numbers, Row, unpack, weighted_sum
from searchmerge.merging.method import (
    COEFFICIENT,
    DENSITY,
    DEPTH_SLOPE,
    METHODS,
    SEED,
    Hyperparameter,
    Pass,
    Published,
    Scope,
    Setting,
    by_group,
    setting,
)
from searchmerge.merging.randomness import N_DRAWS, keep_drawn, random_keys
from searchmerge.plan import MergePlan

if TYPE_CHECKING:
    from searchmerge.merging.measure import Measure

ELECTION = Setting("election", default="none", choices=("none", "ties"))
RESCALE = Setting("rescale", default=True, choices=(True, False))


class DareScalars(NamedTuple, Generic[Row]):
    """What the arithmetic reads of each expert where all that is left is added up.

    Attributes:
        limits: Entries are kept whose draw is below this.
        coefficients: The factor on what is left, rescaling included.
    """

    limits: Row
    coefficients: Row


class DareElectionScalars(NamedTuple, Generic[Row]):
    """What the arithmetic reads of each expert where signs are elected.

    Attributes:
        limits: Entries are kept whose draw is below this.
        scales: The factor on what is left, before the election.
        coefficients: The factor after it.
        majority: See :class:`~searchmerge.merging.election.ElectionScalars`.
        bound: See there.
    """

    limits: Row
    scales: Row
    coefficients: Row
    majority: Row
    bound: Row


@METHODS.register("dare")
class Dare:
    r"""Drop each entry with probability :math:`1 - d`, and divide what is left by d.

    Yu et al., 2023, arXiv:2311.03099, equation 1 with :math:`p = 1 - d`:

    .. math:: \hat\tau_t = m_t \odot \tau_t / d_t, \qquad m_t \sim \mathrm{Bernoulli}(d_t)

    What is left is merged as DARE's authors merge it: by ``election: none``, task arithmetic,
    :math:`\sum_t \lambda_t \hat\tau_t`; by ``election: ties``, the mean of the entries that have
    the elected sign, each times its coefficient. The paper's combination with TIES trims as
    well; here dropping takes the place of trimming. An exactly zero sum takes the sign elected
    most often in the model. ``rescale: false`` leaves out the division. The paper draws from a
    global generator; here draws depend on ``seed``, the expert's name, the parameter's and the
    entry alone. A density of 0 drops all.

    mergekit rescales each tensor to the L1 norm it had instead of dividing by d, and with
    election takes the weighted sum; PEFT divides by d.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        replace(COEFFICIENT, default=0.4, search=(0.0, 1.0)),
        replace(DENSITY, default=0.8, search=(0.1, 0.9)),
    )
    settings: ClassVar[tuple[Setting, ...]] = (ELECTION, RESCALE, SEED, DEPTH_SLOPE)
    scope: ClassVar[Scope] = "draw"
    published: ClassVar[Published | None] = Published("DARE", "2311.03099")

    def __init__(self, measure: "Measure") -> None:
        """Measure nothing: what is dropped depends on names alone."""
        self._names, self._experts = measure.names, measure.experts
        self._majority = Majority()

    def bind(self, plan: MergePlan) -> Pass:
        """Fix the chances, and the keys that the draws are made from."""
        if setting(plan, ELECTION) == "none":
            scalars = [
                DareScalars(limits(densities), _products(coefficients, _scales(plan, densities)))
                for densities, coefficients in _rows(plan)
            ]
            return self._pass(plan, scalars)
        key = (plan.values["density"], plan.groups, plan.settings.items())
        return self._majority.settle(
            repr(key),
            plan.values["density"],
            lambda majority: self._elected(plan, majority or -1.0),
        )

    def _elected(self, plan: MergePlan, sign: float) -> Pass:
        scalars: list[DareElectionScalars[Numbers]] = [
            DareElectionScalars(
                limits(densities),
                _scales(plan, densities),
                coefficients,
                majority=sign,
                bound=positive_bound(sign),
            )
            for densities, coefficients in _rows(plan)
        ]
        return replace(self._pass(plan, scalars), function=merge_drawn_elected)

    def _pass(self, plan: MergePlan, scalars: Sequence[Iterable[Numbers]]) -> Pass:
        seed = int(setting(plan, SEED))
        return Pass(
            merge_drawn,
            by_group(plan, self._names, scalars),
            keys=lambda name: random_keys(seed, self._experts, name),
        )


def _rows(plan: MergePlan) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    return list(zip(plan.values["density"], plan.values["coefficient"], strict=True))


def limits(densities: Sequence[float]) -> list[float]:
    """Return the draw that each expert's kept entries stay below."""
    return [float(round(density * N_DRAWS)) for density in densities]


def _scales(plan: MergePlan, densities: Sequence[float]) -> list[float]:
    if not setting(plan, RESCALE):
        return [1.0] * len(densities)
    return [1 / density if density else 0.0 for density in densities]


def _products(coefficients: Sequence[float], scales: Sequence[float]) -> list[float]:
    return [a * b for a, b in zip(coefficients, scales, strict=True)]


def _left(chunk: Chunk, limits: Tensor) -> list[Tensor]:
    """Return what is left of each task vector."""
    if chunk.positions is None or chunk.keys is None:
        raise ValueError("dare needs keys: the pass has none")
    return [
        keep_drawn(delta, chunk.positions, chunk.keys[i], limits[i])
        for i, delta in enumerate(chunk.deltas)
    ]


def merge_drawn(chunk: Chunk) -> tuple[Tensor]:
    """Return the weighted sum of what is left, ``(m,)`` float32.

    Args:
        chunk: Task vectors and :class:`DareScalars`.
    """
    scalars: DareScalars[Tensor] = unpack(DareScalars, chunk)
    return (weighted_sum(_left(chunk, scalars.limits), scalars.coefficients),)


def merge_drawn_elected(chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`merge_elected` does of what is left.

    Args:
        chunk: Task vectors and :class:`DareElectionScalars`.
    """
    scalars: DareElectionScalars[Tensor] = unpack(DareElectionScalars, chunk)
    left = _left(chunk, scalars.limits)
    rescaled = [delta.mul_(scalars.scales[i]) for i, delta in enumerate(left)]
    return merge_elected(rescaled, scalars, "mean")
