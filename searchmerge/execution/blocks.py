"""Blocks of examples: the unit of comparison, of the score cache, and of what a worker yields."""

import heapq
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from searchmerge.errors import SpecError
from searchmerge.evaluators.evaluator import Answer, Member, TaskInfo
from searchmerge.wording import counted

Part = Literal["pilot", "select", "hold_out"]
"""``select`` is what trials see; ``hold_out`` is what only the confirmation sees. ``pilot`` is
the same examples as ``select``, cut into blocks at random: the references are scored on it first,
and what they score decides how ``select`` is cut."""

BlockKey = tuple[str, Part, int]
"""What names a block within its study: task, part and index."""

BlockValues = Mapping[BlockKey, tuple[float, ...]]
"""Block key to what was scored on the block."""


_FIRST_ANSWERS = 2


@dataclass(frozen=True, slots=True)
class Block:
    """A few examples of one task, the same for every candidate of a study.

    Attributes:
        task: The task's name in the study.
        part: Which part of the task the examples belong to.
        index: Position among the task's blocks of this part.
        examples: Positions in the task's fixed order.
        n_answers: Of how many of the first examples the model's answers are kept.
    """

    task: str
    part: Part
    index: int
    examples: tuple[int, ...]
    n_answers: int = 0

    @property
    def key(self) -> BlockKey:
        """Return what names the block within its study."""
        return (self.task, self.part, self.index)


@dataclass(frozen=True, slots=True)
class BlockScores:
    """What a block scored under one plan.

    Attributes:
        block: What was scored.
        values: As many numbers as its task's kind of score says.
        answers: What the model said, where that is kept and its evaluator can tell.
        grades: How clearly each example was answered; none where its evaluator cannot tell.
    """

    block: Block
    values: tuple[float, ...]
    answers: tuple[Answer, ...] = ()
    grades: tuple[float, ...] = ()


Round = tuple[Block, ...]
"""Blocks that are scored together, before anything is decided."""


def split_examples(
    task: str,
    info: TaskInfo,
    *,
    seed: int,
    select: int | None,
    hold_out: int | None,
    alike: str | None = None,
) -> dict[Part, tuple[int, ...]]:
    """Divide a task's examples into what trials see and what only the confirmation sees.

    One shuffle, seeded by the study and the task's name; ``select`` takes from its front,
    ``hold_out`` what follows. ``None`` takes half of all examples, or all that the other leaves.
    Where a task has members, each part is drawn from them in proportion to their weights, as far
    as whole examples go, and all examples are as many as can be drawn so. Where the parts are
    drawn from different data, each is shuffled by itself, and ``None`` takes all of its own.

    Args:
        task: Its name.
        info: What is known of it.
        seed: The study's.
        select: Examples that trials see.
        hold_out: Examples that only the confirmation sees.
        alike: The task with the same examples that it is shuffled as; itself if ``None``.

    Raises:
        SpecError: If the task has too few examples, or a part would be empty.
    """
    if info.parts:
        asked: dict[Part, int | None] = {"select": select, "hold_out": hold_out}
        key = f"{seed}/{alike or task}"
        return {part: _drawn(task, info, part, n, key) for part, n in asked.items()}
    members = info.members or (Member(task, info.n_examples, 1.0),)
    n_examples = _n_in_proportion(members)
    asked_for = " and ".join(
        f"{part} {n}" for part, n in (("select", select), ("hold_out", hold_out)) if n is not None
    )
    if select is None:
        select = n_examples // 2 if hold_out is None else n_examples - hold_out
    if hold_out is None:
        hold_out = n_examples - select
    if select < 1 or hold_out < 1 or select + hold_out > n_examples:
        drawn = ", counted in proportion to its members' weights" if info.members else ""
        raise SpecError(
            f"tasks.{task}: {asked_for or 'select and hold_out'} were asked for, but the task "
            f"has {counted(n_examples, 'example')}{drawn}; "
            f"each part needs 1 or more, together at most {n_examples}"
        )
    generator = random.Random(f"{seed}/{alike or task}")
    chosen: dict[Part, list[int]] = {"select": [], "hold_out": []}
    start = 0
    for member, first, both in zip(
        members,
        _shared_out(select, members),
        _shared_out(select + hold_out, members),
        strict=True,
    ):
        order = list(range(start, start + member.n_examples))
        generator.shuffle(order)
        chosen["select"] += order[:first]
        chosen["hold_out"] += order[first:both]
        start += member.n_examples
    if info.members:
        for examples in chosen.values():
            generator.shuffle(examples)
    return {part: tuple(examples) for part, examples in chosen.items()}


