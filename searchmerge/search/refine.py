"""Refinement: a coefficient for every group of parameters, by gradient, from a plan found.

A refinement asks for gradients and goes a few steps against them on one part of the examples
that trials see. How far it should have gone, and how much of the way is kept, is decided on the
other part, which its steps do not see; where that does not pay, nothing is proposed. It computes
no gradient itself: it yields what it wants to know, and is sent what came of it, so that several
can go on side by side, on whatever workers there are.
"""

import logging
import math
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from searchmerge.errors import EvaluationError
from searchmerge.evaluators.evaluator import LossKind
from searchmerge.execution.gradient import Batch, LossRequest, LossResult
from searchmerge.execution.isolation import LeftOut, told
from searchmerge.plan import Groups, MergePlan
from searchmerge.search.descent import Adam, Array, Path

_logger = logging.getLogger(__name__)

WATCHED = 1 / 4
"""The part of the examples that decides how far to go."""

LEAST_EXAMPLES = 8
"""Of a task: then two blocks are watched, from which it is seen how far its losses vary."""

_FEWEST_BLOCKS = 2  # of one alone no error is known
_BLOCK = 8  # examples whose loss is watched as one, if that makes
_LEAST_BLOCKS = 6  # so many, from which it is seen how far losses vary
_CHECKS = 5  # how often it is looked at whether to go on, at most
_PATIENCE = 2  # checks without a lower loss after which the steps end
_SHRINKS = (0.75, 0.5, 0.25)
_LEAST_GAIN = 1.0  # standard errors by which the loss must have fallen

Ask = tuple[MergePlan, LossRequest]
"""A plan, and of which examples its loss is wanted, or the gradient too."""

