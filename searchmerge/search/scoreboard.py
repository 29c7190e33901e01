"""What plans score: the schedule of what there is to know, and the store of what is known."""

from collections.abc import Iterable, Mapping, Sequence

from searchmerge.execution.blocks import (
    Block,
    BlockScores,
    BlockValues,
    Part,
    Round,
    telling_first,
)
from searchmerge.plan import MergePlan
from searchmerge.search.schedule import Schedule
from searchmerge.search.scores import ScoreStore


class Scoreboard:
    """Answers what plans score, and what of them is still to be scored.

    Args:
        schedule: What plans are scored on.
        store: Holds every block that was scored.
    """

    def __init__(self, schedule: Schedule, store: ScoreStore) -> None:
        self.schedule = schedule
        self.store = store

    def is_full(self, plan: MergePlan, part: Part) -> bool:
        """Return whether a plan was scored on all of ``part``."""
        return not self.missing(plan, part)

    def missing(self, plan: MergePlan, part: Part) -> Sequence[Round]:
        """Return the rounds of ``part`` that a plan still has to be scored on."""
        return self.store.missing(plan, self.schedule.rounds[part])

    def values(self, plan: MergePlan, part: Part) -> dict[str, tuple[float, ...]]:
        """Return, for each task, the values of a plan that was scored on all of ``part``."""
        return {
            task: self.store.task_values(plan, blocks)
            for task, blocks in self.schedule.blocks[part].items()
        }

    def scores(self, plan: MergePlan, part: Part) -> dict[str, float]:
        """Return each task's score of a plan that was scored on all of ``part``."""
        return {
            task: self.schedule.tasks[task].kind.score(values)
            for task, values in self.values(plan, part).items()
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
        """Return the observations on every block that a plan was scored on."""
        kinds = {task: info.kind for task, info in self.schedule.tasks.items()}
        return {
            key: kinds[key[0]].observations(values) for key, values in self.store.get(plan).items()
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
        board = Scoreboard(self.schedule.with_select(select), self.store)
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


def _by_example(numbers: tuple[float, ...], blocks: Sequence[Block]) -> dict[int, float]:
    """Return each example's number; where there is one for all, each has it."""
    examples = [example for block in blocks for example in block.examples]
    return dict(zip(examples, numbers * (len(examples) // len(numbers)), strict=True))
