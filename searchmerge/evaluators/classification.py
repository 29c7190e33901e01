"""The ``classification`` evaluator: experts that share an encoder, each with a head of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, get_args

import numpy as np
import torch
from annotated_types import Ge, Len
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.evaluator import (
    EVALUATORS,
    EvaluationContext,
    EvaluatorKind,
    LossKind,
    TaskInfo,
    evaluating,
    needed,
)
from searchmerge.evaluators.heads import Head, HeadUse, Pooling
from searchmerge.evaluators.inputs import Images, Inputs, Processors, Texts
from searchmerge.evaluators.rows import (
    DataPlace,
    DataPlaces,
    Joined,
    Sources,
    Splits,
    column,
    data_paths,
    data_sources,
    load_rows,
    rows_info,
    text_column,
)
from searchmerge.evaluators.score_kind import Mean, OfRecords, ScoreKind
from searchmerge.wording import counted

Metric = Literal["acc", "macro_f1"]

_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
_BATCH_IMAGES = {"cpu": 8, "cuda": 128}


@dataclass(frozen=True)
class ClassificationKeys:
    """The keys of a task whose texts or images are classified.

    Attributes:
        expert: The expert whose head classifies; that of the task's name if none is named.
        data: Where the rows are; or where those of ``select`` and of ``hold_out`` are.
        split: Which of its splits; not needed for a single file. Or one for each part.
        text: The column of the text, or the two columns of a pair.
        image: The column of the image; a task has either texts or images.
        label: The column of the class. A row without one (null) is never scored; it is for
            ``search.refine`` with a loss that needs no label.
        labels: The names of the classes in the head's order; the expert's own if ``None``.
        metric: ``acc`` or ``macro_f1``.
    """

    expert: str = needed("name the expert whose head classifies, or give the task its name")
    data: DataPlace | DataPlaces = needed("give a file, a folder, or a dataset of the hub")
    split: str | Splits | None = None
    text: Annotated[tuple[str, ...], Len(1, 2)] | None = None
    image: str | None = None
    label: str = "label"
    labels: tuple[str, ...] | None = None
    metric: Metric = "acc"

    def __post_init__(self) -> None:
        if (self.text is None) == (self.image is None):
            raise ValueError("name the column of the data that is classified: text, or image")


@dataclass(frozen=True)
class ClassificationSection:
    """How classifiers are scored, and which tensors are their experts' own heads.

    Without ``pooling`` the model is the base's ``AutoModelForSequenceClassification`` or
    ``AutoModelForImageClassification``, and each expert's head is put into it. With ``pooling``
    it is its ``AutoModel``, and a head is a linear layer on the pooled output.

    Attributes:
        pooling: How the encoder's output becomes one vector.
        heads: Patterns of tensors that are private heads though the base has them.
        batch_tokens: Tokens of one forward pass over texts; by the device if ``None``.
        batch_images: Images of one forward pass; by the device if ``None``.
        max_length: Tokens after which a text is cut; the tokenizer's own if ``None``.
    """

    pooling: Pooling | None = None
    heads: tuple[str, ...] = ()
    batch_tokens: Annotated[int, Ge(64)] | None = None
    batch_images: Annotated[int, Ge(1)] | None = None
    max_length: Annotated[int, Ge(2)] | None = None


@dataclass(frozen=True)
class ClassificationTask:
    """A data set, and whose head classifies it.

    Attributes:
        data: Where its rows are.
        head: The head that gives one logit per class.
        text: The column of the text, or the two columns of a pair; none for images.
        image: The column of the image; ``None`` for texts.
        label: The column of the class: its index among the logits, or its name.
        class_names: The name of each logit's class, where they are known.
        metric: ``acc``, or ``macro_f1``, which is no mean over examples.
    """

    data: Sources
    head: Head
    text: tuple[str, ...] = ()
    image: str | None = None
    label: str = "label"
    class_names: tuple[str, ...] = ()
    metric: Metric = "acc"


class Classification:
    """Scores text or image classifiers on the resident encoder, each task with its own head.

    Args:
        tasks: The study's name of each task, and what it is.
        model_dir: Where the base's tokenizer, or its image processor, is.
        batch_tokens: Tokens of one forward pass over texts, padding included, 1 or more.
        batch_images: Images of one forward pass, 1 or more.
        max_length: Tokens after which a text is cut; the tokenizer's own if ``None``.
        trust_remote_code: Whether Python files of the model may run.

    Raises:
        SpecError: If data, split or column are not there, a text has no tokens, or a label is
            none of the head's.
    """

    def __init__(
        self,
        tasks: Mapping[str, ClassificationTask],
        *,
        model_dir: Path,
        batch_tokens: int = 2048,
        batch_images: int = 16,
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._tasks = tasks
        self._inputs: dict[str, Inputs] = {}
        self._targets: dict[str, Tensor] = {}
        self._grades: dict[str, dict[int, float]] = {name: {} for name in tasks}
        self.tasks: dict[str, TaskInfo] = {}
        processors = Processors(model_dir, max_length, trust_remote_code=trust_remote_code)
        for name, task in tasks.items():
            where = f"tasks.{name}"
            parts, unlabelled = _by_label(task, where)
            indices = [class_indices(rows, task, where) for rows in parts]
            self._targets[name] = torch.tensor([index for of_part in indices for index in of_part])
            every = [*parts, *unlabelled]
            self._inputs[name] = (
                Images(
                    Joined([column(rows, task.image, f"{where}.image") for rows in every]),
                    processors,
                    batch_images,
                    where,
                )
                if task.image is not None
                else Texts(
                    [
                        [
                            text
                            for rows in every
                            for text in text_column(rows, key, f"{where}.text")
                        ]
                        for key in task.text
                    ],
                    processors,
                    batch_tokens,
                    where,
                )
            )
            self.tasks[name] = rows_info(
                task.data,
                list(map(len, parts)),
                kind=_score_kind(task),
                metric=task.metric,
                losses=get_args(LossKind),
                n_unlabelled=sum(map(len, unlabelled)),
            )

    @torch.no_grad()
    def score(self, model: nn.Module, task: str, examples: Sequence[int]) -> tuple[float, ...]:
        """Return 1 or 0 per example, whether it is classified correctly.

        For macro-F1 it is the record of the example that :func:`macro_f1` reads.

        Raises:
            EvaluationError: If a logit is not finite, or an image cannot be read.
        """
        if not examples:
            return ()
        head, by_example = self._tasks[task].head, self._logits(model, task, examples).cpu()
        finite = torch.isfinite(by_example).all(1)
        if not finite.all():
            example = examples[int((~finite).nonzero()[0, 0])]
            raise EvaluationError(
                f"task {task!r}, example {example}: the model gave logits that are not finite"
            )
        predicted, true = by_example.argmax(1), self._targets[task][list(examples)]
        if self._tasks[task].metric == "macro_f1":
            return tuple((true * head.n_classes + predicted).double().tolist())
        margins = log_odds(by_example, true).tolist()
        self._grades[task] |= dict(zip(examples, margins, strict=True))
        return tuple((predicted == true).float().tolist())

    def loss(self, model: nn.Module, task: str, examples: Sequence[int]) -> Tensor:
        """Return the cross-entropy of each example's class, in nats."""
        logits = self._logits(model, task, examples)
        true = self._targets[task][list(examples)].to(logits.device)
        return cross_entropy(logits, true, reduction="none")

    def log_probabilities(
        self, model: nn.Module, task: str, examples: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """Return the log-probabilities of each example's classes, ``(n_classes,)``."""
        return self._logits(model, task, examples).log_softmax(1).unbind()

    def _logits(self, model: nn.Module, task: str, examples: Sequence[int]) -> Tensor:
        """Return each example's logits, ``(n_examples, n_classes)`` float32."""
        places, logits = [], []
        _name_padding(model, self._inputs[task].padding)
        with evaluating(model):
            for batch, inputs in self._inputs[task].batches(examples):
                logits.append(self._tasks[task].head.logits(model, _placed(inputs, model)))
                places += batch
        by_batch = torch.cat(logits).float()
        return by_batch[torch.tensor(places, device=by_batch.device).argsort()]

    def grades(self, task: str, examples: Sequence[int]) -> tuple[float, ...]:
        """Return the log-odds of each example's class against the most likely other class.

        There are none for macro-F1, nor where the head has a single class.
        """
        if self._tasks[task].metric == "macro_f1" or self._tasks[task].head.n_classes < 2:
            return ()
        return tuple(self._grades[task][example] for example in examples)


def log_odds(logits: Tensor, true: Tensor) -> Tensor:
    r"""Return :math:`z_y - \max_{k \ne y} z_k` of each row, above 0 where y is predicted.

    Args:
        logits: z, ``(n, n_classes)`` float32.
        true: y, ``(n,)`` int64.
    """
    of_true = logits.gather(1, true[:, None])
    others = logits.scatter(1, true[:, None], -torch.inf)
    return of_true.squeeze(1) - others.amax(1)


def _name_padding(model: Any, token: int | None) -> None:
    """Tell a decoder what fills texts, where its configuration does not; it passes over that."""
    if token is None or not hasattr(model, "config"):
        return
    config = model.config.get_text_config()
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = token


def _placed(inputs: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the inputs on the model's device, pixels in its dtype."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    return {
        name: tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


def _score_kind(task: ClassificationTask) -> ScoreKind:
    if task.metric == "acc":
        return Mean()
    return OfRecords(partial(macro_f1, n_classes=task.head.n_classes))


def macro_f1(records: Sequence[float], n_classes: int) -> float:
    """Return the mean over classes of F1, over the classes that occur, true or predicted.

    Args:
        records: Of each example its true class times ``n_classes``, plus the predicted one.
        n_classes: How many classes there are.
    """
    cells = np.bincount(np.asarray(records, dtype=np.int64), minlength=n_classes**2)
    table = cells.reshape(n_classes, n_classes)  # true class, predicted class
    counts = table.sum(0) + table.sum(1)
    occurring = counts > 0
    return float((2 * table.diagonal()[occurring] / counts[occurring]).mean())


# --- Labels -----------------------------------------------------------------------------------


def _by_label(task: ClassificationTask, where: str) -> tuple[list[Any], list[Any]]:
    """Return the rows of each source that have a label, and those that have none.

    Raises:
        SpecError: If no row of a source has one: trials are scored by them.
    """
    labelled, unlabelled = [], []
    for source in task.data:
        rows = load_rows(source, where)
        labels = list(column(rows, task.label, f"{where}.label"))
        without = [row for row, label in enumerate(labels) if label is None]
        if len(without) == len(labels):
            raise SpecError(
                f"{where}.label: no row of {source.name} has a label in column {task.label!r}; "
                "rows without one are for search.refine with loss: entropy or agreement, and "
                "trials are scored by rows that have one"
            )
        if without:
            unlabelled.append(rows.select(without))
            rows = rows.select([row for row, label in enumerate(labels) if label is not None])
        labelled.append(rows)
    return labelled, unlabelled


def class_indices(rows: Any, task: ClassificationTask, where: str) -> list[int]:
    """Return the index of each row's class among the logits of the task's head.

    Names are looked up among ``class_names``. Where a data set numbers its classes and names
    them too, and the head knows all of these names, the names decide and not the numbers.

    Raises:
        SpecError: If a label is not one of the head's classes.
    """
    labels = list(column(rows, task.label, f"{where}.label"))
    n_classes = task.head.n_classes
    if task.class_names and len(task.class_names) != n_classes:
        raise SpecError(
            f"{where}.labels: there are {len(task.class_names)}; "
            f"its head has {counted(n_classes, 'class', 'classes')}"
        )
    index_of = {name: index for index, name in enumerate(task.class_names)}
    twice = {name for name in task.class_names if task.class_names.count(name) > 1}
    data_names: Sequence[str] = getattr(rows.features[task.label], "names", None) or ()
    if data_names and set(data_names) <= set(index_of):
        labels = [
            data_names[label] if _is_index(label, len(data_names)) else label for label in labels
        ]
    indices = []
    for row, label in enumerate(labels):
        if label in twice:
            raise SpecError(
                f"{where}.labels: {label!r} stands twice in {', '.join(task.class_names)}; each "
                "class needs a name of its own"
            )
        index = index_of.get(label) if isinstance(label, str) else label
        if not _is_index(index, n_classes):
            names = ", ".join(index_of) or "it does not say; list them as labels"
            raise SpecError(
                f"{where}.label: row {row} has {label!r} in column {task.label!r}, which is "
                f"none of the head's classes (0 to {n_classes - 1}; names: {names})"
            )
        indices.append(index)
    return indices


def _is_index(value: Any, n: int) -> TypeGuard[int]:
    return isinstance(value, int) and 0 <= value < n


# --- What a study says -------------------------------------------------------------------------


def _build(
    tasks: Mapping[str, ClassificationKeys],
    section: ClassificationSection,
    context: EvaluationContext,
) -> dict[str, Classification]:
    heads = {t.expert: context.head(t.expert, section.pooling) for t in tasks.values()}
    evaluator = Classification(
        {
            name: ClassificationTask(
                data_sources(task.data, task.split, context.resolve),
                heads[task.expert].head,
                text=task.text or (),
                image=task.image,
                label=task.label,
                class_names=task.labels or heads[task.expert].labels,
                metric=task.metric,
            )
            for name, task in tasks.items()
        },
        model_dir=context.model_dir,
        trust_remote_code=context.trust_remote_code,
        batch_tokens=context.sized(section.batch_tokens, _BATCH_TOKENS),
        batch_images=context.sized(section.batch_images, _BATCH_IMAGES),
        max_length=section.max_length,
    )
    return dict.fromkeys(tasks, evaluator)


def _model_classes(
    tasks: Mapping[str, ClassificationKeys], section: ClassificationSection
) -> list[str]:
    if section.pooling is not None:
        return ["AutoModel"]
    inputs = ["Sequence" if task.text else "Image" for task in tasks.values()]
    return [f"AutoModelFor{kind}Classification" for kind in inputs]


def _heads(
    tasks: Mapping[str, ClassificationKeys], section: ClassificationSection
) -> dict[str, HeadUse]:
    uses: dict[str, HeadUse] = {}
    for task in tasks.values():
        labels = uses[task.expert].labels if task.expert in uses else ()
        uses[task.expert] = HeadUse(section.pooling, labels or task.labels or ())
    return uses


EVALUATORS.register("classification")(
    EvaluatorKind(
        keys=ClassificationKeys,
        section=ClassificationSection,
        build=_build,
        model_classes=_model_classes,
        places=lambda tasks, section: [p for t in tasks.values() for p in data_paths(t.data)],
        heads=_heads,
        private_key="heads",
    )
)
