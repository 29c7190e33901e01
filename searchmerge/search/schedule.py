"""What every candidate of a study is scored on, in which blocks and rounds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from searchmerge.evaluators.evaluator import Aggregate
from searchmerge.execution.blocks import Block, BlockScores, Part, Round, inform, make_rounds
from searchmerge.plan import MergePlan
from searchmerge.search.scores import ScoreStore


@dataclass(frozen=True)
class Schedule:
    """What every candidate is scored on, in which order.

    Attributes:
        blocks: For each part, task name to its blocks.
        rounds: For each part, the blocks of all tasks in rounds.
        round_blocks: Blocks in a round.
        metrics: Task name to what its scores are called.
        aggregates: Task name to what makes its score from records of examples, where it is no
            mean and held-out examples have records.
    """

    blocks: Mapping[Part, Mapping[str, Sequence[Block]]]
    rounds: Mapping[Part, Sequence[Round]]
    round_blocks: int
    metrics: Mapping[str, str] = field(default_factory=dict)
    aggregates: Mapping[str, Aggregate] = field(default_factory=dict)

    def scores(self, store: ScoreStore, plan: MergePlan, part: Part) -> dict[str, float]:
        """Return each task's score of a plan that was scored on all of ``part``."""
        return {
            task: score_of(store.task_values(plan, blocks), self.aggregates.get(task))
            for task, blocks in self.blocks[part].items()
        }

    def is_known(self, store: ScoreStore, plan: MergePlan, part: Part) -> bool:
        """Return whether a plan was scored on all of ``part``."""
        return not store.missing(plan, self.rounds[part])

    def informed(
        self, store: ScoreStore, known: Iterable[MergePlan], deciding: Sequence[MergePlan]
    ) -> "Schedule":
        """Return the schedule with ``select`` cut from ``survey``, telling examples first.

        The order depends on the scores of ``deciding`` alone, so it is the same in every run of
        a study. What is known of ``survey`` is put down for the new blocks too.

        Args:
            store: Holds the scores of all these plans on ``survey``.
            known: Plans whose scores are put down.
            deciding: Plans that decide the order: examples on which they differ come first.
        """
        survey = self.blocks["survey"]
        select = {
            task: inform(own, [_by_example(store, plan, own) for plan in deciding], "select")
            for task, own in survey.items()
        }
        for plan in known:
            if store.missing(plan, [tuple(block for own in select.values() for block in own)]):
                store.put(plan, _moved(store, plan, survey, select))
        rounds = make_rounds(select, round_blocks=self.round_blocks)
        return replace(
            self,
            blocks={**self.blocks, "select": select},
            rounds={**self.rounds, "select": rounds},
        )


def _moved(
    store: ScoreStore,
    plan: MergePlan,
    survey: Mapping[str, Sequence[Block]],
    select: Mapping[str, Sequence[Block]],
) -> list[BlockScores]:
    """Return what is known of one cut of the examples as scores of another."""
    found = []
    for task, blocks in select.items():
        values = _by_example(store, plan, survey[task])
        for block in blocks:
            own = tuple(values[example] for example in block.examples)
            is_mean = len(store.task_values(plan, survey[task])) == len(values)
            found.append(BlockScores(block, own if is_mean else own[:1]))
    return found


def _by_example(store: ScoreStore, plan: MergePlan, blocks: Sequence[Block]) -> dict[int, float]:
    """Return a task's values by example; where one number is known of all, each has it."""
    examples = [example for block in blocks for example in block.examples]
    values = store.task_values(plan, blocks)
    return dict(zip(examples, values * (len(examples) // len(values)), strict=True))


def score_of(values: Sequence[float], aggregate: Aggregate | None) -> float:
    """Return a task's score from one value, or record, per example, or from the score itself."""
    if aggregate is not None and len(values) > 1:
        return aggregate(values)
    return sum(values) / len(values)
