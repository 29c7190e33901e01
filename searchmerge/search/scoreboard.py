"""What plans score: the schedule of what there is to know, and the store of what is known."""

import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from searchmerge.evaluators.score_kind import Mean
from searchmerge.execution.blocks import (
    Block,
    BlockKey,
    BlockScores,
    BlockValues,
    Part,
    Round,
    telling_first,
)
from searchmerge.plan import MergePlan
from searchmerge.search.grades import Graded, Grader, Table, Unit, learn
from searchmerge.search.racing import Observed
from searchmerge.search.schedule import Schedule
from searchmerge.search.scores import ScoreStore

Vector = npt.NDArray[np.float64]


class Scoreboard:
    """Answers what plans score, and what of them is still to be scored.

    Args:
        schedule: What plans are scored on.
        store: Holds every block that was scored.
        grader: How much the grades of examples count beside the metric.
    """

    def __init__(
        self, schedule: Schedule, store: ScoreStore, grader: Grader | None = None
    ) -> None:
        self.schedule = schedule
        self.store = store
        self.grader = grader or Grader({})

    def read_by(self, grader: Grader) -> "Scoreboard":
        """Return the same scoreboard, whose observations are read by another grader."""
        return Scoreboard(self.schedule, self.store, grader)

    def learn(
        self, plans: Iterable[MergePlan], seed: int, extremes: Iterable[MergePlan] = ()
    ) -> Grader:
        """Return how examples are best read, from what plans scored on ``select``.

        Tasks whose score is no mean over examples, or of which a plan has no grades, are read by
        their metric.

        Args:
            plans: The plans; some may be scored on a part of it.
            seed: Of the halves of the examples that tell of one another.
            extremes: The base and the experts, which tell how clearly examples are answered:
                those that have grades of all these tasks.
        """
        tables = self._tables({plan.digest: plan for plan in plans}.values())
        blocks_of = self.schedule.blocks["select"]
        graded = [
            {task: self.grades(plan, blocks_of[task]) for task in tables} for plan in extremes
        ]
        clear = [grades for grades in graded if all(grades.values())]
        beyond = {task: np.array([[*its[task].values()] for its in clear]) for task in tables}
        return learn(tables, seed, beyond if clear else {})

    def _tables(self, plans: Collection[MergePlan]) -> dict[str, Table]:
        """Return what plans scored on ``select``, of the tasks of which all have grades."""
        places = self.schedule.places("select")
        tables = {
            task: Table(*np.full((2, len(plans), max(p.stop for p in its.values())), np.nan))
            for task, its in places.items()
            if plans and isinstance(self.schedule.tasks[task].kind, Mean)
        }
        for row, plan in enumerate(plans):
            scored, graded = self.store.get(plan), self.store.grades(plan)
            for task in list(tables):
                seen = {key: place for key, place in places[task].items() if key in scored}
                if not all(graded.get(key) for key in seen):
                    del tables[task]
                    continue
                for key, place in seen.items():
                    tables[task].values[row, place] = scored[key]
                    tables[task].grades[row, place] = graded[key]
        return tables

    def is_full(self, plan: MergePlan, part: Part) -> bool:
        """Return whether a plan was scored on all of ``part``."""
        return not self.missing(plan, part)

    def missing(self, plan: MergePlan, part: Part) -> Sequence[Round]:
        """Return the rounds of ``part`` that a plan still has to be scored on."""
        return self.store.missing(plan, self.schedule.rounds[part])

    def values(
        self, plan: MergePlan, part: Part, tasks: Collection[str] | None = None
    ) -> dict[str, tuple[float, ...]]:
        """Return, for each task, the values of a plan that was scored on all of ``part``.

        Args:
            plan: The plan.
            part: Which examples.
            tasks: Those on which it was scored; ``None`` for all.
        """
        return {
            task: self.store.task_values(plan, blocks)
            for task, blocks in self.schedule.blocks[part].items()
            if tasks is None or task in tasks
        }

    def scores(
        self, plan: MergePlan, part: Part, tasks: Collection[str] | None = None
    ) -> dict[str, float]:
        """Return each task's score of a plan, as :meth:`values` returns its values."""
        return {
            task: self.schedule.tasks[task].kind.score(values)
            for task, values in self.values(plan, part, tasks).items()
        }

    def by_example(self, plan: MergePlan, task: str, part: Part) -> dict[int, float]:
        """Return each example's value under a plan that was scored on all of ``part``."""
        blocks = self.schedule.blocks[part][task]
        return _by_example(self.store.task_values(plan, blocks), blocks)

    def grades(self, plan: MergePlan, blocks: Sequence[Block]) -> dict[int, float]:
        """Return how clearly a plan answered each example of a task's blocks; none if unknown."""
        graded = self.store.grades(plan)
        if not all(graded.get(block.key) for block in blocks):
            return {}
        return {
            example: grade
            for block in blocks
            for example, grade in zip(block.examples, graded[block.key], strict=True)
        }

    def observed(self, plan: MergePlan) -> BlockValues:
        """Return the observations on every block that a plan was scored on, grades read."""
        return self.seen(plan).values

    def seen(self, plan: MergePlan) -> Observed:
        """Return the same, and how far they hang on how clearly the plan is taken to answer.

        Of a part of ``select`` the plan's units are predicted: the blocks that come first are not
        like the others, and are read as they will be once all are seen.
        """
        scored, graded = self.store.get(plan), self.store.grades(plan)
        together: dict[tuple[str, Part], list[BlockKey]] = defaultdict(list)
        for task, part, index in sorted(scored):  # in one order: means round by it
            together[task, part].append((task, part, index))
        is_read = {
            (task, part): bool(self.grader.reading(task).steps) and all(map(graded.get, keys))
            for (task, part), keys in together.items()
        }
        selecting = {
            task: keys
            for (task, part), keys in together.items()
            if part == "select" and is_read[task, part]
        }
        units = self._units(selecting, graded)
        values: dict[BlockKey, tuple[float, ...]] = {}
        shifts: dict[BlockKey, tuple[float, ...]] = {}
        for (task, part), keys in together.items():
            if not is_read[task, part]:
                kind = self.schedule.tasks[task].kind
                values |= {key: kind.observations(scored[key]) for key in keys}
                continue
            unit = units.get(task) if part == "select" else None
            read = self.grader.read(task, _joined(scored, keys), _joined(graded, keys), unit)
            sizes = {key: len(scored[key]) for key in keys}
            values |= _cut(read.values, sizes)
            if unit is not None:
                shifts |= _cut(read.shifts, sizes)
        return Observed(values, shifts)

    def _units(
        self, selecting: Mapping[str, Sequence[BlockKey]], graded: BlockValues
    ) -> dict[str, Unit]:
        """Return what the units of tasks are taken for of which some blocks are not seen."""
        blocks = self.schedule.blocks.get("select", {})
        partly = [task for task, keys in selecting.items() if len(keys) < len(blocks[task])]
        if not partly:
            return {}
        places = self.schedule.places("select")
        seen = {
            task: Graded(
                [i for key in keys for i in range(*places[task][key].indices(sys.maxsize))],
                _joined(graded, keys),
            )
            for task, keys in selecting.items()
        }
        units = self.grader.units(seen)
        return {task: units[task] for task in partly if task in units}

    def observations(self, plan: MergePlan, part: Part) -> dict[str, Vector]:
        """Return each task's observations of a plan that was scored on all of ``part``."""
        observed = self.observed(plan)
        return {
            task: np.array([value for block in blocks for value in observed[block.key]])
            for task, blocks in self.schedule.blocks[part].items()
        }

    def estimates(self, plan: MergePlan, part: Part) -> dict[str, float]:
        """Return what each task's score is taken for: with grades, as far as they count."""
        observations = self.observations(plan, part)
        return {
            task: float(observations[task].mean()) if self.grader.reading(task).steps else score
            for task, score in self.scores(plan, part).items()
        }

    def informed(self, plans: Iterable[MergePlan], deciding: Sequence[MergePlan]) -> "Scoreboard":
        """Return the scoreboard with ``select`` cut from ``pilot``, telling examples first.

        The order depends on the scores of ``deciding`` alone, so it is the same in every run of
        a study. What plans scored on ``pilot`` is put down for the new blocks too.

        Args:
            plans: Plans whose scores are put down, all scored on ``pilot`` in full.
            deciding: Plans that decide the order: examples on which they differ come first.
        """
        pilot = self.schedule.blocks["pilot"]
        select = {
            task: telling_first(
                blocks, [self._observed_by_example(plan, blocks) for plan in deciding], "select"
            )
            for task, blocks in pilot.items()
        }
        board = Scoreboard(self.schedule.with_select(select), self.store, self.grader)
        for plan in plans:
            if not board.is_full(plan, "select"):
                self.store.put(plan, self._moved(plan, select))
        return board

    def _observed_by_example(self, plan: MergePlan, blocks: Sequence[Block]) -> dict[int, float]:
        kind = self.schedule.tasks[blocks[0].task].kind
        return _by_example(kind.observations(self.store.task_values(plan, blocks)), blocks)

    def _moved(
        self, plan: MergePlan, select: Mapping[str, Sequence[Block]]
    ) -> Iterable[BlockScores]:
        """Yield what is known of the ``pilot`` blocks as scores of those of another cut."""
        for task, blocks in select.items():
            pilot = self.schedule.blocks["pilot"][task]
            values = _by_example(self.store.task_values(plan, pilot), pilot)
            grades = self.grades(plan, pilot)
            for block in blocks:
                n_values = self.schedule.tasks[task].kind.n_values(len(block.examples))
                yield BlockScores(
                    block,
                    tuple(values[e] for e in block.examples[:n_values]),
                    grades=tuple(grades[e] for e in block.examples) if grades else (),
                )


def _joined(numbers: BlockValues, keys: Iterable[BlockKey]) -> list[float]:
    """Return the numbers of blocks, one after the other."""
    return [number for key in keys for number in numbers[key]]


def _cut(numbers: Vector, sizes: Mapping[BlockKey, int]) -> dict[BlockKey, tuple[float, ...]]:
    """Cut the numbers of blocks, one after the other, into those of each."""
    each = iter(numbers.tolist())
    return {key: tuple(islice(each, size)) for key, size in sizes.items()}


def _by_example(numbers: tuple[float, ...], blocks: Sequence[Block]) -> dict[int, float]:
    """Return each example's number; where there is one for all, each has it."""
    examples = [example for block in blocks for example in block.examples]
    return dict(zip(examples, numbers * (len(examples) // len(numbers)), strict=True))
