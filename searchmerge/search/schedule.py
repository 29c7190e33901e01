"""What every candidate of a study is scored on, in which blocks and rounds."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.execution.blocks import Block, BlockKey, Part, Round, make_rounds

Places = Mapping[str, Mapping[BlockKey, slice]]
"""Task name to block key to where the block's observations stand among the task's."""


@dataclass(frozen=True)
class Schedule:
    """What every candidate is scored on, in which order.

    Attributes:
        tasks: Task name to what is known of it before anything is scored.
        blocks: For each part, task name to its blocks.
        rounds: For each part, the blocks of all tasks in rounds.
        round_blocks: Blocks in a round.
    """

    tasks: Mapping[str, TaskInfo]
    blocks: Mapping[Part, Mapping[str, Sequence[Block]]]
    rounds: Mapping[Part, Sequence[Round]]
    round_blocks: int

    @classmethod
    def interleaved(
        cls,
        tasks: Mapping[str, TaskInfo],
        blocks: Mapping[Part, Mapping[str, Sequence[Block]]],
        *,
        round_blocks: int,
        seed: int | None,
    ) -> "Schedule":
        """Return the schedule whose rounds :func:`make_rounds` makes of each part's blocks."""
        rounds = {
            part: make_rounds(part_blocks, round_blocks=round_blocks, seed=seed)
            for part, part_blocks in blocks.items()
        }
        return cls(tasks, blocks, rounds, round_blocks)

    def with_select(self, select: Mapping[str, Sequence[Block]]) -> "Schedule":
        """Return the schedule with other blocks to ``select`` by, visited as they are."""
        rounds = make_rounds(select, round_blocks=self.round_blocks)
        return replace(
            self,
            blocks={**self.blocks, "select": select},
            rounds={**self.rounds, "select": rounds},
        )

    def rounds_of(self, part: Part, tasks: Collection[str]) -> Sequence[Round]:
        """Return the rounds of a part without the blocks of other tasks."""
        rounds = (tuple(b for b in blocks if b.task in tasks) for blocks in self.rounds[part])
        return tuple(blocks for blocks in rounds if blocks)

    def n_examples(self, part: Part) -> int:
        """Return how many examples of all tasks a part has."""
        return sum(len(block.examples) for task in self.blocks[part].values() for block in task)

    def places(self, part: Part) -> Places:
        """Return where each block's observations stand among those of its task."""
        return {task: self._places(task, blocks) for task, blocks in self.blocks[part].items()}

    def _places(self, task: str, blocks: Sequence[Block]) -> dict[BlockKey, slice]:
        places, start = {}, 0
        for block in blocks:
            end = start + self.tasks[task].kind.n_observations(len(block.examples))
            places[block.key] = slice(start, end)
            start = end
        return places
