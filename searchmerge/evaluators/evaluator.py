"""What an evaluator is, what a study may say to it, and the registry of those there are."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from searchmerge.evaluators.heads import ExpertHead, HeadUse, Pooling
from searchmerge.evaluators.score_kind import Mean, ScoreKind
from searchmerge.registry import Registry

Keys = TypeVar("Keys")
Section = TypeVar("Section")

LossKind = Literal["labels", "entropy", "agreement"]
"""How wrong answers are (``labels``), how unsure they are, or how far from the own expert's."""

HINT = "hint"
"""In the metadata of a key's field: the key must be given, and this says what it is."""


@dataclass(frozen=True, slots=True)
class Member:
    """A part of a task's examples that has a score of its own, e.g. a subject of many.

    Attributes:
        name: What it is called in reports.
        n_examples: How many of the task's examples, which follow one another, are its.
        weight: Its part of the task's score, in (0, 1]; those of all members sum to 1.
    """

    name: str
    n_examples: int
    weight: float


@dataclass(frozen=True, slots=True)
class PartInfo:
    """What one part of a task's examples is drawn from, where the other is drawn from other data.

    Attributes:
        source: The data, for messages: ``"split 'test'"``.
        n_examples: How many examples they are.
        members: As those of a task.
    """

    source: str
    n_examples: int
    members: tuple[Member, ...] = ()


@dataclass(frozen=True, slots=True)
class Origin:
    """Where some of a task's examples come from: tasks with the same rows share them.

    Attributes:
        data: Tells the data from all other, and says to a person which they are.
        rows: Where in the data each example stands.
    """

    data: str
    rows: Sequence[int]


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What the search must know of a task before anything is scored.

    Attributes:
        n_examples: How many examples the task has, in a fixed order.
        metric: Name of the score, for reports: ``"acc"``.
        kind: How the score comes from what the evaluator gives for examples.
        members: The parts that its examples are drawn from in proportion to their weights;
            none where all examples are alike.
        other_metrics: Names of the scores that are reported beside this one.
        keeps_answers: Whether what the model says to held-out examples is kept, as it is where
            other metrics come of it.
        reading_keys: The keys that decide how the model is asked and its answers are read.
        losses: The losses that there are of it; see :class:`Differentiable`.
        without_loss: The examples that lack the loss which plans are refined by, though they are
            scored: those without a target, where it goes by targets.
        n_unlabelled: How many more examples follow these that have no label: they are never
            scored, and are for losses that need none.
        parts: What ``select`` and ``hold_out`` are each drawn from where that differs: the first
            of the task's examples are those of ``select``, and have the members named here.
            Empty where both are drawn from all.
        origins: Where the examples come from, in their order; none where that is not known.
    """

    n_examples: int
    metric: str = "score"
    kind: ScoreKind = field(default_factory=Mean)
    members: tuple[Member, ...] = ()
    other_metrics: tuple[str, ...] = ()
    keeps_answers: bool = False
    reading_keys: tuple[str, ...] = ()
    losses: tuple[LossKind, ...] = ()
    without_loss: tuple[int, ...] = ()
    n_unlabelled: int = 0
    parts: Mapping[str, PartInfo] = field(default_factory=dict)
    origins: tuple[Origin, ...] = field(default=(), compare=False)  # nodes keep data elsewhere

    @classmethod
    def of_parts(cls, select: PartInfo, hold_out: PartInfo, **said: Any) -> "TaskInfo":
        """Return what is known of a task whose parts are drawn from different data."""
        parts = {"select": select, "hold_out": hold_out}
        return cls(select.n_examples + hold_out.n_examples, parts=parts, **said)

    @property
    def unlabelled(self) -> range:
        """Return the examples that have no label."""
        return range(self.n_examples, self.n_examples + self.n_unlabelled)

    def rows(self) -> Iterator[tuple[str, int]]:
        """Yield the data and the row that each example comes from; nothing if it is not known."""
        return ((origin.data, row) for origin in self.origins for row in origin.rows)

    def n_of(self, part: str) -> int:
        """Return from how many examples a part is drawn."""
        return self.parts[part].n_examples if self.parts else self.n_examples

    def members_of(self, part: str) -> list[tuple[Member, range]]:
        """Return the members that a part is drawn from, each with its examples."""
        members, start = self.members, 0
        if self.parts:
            members = self.parts[part].members
            start = self.parts["select"].n_examples if part == "hold_out" else 0
        ends = accumulate((member.n_examples for member in members), initial=start)
        return [(m, range(a, b)) for m, (a, b) in zip(members, pairwise(ends), strict=True)]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to an example, and what came of it beside the score.

    Attributes:
        example: Position in the task's fixed order.
        metrics: Name of each of the task's other metrics to its value, higher is better.
        question: What was asked, without instructions and examples shown.
        expected: The right answer.
        said: What the model said, as it came.
        read: What was read in it, e.g. by a filter.
    """

    example: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    question: str = ""
    expected: str = ""
    said: tuple[str, ...] = ()
    read: tuple[str, ...] = ()


