"""A task whose ``select`` and ``hold_out`` are of different splits: one after the other."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from searchmerge.errors import SpecError
from searchmerge.evaluators.evaluator import Answer, PartInfo, TaskInfo
from searchmerge.evaluators.lm_harness.group import PreparedGroup
from searchmerge.evaluators.lm_harness.task import PreparedTask, TaskPart
from searchmerge.wording import counted

Prepared = PreparedTask | PreparedGroup


class PreparedParts:
    """A task or group in the split of ``select``, and after it in that of ``hold_out``.

    Args:
        name: The study's name of the task.
        select: The task, set to score the one split.
        hold_out: The same, set to score the other.

    Raises:
        SpecError: If an example is in both.
    """

    def __init__(self, name: str, select: Prepared, hold_out: Prepared) -> None:
        _check_apart(name, select, hold_out)
        self._select = select
        self._hold_out = hold_out
        self._n_select = select.info.n_examples
        self.info = replace(
            TaskInfo.of_parts(_part_info(select), _part_info(hold_out)),
            metric=select.info.metric,
            kind=select.info.kind,
            other_metrics=select.info.other_metrics,
            keeps_answers=select.info.keeps_answers,
            reading_keys=select.info.reading_keys,
            losses=select.info.losses,
            without_loss=(
                *select.info.without_loss,
                *(self._n_select + example for example in hold_out.info.without_loss),
            ),
            origins=select.info.origins + hold_out.info.origins,
        )

    @property
    def is_chat(self) -> bool:
        """Whether prompts are turns of a chat template."""
        return self._select.is_chat

    def _of(self, examples: Sequence[int]) -> tuple[Prepared, int]:
        """Return whose the examples are, all of one part, and which of the task's is its first."""
        is_select = examples[0] < self._n_select
        return (self._select, 0) if is_select else (self._hold_out, self._n_select)

    def parts(self, examples: Sequence[int]) -> list[TaskPart]:
        """Return which documents of which tasks of lm-eval's the examples of a part are."""
        prepared, first = self._of(examples)
        return prepared.parts([example - first for example in examples])

    def prompts(self, example: int) -> tuple[str, ...]:
        """Return the text of each request of an example, its continuation left out."""
        prepared, first = self._of([example])
        return prepared.prompts(example - first)

    def answers(self, examples: Sequence[int]) -> tuple[Answer, ...]:
        """Return what the model said to examples of a part when they were last scored."""
        prepared, first = self._of(examples)
        said = prepared.answers([example - first for example in examples])
        return tuple(replace(answer, example=answer.example + first) for answer in said)

    def grades(self, lm: Any, examples: Sequence[int]) -> tuple[float, ...]:
        """Return how clearly examples of a part were answered when they were last scored."""
        prepared, first = self._of(examples)
        return prepared.grades(lm, [example - first for example in examples])

    def loss(self, lm: Any, examples: Sequence[int]) -> Tensor:
        """Return the loss of each example of a part."""
        prepared, first = self._of(examples)
        return prepared.loss(lm, [example - first for example in examples])

    def log_probabilities(self, lm: Any, examples: Sequence[int]) -> list[Tensor]:
        """Return the log-probabilities of each choice of examples of a part."""
        prepared, first = self._of(examples)
        return prepared.log_probabilities(lm, [example - first for example in examples])

    def score(self, lm: Any, examples: Sequence[int]) -> tuple[float, ...]:
        """Return one score per example of a part, or one in all, higher is better."""
        prepared, first = self._of(examples)
        return prepared.score(lm, [example - first for example in examples])


def _check_apart(name: str, select: Prepared, hold_out: Prepared) -> None:
    seen, unseen = (_documents(prepared) for prepared in (select, hold_out))
    for (lm_name, source), documents in seen.items():
        if shared := documents & unseen.get((lm_name, source), set()):
            raise SpecError(
                f"tasks.{name}.split: select and hold_out share "
                f"{counted(len(shared), 'example')} of {lm_name!r}, {source}; "
                "name another split for one of them"
            )


def _documents(prepared: Prepared) -> dict[tuple[str, str], set[int]]:
    """Return which documents of which task's split the examples are."""
    documents: dict[tuple[str, str], set[int]] = defaultdict(set)
    for part in prepared.parts(range(prepared.info.n_examples)):
        documents[part.task.lm_name, part.task.source].update(part.documents)
    return documents


def _part_info(prepared: Prepared) -> PartInfo:
    info, source = prepared.info, prepared.source
    if isinstance(prepared, PreparedTask) and prepared.spec.samples is not None:
        source = f"{info.n_examples} samples of {source}"
    return PartInfo(source, info.n_examples, info.members)