def not_apart(
    infos: Mapping[str, TaskInfo], parts: Mapping[str, Mapping[Part, Sequence[int]]]
) -> Iterator[str]:
    """Yield what is to be said of tasks that hold out rows which another task selects on.

    Args:
        infos: Task name to what is known of it.
        parts: Task name to its examples of each part.
    """
    users = Counter(data for info in infos.values() for data in {o.data for o in info.origins})
    seen: dict[tuple[str, int], str] = {}
    held_out: dict[str, list[tuple[str, int]]] = {}
    for task, info in infos.items():
        if any(users[origin.data] > 1 for origin in info.origins):
            rows = list(info.rows())
            seen |= {rows[example]: task for example in parts[task]["select"]}
            held_out[task] = [rows[example] for example in parts[task]["hold_out"]]
    for task, rows in held_out.items():
        if shared := [row for row in rows if row in seen]:
            yield (
                f"tasks.{task}: trials see {len(shared)} of the {len(rows)} examples that it "
                f"holds out in task {seen[shared[0]]!r}, as both have rows of {shared[0][0]}, so "
                "its scores are not of unseen data alone; give both tasks the same examples, "
                "select and hold_out, or splits of their own"
            )


def _drawn(task: str, info: TaskInfo, part: Part, asked: int | None, seed: str) -> tuple[int, ...]:
    """Return the examples of a part that is drawn from data of its own; all for ``None``."""
    everything = info.parts[part]
    start = 0 if part == "select" else info.parts["select"].n_examples
    alone = Member(task, everything.n_examples, 1.0), range(start, start + everything.n_examples)
    ranges = info.members_of(part) or [alone]
    members = [member for member, _ in ranges]
    n_examples = _n_in_proportion(members)
    n = n_examples if asked is None else asked
    if not 1 <= n <= n_examples:
        drawn = ", counted in proportion to its members' weights" if everything.members else ""
        raise SpecError(
            f"tasks.{task}.{part}: {n} were asked for, but {everything.source} has {n_examples} "
            f"examples{drawn}; allowed are 1 to {n_examples}"
        )
    generator = random.Random(f"{seed}/{part}")
    chosen = []
    for (_, examples), n_its in zip(ranges, _shared_out(n, members), strict=True):
        order = list(examples)
        generator.shuffle(order)
        chosen += order[:n_its]
    generator.shuffle(chosen)
    return tuple(chosen)


def _n_in_proportion(members: Sequence[Member]) -> int:
    """Return how many examples can be drawn of members in proportion to their weights."""
    return int(min(member.n_examples / member.weight + 1e-9 for member in members))


def _shared_out(total: int, members: Sequence[Member]) -> list[int]:
    """Return how many of ``total`` examples are each member's: its weight's part, in whole ones.

    The k-th example of a member comes at :math:`(k + 1/2) / w`, so that a larger total gives no
    member fewer (Webster's method).
    """
    places = (
        ((k + 0.5) / member.weight, number)
        for number, member in enumerate(members)
        for k in range(member.n_examples)
    )
    counts = Counter(number for _, number in heapq.nsmallest(total, places))
    return [counts[number] for number in range(len(members))]


def make_blocks(
    task: str, part: Part, examples: Sequence[int], info: TaskInfo, size: int
) -> tuple[Block, ...]:
    """Cut ``examples`` into blocks of ``size``, or as the task's kind of score asks for.

    Answers are kept of the first examples that references are scored on, for a person to see
    what is wrong where one scores nothing; and of all held-out ones, where the task says so.
    """
    size = info.kind.block_size(len(examples), size)
    blocks = []
    for index, start in enumerate(range(0, len(examples), size)):
        its = tuple(examples[start : start + size])
        n_answers = 0
        if part == "pilot" and index == 0:
            n_answers = min(_FIRST_ANSWERS, len(its))
        elif part == "hold_out" and info.keeps_answers:
            n_answers = len(its)
        blocks.append(Block(task, part, index, its, n_answers))
    return tuple(blocks)


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
    for task, task_blocks in blocks.items():
        order = list(task_blocks)
        if seed is not None:
            random.Random(f"{seed}/{task}/rounds").shuffle(order)
        places += [((i + 0.5) / len(order), task, block) for i, block in enumerate(order)]
    ordered = [block for _, _, block in sorted(places, key=lambda place: place[:2])]
    return tuple(
        tuple(sorted(ordered[start : start + round_blocks], key=lambda b: (b.task, b.index)))
        for start in range(0, len(ordered), round_blocks)
    )


def telling_first(
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
        e: statistics.pvariance([plan[e] for plan in scored]) if scored else 0.0 for e in examples
    }
    ordered = sorted(examples, key=lambda example: -spread[example])
    cut, start = [], 0
    for index, block in enumerate(blocks):
        end = start + len(block.examples)
        cut.append(Block(block.task, part, index, tuple(ordered[start:end])))
        start = end
    return tuple(cut)