class Evaluator(Protocol):
    """Scores whatever weights are in a model now, and leaves them as they were."""

    @property
    def tasks(self) -> Mapping[str, TaskInfo]:
        """Return what the search must know of each task, by its name."""
        ...

    def score(self, model: nn.Module, task: str, examples: Sequence[int]) -> tuple[float, ...]:
        """Return as many numbers as the task's kind of score says, higher is better.

        ``Mean``: one per example; ``OfRecords``: one record per example; ``Whole``: one in all.

        The same weights and the same ``examples`` give the same scores, in any process and
        after any other call.

        Args:
            model: The resident model.
            task: One of ``tasks``.
            examples: Positions in the task's fixed order, each in [0, n_examples).

        Raises:
            EvaluationError: If the model cannot be scored, e.g. its logits are not finite; it
                names the task and the example.
        """
        ...


@runtime_checkable
class Differentiable(Protocol):
    """An evaluator that has a loss of tasks whose ``losses`` hold ``labels``."""

    def loss(self, model: nn.Module, task: str, examples: Sequence[int]) -> Tensor:
        """Return how wrong the model is on each example, ``(n_examples,)``, lower is better.

        Or a scalar, the mean over the examples, where no more is known. It can be differentiated
        by the model's parameters, where gradients are enabled; the model is left as it was.

        Args:
            model: The resident model.
            task: One of ``tasks``.
            examples: Positions in the task's fixed order, one or more.
        """
        ...


@runtime_checkable
class Predicting(Protocol):
    """An evaluator that has distributions over answers, for ``entropy`` and ``agreement``."""

    def log_probabilities(
        self, model: nn.Module, task: str, examples: Sequence[int]
    ) -> Sequence[Tensor]:
        """Return each example's log-probabilities of its answers, ``(n_answers,)`` float32.

        Of an example that is scored at several positions ``(n_positions, n_answers)``. They can
        be differentiated like a :class:`Differentiable` evaluator's loss, and need no label.
        """
        ...


