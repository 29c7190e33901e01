"""A group or tag of lm-eval's as one task of a study: its members' examples, one score."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, get_args

import torch
from torch import Tensor

from searchmerge.errors import SpecError
from searchmerge.evaluators.evaluator import Answer, LossKind, Member, TaskInfo
from searchmerge.evaluators.lm_harness.asking import ask
from searchmerge.evaluators.lm_harness.catalogue import Branch, Leaf
from searchmerge.evaluators.lm_harness.task import PreparedTask, TaskPart
from searchmerge.evaluators.score_kind import Mean


class PreparedGroup:
    """All tasks of a group, one after the other.

    The score is the mean over examples that are drawn of the members in proportion to their
    weights: by size or alike, as the group says of its metric; alike for each direct member where
    a group aggregates nothing, or its members have no metric in common. A task that is in several
    groups within has the sum of its weights.

    Args:
        name: The study's name of the task.
        tree: The group.
        of_leaves: The tasks of ``tree.leaves()``; one that is there twice is the same.
        metric: The metric that the study asks for, if any.

    Raises:
        SpecError: If a member's score is no mean over its examples.
    """

    def __init__(
        self,
        name: str,
        tree: Branch,
        of_leaves: Sequence[PreparedTask],
        metric: str | None = None,
    ) -> None:
        members = list(dict.fromkeys(of_leaves))
        self._name = name
        self._members = members
        for member in members:
            if not isinstance(member.info.kind, Mean):
                raise SpecError(
                    f"tasks.{name}: {member.info.metric!r} of {member.lm_name!r} is no mean over "
                    "examples, so that it cannot be part of a group's score; choose another metric"
                )
        sizes = [member.info.n_examples for member in members]
        metrics = {member.info.metric for member in members}
        pairs = list(zip(tree.leaves(), of_leaves, strict=True))
        by_leaf = {id(leaf): member.info.n_examples for leaf, member in pairs}
        shared = metric or (next(iter(metrics)) if len(metrics) == 1 else None)
        parts = _weights(tree, by_leaf, shared)
        weights: dict[PreparedTask, float] = defaultdict(float)
        for leaf, member in pairs:
            weights[member] += parts[id(leaf)]
        self._starts = [0, *accumulate(sizes)]
        self.info = TaskInfo(
            n_examples=sum(sizes),
            metric=next(iter(metrics)) if len(metrics) == 1 else "mean",
            members=tuple(
                Member(member.lm_name, size, weights[member])
                for member, size in zip(members, sizes, strict=True)
            ),
            other_metrics=members[0].info.other_metrics,
            keeps_answers=members[0].info.keeps_answers,
            reading_keys=members[0].info.reading_keys,
            losses=tuple(
                kind
                for kind in get_args(LossKind)
                if any(kind in member.info.losses for member in members)
            ),
            without_loss=tuple(
                start + example
                for start, member in zip(self._starts, members, strict=False)
                for example in member.info.without_loss
            ),
            origins=tuple(origin for member in members for origin in member.info.origins),
        )

    @property
    def source(self) -> str:
        """Return what its examples are drawn from, for messages."""
        return ", ".join(dict.fromkeys(member.source for member in self._members))

    @property
    def is_chat(self) -> bool:
        """Whether prompts are turns of a chat template."""
        return self._members[0].is_chat

    def _place(self, example: int) -> tuple[int, int]:
        """Return the member that an example is of, and its place there."""
        member = next(i for i, end in enumerate(self._starts[1:]) if example < end)
        return member, example - self._starts[member]

    def parts(self, examples: Sequence[int]) -> list[TaskPart]:
        """Return which documents of which tasks of lm-eval's the examples are."""
        placed: dict[int, list[int]] = defaultdict(list)
        for place, example in enumerate(examples):
            placed[self._place(example)[0]].append(place)
        parts = []
        for member, places in placed.items():
            its = [self._place(examples[place])[1] for place in places]
            [part] = self._members[member].parts(its)
            parts.append(replace(part, places=tuple(places)))
        return parts

    def prompts(self, example: int) -> tuple[str, ...]:
        """Return the text of each request of an example, its continuation left out."""
        member, place = self._place(example)
        return self._members[member].prompts(place)

    def answers(self, examples: Sequence[int]) -> tuple[Answer, ...]:
        """Return what the model said to examples when they were last scored."""
        placed = [(example, *self._place(example)) for example in examples]
        return tuple(
            replace(self._members[member].answers([place])[0], example=example)
            for example, member, place in placed
        )

    def loss(self, lm: Any, examples: Sequence[int]) -> Tensor:
        """Return the loss of each example."""
        losses: dict[tuple[int, int], Tensor] = {}
        for member, its in self._by_member(examples).items():
            losses |= self._placed(member, its, self._members[member].loss(lm, its))
        return torch.stack([losses[self._place(example)] for example in examples])

    def log_probabilities(self, lm: Any, examples: Sequence[int]) -> list[Tensor]:
        """Return the log-probabilities of each example's choices."""
        answers: dict[tuple[int, int], Tensor] = {}
        for member, its in self._by_member(examples).items():
            given = self._members[member].log_probabilities(lm, its)
            answers |= self._placed(member, its, given)
        return [answers[self._place(example)] for example in examples]

    @staticmethod
    def _placed(
        member: int, places: Sequence[int], given: Iterable[Tensor]
    ) -> dict[tuple[int, int], Tensor]:
        """Return what was given for a member's examples, by member and place."""
        return {(member, place): of for place, of in zip(places, given, strict=True)}

    def _by_member(self, examples: Sequence[int]) -> dict[int, list[int]]:
        """Return each member's examples, by their places in it."""
        by_member: dict[int, list[int]] = defaultdict(list)
        for member, place in map(self._place, examples):
            by_member[member].append(place)
        return by_member

    def grades(self, lm: Any, examples: Sequence[int]) -> tuple[float, ...]:
        """Return how clearly examples were answered; none where not all of them can be graded."""
        placed = map(self._place, examples)
        graded = [self._members[member].grades(lm, [place]) for member, place in placed]
        return tuple(grade for its in graded for grade in its) if all(graded) else ()

    def score(self, lm: Any, examples: Sequence[int]) -> tuple[float, ...]:
        """Return one score per example, higher is better."""
        places, by_member = map(self._place, examples), self._by_member(examples)
        requests = {m: self._members[m].requests.of(wanted) for m, wanted in by_member.items()}
        asked = [r for groups in requests.values() for group in groups for r in group]
        ask(lm, asked, self._name)
        scores: dict[tuple[int, int], float] = {}
        for member, wanted in by_member.items():
            given = self._members[member].scores(requests[member])
            scores |= {(member, p): score for p, score in zip(wanted, given, strict=True)}
        return tuple(scores[place] for place in places)


def _weights(
    node: Leaf | Branch, sizes: Mapping[int, int], metric: str | None
) -> dict[int, float]:
    """Return each task's part of a group's score, by the identity of its leaf; they sum to 1."""
    if isinstance(node, Leaf):
        return {id(node): 1.0}
    rule = next((m for m in node.metrics if m.name == metric), None)
    leaves = node.leaves()
    if rule is not None:
        parts = [float(sizes[id(leaf)]) if rule.by_size else 1.0 for leaf in leaves]
        return {id(leaf): part / sum(parts) for leaf, part in zip(leaves, parts, strict=True)}
    return {
        leaf: weight / len(node.children)
        for child in node.children
        for leaf, weight in _weights(child, sizes, metric).items()
    }