Shrink = float | Literal["auto"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How plans are refined.

    Attributes:
        groups: The groups that get coefficients of their own.
        n_steps: Steps at most.
        batch: Examples of a step, over all tasks.
        shrink: Which part of the way is kept, in (0, 1]; ``auto`` for what pays most.
        loss: What is to fall.
        rate: By how much the first steps change a coefficient, as a part of the start's mean one.
        seed: Of which examples are watched, and of the order of the others.
    """

    groups: Groups
    n_steps: int
    batch: int
    shrink: Shrink = "auto"
    loss: LossKind = "labels"
    rate: float = 0.05
    seed: int = 0

    @property
    def checks(self) -> tuple[int, ...]:
        """Numbers of steps after which the watched examples are looked at."""
        every = math.ceil(self.n_steps / _CHECKS)
        return (*range(every, self.n_steps, every), self.n_steps)


@dataclass(frozen=True, slots=True)
class Material:
    """What refinements learn from.

    Attributes:
        examples: Task name to those of its examples that trials see.
        weights: Task name to what its loss counts for.
        teachers: Task name to the plan of its own expert.
        left_out: Task name to which of its examples are not learnt from for want of a loss, in
            words; only of tasks that have such.
    """

    examples: Mapping[str, Sequence[int]]
    weights: Mapping[str, float]
    teachers: Mapping[str, MergePlan] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def told(self) -> str:
        """Return what is left out, in one line; nothing where nothing is."""
        parts = ", ".join(f"{its} of {task}" for task, its in self.left_out.items())
        return f"not learnt from, for want of a loss: {parts}" if parts else ""


@dataclass(frozen=True, slots=True)
class Refined:
    """What a refinement proposes.

    Attributes:
        plan: The plan.
        gain: By how much the loss of the watched examples fell.
        standard_error: Of the gain.
        n_steps: Steps that lead to it.
        shrink: Which part of their way it keeps.
    """

    plan: MergePlan
    gain: float
    standard_error: float
    n_steps: int
    shrink: float


Refinement = Generator[Ask, LossResult, Refined | None]
"""Yields what it asks, and returns what it proposes, or ``None`` where that does not pay.

What cannot be computed is thrown into it as an ``EvaluationError``. That ends its steps; it comes
out again where nothing better than the start was seen before.
"""

Report = Callable[[int, float | str], None]
"""Told the number of steps taken, and the loss of the watched examples then; or, in words, which
example is left out, or why there are no more steps."""


def refinement(
    start: MergePlan,
    recipe: Recipe,
    material: Material,
    report: Report = lambda n_steps, told: None,
) -> Refinement:
    """Return the refinement of a plan whose groups are the recipe's already."""
    parts = _divided(material, recipe.seed)
    return _Course(Path.of(start), recipe, material, parts, report).run()


@dataclass(frozen=True, slots=True)
class _Parts:
    """A task's examples: those that steps see, and those that are watched, in blocks."""

    seen: tuple[int, ...]
    watched: tuple[Batch, ...]


def _divided(material: Material, seed: int) -> dict[str, _Parts]:
    """Return each task's examples, divided by the seed."""
    parts = {}
    for task, examples in material.examples.items():
        order = list(examples)
        random.Random(f"{seed}/{task}/refine").shuffle(order)
        n_watched = max(1, round(WATCHED * len(order)))
        watched = order[:n_watched]
        size = min(_BLOCK, -(-n_watched // _LEAST_BLOCKS))
        blocks = tuple(tuple(watched[i : i + size]) for i in range(0, n_watched, size))
        parts[task] = _Parts(tuple(order[n_watched:]), blocks)
    return parts


@dataclass(frozen=True, slots=True)
class _Seen:
    """Coefficients, and the loss of the watched examples under them.

    Attributes:
        at: The coefficients.
        losses: Task name to the loss of each watched block.
        n_steps: How many steps lead there.
        shrink: Which part of their way it is.
    """

    at: Array
    losses: Mapping[str, tuple[float, ...]]
    n_steps: int = 0
    shrink: float = 1.0


@dataclass(frozen=True, slots=True)
class _Course:
    """One refinement, from its start to what it proposes.

    An example that has no finite loss or gradient is left out, wherever that was seen first: of
    those that are watched at the start, as a plan that makes a loss infinite is no good one.
    """

    path: Path
    recipe: Recipe
    material: Material
    parts: Mapping[str, _Parts]
    report: Report
    left_out: dict[str, set[int]] = field(default_factory=dict, init=False)

    @property
    def _weights(self) -> dict[str, float]:
        """Return the part of each task in the loss."""
        total = sum(self.material.weights[task] for task in self.parts)
        return {task: self.material.weights[task] / total for task in self.parts}

    def run(self) -> Refinement:
        """Descend, look back on the way, and return what it is worth."""
        start = yield from self._begin()
        best = yield from self._descend(start)
        if best is start:
            return None
        best = yield from self._shrunken(best)
        gain, standard_error = self._gain(best, start)
        _logger.info("refined in %d steps: gain %.4f +- %.4f", best.n_steps, gain, standard_error)
        if gain <= _LEAST_GAIN * standard_error:
            return None
        plan = self.path.plan(best.at)
        return Refined(plan, gain, standard_error, best.n_steps, best.shrink)

    def _begin(self) -> Generator[Ask, LossResult, _Seen]:
        """Return and report what the watched examples say of the start: of those that say any.

        Raises:
            EvaluationError: If those of a task are too few to tell how far its losses vary.
        """
        at, watched = self.path.first, self._watched()
        result = yield self.path.plan(at), self._request(watched, gradient=False)
        self._leave_out(0, result.left_out)
        for task, blocks in self._watched().items():
            if len(blocks) < min(_FEWEST_BLOCKS, len(self.parts[task].watched)):
                raise EvaluationError(
                    f"too few of the examples that decide how far to go have a finite loss; "
                    f"{told({task: result.left_out[task]})[0]}"
                )
        finite = {t: tuple(x for x in of if not math.isnan(x)) for t, of in result.losses.items()}
        return self._reported(_Seen(at, finite))

    def _leave_out(self, n_steps: int, examples: LeftOut) -> None:
        """Report examples, and neither learn from them nor watch them any more."""
        for task, its in examples.items():
            self.left_out.setdefault(task, set()).update(its)
        for line in told(examples):
            self.report(n_steps, f"left out: {line}")

    def _usable(self, task: str, examples: Iterable[int]) -> tuple[int, ...]:
        """Return those of a task's examples that are not left out."""
        left_out = self.left_out.get(task, ())
        return tuple(example for example in examples if example not in left_out)

    def _watched(self) -> dict[str, tuple[Batch, ...]]:
        """Return the blocks that are watched, without what is left out."""
        usable = {t: [self._usable(t, b) for b in p.watched] for t, p in self.parts.items()}
        return {task: tuple(block for block in its if block) for task, its in usable.items()}

    def _descend(self, start: _Seen) -> Generator[Ask, LossResult, _Seen]:
        """Take the steps; return where the loss of the watched examples was lowest.

        They end early where that falls no more, and where it cannot be computed any more.
        """
        recipe, best, n_stale = self.recipe, start, 0
        descent = Adam(self.path.first, recipe.rate * self.path.size, recipe.n_steps)
        batches = self._batches()
        for n_steps in range(1, recipe.n_steps + 1):
            try:
                result = yield self.path.plan(descent.at), self._request(next(batches))
                self._leave_out(n_steps, result.left_out)
                descent.step(np.array(result.rows))
                if n_steps not in recipe.checks:
                    continue
                here = yield from self._look(descent.at, n_steps)
            except EvaluationError as error:
                if best is start:
                    raise
                self.report(n_steps, f"goes no further: {error}")
                break
            n_stale = n_stale + 1
            if self._gain(here, best)[0] > 0:
                best, n_stale = here, 0
            if n_stale == _PATIENCE:
                break
        return best

    def _look(self, at: Array, n_steps: int) -> Generator[Ask, LossResult, _Seen]:
        """Return and report what the watched examples say of coefficients on the way."""
        return self._reported(_Seen(at, (yield from self._watch(at)), n_steps))

    def _reported(self, seen: _Seen) -> _Seen:
        sizes = {task: [len(b) for b in blocks] for task, blocks in self._watched().items()}
        means = {t: np.average(losses, weights=sizes[t]) for t, losses in seen.losses.items()}
        self.report(seen.n_steps, float(sum(self._weights[t] * means[t] for t in means)))
        return seen

    def _shrunken(self, best: _Seen) -> Generator[Ask, LossResult, _Seen]:
        """Return the part of the way to the best coefficients that pays most.

        On the way back losses have one valley: where a part is no better, shorter ones are not.
        """
        if self.recipe.shrink != "auto":
            return (yield from self._part(best, self.recipe.shrink))
        chosen = best
        for shrink in _SHRINKS:
            try:
                part = yield from self._part(best, shrink)
            except EvaluationError as error:
                self.report(best.n_steps, f"{shrink:g} of the way is not looked at: {error}")
                break
            if self._gain(part, chosen)[0] <= 0:
                break
            chosen = part
        return chosen

    def _part(self, best: _Seen, shrink: float) -> Generator[Ask, LossResult, _Seen]:
        at = self.path.part(best.at, shrink)
        return _Seen(at, (yield from self._watch(at)), best.n_steps, shrink)

    def _watch(self, at: Array) -> Generator[Ask, LossResult, Mapping[str, tuple[float, ...]]]:
        """Return the loss of each watched block.

        Raises:
            EvaluationError: If it is not finite of an example whose loss at the start is.
        """
        result = yield self.path.plan(at), self._request(self._watched(), gradient=False)
        if result.left_out:
            raise EvaluationError(told(result.left_out)[0])
        return result.losses

    def _request(
        self, batches: Mapping[str, tuple[Batch, ...]], *, gradient: bool = True
    ) -> LossRequest:
        teachers = self.material.teachers
        return LossRequest(batches, self.recipe.loss, teachers, gradient, self._weights)

    def _batches(self) -> Iterator[Mapping[str, tuple[Batch, ...]]]:
        """Yield each step's examples, as many of each task; all are seen as often.

        Raises:
            EvaluationError: If all are left out.
        """
        generator = random.Random(f"{self.recipe.seed}/refine")
        size = max(1, self.recipe.batch // len(self.parts))
        left: dict[str, list[int]] = {task: [] for task in self.parts}
        while True:
            step = {}
            for task, parts in self.parts.items():
                queue = list(self._usable(task, left[task]))
                n_wanted = min(size, len(self._usable(task, parts.seen)))
                while len(queue) < n_wanted:
                    drawn = generator.sample(parts.seen, len(parts.seen))
                    queue += self._usable(task, drawn)
                if n_wanted:
                    step[task] = (tuple(queue[:n_wanted]),)
                left[task] = queue[n_wanted:]
            if not step:
                raise EvaluationError("no example that is learnt from has a finite loss")
            yield step

    def _gain(self, seen: _Seen, before: _Seen) -> tuple[float, float]:
        """Return by how much the watched loss is lower than before, and its standard error."""
        gain, variance = 0.0, 0.0
        for task, blocks in self._watched().items():
            sizes = np.array([len(block) for block in blocks])
            falls = np.array(before.losses[task]) - np.array(seen.losses[task])
            mean = float(np.average(falls, weights=sizes))
            gain += self._weights[task] * mean
            if len(falls) > 1:
                spread = float(np.average((falls - mean) ** 2, weights=sizes))
                variance += self._weights[task] ** 2 * spread / (len(falls) - 1)
        return gain, float(np.sqrt(variance))