@runtime_checkable
class Follower(Protocol):
    """An evaluator that may hold a copy of the resident model's weights."""

    def follow(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Take over the weights that a merge has left in the model.

        Args:
            model: The resident model.
            weights: Its weights by their names in the checkpoint.

        Raises:
            EvaluationError: If nothing can be scored with them.
        """
        ...


@runtime_checkable
class Answering(Protocol):
    """An evaluator that tells what a model said."""

    def answers(self, task: str, examples: Sequence[int]) -> tuple[Answer, ...]:
        """Return what was said to examples when they were last scored."""
        ...


@runtime_checkable
class Tunable(Protocol):
    """An evaluator that measures how it scores soonest, which may change scores in 16 bits."""

    def tune(self, model: nn.Module, task: str, examples: Sequence[int]) -> dict[str, Any]:
        """Return how a task is scored soonest here, by some examples, as JSON; or nothing."""
        ...

    def use(self, task: str, tuning: Mapping[str, Any]) -> None:
        """Score a task in that way from now on; as without having measured if it is empty."""
        ...


@runtime_checkable
class Grading(Protocol):
    """An evaluator that tells how clearly examples were answered, beside right or wrong."""

    def grades(self, task: str, examples: Sequence[int]) -> tuple[float, ...]:
        """Return how clearly examples were answered when they were last scored, one each.

        Any finite numbers that grow with it, in a unit of their own for each task: the log-odds
        of the right answer against the best other, say. None where the task has no such number.
        """
        ...


@runtime_checkable
class Prompting(Protocol):
    """An evaluator that shows a person what the model is given."""

    def shown(self, task: str, example: int) -> str:
        """Return what the model reads first for an example, special tokens as text."""
        ...

    def doubts(self, task: str) -> Sequence[str]:
        """Return what a person may not have meant, a sentence each."""
        ...


@dataclass(frozen=True)
class EvaluationContext:
    """What evaluators are built from, beside what the study says to them.

    Attributes:
        folder: The study's folder.
        resolve: Returns a file or folder of the study's as a path, and what is none, e.g. the
            name of a dataset on the hub, as it is.
        model_dir: Where the base's configuration and tokenizer, or image processor, are.
        device: Where the resident model is: a torch device.
        dtype: Of the resident model.
        head: Returns an expert's own classification head: of a linear layer on a pooled output
            where a pooling is given, else of the model's class.
        trust_remote_code: Whether Python files of the model may run.
        base_dir: Where the base's weights are; ``None`` where the resident model has rows for
            tokens that they do not have.
        seed: The study's, for what is drawn at random.
        is_graded: Whether the study goes by how clearly examples are answered.
        learns: The loss that plans are refined by; ``None`` where none are.
    """

    folder: Path
    resolve: Callable[[str], str]
    model_dir: Path
    device: str
    dtype: torch.dtype
    head: Callable[[str, Pooling | None], ExpertHead]
    trust_remote_code: bool = False
    base_dir: Path | None = None
    seed: int = 0
    is_graded: bool = True
    learns: LossKind | None = None

    def sized(self, asked: int | None, sizes: Mapping[str, int]) -> int:
        """Return the size asked for, or that for the kind of device; a CPU's for others."""
        return asked or sizes.get(self.device.partition(":")[0], sizes["cpu"])


@dataclass(frozen=True)
class NoKeys:
    """The keys of a section that has none."""


def needed(hint: str) -> Any:
    """Return the field of a key that a study must give; ``hint`` tells a user what to write."""
    return field(default=None, metadata={HINT: hint})


@dataclass(frozen=True, kw_only=True)
class EvaluatorKind(Generic[Keys, Section]):
    """A kind of evaluator: what a study may say to it, and how it is built from that.

    Keys are declared as frozen dataclasses, with ``annotated_types`` for ranges; their
    ``__post_init__`` may raise ``ValueError`` of keys that do not go together. What is checked
    there is reported with file, line and key. A tuple may be written as a single value, and a
    dataclass as its first key's value where the others have a default.

    Attributes:
        keys: The keys of a task, beside those that every task may have.
        build: Makes the evaluators of all the study's tasks of this kind: task name to
            evaluator, which may be one for several. Gets the tasks' keys and the section's.
        section: The keys of the study's section that has this kind's name; ``NoKeys`` for none.
        model_classes: The classes of transformers that the resident model is loaded as, by the
            tasks' keys and the section's; none where any will do.
        other_classes: Classes that will do as well where a study names one of them, by the
            section's keys.
        loading: What else transformers is given to load the resident model, by the section's
            keys.
        places: Files, folders and modules of the study's folder that decide scores, as the study
            writes them: a run is not resumed where one has changed.
        referred: Files elsewhere that these refer to, given the study's folder too.
        packages: Distributions whose versions decide scores, by the section's keys.
        heads: The experts whose heads the tasks use, and how.
        free_keys: Keys of the section or of tasks that can change no score.
        private_key: The key of the section that lists patterns of tensors which are each
            expert's own though the base has them too.
    """

    keys: type[Keys]
    build: Callable[[Mapping[str, Keys], Section, EvaluationContext], Mapping[str, "Evaluator"]]
    section: type[Section]
    model_classes: Callable[[Mapping[str, Keys], Section], Sequence[str]]
    other_classes: Callable[[Section], Sequence[str]] = lambda section: ()
    loading: Callable[[Section], Mapping[str, Any]] = lambda section: {}
    places: Callable[[Mapping[str, Keys], Section], Iterable[str]] = lambda tasks, section: ()
    referred: Callable[[Mapping[str, Keys], Section, Path], Iterable[Path]] = (
        lambda tasks, section, folder: ()
    )
    packages: Callable[[Section], Sequence[str]] = lambda section: ()
    heads: Callable[[Mapping[str, Keys], Section], Mapping[str, HeadUse]] = lambda tasks, keys: {}
    free_keys: tuple[str, ...] = ()
    private_key: str | None = None


EVALUATORS: Registry[EvaluatorKind[Any, Any]] = Registry("evaluator", "searchmerge.evaluators")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep dropout off, and leave the model's mode as it was."""
    if not model.training:  # to set it once more would visit every module
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
