"""Blocks of examples: the unit of comparison, of the score cache, and of what a worker yields."""

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from searchmerge.errors import SpecError
from searchmerge.evaluators.evaluator import TaskInfo

Part = Literal["survey", "select", "hold_out"]
"""``select`` is what trials see; ``hold_out`` is what only the confirmation sees. ``survey`` is
the same examples as ``select``, cut into blocks at random: the references are scored on it first,
and what they score decides how ``select`` is cut."""


@dataclass(frozen=True, slots=True)
class Block:
    """A few examples of one task, the same for every candidate of a study.

    Attributes:
        task: The task's name in the study.
        part: Which part of the task the examples belong to.
        index: Position among the task's blocks of this part.
        examples: Positions in the task's fixed order.
    """

    task: str
    part: Part
    index: int
    examples: tuple[int, ...]

    @property
    def key(self) -> tuple[str, Part, int]:
        """Return what names the block within its study."""
        return (self.task, self.part, self.index)


@dataclass(frozen=True, slots=True)
class BlockScores:
    """What a block's examples scored under one plan: :func:`n_values` numbers."""

    block: Block
    values: tuple[float, ...]


def n_values(block: Block, info: TaskInfo) -> int:
    """Return how many numbers are kept of a block: one per example, or the one score of all.

    Records of examples are kept of what is held out, to be resampled; trials need the score.
    """
    has_records = info.aggregate is not None and block.part == "hold_out"
    return len(block.examples) if info.mean or has_records else 1


Round = tuple[Block, ...]
"""Blocks that are scored together, before anything is decided."""


def split_examples(
    task: str, n_examples: int, *, seed: int, select: int | None, hold_out: int | None
) -> dict[Part, tuple[int, ...]]:
    """Divide a task's examples into what trials see and what only the confirmation sees.

    One shuffle, seeded by the study and the task's name; ``select`` takes from its front,
    ``hold_out`` what follows. ``None`` takes half of all examples, or all that the other leaves.

    Raises:
        SpecError: If the task has too few examples, or a part would be empty.
    """
    if select is None:
        select = n_examples // 2 if hold_out is None else n_examples - hold_out
    if hold_out is None:
        hold_out = n_examples - select
    if select < 1 or hold_out < 1 or select + hold_out > n_examples:
        raise SpecError(
            f"tasks.{task}: select {select} and hold_out {hold_out} were asked for, but the task "
            f"has {n_examples} examples; each part needs 1 or more, together at most {n_examples}"
        )
    order = list(range(n_examples))
    random.Random(f"{seed}/{task}").shuffle(order)
    return {
        "select": tuple(order[:select]),
        "hold_out": tuple(order[select : select + hold_out]),
    }


def make_blocks(
    task: str, part: Part, examples: Sequence[int], info: TaskInfo, size: int
) -> tuple[Block, ...]:
    """Cut ``examples`` into blocks of ``size``; into one block where the score is not a mean."""
    size = size if info.mean else len(examples)
    return tuple(
        Block(task, part, index, tuple(examples[start : start + size]))
        for index, start in enumerate(range(0, len(examples), size))
    )


def make_rounds(
    blocks: Mapping[str, Sequence[Block]], *, round_blocks: int, seed: int | None = None
) -> tuple[Round, ...]:
    """Interleave the tasks' blocks, each in proportion to its count, and cut them into rounds.

    Every prefix of the order holds each task in about its own proportion, so that a candidate
    that is stopped early has been seen on all tasks. Within a round, blocks of one task follow
    one another.

    Args:
        blocks: Task name to its blocks.
        round_blocks: Blocks in a round, 1 or more; the last round may hold fewer.
        seed: Seed of the order in which a task's blocks are visited; ``None`` visits them as
            they are.
    """
    places = []
    for task, own in blocks.items():
        order = list(own)
        if seed is not None:
            random.Random(f"{seed}/{task}/rounds").shuffle(order)
        places += [((i + 0.5) / len(order), task, block) for i, block in enumerate(order)]
    ordered = [block for _, _, block in sorted(places, key=lambda place: place[:2])]
    return tuple(
        tuple(sorted(ordered[start : start + round_blocks], key=lambda b: (b.task, b.index)))
        for start in range(0, len(ordered), round_blocks)
    )


def inform(
    blocks: Sequence[Block], scored: Sequence[Mapping[int, float]], part: Part
) -> tuple[Block, ...]:
    """Cut the examples of ``blocks`` anew, those on which plans differ most into the first.

    Most examples are scored alike by every good merge and tell nothing; a candidate that is
    scored on the others first is told apart from the best with a fraction of the examples.

    Args:
        blocks: A task's blocks, all of one part.
        scored: For each of some plans, example to score.
        part: Of the new blocks.

    Returns:
        As many blocks of the same sizes. The order is by the variance over the plans; equal ones
        stay in the order that they have.
    """
    examples = [example for block in blocks for example in block.examples]
    spread = {
        e: statistics.pvariance([own[e] for own in scored]) if scored else 0.0 for e in examples
    }
    ordered = sorted(examples, key=lambda example: -spread[example])
    cut, start = [], 0
    for index, block in enumerate(blocks):
        end = start + len(block.examples)
        cut.append(Block(block.task, part, index, tuple(ordered[start:end])))
        start = end
    return tuple(cut)
